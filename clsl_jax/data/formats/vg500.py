"""Visual Genome with 500 classes, from the partition files of SSGRL (arXiv 1908.07325).

    train_list_500.txt  test_list_500.txt    2412620.jpg a line
    vg_category_500_labels_index.json        {"2412620.jpg": [0, 17, …], …}, numbers below 500
    VG_100K/2412620.jpg  VG_100K_2/…         images, in either folder

The three partition files lie in the main folder or in `ssgrl_partition`. They number the classes
and do not name them: give `--class_names` a file with 500 names, in that order, if label text is to
be embedded; without it the classes are called `category 0` to `category 499`.
"""

import json
import os
import pathlib

import numpy as np

from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing, Published
from clsl_jax.errors import InputError

CLASSES = 500
_SETS = {"train": "train_list_500.txt", "test": "test_list_500.txt"}
_LABELS = "vg_category_500_labels_index.json"
_FOLDERS = ("VG_100K", "VG_100K_2", "images")


def read_vg500(source: pathlib.Path, *, class_names: pathlib.Path | None = None) -> Listing:
    """Lists Visual Genome 500.

    Args:
      source: the folder that holds the partition files and the image folders.
      class_names: text file with 500 names, one a line.

    Raises:
      InputError: files are missing or say something that cannot be.
    """
    names = tuple(f"category {number}" for number in range(CLASSES))
    notes = ["The partition files do not name the classes; --class_names=FILE would."]
    if class_names is not None:
        names, notes = tuple(listing.read_lines(class_names)), []
        listing.check_unique(names, str(class_names), "classes")
        if len(names) != CLASSES:
            raise InputError(f"{class_names} holds {len(names)} class names, expected {CLASSES}.")
    labels_path = _partition_file(source, _LABELS)
    try:
        positives = json.loads(labels_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{labels_path} cannot be read ({error}).") from None
    if not isinstance(positives, dict):
        raise InputError(f"{labels_path}: expected image names with lists of class numbers.")
    # Looked up once: asking the disk for each image in each folder takes minutes over a network.
    folders = [source / name for name in _FOLDERS if os.path.isdir(source / name)] or [source]
    try:
        place = {name: folder for folder in reversed(folders) for name in os.listdir(folder)}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from None
    return Listing(
        name="vg500",
        class_names=names,
        splits={
            split: _image_list(
                _partition_file(source, file), labels_path, positives, place, folders
            )
            for split, file in _SETS.items()
        },
        # SSGRL, section 4.1.
        published=Published(classes=CLASSES, images={"train": 98249, "test": 10000}),
        notes=notes,
        description="Visual Genome, 500 classes: SSGRL's partition.",
        licence="CC BY 4.0",
    )


def _partition_file(source: pathlib.Path, name: str) -> pathlib.Path:
    return listing.existing(
        source / name, source / "ssgrl_partition" / name, what="a partition file of SSGRL"
    )


def _image_list(
    path: pathlib.Path,
    labels_path: pathlib.Path,
    positives: dict[str, list[int]],
    place: dict[str, pathlib.Path],
    folders: list[pathlib.Path],
) -> ImageList:
    names = [line.split()[0] for line in listing.read_lines(path)]
    listing.check_file_names(names, str(path))
    labels = np.zeros((len(names), CLASSES), np.int8)
    for row, name in enumerate(names):
        numbers = positives.get(name)
        if not isinstance(numbers, list):
            raise InputError(f"{labels_path} has no labels for {name}, which {path} lists.")
        for number in numbers:
            if type(number) is not int or not 0 <= number < CLASSES:
                raise InputError(
                    f"{labels_path}: {name} has class {number!r}; expected 0 to {CLASSES - 1}."
                )
            labels[row, number] = 1
    return ImageList([place.get(name, folders[0]) / name for name in names], names, labels)
