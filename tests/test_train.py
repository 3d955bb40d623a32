"""The whole command in real processes: what it leaves, how it resumes, how it evaluates again."""

import ast
import csv
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import test_config
from commands import REPOSITORY, TINY, environment, newest_step, run, start, wait_for

from clsl_jax import config as config_lib
from clsl_jax import experiment, train
from clsl_jax.data import partial
from clsl_jax.errors import InputError
from clsl_jax.train import StepQueue
from clsl_jax.writer import read_log

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run that nobody interrupted: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(tiny_run[0], workdir)
    return workdir, tiny_run[1]


def saved_arrays(workdir):
    """Every array of the newest checkpoint, by path, whatever devices it was saved from."""
    steps = [int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit()]
    path = os.path.abspath(workdir / "checkpoints" / str(max(steps)) / "state")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    return max(steps), {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def assert_same_run(a, b):
    (step_a, arrays_a), (step_b, arrays_b) = saved_arrays(a), saved_arrays(b)
    assert step_a == step_b
    assert arrays_a.keys() == arrays_b.keys()
    assert any("recovered" in key for key in arrays_a)
    for key, array in arrays_a.items():
        np.testing.assert_array_equal(array, arrays_b[key], err_msg=key)
    for name in ("log.jsonl", "results.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("predictions.npz", "known_mask.npz"):
        with np.load(a / name) as x, np.load(b / name) as y:
            assert x.files == y.files
            for key in x.files:
                np.testing.assert_array_equal(x[key], y[key], err_msg=f"{name}: {key}")


def test_what_a_run_leaves(finished):
    workdir, out = finished
    for name in [
        "config.json",
        "log.jsonl",
        "timing.jsonl",
        "results.json",
        "predictions.npz",
        "pictures.png",
    ]:
        assert (workdir / name).stat().st_size > 0, name
    assert any((workdir / "tensorboard").iterdir())
    assert out.count("epoch ") >= 4
    assert "mAP" in out
    with open(workdir / "pictures.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    rows = read_log(workdir / "log.jsonl")
    assert [row["step"] for row in rows] == [6, 12, 18, 24]
    assert all(0 <= row["validation/mAP_interpolated"] <= 1 for row in rows)
    assert rows[-1]["recovery/coverage"] > 0
    assert len(rows[-1]["recovery_per_class/positive_precision"]) == 20


def test_the_tables_fill_the_unknown_cells_alone(finished):
    workdir, _ = finished
    rows = {}
    for name in ("recovered", "probabilities"):
        with open(workdir / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows[name] = [row[1:] for row in csv.reader(file)][1:]
    splits = [row[0] for row in rows["recovered"]]
    assert [splits.count(name) for name in ("train", "validation", "test")] == [96, 48, 48]
    mask, _ = partial.load_mask(workdir / "known_mask.npz")
    labels = np.load(workdir / "predictions.npz")["labels"]
    probabilities = np.array([row[1:] for row in rows["probabilities"]], float)
    filled = np.array([row[1:] for row in rows["recovered"]], int)  # TINY fills every cell
    unknown = np.zeros(filled.shape, bool)
    unknown[:96] = ~mask
    sure = unknown & (np.abs(probabilities - 0.5) > 1e-4)
    np.testing.assert_array_equal(filled[sure], probabilities[sure] >= 0.5)
    np.testing.assert_array_equal(filled[-48:], labels)
    with open(workdir / "results.json", encoding="utf-8") as file:
        stated = json.load(file)["recovery"]
    given = probabilities[96:] >= 0.5
    for kind, chosen in (("positive", given), ("negative", ~given)):
        right = (filled[96:] == (kind == "positive"))[chosen]
        assert chosen.any()  # the table has four digits: one cell or two may lie on the line
        assert stated[f"recovery/held_out_{kind}s"] == pytest.approx(chosen.sum(), abs=2)
        found = stated[f"recovery/held_out_{kind}_precision"]
        assert found == pytest.approx(right.mean(), abs=2 / chosen.sum())


def test_results_name_what_they_depend_on(finished):
    with open(finished[0] / "results.json", encoding="utf-8") as file:
        results = json.load(file)
    mask, facts = partial.load_mask(finished[0] / "known_mask.npz")
    assert facts["sha256"] == results["labels"]["mask_sha256"]
    assert mask.shape == (96, 20)
    assert results["labels"]["known_entries"] == mask.sum()
    assert results["labels"]["entries"] == 96 * 20
    assert len(results["labels"]["mask_sha256"]) == 64
    assert len(results["dataset"]["fingerprint"]) == 64
    assert results["dataset"]["images"] == {"train": 96, "validation": 48, "test": 48}
    assert results["seed"] == 0
    assert "validation mAP" in results["selection"]["rule"]
    # Its epoch is the one of the best validation mAP, the later of two alike.
    logged = [row["validation/mAP_interpolated"] for row in read_log(finished[0] / "log.jsonl")]
    best = max(range(len(logged)), key=lambda k: (logged[k], k))
    assert results["selection"]["epochs"] == {"last": 4, "best": best + 1}
    for weights, epoch in (("last", 4), ("best", best + 1)):
        (row,) = (
            r
            for r in results["results"]
            if (r["weights"], r["split"], r["AP_convention"])
            == (weights, "validation", "interpolated")
        )
        assert row["mAP"] == logged[epoch - 1]
        assert row["epoch"] == epoch
    assert {"jax", "flax", "numpy", "clsl_jax"} <= results["versions"].keys()
    assert re.fullmatch(r".+ \(sources [0-9a-f]{12}\)", results["versions"]["clsl_jax"])
    found = {(r["weights"], r["split"], r["AP_convention"]) for r in results["results"]}
    assert len(found) == 8
    for row in results["results"]:
        values = [ap for ap in row["AP"].values() if ap is not None]
        assert row["mAP"] == pytest.approx(np.mean(values), abs=1e-12)
        assert row["images"] == 48


def test_the_predictions_give_the_numbers_of_the_results(finished):
    from sklearn.metrics import average_precision_score

    with np.load(finished[0] / "predictions.npz") as saved:
        scores, labels = saved["scores"], saved["labels"]
    with open(finished[0] / "results.json", encoding="utf-8") as file:
        rows = json.load(file)["results"]
    (row,) = (
        r
        for r in rows
        if (r["weights"], r["split"], r["AP_convention"]) == ("best", "test", "uninterpolated")
    )
    present = labels.any(axis=0)
    expected = [
        average_precision_score(labels[:, c], scores[:, c]) for c in np.flatnonzero(present)
    ]
    assert row["mAP"] == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_evaluation_again_gives_the_same_bits(shared, finished, devices):
    workdir = finished[0]
    arguments = [f"--workdir={workdir}", "--mode=evaluate"]
    status, _, err = run(shared, workdir, *arguments, devices=devices, tiny=False)
    assert status == 0, err
    results, again = (
        json.loads((workdir / name).read_text()) for name in ("results.json", "evaluation.json")
    )
    assert again["results"] == results["results"]
    assert again["recovery"] == results["recovery"]


def test_an_unfinished_run_counts_the_labels_that_it_hands_out(shared, tmp_path):
    """Not those that it learns from, which are of every cell."""
    workdir = tmp_path / "run"
    keys = ("thresholds=none", "positive_precision=0.25", "negative_precision=0.8", "min_count=2")
    flags = [f"--config.recovery.{key}" for key in keys]
    status, _, err = run(shared, workdir, *flags, "--config.checkpoint.every_steps=0")
    assert status == 0, err
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 18:
            shutil.rmtree(path)
    arguments = [f"--workdir={workdir}", "--mode=evaluate"]
    status, _, err = run(shared, workdir, *arguments, devices=2, tiny=False)
    assert status == 0, err
    stated = json.loads((workdir / "evaluation.json").read_text())
    assert stated["selection"]["epochs"]["last"] == 3
    taught = read_log(workdir / "log.jsonl")[2]
    mask, _ = partial.load_mask(workdir / "known_mask.npz")
    with open(workdir / "recovered.csv", newline="", encoding="utf-8") as file:
        cells = np.array([row[2:] for row in csv.reader(file)][1:97])
    for kind, label in (("positives", "1"), ("negatives", "0")):
        found = stated["recovery"][f"recovery/recovered_{kind}"]
        assert found == (cells[~mask] == label).sum() > 0
        assert found != taught[f"recovery/recovered_{kind}"]


def test_tables_that_nobody_could_open_are_not_written(shared, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    tables = [workdir / name for name in ("recovered.csv", "probabilities.csv")]
    for table in tables:
        table.unlink()
    program = "from clsl_jax import label_tables, main; label_tables.MOST_CELLS = {}; main.cli()"
    status, out, err = run(shared, workdir, "--mode=evaluate", program=program.format(3839))
    assert status == 0, err
    assert "recovered.csv and probabilities.csv are not written: 3,840 cells" in " ".join(
        out.split()
    )
    assert not any(table.exists() for table in tables)
    status, _, err = run(shared, workdir, "--mode=evaluate", program=program.format(3840))
    assert status == 0, err
    for table in tables:
        assert table.read_bytes() == (finished[0] / table.name).read_bytes()


def test_the_host_runs_no_more_than_two_steps_ahead():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        matrix = jax.lax.fori_loop(0, 300, lambda _, x: x @ x * 0.003, jnp.ones((300, 300)))
        return state + 1 + (matrix[0, 0] > 1e9)

    step(jnp.int32(0)).block_until_ready()
    queue, state, begun = StepQueue(2), jnp.int32(0), []
    for count in range(1, 7):
        state = step(state)
        queue.add(state)
        begun.append(queue.begun[-1])
        assert [one.is_ready() for one in begun] == [True] * (count - 2) + [False] * min(count, 2)
    assert [int(one) for one in begun] == [1, 2, 3, 4, 5, 6]


COUNTED = """
from clsl_jax import main, train


class Counted(train.StepQueue):
    def add(self, result):
        super().add(result)
        print("begun", int(self.begun[-1]), len(self.begun))


train.StepQueue = Counted
main.cli()
"""


def test_every_step_of_a_run_is_counted_among_those_begun(shared, tmp_path):
    status, out, err = run(shared, tmp_path / "run", "--config.epochs=1", program=COUNTED)
    assert status == 0, err
    counted = re.findall(r"begun (\d+) (\d+)", out)
    assert counted == [(str(step), str(min(step, 2))) for step in range(1, 7)]


def test_killed_twenty_times_it_ends_with_the_same_bits(shared, finished, tmp_path):
    """SIGKILL a random while after the start, or after a next checkpoint; one after each step."""
    chance = random.Random(0)
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    more = "--config.checkpoint.every_steps=1"
    moments = ["start"] * 8 + ["checkpoint"] * 12
    chance.shuffle(moments)
    for moment in moments:
        before = newest_step(workdir)
        process = start(shared, workdir, more)
        if moment == "checkpoint":
            wait_for(lambda before=before: newest_step(workdir) > before, process)
            time.sleep(chance.uniform(0, 0.1))  # into a step, an evaluation, the next save
        else:  # into an import, the compilation, a restore, a step
            end = time.monotonic() + chance.uniform(0, 5)
            while time.monotonic() < end and newest_step(workdir) == before:
                time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 12 <= newest_step(workdir) <= 24
    status, _, err = run(shared, workdir, more)
    assert status == 0, err
    assert_same_run(finished[0], workdir)


def test_sigterm_saves_and_the_run_goes_on(shared, finished, tmp_path):
    workdir = tmp_path / "run"
    process = start(shared, workdir)
    log = workdir / "log.jsonl"
    wait_for(lambda: log.exists() and read_log(log), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Stopped after step" in out
    stopped, _ = saved_arrays(workdir)
    assert 6 <= stopped < 24
    status, out, err = run(shared, workdir)
    assert status == 0, err
    assert f"Going on from step {stopped} of 24" in out
    assert_same_run(finished[0], workdir)


def tiny_config(**more):
    """The configuration of `TINY`, as the command line makes it."""
    config = test_config.load("scenes")
    for argument in TINY:
        key, _, value = argument.removeprefix("--config.").partition("=")
        value = value if value.isalpha() and value != "True" else ast.literal_eval(value)
        config.update_from_flattened_dict({key: value})
    config.update(more)
    return config


@pytest.fixture
def in_process(shared, monkeypatch):
    """The caches of the processes and, like them, one device."""
    for name, value in environment(shared).items():
        monkeypatch.setenv(name, value)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *unused: one)


def test_hidden_and_test_labels_reach_neither_training_nor_selection(
    in_process, tmp_path, monkeypatch
):
    """Every hidden training label and every test label is turned round.

    Weights, the best epoch and recovered labels stay the same.
    """
    config = tiny_config(epochs=3)
    config.evaluation.test_every_epoch = True
    config.optim.learning_rate = 0.1  # the best epoch is the last then
    train.train_and_evaluate(config, str(tmp_path / "true"))
    load_data = experiment.load_data

    def turned_round(config, report):
        dataset = load_data(config, report)
        labels = dataset.train.labels
        mask = partial.known_mask("uniform", labels, config.labels.known_fraction, 0)
        hidden = np.where(mask, labels, 1 - labels).astype(np.int8)
        assert (hidden != labels).mean() > 0.5
        return dataclasses.replace(
            dataset,
            train=dataclasses.replace(dataset.train, labels=hidden),
            test=dataclasses.replace(dataset.test, labels=1 - dataset.test.labels),
        )

    monkeypatch.setattr(experiment, "load_data", turned_round)
    train.train_and_evaluate(config, str(tmp_path / "turned"))
    (_, true), (_, turned) = saved_arrays(tmp_path / "true"), saved_arrays(tmp_path / "turned")
    for key, array in true.items():
        np.testing.assert_array_equal(array, turned[key], err_msg=key)
    rows = [read_log(tmp_path / name / "log.jsonl") for name in ("true", "turned")]
    told = ("recovery", "test/")  # what hidden labels are there for
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(told)} == {
            k: v for k, v in b.items() if not k.startswith(told)
        }
    selection, turned_selection = (
        json.loads((tmp_path / name / "results.json").read_text())["selection"]
        for name in ("true", "turned")
    )
    assert selection == turned_selection
    by_test = [max(range(3), key=lambda k: r[k]["test/mAP_interpolated"]) for r in rows]
    assert by_test[0] != by_test[1]  # selection on the test split would have shown
    tables = [
        [line for line in (tmp_path / name / "recovered.csv").open() if '"test"' not in line]
        for name in ("true", "turned")
    ]
    assert len(tables[0]) == 1 + 96 + 48
    assert tables[0] == tables[1]
    # The table has the probabilities of the last weights, here the ones of the predictions, which
    # label statistics have made probabilities.
    assert selection["epochs"]["best"] == selection["epochs"]["last"]
    predicted = np.load(tmp_path / "true" / "predictions.npz")["scores"]
    with open(tmp_path / "true" / "probabilities.csv", newline="", encoding="utf-8") as file:
        stated = np.array([row[2:] for row in csv.reader(file)][-48:], float)
    np.testing.assert_allclose(stated, predicted, atol=1e-4)
    # The diagnostic does see them: it is the one thing that changes.
    key = "recovery/negative_precision"
    assert rows[0][-1][key] != rows[1][-1][key]


def test_going_on_with_other_data_is_refused(in_process, tmp_path, monkeypatch):
    config = tiny_config(epochs=1)
    train.train_and_evaluate(config, str(tmp_path))
    before = (tmp_path / "results.json").read_bytes()
    load_data = experiment.load_data

    def other_labels(dataset):
        labels = 1 - dataset.train.labels
        return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, labels=labels))

    def other_images(dataset):
        return dataclasses.replace(dataset, fingerprint="0" * 64)

    for change, named in ((other_labels, "known labels"), (other_images, "images and labels")):
        monkeypatch.setattr(
            experiment, "load_data", lambda *given, change=change: change(load_data(*given))
        )
        with pytest.raises(InputError, match=f"The {named}.* are not those this run was started"):
            train.train_and_evaluate(config, str(tmp_path))
    assert (tmp_path / "results.json").read_bytes() == before


SIGNALLED = """
import os, signal
from clsl_jax import evaluate, main
predict, calls = evaluate.predict, []

def signalled(*arguments, **named):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return predict(*arguments, **named)

evaluate.predict = signalled
main.cli()
"""


def test_sigterm_in_evaluation(shared, finished, tmp_path):
    """The command itself, but that the signal is sent just where epoch 2 is evaluated.

    Started again, it goes on with that evaluation, so that the second signal comes where epoch 3 is
    evaluated, the third at epoch 4, the last of all, and the next where results are computed.
    """
    workdir = tmp_path / "run"
    for arguments, expected, step, rows in (
        ((), 0, 12, 1),
        (("--stopped_status=75",), 75, 18, 2),
        ((), 0, 24, 3),
        (("--stopped_status=75",), 75, 24, 4),
    ):
        status, out, err = run(shared, workdir, *arguments, program=SIGNALLED)
        assert status == expected, err
        where = "while results were computed" if rows == 4 else f"after step {step}"
        assert f"Stopped {where}" in out
        assert newest_step(workdir) == step
        assert len(read_log(workdir / "log.jsonl")) == rows
        assert not (workdir / "results.json").exists()
    status, _, err = run(shared, workdir)
    assert status == 0, err
    assert_same_run(finished[0], workdir)
    # An evaluation alone predicts one split twice, by the last weights and the best, or two.
    status, out, err = run(shared, workdir, "--mode=evaluate", program=SIGNALLED, tiny=False)
    assert status == 143, err
    assert "Stopped while results were computed" in out
    assert not (workdir / "evaluation.json").exists()


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_run_still_ends_the_same(
    shared, finished, tmp_path, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    files = [path for path in (workdir / "checkpoints" / "24").rglob("*") if path.is_file()]
    victim = max(files, key=os.path.getsize)
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    status, out, err = run(shared, workdir)
    assert status == 0, err
    assert "checkpoints/24 cannot be used" in err
    assert "Going on from step 20 of 24" in out
    assert_same_run(finished[0], workdir)


def test_a_run_whose_checkpoints_are_of_an_older_format_is_refused(shared, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for path in (workdir / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({**meta, "format": meta["format"] - 1}))
    before = sorted(os.listdir(workdir / "checkpoints"))
    status, _, err = run(shared, workdir)
    assert status == 2
    assert "cannot be used: format 5, this program reads 6" in err
    assert "Traceback" not in err
    assert sorted(os.listdir(workdir / "checkpoints")) == before


def test_a_damaged_best_checkpoint_leaves_the_next_best(shared, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    selected = json.loads((workdir / "results.json").read_text())["selection"]["epochs"]
    assert selected == {"last": 4, "best": 3}
    # All of its arrays: an evaluation reads the weights alone, and half of a file may have none.
    arrays = list((workdir / "checkpoints" / "18" / "state").rglob("d/*"))
    assert arrays
    for path in arrays:
        os.truncate(path, 0)
    status, out, err = run(shared, workdir, f"--workdir={workdir}", "--mode=evaluate", tiny=False)
    assert status == 0, err
    assert "checkpoints/18 cannot be used" in out
    assert "The next best is taken for the best." in out
    again = json.loads((workdir / "evaluation.json").read_text())
    assert again["selection"]["epochs"] == {"last": 4, "best": 4}


def test_what_is_refused_before_the_first_step_binds_no_workdir(shared, tmp_path):
    status, _, err = run(shared, tmp_path / "run", "--config.memory_gb=0.0001")
    assert status == 2
    assert "batch_size=16 needs 0.01 GiB" in err
    assert "No batch fits: keep the batch with optim.accumulate=2" in err
    assert not (tmp_path / "run" / "config.json").exists()
    status, _, err = run(shared, tmp_path / "run")
    assert status == 0, err


def test_a_checkpoint_of_another_configuration_is_refused(shared, finished, tmp_path):
    """Its own workdir is not there to say so: it was lost, or another was named."""
    of_the_other = f"--config.checkpoint.dir={finished[0] / 'checkpoints'}"
    status, _, err = run(shared, tmp_path / "run", of_the_other, "--config.loss.gamma_neg=3.0")
    assert status == 2
    assert "loss.gamma_neg: 2.0 -> 3.0" in err
    assert "checkpoint.dir" not in err
    assert not (tmp_path / "run" / "results.json").exists()


def test_going_on_with_another_configuration_is_refused(shared, finished):
    before = (finished[0] / "results.json").read_bytes()
    status, _, err = run(shared, finished[0], "--config.recovery.mode=none")
    assert status == 2
    assert "recovery.mode: 'epoch' -> 'none'" in err
    assert (finished[0] / "results.json").read_bytes() == before


def test_two_runs_in_one_workdir(shared, tmp_path):
    first = start(shared, tmp_path / "run")
    wait_for((tmp_path / "run" / "config.json").exists, first)
    first.send_signal(signal.SIGSTOP)  # it must not end before the other asks
    refused = [run(shared, tmp_path / "run", *more) for more in ((), ("--mode=evaluate",))]
    first.kill()
    first.communicate()
    for status, _, err in refused:
        assert status == 2
        assert "Another process is running" in err


def test_two_runs_with_one_directory_of_checkpoints(shared, tmp_path):
    first = start(shared, tmp_path / "run")
    wait_for((tmp_path / "run" / "config.json").exists, first)
    first.send_signal(signal.SIGSTOP)
    there = tmp_path / "run" / "checkpoints"
    status, _, err = run(shared, tmp_path / "other", f"--config.checkpoint.dir={there}")
    first.kill()
    first.communicate()
    assert status == 2
    assert (
        f"Another process keeps its checkpoints in {there}: wait for it, stop it, or name another "
        "directory by --config.checkpoint.dir." in err
    )
    assert not (tmp_path / "other" / "config.json").exists()
    status, _, err = run(shared, tmp_path / "run")
    assert status == 0, err


def test_checkpoints_in_the_workdir_itself(shared, tmp_path):
    status, _, err = run(
        shared, tmp_path, f"--config.checkpoint.dir={tmp_path}", "--config.epochs=1"
    )
    assert status == 0, err
    assert (tmp_path / "6" / "state").is_dir()


def test_evaluation_divides_the_cpu_as_training_does(tmp_path):
    config = config_lib.base_config()
    config.cpu_devices = 3
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    program = (
        "import sys, jax\n"
        "from clsl_jax import train\n"
        "train._build = lambda *_, **__: sys.exit(str(jax.device_count()))\n"
        "train.evaluate_only(None, sys.argv[1])"
    )
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program, os.fspath(tmp_path)],
        cwd=REPOSITORY,
        env={**settings, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "3"
