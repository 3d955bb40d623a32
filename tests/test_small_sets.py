"""Sets at the edge of what can be trained: two classes, splits without labels."""

import json
import os
import re
import runpy

import numpy as np
import pytest
from commands import CONFIG, REPOSITORY, TINY, run
from preparing import DRAWN, drawn_set
from sklearn.metrics import average_precision_score

from clsl_jax import command_line, experiment
from clsl_jax import config as config_lib
from clsl_jax.errors import InputError

pytestmark = pytest.mark.slow


def prepare(root, **given):
    """Two classes; `split=value` gives every cell of a split that value, or each class its own."""

    def change(split, row, encoded, labels):
        return encoded, np.full_like(labels, given[split]) if split in given else labels

    drawn_set(root, ("a", "b"), change)


def test_two_classes_and_a_test_split_to_be_filled_in(shared, tmp_path):
    def change(split, row, encoded, labels):
        unknown = [split == "test", split == "test" or (split == "train" and row % 4 == 0)]
        return encoded, np.where(unknown, -1, labels).astype(labels.dtype)

    drawn_set(tmp_path / "data", ("a", "[b]"), change)
    recovery = ("--config.recovery.thresholds=adaptive", "--config.recovery.min_known=17")
    arguments = (*DRAWN, f"--config.data.dir={tmp_path / 'data'}", *recovery)
    status, out, err = run(shared, tmp_path / "run", *arguments, "--config.evaluation.pictures=2")
    assert status == 0, err
    # Of 24 known labels one kind has twelve at most; of the other class none is unknown.
    told = re.search(
        r"No label is recovered for 1 of 2 classes, as fewer positives or negatives are known than "
        r"recovery\.min_known=17: \[b\] (\d+) / (\d+)\.\n",
        out,
    )
    assert sum(map(int, told.groups())) == 24
    assert "No image of the test split is labelled as positive for any class" in out
    row = next(line for line in out.splitlines() if "test, best" in line)
    assert row.count("–") == 5, row
    found = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert [r["mAP"] for r in found if r["split"] == "test"] == [None] * 4
    assert all(r["mAP"] > 0 for r in found if r["split"] == "validation")
    assert (tmp_path / "run" / "pictures.png").stat().st_size > 0


def test_a_split_that_cannot_pick_an_epoch_is_refused_and_the_workdir_stays_free(shared, tmp_path):
    prepare(tmp_path / "data", validation=0)
    arguments = (*DRAWN, f"--config.data.dir={tmp_path / 'data'}")
    status, _, err = run(shared, tmp_path / "run", *arguments)
    assert status == 2
    assert err.startswith("error: No image of the validation split is labelled as positive")
    assert not (tmp_path / "run" / "config.json").exists()
    statistics = ("--config.loss.statistics=True", "--config.evaluation.statistics=True")
    prepare(tmp_path / "other", train=1)
    arguments = (*DRAWN, f"--config.data.dir={tmp_path / 'other'}")
    status, _, err = run(shared, tmp_path / "run", *arguments, *statistics)
    assert status == 2
    assert "none of a, b: label some images as negative" in err


def test_known_positives_alone_teach_nothing(tmp_path):
    """Who finds everything everywhere would have no loss, and 100 % in every metric."""

    def build(*more, **given):
        root = tmp_path / str(len(os.listdir(tmp_path)))
        prepare(root, **given)
        alone = [f"--config.{key}=False" for key in ("loss.statistics", "evaluation.statistics")]
        arguments = (f"--config={CONFIG}", *TINY, *DRAWN, *alone, "--config.recovery.source=scores")
        config = command_line.config_of([*arguments, f"--config.data.dir={root}", *more])
        said = []
        experiment.build(config, report=said.append)
        return said

    with pytest.raises(InputError, match=r"No training label is known to be absent.*--empty=neg"):
        build(train=1)
    # Labels of a file of one's own take the place of the set's.
    labels = tmp_path / "labels.csv"
    own = ("--config.labels.protocol=file", f"--config.labels.file={labels}")
    for cell, message in (
        ("1", rf"known to be absent in {labels}, .*is not there, write 0 there; if it may be"),
        ("", rf"No training label is known in {labels}, so that nothing can be learned"),
    ):
        labels.write_text(f"image,a,b\ntrain-0,{cell},\n")
        with pytest.raises(InputError, match=message):
            build(*own, train=(1, 0))
    assume, hard = "--config.recovery.mode=assume", "--config.recovery.soft=False"
    opened, none = "--config.recovery.open_weight=1", "--config.recovery.mode=none"
    nothing = "--config.recovery.weight=0"
    for keys in ((assume, nothing), (opened, hard, nothing), (opened, hard, none)):
        with pytest.raises(InputError, match="No training label is known to be absent"):
            build(*keys, train=1)
    expected = ("--config.loss.expected_positives=1", "--config.loss.positives_per_image=1")
    for keys in (expected, (assume,), (opened, hard)):
        assert build(*keys, train=1) == []
    (said,) = build(train=(1, 0))
    assert said == (
        "Of 1 of 2 classes no training label is known to be absent, so that they will be found in "
        "every image: a."
    )
    for labels in (1, (1, 0)):
        with pytest.raises(InputError, match="Of no class has the validation split a label that"):
            build(validation=labels)
    (said,) = build(test=1)
    assert said == (
        "Of no class has the test split a label that is known to be absent beside one that is "
        "there, so that every mAP would be 100 %: label some of its images, or count what is "
        "unknown as absent (evaluation.unknown=negative)."
    )


def test_a_table_of_positives_alone_is_trained_and_scored(shared, tmp_path):
    """What is unknown counts as absent, at first in training, and in scoring; it stays unknown."""

    def change(split, row, encoded, labels):
        return encoded, np.where(labels == 1, 1, -1).astype(labels.dtype)

    drawn_set(tmp_path / "data", ("a", "b"), change)
    recipe = runpy.run_path(f"{REPOSITORY}/configs/table.py")["get_config"]("positives")
    plain = command_line.config_of([f"--config={REPOSITORY}/configs/table.py"])
    changed = config_lib.changed_keys(plain, recipe)
    assert {key.partition(".")[0] for key in changed} == {"recovery", "loss", "evaluation"}
    keys = {key: value for key, (_, value) in changed.items()}
    keys |= {"loss.statistics": False, "evaluation.statistics": False, "recovery.source": "scores"}
    keys |= {"recovery.mode": "epoch", "recovery.warmup_epochs": 1}
    arguments = [*DRAWN, f"--config.data.dir={tmp_path / 'data'}"]
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    status, out, err = run(shared, tmp_path / "run", *arguments)
    assert status == 0, err
    assert "AP interpolated, unknown labels scored as absent" in " ".join(out.split())
    found = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert {row["unknown"] for row in found} == {"negative"}
    with np.load(tmp_path / "run" / "predictions.npz") as predicted:
        labels, scores = predicted["labels"], predicted["scores"]
    assert set(np.unique(labels)) == {0, 1}
    (row,) = [
        row
        for row in found
        if (row["split"], row["weights"], row["AP_convention"])
        == ("test", "best", "uninterpolated")
    ]
    expected = [average_precision_score(labels[:, c], scores[:, c]) for c in range(2)]
    np.testing.assert_allclose(list(row["AP"].values()), expected, rtol=1e-6)
    given = (tmp_path / "run" / "recovered.csv").read_text().splitlines()[1:]
    assert any(line.endswith(",") for line in given)
