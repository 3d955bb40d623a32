"""Programs of `benchmarks/` that the documentation's figures of recovery rest on."""

import json
import pathlib
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy import stats
from sklearn.metrics import precision_recall_curve

from clsl_jax import sharding
from clsl_jax.models import alignment

BENCHMARKS = pathlib.Path(commands.REPOSITORY) / "benchmarks"


def cells(line):
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_table_and_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rounds

    times = rounds.spread([1234.5, 1000.0, 2000.06])
    assert rounds.milliseconds(times) == "1234.5 (1000.0..2000.1)"
    assert rounds.between(times, ",.0f") == "1,234 (1,000..2,000)"
    text = rounds.markdown("Title", ("way", "ms"), [("a", "1.50"), ("longer", "")])
    assert text == (
        "### Title\n\n| way    |   ms |\n|:-------|-----:|\n| a      | 1.50 |\n| longer |      |\n"
    )


def test_masks_of_what_was_recovered(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sure_cells

    labels = (np.arange(60).reshape(12, 5) % 3 == 0).astype(np.int8)
    known = np.arange(60).reshape(12, 5) % 4 == 0
    taken = ~known & (np.arange(60).reshape(12, 5) % 5 < 2)
    right = np.arange(60).reshape(12, 5) % 7 != 1
    found = sure_cells.masks(known, taken, right, labels, seed=3)
    np.testing.assert_array_equal(found["sure"], known | taken)
    np.testing.assert_array_equal(found["right"] & ~known, taken & right)
    drawn = found["random"] & ~known
    assert found["random"][known].all()
    for label in (0, 1):
        assert (labels[drawn] == label).sum() == (labels[taken] == label).sum() > 0
    assert (drawn != taken).any()


def test_the_ablation_pairs_seeds_and_takes_the_mean_of_runs_again(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(commands.REPOSITORY)
    import study_table

    data = "scenes, uniform"
    runs = {
        (data, 0.1, "clsl"): {0: 80.0, 1: 81.0, 2: 82.0},
        (data, 0.1, "clsl_again"): {1: 83.0, 2: 82.0, 3: 84.0},
        (data, 0.1, "bare+ema"): {1: 80.0, 2: 81.5, 3: 83.75, 9: 0.0},
        (data, 0.2, "bare+ema"): {1: 80.0},
        (data, 0.3, "clsl"): {0: 90.0},
        (data, 0.3, "bare+ema"): {0: 91.5},
    }
    baseline = "clsl,clsl_again"
    assert study_table.pooled(runs, data, 0.1, baseline) == {0: 80.0, 1: 82.0, 2: 82.0, 3: 84.0}
    text = study_table.ablation(runs, data, ["bare+ema", baseline, "clsl", "gcn"], baseline)
    *_, header, _, first, row, empty = text.strip().splitlines()
    assert cells(header) == ["test mAP", "10% known", "20% known", "30% known"]
    assert cells(first) == ["`clsl,clsl_again`", "82.00 ± 1.63", "", "90.00"]
    p_value = stats.ttest_rel([80.0, 81.5, 83.75], [82.0, 82.0, 84.0]).pvalue
    assert cells(row) == ["`bare+ema`", f"-0.92, p = {p_value:.2g} (3)", "", "+1.50 (1)"]
    assert cells(empty) == ["`gcn`", "", "", ""]
    text = study_table.again(runs, {"clsl": baseline, "known_asl": "bare+ema"}, "Means")
    (mean,) = [
        found
        for found in map(cells, text.splitlines())
        if found[1:3] == ["clsl", "4"] and found[0].endswith("10%") and found[-1]
    ]
    assert mean[3].startswith("82.00")
    assert mean[4:] == ["+0.92", f"{p_value:.2g}", "+2.00, +0.50, +0.25"]


def test_collectives_in_loops_count_as_often_as_they_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hlo

    def program(x):
        def summed(_, x):
            return jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.psum(y, "data") * 0.5, x)

        return jax.lax.psum(jax.lax.fori_loop(0, 5, summed, x)[:1], "data")

    mesh = sharding.make_mesh(jax.devices()[:2])
    spread, alike = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spread, out_specs=alike, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((8, 6))).compile().as_text()
    # Of 4 rows of 6 columns on a device, three times in each of five turns, and once of one row.
    assert hlo.collectives(text) == {"all-reduce": (16, 15 * 4 * 6 * 4 + 6 * 4)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[8,4]{1,0} all-gather(%x)", {"all-gather": (1, 128)}),
        ("%a = (f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x)", {"all-gather": (1, 128)}),
        (
            "%a = ((f32[1], s8[2]), (f32[4], s8[8])) all-gather-start(%x, %y)",
            {"all-gather": (1, 4 * 4 + 8)},
        ),
        (
            "%a = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": (1, 16)},
        ),
        ("%a = f32[4]{0} all-reduce-start(%x)", {"all-reduce": (1, 16)}),
        ("%a = (f32[4]{0}, f32[2]{0}) all-reduce-start(%x, %y)", {"all-reduce": (1, 24)}),
    ],
)
def test_a_collective_that_is_started_counts_as_one_that_is_waited_for(monkeypatch, line, expected):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hlo

    assert hlo.collectives(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}\n") == expected


