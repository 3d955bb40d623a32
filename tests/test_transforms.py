import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from clsl_jax.data import transforms
from clsl_jax.data.transforms import Augment

EVERYTHING = Augment(
    flip=True,
    randaugment_operations=2,
    randaugment_magnitude=9,
    cutout=0.5,
    color_jitter=0.4,
    translate=0.1,
    scale=0.2,
)
images = hnp.arrays(np.uint8, st.tuples(st.integers(4, 24), st.integers(4, 24), st.just(3)))


def _image(side=32):
    return np.random.RandomState(0).randint(0, 256, (side, side, 3)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(images, st.integers(0, 2**32 - 1))
def test_shape_type_and_input_are_kept_and_equal_seeds_give_equal_images(image, seed):
    before = image.copy()
    first = EVERYTHING(image, np.random.default_rng(seed))
    second = EVERYTHING(image, np.random.default_rng(seed))
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert np.array_equal(image, before)


def test_nothing_chosen_changes_nothing():
    image = _image()
    result = Augment()(image, np.random.default_rng(0))
    assert np.array_equal(result, image)
    assert result is not image


def test_seeds_differ():
    image = _image()
    results = {EVERYTHING(image, np.random.default_rng(s)).tobytes() for s in range(10)}
    assert len(results) == 10


def test_flip_mirrors_half_of_the_images():
    image = _image()
    flipped = 0
    for seed in range(200):
        result = Augment(flip=True)(image, np.random.default_rng(seed))
        mirrored = np.array_equal(result, image[:, ::-1])
        assert mirrored or np.array_equal(result, image)
        flipped += mirrored
    assert 60 < flipped < 140


def test_cutout_paints_one_square_of_one_colour():
    image = np.zeros((20, 30, 3), np.uint8)
    places = set()
    for seed in range(30):
        result = Augment(cutout=0.5)(image, np.random.default_rng(seed))
        rows, columns = np.nonzero(result.any(axis=2))
        patch = result[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert patch.shape == (10, 10, 3)
        assert (patch == patch[0, 0]).all()
        places.add((rows.min(), columns.min()))
    assert len(places) > 15


def test_cutout_of_the_whole_side_covers_it():
    result = Augment(cutout=1.0)(_image(), np.random.default_rng(1))
    assert (result == result[0, 0]).all()


def test_shift_moves_a_point_by_at_most_its_share():
    image = np.full((41, 41, 3), transforms.FILL, np.uint8)
    image[20, 20] = 255
    found = []
    for seed in range(40):
        result = Augment(translate=0.2)(image, np.random.default_rng(seed)).astype(float)
        weight = np.abs(result - transforms.FILL).sum(axis=2)
        grid = np.arange(41)
        y, x = (weight.sum(1) @ grid, weight.sum(0) @ grid) / weight.sum()
        found.append((y - 20, x - 20))
    found = np.abs(found)
    assert found.max() < 0.2 * 41 + 0.6
    assert (found.max(axis=0) > 0.12 * 41).all()


def test_size_changes_within_its_range():
    image = np.full((60, 60, 3), transforms.FILL, np.uint8)
    image[20:40, 20:40] = 255
    sides = []
    for seed in range(40):
        result = Augment(scale=0.5)(image, np.random.default_rng(seed)).astype(float)
        bright = (result[..., 0] - transforms.FILL[0]) / (255 - transforms.FILL[0])
        sides.append(np.sqrt(bright.sum()))
    assert 20 / 1.5 - 0.5 < min(sides) < 16
    assert 25 < max(sides) < 30.5


def test_uncovered_pixels_get_the_fill_colour():
    image = np.zeros((40, 40, 3), np.uint8)
    result = Augment(translate=1.0)(image, np.random.default_rng(3))
    assert (result.reshape(-1, 3) == transforms.FILL).all(axis=1).any()


class _Fixed:
    """A generator whose uniform draws are given."""

    def __init__(self, *draws):
        self._draws = np.array(draws)

    def uniform(self, low, high, count):
        assert count == len(self._draws)
        return self._draws


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.0, 1.0, 1.0), [100, 150, 200]),
        ((0.5, 1.0, 1.0), [50, 75, 100]),
        # The luminance of a flat image is 0.299 * 100 + 0.587 * 150 + 0.114 * 200 = 140.75.
        ((1.0, 0.0, 1.0), [141, 141, 141]),
        ((1.0, 1.0, 0.0), [141, 141, 141]),
        # Contrast about the mean: 140.75 + 1.5 * (x - 140.75) of a flat image.
        ((1.0, 1.5, 1.0), [80, 155, 230]),
        # Saturation: 140.75 + 1.5 * (x - 140.75), the same for a flat image.
        ((1.0, 1.0, 1.5), [80, 155, 230]),
        ((2.0, 1.0, 1.0), [200, 255, 255]),
    ],
)
def test_colour_jitter_by_hand(factors, expected):
    image = np.tile(np.array([100, 150, 200], np.uint8), (6, 6, 1))
    result = Augment(color_jitter=1.0)(image, _Fixed(*factors))
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", transforms.RANDAUGMENT_OPERATIONS)
def test_operations_of_randaugment(name):
    image = Image.fromarray(_image())
    changed = transforms.apply_operation(image, name, 20, 1.0)
    assert changed.size == image.size
    assert changed.mode == "RGB"
    still = transforms.apply_operation(image, name, 0, 1.0)
    if name not in ("autocontrast", "equalize"):
        assert np.array_equal(np.asarray(still), np.asarray(image))
    if name not in ("identity", "autocontrast"):
        assert not np.array_equal(np.asarray(changed), np.asarray(image))


