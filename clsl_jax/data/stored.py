"""Multi-label sets on disk in the layout of TensorFlow Datasets, without TensorFlow.

A prepared directory holds ArrayRecord files, `dataset_info.json`, `features.json` and
`metadata.json` as TFDS writes them, so that TFDS can read it too, and `index.npz`: all labels and
ids (nobody has to read gigabytes of images to know the labels) and the size of every file (a set
that was cut off is noticed when it is opened).

Record: `image` the encoded file, `labels` int8 [C] (1 positive, 0 negative, -1 unknown, 2
difficult), `id`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from clsl_jax.data import images as images_lib
from clsl_jax.errors import InputError

DIFFICULT = 2
INDEX_NAME = "index.npz"
_INCOMPLETE = ".incomplete-"
_STALE_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of a set to be stored.

    Attributes:
      image: the encoded file (JPEG, PNG, ...).
      labels: int8 [C]: 1 positive, 0 negative, -1 unknown, 2 difficult.
      id: names the image, unique in its split.
      content: what the fingerprint covers instead of `image`, so that it need not depend on the
        encoder.
    """

    image: bytes
    labels: np.ndarray
    id: str
    content: bytes | None = None


class MultiLabelBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes any multi-label set, given its splits as functions that yield examples.

    Rows keep the order in which the examples come. Metadata: `class_names`, `facts` and
    `fingerprint`, the SHA-256 over class names and, split by split, every example's content, labels
    and id.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        name: str,
        config: str,
        version: str,
        class_names: tuple[str, ...],
        splits: Mapping[str, Callable[[], Iterable[Example]]],
        description: str,
        licence: str,
        directory: str | os.PathLike,
    ):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self._class_names = class_names
        self._splits = splits
        self._description = description
        self._licence = licence
        self._digest = hashlib.sha256(json.dumps(class_names).encode())
        self.index: dict[str, Any] = {}
        self.labels: dict[str, np.ndarray] = {}
        super().__init__(
            data_dir=os.fspath(directory),
            config=tfds.core.BuilderConfig(name=config, version=self.VERSION),
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            license=self._licence,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "labels": tfds.features.Tensor(shape=(len(self._class_names),), dtype=np.int8),
                    "id": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(class_names=list(self._class_names)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterable[tuple[int, dict]]]:
        del dl_manager
        return {
            split: self._generate_examples(split, examples())
            for split, examples in self._splits.items()
        }

    def _generate_examples(
        self, split: str, examples: Iterable[Example]
    ) -> Iterable[tuple[int, dict]]:
        labels, ids = [], []
        self._digest.update(split.encode())
        for row, example in enumerate(examples):
            row_labels = np.asarray(example.labels, np.int8)
            self._digest.update(example.image if example.content is None else example.content)
            self._digest.update(row_labels.tobytes())
            self._digest.update(example.id.encode() + b"\0")
            labels.append(row_labels)
            ids.append(example.id)
            yield row, {"image": example.image, "labels": row_labels, "id": example.id}
        self.labels[split] = np.stack(labels)
        self.index[f"labels_{split}"] = self.labels[split]
        self.index[f"ids_{split}"] = np.array(ids)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Adds the fingerprint and what is only known at the end, and writes the index."""
        self.info.metadata.update(fingerprint=self._digest.hexdigest(), facts=dict(facts))
        self.info.metadata.save_metadata(self.data_dir)
        sizes = {
            path.name: path.stat().st_size
            for path in sorted(pathlib.Path(self.data_dir).iterdir())
            if path.name != INDEX_NAME
        }
        np.savez_compressed(
            os.path.join(self.data_dir, INDEX_NAME), sizes=json.dumps(sizes), **self.index
        )


def prepare(
    root: str | os.PathLike,
    *,
    name: str,
    config: str,
    version: str,
    class_names: tuple[str, ...],
    splits: Mapping[str, Callable[[], Iterable[Example]]],
    facts: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] = lambda labels: {},
    description: str = "",
    licence: str = "",
) -> pathlib.Path:
    """Writes a set to `root/name/config/version` unless it is there already.

    It is written beside its place and moved there in one step: a process killed half-way leaves
    nothing that looks whole, and of two that prepare the same set at once the first to finish wins.

    Args:
      root: directory of prepared sets; made if it does not exist.
      name, config, version: where under `root`.
      class_names: C names.
      splits: for each split a function that yields its examples.
      facts: of the labels of every split (int8 [N, C]); goes to the metadata as JSON.
      description, licence: for TFDS's own record.

    Returns:
      The prepared directory.

    Raises:
      InputError: the directory cannot be written.
    """
    home = pathlib.Path(root) / name
    final = home / config / version
    if final.is_dir():
        return final
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        temporary = home / f"{_INCOMPLETE}{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise InputError(
            f"{home}: prepared data cannot be written here ({error}); name another directory by "
            "data.dir or by the environment variable CLSL_CACHE_DIR."
        ) from error
    try:
        with _quiet():
            builder = MultiLabelBuilder(
                name=name,
                config=config,
                version=version,
                class_names=class_names,
                splits=splits,
                description=description,
                licence=licence,
                directory=temporary,
            )
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        builder.finish(facts(builder.labels))
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from talking of downloads: nothing is downloaded here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _sweep(home: pathlib.Path) -> None:
    """Removes what processes killed long ago left behind."""
    for path in home.glob(f"{_INCOMPLETE}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            pass


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of a prepared set without reading an image.

    Attributes:
      directory: where it lies.
      class_names: C names.
      fingerprint: SHA-256 of the whole content.
      facts: what its maker measured of it.
      labels: for each split int8 [N, C]: 1, 0, -1 unknown, 2 difficult.
      ids: for each split N names.
    """

    directory: pathlib.Path
    class_names: tuple[str, ...]
    fingerprint: str
    facts: dict[str, Any]
    labels: dict[str, np.ndarray]
    ids: dict[str, list[str]]


def _broken(directory: pathlib.Path, what: str) -> InputError:
    return InputError(
        f"{directory}: damaged prepared data: {what}. Delete it and prepare it again."
    )


def open_prepared(directory: str | os.PathLike) -> Prepared:
    """Reads everything but the images of a prepared directory.

    Raises:
      InputError: it is not a prepared directory, or a file of it is missing, cut off or unreadable.
    """
    directory = pathlib.Path(directory)
    if not (directory / INDEX_NAME).is_file() or not (directory / "dataset_info.json").is_file():
        raise InputError(
            f"{directory}: not a prepared data set (no dataset_info.json and {INDEX_NAME} in it)."
        )
    try:
        with np.load(directory / INDEX_NAME) as stored:
            index = {key: stored[key] for key in stored.files}
        sizes = json.loads(str(index.pop("sizes")))
    except Exception as error:
        raise _broken(directory, f"{INDEX_NAME} cannot be read ({error})") from error
    for name, size in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.exists() else "no file"
        if found != size:
            raise _broken(directory, f"{name} should have {size} bytes, found {found}")
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        labels = {k[len("labels_") :]: v for k, v in index.items() if k.startswith("labels_")}
        ids = {split: index[f"ids_{split}"].tolist() for split in labels}
        return Prepared(
            directory,
            tuple(metadata["class_names"]),
            metadata["fingerprint"],
            metadata["facts"],
            labels,
            ids,
        )
    except (KeyError, ValueError) as error:
        raise _broken(directory, f"metadata.json cannot be used ({error!r})") from error


class StoredImages:
    """The images of a split, read and decoded when asked for; opened anew in every process."""

    def __init__(self, directory: str | os.PathLike, split: str, length: int, image_size: int):
        self._directory = pathlib.Path(directory)
        self._split = split
        self._length = length
        self._image_size = image_size
        self._records: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        encoded = self._encoded(int(index))
        image = images_lib.decode_image(
            encoded, where=f"{self._directory}, {self._split} row {index}"
        )
        return {
            "image": images_lib.resize_image(image, self._image_size),
            "row": np.int32(index),
        }

    def _encoded(self, index: int) -> bytes:
        try:
            if self._records is None:
                self._records = tfds.builder_from_directory(self._directory).as_data_source(
                    self._split, decoders={"image": tfds.decode.SkipDecoding()}
                )
            return self._records[index]["image"]
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise _broken(
                self._directory, f"{self._split} row {index} cannot be read ({reason})"
            ) from error

    def in_memory(self, threads: int = 4) -> images_lib.MemoryImages:
        """Returns all images decoded: N x S x S x 3 bytes."""
        size = self._image_size
        decoded = np.empty((self._length, size, size, 3), np.uint8)

        def read(row: int) -> None:
            decoded[row] = self[row]["image"]

        if self._length:
            read(0)  # opens the files once, before there are threads
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read, range(1, self._length)):
                pass
        return images_lib.MemoryImages(decoded)
