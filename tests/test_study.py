"""The study: its grid, what it runs and does not run again, and what its tables say."""

import ast
import csv
import dataclasses
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys

import commands
import jax
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
        ("uniform", 0.1), ("uniform", 0.5), ("single_positive", None)
    ]  # fmt: skip
    row = {"dataset": "scenes", "protocol": "single_positive", "known_fraction": None}
    shown = {"method": "clsl", "mAP": 40.0, "mAP_sd": np.nan, "seeds": 1, "difference": np.nan}
    ((title, rows),) = study_report._main_tables([{**row, **shown}], make_study())
    assert title == "scenes, labels known by protocol single_positive"
    assert rows == [["method", "test mAP"], ["clsl", "40.00"]]
    study_report._write_csv(str(tmp_path / "x.csv"), [row])
    assert (tmp_path / "x.csv").read_text().splitlines()[1] == "scenes,single_positive,"


def test_a_cell_is_under_the_labels_that_it_knows(monkeypatch):
    """A method's or variant's own protocol and fraction, and one cell whatever the grid's are."""
    monkeypatch.chdir(commands.REPOSITORY)
    changes = {
        "methods": ("known_asl", "all_known"),
        "protocols": ("uniform", "single_positive"),
        "seeds": (0,),
        "variants": (
            ("third", "clsl", "labels.protocol=sst labels.known_fraction=0.3"),
            ("every", "clsl", "labels.protocol=all"),
        ),
    }
    made = study.cells(make_study(**changes))
    assert [(cell.method, cell.protocol, cell.known_fraction) for cell in made] == [
        ("known_asl", "uniform", 0.1),
        ("all_known", "all", None),
        ("third", "sst", 0.3),
        ("every", "all", None),
        ("known_asl", "uniform", 0.5),
        ("known_asl", "single_positive", None),
    ]
    assert made[1].directory == os.path.join("cells", "scenes", "all", "all_known", "seed-0")
    assert made[2].directory == os.path.join("cells", "scenes", "sst-0.3", "third", "seed-0")
    for cell in made:
        assert command_line.config_of(cell.arguments).labels.protocol == cell.protocol
    # The ceiling of another grid in the same workdir is the same run.
    assert made[1] in study.cells(make_study(**changes, known_fractions=(0.9,)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_shards_part_the_grid(tmp_path, monkeypatch, count):
    """No job has a method for itself, whatever their numbers; none has many more cells."""
    grid = study.cells(make_study())
    ran = []
    monkeypatch.setattr(study.Runner, "run", lambda runner, cell: ran.append(cell))
    console = Console(file=io.StringIO())
    shards = []
    for index in range(count):
        ran.clear()
        shard = study.parse_shard(f"{index}/{count}")
        assert study.run_cells(grid, str(tmp_path), console, shard) == {}
        if count <= 4:  # as many as a method has cells
            assert {cell.method for cell in ran} == {"known_asl", "clsl"}
        assert sorted(ran, key=grid.index) == ran
        shards.append(list(ran))
    assert sorted((cell for shard in shards for cell in shard), key=grid.index) == grid
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


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
        ({"variants": (("hill", "clsl", ""),)}, "name of its own: 'hill' is there already"),
        ({"variants": (("x", "clsl", ""), ("x", "clsl", "epochs=9"))}, "'x' is there already"),
        ({"variants": (("x", "clsl", "labels.known_fraction=0"),)}, "known_fraction=0: expected a"),
        ({"variants": (("x", "clsl", "labels.known_fraction=x"),)}, "known_fraction=x: expected a"),
        ({"variants": (("x", "clsl", "labels.known_fraction=2"),)}, "known_fraction=2: expected a"),
        (
            {"methods": ("all_known", "clsl"), "baseline": "all_known"},
            "baseline='all_known' is trained on labels of protocol all",
        ),
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
        ({"split": "train"}, "test or validation"),
        (
            {"split": "validation", "published": (("a", "b", "uniform", 0.1, 50.0, "c"),)},
            "published numbers are of the test split",
        ),
        ({"known_fractions": ("a",)}, "known_fractions: 'a' is no number greater than 0"),
        ({"known_fractions": (float("nan"),)}, "nan is no number greater than 0"),
        ({"seeds": (0, -1)}, "seeds: -1 is no number"),
        ({"methods": (1,)}, "methods: 1 is no text"),
        ({"variants": ("a",)}, "variants: 'a' is no"),
        ({"published": (("a", "scenes", "uniform", 0.1, 50.0),)}, "published: "),
    ],
)
def test_study_keys_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        study.check({**study.base_study().to_dict(), **changes})