def test_operations_by_hand():
    image = Image.fromarray(np.array([[[0, 100, 200], [255, 255, 255]]], np.uint8))
    solarized = transforms.apply_operation(image, "solarize", 15, 1.0)  # from 128 on
    assert np.asarray(solarized).tolist() == [[[0, 100, 55], [0, 0, 0]]]
    posterized = transforms.apply_operation(image, "posterize", 30, 1.0)  # 4 bits
    assert np.asarray(posterized).tolist() == [[[0, 96, 192], [240, 240, 240]]]
    brighter = transforms.apply_operation(image, "brightness", 10, 1.0)  # x 1.3
    assert np.asarray(brighter).tolist() == [[[0, 130, 255], [255, 255, 255]]]
    darker = transforms.apply_operation(image, "brightness", 10, -1.0)  # x 0.7
    assert np.abs(np.asarray(darker).astype(int) - [[[0, 70, 140], [178, 178, 178]]]).max() <= 1


def test_rotation_turns_about_the_centre():
    image = np.zeros((41, 41, 3), np.uint8)
    image[5:8, 19:22] = 255
    turned = transforms.apply_operation(Image.fromarray(image), "rotate", 30, 1.0)
    pixels = np.asarray(turned).astype(float) - transforms.FILL
    bright = np.where(pixels.min(axis=2) > 60, 1.0, 0.0)
    y, x = np.nonzero(bright)
    # 14 pixels above the centre, turned by 30 degrees: 14 cos 30 = 12.1 up, 14 sin 30 = 7 aside.
    assert y.mean() - 20 == pytest.approx(-12.1, abs=0.6)
    assert abs(x.mean() - 20) == pytest.approx(7.0, abs=0.6)


AFFINE = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_operations_are_pillows_away_from_the_border(name, sign):
    small = Image.fromarray(_image(6))
    image = small.resize((60, 44), Image.Resampling.BICUBIC)
    found = np.asarray(transforms.apply_operation(image, name, 12, sign)).astype(int)
    a, b, c, d, e, f = transforms.affine_matrix(name, 0.4 * sign, image.size)
    x, y = image.width / 2, image.height / 2
    matrix = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    expected = image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(255,) * 3
    )
    # Where all of the 3 x 3 pixels around come from within the image.
    rows, columns = np.mgrid[:44, :60] + 0.5
    u, v = a * columns + b * rows + matrix[2], d * columns + e * rows + matrix[5]
    inside = (np.abs(u - x) < x - 1) & (np.abs(v - y) < y - 1)
    assert inside.mean() > 0.4
    assert np.abs(found - np.asarray(expected))[inside].max() <= 3


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match="blur"):
        transforms.apply_operation(Image.fromarray(_image()), "blur", 3, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"cutout": 1.5},
        {"randaugment_magnitude": 31},
        {"randaugment_operations": -1},
        {"color_jitter": -0.1},
        {"translate": 2},
        {"scale": float("nan")},
    ],
)
def test_values_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augment(**options)


def test_wrong_images_are_named():
    for image in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            Augment()(image, np.random.default_rng(0))


def test_it_can_be_sent_to_a_worker():
    copy = pickle.loads(pickle.dumps(EVERYTHING))
    assert copy == EVERYTHING
