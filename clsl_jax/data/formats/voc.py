"""PASCAL VOC 2007 and 2012 from their development kit.

    VOCdevkit/VOC2007/Annotations/000005.xml        objects with <name> and <difficult>
                      ImageSets/Main/trainval.txt   an image name a line
                      ImageSets/Main/cat_test.txt   an image name and 1, -1 or 0 (difficult) a line
                      JPEGImages/000005.jpg

A class whose objects in an image are all difficult is neither positive nor negative there. The
body parts that VOC nests inside objects (`<part><name>head`) are no objects.
"""

import os
import pathlib
import xml.etree.ElementTree as ElementTree

import numpy as np

from clsl_jax.data import stored
from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing, Published
from clsl_jax.errors import InputError

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
TEST_CHOICES = ("auto", "test", "val")
_LICENCE = "Flickr's terms of use; see http://host.robots.ox.ac.uk/pascal/VOC/"
_INDEX = {name: index for index, name in enumerate(CLASS_NAMES)}
# Sets of images, and labels of objects that are not difficult, from the makers' statistics pages.
_IMAGES = {
    "2007": {"trainval": 5011, "test": 4952},
    "2012": {"trainval": 11540, "test": 10991, "train": 5717, "val": 5823},
}
_LABELS = {"2007": {"trainval": 7306, "test": 7013}, "2012": {}}


def read_voc(source: pathlib.Path, *, year: str, test: str = "auto") -> Listing:
    """Lists VOC 2007 or 2012.

    VOC 2012's test labels were never published in full. Without them its `train` set is for
    training and its `val` set for testing; with them `trainval` and `test`.

    Args:
      source: the VOC20xx folder, the VOCdevkit folder that holds it, or the folder above that.
      year: '2007' or '2012'.
      test: 'test' needs the test labels, 'val' ignores them, 'auto' uses them if they are there.

    Raises:
      InputError: files are missing or say something that cannot be.
    """
    name = f"VOC{year}"
    if test == "val" and year != "2012":
        raise InputError(f"test='val': {name} has labels of its own test split; leave it out.")
    root = listing.existing(
        source / "VOCdevkit" / name / "ImageSets" / "Main",
        source / name / "ImageSets" / "Main",
        source / "ImageSets" / "Main",
        what=f"the image sets of {name}",
    ).parent.parent
    notes = []
    sets = {"train": "trainval", "test": "test"}
    if test == "val":
        sets = {"train": "train", "test": "val"}
    elif test == "auto" and year == "2012" and not _has_test_labels(root):
        sets = {"train": "train", "test": "val"}
        notes.append("VOC2012's test labels are not there: trained on train, tested on val.")
    splits = {split: _image_set(root, image_set, notes) for split, image_set in sets.items()}
    return Listing(
        name=f"voc{year}",
        class_names=CLASS_NAMES,
        splits=splits,
        published=Published(
            classes=len(CLASS_NAMES),
            images={split: _IMAGES[year][s] for split, s in sets.items()},
            labels={split: _LABELS[year][s] for split, s in sets.items() if s in _LABELS[year]},
        ),
        notes=notes,
        description=f"PASCAL VOC {year}: {sets['train']} for training, {sets['test']} for testing.",
        licence=_LICENCE,
    )


def _names(root: pathlib.Path, image_set: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{image_set}.txt"
    names = [line.split()[0] for line in listing.read_lines(path)]
    listing.check_file_names(names, str(path))
    return names


def _has_test_labels(root: pathlib.Path) -> bool:
    if not os.path.exists(root / "ImageSets" / "Main" / "test.txt"):
        return False
    names = _names(root, "test")
    # The public test archive annotates the people of a few images only.
    annotated = all(os.path.exists(root / "Annotations" / f"{name}.xml") for name in names)
    return annotated or _class_files(root, "test", names) is not None


def _image_set(root: pathlib.Path, image_set: str, notes: list[str]) -> ImageList:
    names = _names(root, image_set)
    files = [root / "Annotations" / f"{name}.xml" for name in names]
    without = [path for path in files if not os.path.exists(path)]
    from_files = _class_files(root, image_set, names)
    if not without:
        labels = np.stack([_labels(path) for path in files])
        if from_files is not None and (wrong := int((labels != from_files).sum())):
            notes.append(
                f"{image_set}: {wrong} labels of ImageSets/Main/*_{image_set}.txt differ from "
                "those of the annotations; the annotations are used."
            )
    elif from_files is not None:
        labels = from_files
        notes.append(f"{image_set}: labels are from ImageSets/Main/*_{image_set}.txt.")
    else:
        raise InputError(
            f"{root}: {len(without)} of the {len(names)} images of {image_set} have neither an "
            f"annotation (the first: {without[0]}) nor lines in ImageSets/Main/CLASS_{image_set}"
            ".txt. Unpack the archive that holds them."
        )
    paths = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    return ImageList(paths, names, labels)


def _labels(path: pathlib.Path) -> np.ndarray:
    """Reads the labels of an annotation, int8 [C]."""
    labels = np.zeros(len(CLASS_NAMES), np.int8)
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # encodings too
        raise InputError(f"{path} cannot be read ({error}).") from None
    for found in objects:
        name = (found.findtext("name") or "").strip()
        if name not in _INDEX:
            raise InputError(
                f"{path}: an object is called {name!r}; expected one of {', '.join(CLASS_NAMES)}."
            )
        # Later years leave <difficult> out of some annotations.
        difficult = (found.findtext("difficult") or "0").strip() == "1"
        if not difficult:
            labels[_INDEX[name]] = 1
        elif labels[_INDEX[name]] != 1:
            labels[_INDEX[name]] = stored.DIFFICULT
    return labels


def _class_files(root: pathlib.Path, image_set: str, names: list[str]) -> np.ndarray | None:
    """Reads ImageSets/Main/CLASS_SET.txt, int8 [N, C]; None if they are not all there or empty."""
    paths = [root / "ImageSets" / "Main" / f"{name}_{image_set}.txt" for name in CLASS_NAMES]
    if not all(map(os.path.exists, paths)):
        return None
    meaning = {"1": 1, "-1": 0, "0": stored.DIFFICULT}
    row_of = {name: row for row, name in enumerate(names)}
    labels = np.full((len(names), len(CLASS_NAMES)), -1, np.int8)
    for column, path in enumerate(paths):
        for number, line in enumerate(listing.read_lines(path), start=1):
            cells = line.split()
            if len(cells) != 2 or cells[0] not in row_of or cells[1] not in meaning:
                raise InputError(
                    f"{path}, line {number}: {line!r}; expected an image of {image_set}.txt and 1, "
                    "-1 or 0."
                )
            labels[row_of[cells[0]], column] = meaning[cells[1]]
    # Files handed out before the labels were public say -1 or 0 everywhere.
    return labels if (labels != -1).all() and (labels == 1).any() else None