def test_study_keys_that_are_missing_are_named():
    given = study.base_study().to_dict()
    del given["methods"], given["seeds"]
    with pytest.raises(InputError, match=r"has no methods, seeds: start from study\.base_study"):
        study.check(given)


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
        (None, 2 * (23 * 7 + 1) * 5),
        ("main", 2 * 2 * 3 * 5),
        ("methods", 24 * 2),
        ("fractions", 2 * 4 * 5),
        ("ablation", (1 + 19 + 14) * 3 * 5),
        ("search", (1 + 14) * 2),
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


@pytest.mark.parametrize("arg", ["main", "methods", "fractions", "ablation", "search"])
def test_every_cell_of_the_study_of_scenes_is_a_valid_configuration(arg, monkeypatch):
    monkeypatch.chdir(commands.REPOSITORY)
    for cell in study.cells(runpy.run_path("configs/study/scenes.py")["get_config"](arg)):
        config = command_line.config_of(cell.arguments)
        config_lib.validate(config)
        assert (config.seed, config.labels.seed) == (cell.seed, cell.seed)
        assert config.labels.protocol == cell.protocol
        assert cell.known_fraction in (None, config.labels.known_fraction)
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


def test_the_cause_of_a_failure_is_of_the_last_try(tmp_path):
    output = tmp_path / "output.txt"
    output.write_text("error: no room\n")
    before = output.stat().st_size
    with open(output, "a", encoding="utf-8") as file:
        file.write("epoch 1/20  loss 0.5\n")
    assert study._last_words(str(output), before) == "epoch 1/20  loss 0.5"
    assert study._last_words(str(output), 0) == "error: no room"
    assert study._last_words(str(output), output.stat().st_size) == ""


def test_a_cell_that_wrote_its_results_has_not_failed(tmp_path, monkeypatch):
    """Though its process was killed behind that."""
    cell = study.Cell("nowhere.py", "clsl", "uniform", 0.1, 0, ())
    wait4 = os.wait4

    def written_before(pid, options):
        (tmp_path / cell.directory / "results.json").write_text("{}")
        return wait4(pid, options)

    with study.Runner(str(tmp_path)) as runner:
        assert runner.run(cell).startswith("exit status 2: error: ")
        failure = tmp_path / cell.directory / "failure.txt"
        assert failure.exists()
        assert "exit status 2" in "".join(study_report._failures([cell], str(tmp_path)))
        monkeypatch.setattr(os, "wait4", written_before)
        assert runner.run(cell) == ""
        assert not failure.exists()
    failure.write_text("Another process is running.")  # of a second job, which the first refused
    assert not study_report._failures([cell], str(tmp_path))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_when_the_cell_has_ended_already(tmp_path, monkeypatch, signum):
    """As where the signal reaches both: nobody may take the status that `wait4` waits for."""
    cell = study.Cell("nowhere.py", "clsl", "uniform", 0.1, 0, ())
    wait4 = os.wait4

    def stopped_before(pid, options):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.kill(os.getpid(), signum)
        return wait4(pid, options)

    monkeypatch.setattr(os, "wait4", stopped_before)
    with (
        commands.interrupts(signal.default_int_handler),
        study.Runner(str(tmp_path)) as runner,
        pytest.raises(study.Stopped),
    ):
        runner.run(cell)
    assert "nowhere.py" in (tmp_path / cell.directory / "output.txt").read_text()


