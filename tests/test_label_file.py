"""Masks and tables of one's own: what they mean, in any order, and everything wrong at once."""

import csv
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsl_jax import label_tables, npz
from clsl_jax.data import partial
from clsl_jax.data.label_file import read_label_file

IDS = ["a.jpg", "sub/b.jpg", "c.jpg"]
CLASSES = ("cat", "dog", "tree")
LABELS = np.array([[1, 0, 0], [0, 1, -1], [1, 1, 0]], np.int8)
MASK = np.array([[True, False, True], [True, True, True], [False, False, False]])
SHOWN = [[1, -1, 0], [0, 1, -1], [-1, -1, -1]]


def _read(path, labels=LABELS):
    return read_label_file(str(path), ids=IDS, class_names=CLASSES, labels=labels)


def _table(tmp_path, text, name="own.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def _refused(path, *expected, labels=LABELS):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        _read(path, labels)
    for part in expected:
        assert part in str(error.value)
    return str(error.value)


def test_masks_show_labels_of_the_set(tmp_path):
    partial.save_mask(tmp_path / "known_mask.npz", MASK, protocol="uniform", seed=3)
    found = _read(tmp_path / "known_mask.npz")
    assert found.dtype == np.int8
    assert found.tolist() == SHOWN
    for dtype in (bool, np.uint8, np.int8, np.int64):
        np.save(tmp_path / "mask.npy", MASK.astype(dtype))
        assert _read(tmp_path / "mask.npy").tolist() == SHOWN
    np.save(tmp_path / "mask.npy", np.asfortranarray(MASK))
    assert _read(tmp_path / "mask.npy").tolist() == SHOWN


@pytest.mark.parametrize("name", ["mask.npz", "mask.npy"])
def test_a_mask_of_another_shape_is_refused(tmp_path, name):
    path = tmp_path / name
    mask = np.ones((4, 3), bool)
    partial.save_mask(path, mask) if name.endswith("z") else np.save(path, mask)
    _refused(path, "[4, 3]", "[3, 3]", "data.validation_fraction=0")


def test_mask_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "mask.npz"
    _refused(path, "there is no such file", "known_mask.npz")
    npz.write(str(path), {"mask": MASK})
    _refused(path, "lacks bits, facts")
    partial.save_mask(path, MASK)
    with np.load(path) as stored:
        facts = str(stored["facts"])
    npz.write(str(path), {"bits": np.packbits(~MASK), "facts": np.asarray(facts)})
    message = _refused(path, "SHA-256")
    assert "delete" not in message
    path.write_bytes(path.read_bytes()[:100])
    _refused(path, "cut off")

    path = tmp_path / "mask.npy"
    _refused(path, "cannot be read (No such file")
    np.save(path, LABELS)
    _refused(path, "1 entries are neither 0 nor 1; the first, at [1, 2], is -1", "into a table")
    np.save(path, MASK.astype(np.float32))
    _refused(path, "holds float32")
    np.save(path, np.array([[{"a": 1}]]), allow_pickle=True)
    _refused(path, "no .npy file of numbers")
    np.save(path, MASK)
    path.write_bytes(path.read_bytes()[:-4])
    _refused(path, "damaged")
    path.write_bytes(b"image,cat\n")
    _refused(path, "no .npy file")
    _refused(tmp_path / "mask.pkl", ".npz, .npy", ".csv, .tsv, .parquet")


def test_a_table_says_what_is_known(tmp_path):
    # Windows' backslash, an image of another split, a class less, one image not at all; and the
    # second row says the opposite of the set's own label.
    path = _table(tmp_path, "image,tree,cat\nsub\\b.jpg,1,\nelsewhere.jpg,0,0\na.jpg,,0\n")
    assert _read(path).tolist() == [[0, -1, -1], [-1, -1, 1], [-1, -1, -1]]
    path = _table(tmp_path, "photo\tdog\nc.jpg\t1.0\n", "first.tsv")
    assert _read(path).tolist() == [[-1] * 3, [-1] * 3, [-1, 1, -1]]
    path = tmp_path / "own.parquet"
    columns = {"cat": [1.0, None], "ID": ["c.jpg", "a.jpg"], "dog": [False, True]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert _read(path).tolist() == [[-1, 1, -1], [-1] * 3, [1, 0, -1]]


def test_the_recovered_table_of_a_run_can_be_read(tmp_path):
    path = tmp_path / "recovered.csv"
    label_tables.write_labels(
        str(path),
        np.array([*SHOWN, [1, 1, 1]], np.int8),
        ids=[*IDS, "t.jpg"],
        splits=["train"] * 3 + ["test"],
        class_names=CLASSES,
    )
    assert _read(path).tolist() == SHOWN


def test_columns_may_be_called_like_classes(tmp_path):
    path = _table(tmp_path, "key,image,split\nx,1,0\n")
    found = read_label_file(
        path, ids=["x"], class_names=("split", "image"), labels=np.zeros((1, 2), np.int8)
    )
    assert found.tolist() == [[0, 1]]


def test_everything_wrong_is_reported_at_once(tmp_path):
    text = "image,cat,Dog,weight\na.jpg,2,1,7\nsub/b.jpg,,,\na.jpg,1,,\n,0,,\nelse.jpg,yes,,\n"
    path = _table(tmp_path, text)
    assert _refused(path) == (
        f"{path}: 6 things cannot be used:\n"
        "  column 'Dog' is no class of the data set; near ones: 'dog'\n"
        "  column 'weight' is no class of the data set; and none is like it\n"
        "  row 2, column 'cat': '2'; expected 1, 0 or an empty cell\n"
        "  row 4, column 'image': 'a.jpg'; row 2 has the same image; expected one row each\n"
        "  row 5, column 'image': ''; expected the name of an image\n"
        "  row 6, column 'cat': 'yes'; expected 1, 0 or an empty cell"
    )


def test_a_wrong_column_does_not_fill_the_screen(tmp_path):
    rows = "".join(f"{number}.jpg,{number + 2}\n" for number in range(60))
    lines = _refused(_table(tmp_path, f"image,cat\n{rows}"), "60 things").splitlines()
    assert len(lines) == 52
    assert lines[-1] == "  … and 10 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "image,cat\nA.JPG,1\n",
            "such as 'A.JPG', is among the 3 of the training split, such as 'a.jpg'",
        ),
        ("image\na.jpg\n", "no column is a class; the first class is 'cat'"),
        ("cat,dog\n1,0\n", "has no column of images: its first one, 'cat', is a class"),
        ("image,cat\n", "no rows"),
        ("image,cat,cat\na.jpg,1,1\n", "two columns of the name 'cat'"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, expected):
    _refused(_table(tmp_path, text), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_annotations_survive_a_table_in_any_order(tmp_path_factory, data):
    count, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    cells = st.lists(st.sampled_from([1, 0, -1]), min_size=classes, max_size=classes)
    rows = st.lists(cells, min_size=count, max_size=count)
    own, labels = (np.array(data.draw(rows), np.int8) for _ in range(2))
    text = st.text("ab ,;\"'é/|?", min_size=1).map(str.strip).filter(bool)
    ids = data.draw(st.lists(text, min_size=count, max_size=count, unique=True))
    order = data.draw(st.permutations(range(count)))
    columns = data.draw(st.permutations(range(classes)))
    names = [f"class, {number}" for number in range(classes)]
    path = tmp_path_factory.mktemp("own") / "own.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(names[column] for column in columns)])
        for row in order:
            shown = {1: "1", 0: "0", -1: ""}
            writer.writerow([ids[row], *(shown[int(own[row, column])] for column in columns)])
    found = read_label_file(path, ids=ids, class_names=names, labels=labels)
    assert np.array_equal(found, own)
