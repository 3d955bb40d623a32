"""Scenes: multi-label images of 64x64 pixels, composed from real garments and handwritten digits.

An image shows 2 to 6 of 20 classes (10 garments of Fashion-MNIST, 10 digits of the UCI set) on a
cluttered background. A theme makes some labels likely together; how likely is the scenes' strength.
The parts of the three splits are disjoint: a garment or digit of the test split is in no training
scene.

The pixels are a function of the seed alone, whatever the versions: random numbers are raw words of
PCG64, whose stream NumPy never changes, and the arithmetic is on integers. Pillow does not size the
parts because its versions 12 and 13 round differently.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clsl_jax.data import stored
from clsl_jax.data.images import encode_png
from clsl_jax.data.splits import SPLITS
from clsl_jax.errors import InputError

SIZE = 64
MIN_LABELS, MAX_LABELS = 2, 6
MIN_VISIBLE = 0.6
DEFAULT_SIZES = {"train": 2000, "validation": 500, "test": 1000}
# Whoever changes what a scene looks like raises this, and old caches are left alone.
VERSION = "1.0.0"

GARMENTS = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
CLASS_NAMES = (*GARMENTS, *(f"digit {digit}" for digit in range(10)))

THEMES = {
    "summer": ("t-shirt", "dress", "sandal", "digit 0", "digit 7"),
    "winter": ("pullover", "coat", "ankle boot", "digit 1", "digit 8"),
    "office": ("shirt", "trouser", "bag", "digit 2", "digit 5", "digit 9"),
    "sport": ("t-shirt", "trouser", "sneaker", "digit 3", "digit 4", "digit 6"),
    "evening": ("dress", "coat", "bag", "ankle boot", "digit 2", "digit 7"),
    "school": ("pullover", "shirt", "sneaker", "digit 1", "digit 3", "digit 9"),
}
# How much likelier than another label one of the theme's labels is to be drawn.
STRENGTHS = {"moderate": 8.0, "strong": 40.0}
# Probability of 2, 3, 4, 5 and 6 labels: 4.6 in the mean.
_LABEL_COUNTS = (0.06, 0.12, 0.22, 0.36, 0.24)

_MATERIAL = pathlib.Path(__file__).parent / "material" / "scene_parts.npz"
# Of the class names, by `clsl_jax.embed --encoder=sentence --unit_variance`.
LABEL_EMBEDDINGS = _MATERIAL.with_name("scenes_labels.npz")
_GARMENTS_TRAIN = 200
_DIGIT_BOUNDS = {"train": (0, 1200), "validation": (1200, 1450), "test": (1450, 1797)}
_CELL = 21
# Opacity, of 255, from which a pixel counts as covered by a part.
_SOLID = 64


@dataclasses.dataclass(frozen=True)
class Parts:
    """The material of one split.

    Attributes:
      garments: uint8 [10, n, 28, 28], bright on black.
      digits: ten arrays uint8 [n, 8, 8], 0 to 240, bright on black.
    """

    garments: np.ndarray
    digits: tuple[np.ndarray, ...]


class Draws:
    """Random numbers of one scene, from raw words so that no NumPy release can change them."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)."""
        return (self._bits.random_raw(count) >> 11) * 2.0**-53

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """int64 [count] in [low, high]."""
        return low + (self.uniform(count) * (high - low + 1)).astype(np.int64)

    def integer(self, low: int, high: int) -> int:
        return int(self.integers(low, high, 1)[0])

    def order(self, count: int) -> np.ndarray:
        return np.argsort(self.uniform(count), kind="stable")


