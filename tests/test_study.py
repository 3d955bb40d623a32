"""The study: its grid, what it runs and does not run again, and what its tables say."""

import ast
import csv
import json
import math
import os
import runpy
import subprocess
import sys

import commands
import numpy as np
import pytest
from ml_collections import ConfigDict

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


def test_shards_part_the_grid():
    grid = study.cells(make_study())
    parts = [grid[index::count] for index, count in (study.parse_shard(f"{i}/3") for i in range(3))]
    assert sorted((cell for part in parts for cell in part), key=grid.index) == grid


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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shared"))


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


def call(shared, folder, *arguments):
    return subprocess.run(
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
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_a_study_from_grid_to_tables(shared, tmp_path):
    settings = tuple(x.removeprefix("--config.") for x in commands.TINY) + (
        "epochs=2",
        "recovery.warmup_epochs=0",
        "evaluation.pictures=0",
    )
    text = CONFIG.format(config=commands.CONFIG, settings=settings)
    (tmp_path / "study.py").write_text(text)
    first = call(shared, tmp_path)
    assert first.returncode == 2, first.stderr
    assert "3 cells, 0 of them finished before" in first.stdout
    assert "1 cells failed" in first.stderr
    assert "optim.accumulate=7" in first.stderr
    work = tmp_path / "study"
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
    assert call(shared, tmp_path).returncode == 2  # another setting under the same name
    (tmp_path / "study.py").write_text(text)
    again = call(shared, tmp_path)
    assert again.returncode == 2
    assert "3 cells, 2 of them finished before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in results} == before
