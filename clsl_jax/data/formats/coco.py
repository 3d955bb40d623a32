"""MS-COCO 2014 from its instances files.

    annotations/instances_train2014.json  instances_val2014.json
    train2014/COCO_train2014_000000000009.jpg  val2014/…      (or below images/)

Every annotation is a label of its image, crowds (`iscrowd`) too. Images without annotation are
kept. Category numbers have gaps (1 to 90); classes are in the order of those numbers.
"""

import itertools
import json
import pathlib
from typing import Any

import numpy as np

from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing, Published
from clsl_jax.errors import InputError

_SETS = {"train": "train2014", "test": "val2014"}
# Outlines are most of the file; without them it needs a tenth of the memory.
_KEPT = {
    "images",
    "annotations",
    "categories",
    "id",
    "file_name",
    "image_id",
    "category_id",
    "name",
}


def read_coco(source: pathlib.Path) -> Listing:
    """Lists MS-COCO 2014: train2014 for training, val2014 for testing.

    Args:
      source: the folder that holds `annotations` and the image folders.

    Raises:
      InputError: files are missing or say something that cannot be.
    """
    contents = {split: _load(source, images) for split, images in _SETS.items()}
    categories = {split: _categories(*content) for split, content in contents.items()}
    if categories["train"] != categories["test"]:
        raise InputError(
            f"{contents['train'][0]} and {contents['test'][0]} list different categories."
        )
    numbers = {number: column for column, (number, _) in enumerate(categories["train"])}
    splits = {
        split: _image_list(source, _SETS[split], *content, numbers)
        for split, content in contents.items()
    }
    return Listing(
        name="coco2014",
        class_names=tuple(name for _, name in categories["train"]),
        splits=splits,
        # 82,081 and 40,137 images have a label.
        published=Published(
            classes=80,
            images={"train": 82783, "test": 40504},
            without_labels={"train": 82783 - 82081, "test": 40504 - 40137},
        ),
        description="MS-COCO 2014: train2014 for training, val2014 for testing.",
        licence="Annotations CC BY 4.0; images under Flickr's terms of use.",
    )


def _load(source: pathlib.Path, images: str) -> tuple[pathlib.Path, dict[str, Any]]:
    path = listing.existing(
        source / "annotations" / f"instances_{images}.json",
        source / f"instances_{images}.json",
        what=f"the annotations of {images}",
    )
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(
                file, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k in _KEPT}
            )
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise InputError(f"{path}: expected lists {', '.join(keys)}: is it an instances file?")
    return path, content


def _categories(path: pathlib.Path, content: dict[str, Any]) -> list[tuple[int, str]]:
    found = sorted(_fields(path, content, "categories", id=int, name=str))
    listing.check_unique([name for _, name in found], str(path), "classes")
    for (number, name), (after, other) in itertools.pairwise(found):
        if number == after:
            raise InputError(
                f"{path}: categories {name!r} and {other!r} have the same id {number}."
            )
    return found


def _fields(
    path: pathlib.Path, content: dict[str, Any], what: str, **types: type
) -> list[tuple[Any, ...]]:
    """Returns the values of some keys in every entry of a list, each of its type."""
    try:
        found = [tuple(entry[key] for key in types) for entry in content[what]]
    except (KeyError, TypeError):
        found = [()]
    expected = tuple(types.values())
    if any(tuple(map(type, row)) != expected for row in found):
        raise InputError(
            f"{path}: one of {what} lacks {' or '.join(types)}, or has it of another type "
            f"(expected {', '.join(kind.__name__ for kind in expected)})."
        )
    return found


def _image_list(
    source: pathlib.Path,
    images: str,
    path: pathlib.Path,
    content: dict[str, Any],
    columns: dict[int, int],
) -> ImageList:
    folder = listing.existing(
        source / images, source / "images" / images, what=f"the images of {images}"
    )
    entries = sorted(_fields(path, content, "images", id=int, file_name=str))
    pairs = _fields(path, content, "annotations", image_id=int, category_id=int)
    names = [name for _, name in entries]
    listing.check_file_names(names, str(path))
    row_of = {number: row for row, (number, _) in enumerate(entries)}
    if len(row_of) < len(entries):
        raise InputError(f"{path}: images have the same id.")
    labels = np.zeros((len(entries), len(columns)), np.int8)
    for image, category in pairs:
        if image not in row_of or category not in columns:
            raise InputError(
                f"{path}: an annotation names image {image} and category {category}, which the "
                "file does not list."
            )
        labels[row_of[image], columns[category]] = 1
    ids = [pathlib.PurePosixPath(name).stem for name in names]
    listing.check_unique(ids, f"{path}, by file names without folder and ending")
    return ImageList([folder / name for name in names], ids, labels)
