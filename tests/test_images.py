import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clsl_jax.data import images, inspection
from clsl_jax.errors import InputError


def _noise(height, width, seed=0):
    draws = np.random.RandomState(seed)
    return draws.randint(0, 256, (height, width, 3)).astype(np.uint8)


def _photograph(height, width, seed=0):
    """Smooth noise at several scales."""
    draws = np.random.RandomState(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for grain in (2, 8, 32, 128):
        coarse = draws.randn(max(2, height // grain), max(2, width // grain), 3)
        coarse = coarse.astype(np.float32) * grain**0.5
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(pixels / pixels.std() * 50 + 120, 0, 255).astype(np.uint8)


def _encode(image, file_format="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def _by_pillow(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "P"), ("JPEG", "L"), ("GIF", "P"),
     ("BMP", "RGB"), ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("PPM", "RGB")],
)  # fmt: skip
def test_formats_decode_as_pillow_does(file_format, mode):
    encoded = _encode(_noise(9, 13), file_format, mode)
    assert np.array_equal(images.decode_image(encoded), _by_pillow(encoded))
    small = images.decode_image(encoded, at_least=50)
    assert np.array_equal(small, _by_pillow(encoded))


def test_jpeg_decodes_nearly_as_pillow_does():
    y, x = np.mgrid[:60, :80]
    image = np.stack([x * 3, y * 4, (x + y) * 1.5], axis=-1).astype(np.uint8)
    encoded = _encode(image)
    assert np.abs(images.decode_image(encoded) - _by_pillow(encoded)).max() <= 4


def test_the_frame_header_by_hand():
    frame = b"\xff\xc2\x00\x11\x08\x01\x02\x03\x04\x03" + bytes(9)
    comment = b"\xff\xfe\x00\x06\xff\xc0AB"  # looks like a frame inside
    assert images.jpeg_frame(b"\xff\xd8" + frame) == (258, 772, 3)
    assert images.jpeg_frame(b"\xff\xd8" + comment + b"\xff\xff" + frame) == (258, 772, 3)
    assert images.jpeg_frame(b"\xff\xd8" + comment) is None
    assert images.jpeg_frame(b"\xff\xd8" + frame[:9]) is None
    assert images.jpeg_frame(b"\x89PNG" + frame) is None
    assert images.jpeg_frame(b"") is None


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    at_least=st.integers(1, 60),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    progressive=st.booleans(),
)
def test_reduction_follows_the_size_and_never_goes_below(
    height, width, at_least, mode, progressive
):
    encoded = _encode(_noise(height, width), mode=mode, progressive=progressive)
    assert images.jpeg_frame(encoded) == (height, width, {"RGB": 3, "L": 1, "CMYK": 4}[mode])
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(height, width) >= f * at_least)
    decoded = images.decode_image(encoded, at_least=at_least)
    assert decoded.shape == (-(-height // factor), -(-width // factor), 3)
    assert decoded.shape[0] >= min(at_least, height)
    assert decoded.shape[1] >= min(at_least, width)
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft(None, (at_least, at_least))
        assert image.size == decoded.shape[1::-1]
        difference = decoded - np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(896, 1000), (1999, 1800)])
def test_reduced_photographs_come_out_as_whole_ones(height, width):
    """The oracle is Pillow at full size; the spread of the grey levels is 50."""
    encoded = _encode(_photograph(height, width), quality=90)
    with Image.open(io.BytesIO(encoded)) as image:
        whole = np.asarray(image.resize((448, 448), Image.Resampling.BILINEAR)).astype(int)
    reduced = images.decode_image(encoded, at_least=448)
    assert reduced.shape[0] < height / 1.9
    difference = np.abs(images.resize_image(reduced, 448) - whole)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) <= 6
    assert difference.max() <= 16


def test_only_jpeg_is_reduced_and_orientation_is_never_applied():
    picture = _noise(40, 64)
    png = _encode(picture, "PNG")
    assert np.array_equal(images.decode_image(png, at_least=4), picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned, plain = _encode(picture, exif=exif), _encode(picture)
    assert turned != plain
    for at_least, shape in ((None, (40, 64, 3)), (20, (20, 32, 3)), (5, (5, 8, 3))):
        decoded = images.decode_image(turned, at_least=at_least)
        assert decoded.shape == shape
        assert np.array_equal(decoded, images.decode_image(plain, at_least=at_least))


def test_images_that_cannot_be_read_are_named():
    whole = _encode(_noise(30, 30), "PNG")
    for broken in (b"", b"no image", b"\xff\xd8", b"GIF89a", whole[:40]):
        with pytest.raises(images.CorruptImage, match="photo 7") as error:
            images.decode_image(broken, where="photo 7", at_least=10)
        assert isinstance(error.value, InputError)
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)
    assert images.decode_image(whole).shape == (30, 30, 3)


