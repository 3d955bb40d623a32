"""VOC trees as their archives unpack, through the command, to labels and pixels."""

import json

import numpy as np
import pytest
from preparing import prepare, voc_tree, write

from clsl_jax.data import images, sources
from clsl_jax.data.formats import voc

INDEX = {name: column for column, name in enumerate(voc.CLASS_NAMES)}
TRAINVAL = {
    "000005": [("chair", 0), ("chair", 1), ("person", 0)],
    "000007": [("car", 1)],
    "000009": [("horse", 0), ("dog", 1), ("dog", 0)],
    "000012": [("tvmonitor", None)],
}
TEST = {"000001": [("dog", 0), ("person", 1)], "000002": [("train", 0)], "000003": []}


def _load(out, name, **options):
    return sources.load_dataset(
        name, directory=out, image_size=10, validation_fraction=0.0, **options
    )


def test_voc2007(tmp_path):
    source = voc_tree(tmp_path / "data", "2007", {"trainval": TRAINVAL, "test": TEST})
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=voc2007", f"--source={source}", f"--out={out}")
    assert status == 0, errors
    assert "4 (published: 5,011)" in shown
    assert "20 (as published) classes" in shown
    assert "Not the published number of images in train, positive labels in train, " in shown
    command = f"python -m clsl_jax.main --config=configs/voc.py --config.data.dir={out}"
    assert command in shown
    dataset = _load(out, "voc2007")
    assert dataset.class_names == voc.CLASS_NAMES
    assert dataset.train.ids == list(TRAINVAL)
    assert dataset.test.ids == list(TEST)
    expected = np.zeros((4, 20), np.int8)
    for row, column in ((0, "chair"), (0, "person"), (2, "horse"), (2, "dog"), (3, "tvmonitor")):
        expected[row, INDEX[column]] = 1
    assert np.array_equal(dataset.train.labels, expected)
    # Only ever difficult: neither positive nor to be told from other negatives by the label.
    assert np.argwhere(dataset.train.difficult).tolist() == [[1, INDEX["car"]]]
    assert np.argwhere(dataset.test.difficult).tolist() == [[0, INDEX["person"]]]
    assert np.argwhere(dataset.test.labels == 1).tolist() == [
        [0, INDEX["dog"]],
        [1, INDEX["train"]],
    ]
    file = source / "VOCdevkit/VOC2007/JPEGImages/000009.jpg"
    whole = images.resize_image(images.decode_image(file.read_bytes()), 10)
    assert np.array_equal(dataset.train.images[2]["image"], whole)
    assert dataset.facts["without_labels"] == {"train": 1, "test": 1}
    report = json.loads((out / "voc2007" / "report.json").read_text())
    assert report["splits"]["train"]["labels"] == {"found": 5, "published": 7306}
    assert report["splits"]["train"]["per_class"]["car"] == {
        "positive": 0,
        "negative": 3,
        "unknown": 0,
        "difficult": 1,
    }
    assert (out / "voc2007" / "report.txt").read_text().strip() in shown


TEST_2012 = {"2008_000001": None, "2008_000004": None}
TRAIN, VAL = {"2007_000027": [("person", 0)]}, {"2007_000032": [("bird", 0), ("cat", 1)]}


def _tree_2012(root, test, **options):
    sets = {"train": TRAIN, "val": VAL, "trainval": {**TRAIN, **VAL}, "test": test}
    return voc_tree(root, "2012", sets, **options)


def test_voc2012_without_test_labels_is_tested_on_val(tmp_path):
    source = _tree_2012(tmp_path / "data", TEST_2012)
    status, shown, errors = prepare(
        "--dataset=voc2012", f"--source={source}/VOCdevkit", f"--out={tmp_path}"
    )
    assert status == 0, errors
    assert "trained on train, tested on val" in shown
    dataset = _load(tmp_path, "voc2012")
    assert (dataset.train.ids, dataset.test.ids) == (list(TRAIN), list(VAL))
    assert dataset.test.difficult[0, INDEX["cat"]]
    with pytest.raises(ValueError, match="2 of the 2 images of test have neither"):
        voc.read_voc(source, year="2012", test="test")


def test_voc2012_with_test_labels(tmp_path):
    annotated = {"2008_000001": [("sofa", 0)], "2008_000004": [("sofa", 1)]}
    files = ("test", {("2008_000001", "sofa"): 1, ("2008_000004", "sofa"): 0})
    from_xml = voc.read_voc(_tree_2012(tmp_path / "a", annotated), year="2012")
    from_files = voc.read_voc(
        _tree_2012(tmp_path / "b", TEST_2012, class_files=[files]) / "VOCdevkit/VOC2012",
        year="2012",
    )
    for found in (from_xml, from_files):
        assert found.splits["train"].ids == [*TRAIN, *VAL]
        assert found.splits["test"].ids == list(TEST_2012)
        assert np.array_equal(found.splits["test"].labels[:, INDEX["sofa"]], [1, 2])
        assert found.splits["test"].labels.sum() == 3
    assert voc.read_voc(tmp_path / "a", year="2012", test="val").splits["test"].ids == list(VAL)
    # Labels that say nothing, as before they were public, are none.
    blank = _tree_2012(tmp_path / "c", TEST_2012, class_files=[("test", {})])
    assert voc.read_voc(blank, year="2012").splits["test"].ids == list(VAL)


def test_disagreement_of_the_two_sources_is_noted(tmp_path):
    files = ("trainval", {("000007", "car"): 1})
    source = voc_tree(tmp_path, "2007", {"trainval": TRAINVAL, "test": TEST}, class_files=[files])
    (note,) = voc.read_voc(source, year="2007").notes
    assert "trainval: 6 labels" in note


def test_what_is_wrong_is_named(tmp_path):
    source = voc_tree(tmp_path / "d", "2007", {"trainval": TRAINVAL, "test": TEST})
    home = source / "VOCdevkit/VOC2007"
    with pytest.raises(ValueError, match=r"image sets of VOC2012: not found(.|\n)*VOC2012"):
        voc.read_voc(source, year="2012")
    with pytest.raises(ValueError, match="VOC2007 has labels of its own test split"):
        voc.read_voc(source, year="2007", test="val")
    write(
        home / "Annotations/000007.xml",
        "<annotation><object><name>cra</name></object></annotation>",
    )
    with pytest.raises(ValueError, match=r"000007.xml: an object is called 'cra'"):
        voc.read_voc(source, year="2007")
    write(home / "Annotations/000007.xml", "<annotation><object>")
    with pytest.raises(ValueError, match=r"000007.xml cannot be read"):
        voc.read_voc(source, year="2007")
    write(home / "Annotations/000007.xml", "<annotation/>")
    (home / "JPEGImages/000007.jpg").unlink()
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=voc2007", f"--source={source}", f"--out={out}")
    assert status == 2
    assert errors.startswith("error: 1 missing image (the first: ")
    assert "000007.jpg" in errors
    assert "--leave_out=missing" in errors
    assert "Images in train that are missing: 1" in shown
    with pytest.raises(ValueError, match="no prepared copy"):
        _load(out, "voc2007")
