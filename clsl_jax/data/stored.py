"""Multi-label sets on disk in the layout of TensorFlow Datasets, without TensorFlow.

A prepared directory holds ArrayRecord files, `dataset_info.json`, `features.json` and
`metadata.json` as TFDS writes them, so that TFDS can read it too, and `index.npz`: all labels and
ids (nobody has to read gigabytes of images to know the labels), which rows hold an image that an
earlier one holds, and the size of every file (a set that was cut off is noticed when it is opened;
ArrayRecord's own checksums notice changed bytes).

Record: `image` the encoded file, `labels` int8 [C] (1 positive, 0 negative, -1 unknown, 2
difficult), `id`. The fingerprint is a SHA-256 of the class names and, split by split, of every
example's content (by its own SHA-256), labels and id.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, example_serializer
from tensorflow_datasets.core import splits as tfds_splits

from clsl_jax import atomic, npz
from clsl_jax.data import images as images_lib
from clsl_jax.data import shards
from clsl_jax.data.shards import Example
from clsl_jax.errors import InputError, first_line, writing

DIFFICULT = 2
INDEX_NAME = "index.npz"
_ELSEWHERE = (
    "name another directory: for `prepare` by --out, else by data.dir or by the environment "
    "variable CLSL_CACHE_DIR"
)
_INCOMPLETE = ".incomplete-"


def prepare(
    root: str | os.PathLike,
    *,
    name: str,
    config: str,
    version: str,
    class_names: tuple[str, ...],
    splits: Mapping[str, Callable[[], Iterable[Example]] | Sequence[Example]],
    facts: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] = lambda labels: {},
    description: str = "",
    licence: str = "",
    resume: str = "",
    shard_bytes: int = shards.SHARD_BYTES,
) -> pathlib.Path:
    """Writes a set to `root/name/config/version` unless it is there already.

    It is written beside its place and moved there in one step: a process killed half-way leaves
    nothing that looks whole, and of two that prepare the same set at once the first to finish wins.

    Args:
      root: directory of prepared sets; made if it does not exist.
      name, config, version: where under `root`.
      class_names: C names.
      splits: for each split a function that yields its examples, or a sequence of them, which
        several threads read.
      facts: of the labels of every split (int8 [N, C]); goes to the metadata as JSON.
      description, licence: for TFDS's own record.
      resume: names the content; with it, what a killed process had written of the same content is
        kept and gone on with. Only one process at a time can do so.
      shard_bytes: size of a file.

    Returns:
      The prepared directory.

    Raises:
      InputError: the directory cannot be written to, or another process is at work on this content.
    """
    home = pathlib.Path(root) / name
    final = home / config / version
    if os.path.isdir(final):
        return final
    features = _features(len(class_names))
    serialize = functools.partial(_serialize, features)
    with _staging(home, resume) as staging, writing(home, f": make room there, or {_ELSEWHERE}"):
        written = {
            split: shards.write_split(
                staging,
                split,
                examples() if callable(examples) else examples,
                serialize,
                shard_bytes=shard_bytes,
            )
            for split, examples in splits.items()
        }
        whole = _gather(staging, name, written)
        info = tfds.core.DatasetInfo(
            builder=dataset_info.DatasetIdentity(
                name=name,
                version=tfds.core.Version(version),
                data_dir=os.fspath(whole),
                module_name=__name__,
                config_name=config,
            ),
            description=description,
            license=licence,
            features=features,
            metadata=tfds.core.MetadataDict(
                class_names=list(class_names),
                fingerprint=_fingerprint(class_names, written),
                facts=dict(facts({split: done.labels for split, done in written.items()})),
            ),
            disable_shuffling=True,
        )
        _write_metadata(whole, info, written)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(whole, final)
        except OSError:
            if not final.is_dir():
                raise
    return final


def _serialize(features: tfds.features.FeaturesDict, example: Example) -> bytes:
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    record = {"image": example.image, "labels": example.labels, "id": example.id}
    return serializer.serialize_example(features.encode_example(record))


def _fingerprint(class_names: Sequence[str], written: Mapping[str, shards.Split]) -> str:
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for split, done in written.items():
        digest.update(split.encode())
        for row, name in enumerate(done.ids.tolist()):
            digest.update(done.digests[row].tobytes() + done.labels[row].tobytes())
            digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def _gather(staging: pathlib.Path, name: str, written: Mapping[str, shards.Split]) -> pathlib.Path:
    """Brings the shards into one directory, under the names that TFDS expects."""
    whole = staging / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for split, done in written.items():
        for number, path in enumerate(done.shards):
            of = f"{number:05d}-of-{len(done.shards):05d}"
            target = whole / f"{name}-{split}.array_record-{of}"
            try:
                os.link(path, target)
            except OSError:  # a file system without links; a shard that is gone is written again
                os.replace(path, target)
    return whole


def _features(num_classes: int) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "labels": tfds.features.Tensor(shape=(num_classes,), dtype=np.int8),
            "id": tfds.features.Text(),
        }
    )


def _write_metadata(
    directory: pathlib.Path, info: tfds.core.DatasetInfo, written: Mapping[str, shards.Split]
) -> None:
    info.set_file_format("array_record")
    info.set_splits(
        tfds_splits.SplitDict(
            tfds_splits.SplitInfo(name=split, shard_lengths=done.lengths, num_bytes=done.num_bytes)
            for split, done in written.items()
        )
    )
    info.write_to_directory(directory)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    arrays = {f"labels_{split}": done.labels for split, done in written.items()}
    arrays |= {f"ids_{split}": done.ids for split, done in written.items()}
    arrays |= {f"copies_{split}": _copies(done.digests) for split, done in written.items()}
    npz.write(os.fspath(directory / INDEX_NAME), {"sizes": np.asarray(json.dumps(sizes)), **arrays})


def _copies(digests: np.ndarray) -> np.ndarray:
    """Returns int64 [K, 2]: each row with the content of an earlier one, and the first of these."""
    _, first, of = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    first = first[of.reshape(-1)]
    rows = np.flatnonzero(first != np.arange(len(digests)))
    return np.stack([rows, first[rows]], axis=1)


@contextlib.contextmanager
def _staging(home: pathlib.Path, resume: str) -> Iterator[pathlib.Path]:
    """A directory to write in, gone at the end; with `resume` only if nothing went wrong."""
    staging = home / f"{_INCOMPLETE}{resume or f'{os.getpid()}-{secrets.token_hex(4)}'}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        atomic.sweep(path for path in home.glob(f"{_INCOMPLETE}*") if path != staging)
        staging.mkdir(exist_ok=bool(resume))
        lock = open(staging / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"{home}: prepared data cannot be written here ({error}); {_ELSEWHERE}."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{staging}: another process is writing this data set.") from error
        try:
            yield staging
        except BaseException:
            if not resume:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging, ignore_errors=True)


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
      copies: for each split int64 [K, 2]: a row, and the first one that holds the same image. Sets
        that were prepared before this was kept have none.
    """

    directory: pathlib.Path
    class_names: tuple[str, ...]
    fingerprint: str
    facts: dict[str, Any]
    labels: dict[str, np.ndarray]
    ids: dict[str, list[str]]
    copies: dict[str, np.ndarray]


