"""Data sets by name: images, labels and what must be left out of evaluation."""

import dataclasses
import math
import os
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clsl_jax.data import cache as cache_lib
from clsl_jax.data import images as images_lib
from clsl_jax.data import scenes, stored
from clsl_jax.data.formats import listing
from clsl_jax.data.splits import SPLITS, stratified_split
from clsl_jax.errors import InputError

# Sets that `load_dataset` reads from a directory somebody has prepared.
PREPARED_NAMES = ("voc2007", "voc2012", "coco2014", "nuswide", "vg500", "table")
NAMES = ("scenes", *PREPARED_NAMES)
CACHES = ("auto", "none", *cache_lib.KINDS)
WITHOUT_LABELS = ("keep", "drop")


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a data set.

    Attributes:
      name: 'train', 'validation' or 'test'.
      images: random access: `len(images)`, `images[i]` -> {"image": uint8 [S, S, 3], "row": i}; in
        place of pixels perhaps a backbone's features, float16 [h, w, D].
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
      upright: whether images are turned as their EXIF tag says; the benchmark sets are read as they
        are stored, people's own photographs are turned.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    train: Split
    validation: Split
    test: Split
    facts: dict[str, Any]
    upright: bool = False

    @property
    def validates_on_train(self) -> bool:
        """Whether the validation images are the training images (validation_fraction=0)."""
        return self.validation.ids == self.train.ids


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
    cache: str = "auto",
    cache_gb: float = 0.5,
    without_labels: str = "keep",
    report: Callable[[str], None] = lambda line: None,
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
      validation_fraction, cache, cache_gb, without_labels, report: see `load_prepared`.

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
        cache=cache,
        cache_gb=cache_gb,
        without_labels=without_labels,
        report=report,
    )


def find_prepared(name: str, directory: str | os.PathLike | None) -> pathlib.Path:
    """Returns where `name` lies prepared: `directory`, or the newest directory/name/**/version.

    Raises:
      InputError: it is not there; says what was looked for and what to do.
    """
    if not directory:
        raise InputError(
            f"data.name={name!r} needs data.dir: the directory that holds the prepared set "
            f"({name}/VERSION/dataset_info.json). Make it by `python -m clsl_jax.prepare "
            f"--dataset={name} --source=... --out=DIR` and add --config.data.dir=DIR."
        )
    directory = pathlib.Path(directory)
    if os.path.isfile(directory / "dataset_info.json"):
        return directory
    home = directory / name
    found = [p.parent for p in home.glob("**/dataset_info.json")] if os.path.isdir(home) else []
    found = [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(home).parts)
    ]
    if not found:
        state = "holds no prepared copy of it"
        if not os.path.isdir(directory) or not os.access(directory, os.R_OK | os.X_OK):
            state = "does not exist or may not be read"
        raise InputError(
            f"data.name={name!r}: data.dir={directory} {state} (looked for "
            f"{home}/VERSION/dataset_info.json). Prepare it with `python -m clsl_jax.prepare "
            f"--dataset={name} --source=... --out={shlex.quote(str(directory))}`, or use "
            "data.name=scenes, which needs no download."
        )
    return max(found, key=_version)


def _version(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in path.name.split("."))


def is_upright(name: str) -> bool:
    """Returns whether images of a set are turned upright (see `Dataset`)."""
    return name == "table"