@functools.lru_cache(maxsize=3)
def load_parts(split: str) -> Parts:
    """Reads the material of a split; no part is in two splits.

    Raises:
      ValueError: unknown split.
      InputError: the package was installed without its material.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes: split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if not _MATERIAL.exists():
        raise InputError(f"{_MATERIAL} is missing: reinstall the package with its data.")
    with np.load(_MATERIAL) as material:
        garments = material["garments_test" if split == "test" else "garments_train"]
        low, high = _DIGIT_BOUNDS[split]
        digits, digit_labels = material["digits"][low:high], material["digit_labels"][low:high]
    if split == "train":
        garments = garments[:, :_GARMENTS_TRAIN]
    elif split == "validation":
        garments = garments[:, _GARMENTS_TRAIN:]
    return Parts(garments, tuple(digits[digit_labels == digit] * 15 for digit in range(10)))


def draw_labels(draws: Draws, strength: str) -> np.ndarray:
    """Draws 2 to 6 different class indices, those of one theme likelier than others."""
    theme = list(THEMES.values())[draws.integer(0, len(THEMES) - 1)]
    count = MIN_LABELS + int(
        np.searchsorted(np.cumsum(_LABEL_COUNTS), draws.uniform(1)[0], side="right")
    )
    weights = [STRENGTHS[strength] if name in theme else 1.0 for name in CLASS_NAMES]
    chosen = []
    for point in draws.uniform(min(count, MAX_LABELS)):
        cumulative = np.cumsum(weights)
        index = int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
        chosen.append(index)
        weights[index] = 0.0
    return np.array(chosen)


def _colour(hue: float, saturation: float, value: int) -> np.ndarray:
    """int32 [3] RGB of a hue and saturation in [0, 1) and a value in 0..255."""
    offsets = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(offsets, 0, 1)))).astype(np.int32)


def _background(draws: Draws) -> np.ndarray:
    """int32 [64, 64, 3]: a colour gradient, block noise at two scales, stray bars and grain."""
    hue, spread, saturation, direction = draws.uniform(4)
    values = draws.integers(35, 135, 2)
    first = _colour(hue, 0.2 + 0.6 * saturation, int(values[0]))
    second = _colour((hue + 0.4 * spread) % 1.0, 0.2 + 0.6 * saturation, int(values[1]))
    ramp = np.arange(SIZE, dtype=np.int32)
    across = int(direction * 64)
    position = (across * ramp[:, None] + (64 - across) * ramp[None, :])[:, :, None] // 64
    image = first + (second - first) * position // (SIZE - 1)

    for blocks, amplitude in ((8, 22), (16, 14)):
        noise = draws.integers(-amplitude, amplitude, blocks * blocks * 3).reshape(
            blocks, blocks, 3
        )
        side = SIZE // blocks
        image = image + noise.repeat(side, axis=0).repeat(side, axis=1).astype(np.int32)
    for _ in range(draws.integer(2, 6)):
        y, x, long, short, upright, value = draws.integers(0, 63, 6)
        height, width = 6 + long // 3, 2 + short // 12
        if upright % 2:
            height, width = width, height
        bar = _colour(draws.uniform(1)[0], 0.5, 40 + 2 * int(value))
        patch = image[y : y + height, x : x + width]
        patch += (bar - patch) // 2
    return image + draws.integers(-6, 6, SIZE * SIZE).reshape(SIZE, SIZE, 1).astype(np.int32)


@functools.cache
def _resampling(source: int, target: int) -> np.ndarray:
    """int32 [target, source]: rows of a triangle filter, wide enough to smooth, that sum to 256."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    distances = np.abs(centres[:, None] - np.arange(source)[None, :]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distances)
    rounded = np.floor(256 * weights / weights.sum(axis=1, keepdims=True) + 0.5).astype(np.int32)
    rounded[np.arange(target), rounded.argmax(axis=1)] += 256 - rounded.sum(axis=1)
    return rounded


