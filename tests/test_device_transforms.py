import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageFilter, ImageOps

from clsl_jax import device_transforms
from clsl_jax.data import transforms
from clsl_jax.data.transforms import Augment

SIDE = 24
EVERYTHING = Augment(
    flip=True,
    randaugment_operations=2,
    randaugment_magnitude=9,
    cutout=0.4,
    color_jitter=0.4,
    translate=0.1,
    scale=0.3,
)
INTEGER = ("identity", "brightness", "contrast", "posterize", "solarize", "equalize")


def _noise(count, side=SIDE):
    return np.random.RandomState(0).randint(0, 256, (count, side, side, 3)).astype(np.uint8)


def _smooth(count, side=SIDE, seed=0):
    """Images whose levels change slowly and do not fill the range."""
    draws = np.random.RandomState(seed).randint(20, 220, (count, 5, 5, 3)).astype(np.uint8)
    return np.stack(
        [np.array(Image.fromarray(d).resize((side, side), Image.Resampling.BICUBIC)) for d in draws]
    )


@functools.cache
def _augment(augment):
    return jax.jit(functools.partial(device_transforms.augment_images, augment=augment))


@functools.cache
def _draw(augment, side, count):
    """Draws of `count` images, as `augment_images` makes them."""

    def one(key, place):
        return device_transforms.draw(jax.random.fold_in(key, place), side, augment)

    drawn = jax.jit(jax.vmap(one, in_axes=(None, 0)))(jax.random.key(0), jnp.arange(count))
    return jax.tree.map(np.asarray, drawn)


@functools.cache
def _operations(magnitude):
    """All operations in both directions, - first, of one image: [2, 14, S, S, 3]."""

    def one(image, operation, positive):
        return device_transforms.apply_operation(image, operation, positive, magnitude)

    over_operations = jax.vmap(one, in_axes=(None, 0, None))
    both = jax.jit(jax.vmap(over_operations, in_axes=(None, None, 0)))
    every = jnp.arange(len(device_transforms.OPERATIONS))
    return lambda image: np.asarray(both(image, every, jnp.array([False, True])))


class _Replay:
    """A NumPy generator's interface to one image's `Draws`, in the order in which Augment asks."""

    def __init__(self, draws, augment):
        d = draws
        self._answers = []
        if augment.translate or augment.scale:
            self._answers.append(np.array([*d.shift, d.power]))
        if augment.flip:
            self._answers.append(0.0 if d.mirrored else 1.0)
        for operation, positive in zip(d.operations, d.positive, strict=True):
            self._answers += [operation, 1.0 if positive else 0.0]
        if augment.color_jitter:
            self._answers.append(d.factors)
        if augment.cutout:
            self._answers += [*d.corner, d.colour]

    def random(self):
        return self._answers.pop(0)

    def uniform(self, low, high, size):
        answer = self._answers.pop(0)
        assert len(answer) == size
        assert low <= answer.min() <= answer.max() <= high
        return answer

    def integers(self, low, high=None, size=None, dtype=None):
        answer = self._answers.pop(0)
        assert np.max(answer) < (low if high is None else high)
        return answer


def _on_host(images, augment):
    draws = _draw(augment, images.shape[1], len(images))
    return np.stack(
        [
            augment(image, _Replay(jax.tree.map(lambda d, i=i: d[i], draws), augment))
            for i, image in enumerate(images)
        ]
    )


def _difference(found, expected):
    return np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))


@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("kind", [_noise, _smooth])
def test_operations_are_the_hosts(kind, magnitude):
    image = kind(1)[0]
    found = _operations(magnitude)(image)
    for direction, sign in enumerate((-1.0, 1.0)):
        for place, name in enumerate(device_transforms.OPERATIONS):
            expected = transforms.apply_operation(Image.fromarray(image), name, magnitude, sign)
            difference = _difference(found[direction, place], expected)
            if name in transforms.AFFINE:
                # OpenCV before 5.0 rounds positions to 1/32 pixel; since then 1 would do.
                assert difference.max() <= (8 if kind is _noise else 2), name
            else:
                assert difference.max() <= (name not in INTEGER), name
                assert (difference > 0).mean() < 0.02, name


def test_magnitude_zero_changes_nothing():
    image = _noise(1)[0]
    found = _operations(0)(image)
    for place, name in enumerate(device_transforms.OPERATIONS):
        if name not in ("autocontrast", "equalize"):
            assert np.array_equal(found[0, place], image), name
            assert np.array_equal(found[1, place], image), name


