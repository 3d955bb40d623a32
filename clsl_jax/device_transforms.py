"""The augmentations of `data.transforms.Augment` inside a compiled step, on the accelerator.

Every operation acts on one image and is mapped over the batch, so a batch that is split over a
mesh needs no communication. All images go through the same work, whatever was drawn for them: an
operation of RandAugment is one row of sampling positions, one look-up table and one blend, and
those it does not use are the identity, exactly.

The results are those of Pillow and OpenCV on the host, given equal draws; where those interpolate
or blend in floating point they may differ by a grey level.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from clsl_jax.data import transforms

OPERATIONS = transforms.RANDAUGMENT_OPERATIONS
# Sampling positions are whole numbers of 1/65536 pixel: the same on every backend.
_ONE_PIXEL = 1 << 16
# Functions of one channel's level alone.
_POINTWISE = ("brightness", "posterize", "solarize")


class Draws(NamedTuple):
    """What chance decides about images; the fields have a leading [B] for a batch of them.

    Attributes:
      shift: [2] float32 in [-1, 1): along x and y, in units of the largest shift.
      power: [] float32 in [-1, 1): the size is multiplied by `(1 + scale) ** -power`.
      mirrored: [] bool.
      operations: [N] int32, places in `OPERATIONS`.
      positive: [N] bool, the directions of the operations.
      factors: [3] float32 in [1 - color_jitter, 1 + color_jitter): of brightness, contrast and
        saturation.
      corner: [2] int32, row and column of the square's first pixel.
      colour: [3] uint8, of the square.
    """

    shift: jax.Array
    power: jax.Array
    mirrored: jax.Array
    operations: jax.Array
    positive: jax.Array
    factors: jax.Array
    corner: jax.Array
    colour: jax.Array


def augment_images(key: jax.Array, images: jax.Array, augment: transforms.Augment) -> jax.Array:
    """Changes every image at random; equal keys give equal images on any mesh.

    Args:
      key: typed PRNG key, []. Image i's draws depend on the key and i alone.
      images: uint8 [B, S, S, 3], the global batch (within `shard_map` it would be a part of it,
        and the parts' draws would be the same).
      augment: which changes, static.

    Returns:
      uint8 [B, S, S, 3], sharded as `images`.

    Raises:
      ValueError: the images have another type or shape.
    """
    squares = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != jnp.uint8 or not squares:
        raise ValueError(
            f"expected images uint8 [B, S, S, 3], found {images.dtype} {list(images.shape)}"
        )
    if augment.is_identity:
        return images
    batch, side = images.shape[:2]

    def change(place: jax.Array, image: jax.Array) -> jax.Array:
        return apply(image, draw(jax.random.fold_in(key, place), side, augment), augment)

    return jax.vmap(change)(jnp.arange(batch, dtype=jnp.uint32), images)


def draw(key: jax.Array, side: int, augment: transforms.Augment) -> Draws:
    """Draws all that one image of `side` pixels needs, from the distributions of `Augment`."""
    count, strength = augment.randaugment_operations, augment.color_jitter
    # One call: every one of JAX's random functions adds a hash to what XLA has to compile.
    sizes = (2, 1, 1, count, count, 3, 2, 3)
    uniform = jax.random.uniform(key, (sum(sizes),))
    shift, power, mirrored, operations, positive, factors, corner, colour = jnp.split(
        uniform, np.cumsum(sizes)[:-1]
    )
    corners = side - cutout_length(side, augment.cutout) + 1
    return Draws(
        shift=2 * shift - 1,
        power=2 * power[0] - 1,
        mirrored=mirrored[0] < 0.5,
        operations=(operations * len(OPERATIONS)).astype(jnp.int32),
        positive=positive >= 0.5,
        factors=1 - strength + 2 * strength * factors,
        corner=(corner * corners).astype(jnp.int32),
        colour=(colour * 256).astype(jnp.uint8),
    )


def apply(image: jax.Array, draws: Draws, augment: transforms.Augment) -> jax.Array:
    """Changes uint8 [S, S, 3] as drawn, in the order of `Augment`; of the same shape and type."""
    side = image.shape[0]
    if augment.translate or augment.scale:
        image = shift_and_scale(image, draws.shift, draws.power, augment.translate, augment.scale)
    if augment.flip:
        image = jnp.where(draws.mirrored, image[:, ::-1], image)
    if augment.randaugment_operations:
        # A loop, whose carry is held in memory: in a row, XLA would fuse one operation into the
        # next and compute its pixels anew for each of the next one's many reads.
        image, _ = lax.scan(
            lambda image, drawn: (
                apply_operation(image, *drawn, augment.randaugment_magnitude),
                None,
            ),
            image,
            (draws.operations, draws.positive),
        )
    if augment.color_jitter:
        image = jitter(image, draws.factors)
    if augment.cutout:
        image = cutout(image, draws.corner, draws.colour, cutout_length(side, augment.cutout))
    return image


def shift_and_scale(
    image: jax.Array, shift: jax.Array, power: jax.Array, translate: float, scale: float
) -> jax.Array:
    """Resizes a window of the padded image, as two products with matrices of weights.

    Args:
      image: uint8 [S, S, 3].
      shift: float32 [2] in [-1, 1], along x and y.
      power: float32 [] in [-1, 1]; the window's side is `(1 + scale) ** power` of the image's.
      translate: largest shift as a share of the side.
      scale: of the power.

    Returns:
      uint8 [S, S, 3].
    """
    side = image.shape[0]
    zoom = (1.0 + scale) ** power
    low = side * ((1.0 - zoom) / 2 + translate * shift)  # of the window, along x and y
    high = low + zoom * side
    # The canvas that is resized on the host has the same margin on all sides, filled.
    margin = jnp.ceil(jnp.maximum(0.0, jnp.maximum((-low).max(), (high - side).max())))
    widest = math.ceil(side * (scale / 2 + translate)) + 1
    # Zero for the fill colour, so that only the image's own pixels need weights.
    fill = jnp.array(transforms.FILL, jnp.float32)
    pixels = image.astype(jnp.float32)
    for axis, start in ((1, low[0]), (0, low[1])):
        weights = _triangle_weights(side, start, zoom, margin, widest)
        moved = jnp.tensordot(
            weights, pixels - fill, axes=((1,), (axis,)), precision=lax.Precision.HIGHEST
        )
        # Pillow rounds after each direction.
        pixels = _nearest_level(jnp.moveaxis(moved, 0, axis) + fill)
    return pixels.astype(jnp.uint8)


def _triangle_weights(
    side: int, start: jax.Array, zoom: jax.Array, margin: jax.Array, widest: int
) -> jax.Array:
    """Pillow's bilinear weights [S, S] of an axis, from the image's pixels to the window's.

    What a row lacks to 1 belongs to the margin; what lies beyond the margin has no weight.
    """
    centres = start + (jnp.arange(side) + 0.5) * zoom
    places = jnp.arange(-widest, side + widest) + 0.5
    # Shrinking averages over the pixels that fall together.
    distance = jnp.abs(places - centres[:, None]) / jnp.maximum(zoom, 1.0)
    on_canvas = (places > -margin) & (places < side + margin)
    weights = jnp.where(on_canvas, jnp.maximum(0.0, 1.0 - distance), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True))[:, widest : widest + side]


def apply_operation(
    image: jax.Array, operation: jax.Array, positive: jax.Array, magnitude: int
) -> jax.Array:
    """Applies one operation of RandAugment: `transforms.apply_operation` says what they do.

    Args:
      image: uint8 [S, S, 3].
      operation: int32 [], a place in `OPERATIONS`.
      positive: bool [], the direction of those operations that have one.
      magnitude: 0 to 30, static.

    Returns:
      uint8 [S, S, 3].
    """
    tables = _tables(magnitude, image.shape[0])
    direction = positive.astype(jnp.int32)
    levels = image.astype(jnp.int32)

    def chosen(*names: str) -> jax.Array:
        return functools.reduce(jnp.logical_or, (operation == OPERATIONS.index(n) for n in names))

    grey = luminance(levels)
    counts = histogram(image)
    lookup = jnp.broadcast_to(jnp.asarray(tables.lookup)[direction, operation], (3, 256))
    contrast = jnp.asarray(tables.contrast)[direction, _mean(grey)]
    lookup = jnp.where(chosen("contrast"), contrast, lookup)
    lookup = jnp.where(chosen("autocontrast"), autocontrast_lookup(counts), lookup)
    lookup = jnp.where(chosen("equalize"), equalize_lookup(counts), lookup)

    moved = sample(image, jnp.asarray(tables.positions)[direction, operation])
    changed = _look_up(lookup, moved)
    degenerate = jnp.where(chosen("sharpness"), smooth(levels), grey[..., None])
    blended = blend(degenerate, levels, jnp.asarray(tables.factors)[direction])
    return jnp.where(chosen("color", "sharpness"), blended, changed).astype(jnp.uint8)


class _Tables(NamedTuple):
    """What the operations of a magnitude need; the first axis is the direction, - and +.

    Attributes:
      positions: int32 [2, 14, 4, S], see `sample`; of operations that move nothing the identity.
      lookup: uint8 [2, 14, 256], of operations that are no look-up the identity.
      contrast: uint8 [2, 256, 256], new levels by the image's mean and the old level.
      factors: float32 [2], of the blends.
    """

    positions: np.ndarray
    lookup: np.ndarray
    contrast: np.ndarray
    factors: np.ndarray


@functools.lru_cache(maxsize=8)
def _tables(magnitude: int, side: int) -> _Tables:
    levels = np.arange(256, dtype=np.uint8)
    ramp = Image.fromarray(np.repeat(levels, 3).reshape(1, 256, 3))
    by_mean = Image.fromarray(np.repeat(levels, 256).reshape(256, 256))
    by_level = by_mean.transpose(Image.Transpose.TRANSPOSE)
    positions, lookup, contrast, factors = [], [], [], []
    for sign in (-1.0, 1.0):
        level = magnitude / transforms.MAX_MAGNITUDE * sign
        factors.append(transforms.enhancement_factor(level))
        contrast.append(np.asarray(Image.blend(by_mean, by_level, factors[-1])))
        for name in OPERATIONS:
            matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
            if name in transforms.AFFINE:
                matrix = transforms.affine_matrix(name, level, (side, side))
            positions.append(sampling_positions(matrix, side))
            new = ramp
            if name in _POINTWISE:
                new = transforms.apply_operation(ramp, name, magnitude, sign)
            lookup.append(np.asarray(new)[0, :, 0])
    return _Tables(
        np.reshape(positions, (2, len(OPERATIONS), 4, side)),
        np.reshape(lookup, (2, len(OPERATIONS), 256)),
        np.stack(contrast),
        np.array(factors, np.float32),
    )


def sampling_positions(matrix: tuple[float, ...], side: int) -> np.ndarray:
    """Positions int32 [4, S], for `sample`, of an affine change about the image's centre.

    The matrix, 2 x 3, maps output pixel centres to the input. The rows say what the column and the
    row of an output pixel add to the input's x, then what they add to its y.
    """
    a, b, c, d, e, f = matrix
    centre = (side - 1) / 2
    grid = np.arange(side) - centre
    rows = (a * grid + centre + c, b * grid, d * grid + centre + f, e * grid)
    return np.rint(np.multiply(rows, _ONE_PIXEL)).astype(np.int32)


def sample(image: jax.Array, positions: jax.Array) -> jax.Array:
    """Interpolates linearly between four pixels, at positions that a column and a row add up to.

    Args:
      image: uint8 [S, S, 3].
      positions: int32 [4, S] in 1/65536 pixel: x by column, x by row, y by column, y by row.

    Returns:
      int32 [S, S, 3] in [0, 255]; pixels outside the image count as `transforms.FILL`.
    """
    side = image.shape[0]
    x = positions[0][None, :] + positions[1][:, None]
    y = positions[2][None, :] + positions[3][:, None]
    left, top = x >> 16, y >> 16
    pixels = image.reshape(-1, 3)
    fill = jnp.array(transforms.FILL, jnp.uint8)

    def fetch(row: jax.Array, column: jax.Array) -> jax.Array:
        inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        place = jnp.where(inside, row * side + column, 0)
        colours = pixels.at[place].get(mode="promise_in_bounds")
        return jnp.where(inside[..., None], colours, fill).astype(jnp.float32)

    def between(first: jax.Array, second: jax.Array, position: jax.Array) -> jax.Array:
        share = (position & (_ONE_PIXEL - 1)).astype(jnp.float32)[..., None] / _ONE_PIXEL
        return first + share * (second - first)

    above = between(fetch(top, left), fetch(top, left + 1), x)
    below = between(fetch(top + 1, left), fetch(top + 1, left + 1), x)
    return jnp.round(between(above, below, y)).astype(jnp.int32)


def luminance(levels: jax.Array) -> jax.Array:
    """Grey levels int32 [S, S] of int32 [S, S, 3], rounded as Pillow does (ITU-R 601)."""
    red, green, blue = (levels[..., channel] for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _mean(grey: jax.Array) -> jax.Array:
    """The mean [] of int32 [S, S], rounded half up."""
    # In wholes and remainders by row, since a sum of all levels overflows 32 bits.
    height, width = grey.shape
    rows = grey.astype(jnp.uint32).sum(axis=1, dtype=jnp.uint32)
    wholes, rest = jnp.sum(rows // width), jnp.sum(rows % width)
    rest = 2 * (width * (wholes % height) + rest) + grey.size
    return (wholes // height + rest // (2 * grey.size)).astype(jnp.int32)


def histogram(image: jax.Array) -> jax.Array:
    """Counts int32 [3, 256] of the levels of each channel of uint8 [S, S, 3]."""
    # A TPU scatters one element after another; comparing with every level is quicker there.
    return lax.platform_dependent(
        image.reshape(-1, 3), tpu=_histogram_by_comparison, default=_histogram_by_scatter
    )


def _histogram_by_comparison(levels: jax.Array) -> jax.Array:
    every = jnp.arange(256, dtype=jnp.uint8)
    return (levels.T[:, None, :] == every[:, None]).sum(axis=2, dtype=jnp.int32)


def _histogram_by_scatter(levels: jax.Array) -> jax.Array:
    places = levels.astype(jnp.int32) + 256 * jnp.arange(3)
    counts = jnp.zeros(3 * 256, jnp.int32)
    return counts.at[places.reshape(-1)].add(1, mode="promise_in_bounds").reshape(3, 256)


def autocontrast_lookup(counts: jax.Array) -> jax.Array:
    """New levels uint8 [3, 256] that stretch each channel to 0..255, from counts [3, 256].

    Exact division: Pillow's floating point falls one short of some whole quotients.
    """
    levels = jnp.arange(256)
    lowest = jnp.argmax(counts > 0, axis=1, keepdims=True)
    highest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    span = highest - lowest
    stretched = jnp.clip(
        lax.div((levels - lowest) * 255, jnp.maximum(span, 1) + 0 * levels), 0, 255
    )
    return jnp.where(span > 0, stretched, levels).astype(jnp.uint8)


def equalize_lookup(counts: jax.Array) -> jax.Array:
    """New levels uint8 [3, 256] that spread each channel evenly, from counts [3, 256]."""
    levels = jnp.arange(256)
    highest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    cumulative = jnp.cumsum(counts, axis=1)
    step = (cumulative[:, -1:] - jnp.take_along_axis(counts, highest, axis=1)) // 255
    new = jnp.minimum((step // 2 + cumulative - counts) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, new, levels).astype(jnp.uint8)


def _look_up(lookup: jax.Array, levels: jax.Array) -> jax.Array:
    """int32 [S, S, 3] -> int32 [S, S, 3] by uint8 [3, 256]."""
    # Fused into the gather, a table would be computed anew for every pixel; a product is not fused.
    # Levels are exact in any of the products' precisions.
    table = (lookup.astype(jnp.float32) @ jnp.eye(256)).astype(jnp.uint8).reshape(-1)
    places = levels + 256 * jnp.arange(3)
    return table.at[places].get(mode="promise_in_bounds").astype(jnp.int32)


def smooth(levels: jax.Array) -> jax.Array:
    """Pillow's SMOOTH, int32 [S, S, 3] -> int32 [S, S, 3]: ones around a 5; the border stays."""
    side = levels.shape[0]
    padded = jnp.pad(levels, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * levels
    inner = (jnp.arange(side) > 0) & (jnp.arange(side) < side - 1)
    return jnp.where((inner[:, None] & inner)[..., None], (2 * total + 13) // 26, levels)


def blend(first: jax.Array, second: jax.Array, factor: jax.Array) -> jax.Array:
    """`first + factor * (second - first)` of int32 levels, cut to 0..255 and down to int32."""
    mixed = first + factor * (second - first).astype(jnp.float32)
    return jnp.clip(mixed, 0, 255).astype(jnp.int32)


def jitter(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Brightness, then contrast about the mean luminance, then saturation, as one colour matrix.

    Args:
      image: uint8 [S, S, 3].
      factors: float32 [3], of brightness, contrast and saturation.

    Returns:
      uint8 [S, S, 3].
    """
    side = image.shape[0]
    mean = image.astype(jnp.int32)
    for _ in range(2):
        # Pillow's box filter: weights of 22 bits, rounded after each direction.
        mean = (mean.sum(axis=-2) * round((1 << 22) / side) + (1 << 21)) >> 22
    brightness, contrast, saturation = factors
    weights = jnp.array(transforms.LUMINANCE, jnp.float32)
    gain = brightness * contrast
    offset = brightness * (1 - contrast) * (weights * mean).sum()
    matrix = gain * ((1 - saturation) * weights + saturation * jnp.eye(3))
    pixels = image.astype(jnp.float32)
    mixed = offset + sum(pixels[..., old, None] * matrix[:, old] for old in range(3))
    return _nearest_level(mixed).astype(jnp.uint8)


def _nearest_level(values: jax.Array) -> jax.Array:
    """Rounds half up and cuts to 0..255; stays float32."""
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)


def cutout_length(side: int, share: float) -> int:
    """Side in pixels of the square that covers `share` of the image's side."""
    return round(share * side)


def cutout(image: jax.Array, corner: jax.Array, colour: jax.Array, length: int) -> jax.Array:
    """Paints a square of `length` pixels from `corner`, int32 [2], on in `colour`, uint8 [3]."""
    grid = jnp.arange(image.shape[0])
    inside = (grid >= corner[:, None]) & (grid < corner[:, None] + length)
    return jnp.where((inside[0][:, None] & inside[1])[..., None], colour, image)
