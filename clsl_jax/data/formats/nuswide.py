r"""NUS-WIDE from its official lists.

    ImageList/TrainImagelist.txt  TestImagelist.txt     actor\0001_2124494179.jpg a line
    ConceptsList/Concepts81.txt                         a concept a line (or in the main folder)
    Groundtruth/TrainTestLabels/Labels_actor_Train.txt  1 or 0 a line, in the order of the list
    Flickr/actor/0001_2124494179.jpg                    (or images/…, or all in one folder)

The web has lost many of the images: those that are not on disk are left out and reported.
"""

import os
import pathlib

import numpy as np

from clsl_jax.data.formats import listing
from clsl_jax.data.formats.listing import ImageList, Listing, Published
from clsl_jax.errors import InputError

_SETS = {"train": "Train", "test": "Test"}
_IMAGE_FOLDERS = ("Flickr", "flickr", "images", "Images", "image")


def read_nuswide(source: pathlib.Path) -> Listing:
    """Lists NUS-WIDE.

    Args:
      source: the folder that holds ImageList, Groundtruth and the images.

    Raises:
      InputError: files are missing, or differ in length.
    """
    concepts_path = listing.existing(
        source / "ConceptsList" / "Concepts81.txt",
        source / "Concepts81.txt",
        source / "ConceptsList" / "ConceptsList" / "Concepts81.txt",
        what="the list of concepts",
    )
    concepts = listing.read_lines(concepts_path)
    listing.check_file_names(concepts, str(concepts_path), "classes")
    folders = (source / name for name in _IMAGE_FOLDERS)
    folder = next(filter(os.path.isdir, folders), source)
    return Listing(
        name="nuswide",
        class_names=tuple(concepts),
        splits={
            split: _image_list(source, folder, concepts, part) for split, part in _SETS.items()
        },
        published=Published(classes=81, images={"train": 161789, "test": 107859}),
        description="NUS-WIDE: the official lists of training and test images, 81 concepts.",
        licence="For research; images under Flickr's terms of use.",
    )


def _image_list(
    source: pathlib.Path, folder: pathlib.Path, concepts: list[str], part: str
) -> ImageList:
    path = listing.existing(
        source / "ImageList" / f"{part}Imagelist.txt",
        source / "ImageList" / "ImageList" / f"{part}Imagelist.txt",
        what=f"the list of images for {part.lower()}",
    )
    names = [line.replace("\\", "/") for line in listing.read_lines(path)]
    listing.check_file_names(names, str(path))
    truth = listing.existing(
        source / "Groundtruth" / "TrainTestLabels",
        source / "Groundtruth" / "Groundtruth" / "TrainTestLabels",
        source / "TrainTestLabels",
        what="the labels",
    )
    labels = np.zeros((len(names), len(concepts)), np.int8)
    for column, concept in enumerate(concepts):
        labels[:, column] = _labels(truth / f"Labels_{concept}_{part}.txt", path, len(names))
    above = [folder / name.split("/")[0] for name in names[:1000] if "/" in name]
    nested = any(map(os.path.isdir, above))
    paths = [folder / (name if nested else name.rsplit("/", 1)[-1]) for name in names]
    return ImageList(paths, names, labels)


def _labels(path: pathlib.Path, list_path: pathlib.Path, count: int) -> np.ndarray:
    lines = listing.read_lines(path)
    if len(lines) != count:
        raise InputError(f"{path} has {len(lines)} lines, {list_path} lists {count} images.")
    wrong = next((i for i, line in enumerate(lines) if line not in ("0", "1")), None)
    if wrong is not None:
        raise InputError(f"{path}, line {wrong + 1}: {lines[wrong]!r}; expected 0 or 1.")
    return np.array([line == "1" for line in lines], np.int8)
