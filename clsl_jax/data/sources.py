"""Data sets by name: images, labels and what must be left out of evaluation."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clsl_jax.data import images as images_lib
from clsl_jax.data import scenes, stored
from clsl_jax.data.splits import stratified_split
from clsl_jax.errors import InputError

# Sets that `load_dataset` reads from a directory somebody has prepared.
PREPARED_NAMES = ("voc2007", "voc2012", "coco2014", "nuswide", "vg500", "table")
NAMES = ("scenes", *PREPARED_NAMES)
# Up to this many bytes of decoded images a set is held in memory if nobody says otherwise.
_MEMORY_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a data set.

    Attributes:
      name: 'train', 'validation' or 'test'.
      images: random access: `len(images)`, `images[i]` -> {"image": uint8 [S, S, 3], "row": i}.
      labels: int8 [N, C]: 1 positive, 0 negative, -1 unknown to everybody.
      difficult: bool [N, C]: only present as a difficult object (the label is 0): left out of or
        counted as negative in evaluation, by convention.
      ids: N names of images.
    """

    name: str
    images: images_lib.Images
    labels: np.ndarray
    difficult: np.ndarray
    ids: list[str]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A multi-label data set.

    Attributes:
      name: as asked for.
      class_names: C names.
      fingerprint: SHA-256 over all images, labels and class names.
      train, validation, test: its splits.
      facts: what is worth reporting of it, as JSON values.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    train: Split
    validation: Split
    test: Split
    facts: dict[str, Any]


def cache_directory() -> pathlib.Path:
    """Where sets made by this package are kept: $CLSL_CACHE_DIR, else ~/.cache/clsl_jax."""
    chosen = os.environ.get("CLSL_CACHE_DIR")
    return pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".cache" / "clsl_jax"


def load_dataset(
    name: str,
    *,
    directory: str | os.PathLike | None = None,
    image_size: int,
    seed: int = 0,
    strength: str = "moderate",
    sizes: Mapping[str, int] | None = None,
    validation_fraction: float = 0.1,
    memory: bool | None = None,
) -> Dataset:
    """Loads a data set; `scenes` is composed at first use.

    Args:
      name: one of `NAMES`.
      directory: for `scenes` its cache, by default `cache_directory()`; for the others the
        directory that holds the prepared set.
      image_size: side S to which images are squashed, in pixels.
      seed: of the composition of `scenes`; of the validation split where a set has none.
      strength: of co-occurrence in `scenes`: 'moderate' or 'strong'.
      sizes: images of each split of `scenes`, by default `scenes.DEFAULT_SIZES`.
      validation_fraction: see `load_prepared`.
      memory: hold all images decoded in memory; by default where that takes at most 512 MiB.

    Raises:
      InputError: an unknown name or option, or data that is missing or damaged.
    """
    if name == "scenes":
        root = pathlib.Path(directory) if directory else cache_directory()
        prepared = scenes.prepare_scenes(root, seed=seed, strength=strength, sizes=sizes)
    elif name in PREPARED_NAMES:
        prepared = find_prepared(name, directory)
    else:
        raise InputError(f"data.name={name!r} is unknown; choose one of {', '.join(NAMES)}.")
    return load_prepared(
        prepared,
        name=name,
        image_size=image_size,
        seed=seed,
        validation_fraction=validation_fraction,
        memory=memory,
    )


def find_prepared(name: str, directory: str | os.PathLike | None) -> pathlib.Path:
    """Returns where `name` lies prepared: `directory`, or the newest directory/name/**/version.

    Raises:
      InputError: it is not there; says what was looked for and what to do.
    """
    if not directory:
        raise InputError(
            f"data.name={name!r} needs data.dir: the directory that holds the prepared set "
            f"({name}/VERSION/dataset_info.json)."
        )
    directory = pathlib.Path(directory)
    if (directory / "dataset_info.json").is_file():
        return directory
    found = [path.parent for path in (directory / name).glob("**/dataset_info.json")]
    found = [path for path in found if not any(part.startswith(".") for part in path.parts[-4:])]
    if not found:
        state = "does not exist" if not directory.exists() else "holds no prepared copy of it"
        raise InputError(
            f"data.name={name!r}: data.dir={directory} {state} (looked for "
            f"{directory / name}/VERSION/dataset_info.json). Prepare it with "
            f"'python -m clsl_jax.prepare --dataset={name} --source=... --out={directory}', or use "
            "data.name=scenes, which needs no download."
        )
    return max(found, key=_version)


def _version(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in path.name.split("."))


def load_prepared(
    directory: str | os.PathLike,
    *,
    name: str = "",
    image_size: int,
    seed: int = 0,
    validation_fraction: float = 0.1,
    memory: bool | None = None,
) -> Dataset:
    """Loads any set that `stored.prepare` wrote.

    Args:
      directory: with dataset_info.json in it.
      name: for the result; by default that of the directory.
      image_size: side S to which images are squashed, in pixels.
      seed: of the validation split where the set has none.
      validation_fraction: part of the training split held out where the set has no validation
        split; 0 trains on every image and validates on the same ones.
      memory: hold all images decoded in memory; by default where that takes at most 512 MiB.

    Raises:
      InputError: missing or damaged data, or a value out of range.
    """
    if image_size < 1:
        raise InputError(f"data.image_size={image_size}: expected at least 1 pixel.")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction={validation_fraction}: expected 0 <= it < 1.")
    prepared = stored.open_prepared(directory)
    if missing := {"train", "test"} - prepared.labels.keys():
        raise InputError(f"{directory}: has no split {', '.join(sorted(missing))}.")
    if memory is None:
        images = sum(len(labels) for labels in prepared.labels.values())
        memory = images * image_size**2 * 3 <= _MEMORY_BYTES
    splits = {split: _split(prepared, split, image_size, memory) for split in prepared.labels}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(
            splits["train"], prepared.labels["train"], validation_fraction, seed
        )
    return Dataset(
        name=name or pathlib.Path(directory).name,
        class_names=prepared.class_names,
        fingerprint=prepared.fingerprint,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        facts=prepared.facts,
    )


def _split(prepared: stored.Prepared, split: str, image_size: int, memory: bool) -> Split:
    raw = prepared.labels[split]
    images = stored.StoredImages(prepared, split, image_size)
    return Split(
        name=split,
        images=images.in_memory() if memory else images,
        labels=np.where(raw == stored.DIFFICULT, 0, raw).astype(np.int8),
        difficult=raw == stored.DIFFICULT,
        ids=prepared.ids[split],
    )


def _hold_out(
    train: Split, raw_labels: np.ndarray, fraction: float, seed: int
) -> tuple[Split, Split]:
    """Splits off round(fraction * N) images, stratified by label; both keep the order of rows."""
    if fraction == 0:
        return train, dataclasses.replace(train, name="validation")
    kept, held = stratified_split(raw_labels, fraction, seed)
    return _rows(train, "train", kept), _rows(train, "validation", held)


def _rows(split: Split, name: str, rows: np.ndarray) -> Split:
    return Split(
        name=name,
        images=images_lib.Subset(split.images, rows),
        labels=split.labels[rows],
        difficult=split.difficult[rows],
        ids=[split.ids[row] for row in rows],
    )