@pytest.mark.parametrize("form", ["class_by_class_gradients", "in_blocks_gradients"])
def test_sgfe_exchanges_one_vector_whatever_the_classes(monkeypatch, form):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hlo

    mesh = sharding.make_mesh(jax.devices()[:2])
    spread, alike = sharding.by_example(mesh), sharding.replicated(mesh)
    b, p, c, r = 4, 3, 50, 8
    shapes = ((b, p, r), spread), ((b, c, r), spread), ((r,), alike), ((b, p, c), spread)
    arrays = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=where) for x, where in shapes]
    function = jax.jit(getattr(alignment, form), out_shardings=(spread, spread, alike))
    text = function.lower(*arrays).compile().as_text()
    assert hlo.collectives(text) == {"all-reduce": (1, 4 * r)}


def _interpolated(scores, labels):
    """Mean over the classes of the area under the curve made monotone from the right."""
    found = []
    for score, label in zip(scores.T, labels.T, strict=True):
        if label.any():
            precision, recall, _ = precision_recall_curve(label, score)  # recall falls
            found.append(-np.sum(np.diff(recall) * np.maximum.accumulate(precision)[:-1]))
    return 100 * np.mean(found)


@pytest.mark.slow
def test_an_ablation_in_under_sixty_lines(shared, tmp_path):
    """Its image alone is the run's own network, which has no part of label statistics."""
    program = BENCHMARKS / "label_correlation.py"
    assert len(program.read_text(encoding="utf-8").splitlines()) < 60
    workdir = tmp_path / "run"
    status, _, errors = commands.run(
        shared,
        workdir,
        "--config.epochs=1",
        "--config.recovery.mode=none",
        "--config.recovery.source=scores",
        "--config.loss.statistics=False",
        "--config.evaluation.statistics=False",
        f"--config.checkpoint.dir={tmp_path}/saved",
    )
    assert status == 0, errors
    environment = commands.environment(shared)
    environment["PYTHONPATH"] = commands.REPOSITORY
    done = subprocess.run(
        [sys.executable, program, workdir],
        cwd=commands.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    title, _, header, _, *lines = done.stdout.strip().splitlines()
    assert title == f"### {workdir}"
    assert cells(header) == ["from", "mAP", "log loss"]
    rows = [cells(line) for line in lines]
    kinds = ("image", "labels", "both")
    assert [row[0] for row in rows] == [
        f"{split}, {kind}" for split in ("hidden training labels", "test") for kind in kinds
    ]
    found = {name: (float(ap), float(log_loss)) for name, ap, log_loss in rows}
    for ap, log_loss in found.values():
        assert 0 < ap < 100
        assert 0 < log_loss < 5

    (own,) = (
        row["mAP"]
        for row in json.loads(commands.read(workdir / "results.json"))["results"]
        if (row["weights"], row["split"], row["AP_convention"]) == ("last", "test", "interpolated")
    )
    assert found["test, image"][0] == pytest.approx(100 * own, abs=0.011)
    with np.load(workdir / "predictions.npz") as predictions:
        scores, labels = predictions["scores"].astype(float), predictions["labels"]
    assert found["test, image"][0] == pytest.approx(_interpolated(scores, labels), abs=0.011)
    # What a sigmoid of p stands for under the asymmetric loss: odds of p^3 to 1 - p.
    p = scores**3 / (scores**3 + 1 - scores)
    log_loss = -np.log(np.where(labels == 1, p, 1 - p)).mean()
    assert found["test, image"][1] == pytest.approx(log_loss, abs=2e-4)
    # Where no label is known, labels say the same of every image: a precision of the frequency.
    assert found["test, labels"][0] == pytest.approx(100 * labels.mean(), abs=0.011)