def load_prepared(
    directory: str | os.PathLike,
    *,
    name: str = "",
    image_size: int,
    seed: int = 0,
    validation_fraction: float = 0.1,
    cache: str = "auto",
    cache_gb: float = 0.5,
    without_labels: str = "keep",
    report: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Loads any set that `stored.prepare` wrote.

    Training images are `images.Tolerant`: one that cannot be read is replaced by its neighbour.
    Those of the other splits are strict: an image that cannot be read is an error.

    Args:
      directory: with dataset_info.json in it.
      name: for the result; by default that of the directory.
      image_size: side S to which images are squashed, in pixels.
      seed: of the validation split where the set has none.
      validation_fraction: part of the training split held out where the set has no validation
        split; 0 trains on every image and validates on the same ones.
      cache: where images are held decoded: 'memory', 'disk' (in cache_directory()/decoded), 'none',
        or 'auto': memory if all of them fit within the limit, else none. Pixels are the same.
      cache_gb: limit of all splits together in units of 2^30 bytes. Where it is too small for all
        images, training images come first.
      without_labels: what becomes of images without any positive or unknown label, in every split
        and before a validation split is held out: 'keep' or 'drop'.
      report: takes a line when decoded images are about to be written to disk.

    Raises:
      InputError: missing or damaged data, or a value out of range.
    """
    _check_options(image_size, validation_fraction, cache, cache_gb, without_labels)
    prepared = stored.open_prepared(directory)
    if missing := {"train", "test"} - prepared.labels.keys():
        raise InputError(f"{directory}: has no split {', '.join(sorted(missing))}.")
    upright = is_upright(name)
    images = _images(prepared, image_size, upright, cache, int(cache_gb * 2**30), report)
    kept = {split: _kept(prepared.labels[split], without_labels) for split in images}
    splits = {split: _split(prepared, split, images[split], kept[split]) for split in images}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(
            splits["train"], prepared, kept["train"], validation_fraction, seed
        )
    train = splits["train"]
    return Dataset(
        name=name or pathlib.Path(directory).name,
        class_names=prepared.class_names,
        fingerprint=prepared.fingerprint,
        train=dataclasses.replace(train, images=images_lib.Tolerant(train.images)),
        validation=splits["validation"],
        test=splits["test"],
        facts={
            **prepared.facts,
            "without_labels_rule": without_labels,
            "dropped_without_labels": {
                split: len(prepared.ids[split]) - len(rows) for split, rows in kept.items()
            },
            "decoding": images_lib.decoding(),
        },
        upright=upright,
    )


def _check_options(
    image_size: int, validation_fraction: float, cache: str, cache_gb: float, without_labels: str
) -> None:
    if image_size < 1:
        raise InputError(f"data.image_size={image_size}: expected at least 1 pixel.")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction={validation_fraction}: expected 0 <= it < 1.")
    if cache not in CACHES:
        raise InputError(f"data.cache={cache!r}: expected one of {', '.join(CACHES)}.")
    if not 0 <= cache_gb < math.inf:
        raise InputError(f"data.cache_gb={cache_gb}: expected a finite number of at least 0.")
    if without_labels not in WITHOUT_LABELS:
        raise InputError(
            f"data.without_labels={without_labels!r}: expected one of {', '.join(WITHOUT_LABELS)}."
        )


def _images(
    prepared: stored.Prepared,
    image_size: int,
    upright: bool,
    cache: str,
    limit_bytes: int,
    report: Callable[[str], None],
) -> dict[str, images_lib.Images]:
    """Returns the images of every split, held decoded as far as the limit allows."""
    splits = [split for split in SPLITS if split in prepared.labels]
    if cache == "auto":
        total = sum(len(prepared.ids[split]) for split in splits)
        fits = cache_lib.held_images(total, image_size, limit_bytes) == total
        cache = "memory" if fits else "none"
    images: dict[str, images_lib.Images] = {}
    turned = "-upright" if upright else ""
    for split in splits:
        images[split] = stored.StoredImages(prepared, split, image_size, upright=upright)
        if cache == "none":
            continue
        held = cache_lib.held_images(len(images[split]), image_size, limit_bytes)
        images[split] = cache_lib.cached(
            images[split],
            kind=cache,
            limit_bytes=limit_bytes,
            image_size=image_size,
            path=cache_directory() / "decoded" / f"{prepared.fingerprint}-{split}{turned}",
            report=report,
        )
        limit_bytes -= held * image_size**2 * 3
    return images


def _kept(raw_labels: np.ndarray, without_labels: str) -> np.ndarray:
    """Returns the rows that stay, ascending."""
    if without_labels == "keep":
        return np.arange(len(raw_labels))
    return np.flatnonzero(~listing.without_labels(raw_labels))


def _split(
    prepared: stored.Prepared, split: str, images: images_lib.Images, kept: np.ndarray
) -> Split:
    """Returns a split of the rows `kept`, in ascending order."""
    raw = prepared.labels[split]
    whole = Split(
        name=split,
        images=images,
        labels=np.where(raw == stored.DIFFICULT, 0, raw).astype(np.int8),
        difficult=raw == stored.DIFFICULT,
        ids=prepared.ids[split],
    )
    if not len(kept):
        raise InputError(
            f"{prepared.directory}: no image of split {split} has a label; use "
            "data.without_labels=keep."
        )
    return whole if len(kept) == len(raw) else _rows(whole, split, kept)


def _hold_out(
    train: Split, prepared: stored.Prepared, rows: np.ndarray, fraction: float, seed: int
) -> tuple[Split, Split]:
    """Splits off round(fraction * N) images, stratified by label; both keep the order of rows.

    Copies of an image stay together, for which there may be fewer.
    """
    if fraction == 0:
        return train, dataclasses.replace(train, name="validation")
    raw_labels, copies = prepared.labels["train"], prepared.copies["train"]
    groups = np.arange(len(raw_labels))
    groups[copies[:, 0]] = copies[:, 1]
    kept, held = stratified_split(raw_labels[rows], fraction, seed, groups[rows])
    return _rows(train, "train", kept), _rows(train, "validation", held)


def _rows(split: Split, name: str, rows: np.ndarray) -> Split:
    return Split(
        name=name,
        images=images_lib.Subset(split.images, rows),
        labels=split.labels[rows],
        difficult=split.difficult[rows],
        ids=[split.ids[row] for row in rows],
    )
