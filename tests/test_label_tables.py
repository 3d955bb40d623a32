"""The tables that a run leaves: filled by thresholds, readable as tables of one's own."""

import csv

import numpy as np
import pytest

from clsl_jax import label_tables
from clsl_jax.data.label_file import read_label_file

IDS = ["a b.jpg", "c,d.jpg", 'e"f.jpg']
NAMES = ("cat", "traffic light")
LABELS = np.array([[1, -1], [0, 1], [-1, -1]], np.int8)
NAMED = {"ids": IDS, "splits": ["train", "train", "test"], "class_names": NAMES}


def test_thresholds_fill_the_unknown_cells_alone():
    annotations = np.array([[1, 0, -1, -1, -1, -1]], np.int8)
    probabilities = np.array([[0.0, 1.0, 0.9, 0.1, 0.5, np.nan]])
    filled = label_tables.fill_labels(annotations, probabilities, np.full(6, 0.9), np.full(6, 0.2))
    assert filled.tolist() == [[1, 0, 1, 0, -1, -1]]
    # Thresholds that overlap say both: nothing.
    both = label_tables.fill_labels(annotations, probabilities, 0.4, 0.6)
    assert both.tolist() == [[1, 0, 1, 0, -1, -1]]


def test_soft_labels_fill_with_the_likelier_of_the_two():
    """Thresholds of 0 take every cell, and say nothing of which label it has."""
    annotations = np.array([[0, -1, -1, -1, -1]], np.int8)
    probabilities = np.array([[0.9, 0.9, 0.1, 0.5, np.nan]])
    filled = label_tables.fill_labels(annotations, probabilities, 0.0, 0.0, soft=True)
    assert filled.tolist() == [[0, 1, 0, 1, -1]]


def test_labels_are_a_table_of_ones_own(tmp_path):
    path = tmp_path / "recovered.csv"
    label_tables.write_labels(str(path), LABELS, **NAMED)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["image", "split", *NAMES],
        ["a b.jpg", "train", "1", ""],
        ["c,d.jpg", "train", "0", "1"],
        ['e"f.jpg', "test", "", ""],
    ]
    read = read_label_file(str(path), ids=IDS, class_names=NAMES, labels=np.zeros((3, 2), np.int8))
    np.testing.assert_array_equal(read, LABELS)
    assert list(tmp_path.iterdir()) == [path]


def test_probabilities_have_four_digits_and_no_nan(tmp_path):
    path = tmp_path / "probabilities.csv"
    values = np.array([[0.123449, np.nan], [1, 0], [2e-5, 0.99996]], np.float32)
    label_tables.write_probabilities(str(path), values, **NAMED)
    with open(path, newline="") as file:
        rows = [row[2:] for row in csv.reader(file)][1:]
    assert rows == [["0.1234", ""], ["1", "0"], ["0", "1"]]


def test_a_place_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    """What to do about it depends on who writes."""
    with pytest.raises(FileNotFoundError, match=r"none/recovered\.csv"):
        label_tables.write_labels(str(tmp_path / "none" / "recovered.csv"), LABELS, **NAMED)
