"""Splits of our own where a data set brings none, stratified by label."""

import numpy as np

# What every data set has in the end.
SPLITS = ("train", "validation", "test")


def stratified_split(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a part of the rows that has every label about as often as the whole.

    As in iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011), rows of the rarest
    label are dealt out first, each to the part that lacks more of its labels, here of all of them.
    Where labels are unknown, known negatives are dealt out in the same way as positives, so that
    both parts can be scored.

    Args:
      labels: int [N, C]: 1 positive, 0 negative, -1 unknown; other values count as neither.
      fraction: part of the rows to hold out, 0 <= fraction < 1.
      seed: decides between rows that are alike.
      groups: [N]; rows of the same value stay together, as copies of one image must. By default
        every row is its own group.

    Returns:
      (kept, held): int64 row numbers, ascending; disjoint, and together all N. Without groups
      exactly round(fraction * N) are held; with groups at most that many.

    Raises:
      ValueError: a fraction out of range, or labels or groups of another shape.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"labels: expected shape [N, C], found {list(labels.shape)}")
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}: expected 0 <= it < 1")
    n = len(labels)
    if groups is None:
        members = np.arange(n)
    else:
        if np.shape(groups) != (n,):
            raise ValueError(f"groups: expected shape [{n}], found {list(np.shape(groups))}")
        members = np.unique(groups, return_inverse=True)[1].reshape(n)
    marks = (labels == 1).astype(np.int64)
    if (labels == -1).any():
        marks = np.concatenate([marks, (labels == 0).astype(np.int64)], axis=1)
    counts = np.zeros((int(members.max()) + 1 if n else 0, marks.shape[1]), np.int64)
    np.add.at(counts, members, marks)
    held = _deal(counts, np.bincount(members), round(fraction * n), seed)
    is_held = held[members] if n else np.zeros(0, bool)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _deal(counts: np.ndarray, sizes: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Returns bool [G], True for the groups that are held out.

    Args:
      counts: int [G, L]: how often each group has each label.
      sizes: int [G]: rows of each group.
      target: rows to hold out.
      seed: of the order in which groups are dealt.
    """
    # The number of rows is one more label, which every row has.
    counts = np.concatenate([counts, sizes[:, None]], axis=1).astype(np.float64)
    share = target / max(int(sizes.sum()), 1)
    left = counts.sum(axis=0)
    lack = np.zeros(counts.shape[1])  # what is held so far lacks of its share of what was dealt
    room = np.array([int(sizes.sum()) - target, target])
    held = np.zeros(len(counts), bool)
    waiting = np.ones(len(counts), bool)
    order = np.random.RandomState(seed).permutation(len(counts))
    while waiting.any():
        rarest = int(np.where(left > 0, left, np.inf).argmin())
        for group in order[waiting[order] & (counts[order, rarest] > 0)]:
            count, size = counts[group], int(sizes[group])
            # Of holding and keeping, what makes the squared lacks smaller; rare labels weigh more.
            gain = count * (2 * lack - (1 - 2 * share) * count) / np.maximum(left, 1)
            hold = size <= room[1] and (size > room[0] or gain.sum() > 0)
            held[group], waiting[group] = hold, False
            room[int(hold)] -= size
            lack += count * (share - 1 if hold else share)
            left -= count
    return held