@settings(max_examples=150, deadline=None)
@given(
    file_format=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]),
    place=st.integers(0, 5000),
    value=st.integers(0, 255),
    cut=st.integers(0, 400),
)
def test_damaged_files_decode_or_are_corrupt_and_nothing_else(file_format, place, value, cut):
    content = bytearray(_encode(_noise(8, 9), file_format))
    content[place % len(content)] = value
    content = bytes(content[: max(1, len(content) - cut)])
    try:
        decoded = images.decode_image(content, at_least=2)
    except images.CorruptImage:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_images_of_32_bits_a_channel_are_refused(tmp_path, kind):
    """Nothing says how bright their white is: they would come out black, or white."""
    path = tmp_path / "scan.tif"
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(kind)).save(path)
    with pytest.raises(images.CorruptImage, match="scan 3: 32 bits a channel"):
        images.decode_image(path.read_bytes(), where="scan 3")
    found = inspection.inspect_image(path)
    assert (found.state, found.reason) == ("unreadable", "32 bits a channel: convert it to 8")
    Image.fromarray(np.zeros((8, 8), kind)).save(path, big_tiff=True)
    with pytest.raises(images.CorruptImage, match="32 bits a channel"):
        images.decode_image(path.read_bytes())
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(path)
    assert (images.decode_image(path.read_bytes()) == 77).all()
    assert inspection.inspect_image(path).state == "readable"


@pytest.mark.parametrize("name", ["scan.pfm", "scan.hdr", "scan.fits", "whole.fits"])
def test_nor_are_those_of_other_formats_read(tmp_path, name):
    """Floats of two formats that OpenCV would read; floats and whole numbers of one for Pillow."""
    path = tmp_path / name
    pixels = np.linspace(0, 1000, 64, dtype=np.float32).reshape(8, 8)
    if path.suffix == ".pfm":
        Image.fromarray(pixels).save(path)
    elif path.suffix == ".hdr":
        cv2.imwrite(str(path), np.repeat(pixels[:, :, None], 3, axis=2))
    else:
        path.write_bytes(_fits(pixels.astype(">f4" if name == "scan.fits" else ">i4")))
    with pytest.raises(images.WideImage, match="scan 3: 32 bits a channel"):
        images.decode_image(path.read_bytes(), where="scan 3")
    found = inspection.inspect_image(path)
    assert (found.state, found.reason) == ("unreadable", "32 bits a channel: convert it to 8")


def _fits(pixels):
    """A picture as a FITS file of big-endian numbers."""
    bits = pixels.itemsize * 8 * (-1 if pixels.dtype.kind == "f" else 1)
    keys = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": 8}
    header = "".join(f"{name:8}= {value!s:>20}".ljust(80) for name, value in keys.items())
    return f"{header}{'END':80}".ljust(2880).encode() + pixels.tobytes().ljust(2880, b"\0")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "zstd", "lzma"])
