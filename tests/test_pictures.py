"""The picture sheet is a PNG of a sensible size that shows the images."""

import warnings

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from clsl_jax import pictures


def _draw_one(folder, labels, probabilities, class_names, heat=None):
    """The sheet of one black image."""
    pictures.picture_sheet(
        str(folder / "sheet.png"),
        images=np.zeros((1, 8, 8, 3), np.uint8),
        labels=np.array([labels], np.int8),
        probabilities=np.array([probabilities]),
        heat=heat,
        class_names=class_names,
        names=["a"],
    )


@pytest.mark.parametrize(
    ("count", "with_heat", "classes"), [(1, True, 6), (5, True, 6), (4, False, 6), (2, True, 1)]
)
def test_sheet(tmp_path, monkeypatch, count, with_heat, classes):
    rng = np.random.default_rng(0)
    images = np.full((count, 32, 32, 3), (250, 10, 200), np.uint8)
    path = tmp_path / "sheet.png"
    written, set_title = [], Axes.set_title
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda self, text, **how: written.append(text) or set_title(self, text, **how),
    )
    names = [f"folder/$_{i}$" + "/long" * (i % 2 * 20) for i in range(count)]
    pictures.picture_sheet(
        str(path),
        images=images,
        labels=rng.integers(-1, 2, (count, classes)).astype(np.int8),
        probabilities=rng.random((count, classes)),
        heat=rng.random((count, 4, 4, classes)) if with_heat else None,
        # Formulae to matplotlib, the second one wrong.
        class_names=[f"US$ {c} ${{" for c in range(classes)],
        names=names,
        title="title",
    )
    shortened = [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]
    assert [text for text in written if text in shortened] == shortened
    sheet = cv2.imread(str(path))[:, :, ::-1]
    assert sheet.shape[1] > sheet.shape[0] * 0.3
    # Each image appears in its colour, at least 80 x 80 pixels of it.
    found = (np.abs(sheet.astype(int) - (250, 10, 200)) < 3).all(axis=-1).sum()
    assert found > count * 80 * 80
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_what_is_written_below_an_image_does_not_reach_the_next_one(tmp_path, monkeypatch):
    """All that fits in six lines; of more, as many lines of each kind."""
    said, text = [], Axes.text
    monkeypatch.setattr(
        Axes,
        "text",
        lambda self, x, y, s, **how: said.append((how["color"], s)) or text(self, x, y, s, **how),
    )

    def captions(labels, probabilities):
        said.clear()
        _draw_one(tmp_path, labels, probabilities, [str(c) for c in range(len(labels))])
        return list(said)

    right, wrong, missed = pictures.RIGHT, pictures.WRONG, pictures.MISSED
    everywhere = captions([1] * 5 + [0] * 7 + [1] * 3, [0.9] * 12 + [0.1] * 3)
    assert everywhere == [
        (right, "0, 1"), (right, "2, 2 more"),
        (wrong, "5, 6"), (wrong, "7, 4 more"),
        (missed, "12, 13"), (missed, "14"),
    ]  # fmt: skip
    assert captions([1] * 5 + [0] * 8, [0.9] * 13) == [
        (right, "0, 1"), (right, "2, 3"), (right, "4"),
        (wrong, "5, 6"), (wrong, "7, 8"), (wrong, "9, 3 more"),
    ]  # fmt: skip
    assert captions([1] * 12, [0.9] * 12) == [(right, f"{c}, {c + 1}") for c in range(0, 12, 2)]


def test_titles_have_the_colours_of_the_legend(tmp_path, monkeypatch):
    said, set_title = [], Axes.set_title
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda self, text, **how: (
            said.append((how.get("color"), text)) or set_title(self, text, **how)
        ),
    )

    def titles(labels, probabilities, class_names):
        said.clear()
        heat = np.full((1, 2, 2, len(labels)), 0.25)
        _draw_one(tmp_path, labels, probabilities, class_names, heat)
        return said[1:]

    right, wrong, missed = pictures.RIGHT, pictures.WRONG, pictures.MISSED
    assert titles([1, 0, -1], [0.9, 0.8, 0.7], "abc") == [
        (right, "a 0.90"), (wrong, "b 0.80"), ("black", "c 0.70"),
    ]  # fmt: skip
    assert titles([1, 0, -1], [0.3, 0.2, 0.1], "abc") == [
        (missed, "a 0.30"), ("black", "b 0.20"), ("black", "c 0.10"),
    ]  # fmt: skip
    # Long names leave room for those beside them; letters that no font has are no matter.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = ["Northern cardinal (Cardinalis)", "\u65e5\u672c", "c"]
        said = list(titles([1, 0, -1], [0.9, 0.8, 0.7], names))
    assert said[0] == (right, "Northern cardinal \N{HORIZONTAL ELLIPSIS} 0.90")
    assert said[1] == (wrong, "\u65e5\u672c 0.80")
