"""NUS-WIDE with its backslashes, line ends, label files and lost images."""

import json

import numpy as np
import pytest
from preparing import NUSWIDE_CONCEPTS, nuswide_tree, prepare, write

from clsl_jax.data import images, sources
from clsl_jax.data.formats import nuswide

NAMES = {
    "Train": [r"actor\0001_2124494179.jpg", r"zoo\0002_3.jpg", r"zoo\0003_4.jpg", r"sky\4_1.jpg"],
    "Test": [r"actor\0009_9.jpg", r"sky\0001_2124494179.jpg"],
}


def test_nuswide(tmp_path):
    source = nuswide_tree(tmp_path / "nus", NAMES, lost=[r"zoo\0002_3.jpg"])
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=nuswide", f"--source={source}", f"--out={out}")
    assert status == 0, errors
    assert "81 (as published) classes" in shown
    assert "Images in train that are missing: 1" in shown
    assert "zoo/0002_3.jpg: no such file" in shown
    report = json.loads((out / "nuswide" / "report.json").read_text())
    assert [found["id"] for found in report["splits"]["train"]["missing"]] == ["zoo/0002_3.jpg"]
    dataset = sources.load_dataset("nuswide", directory=out, image_size=10, validation_fraction=0.0)
    assert dataset.class_names == tuple(NUSWIDE_CONCEPTS)
    assert dataset.train.ids == ["actor/0001_2124494179.jpg", "zoo/0003_4.jpg", "sky/4_1.jpg"]
    expected = [[(row + c) % 40 == 0 for c in range(81)] for row in (0, 2, 3)]
    assert np.array_equal(dataset.train.labels, np.array(expected, np.int8))
    encoded = (source / "Flickr/sky/4_1.jpg").read_bytes()
    expected = images.resize_image(images.decode_image(encoded), 10)
    assert np.array_equal(dataset.train.images[2]["image"], expected)
    assert dataset.facts["left_out"]["train"] == {"missing": 1, "unreadable": 0}


def test_images_in_one_folder(tmp_path):
    found = nuswide.read_nuswide(nuswide_tree(tmp_path, NAMES, nested=False))
    assert found.splits["train"].paths[1] == tmp_path / "Flickr" / "0002_3.jpg"
    assert found.splits["train"].ids[1] == "zoo/0002_3.jpg"


def test_what_is_wrong_is_named(tmp_path):
    nuswide_tree(tmp_path, NAMES)
    path = tmp_path / "Groundtruth/TrainTestLabels/Labels_concept07_Test.txt"
    path.write_text("0\n")
    with pytest.raises(ValueError, match=r"Labels_concept07_Test.txt has 1 lines, .* lists 2"):
        nuswide.read_nuswide(tmp_path)
    path.write_text("0\n2\n")
    with pytest.raises(ValueError, match=r"Labels_concept07_Test.txt, line 2: '2'"):
        nuswide.read_nuswide(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"Labels_concept07_Test.txt cannot be read"):
        nuswide.read_nuswide(tmp_path)
    write(tmp_path / "Concepts81.txt", "sky\nsky\n")
    with pytest.raises(ValueError, match=r"Concepts81.txt: 1 classes listed twice: sky\."):
        nuswide.read_nuswide(tmp_path)
    (tmp_path / "Concepts81.txt").unlink()
    with pytest.raises(ValueError, match=r"list of concepts: not found"):
        nuswide.read_nuswide(tmp_path)
