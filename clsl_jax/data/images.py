"""Decoded images behind one random-access interface: `len(images)`, `images[i]`.

`images[i]` is {"image": uint8 [S, S, 3], "row": int32}; `row` is i, the image's row in its split's
label matrix, put there by the source itself so that no shuffling or repeating can shift it.
"""

import importlib.metadata
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import cv2
import numpy as np
import PIL
from PIL import Image, ImageOps, TiffImagePlugin, features

from clsl_jax.errors import InputError

try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

# To be raised whenever the same file comes out as other pixels.
_DECODING = 3
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PER_THREAD = threading.local()
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FLOATING = (b"Pf\n", b"PF\n", b"#?RADIANCE", b"#?RGBE")  # PFM, Radiance HDR
_AVIF = (b"ftypavif", b"ftypavis")
# Of Pillow, for 32 bits a channel.
WIDE_MODES = ("I", "F")


class CorruptImage(InputError):
    """One image cannot be read or decoded; its neighbours perhaps can."""


class WideImage(CorruptImage):
    """An image has 32 bits a channel, of which nothing says how bright white is."""


class Images(Protocol):
    """Random access to the images of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Subset:
    """Some rows of other images, numbered anew from 0."""

    def __init__(self, images: Images, rows: Sequence[int]):
        self._images = images
        self._rows = np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        record = self._images[int(self._rows[index])]
        return {**record, "row": np.int32(index)}


class Tolerant:
    """Training images where one that cannot be read is replaced by the next one that can.

    A function of the row alone, so that workers, threads and resumed runs agree.

    Attributes:
      images: what is read; strict.
    """

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """Returns the record of the first readable row of index, index + 1, ... (mod N).

        `row` is the row that is shown and `asked`, int32, the one that was asked for.

        Raises:
          InputError: no image can be read.
        """
        length = len(self)
        if not 0 <= index < length:
            raise IndexError(f"row {index} of {length}")
        for ahead in range(length):
            try:
                record = self.images[(index + ahead) % length]
            except CorruptImage as error:
                last = str(error)
                continue
            return {**record, "asked": np.int32(index)}
        raise InputError(f"None of {length} training images can be read. The last one: {last}")

    def reason(self, index: int) -> str:
        """Returns why a row cannot be read, in one line; '' if it can."""
        try:
            self.images[index]
        except CorruptImage as error:
            return str(error)
        return ""


def decoding() -> str:
    """Names what decides on pixels, for records of a run and for files of decoded images."""
    resizer = "pillow"
    if cykooz_resizer is not None:
        resizer = f"cykooz_resizer {importlib.metadata.version('cykooz_resizer')}"
    return (
        f"version {_DECODING}; decoded by opencv {cv2.__version__}, else pillow "
        f"{PIL.__version__}; resized by {resizer}"
    )


def jpeg_frame(encoded: bytes) -> tuple[int, int, int] | None:
    """Returns (height, width, components) from a JPEG's frame header; None if there is none."""
    if encoded[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # a marker may be preceded by any number of these
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(encoded[position + 5 : position + 7], "big")
            width = int.from_bytes(encoded[position + 7 : position + 9], "big")
            return height, width, encoded[position + 9]
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def decode_image(
    encoded: bytes, *, where: str = "image", at_least: int | None = None, upright: bool = False
) -> np.ndarray:
    """Decodes an image file to RGB.

    OpenCV decodes; Pillow decodes what OpenCV does not read, four-component (CMYK) JPEG, whose
    colours the two convert differently, and AVIF to be turned upright, which OpenCV does not do. Of
    16 bits a channel the upper eight are taken.

    Args:
      encoded: the file's bytes.
      where: names the image in the error.
      at_least: pixels that are needed along each side. A JPEG with 2, 4 or 8 times as many along
        both is decoded at 1/2, 1/4 or 1/8 of its size, by a smaller inverse DCT.
      upright: turn the image as its EXIF orientation tag says (telephones write one); without, it
        is left as it is stored, which is how the benchmark sets are read.

    Returns:
      uint8 [H, W, 3]; reduced, sides are rounded up.

    Raises:
      CorruptImage: the bytes are cut off or are no image; `WideImage`, of those it is a kind: they
        have 32 bits a channel.
    """
    if _is_wide(encoded):
        raise _too_wide(where)
    frame = jpeg_frame(encoded)
    reduction = _reduction(frame, at_least)
    turned_by_pillow = upright and encoded[4:12] in _AVIF and features.check("avif")
    if not turned_by_pillow and (frame is None or frame[2] != 4):
        flags = _REDUCED[reduction] | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
        try:
            decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:
            decoded = None
        if decoded is not None:
            return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            turned = ImageOps.exif_transpose(image) if upright else image
            if turned.mode in WIDE_MODES:
                raise _too_wide(where)
            if turned.mode.startswith("I;16"):  # of which Pillow would make white all above 255
                turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
            return np.asarray(turned.convert("RGB"))
    except (MemoryError, CorruptImage):
        raise
    except Exception as error:  # Pillow's readers raise anything on broken files
        reason = " ".join(str(error).split()) or repr(error)
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "of no format that is known"
        raise CorruptImage(
            f"{where}: {len(encoded)} bytes that are no readable image ({reason}); "
            "fetch the file again or leave it out."
        ) from error


def _too_wide(where: str) -> WideImage:
    return WideImage(
        f"{where}: 32 bits a channel, of which nothing says how bright white is; convert the image "
        "to 8 bits a channel."
    )


def _is_wide(encoded: bytes) -> bool:
    """Whether a file that OpenCV would read has 32 bits a channel; a broken one is for OpenCV."""
    if encoded.startswith(_FLOATING):
        return True
    if not encoded.startswith(_TIFF):
        return False
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) >= 32
    except Exception:
        return False


def _reduction(frame: tuple[int, int, int] | None, at_least: int | None) -> int:
    if frame is None or not at_least:
        return 1
    shorter = min(frame[:2])
    return next((r for r in sorted(_REDUCED, reverse=True) if shorter >= r * at_least), 1)


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Squashes an image to a square without cropping.

    Pillow's bilinear filter, which smooths when it shrinks, as recipes of pretrained networks do.
    The package `cykooz_resizer`, where it is installed, computes the same several times faster, to
    within one grey level.

    Args:
      image: uint8 [H, W, 3].
      image_size: side S in pixels.

    Returns:
      uint8 [S, S, 3].
    """
    if image.shape[:2] == (image_size, image_size):
        return image
    if cykooz_resizer is not None:
        return _resize_fast(image, image_size)
    resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _resize_fast(image: np.ndarray, image_size: int) -> np.ndarray:
    if not hasattr(_PER_THREAD, "resizer"):  # one cannot be used by two threads at once
        _PER_THREAD.resizer = cykooz_resizer.Resizer()
    kind = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(image.shape[1], image.shape[0], kind, image.tobytes())
    resized = cykooz_resizer.ImageData(image_size, image_size, kind)
    bilinear = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    _PER_THREAD.resizer.resize(source, resized, cykooz_resizer.ResizeOptions(bilinear))
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(image_size, image_size, 3)


def decode_square(encoded: bytes, image_size: int, *, where: str, upright: bool) -> np.ndarray:
    """Returns uint8 [S, S, 3] of an image file: `decode_image`, then `resize_image`.

    Raises:
      CorruptImage: as `decode_image`.
    """
    decoded = decode_image(encoded, where=where, at_least=image_size, upright=upright)
    return resize_image(decoded, image_size)


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
