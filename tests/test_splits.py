import tracemalloc

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


def _by_table(labels, fraction, seed, groups):
    """The rows held, computed from a table of how often each group has each label."""
    members = np.unique(groups, return_inverse=True)[1].reshape(len(labels))
    kinds = (1, 0) if (labels == -1).any() else (1,)
    marks = [labels == kind for kind in kinds] + [np.ones((len(labels), 1))]
    counts = np.zeros((len(set(members)), len(kinds) * labels.shape[1] + 1))
    np.add.at(counts, members, np.concatenate(marks, axis=1))
    target = round(fraction * len(labels))
    share = target / max(len(labels), 1)
    room = [len(labels) - target, target]
    left, lack = counts.sum(axis=0), np.zeros(counts.shape[1])
    waiting, held = np.ones(len(counts), bool), np.zeros(len(counts), bool)
    order = np.random.RandomState(seed).permutation(len(counts))
    while waiting.any():
        rarest = np.where(left > 0, left, np.inf).argmin()
        for group in order[waiting[order] & (counts[order, rarest] > 0)]:
            count = counts[group]
            gain = count * (2 * lack - (1 - 2 * share) * count) / np.maximum(left, 1)
            hold = count[-1] <= room[1] and (count[-1] > room[0] or gain.sum() > 0)
            held[group], waiting[group] = hold, False
            room[int(hold)] -= count[-1]
            lack += count * (share - 1 if hold else share)
            left -= count
    return np.flatnonzero(held[members])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 120),
    st.integers(0, 40),
    st.sampled_from([-1, 0]),
    st.floats(0, 0.95),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([np.int8, np.int64]),
)
def test_the_split_is_that_of_a_table_of_counts(
    rows, classes, lowest, fraction, seed, copies, dtype
):
    draws = np.random.RandomState(seed)
    rare = draws.random_sample(classes) ** 3
    labels = (draws.random_sample((rows, classes)) < rare).astype(dtype)
    labels[draws.random_sample(labels.shape) < 0.3] = lowest
    # None, all single in an order of their own, or three rows in each.
    groups = copies and draws.permutation(rows) // copies
    _, held = stratified_split(labels, fraction, seed, groups)
    expected = _by_table(labels, fraction, seed, np.arange(rows) if groups is None else groups)
    assert np.array_equal(held, expected)


@pytest.mark.parametrize("copies", [None, 1, 2])
def test_a_large_table_is_split_in_little_more_memory_than_its_own(copies):
    labels = np.random.RandomState(0).randint(-1, 2, (2000, 300)).astype(np.int8)
    groups = copies and np.arange(2000) // copies
    tracemalloc.start()
    try:
        stratified_split(labels, 0.1, 0, groups)
        assert tracemalloc.get_traced_memory()[1] < 2 * labels.nbytes
    finally:
        tracemalloc.stop()


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
