"""Files of official data sets and of BERT folders, mutilated: read, or refused in one message."""

import json
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given
from preparing import coco_tree, nuswide_tree, vg500_tree, voc_tree
from test_embed import LABELS as WORDS
from test_embed import bert_folder  # noqa: F401
from test_fuzz import SEEDS, examples, mutated, refusal, strange_value

from clsl_jax.data.formats import coco, nuswide, vg500, voc
from clsl_jax.text import transformer

NESTED = "[" * 10**5


def listed(listing):
    for split in listing.splits.values():
        assert split.labels.shape == (len(split.ids), len(listing.class_names))
        assert np.isin(split.labels, (-1, 0, 1, 2)).all()
        assert len(set(split.ids)) == len(split.paths) == len(split.ids)
        for path in split.paths:
            path.exists()


def read_voc(root):
    listed(voc.read_voc(root, year="2007"))


def read_coco(root):
    listed(coco.read_coco(root))


def read_nuswide(root):
    listed(nuswide.read_nuswide(root))


def read_vg500(root):
    listed(vg500.read_vg500(root))


VOC = {"000005": [("chair", 0), ("person", 1)], "000007": [("car", 0)]}
VOC_FOLDER = "VOCdevkit/VOC2007"
# {name: (writes the tree, reads it, the files to mutilate)}
TREES = {
    "voc": (
        lambda root: voc_tree(
            root,
            "2007",
            {"trainval": VOC, "test": {"000001": None}},
            class_files=[("test", {("000001", "dog"): 1})],
        ),
        read_voc,
        (
            f"{VOC_FOLDER}/Annotations/000005.xml",
            f"{VOC_FOLDER}/ImageSets/Main/trainval.txt",
            f"{VOC_FOLDER}/ImageSets/Main/dog_test.txt",
        ),
    ),
    "coco": (coco_tree, read_coco, ("annotations/instances_val2014.json",)),
    "nuswide": (
        lambda root: nuswide_tree(root, {"Train": [r"a\1.jpg", r"b\2.jpg"], "Test": [r"c\3.jpg"]}),
        read_nuswide,
        (
            "Concepts81.txt",
            "ImageList/TrainImagelist.txt",
            "Groundtruth/TrainTestLabels/Labels_concept07_Test.txt",
        ),
    ),
    "vg500": (
        lambda root: vg500_tree(
            root,
            {"train": ["VG_100K/1.jpg", "VG_100K/2.jpg"], "test": ["VG_100K/3.jpg"]},
            {"1.jpg": [0, 499], "2.jpg": [3], "3.jpg": [17]},
        ),
        read_vg500,
        ("train_list_500.txt", "vg_category_500_labels_index.json"),
    ),
}
FILES = [(name, file) for name, (_, _, files) in TREES.items() for file in files]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """{name: root} of the trees, whole between tests."""
    root = tmp_path_factory.mktemp("sets")
    return {name: write(root / name) for name, (write, _, _) in TREES.items()}


def attempt(root, file, content, reader):
    """Reads a tree with this content in one of its files; True if it was valid."""
    path = pathlib.Path(root, file)
    genuine = path.read_bytes()
    path.write_bytes(content)
    try:
        message = refusal(reader, root)
    finally:
        path.write_bytes(genuine)
    places = (str(root), path.name, "The tokenizer")
    assert message is None or any(place in message for place in places)
    return message is None


@pytest.mark.parametrize("name", TREES)
def test_genuine_trees_are_read(trees, name):
    TREES[name][1](trees[name])


@pytest.mark.parametrize(("name", "file"), FILES)
@given(seed=SEEDS)
@examples(60)
def test_changed_bytes(trees, name, file, seed):
    genuine = pathlib.Path(trees[name], file).read_bytes()
    attempt(trees[name], file, mutated(genuine, random.Random(seed)), TREES[name][1])


@pytest.mark.parametrize(("name", "file"), FILES)
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x80", b"\xff" * 99, b"a" * 999, b"a\0b\n", NESTED.encode()]
)
def test_foreign_content(trees, name, file, content):
    assert not attempt(trees[name], file, content, TREES[name][1])


def changed(value, chance):
    """A JSON value with a strange one somewhere in it."""
    if not value or not isinstance(value, (dict, list)) or chance.random() < 0.15:
        return strange_value(chance)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = chance.choice(list(value if isinstance(value, dict) else range(len(value))))
    if isinstance(value, dict) and chance.random() < 0.1:
        del value[key]
    else:
        value[key] = changed(value[key], chance)
    return value


@pytest.mark.parametrize(("name", "file"), [x for x in FILES if x[1].endswith(".json")])
@given(seed=SEEDS)
@examples(200)
def test_changed_values(trees, name, file, seed):
    content = json.loads(pathlib.Path(trees[name], file).read_bytes())
    content = json.dumps(changed(content, random.Random(seed)))
    attempt(trees[name], file, content.encode(), TREES[name][1])


@pytest.mark.parametrize("encoding", ["utf-32", "no-such", "base64", "idna"])
def test_annotations_in_strange_encodings(trees, encoding):
    file = f"{VOC_FOLDER}/Annotations/000005.xml"
    content = f'<?xml version="1.0" encoding="{encoding}"?><annotation/>'
    assert not attempt(trees["voc"], file, content.encode(), read_voc)


def read_bert(folder):
    transformer.sentence_pooling(str(folder))
    found, _, _ = transformer.embed(WORDS, folder=str(folder))
    assert found.shape[0] == len(WORDS)


@pytest.fixture
def sentence_folder(bert_folder):  # noqa: F811
    """A folder of a tiny BERT that also states its pooling."""
    stages = [{"type": f"x.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
    (bert_folder / "modules.json").write_text(json.dumps(stages))
    (bert_folder / "Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (bert_folder / "Pooling" / "config.json").write_text(json.dumps(pooling))
    return bert_folder


BERT_FILES = ("config.json", "vocab.txt", "model.safetensors", "modules.json")


@pytest.mark.parametrize("file", [*BERT_FILES, "Pooling/config.json"])
@given(seed=SEEDS)
@examples(40)
def test_changed_bytes_of_a_bert(sentence_folder, file, seed):
    genuine = pathlib.Path(sentence_folder, file).read_bytes()
    attempt(sentence_folder, file, mutated(genuine, random.Random(seed)), read_bert)


@pytest.mark.parametrize("file", ["config.json", "modules.json", "Pooling/config.json"])
@given(seed=SEEDS)
@examples(60)
def test_changed_values_of_a_bert(sentence_folder, file, seed):
    content = json.loads(pathlib.Path(sentence_folder, file).read_bytes())
    content = json.dumps(changed(content, random.Random(seed)))
    attempt(sentence_folder, file, content.encode(), read_bert)


@pytest.mark.parametrize("file", ["config.json", "modules.json", "Pooling/config.json"])
def test_nesting_beyond_pythons_limit(sentence_folder, file):
    assert not attempt(sentence_folder, file, NESTED.encode(), read_bert)
