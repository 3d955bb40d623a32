"""Writes a folder of images with a partly filled table of labels, as somebody's own would be.

python -m clsl_jax.example --out=DIR

DIR/images/*.jpg are scenes of garments and digits; DIR/labels.csv has a row for each, a column for
each of 20 classes, and 1, 0 or nothing in a cell. `--faults` plants five errors, to see what
`clsl_jax.prepare` says of them.
Exit status: 0 done; 2 input that cannot be used.
"""

import csv
import pathlib
import shlex
from collections.abc import Sequence

import cv2
import numpy as np
from absl import flags

from clsl_jax import command_line
from clsl_jax.data import partial, scenes
from clsl_jax.errors import InputError, writing

TABLE_NAME = "labels.csv"
SIZE = 128
_QUALITY = 90
# Enough rows for the faults, and for a test split that has something of everything.
_FEWEST, _MOST = 20, 10_000
# So short that not even the size of the image is left.
_CUT_BYTES = 300


def write_example(
    out: pathlib.Path, *, images: int = 200, unknown: float = 0.3, faults: bool = False, seed: int
) -> list[str]:
    """Writes the folder.

    Args:
      out: does not exist yet, or is empty.
      images: how many, 20 to 10,000.
      unknown: share of the cells that are empty, in [0, 1).
      faults: plant five errors.
      seed: of the scenes and of which cells are empty.

    Returns:
      What is wrong on purpose, a line each; empty without `faults`.

    Raises:
      InputError: a number is out of range, something is in `out` already, or it cannot be written.
    """
    if not _FEWEST <= images <= _MOST:
        raise InputError(f"--images={images}: expected {_FEWEST} to {_MOST:,}.")
    if not 0 <= unknown < 1:
        raise InputError(f"--unknown={unknown}: expected 0 or more and less than 1.")
    composed = _compose(images, seed)
    labels = np.stack([labels for _, labels in composed])
    mask = partial.known_mask("uniform", labels, 1 - unknown, seed)
    files = {f"images/{row:05d}.jpg": _encode(image) for row, (image, _) in enumerate(composed)}
    rows = [
        [name, *("" if label < 0 else str(label) for label in cells)]
        for name, cells in zip(files, partial.annotate(labels, mask).tolist(), strict=True)
    ]
    planted = _plant(rows, files) if faults else []
    with writing(f"--out={out}", "; name another place"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out={out} is there already: name a new or an empty folder.")
        (out / "images").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
        # Last, so that a folder with a table is whole.
        with open(out / TABLE_NAME, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["image", *scenes.CLASS_NAMES], *rows])
    return planted


def _compose(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns scenes uint8 [64, 64, 3] and their labels int8 [20]."""
    parts = scenes.load_parts("train")
    return [
        scenes.compose_scene(parts, seed=seed, split="train", index=row, strength="moderate")[:2]
        for row in range(count)
    ]


def _encode(image: np.ndarray) -> bytes:
    """Returns a JPEG of 128 x 128 pixels of uint8 [64, 64, 3]."""
    large = cv2.resize(image[:, :, ::-1], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()


def _plant(rows: list[list[str]], files: dict[str, bytes]) -> list[str]:
    """Puts five errors into table and files; returns what they are."""
    at = [round(share * len(rows)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    rows[at[0]][3] = "maybe"
    rows[at[1]][7] = "2"
    missing = rows[at[2]][0]
    del files[missing]
    replaced, rows[at[3]][0] = rows[at[3]][0], rows[at[3] - 1][0]
    del files[replaced]
    cut = rows[at[4]][0]
    files[cut] = files[cut][:_CUT_BYTES]
    # A spreadsheet counts the header as row 1.
    row = [number + 2 for number in at]
    return [
        f"row {row[0]}: 'maybe' for {scenes.CLASS_NAMES[2]!r}",
        f"row {row[1]}: 2 for {scenes.CLASS_NAMES[6]!r}",
        f"row {row[2]}: {missing} does not exist",
        f"row {row[3]}: {rows[at[3]][0]}, the image of row {row[3] - 1}",
        f"row {row[4]}: {cut} is cut off",
    ]


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("out", None, "Folder to write; made if it does not exist.")
    flags.DEFINE_integer("images", 200, "How many.")
    flags.DEFINE_float("unknown", 0.3, "Share of the cells that are empty.")
    flags.DEFINE_bool("faults", False, "Plant five errors in the table and the images.")
    flags.DEFINE_integer(
        "seed", 0, "Of the images and of which cells are empty.", 0, upper_bound=2**32 - 1
    )


def _work(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    command_line.refuse_arguments(arguments)
    command_line.require(values, "out", "DIR", "the folder to write")
    out = pathlib.Path(values.out)
    planted = write_example(
        out, images=values.images, unknown=values.unknown, faults=values.faults, seed=values.seed
    )
    classes = len(scenes.CLASS_NAMES)
    print(
        f"{out / 'images'}: scenes of garments and digits, {SIZE} x {SIZE} pixels\n"
        f"{out / TABLE_NAME}: {values.images:,} rows, {classes} classes, "
        f"{100 * values.unknown:g} % of the cells empty"
    )
    if planted:
        print("Wrong on purpose:\n  " + "\n  ".join(planted))
    source = shlex.quote(str(out))
    print(f"Next: python -m clsl_jax.prepare --dataset=table --source={source} --out=DATA")


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, _work)


if __name__ == "__main__":
    cli()
