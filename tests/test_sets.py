"""Each set from its official files to a trained and evaluated run, by the command line alone."""

import json
import math

import numpy as np
import pytest
from commands import run
from preparing import coco_tree, nuswide_tree, prepare, vg500_tree, voc_tree, write

from clsl_jax import example
from clsl_jax.writer import LOG_NAME, read_log

SMALL = ("--config.model.backbone=small", "--config.model.widths=(8,)")
TINY = (
    "--config.model.rank=8",
    "--config.model.encoder_heads=2",
    "--config.model.encoder_mlp=16",
    "--config.model.embedding_dim=8",
    "--config.data.image_size=32",
    "--config.data.workers=0",
    "--config.data.validation_fraction=0.25",
    "--config.batch_size=4",
    "--config.epochs=1",
    "--config.evaluation.batch_size=4",
    "--config.evaluation.pictures=1",
)
# The head alone; what the encoder adds is the same for every set.
NO_ENCODER = "--config.model.encoder_layers=0"
OBJECTS = (
    [("dog", 0), ("person", 1)],
    [("cat", 0), ("chair", 0), ("chair", 1)],
    [("person", 0), ("horse", None)],
)
COUNTS = {"train": 9, "validation": 3, "test": 5}
NAMES = {
    "Train": [rf"actor\{number:04d}_2124494179.jpg" for number in range(13)],
    "Test": [rf"zoo\{number:04d}_3.jpg" for number in range(5)],
}


# Each builds its tree and returns flags of the preparation, images of each split, number of
# classes, and facts that the result must state of the set.


def _voc2007(root):
    trainval = {f"{number:06d}": OBJECTS[number % 3] for number in range(1, 13)}
    test = {f"{number:06d}": OBJECTS[number % 3] for number in range(21, 26)}
    voc_tree(root, "2007", {"trainval": trainval, "test": test})
    return (), COUNTS, 20, {"notes": []}


def _voc2012(root):
    # As it was public for years: images for testing whose labels nobody has.
    train = {f"2008_{number:06d}": OBJECTS[number % 3] for number in range(1, 13)}
    val = {f"2009_{number:06d}": OBJECTS[number % 3] for number in range(21, 26)}
    test = {f"2010_{number:06d}": None for number in range(31, 33)}
    voc_tree(root, "2012", {"train": train, "val": val, "trainval": train | val, "test": test})
    note = "VOC2012's test labels are not there: trained on train, tested on val."
    return (), COUNTS, 20, {"notes": [note]}


def _coco2014(root):
    coco_tree(root, plain=8)  # and images that are grey, CMYK or without labels
    counts = {"train": 8, "validation": 3, "test": 9}  # of the images that have a label
    return (), counts, 80, {"without_labels": {"train": 1, "test": 0}}


def _nuswide(root):
    nuswide_tree(root, NAMES, lost=[NAMES["Train"][4]], period=20)
    nothing = {"missing": 0, "unreadable": 0}
    return (), COUNTS, 81, {"left_out": {"train": nothing | {"missing": 1}, "test": nothing}}


def _vg500(root):
    train = [f"VG_100K{'_2' * (number % 2)}/{2400000 + number}.jpg" for number in range(12)]
    sets = {"train": train, "test": [f"VG_100K/{number}.jpg" for number in range(1, 6)]}
    names = [name.rpartition("/")[2] for listed in sets.values() for name in listed]
    vg500_tree(root, sets, {name: [row % 3, 499, 17 + row] for row, name in enumerate(names)})
    file = write(root / "names.txt", "".join(f"thing {number}\n" for number in range(500)))
    return (f"--class_names={file}",), COUNTS, 500, {"notes": []}


def _table(root):
    example.write_example(root, images=20, seed=0)
    note = "No split for testing: 4 images held out, by label, seed 0."
    return (), {"train": 12, "validation": 4, "test": 4}, 20, {"notes": [note]}


SETS = {
    "voc2007": (_voc2007, ["--config=configs/voc.py"]),
    # Validation on the training images, which the test split's selection leaves out.
    "voc2007 released": (
        lambda root: (*_voc2007(root)[:1], {"train": 12, "validation": 12, "test": 5}, 20, {}),
        ["--config=configs/voc.py:released", "--config.data.validation_fraction=0.0"],
    ),
    "voc2012": (_voc2012, ["--config=configs/voc.py", "--config.data.name=voc2012"]),
    "coco2014": (_coco2014, ["--config=configs/coco.py", NO_ENCODER]),
    "nuswide": (_nuswide, ["--config=configs/nuswide.py", NO_ENCODER]),
    "vg500": (_vg500, ["--config=configs/coco.py", "--config.data.name=vg500", NO_ENCODER]),
    "table": (_table, ["--config=configs/table.py"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_from_official_files_to_results(shared, tmp_path, monkeypatch, name):
    # Compiling is most of what these runs do, and none of it is what they are for.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    build, asked = SETS[name]
    source, out, workdir = tmp_path / "source", tmp_path / "prepared", tmp_path / "run"
    name, _, released = name.partition(" ")
    flags, counts, classes, facts = build(source)
    status, _, err = prepare(f"--dataset={name}", f"--source={source}", f"--out={out}", *flags)
    assert status == 0, err

    network = () if name == "table" else SMALL  # a table has its pretrained one
    status, shown, err = run(
        shared,
        workdir,
        *asked[:1],
        *network,
        *TINY,
        *asked[1:],
        f"--config.data.dir={out}",
        tiny=False,
    )
    assert status == 0, err
    assert f"{name}, " in shown
    # By its recipe, which hands out labels of classes with enough known ones.
    few = f"No label is recovered for {classes} of {classes} classes"
    assert (few in shown) == (not released)
    trained = json.loads((workdir / "results.json").read_text())
    dataset = trained["dataset"]
    assert dataset["name"] == name
    assert len(dataset["classes"]) == classes
    assert dataset["images"] == counts
    assert facts.items() <= dataset["facts"].items()
    # Last and best, validation and test, two conventions.
    assert len(trained["results"]) == (4 if released else 8)
    # Most classes have no positive among so few images; those stay out of the mean.
    assert all(0 < row["mAP"] <= 1 for row in trained["results"])
    (row,) = read_log(str(workdir / LOG_NAME))
    assert (row["epoch"], row["step"]) == (1, counts["train"] // 4)
    assert math.isfinite(row["train/loss"])
    with np.load(workdir / "predictions.npz") as predictions:
        assert predictions["scores"].shape == (counts["test"], classes)
        assert predictions["ignore"].any() == name.startswith("voc")  # difficult objects
        assert (predictions["labels"] == -1).any() == (name == "table")

    status, _, err = run(shared, workdir, "--mode=evaluate", tiny=False)
    assert status == 0, err
    assert json.loads((workdir / "evaluation.json").read_text()) == trained
