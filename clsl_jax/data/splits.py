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
    values = (1, 0) if (labels == -1).any() else (1,)
    is_held = _deal(labels, values, members, round(fraction * n), seed)[members]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _deal(
    labels: np.ndarray, values: tuple[int, ...], members: np.ndarray, target: int, seed: int
) -> np.ndarray:
    """Returns bool [G], True for the groups that are held out.

    Counts are made for one group or one label at a time: a table of them would be many times as
    large as `labels`.

    Args:
      labels: int [N, C].
      values: of the labels that are dealt out; class c with values[k] is label k * C + c.
      members: int [N]: group of each row, 0 to G - 1, none of them empty.
      target: rows to hold out.
      seed: of the order in which groups are dealt.
    """
    n, classes = labels.shape
    sizes = np.bincount(members)
    rows = np.argsort(members, kind="stable")  # those of a group follow one another
    ends = np.cumsum(sizes)
    # The number of rows is one more label, which every row has.
    left = np.concatenate([*((labels == value).sum(axis=0) for value in values), [n]]).astype(float)
    share = target / max(n, 1)
    lack = np.zeros(len(left))  # what is held so far lacks of its share of what was dealt
    room = np.array([n - target, target])
    count = np.zeros(len(left))
    by_value, kinds = count[:-1].reshape(len(values), classes), np.array(values)[:, None]
    held = np.zeros(len(sizes), bool)
    waiting = np.ones(len(sizes), bool)
    order = np.random.RandomState(seed).permutation(len(sizes))
    while len(order):
        rarest = int(np.where(left > 0, left, np.inf).argmin())
        has = np.ones(len(sizes), bool)
        if rarest < len(left) - 1:
            has[:] = False
            has[members[labels[:, rarest % classes] == values[rarest // classes]]] = True
        for group in order[has[order]]:
            size = int(sizes[group])
            count[:-1], count[-1] = 0, size
            for row in rows[ends[group] - size : ends[group]]:
                by_value += labels[row] == kinds
            # Of holding and keeping, what makes the squared lacks smaller; rare labels weigh more.
            gain = count * (2 * lack - (1 - 2 * share) * count) / np.maximum(left, 1)
            hold = size <= room[1] and (size > room[0] or gain.sum() > 0)
            held[group], waiting[group] = hold, False
            room[int(hold)] -= size
            lack += count * (share - 1 if hold else share)
            left -= count
        order = order[waiting[order]]
    return held