def test_of_16_bits_a_channel_the_upper_eight_are_read(tmp_path, compression):
    """By OpenCV, and by Pillow where OpenCV does not know the compression."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    path = tmp_path / "scan.tif"
    Image.fromarray(ramp).save(path, compression=compression)
    found = images.decode_image(path.read_bytes())
    np.testing.assert_array_equal(found, np.repeat((ramp // 256)[:, :, None], 3, axis=2))
    assert inspection.inspect_image(path).state == "readable"


@pytest.mark.slow
def test_a_large_image_is_no_damaged_one(tmp_path):
    """More pixels than Pillow takes: OpenCV reads them, and training does."""
    path = tmp_path / "large.png"
    with Image.new("1", (13_500, 13_500)) as image:
        image.save(path)
    found = inspection.inspect_image(path)
    assert (found.state, found.reason) == ("readable", "")
    assert (found.width, found.height) == (13_500, 13_500)


def test_resizing_squashes_without_cropping():
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, :20] = 200
    resized = images.resize_image(image, 8)
    assert resized.shape == (8, 8, 3)
    assert (resized[:, :3] == 200).all()
    assert (resized[:, 5:] == 0).all()
    square = image[:, :10]
    assert images.resize_image(square, 10) is square


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    side=st.integers(1, 60),
    seed=st.integers(0),
)
def test_resizing_is_pillows_to_within_one_grey_level(height, width, side, seed):
    image = _noise(height, width, seed % 2**32)
    expected = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    resized = images.resize_image(image, side)
    assert resized.dtype == np.uint8
    assert np.abs(resized - np.asarray(expected).astype(int)).max() <= 1


def test_without_the_fast_resizer_pillows_own_pixels_are_returned():
    program = (
        "import sys\n"
        "sys.modules['cykooz_resizer'] = None  # importing it fails as if it were not there\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "from clsl_jax.data import images\n"
        "image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)\n"
        "expected = Image.fromarray(image).resize((33, 33), Image.Resampling.BILINEAR)\n"
        "assert np.array_equal(images.resize_image(image, 33), np.asarray(expected))\n"
        "assert 'resized by pillow' in images.decoding()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_threads_decode_and_resize_at_once():
    encoded = [_encode(_noise(60 + k, 80, k)) for k in range(8)]

    def read(content):
        return images.resize_image(images.decode_image(content, at_least=32), 32)

    expected = [read(content) for content in encoded]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, encoded * 10))
    assert all(np.array_equal(f, expected[k % 8]) for k, f in enumerate(found))


class _Holes:
    """Images of which some rows cannot be read."""

    def __init__(self, count, holes):
        self.count, self.holes = count, holes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.holes:
            raise images.CorruptImage(f"row {index} is broken")
        return {"image": np.full((2, 2, 3), index, np.uint8), "row": np.int32(index)}


def test_the_next_readable_image_stands_in():
    tolerant = images.Tolerant(_Holes(7, {0, 2, 3, 6}))
    for view in (tolerant, pickle.loads(pickle.dumps(tolerant))):
        assert len(view) == 7
        records = [view[index] for index in range(7)]
        assert [int(record["row"]) for record in records] == [1, 1, 4, 4, 4, 5, 1]
        assert [int(record["asked"]) for record in records] == list(range(7))
        assert [int(record["image"][0, 0, 0]) for record in records] == [1, 1, 4, 4, 4, 5, 1]
        assert records[0]["asked"].dtype == records[0]["row"].dtype == np.int32
    assert tolerant.reason(2) == "row 2 is broken"
    assert tolerant.reason(4) == ""


def test_rows_that_are_chosen_keep_their_own_numbers():
    subset = images.Subset(_Holes(10, {4, 9}), [8, 9, 4, 2])
    records = [images.Tolerant(subset)[index] for index in range(4)]
    assert [int(record["row"]) for record in records] == [0, 3, 3, 3]
    assert [int(record["image"][0, 0, 0]) for record in records] == [8, 2, 2, 2]


def test_where_nothing_can_be_read_it_is_an_error_of_the_whole_set():
    with pytest.raises(InputError, match=r"None of 3 .* row 0 is broken") as error:
        images.Tolerant(_Holes(3, {0, 1, 2}))[1]
    assert not isinstance(error.value, images.CorruptImage)
    with pytest.raises(IndexError):
        images.Tolerant(_Holes(3, set()))[3]


@pytest.mark.parametrize("at_least", [None, 16])
def test_a_jpeg_cut_in_half_is_no_image(at_least):
    """Old decoders fill what is missing with whatever lies in memory."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    encoded = buffer.getvalue()
    for _ in range(3):
        with pytest.raises(images.CorruptImage):
            images.decode_image(encoded[: len(encoded) // 2], at_least=at_least)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_if_asked_for(orientation, file_format):
    """Against Pillow, which reads the last format; OpenCV reads the others."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:8, :16] = (250, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        stored, turned = np.asarray(image), np.asarray(ImageOps.exif_transpose(image))
    found = images.decode_image(buffer.getvalue(), upright=True)
    assert found.shape == turned.shape
    assert np.abs(found.astype(int) - turned).mean() < 2
    left = images.decode_image(buffer.getvalue())
    assert left.shape == stored.shape
    assert np.abs(left.astype(int) - stored).mean() < 2
