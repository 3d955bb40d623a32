import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clsl_jax.data import partial
from clsl_jax.errors import InputError

PARITY = pathlib.Path(os.environ.get("CLSL_PARITY_DIR") or pathlib.Path(__file__).parent / "parity")

label_matrices = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.sampled_from([-1, 0, 1])
)
seeds = st.integers(0, 2**32 - 1)
fractions = st.floats(0.01, 1.0)


def _mask_cases():
    path = PARITY / "masks.json"
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize(
    "case", _mask_cases(), ids=lambda c: f"{c['shape_of']}-{c['protocol']}-{c['known_fraction']}"
)
def test_masks_match_the_fixtures(case):
    labels = np.zeros((case["images"], case["classes"]), np.int8)
    mask = partial.known_mask(case["protocol"], labels, case["known_fraction"], case["seed"])
    assert int(mask.sum()) == case["known_entries"]
    assert partial.matrix_sha256(mask) == case["sha256"]


def test_released_mask_is_torch_rand():
    torch = pytest.importorskip("torch")
    for seed in (0, 3, 12345):
        expected = (torch.rand(37, 11, generator=torch.Generator().manual_seed(seed)) < 0.3).numpy()
        labels = np.zeros((37, 11), np.int8)
        assert np.array_equal(partial.known_mask("released", labels, 0.3, seed), expected)


def test_sst_mask_is_random_sample():
    expected = np.random.RandomState(5).random_sample((9, 4)) < 0.4
    assert np.array_equal(partial.known_mask("sst", np.zeros((9, 4)), 0.4, 5), expected)


@pytest.mark.parametrize("protocol", partial.PROTOCOLS)
def test_masks_do_not_depend_on_how_many_rows_are_drawn_at_once(protocol, monkeypatch):
    labels = np.random.default_rng(0).integers(-1, 2, (50, 7)).astype(np.int8)
    whole = partial.known_mask(protocol, labels, 0.3, 5)
    monkeypatch.setattr(partial, "_CELLS_AT_ONCE", 25)  # three rows
    np.testing.assert_array_equal(partial.known_mask(protocol, labels, 0.3, 5), whole)


def test_matrix_sha256_is_that_of_the_bytes():
    mask = np.array([[True, False], [False, True]])
    assert partial.matrix_sha256(mask) == hashlib.sha256(b"\x01\x00\x00\x01").hexdigest()
    assert partial.matrix_sha256(np.asfortranarray(mask)) == partial.matrix_sha256(mask)


@given(label_matrices, st.sampled_from(partial.PROTOCOLS), fractions, seeds)
def test_any_mask_hides_what_nobody_knows_and_is_deterministic(labels, protocol, fraction, seed):
    mask = partial.known_mask(protocol, labels, fraction, seed)
    assert mask.dtype == bool
    assert mask.shape == labels.shape
    assert not mask[labels == -1].any()
    assert np.array_equal(mask, partial.known_mask(protocol, labels, fraction, seed))
    annotations = partial.annotate(labels, mask)
    assert annotations.dtype == np.int8
    assert np.array_equal(annotations[mask], labels[mask])
    assert (annotations[~mask] == -1).all()


@given(label_matrices, seeds)
def test_single_positive_knows_one_positive_per_image_that_has_one(labels, seed):
    mask = partial.known_mask("single_positive", labels, 0.5, seed)
    assert np.array_equal(mask.sum(axis=1), (labels == 1).any(axis=1).astype(int))
    assert (labels[mask] == 1).all()


def test_single_positive_chooses_evenly():
    labels = np.tile(np.array([1, 0, 1, 1], np.int8), (6000, 1))
    counts = partial.known_mask("single_positive", labels, 1.0, 0).sum(axis=0)
    assert counts[1] == 0
    # 2000 expected, standard deviation 36.5: five of them.
    assert np.abs(counts[[0, 2, 3]] - 2000).max() < 183


@given(label_matrices, st.sampled_from(["released", "sst", "uniform"]), seeds)
def test_more_known_labels_contain_fewer(labels, protocol, seed):
    few = partial.known_mask(protocol, labels, 0.2, seed)
    many = partial.known_mask(protocol, labels, 0.7, seed)
    assert not (few & ~many).any()


@pytest.mark.parametrize("protocol", ["released", "sst", "uniform"])
def test_fraction_is_met(protocol):
    labels = np.zeros((2000, 50), np.int8)
    mask = partial.known_mask(protocol, labels, 0.3, 1)
    # 100,000 draws: standard deviation 0.00145.
    assert abs(mask.mean() - 0.3) < 0.0073
    other = partial.known_mask(protocol, labels, 0.3, 2)
    assert (mask != other).any()


def test_all_knows_every_label_but_those_nobody_knows():
    labels = np.array([[1, -1], [0, 1]], np.int8)
    assert partial.known_mask("all", labels, 0.1, 0).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("protocol", ["all", "single_positive"])
def test_a_fraction_that_is_not_used_may_be_anything(protocol):
    labels = np.array([[1, 0], [0, 1]], np.int8)
    mask = partial.known_mask(protocol, labels, 0.0, 0)
    assert mask.tolist() == partial.known_mask(protocol, labels, 0.5, 0).tolist()


def test_annotate_by_hand():
    labels = np.array([[1, 0], [0, 1]], np.int8)
    mask = np.array([[True, False], [True, True]])
    assert partial.annotate(labels, mask).tolist() == [[1, -1], [0, 1]]


@pytest.mark.parametrize(
    ("protocol", "fraction", "seed", "shape", "named"),
    [
        ("half", 0.5, 0, (2, 2), "half"),
        ("sst", 0.0, 0, (2, 2), "0.0"),
        ("sst", 1.5, 0, (2, 2), "1.5"),
        ("sst", float("nan"), 0, (2, 2), "nan"),
        ("sst", 0.5, -1, (2, 2), "-1"),
        ("sst", 0.5, 0, (4,), "[4]"),
    ],
)
def test_what_cannot_be_used_is_named(protocol, fraction, seed, shape, named):
    with pytest.raises(ValueError) as error:
        partial.known_mask(protocol, np.zeros(shape, np.int8), fraction, seed)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_annotate_wants_equal_shapes():
    with pytest.raises(ValueError, match="differs"):
        partial.annotate(np.zeros((2, 3)), np.ones((3, 2), bool))


@settings(max_examples=20)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_saved_mask_comes_back(tmp_path_factory, mask):
    path = tmp_path_factory.mktemp("mask") / "mask.npz"
    sha256 = partial.save_mask(path, mask, protocol="sst", fraction=0.1, seed=0)
    loaded, facts = partial.load_mask(path)
    assert np.array_equal(loaded, mask)
    assert loaded.dtype == bool
    assert sha256 == partial.matrix_sha256(mask) == facts["sha256"]
    assert facts["protocol"] == "sst"
    assert facts["known_entries"] == int(mask.sum())
    assert [entry.name for entry in path.parent.iterdir()] == ["mask.npz"]


def test_damaged_mask_file_is_named(tmp_path):
    path = tmp_path / "mask.npz"
    partial.save_mask(path, np.ones((30, 30), bool), seed=0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"mask\.npz"):
        partial.load_mask(path)
    with pytest.raises(InputError, match=r"none\.npz: there is no such file"):
        partial.load_mask(tmp_path / "none.npz")
