"""Known-label masks: which entries of the label matrix training may see.

A mask is bool [N, C], True where the label is known. An annotation matrix is int8 [N, C]: 1
positive, 0 negative, -1 unknown; it is all that training sees of the labels.
"""

import hashlib
import json
import os
from collections.abc import Callable

import numpy as np

from clsl_jax import atomic, npz
from clsl_jax.errors import InputError

UNKNOWN = -1
_CELLS_AT_ONCE = 1 << 22


def _all(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    del fraction, seed
    return np.ones(labels.shape, bool)


def _released(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    generator = np.random.RandomState(seed)

    def draw(some: np.ndarray) -> np.ndarray:
        words = generator.randint(0, 2**32, some.shape, np.uint32)
        return (words & 0xFFFFFF) / 2**24 < fraction

    return _in_blocks(draw, labels)


def _sst(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    generator = np.random.RandomState(seed)
    return _in_blocks(lambda some: generator.random_sample(some.shape) < fraction, labels)


def _uniform(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return _in_blocks(lambda some: generator.random(some.shape) < fraction, labels)


def _single_positive(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    del fraction
    generator = np.random.RandomState(seed)

    def draw(some: np.ndarray) -> np.ndarray:
        # The largest of C independent uniforms is at each positive with the same probability.
        draws = generator.random_sample(some.shape)
        positive = some == 1
        mask = np.zeros(some.shape, bool)
        rows = np.flatnonzero(positive.any(axis=1))
        mask[rows, np.where(positive, draws, -1.0).argmax(axis=1)[rows]] = True
        return mask

    return _in_blocks(draw, labels)


def _in_blocks(draw: Callable[[np.ndarray], np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Masks rows after rows: a large set's uniforms take eight times its labels' room."""
    mask = np.empty(labels.shape, bool)
    rows = max(1, _CELLS_AT_ONCE // max(labels.shape[1], 1))
    for start in range(0, len(labels), rows):
        mask[start : start + rows] = draw(labels[start : start + rows])
    return mask


_PROTOCOLS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "all": _all,
    "released": _released,
    "sst": _sst,
    "uniform": _uniform,
    "single_positive": _single_positive,
}
PROTOCOLS = tuple(_PROTOCOLS)
BY_FRACTION = ("released", "sst", "uniform")  # what `fraction` means something to


def known_mask(protocol: str, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws which labels of a training set are known.

    Args:
      protocol: one of
        'all': every label;
        'released': each entry with probability `fraction`, by the 24-bit uniforms of MT19937 that
          the CLSL authors' program draws, so that seed 0 gives its masks bit for bit for the same
          rows: of the whole training split (data.validation_fraction=0, as `:released` has it);
        'sst': the same by NumPy's 53-bit uniforms, as in SST, SARB and HST;
        'uniform': the same by NumPy's present default generator (PCG64);
        'single_positive': one positive, chosen at random, per image that has one, and nothing else
          (Cole et al., arXiv 2106.09708).
      labels: int [N, C]: 1 positive, 0 negative, -1 not known to anybody. Only 'single_positive'
        looks at the values beyond -1.
      fraction: expected fraction of known entries, in (0, 1]; only those of `BY_FRACTION` use it.
      seed: in [0, 2**32).

    Returns:
      bool [N, C]. Never True where `labels` is -1.

    Raises:
      InputError: for an unknown protocol, a fraction or seed out of range, or labels not [N, C].
    """
    labels = np.asarray(labels)
    if protocol not in _PROTOCOLS:
        raise InputError(
            f"labels.protocol: {protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}"
        )
    if protocol in BY_FRACTION and not 0.0 < fraction <= 1.0:
        raise InputError(f"labels.known_fraction: {fraction!r} is not in (0, 1]")
    if not 0 <= seed < 2**32:
        raise InputError(f"mask seed: {seed!r} is not in [0, 2**32)")
    if labels.ndim != 2:
        raise InputError(f"labels: expected shape [N, C], found {list(labels.shape)}")
    return _PROTOCOLS[protocol](labels, float(fraction), int(seed)) & (labels != UNKNOWN)


def annotate(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hides the labels that are not known.

    Args:
      labels: int [N, C] in {1, 0, -1}.
      mask: bool [N, C].

    Returns:
      int8 [N, C]: the label where `mask` is True, -1 elsewhere.
    """
    if np.shape(labels) != np.shape(mask):
        raise InputError(f"mask: shape {np.shape(mask)} differs from labels' {np.shape(labels)}")
    return np.where(mask, labels, np.int8(UNKNOWN)).astype(np.int8, copy=False)


def matrix_sha256(matrix: np.ndarray) -> str:
    """SHA-256 (hex) of a mask or of annotations, a byte a cell in C order, without the shape."""
    matrix = np.asarray(matrix)
    cells = matrix if matrix.itemsize == 1 else matrix.astype(np.uint8)
    return hashlib.sha256(np.ascontiguousarray(cells).view(np.uint8)).hexdigest()


def save_mask(path: str | os.PathLike, mask: np.ndarray, **facts: str | int | float) -> str:
    """Writes a mask, its SHA-256 and `facts` (protocol, fraction, seed, ...) to one .npz file.

    The file is written beside `path` and moved into place: a killed process leaves no half file.

    Returns:
      The SHA-256 of the mask.
    """
    sha256 = matrix_sha256(mask)
    header = {
        **facts,
        "shape": list(mask.shape),
        "known_entries": int(np.sum(mask)),
        "sha256": sha256,
    }
    with atomic.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(
            file, bits=np.packbits(np.asarray(mask, bool)), facts=json.dumps(header, sort_keys=True)
        )
    return sha256


def load_mask(path: str | os.PathLike) -> tuple[np.ndarray, dict]:
    """Reads what `save_mask` wrote.

    Returns:
      (mask bool [N, C], facts: those passed to `save_mask`, with shape, known_entries, sha256).

    Raises:
      InputError: no such file, or it is cut off, is something else, or does not match its own
        SHA-256.
    """
    stored = npz.read(os.fspath(path), ("bits", "facts"), made_by="a run (known_mask.npz)")
    try:
        facts = json.loads(str(stored["facts"]))
        n, c = facts["shape"]
        # Before room is made for them: `unpackbits` adds as many zeros as it is asked for.
        if min(n, c) < 0 or stored["bits"].shape != (-(-n * c // 8),):
            raise ValueError(f"{stored['bits'].size} bytes for a mask of shape {[n, c]}")
        mask = np.unpackbits(stored["bits"], count=n * c).astype(bool).reshape(n, c)
        sound = matrix_sha256(mask) == facts["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise InputError(
            f"{path}: its mask is not the one that was written there, by its SHA-256 or shape; "
            "copy the file again from where it was made."
        )
    return mask, facts
