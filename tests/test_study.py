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

from clsl_jax import config as config_lib
from clsl_jax import methods, study, study_report
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
def test_every_cell_of_the_study_of_scenes_is_a_valid_configuration(arg):
    path = os.path.join(commands.REPOSITORY, "configs", "study", "scenes.py")
    for cell in study.cells(runpy.run_path(path)["get_config"](arg)):
        config = runpy.run_path(commands.CONFIG)["get_config"]()
        settings = dict(setting.split("=", 1) for setting in cell.settings)
        known = config_lib.flatten(config)
        values = {
            key: value if isinstance(known[key], str) else ast.literal_eval(value)
            for key, value in settings.items()
        }
        with config.unlocked():
            config.update_from_flattened_dict(values)
        config_lib.validate(config)
        assert config_lib.flatten(config).items() >= values.items()


def test_the_study_of_photographs_takes_its_data():
    path = os.path.join(commands.REPOSITORY, "configs", "study", "photographs.py")
    get_config = runpy.run_path(path)["get_config"]
    grid = study.cells(get_config("somewhere/DATA"))
    assert len(grid) == (len(methods.METHODS) + 5) * 2
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in grid)
    parts = study.cells(get_config("ablation:somewhere/DATA"))
    assert len(parts) == (1 + 15 + 11) * 2
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
    gains = {
        (row["method"], row["class"]): row["gain"]
        for row in study_report._class_rows(found, "known_asl")
    }
    assert gains[("clsl", "dog")] == 3.5
    assert gains[("clsl", "cat")] == 0.0


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


def begin(shared, folder):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "clsl_jax.study",
            f"--config={folder / 'study.py'}",
            f"--workdir={folder / 'study'}",
        ],
        cwd=commands.REPOSITORY,
        env=commands.environment(shared),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(shared, folder):
    """(exit status, stdout, stderr) of the study, run to its end."""
    process = begin(shared, folder)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_study_from_grid_to_tables(shared, tmp_path):
    settings = tuple(x.removeprefix("--config.") for x in commands.TINY) + (
        "recovery.warmup_epochs=0",
        "evaluation.pictures=0",
    )
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
    names = ("study.tex", "summary.csv", "per_class.csv", "curves.png", "recovery.png")
    assert all((work / name).stat().st_size > 100 for name in (*names, "reliability.png"))

    before = {path: path.stat().st_mtime_ns for path in results}
    (tmp_path / "study.py").write_text(text.replace("optim.accumulate=7", "epochs=1"))
    assert call(shared, tmp_path)[0] == 2  # another setting under the same name
    (tmp_path / "study.py").write_text(text)
    status, out, _ = call(shared, tmp_path)
    assert status == 2
    assert "3 cells, 2 of them finished before" in out
    assert {path: path.stat().st_mtime_ns for path in results} == before