def _resized(part: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w] to int32 [height, width]."""
    rows, columns = _resampling(part.shape[0], height), _resampling(part.shape[1], width)
    return (rows @ part.astype(np.int32) @ columns.T + 32768) >> 16


def _garment(draws: Draws, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tinted garment: (colour int32 [h, w, 3], alpha int32 [h, w] in 0..255)."""
    pick, mirror, hue, saturation = draws.uniform(4)
    part = parts[int(pick * len(parts))]
    if mirror < 0.5:
        part = part[:, ::-1]
    height, width = draws.integers(20, 27, 2)
    width = int(np.clip(width, height - 4, height + 4))
    shade = _resized(part, int(height), width)
    tint = _colour(hue, 0.75 * saturation, draws.integer(190, 255))
    colour = tint * (70 + shade[:, :, None] * 185 // 255) // 255
    return colour, np.minimum(shade * 4, 255)


def _digit(draws: Draws, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A digit in one ink: (colour int32 [h, w, 3], alpha int32 [h, w] in 0..255)."""
    pick, hue, saturation = draws.uniform(3)
    part = parts[int(pick * len(parts))]
    height, width = draws.integers(14, 19, 2)
    width = int(np.clip(width, height - 3, height + 2))
    shade = _resized(part, int(height), width)
    ink = _colour(hue, 0.6 * saturation, draws.integer(205, 255))
    alpha = np.minimum(shade * 3 // 2, 255)
    return np.broadcast_to(ink, (*shade.shape, 3)), alpha


def _placed(draws: Draws, cell: int, height: int, width: int, jitter: int) -> tuple[int, int]:
    """The top left corner of a part in a jittered cell of the 3x3 grid, wholly inside the image."""
    shift = draws.integers(-jitter, jitter, 2)
    y = cell // 3 * _CELL + (_CELL - height) // 2 + int(shift[0])
    x = cell % 3 * _CELL + (_CELL - width) // 2 + int(shift[1])
    return min(max(y, 0), SIZE - height), min(max(x, 0), SIZE - width)


def compose_scene(
    parts: Parts, *, seed: int, split: str, index: int, strength: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Composes one scene.

    Args:
      parts: the material, `load_parts(split)`.
      seed: of the whole data set, >= 0.
      split: 'train', 'validation' or 'test'.
      index: which scene of the split; a scene does not depend on how many there are.
      strength: 'moderate' or 'strong'.

    Returns:
      (image uint8 [64, 64, 3], labels int8 [20] in {0, 1}, visible float64 [20]: the fraction of
      the class's pixels that nothing covers, 0 where it is absent, else at least 0.6).
    """
    draws = Draws(seed, SPLITS.index(split), list(STRENGTHS).index(strength), index)
    classes = draw_labels(draws, strength)
    cells = draws.order(9)[: len(classes)]
    image = _background(draws)
    owner = np.full((SIZE, SIZE), -1, np.int8)
    areas = np.zeros(len(CLASS_NAMES))
    for cell, label in zip(cells, classes, strict=True):
        if label < len(GARMENTS):
            colour, alpha = _garment(draws, parts.garments[label])
        else:
            colour, alpha = _digit(draws, parts.digits[label - len(GARMENTS)])
        height, width = alpha.shape
        solid = alpha >= _SOLID
        # A place that would hide too much of an earlier part is drawn again, nearer its own cell.
        for jitter in (6, 4, 2, 0):
            y, x = _placed(draws, int(cell), height, width, jitter)
            covered = owner[y : y + height, x : x + width]
            hidden = np.bincount(covered[solid] + 1, minlength=len(CLASS_NAMES) + 1)[1:]
            left = np.bincount(owner.ravel() + 1, minlength=len(CLASS_NAMES) + 1)[1:] - hidden
            if np.all(left >= MIN_VISIBLE * areas):
                break
        else:
            solid = solid & (covered < 0)
            alpha = np.where(covered < 0, alpha, 0)
        areas[label] = max(np.count_nonzero(alpha >= _SOLID), 1)
        covered[solid] = label
        patch = image[y : y + height, x : x + width]
        patch += (colour - patch) * alpha[:, :, None] // 255
    left = np.bincount(owner.ravel() + 1, minlength=len(CLASS_NAMES) + 1)[1:]
    visible = np.divide(left, areas, out=np.zeros(len(CLASS_NAMES)), where=areas > 0)
    labels = np.zeros(len(CLASS_NAMES), np.int8)
    labels[classes] = 1
    return np.clip(image, 0, 255).astype(np.uint8), labels, visible


def scene_examples(
    split: str, count: int, *, seed: int, strength: str = "moderate"
) -> Iterator[stored.Example]:
    """Composes the first `count` scenes of a split; ids name split and index."""
    parts = load_parts(split)
    for index in range(count):
        image, labels, _ = compose_scene(
            parts, seed=seed, split=split, index=index, strength=strength
        )
        yield stored.Example(encode_png(image), labels, f"{split}-{index:06d}", image.tobytes())


def prepare_scenes(
    root: str | pathlib.Path,
    *,
    seed: int = 0,
    strength: str = "moderate",
    sizes: Mapping[str, int] | None = None,
) -> pathlib.Path:
    """Composes and stores the scenes under `root` unless they are there already.

    Args:
      root: cache directory.
      seed: >= 0.
      strength: of co-occurrence, 'moderate' or 'strong'.
      sizes: images of every split, by default `DEFAULT_SIZES`.

    Returns:
      The prepared directory. Its facts hold sizes, seed, strength and, for every split, the labels
      an image and the mutual information between labels in bits.

    Raises:
      InputError: an unknown strength or a seed or size out of range.
    """
    sizes = {**DEFAULT_SIZES, **(sizes or {})}
    if strength not in STRENGTHS:
        raise InputError(
            f"data.strength={strength!r} is unknown; choose one of {', '.join(STRENGTHS)}."
        )
    if seed < 0:
        raise InputError(f"data.seed={seed}: expected 0 or more.")
    if sorted(sizes) != sorted(SPLITS) or min(sizes.values()) < 1:
        raise InputError(f"scenes: expected at least 1 image for each of {SPLITS}, found {sizes}.")

    def facts(labels: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            "seed": seed,
            "strength": strength,
            "sizes": sizes,
            "labels_per_image": {k: float(v.sum(axis=1).mean()) for k, v in labels.items()},
            "mutual_information": {k: mutual_information(v) for k, v in labels.items()},
        }

    return stored.prepare(
        root,
        name="scenes",
        config="-".join([strength, f"seed{seed}", *(str(sizes[split]) for split in SPLITS)]),
        version=VERSION,
        class_names=CLASS_NAMES,
        splits={
            split: functools.partial(
                scene_examples, split, sizes[split], seed=seed, strength=strength
            )
            for split in SPLITS
        },
        facts=facts,
        description="Scenes of garments (Fashion-MNIST) and handwritten digits (UCI).",
        licence="Garments: Fashion-MNIST, MIT, Zalando SE 2017. Digits: CC BY 4.0, E. Alpaydin and "
        "C. Kaynak, UCI Machine Learning Repository.",
    )


def pairwise_mutual_information(labels: np.ndarray) -> np.ndarray:
    """Mutual information between every two labels over a label matrix.

    Args:
      labels: int [N, C] in {0, 1}, every label known.

    Returns:
      float64 [C, C] in bits, symmetric; the diagonal holds each label's entropy. The plug-in
      estimate: independent labels come out near 1 / (2 N ln 2), not at 0.
    """
    present = np.asarray(labels, np.float64)
    count = present.shape[0]
    marginals = np.stack([1 - present.mean(axis=0), present.mean(axis=0)])
    both = present.T @ present / count
    joints = {
        (1, 1): both,
        (1, 0): marginals[1][:, None] - both,
        (0, 1): marginals[1][None, :] - both,
    }
    joints[0, 0] = 1.0 - sum(joints.values())
    information = np.zeros_like(both)
    for (first, second), joint in joints.items():
        expected = marginals[first][:, None] * marginals[second][None, :]
        # A difference of equal counts leaves dust of 1e-17, whose logarithm means nothing.
        happens = joint > 0.5 / count
        ratio = np.divide(joint, expected, out=np.ones_like(joint), where=happens)
        information += np.where(happens, joint, 0.0) * np.log2(ratio)
    return np.maximum(information, 0.0)


def mutual_information(labels: np.ndarray) -> dict[str, float]:
    """Mean and total mutual information in bits over the C(C-1)/2 pairs of different labels."""
    pairs = pairwise_mutual_information(labels)[np.triu_indices(np.shape(labels)[1], k=1)]
    return {
        "mean_mutual_information_bits": float(pairs.mean()),
        "total_mutual_information_bits": float(pairs.sum()),
    }
