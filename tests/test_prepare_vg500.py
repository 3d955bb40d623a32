"""SSGRL's partition of Visual Genome, with images in two folders."""

import json

import numpy as np
import pytest
from preparing import prepare, vg500_tree, write

from clsl_jax.data import sources
from clsl_jax.data.formats import vg500

SETS = {"train": ["VG_100K/1.jpg", "VG_100K_2/2412620.jpg"], "test": ["VG_100K/150.jpg"]}
POSITIVES = {"1.jpg": [0, 499, 17], "2412620.jpg": [3], "150.jpg": [17], "9.jpg": []}


@pytest.mark.parametrize("folder", ["", "ssgrl_partition"])
def test_vg500(tmp_path, folder):
    source = vg500_tree(tmp_path / "vg", SETS, POSITIVES, folder=folder)
    names = write(tmp_path / "names.txt", "".join(f"thing {n}\n" for n in range(500)))
    status, shown, errors = prepare(
        "--dataset=vg500", f"--source={source}", f"--out={tmp_path}", f"--class_names={names}"
    )
    assert status == 0, errors
    assert "2 (published: 98,249)" in shown
    dataset = sources.load_dataset(
        "vg500", directory=tmp_path, image_size=8, validation_fraction=0.0
    )
    assert dataset.class_names[499] == "thing 499"
    assert dataset.train.ids == ["1.jpg", "2412620.jpg"]
    assert np.argwhere(dataset.train.labels).tolist() == [[0, 0], [0, 17], [0, 499], [1, 3]]
    assert np.argwhere(dataset.test.labels).tolist() == [[0, 17]]


def test_classes_without_names_and_what_is_wrong(tmp_path):
    vg500_tree(tmp_path, SETS, POSITIVES)
    found = vg500.read_vg500(tmp_path)
    assert found.class_names[3] == "category 3"
    assert "--class_names" in found.notes[0]
    with pytest.raises(ValueError, match="holds 1 class names, expected 500"):
        vg500.read_vg500(tmp_path, class_names=write(tmp_path / "n.txt", "one\n"))
    twice = "".join(f"thing {max(n, 1)}\n" for n in range(500))
    with pytest.raises(ValueError, match=r"n.txt: 1 classes listed twice: thing 1\."):
        vg500.read_vg500(tmp_path, class_names=write(tmp_path / "n.txt", twice))
    for labels, expected in (
        ({**POSITIVES, "1.jpg": [500]}, "1.jpg has class 500; expected 0 to 499"),
        ({"1.jpg": [1], "150.jpg": [1]}, "has no labels for 2412620.jpg"),
        ([1], "expected image names"),
    ):
        write(tmp_path / "vg_category_500_labels_index.json", json.dumps(labels))
        with pytest.raises(ValueError, match=expected):
            vg500.read_vg500(tmp_path)
