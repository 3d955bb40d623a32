"""Writes the records of a split as ArrayRecord shards, one after another.

TFDS's own writer would gather a split in memory and, from 1 GB on, sort it by means of TensorFlow.
Here a shard that is finished stays finished: a writer that starts again in the same directory goes
on behind it.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from clsl_jax import npz
from clsl_jax.data import threads
from clsl_jax.errors import InputError

SHARD_BYTES = 256 * 2**20
_THREADS = 8


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


@dataclasses.dataclass(frozen=True)
class Split:
    """A split that has been written.

    Attributes:
      shards: files, in order.
      lengths: records of each.
      num_bytes: of all records.
      labels: int8 [N, C].
      ids: str [N].
      digests: uint8 [N, 32], SHA-256 of each example's content.
    """

    shards: list[pathlib.Path]
    lengths: list[int]
    num_bytes: int
    labels: np.ndarray
    ids: np.ndarray
    digests: np.ndarray


def write_split(
    directory: pathlib.Path,
    split: str,
    examples: Iterable[Example] | Sequence[Example],
    serialize: Callable[[Example], bytes],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Split:
    """Writes shards to `directory`, behind those that are finished there already.

    Args:
      directory: of shards and of a note on each; the same examples must be given each time.
      split: names the files.
      examples: a sequence is read by several threads, and only where no shard holds it yet.
      serialize: makes a record of an example.
      shard_bytes: size from which a shard is finished.

    Raises:
      ValueError: there is no example.
      OSError: the directory cannot be written to.
    """
    finished: list[dict[str, np.ndarray]] = []
    while (found := _finished(directory, split, len(finished))) is not None:
        finished.append(found)
    start = sum(len(shard["ids"]) for shard in finished)
    waiting = _from(examples, start)
    while True:
        shard = _write_shard(directory, split, len(finished), waiting, serialize, shard_bytes)
        if shard is None:
            break
        finished.append(shard)
    if not finished:
        raise ValueError(f"split {split!r} has no example")
    return Split(
        shards=[_shard(directory, split, number) for number in range(len(finished))],
        lengths=[len(shard["ids"]) for shard in finished],
        num_bytes=sum(int(shard["num_bytes"]) for shard in finished),
        labels=np.concatenate([shard["labels"] for shard in finished]),
        ids=np.concatenate([shard["ids"] for shard in finished]),
        digests=np.concatenate([shard["digests"] for shard in finished]),
    )


def _shard(directory: pathlib.Path, split: str, number: int) -> pathlib.Path:
    return directory / f"{split}-{number:05d}.array_record"


def _note(directory: pathlib.Path, split: str, number: int) -> pathlib.Path:
    return directory / f"{split}-{number:05d}.npz"


def _finished(directory: pathlib.Path, split: str, number: int) -> dict[str, np.ndarray] | None:
    path, shard = _note(directory, split, number), _shard(directory, split, number)
    try:
        note = npz.read(
            os.fspath(path),
            ("labels", "ids", "digests", "num_bytes", "file_bytes"),
            made_by="this package",
        )
    except InputError:
        return None
    return note if shard.exists() and shard.stat().st_size == note["file_bytes"] else None


def _write_shard(
    directory: pathlib.Path,
    split: str,
    number: int,
    waiting: Iterator[Example],
    serialize: Callable[[Example], bytes],
    shard_bytes: int,
) -> dict[str, np.ndarray] | None:
    first = next(waiting, None)
    if first is None:
        return None
    path = _shard(directory, split, number)
    labels, ids, digests, num_bytes = [], [], [], 0
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        example: Example | None = first
        while example is not None:
            record = serialize(example)
            with _os_errors():
                writer.write(record)
            num_bytes += len(record)
            labels.append(np.asarray(example.labels, np.int8))
            ids.append(example.id)
            content = example.image if example.content is None else example.content
            digests.append(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
            example = next(waiting, None) if num_bytes < shard_bytes else None
    finally:
        with _os_errors():
            writer.close()
    shard = {
        "labels": np.stack(labels),
        "ids": np.array(ids),
        "digests": np.stack(digests),
        "num_bytes": np.asarray(num_bytes),
        "file_bytes": np.asarray(path.stat().st_size),
    }
    # Written last, in one step: a shard without its note is not finished.
    npz.write(os.fspath(_note(directory, split, number)), shard)
    return shard


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Raises OSError for the RuntimeError by which ArrayRecord says that it cannot write."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0]) from None


def _from(examples: Iterable[Example] | Sequence[Example], start: int) -> Iterator[Example]:
    """Yields the examples from row `start` on."""
    if not isinstance(examples, Sequence):
        waiting = iter(examples)
        for _ in range(start):
            next(waiting)
        yield from waiting
        return
    rows = range(start, len(examples))
    yield from threads.in_order(examples.__getitem__, rows, threads=_THREADS, ahead=4 * _THREADS)
