import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsl_jax.data.splits import stratified_split


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(1, 6),
    st.floats(0, 0.95),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_every_row_is_in_one_part(rows, classes, fraction, seed, grouped):
    draws = np.random.RandomState(seed)
    labels = draws.randint(-1, 3, (rows, classes)).astype(np.int8)
    groups = draws.randint(0, max(rows // 2, 1), rows) if grouped else None
    kept, held = stratified_split(labels, fraction, seed, groups)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(rows))
    assert np.array_equal(kept, np.sort(kept))
    assert np.array_equal(held, np.sort(held))
    target = round(fraction * rows)
    if grouped:
        assert len(held) <= target
        assert not set(groups[kept]) & set(groups[held])
    else:
        assert len(held) == target
    again = stratified_split(labels, fraction, seed, groups)
    assert np.array_equal(again[1], held)


def _rare(rows=1000):
    draws = np.random.RandomState(0)
    return (draws.random_sample((rows, 5)) < (0.5, 0.3, 0.1, 0.02, 0.01)).astype(np.int8)


def test_labels_are_shared_out_evenly():
    labels = _rare()
    _, held = stratified_split(labels, 0.2, 3)
    assert np.abs(labels[held].sum(axis=0) - 0.2 * labels.sum(axis=0)).max() <= 1
    rng = np.random.RandomState(1)
    by_chance = [
        np.abs(labels[rng.permutation(1000)[:200]].sum(axis=0) - 0.2 * labels.sum(axis=0)).max()
        for _ in range(20)
    ]
    assert np.mean(by_chance) > 4


def test_known_negatives_are_shared_out_where_labels_are_unknown():
    draws = np.random.RandomState(2)
    labels = np.full((600, 2), -1, np.int8)
    labels[:40, 0], labels[40:50, 0] = 1, 0  # ten negatives are known
    labels[draws.permutation(600)[:100], 1] = 1
    _, held = stratified_split(labels, 0.3, 0)
    assert abs((labels[held, 0] == 0).sum() - 3) <= 1
    assert abs((labels[held, 0] == 1).sum() - 12) <= 1
    assert abs((labels[held, 1] == 1).sum() - 30) <= 1


def test_seeds_differ_and_values_are_checked():
    labels = _rare(50)
    assert not np.array_equal(
        stratified_split(labels, 0.2, 0)[1], stratified_split(labels, 0.2, 1)[1]
    )
    assert len(stratified_split(labels, 0.0, 0)[1]) == 0
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="fraction"):
            stratified_split(labels, fraction, 0)
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        stratified_split(labels[0], 0.1, 0)
    with pytest.raises(ValueError, match="groups"):
        stratified_split(labels, 0.1, 0, np.zeros(3))