def test_look_up_tables_of_all_ranges():
    """Autocontrast for many pairs (lowest, highest), flat channels included."""
    rng = np.random.RandomState(1)
    bounds = np.sort(rng.randint(0, 256, (400, 3, 2)), axis=2)
    bounds[:8, :, 1] = bounds[:8, :, 0]
    bounds[8:16] = (0, 255)
    counts = np.zeros((400, 3, 256), np.int32)
    np.put_along_axis(counts, bounds, rng.randint(1, 50, bounds.shape), axis=2)
    found = jax.jit(jax.vmap(device_transforms.autocontrast_lookup))(counts)
    found = np.asarray(found).astype(int)
    levels = np.arange(256)
    short = 0
    for (lowest, highest), new in zip(bounds.reshape(-1, 2), found.reshape(-1, 256), strict=True):
        strip = Image.fromarray(np.array([[lowest, highest, *range(lowest, highest)]], np.uint8))
        expected = np.asarray(ImageOps.autocontrast(strip))[0].astype(int)
        difference = new[np.asarray(strip)[0]] - expected
        whole = (np.asarray(strip)[0].astype(int) - lowest) * 255 % max(highest - lowest, 1) == 0
        assert ((difference == 0) | ((difference == 1) & whole)).all()
        short += difference.any()
        if lowest == highest:
            assert np.array_equal(new, levels)
    assert short < 0.3 * bounds.size / 2


@pytest.mark.parametrize("values", [(7,), (3, 250), (0, 1, 2, 255), tuple(range(256))])
def test_equalisation_of_few_and_many_levels(values):
    """With 24 x 24 pixels also steps of 0 and 1, whose sums run past 255."""
    rng = np.random.RandomState(2)
    weights = rng.dirichlet(np.full(len(values), 0.3))
    image = rng.choice(values, (SIDE, SIDE, 3), p=weights).astype(np.uint8)
    counts = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])
    found = np.asarray(jax.jit(device_transforms.equalize_lookup)(counts.astype(np.int32)))
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    for channel in range(3):
        assert np.array_equal(found[channel][image[..., channel]], expected[..., channel])


def test_parts_by_pillow():
    image = np.concatenate([_noise(1)[0][:12], _smooth(1)[0][12:]])
    levels = image.astype(np.int32)
    picture = Image.fromarray(image)
    counts = np.reshape(picture.histogram(), (3, 256))
    assert np.array_equal(jax.jit(device_transforms.histogram)(image), counts)
    # The way of the TPU, where `histogram` takes it.
    compared = jax.jit(device_transforms._histogram_by_comparison)(image.reshape(-1, 3))
    assert np.array_equal(compared, counts)
    assert np.array_equal(
        jax.jit(device_transforms.luminance)(levels), np.asarray(picture.convert("L"))
    )
    smoothed = np.asarray(picture.filter(ImageFilter.SMOOTH))
    assert np.array_equal(jax.jit(device_transforms.smooth)(levels), smoothed)


def test_integer_changes_are_exactly_the_hosts():
    images = _noise(16)
    for augment in (Augment(flip=True, cutout=0.5), Augment(cutout=1.0)):
        found = _augment(augment)(jax.random.key(0), images)
        assert found.dtype == jnp.uint8
        assert np.array_equal(found, _on_host(images, augment))


@pytest.mark.parametrize(
    "augment",
    [
        Augment(scale=1.0),
        Augment(translate=1.0, scale=0.4),
        Augment(color_jitter=0.8),
    ],
)
def test_resampling_and_colours_are_the_hosts_within_a_level(augment):
    images = np.concatenate([_noise(24), _smooth(24)])
    found = _augment(augment)(jax.random.key(0), images)
    difference = _difference(found, _on_host(images, augment))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_everything_together_in_the_hosts_order():
    images = _smooth(16)
    found = np.asarray(_augment(EVERYTHING)(jax.random.key(0), images))
    difference = _difference(found, _on_host(images, EVERYTHING))
    # A level's difference may grow where equalisation follows.
    assert difference.mean() < 0.2
    assert np.percentile(difference, 99) <= 3
    assert len({image.tobytes() for image in found}) == 16


def test_nothing_chosen_changes_nothing():
    images = _noise(2)
    found = device_transforms.augment_images(jax.random.key(0), images, Augment())
    assert np.array_equal(found, images)


def test_draws_depend_on_key_and_place_alone():
    images = _noise(16)
    augment = _augment(Augment(flip=True, cutout=0.5))
    whole = np.asarray(augment(jax.random.key(0), images))
    part = np.asarray(augment(jax.random.key(0), images[:8]))
    other = np.asarray(augment(jax.random.key(1), images[:8]))
    assert np.array_equal(whole[:8], part)
    assert (part != other).any(axis=(1, 2, 3)).all()


