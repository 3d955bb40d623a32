"""A COCO tree with crowds, an image without labels, grey and CMYK JPEGs."""

import json

import numpy as np
import pytest
from PIL import Image
from preparing import coco_tree, prepare

from clsl_jax.data import sources
from clsl_jax.data.formats import coco


def test_coco2014(tmp_path):
    source = coco_tree(tmp_path / "coco")
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=coco2014", f"--source={source}", f"--out={out}")
    assert status == 0, errors
    assert "4 (published: 82,783)" in shown
    assert "1 (published: 702)" in shown
    assert "1 CMYK, 1 L, 3 RGB" in shown
    dataset = sources.load_dataset(
        "coco2014", directory=out, image_size=12, validation_fraction=0.0
    )
    assert len(dataset.class_names) == 80
    assert dataset.class_names[:2] == ("thing 1", "thing 2")
    # Number 12 does not exist: 13 is the twelfth category, 90 the last.
    assert (dataset.class_names[11], dataset.class_names[79]) == ("thing 13", "thing 90")
    assert dataset.train.ids == [f"COCO_train2014_{n:012d}" for n in (9, 25, 30, 31)]
    # A crowd is a label like any other; two of a kind are one.
    assert np.argwhere(dataset.train.labels == 1).tolist() == [[0, 0], [0, 79], [1, 11], [3, 1]]
    assert (dataset.train.labels != -1).all()
    assert dataset.facts["without_labels"] == {"train": 1, "test": 0}
    for row, number in ((1, 25), (3, 31)):
        file = source / "train2014" / f"COCO_train2014_{number:012d}.jpg"
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB").resize((12, 12), Image.Resampling.BILINEAR))
        difference = dataset.train.images[row]["image"].astype(int) - expected
        assert np.abs(difference).max() <= 4


def test_what_is_wrong_is_named(tmp_path):
    coco_tree(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    whole = path.read_text()
    (image,) = content["images"]
    content["images"].append({**image, "id": 43, "file_name": f"a/{image['file_name']}"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"by file names without folder.*: 1 images listed twice"):
        coco.read_coco(tmp_path)
    content = json.loads(whole)
    content["annotations"][0]["category_id"] = 12
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_val2014.json: .* image 42 and category 12"):
        coco.read_coco(tmp_path)
    first = content["categories"][0]
    for change, expected in (
        ({"name": "thing 1"}, "instances_val2014.json: 1 classes listed twice: thing 1"),
        ({"id": 1}, "instances_val2014.json: categories .* have the same id 1"),
    ):
        content["categories"][0] = {**first, **change}
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=expected):
            coco.read_coco(tmp_path)
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="is it an instances file"):
        coco.read_coco(tmp_path)
    path.write_text(path.read_text()[:9])
    with pytest.raises(ValueError, match="cannot be read"):
        coco.read_coco(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"annotations of val2014: not found(.|\n)*instances_val"):
        coco.read_coco(tmp_path)
