"""The picture sheet: test images with true and predicted labels and where each was seen."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from clsl_jax import atomic

ROW_INCHES = 2.5
RIGHT, WRONG, MISSED = "#1a7f37", "#cf222e", "#9a6700"
# Letters of the name of an image (its end), of a class above a heat map and below the image.
_NAME_LENGTH, _TITLE_LENGTH, _CAPTION_LENGTH = 24, 19, 40
# Fonts with more letters than matplotlib's own, which stand in where they are installed.
_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "WenQuanYi Zen Hei"),
    *("Hiragino Sans", "Arial Unicode MS", "Microsoft YaHei"),
)
# A class from this probability on counts as predicted; so many heat maps an image.
THRESHOLD, SHOWN_CLASSES = 0.5, 3
# Of two classes each, below an image: more would run into the next one's name.
CAPTION_LINES = 6


@contextlib.contextmanager
def _every_letter() -> Iterator[None]:
    """Draws with the fonts that are installed; a letter that none has is a box, without a word."""
    installed = font_manager.get_font_names()
    families = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@_every_letter()
def picture_sheet(
    path: str,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    heat: np.ndarray | None,
    class_names: Sequence[str],
    names: Sequence[str],
    title: str = "",
) -> None:
    """Writes a PNG with a block per image: its name, itself, its labels, and heat maps.

    A heat map shows for one class how the positions' scores were weighted (they sum to 1), drawn
    from nothing to its own maximum over a darkened grey image, so that what is bright is what spoke
    for the class. The classes shown are those with the highest probability.

    Args:
      path: of the PNG.
      images: uint8 [n, H, W, 3].
      labels: int8 [n, C]; 1 positive, 0 negative, else not known.
      probabilities: float [n, C] in [0, 1].
      heat: float [n, h, w, C], or None if the model has no position weights.
      class_names: C names; the beginning of a long one is shown.
      names: n, of the images; the end of a long one is shown.
      title: of the sheet.
    """
    shown_classes = min(SHOWN_CLASSES, len(class_names))
    blocks = 2 if len(images) > 1 else 1
    panels = 1 + (shown_classes if heat is not None else 0)
    rows = -(-len(images) // blocks)
    figure = Figure(figsize=(blocks * panels * 1.45 + 0.4, rows * ROW_INCHES + 0.9), dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    grid = GridSpec(
        rows,
        blocks * panels,
        figure,
        left=0.01,
        right=0.99,
        bottom=1.3 / (rows * ROW_INCHES + 0.9),
        top=1 - 0.75 / (rows * ROW_INCHES),
    )
    grid.update(hspace=0.85, wspace=0.12)
    for i, image in enumerate(images):
        row, block = divmod(i, blocks)
        axes = [figure.add_subplot(grid[row, block * panels + k]) for k in range(panels)]
        axes[0].imshow(image)
        axes[0].set_title(_shortened(names[i]), fontsize=6.5, loc="left", parse_math=False)
        _caption(axes[0], labels[i], probabilities[i], class_names)
        if heat is not None:
            order = np.argsort(-probabilities[i], kind="stable")[:shown_classes]
            for axis, c in zip(axes[1:], order, strict=True):
                _heat(axis, image, heat[i, :, :, c])
                color = _color(labels[i, c], probabilities[i, c])
                text = f"{_beginning(class_names[c], _TITLE_LENGTH)} {probabilities[i, c]:.2f}"
                axis.set_title(text, fontsize=7, color=color, parse_math=False)
        for axis in axes:
            axis.set_axis_off()
    legend = (
        "right of each image: where its likeliest classes were seen" if heat is not None else ""
    )
    if (labels >= 0).any():
        legend = (
            "green: present and found   red: not present but predicted   "
            f"brown: present but missed   {legend}"
        )
    figure.text(0.01, 0.008, legend, fontsize=7, va="bottom", wrap=True)
    with atomic.replacing(path) as partial:
        figure.savefig(partial, format="png")


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"


def _beginning(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _color(label: int, probability: float) -> str:
    """Returns what the legend says of a class; black where nothing is to be said."""
    found = probability >= THRESHOLD
    if label == 1:
        return RIGHT if found else MISSED
    return WRONG if found and label == 0 else "black"


def _caption(
    axis: object, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> None:
    predicted = probabilities >= THRESHOLD
    groups = (
        (RIGHT, predicted & (labels == 1)),
        (WRONG, predicted & (labels == 0)),
        (MISSED, ~predicted & (labels == 1)),
        ("black", predicted & (labels < 0)),
    )
    filled = [(color, np.flatnonzero(of_it)) for color, of_it in groups if of_it.any()]
    fits = sum(-(-len(classes) // 2) for _, classes in filled) <= CAPTION_LINES
    line = 0
    for color, classes in filled:
        names = [_beginning(class_names[c], _CAPTION_LENGTH) for c in classes]
        if not fits:
            names = _cut(names, 2 * (CAPTION_LINES // len(filled)))
        for start in range(0, len(names), 2):
            text = ", ".join(names[start : start + 2])
            axis.text(
                0, -0.04 - 0.115 * line, text, color=color, fontsize=6.5, va="top",
                transform=axis.transAxes, parse_math=False,
            )  # fmt: skip
            line += 1


def _cut(names: Sequence[str], most: int) -> Sequence[str]:
    return names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]


def _heat(axis: object, image: np.ndarray, weights: np.ndarray) -> None:
    grey = image.mean(axis=-1)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    scaled = weights / max(float(weights.max()), 1e-12)
    axis.imshow(
        scaled, cmap="inferno", alpha=0.65, extent=extent, interpolation="bilinear", vmin=0, vmax=1
    )
    axis.set_xlim(extent[:2])
    axis.set_ylim(extent[2:])