def _broken(directory: pathlib.Path, what: str, kind: type[InputError] = InputError) -> InputError:
    return kind(f"{directory}: damaged prepared data: {what}. Delete it and prepare it again.")


def open_prepared(directory: str | os.PathLike) -> Prepared:
    """Reads everything but the images of a prepared directory.

    Raises:
      InputError: it is not a prepared directory, or a file of it is missing, cut off or unreadable.
    """
    directory = pathlib.Path(directory)
    if not all(os.path.isfile(directory / name) for name in (INDEX_NAME, "dataset_info.json")):
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
        found = path.stat().st_size if os.path.exists(path) else "no file"
        if found != size:
            raise _broken(directory, f"{name} should have {size} bytes, found {found}")
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        labels = {k[len("labels_") :]: v for k, v in index.items() if k.startswith("labels_")}
        ids = {split: index[f"ids_{split}"].tolist() for split in labels}
        none = np.zeros((0, 2), np.int64)
        copies = {split: index.get(f"copies_{split}", none) for split in labels}
        return Prepared(
            directory,
            tuple(metadata["class_names"]),
            metadata["fingerprint"],
            metadata["facts"],
            labels,
            ids,
            copies,
        )
    except (KeyError, ValueError, OSError) as error:
        raise _broken(directory, f"metadata.json cannot be used ({error!r})") from error


class StoredImages:
    """The images of a split, read and decoded when asked for; opened anew in every process."""

    def __init__(self, prepared: Prepared, split: str, image_size: int, *, upright: bool = False):
        """`upright` as in `images.decode_image`."""
        self._upright = upright
        self._directory = prepared.directory
        self._split = split
        self._ids = prepared.ids[split]
        self._image_size = image_size
        self._records: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """Reads, decodes and resizes an image.

        Raises:
          CorruptImage: this one cannot be read; names directory, split, row and id.
          InputError: none can be.
        """
        if not 0 <= index < len(self._ids):
            raise IndexError(f"row {index} of {len(self._ids)}")
        index = int(index)
        image = images_lib.decode_square(
            self._encoded(index),
            self._image_size,
            where=f"{self._directory}, {self._name(index)}",
            upright=self._upright,
        )
        return {"image": image, "row": np.int32(index)}

    def _name(self, index: int) -> str:
        return f"{self._split} row {index} ({self._ids[index]})"

    def _encoded(self, index: int) -> bytes:
        try:
            if self._records is None:
                self._records = tfds.builder_from_directory(self._directory).as_data_source(
                    self._split, decoders={"image": tfds.decode.SkipDecoding()}
                )
        except Exception as error:
            what = f"split {self._split} cannot be opened ({first_line(error)})"
            raise _broken(self._directory, what) from error
        try:
            return self._records[index]["image"]
        except Exception as error:
            what = f"{self._name(index)} cannot be read ({first_line(error)})"
            raise _broken(self._directory, what, images_lib.CorruptImage) from error