def test_the_study_of_photographs_takes_its_data():
    path = os.path.join(commands.REPOSITORY, "configs", "study", "photographs.py")
    get_config = runpy.run_path(path)["get_config"]
    grid = study.cells(get_config("somewhere/DATA"))
    assert len(grid) == (len(methods.METHODS) + 6) * 2
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in grid)
    parts = study.cells(get_config("ablation:somewhere/DATA"))
    assert len(parts) == (1 + 16 + 11) * 3 * 5
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in parts)
    search = get_config("search:somewhere/DATA")
    assert search.split == "validation"
    assert len(study.cells(search)) == (1 + 24) * 2
    assert all("data.dir=somewhere/DATA" in cell.settings for cell in study.cells(search))
    positives = study.cells(get_config("positives:somewhere/DATA"))
    assert len(positives) == (8 + 4) * 2
    assert {cell.protocol for cell in positives} == {"single_positive"}
    (cell, _) = [cell for cell in positives if cell.method == "positives"]
    table = runpy.run_path(os.path.join(commands.REPOSITORY, "configs", "table.py"))["get_config"]
    run, alone = command_line.config_of(cell.arguments), table("positives")
    for section in ("recovery", "loss", "model", "optim"):
        assert run[section].to_dict() == alone[section].to_dict()
    for nothing in (None, "", "search:", "search", "ablation", "positives:"):
        with pytest.raises(InputError, match="directory of the prepared data after the colon"):
            get_config(nothing)


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide"])
def test_published_numbers_stand_where_the_study_of_an_official_set_has_cells(name, monkeypatch):
    monkeypatch.chdir(commands.REPOSITORY)
    config = runpy.run_path("configs/study/official.py")["get_config"](f"{name}:somewhere/DATA")
    study.check(config.to_dict())
    grid = study.cells(config)
    assert len(grid) == 4 * 9 * 3
    for cell in grid:
        run = command_line.config_of(cell.arguments)
        config_lib.validate(run)
        assert run.data.dir == "somewhere/DATA"
        assert run.evaluation.selection == "validation"
        assert run.labels.known_fraction == cell.known_fraction
    places = {(dataset, *labels) for _, dataset, *labels, _, _ in config.published}
    assert places <= {cell.setting for cell in grid}
    assert (config.weights, config.split, config.convention) == ("best", "test", "interpolated")


@pytest.mark.parametrize("arg", [None, "voc", "voc:", "voc2012:somewhere/DATA", "somewhere/DATA"])
def test_the_study_of_an_official_set_asks_for_its_data(arg):
    path = os.path.join(commands.REPOSITORY, "configs", "study", "official.py")
    with pytest.raises(InputError, match="one of voc, coco, nuswide and the directory"):
        runpy.run_path(path)["get_config"](arg)


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


