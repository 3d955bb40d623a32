"""The study: its grid, what it runs and does not run again, and what its tables say."""

import ast
import csv
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys

import commands
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from clsl_jax import command_line, methods, study, study_report
from clsl_jax import config as config_lib
from clsl_jax.errors import InputError


def make_study(**changes):
    base = study.base_study()
    base.update(ConfigDict({"seeds": (0, 1), "known_fractions": (0.1, 0.5), **changes}))
    return base


def test_the_grid_pairs_methods_by_seed():
    made = study.cells(make_study(settings=("epochs=3",), variants=(("a", "clsl", "epochs=9"),)))
    assert len(made) == 2 * 2 * 3
    assert [cell.method for cell in made[:3]] == ["known_asl", "clsl", "a"]
    assert [cell.seed for cell in made] == [0] * 6 + [1] * 6
    third = dict(setting.split("=", 1) for setting in made[2].settings)
    assert (third["epochs"], third["seed"], third["labels.known_fraction"]) == ("9", "0", "0.1")
    assert made[2].directory == os.path.join("cells", "scenes", "uniform-0.1", "a", "seed-0")
    assert len({cell.directory for cell in made}) == len(made)


def test_a_protocol_without_a_fraction_has_one_cell_and_claims_none(tmp_path):
    made = study.cells(make_study(protocols=("uniform", "single_positive")))
    assert [(cell.protocol, cell.known_fraction) for cell in made if cell.seed == 0][::2] == [
        ("uniform", 0.1), ("uniform", 0.5), ("single_positive", 0.1)
    ]  # fmt: skip
    row = {"dataset": "scenes", "protocol": "single_positive", "known_fraction": 0.1}
    shown = {"method": "clsl", "mAP": 40.0, "mAP_sd": np.nan, "seeds": 1, "difference": np.nan}
    ((title, rows),) = study_report._main_tables([{**row, **shown}], make_study())
    assert title == "scenes, labels known by protocol single_positive"
    assert rows == [["method", "test mAP"], ["clsl", "40.00"]]
    study_report._write_csv(str(tmp_path / "x.csv"), [row])
    assert (tmp_path / "x.csv").read_text().splitlines()[1] == "scenes,single_positive,"


def test_shards_part_the_grid(tmp_path, monkeypatch):
    """Each of three jobs runs every third cell, so that none has the dear ones alone."""
    grid = study.cells(make_study())
    ran = []
    monkeypatch.setattr(study.Runner, "run", lambda runner, cell: ran.append(cell))
    console = Console(file=io.StringIO())
    for index in range(3):
        ran.clear()
        shard = study.parse_shard(f"{index}/3")
        assert study.run_cells(grid, str(tmp_path), console, shard) == {}
        assert [grid.index(cell) for cell in ran] == [k for k in range(8) if k % 3 == index]


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "0/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="0 <= i < n"):
        study.parse_shard(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("known_asl", "magic")}, "no method 'magic'; choose from known_bce"),
        ({"baseline": "hill"}, "baseline='hill' is none of known_asl, clsl"),
        ({"settings": ("epoch=3",)}, "no configuration key 'epoch'.*epochs"),
        ({"settings": ("epochs",)}, "expected key=value"),
        ({"variants": (("../x", "clsl", ""),)}, "'../x' has other characters"),
        ({"seeds": ()}, "grid is empty"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        study.cells(make_study(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("a",)}, "no study key 'method'"),
        ({"seeds": "0"}, "seeds='0': expected several"),
        ({"weights": "test"}, "best or last"),
        ({"known_fractions": ("a",)}, "known_fractions: 'a' is no number from 0 to 1"),
        ({"known_fractions": (float("nan"),)}, "nan is no number from 0 to 1"),
        ({"seeds": (0, -1)}, "seeds: -1 is no number"),
        ({"methods": (1,)}, "methods: 1 is no text"),
        ({"variants": ("a",)}, "variants: 'a' is no"),
        ({"published": (("a", "scenes", "uniform", 0.1, 50.0),)}, "published: "),
    ],
)
def test_study_keys_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        study.check({**study.base_study().to_dict(), **changes})


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_valid_configuration(name):
    config = runpy.run_path(commands.CONFIG)["get_config"]()
    with config.unlocked():
        config.update_from_flattened_dict(dict(methods.find(name).settings))
    config_lib.validate(config)
    assert set(methods.find(name).settings) <= set(config_lib.flatten(config_lib.base_config()))


