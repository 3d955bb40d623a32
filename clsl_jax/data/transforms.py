"""Augmentation of uint8 images, drawn from a NumPy generator."""

import dataclasses
import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# What an affine change uncovers: the mean colour of ImageNet, which normalisation turns into zeros.
FILL = (124, 116, 104)
MAX_MAGNITUDE = 30
# ITU-R 601, as in Pillow's conversion to grey.
LUMINANCE = (0.299, 0.587, 0.114)

AFFINE = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
RANDAUGMENT_OPERATIONS = (
    *("identity", *AFFINE, *_ENHANCE),
    *("posterize", "solarize", "autocontrast", "equalize"),
)


@dataclasses.dataclass(frozen=True)
class Augment:
    """A random change of an image: `augment(image, rng)`; equal generators give equal images.

    Order: shift and size, flip, RandAugment, colour jitter, Cutout. The labels are taken to hold
    afterwards. With digits among the classes leave `flip` off (a mirrored 2 or 5 is no digit); the
    rotations of RandAugment stay within 30 degrees and turn no 6 into a 9.

    Attributes:
      flip: mirror left to right with probability 1/2.
      randaugment_operations: how many of `RANDAUGMENT_OPERATIONS` are applied one after another
        (RandAugment, arXiv 1909.13719); 0 turns it off.
      randaugment_magnitude: their strength, 0 to 30.
      cutout: side of one square of random colour as a share of the image's side, wholly inside the
        image (after arXiv 1708.04552); 0 turns it off.
      color_jitter: brightness, contrast and saturation are each multiplied by a factor from
        [1 - color_jitter, 1 + color_jitter].
      translate: largest shift along each axis as a share of the image's side.
      scale: the size is multiplied by a factor from [1 / (1 + scale), 1 + scale].
    """

    flip: bool = False
    randaugment_operations: int = 0
    randaugment_magnitude: int = 9
    cutout: float = 0.0
    color_jitter: float = 0.0
    translate: float = 0.0
    scale: float = 0.0

    def __post_init__(self):
        for name, low, high in (
            ("randaugment_operations", 0, 100),
            ("randaugment_magnitude", 0, MAX_MAGNITUDE),
            ("cutout", 0, 1),
            ("color_jitter", 0, 1),
            ("translate", 0, 1),
            ("scale", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected a value in [{low}, {high}]"
                )

    @property
    def is_identity(self) -> bool:
        """Whether no image is ever changed."""
        changes = (self.flip, self.randaugment_operations, self.cutout, self.color_jitter)
        return not any((*changes, self.translate, self.scale))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a changed copy of uint8 [H, W, 3], of the same shape and type."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"expected an image uint8 [H, W, 3], found {image.dtype} {list(image.shape)}"
            )
        changed = Image.fromarray(image)
        if self.translate or self.scale:
            changed = _shift_and_scale(changed, rng, self.translate, self.scale)
        if self.flip and rng.random() < 0.5:
            changed = ImageOps.mirror(changed)
        for _ in range(self.randaugment_operations):
            name = RANDAUGMENT_OPERATIONS[int(rng.integers(len(RANDAUGMENT_OPERATIONS)))]
            sign = -1.0 if rng.random() < 0.5 else 1.0
            changed = apply_operation(changed, name, self.randaugment_magnitude, sign)
        if self.color_jitter:
            changed = _jitter(changed, rng, self.color_jitter)
        result = np.array(changed)
        if self.cutout:
            cutout(result, rng, self.cutout)
        return result


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Maps output pixel centres, measured from the image's centre, to the input by a 2x3 matrix.

    By OpenCV, which takes a fifth of Pillow's time.
    """
    a, b, c, d, e, f = matrix
    # From pixel centres to OpenCV's integer positions: the centre lies at (side - 1) / 2.
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    mapping = np.array([[a, b, c + x - a * x - b * y], [d, e, f + y - d * x - e * y]])
    moved = cv2.warpAffine(
        np.asarray(image),
        mapping,
        image.size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )
    return Image.fromarray(moved)


def _shift_and_scale(
    image: Image.Image, rng: np.random.Generator, translate: float, scale: float
) -> Image.Image:
    """Resizes a window of the padded image: several times faster than a general affine change."""
    shift_x, shift_y, power = rng.uniform(-1, 1, 3).tolist()
    width, height = image.size
    zoom = (1 + scale) ** power
    left = width * ((1 - zoom) / 2 + translate * shift_x)
    top = height * ((1 - zoom) / 2 + translate * shift_y)
    right, bottom = left + zoom * width, top + zoom * height
    margin = math.ceil(max(0.0, -left, -top, right - width, bottom - height))
    canvas = Image.new("RGB", (width + 2 * margin, height + 2 * margin), FILL)
    canvas.paste(image, (margin, margin))
    window = (left + margin, top + margin, right + margin, bottom + margin)
    return canvas.resize((width, height), Image.Resampling.BILINEAR, box=window)


def _jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Brightness, then contrast about the mean luminance, then saturation, as one colour matrix."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).tolist()
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    luminance = sum(weight * value for weight, value in zip(LUMINANCE, mean, strict=True))
    gain = brightness * contrast
    offset = brightness * (1 - contrast) * luminance
    matrix = []
    for row in range(3):
        matrix += [
            gain * ((1 - saturation) * weight + saturation * (row == column))
            for column, weight in enumerate(LUMINANCE)
        ]
        matrix.append(offset)
    return image.convert("RGB", tuple(matrix))


def cutout(image: np.ndarray, rng: np.random.Generator, share: float) -> None:
    """Paints, in place, one square of random colour.

    Args:
      image: uint8 [H, W, 3], writable.
      rng: draws place and colour.
      share: of the image's shorter side that a side of the square is, in [0, 1].
    """
    height, width = image.shape[:2]
    length = round(share * min(height, width))
    top = int(rng.integers(height - length + 1))
    left = int(rng.integers(width - length + 1))
    image[top : top + length, left : left + length] = rng.integers(0, 256, 3, dtype=np.uint8)


def apply_operation(image: Image.Image, name: str, magnitude: float, sign: float) -> Image.Image:
    """Applies one operation of RandAugment, with the ranges that torchvision also uses.

    Args:
      image: RGB.
      name: one of `RANDAUGMENT_OPERATIONS`.
      magnitude: 0 (no change) to 30: shear up to 0.3, shift up to 150/331 of the side, rotation
        up to 30 degrees, brightness, colour, contrast and sharpness by up to a factor 1 +- 0.9,
        posterisation down to 4 bits, solarisation from 255 down to 0. 'autocontrast' and
        'equalize' have no strength.
      sign: -1.0 or 1.0: direction of those operations that have one.

    Returns:
      RGB image of the same size.
    """
    level = magnitude / MAX_MAGNITUDE
    if name in AFFINE:
        return _affine(image, affine_matrix(name, level * sign, image.size))
    if name in _ENHANCE:
        return _ENHANCE[name](image).enhance(enhancement_factor(level * sign))
    match name:
        case "identity":
            return image
        case "posterize":
            return ImageOps.posterize(image, 8 - round(4 * level))
        case "solarize":
            # 256 and not 255, so that magnitude 0 leaves white white.
            return ImageOps.solarize(image, round(256 * (1 - level)))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    raise ValueError(f"{name!r} is no operation; choose one of {', '.join(RANDAUGMENT_OPERATIONS)}")


def enhancement_factor(level: float) -> float:
    """The factor of brightness, colour, contrast and sharpness; `level` is in [-1, 1]."""
    return 1 + 0.9 * level


def affine_matrix(name: str, level: float, size: tuple[int, int]) -> tuple[float, ...]:
    """The 2x3 matrix from output to input of an affine operation; `level` is in [-1, 1]."""
    width, height = size
    match name:
        case "shear_x":
            return (1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0)
        case "shear_y":
            return (1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0)
        case "translate_x":
            return (1.0, 0.0, 150 / 331 * level * width, 0.0, 1.0, 0.0)
        case "translate_y":
            return (1.0, 0.0, 0.0, 0.0, 1.0, 150 / 331 * level * height)
    angle = np.deg2rad(30 * level)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return (cos, sin, 0.0, -sin, cos, 0.0)