def test_a_mesh_changes_no_bit_and_needs_no_communication():
    images = _smooth(16)
    mesh = Mesh(np.reshape(jax.devices()[:8], (4, 2)), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        functools.partial(device_transforms.augment_images, augment=EVERYTHING),
        in_shardings=(replicated, sharding),
    )
    key = jax.device_put(jax.random.key(0), replicated)
    split = jax.device_put(images, sharding)
    compiled = step.lower(key, split).compile()
    found = compiled(key, split)
    assert found.sharding.is_equivalent_to(sharding, 4)
    assert np.array_equal(found, _augment(EVERYTHING)(jax.random.key(0), images))
    program = compiled.as_text()
    assert "u8[4,24,24,3]" in program
    assert "u8[16,24,24,3]" not in program
    for word in ("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter"):
        assert word not in program


class _Recorder:
    """A generator that keeps what it answered, by kind."""

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)
        self.answers = []

    def __getattr__(self, name):
        def answer(*args, **kwargs):
            value = getattr(self._rng, name)(*args, **kwargs)
            self.answers.append(np.array(value))
            return value

        return answer


COUNT = 4000


@functools.cache
def _host_draws():
    """What the host draws with `EVERYTHING` for as many tiny images, in the fields of `Draws`."""
    image = np.zeros((8, 8, 3), np.uint8)
    rows = []
    for seed in range(COUNT):
        recorder = _Recorder(seed)
        EVERYTHING(image, recorder)
        moved, flip, first, sign, second, other, factors, *corner, colour = recorder.answers
        rows.append(
            device_transforms.Draws(
                shift=moved[:2],
                power=moved[2],
                mirrored=flip < 0.5,
                operations=np.stack([first, second]),
                positive=np.stack([sign, other]) >= 0.5,
                factors=factors,
                corner=np.stack(corner),
                colour=colour,
            )
        )
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@pytest.mark.parametrize("field", device_transforms.Draws._fields)
def test_draws_are_distributed_as_the_hosts(field):
    """Means within 5 standard errors, of which both sides have one; ranges alike."""
    host = getattr(_host_draws(), field).astype(float).reshape(COUNT, -1)
    device = getattr(_draw(EVERYTHING, 8, COUNT), field).astype(float).reshape(COUNT, -1)
    assert host.shape == device.shape
    tolerance = 5 * host.std(axis=0) * np.sqrt(2 / COUNT)
    assert (np.abs(host.mean(axis=0) - device.mean(axis=0)) < tolerance).all()
    spread = host.max(axis=0) - host.min(axis=0)
    assert (np.abs(host.std(axis=0) - device.std(axis=0)) < 0.05 * spread).all()
    assert (np.abs(host.min(axis=0) - device.min(axis=0)) <= 0.01 * spread).all()
    assert (np.abs(host.max(axis=0) - device.max(axis=0)) <= 0.01 * spread).all()


def test_every_operation_is_as_frequent_in_both_directions():
    drawn = _draw(EVERYTHING, 8, COUNT)
    kinds = 2 * drawn.operations + drawn.positive
    counts = np.bincount(kinds.ravel(), minlength=28)
    expected = 2 * COUNT / 28
    assert len(counts) == 28
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    # The two operations of an image and its fields are drawn independently of one another.
    for one, other in (
        (drawn.operations[:, 0], drawn.operations[:, 1]),
        (drawn.mirrored, drawn.positive[:, 0]),
        (drawn.corner[:, 0], drawn.corner[:, 1]),
        (drawn.shift[:, 0], drawn.factors[:, 0]),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(COUNT)


def test_corners_and_colours_cover_their_ranges_evenly():
    drawn = _draw(EVERYTHING, 8, COUNT)
    corners = np.bincount(drawn.corner.ravel())
    assert len(corners) == 8 - 3 + 1  # a square of 3 pixels in 8
    assert (np.abs(corners - corners.mean()) < 5 * np.sqrt(corners.mean())).all()
    colours = np.bincount(drawn.colour.ravel(), minlength=256)
    assert (np.abs(colours - colours.mean()) < 5 * np.sqrt(colours.mean())).all()


def test_wrong_images_are_named():
    for images in (np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), _noise(1)[:, :9]):
        with pytest.raises(ValueError, match="uint8"):
            device_transforms.augment_images(jax.random.key(0), jnp.asarray(images), EVERYTHING)


def test_the_mean_of_an_image_of_any_size():
    """Above 2,900 pixels a side the sum of its levels does not fit into 32 bits."""
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (64, 64), (3000, 3000)):
        for low, high in ((0, 256), (255, 256)):
            grey = rng.integers(low, high, shape).astype(np.int32)
            expected = (2 * int(grey.sum()) + grey.size) // (2 * grey.size)
            assert int(device_transforms._mean(jnp.asarray(grey))) == expected