@pytest.mark.parametrize(
    ("arg", "count"),
    [
        (None, 2 * 24 * 7 * 5),
        ("main", 2 * 2 * 3 * 5),
        ("methods", 24 * 2),
        ("fractions", 2 * 4 * 5),
        ("ablation", (1 + 19 + 14) * 2),
        ("quick", 2 * 2 * 2),
    ],
)
def test_the_study_of_scenes_has_every_method(arg, count):
    path = os.path.join(commands.REPOSITORY, "configs", "study", "scenes.py")
    config = runpy.run_path(path)["get_config"](arg)
    study.check(config.to_dict())
    grid = study.cells(config)
    assert len(grid) == count
    if not arg or arg == "methods":
        assert {cell.method for cell in grid} == set(methods.METHODS)


@pytest.mark.parametrize("arg", ["main", "methods", "fractions", "ablation"])
def test_every_cell_of_the_study_of_scenes_is_a_valid_configuration(arg, monkeypatch):
    monkeypatch.chdir(commands.REPOSITORY)
    for cell in study.cells(runpy.run_path("configs/study/scenes.py")["get_config"](arg)):
        config = command_line.config_of(cell.arguments)
        config_lib.validate(config)
        assert (config.seed, config.labels.seed) == (cell.seed, cell.seed)
        assert config.labels.known_fraction == cell.known_fraction
        flat = config_lib.flatten(config)
        for key, text in (setting.split("=", 1) for setting in cell.settings):
            assert str(flat[key]) == text or flat[key] == ast.literal_eval(text), key


def test_what_a_run_cannot_be_configured_to_is_refused(monkeypatch):
    monkeypatch.chdir(commands.REPOSITORY)
    with pytest.raises(InputError, match="epochs"):
        command_line.config_of(["--config=configs/scenes.py", "--config.epochs=many"])
    with pytest.raises(InputError, match=r"nothing\.py: there is no such file"):
        command_line.config_of(["--config=configs/nothing.py"])


def test_cost_of_a_cell_that_took_several_processes(tmp_path):
    study._add_cost(str(tmp_path), 10.0, 2048)
    study._add_cost(str(tmp_path), 5.0, 1024)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost == {"seconds": 15.0, "peak_memory_mib": 2.0}


def test_a_stop_that_comes_when_the_cell_has_ended_already(tmp_path, monkeypatch):
    """As where SIGTERM reaches both: nobody may take the status that `wait4` waits for."""
    cell = study.Cell("nowhere.py", "clsl", "uniform", 0.1, 0, ())
    wait4 = os.wait4

    def stopped_before(pid, options):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.kill(os.getpid(), signal.SIGTERM)
        return wait4(pid, options)

    monkeypatch.setattr(os, "wait4", stopped_before)
    with study.Runner(str(tmp_path)) as runner, pytest.raises(study.Stopped):
        runner.run(cell)
    assert "nowhere.py" in (tmp_path / cell.directory / "output.txt").read_text()


