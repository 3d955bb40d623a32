"""A training image that cannot be read: replaced, named and counted, or the end of the run."""

import json

import numpy as np
import pytest
from commands import run

from clsl_jax.data import images, stored
from clsl_jax.data.shards import Example

CLASSES = ("red", "green", "blue")


def prepare(root):
    """A set with two training images of 32 that are no images; `stored` keeps what it is given."""
    rng = np.random.default_rng(0)

    def example(split, row):
        encoded = images.encode_png(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        if split == "train" and row in (5, 6):
            encoded = b"no image at all"
        return Example(encoded, (rng.random(3) < 0.5).astype(np.int8), f"{split}-{row}")

    splits = {
        split: [example(split, row) for row in range(count)]
        for split, count in (("train", 32), ("validation", 8), ("test", 8))
    }
    stored.prepare(
        root, name="table", config="own", version="1.0.0", class_names=CLASSES, splits=splits
    )


ARGUMENTS = (
    "--config.data.name=table",
    "--config.data.sizes=()",
    "--config.labels.protocol=all",
    "--config.epochs=2",
    "--config.batch_size=8",
    "--config.evaluation.batch_size=8",
)


@pytest.mark.slow
def test_it_is_replaced_and_named_or_ends_the_run(tmp_path):
    shared = str(tmp_path)
    prepare(tmp_path / "data")
    arguments = (*ARGUMENTS, f"--config.data.dir={tmp_path / 'data'}")
    most = "--config.data.max_unreadable"
    status, out, err = run(shared, tmp_path / "run", *arguments, f"{most}=0.0625")
    assert status == 0, err
    for row in (5, 6):
        assert out.count(f"Training image train-{row} cannot be read") == 1
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["unreadable_training_images"] == ["train-5", "train-6"]
    again = run(shared, tmp_path / "run", *arguments, f"{most}=0.0625")
    assert again[0] == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result

    status, _, err = run(shared, tmp_path / "other", *arguments, f"{most}=0.06")
    assert status == 2
    assert err.startswith("error: 2 of 32 training images cannot be read (train-5, train-6)")
    assert "data.max_unreadable=0.06" in err
