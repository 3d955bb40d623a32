"""Decoded images behind one random-access interface: `len(images)`, `images[i]`.

`images[i]` is {"image": uint8 [S, S, 3], "row": int32}; `row` is i, the image's row in its split's
label matrix, put there by the source itself so that no shuffling or repeating can shift it.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from clsl_jax.errors import InputError


class Images(Protocol):
    """Random access to the images of a split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class MemoryImages:
    """Images held decoded in memory."""

    def __init__(self, images: np.ndarray):
        """`images` is uint8 [N, S, S, 3]."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"images: expected uint8 [N, S, S, 3], found {images.dtype} {list(images.shape)}"
            )
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        return {"image": self.images[index], "row": np.int32(index)}


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


def _is_cmyk_jpeg(encoded: bytes) -> bool:
    """Whether the bytes are a JPEG of four components, from its frame header."""
    if encoded[:2] != b"\xff\xd8":
        return False
    position = 2
    while position + 10 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return encoded[position + 9] == 4
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return False


def decode_image(encoded: bytes, *, where: str = "image") -> np.ndarray:
    """Decodes an image file to RGB, upright or not as stored (an orientation tag is not applied).

    OpenCV decodes; Pillow decodes what OpenCV does not read, and four-component (CMYK) JPEG, whose
    colours the two convert differently.

    Args:
      encoded: the file's bytes.
      where: names the image in the error.

    Returns:
      uint8 [H, W, 3].

    Raises:
      InputError: the bytes are cut off or are no image.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    if not _is_cmyk_jpeg(encoded):
        try:
            decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:
            decoded = None
        if decoded is not None:
            return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{where}: {len(encoded)} bytes that are no readable image ({error}); "
            "fetch the file again or leave it out."
        ) from error


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Squashes an image to a square without cropping.

    Pillow's bilinear filter, which smooths when it shrinks, as recipes of pretrained networks do.

    Args:
      image: uint8 [H, W, 3].
      image_size: side S in pixels.

    Returns:
      uint8 [S, S, 3].
    """
    if image.shape[:2] == (image_size, image_size):
        return image
    resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