def test_the_study_of_photographs_takes_its_data():
    path = os.path.join(commands.REPOSITORY, "configs", "study", "photographs.py")
    get_config = runpy.run_path(path)["get_config"]
    grid = study.cells(get_config("somewhere/DATA"))
    assert len(grid) == (len(methods.METHODS) + 5) * 2
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in grid)
    parts = study.cells(get_config("ablation:somewhere/DATA"))
    assert len(parts) == (1 + 16 + 11) * 2
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in parts)
    with pytest.raises(InputError, match="directory of the prepared data after the colon"):
        get_config()


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t = 2 sqrt 3 at 2 degrees."""
    mean, p_value = study_report.paired_test([2, 4, 6], [1, 2, 3])
    t = 2 * math.sqrt(3)
    assert mean == 2
    assert p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))  # closed form at 2 degrees
    assert study_report.paired_test([1, 2], [1, 2]) == (0.0, 1.0)
    assert study_report.paired_test([2, 3], [1, 2]) == (1.0, 0.0)
    assert math.isnan(study_report.paired_test([2], [1])[1])


def test_reliability_by_hand():
    p = np.array([[0.01, 0.02, 0.99], [0.03, 1.0, 0.5]])
    labels = np.array([[0, 1, 1], [0, 1, 1]])
    counted = np.array([[True, True, True], [True, True, False]])
    confidence, frequency, count = study_report.reliability(p, labels, counted)
    assert count.tolist() == [3] + [0] * 13 + [2]
    np.testing.assert_allclose(confidence[[0, 14]], [0.02, 0.995])
    np.testing.assert_allclose(frequency[[0, 14]], [1 / 3, 1])


def made(method, seed, mean_ap, dog, *, confidence=(0.2, 0.9), frequency=(0.1, 1.0)):
    """What a cell gave, by hand: 100 test cells at 0.2, 300 at 0.9."""
    cell = study.Cell("configs/scenes.py", method, "uniform", 0.2, seed, ("seed=0",))
    recovery = [{"positive_precision": 0.5, "epoch": 1}, {"positive_precision": 0.9, "epoch": 2}]
    return study_report.Found(
        cell,
        mean_ap,
        {"cat": 80.0, "dog": dog},
        2,
        recovery,
        10.0 + seed,
        1000.0,
        np.array(confidence),
        np.array(frequency),
        np.array([100.0, 300.0]),
    )


def gain(found, method, name):
    """(gain, pairs) of a method in a class."""
    (row,) = (
        row
        for row in study_report._class_rows(found, make_study())
        if (row["method"], row["class"]) == (method, name)
    )
    return row["gain"], row["pairs"]


def test_the_summary_pairs_by_seed():
    """Baseline 60, 70 in seeds 1, 0; the method 73, 62 in seeds 0, 1: differences 3 and 2."""
    found = [
        made("known_asl", 1, 60.0, 50.0),
        made("known_asl", 0, 70.0, 54.0),
        made("clsl", 0, 73.0, 60.0),
        made("clsl", 1, 62.0, 51.0),
    ]
    base, ours = study_report._summary(found, make_study())
    assert (ours["method"], ours["seeds"], ours["mAP"]) == ("clsl", 2, 67.5)
    assert ours["mAP_sd"] == pytest.approx(11 / math.sqrt(2))
    # t = 2.5 / 0.5 = 5 at one degree of freedom, where p = 1 - 2 atan(t) / pi.
    assert ours["difference"] == 2.5
    assert ours["p_value"] == pytest.approx(1 - 2 * math.atan(5) / math.pi)
    assert ours["positive_precision"] == 0.9  # of the last epoch
    assert ours["seconds"] == 10.5
    # (100 |0.2 - 0.1| + 300 |0.9 - 1|) / 400
    assert ours["calibration_error"] == pytest.approx(10.0)
    assert base["difference"] == 0.0
    uneven = made("clsl", 0, 73.0, 60.0, frequency=(0.1, 0.9))
    assert uneven.calibration_error == pytest.approx(2.5)
    (title, rows) = study_report._main_tables([base, ours], make_study())[0]
    assert title == "scenes, labels known by protocol uniform"
    assert rows == [
        ["method", "20 % known"],
        ["known_asl", "65.00 ± 7.07"],
        ["clsl", "67.50 ± 7.78 (+2.50, p = 0.13)"],
    ]
    assert gain(found, "clsl", "dog") == (3.5, 2)
    assert gain(found, "clsl", "cat") == (0.0, 2)


def test_the_seeds_that_both_have_are_compared():
    """The baseline has seeds 0 and 1, the method 1 and 2: one pair, 62 - 60 and 51 - 50."""
    found = [
        made("known_asl", 0, 70.0, 54.0),
        made("known_asl", 1, 60.0, 50.0),
        made("clsl", 1, 62.0, 51.0),
        made("clsl", 2, 90.0, 99.0),
    ]
    base, ours = study_report._summary(found, make_study())
    assert (ours["seeds"], ours["pairs"], ours["difference"]) == (2, 1, 2.0)
    assert study_report._shown(ours, "known_asl") == "76.00 ± 19.80 (+2.00, 1 pair)"
    assert study_report._shown(base, "known_asl") == "65.00 ± 7.07"
    assert gain(found, "clsl", "dog") == (1.0, 1)


def test_tables_keep_digits_and_columns():
    rows = [["method", "10 % known"], ["known_asl", "80.00"], ["a | b", "82.30"]]
    lines = study_report._markdown(rows).splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in lines[2:]] == ["80.00", "82.30"]
    assert lines[3].startswith("| a \\| b ")
    latex = study_report._latex(
        [["method", "20 % known"], ["known_asl", "80.00 ± 1.20"]], "scenes, 5 % of known_asl ± 1"
    )
    assert r"known\_asl & 80.00 $\pm$ 1.20" in " ".join(latex.split())
    assert r"\caption{scenes, 5 \% of known\_asl $\pm$ 1}" in latex
    assert latex.startswith(r"\begin{table}")
    assert latex.endswith(r"\end{table}")


def test_every_method_of_a_figure_has_a_look_of_its_own():
    looks = [tuple(study_report._style(index).values()) for index in range(len(methods.METHODS))]
    assert len(set(looks)) == len(looks)


CONFIG = """
from clsl_jax import study