def made(method, seed, mean_ap, dog, *, fraction=0.2, confidence=(0.2, 0.9), frequency=(0.1, 1.0)):
    """What a cell gave, by hand: 100 test cells at 0.2, 300 at 0.9. No fraction: all known."""
    protocol = "all" if fraction is None else "uniform"
    cell = study.Cell("configs/scenes.py", method, protocol, fraction, seed, ("seed=0",))
    names = ("positive_precision", "positive_recall", "negative_precision", "coverage")
    shares = [(0.5, 0.1, 0.8, 0.3), (0.9, 0.2 + seed / 10, 0.95, 0.4)]
    recovery = [{"epoch": k, **dict(zip(names, row, strict=True))} for k, row in enumerate(shares)]
    if method in ("known_asl", "all_known"):
        recovery = []
    return study_report.Found(
        cell,
        mean_ap,
        {"cat": 80.0, "dog": dog},
        2,
        recovery,
        {"jax": "0.10.2", "python": "3.11.7"},
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
    # What one run has not is left out.
    lacking = dataclasses.replace(found[2], cell=dataclasses.replace(found[2].cell, seed=2))
    lacking = dataclasses.replace(lacking, seconds=np.nan, count=np.zeros(2))
    assert math.isnan(lacking.calibration_error)
    (_, more) = study_report._summary([*found, lacking], make_study())
    assert (more["seeds"], more["seconds"]) == (3, 10.5)
    assert more["calibration_error"] == pytest.approx(10.0)
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


def grid_of_two_fractions():
    """(found, their summary): the default's differences to the baseline are 1 and 2, and so on."""
    found = [
        made("known_asl", 0, 60.0, 50.0, fraction=0.1),
        made("all_known", 0, 90.0, 99.0, fraction=None),
        made("clsl", 0, 61.0, 40.0, fraction=0.1),
        made("known_asl", 0, 70.0, 60.0, fraction=0.5),
        made("clsl", 0, 72.0, 65.5, fraction=0.5),
        made("clsl", 1, 74.0, 10.0, fraction=0.5, confidence=(0.4, 0.7), frequency=(0.3, 0.6)),
    ]
    return found, study_report._summary(found, make_study())


def test_the_ceiling_stands_beside_what_it_is_the_ceiling_of(tmp_path):
    found, summary = grid_of_two_fractions()
    ((title, rows),) = study_report._main_tables(summary, make_study())
    assert title == "scenes, labels known by protocol uniform"
    assert rows == [
        ["method", "10 % known", "50 % known", "all known"],
        ["known_asl", "60.00", "70.00", ""],
        ["clsl", "61.00 (+1.00)", "73.00 ± 1.41 (+2.00, 1 pair)", ""],
        ["all_known", "", "", "90.00"],
    ]
    ceiling = [row for row in summary if row["method"] == "all_known"]
    ((title, rows),) = study_report._main_tables(ceiling, make_study())
    assert title == "scenes, labels known by protocol all"
    assert rows == [["method", "all known"], ["all_known", "90.00"]]
    cells = [study_report._cell_row(result, make_study()) for result in found]
    study_report._write_csv(str(tmp_path / "x.csv"), cells)
    assert (tmp_path / "x.csv").read_text().splitlines()[2].startswith("scenes,all,,all_known,0,90")


def test_classes_that_gain_and_lose_most():
    """Of six classes that change by 3, 2, 1, 0, -1, -2 three gain and two lose."""
    found = [made("known_asl", 0, 60.0, 50.0), made("clsl", 0, 61.0, 50.0)]
    changes = dict(zip("abcdef", (3, -2, 1, 0, 2, -1), strict=True))
    for result in found:
        result.class_ap.clear()
        ours = result.cell.method == "clsl"
        result.class_ap.update({name: 50.0 + ours * x for name, x in changes.items()})
    rows = study_report._class_rows(found, make_study())
    title, table, below = study_report._changes(rows, "known_asl")
    assert title == "## Classes"
    assert table_rows(table)[1:] == [
        ["scenes, uniform, 20 % known", "clsl", "a +3.00, e +2.00, c +1.00", "b -2.00, f -1.00"]
    ]
    assert "`per_class.csv`" in below
    assert study_report._changes(rows[:6], "known_asl") == []  # there is the baseline alone


def table_rows(text):
    """Cells of a Markdown table, without the line below its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows[:1] + rows[2:]


def drawn(axes):
    """{method: [(x, y), ...]} of the lines that a legend names."""
    lines = [(c.get_label(), c.lines[0]) for c in axes.containers]
    lines += [(line.get_label(), line) for line in axes.lines if line.get_label()[0] != "_"]
    return {label: line.get_xydata().tolist() for label, line in lines}


def test_curves_have_a_line_for_each_method_and_one_for_the_ceiling():
    found, summary = grid_of_two_fractions()
    (axes,) = study_report._figures(found, summary)["curves"].axes
    assert axes.get_title() == "scenes, uniform"
    assert drawn(axes) == {
        "known_asl": [[10, 60], [50, 70]],
        "clsl": [[10, 61], [50, 73]],
        "all_known, protocol all": [[0, 90], [1, 90]],  # from side to side
    }
    bars = axes.containers[1].lines[2][0].get_segments()
    assert np.diff([bar[:, 1] for bar in bars]).ravel().tolist() == pytest.approx([0, 2 * 2**0.5])


def test_recovery_has_a_column_for_each_fraction_and_a_row_for_each_share():
    found, summary = grid_of_two_fractions()
    figure = study_report._figures(found, summary)["recovery"]
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "scenes, uniform, 10 % known",
        "scenes, uniform, 50 % known",
    ]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "positives right (%)",
        "positives found (%)",
        "negatives right (%)",
    ]
    assert [drawn(axes).keys() for axes in figure.axes] == [{"clsl"}] * 6
    shown = [np.array(drawn(axes)["clsl"]) for axes in figure.axes]
    np.testing.assert_allclose(
        shown,
        # The second seed of the second column has found 30 % in place of 20.
        [[[0, a], [1, b]] for a, b in [(50, 90)] * 2 + [(10, 20), (10, 25)] + [(80, 95)] * 2],
    )
    assert figure.axes[0].get_ylim() == (0, 100)
    strong = dataclasses.replace(found[2].cell, config="configs/scenes.py:strong")
    beside = [found[2], dataclasses.replace(found[2], cell=strong)]  # one setting each
    figure = study_report._figures(beside, summary)["recovery"]
    titles = ["scenes, uniform, 10 % known", "scenes-strong, uniform, 10 % known"]
    assert [axes.get_title() for axes in figure.axes] == [*titles, "", "", "", ""]
    assert [drawn(axes).keys() for axes in figure.axes] == [{"clsl"}] * 6
    nothing = study_report._figures(found[:1], summary[:1])["recovery"]
    assert nothing.texts[0].get_text() == "There are no recovered labels."


def test_reliability_has_a_panel_for_each_fraction_and_the_ceiling():
    found, summary = grid_of_two_fractions()
    figure = study_report._figures(found, summary)["reliability"]
    assert [axes.get_title() for axes in figure.axes] == [
        "scenes, uniform, 10 % known",
        "scenes, uniform, 50 % known",
        "scenes, all",
    ]
    first, second, ceiling = map(drawn, figure.axes)
    assert first["known_asl"] == first["clsl"] == [[0.2, 0.1], [0.9, 1.0]]
    # Both seeds have as many cells in each bin.
    np.testing.assert_allclose(second["clsl"], [[0.3, 0.2], [0.8, 0.8]])
    assert ceiling.keys() == {"all_known"}


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


def test_cells_of_several_versions_are_told_apart():
    one = made("clsl", 0, 80.0, 70.0)
    other = dataclasses.replace(one, versions={"jax": "0.11.2", "python": "3.11.7", "new": "2"})
    assert study_report._versions([one, one])[1:] == ["jax 0.10.2, python 3.11.7"]
    _, note, table = study_report._versions([other, one, one])
    assert "not all evaluated with the same" in note
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["cells", "jax", "new", "python", "for example"]
    where = one.cell.directory
    assert rows[2:] == [
        ["2", "0.10.2", "", "3.11.7", where],
        ["1", "0.11.2", "2", "3.11.7", where],
    ]


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


def contents(directory, split="test"):
    """What a cell's files say: (mAP, AP by class, rows of recovery, p and labels of test)."""
    results = json.loads((directory / "results.json").read_text())["results"]
    (found,) = (
        row
        for row in results
        if (row["split"], row["weights"], row["AP_convention"]) == (split, "best", "interpolated")
    )
    log = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    recovery = [row for row in log if "recovery/unknown" in row]
    with np.load(directory / "predictions.npz") as file:
        p, labels = file["scores"].astype(float), file["labels"]
    if not json.loads((directory / "config.json").read_text())["evaluation"]["statistics"]:
        p = p**3 / (p**3 + 1 - p)  # what a sigmoid stands for under the loss: 0.2 for 0.5
    return 100 * found["mAP"], found["AP"], recovery, p.ravel(), labels.ravel()


def the_report_is_what_the_files_say(folder, directories):
    """Its tables and figures, for the finished cells of `clsl` and `known_asl`."""
    config = runpy.run_path(str(folder / "study.py"))["get_config"]()
    how = {"split": "test", "convention": "interpolated", "weights": "best"}
    work = folder / "study"
    finished = [cell for cell in study.cells(config) if study.is_finished(cell, str(work))]
    found = [study_report.read(cell, str(work), **how) for cell in finished]
    for cell in finished:  # to tune on, nothing of the test split is read
        tuned = study_report.read(cell, str(work), **{**how, "split": "validation"})
        validation = contents(work / cell.directory, "validation")
        assert (tuned.mean_ap, tuned.count.any()) == (validation[0], False)
        assert tuned.mean_ap != contents(work / cell.directory)[0]
    figures = study_report._figures(found, study_report._summary(found, config))
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert file.getvalue() == (work / f"{name}.png").read_bytes(), name

    _, details, classes, *_ = (work / "study.md").read_text().split("\n## ")[1:]
    details = {row[1]: row for row in table_rows(details)[1:]}
    said = {directory.parts[-2]: contents(directory) for directory in directories}
    assert details.keys() == said.keys() == {"clsl", "known_asl"}
    for directory in directories:
        method = directory.parts[-2]
        mean_ap, _, recovery, p, labels = said[method]
        assert details[method][:3] == ["scenes, uniform, 50 % known", method, "1"]
        names = ("positive_precision", "positive_recall", "negative_precision")
        shares = [100 * row[f"recovery/{x}"] for row in recovery[-1:] for x in (*names, "coverage")]
        assert details[method][3:7] == ([f"{share:.1f} %" for share in shares] or [""] * 4)
        bins = [(p >= k / 15) & (p < (k + 1) / 15 + (k == 14)) for k in range(15)]
        error = 100 * sum(abs(p[b].sum() - labels[b].sum()) for b in bins) / len(p)
        assert float(details[method][7].removesuffix(" %")) == pytest.approx(error, abs=0.006)
        cost = json.loads((directory / "cost.json").read_text())
        costs = [f"{cost[x]:,.0f}" for x in ("seconds", "peak_memory_mib")]
        assert details[method][8:] == costs

        (curves,), (reliability,) = (figures[name].axes for name in ("curves", "reliability"))
        np.testing.assert_allclose(drawn(curves)[method], [[50, mean_ap]])
        means = [[p[b].mean(), labels[b].mean()] for b in bins if b.any()]
        np.testing.assert_allclose(drawn(reliability)[method], means, rtol=1e-5)
        for axes, name in zip(figures["recovery"].axes, names, strict=True):
            rows = [[row["epoch"], 100 * row[f"recovery/{name}"]] for row in recovery]
            assert drawn(axes).get(method, []) == rows
    ours, theirs = (said[method][1] for method in ("clsl", "known_asl"))
    gains = [(name, 100 * (ours[name] - theirs[name])) for name in ours]
    gains.sort(key=lambda gain: -gain[1])
    assert table_rows(classes)[1][2:] == [
        ", ".join(f"{name} {gain:+.2f}" for name, gain in some if sign * gain > 0)
        for sign, some in ((1, gains[:3]), (-1, gains[:-4:-1]))
    ]
    assert "`per_class.csv`" in classes


def test_a_cell_whose_split_has_no_positive_is_named(tmp_path):
    cell = study.cells(make_study())[0]
    directory = tmp_path / cell.directory
    directory.mkdir(parents=True)
    row = {"split": "test", "weights": "last", "AP_convention": "interpolated", "mAP": None}
    (directory / "results.json").write_text(json.dumps({"results": [row]}))
    reading = {key: value for key, value in row.items() if key != "mAP"}
    reading["convention"] = reading.pop("AP_convention")
    with pytest.raises(InputError, match=r"seed-0 has no test mAP: .* of no class"):
        study_report.read(cell, str(tmp_path), **reading)


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
    assert "Stopped. Run the same command to go on." in out
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
        mean_ap = contents(path.parent)[0]
        assert float(rows[path.parts[-3]]["mAP"]) == pytest.approx(mean_ap, rel=1e-5)
    report = (work / "study.md").read_text()
    difference = float(rows["clsl"]["mAP"]) - float(rows["known_asl"]["mAP"])
    assert f"({difference:+.2f})" in report
    assert "paper † (a page)" in report
    assert f"jax {jax.__version__}," in report.partition("## Versions\n\n")[2]
    assert "91.7" in report
    assert "## Failed cells" in report
    assert {(row["AP_convention"], row["weights"]) for row in rows.values()} == {
        ("interpolated", "best")
    }
    names = ("study.tex", "summary.csv", "per_class.csv")
    assert all((work / name).stat().st_size > 100 for name in names)
    the_report_is_what_the_files_say(tmp_path, [path.parent for path in results])
    latex = (work / "study.tex").read_text()
    assert "interpolated AP, weights of the best epoch" in latex
    assert latex.count(r"\dag{}") == 2  # in the table and in the caption, which says of what
    assert "published, in its authors' setting, not run here" in latex
    assert "†" not in latex

    # The predictions that are kept are the best epoch's: they say nothing of another.
    with open(cell / "cell.json", encoding="utf-8") as file:
        of_cell = study.Cell(**json.load(file))
    how = {"split": "test", "convention": "interpolated", "weights": "best"}
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