def get_config():
    c = study.base_study()
    c.configs = ({config!r},)
    c.known_fractions = (0.5,)
    c.seeds = (0,)
    c.settings = {settings!r}
    c.variants = (("broken", "clsl", "optim.accumulate=7"),)
    c.published = (("paper", "scenes", "uniform", 0.9, 91.7, "a page"),)
    return c
"""


def begin(shared, folder, *arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "clsl_jax.study",
            f"--config={folder / 'study.py'}",
            f"--workdir={folder / 'study'}",
            *arguments,
        ],
        cwd=commands.REPOSITORY,
        env=commands.environment(shared),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(shared, folder, *arguments):
    """(exit status, stdout, stderr) of the study, run to its end."""
    process = begin(shared, folder, *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_study_from_grid_to_tables(shared, tmp_path):
    tiny = (x.removeprefix("--config.") for x in commands.TINY)
    settings = (*tiny, "recovery.warmup_epochs=0")
    text = CONFIG.format(config=commands.CONFIG, settings=settings)
    (tmp_path / "study.py").write_text(text)
    work = tmp_path / "study"
    cell = work / "cells" / "scenes" / "uniform-0.5" / "known_asl" / "seed-0"
    process = begin(shared, tmp_path)
    commands.wait_for(
        lambda: (cell / "checkpoints").is_dir() and commands.newest_step(cell) > 0, process
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Stopped by SIGTERM. Run the same command to go on." in out
    assert not (cell / "results.json").exists()

    status, out, err = call(shared, tmp_path)
    assert status == 2, err
    assert "Going on from step" in (cell / "output.txt").read_text()
    assert "3 cells, 0 of them finished before" in out
    assert "1 cells failed" in err
    assert "optim.accumulate=7" in err
    results = sorted(work.glob("cells/scenes/uniform-0.5/*/seed-0/results.json"))
    assert [path.parts[-3] for path in results] == ["clsl", "known_asl"]
    with open(work / "study.csv", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for path in results:
        found = json.loads(path.read_text())["results"]
        of_test = [
            row["mAP"]
            for row in found
            if (row["split"], row["weights"], row["AP_convention"])
            == ("test", "best", "interpolated")
        ]
        assert float(rows[path.parts[-3]]["mAP"]) == pytest.approx(100 * of_test[0], rel=1e-5)
    report = (work / "study.md").read_text()
    difference = float(rows["clsl"]["mAP"]) - float(rows["known_asl"]["mAP"])
    assert f"({difference:+.2f})" in report
    assert "paper † (a page)" in report
    assert "91.7" in report
    assert "## Failed cells" in report
    assert {(row["AP_convention"], row["weights"]) for row in rows.values()} == {
        ("interpolated", "best")
    }
    names = ("study.tex", "summary.csv", "per_class.csv", "curves.png", "recovery.png")
    assert all((work / name).stat().st_size > 100 for name in (*names, "reliability.png"))
    assert "interpolated AP, weights of the best epoch" in (work / "study.tex").read_text()

    # The predictions that are kept are the best epoch's: they say nothing of another.
    with open(cell / "cell.json", encoding="utf-8") as file:
        of_cell = study.Cell(**json.load(file))
    how = {"convention": "interpolated", "weights": "best"}
    assert study_report.read(of_cell, str(work), **how).calibration_error > 0
    whole = (cell / "results.json").read_text()
    other = json.loads(whole)
    other["selection"]["epochs"]["best"] += 1
    (cell / "results.json").write_text(json.dumps(other))
    assert math.isnan(study_report.read(of_cell, str(work), **how).calibration_error)
    (cell / "results.json").write_text(whole)

    before = {path: path.stat().st_mtime_ns for path in results}
    other = text.replace("'epochs=4'", "'epochs=5'")
    assert other != text
    (tmp_path / "study.py").write_text(other)
    for mode in ("report", "run"):
        status, _, err = call(shared, tmp_path, f"--mode={mode}")
        assert status == 2
        assert f"{cell} was started with another configuration" in err
        assert "epochs: 4 -> 5" in err
    (tmp_path / "study.py").write_text(text)
    status, out, _ = call(shared, tmp_path)
    assert status == 2
    assert "3 cells, 2 of them finished before" in out
    assert {path: path.stat().st_mtime_ns for path in results} == before
