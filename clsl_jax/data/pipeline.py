"""Batches by Grain: endless and resumable for training, padded and complete for evaluation.

The one module that imports Grain.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import util

import grain
import numpy as np
from absl import flags

from clsl_jax.data import threads
from clsl_jax.data.images import Images

Batch = dict[str, np.ndarray]
Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _View:
    """Adds the augmented view of a record; picklable, for worker processes."""

    augment: Augmentation | None
    clean_view: bool

    def __call__(self, record: Mapping[str, np.ndarray], rng: np.random.Generator) -> Batch:
        image = record["image"]
        view = {"image": self.augment(image, rng) if self.augment else image, "row": record["row"]}
        if self.clean_view:
            view["clean"] = image
        if "asked" in record:
            view["asked"] = record["asked"]
        return view


class _ProcessPart(grain.MapDataset):
    """The records of one process: its contiguous part of each global batch, epoch after epoch."""

    def __init__(
        self, parent: grain.MapDataset, batch_size: int, process_index: int, process_count: int
    ):
        super().__init__(parent)
        self._global_length = len(parent)
        self._batches = self._global_length // (batch_size * process_count)
        self._batch_size, self._index, self._count = batch_size, process_index, process_count

    def __len__(self) -> int:
        return self._batches * self._batch_size

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, len(self))
        batch, place = divmod(position, self._batch_size)
        first = (batch * self._count + self._index) * self._batch_size
        return self._parent[epoch * self._global_length + first + place]


def steps_per_epoch(length: int, *, batch_size: int, process_count: int = 1) -> int:
    """Full global batches in an epoch of `length` images, `batch_size` images per process."""
    return length // (batch_size * process_count)


def train_iterator(
    source: Images,
    *,
    batch_size: int,
    seed: int,
    augment: Augmentation | None = None,
    clean_view: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
) -> grain.DatasetIterator:
    """Returns an endless iterator over shuffled, augmented batches.

    An epoch shows no image twice and leaves out the last N mod (batch_size * process_count) of its
    order; the next epoch has another order. Order and augmentation are functions of `seed` and of
    the position in the order alone: not of workers, threads or processes. The parts of all
    processes, one after another, are the batch that one process with the global batch size sees.

    Args:
      source: random access to {"image": uint8 [S, S, 3], "row": int32} and perhaps "asked": int32;
        picklable if `workers` > 0.
      batch_size: images of this process in a batch, b.
      seed: >= 0.
      augment: `augment(image, rng) -> image`, as `transforms.Augment`; picklable if `workers` > 0.
      clean_view: also return the image as it was before augmentation.
      workers: processes that read and augment; 0 works in threads of this process. Starting them
        takes seconds.
      process_index, process_count: which part of the global batch to read.
      start: batches to skip, at no cost: the number of steps already taken, however many workers
        took them.

    Returns:
      A Grain iterator of {"image": uint8 [b, S, S, 3], "row": int32 [b]} and, with `clean_view`,
      "clean": uint8 [b, S, S, 3]; and where the source has it (`images.Tolerant`) "asked": int32
      [b], which differs from "row" where another image stands in. Call `close()` when done with it.
      `get_state()` and `set_state()` continue exactly, for an iterator made with the same
      arguments; the state of 0 workers does not fit an iterator with 2, `start` does.

    Raises:
      ValueError: a value out of range, or a global batch larger than the source.
    """
    _check_slice(batch_size, process_index, process_count)
    if min(seed, workers, start) < 0:
        raise ValueError(
            f"seed, workers and start must be at least 0, found {seed}, {workers}, {start}"
        )
    if not steps_per_epoch(len(source), batch_size=batch_size, process_count=process_count):
        raise ValueError(
            f"batch_size={batch_size} on each of {process_count} processes is more than the "
            f"{len(source)} training images; choose a smaller batch_size"
        )
    # Grain shuffles epoch e by seed + e, so that neighbouring seeds would share orders.
    order_seed, view_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    records = grain.MapDataset.source(source).shuffle(seed=order_seed)
    records = records.random_map(_View(augment, clean_view), seed=view_seed)
    records = _ProcessPart(records, batch_size, process_index, process_count)
    batches = records.batch(batch_size, drop_remainder=True).repeat()[start:]
    number = threads.usual_number()
    # Grain's default of 500 batches ahead would be tens of gigabytes of large images.
    read = grain.ReadOptions(num_threads=number, prefetch_buffer_size=2 * number)
    iterable = batches.to_iter_dataset(read)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_prepare_worker,
        )
    return iter(iterable)


def _prepare_worker(*unused: int) -> None:
    """Leaves Ctrl-C to the parent, and has the worker end when that has ended, however it did.

    A worker that its parent closes ends once its queues are written, the last of what
    `multiprocessing` does there: it does not wait for images that its threads still read.
    """
    util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def eval_batches(
    source: Images, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every image once, in order, in batches padded to full size.

    Up to one batch is read ahead of the one that is asked for.

    Args:
      source: random access to {"image": uint8 [S, S, 3], "row": int32}.
      batch_size: images of this process in a batch, b.
      process_index, process_count: which part of each global batch of b * process_count to read.
        All processes yield the same number of batches, the last perhaps nothing but padding.

    Yields:
      {"image": uint8 [b, S, S, 3], "row": int32 [b], "valid": bool [b]}. Padding has `valid` False,
      row 0 and a black image.

    Raises:
      ValueError: a value out of range.
    """
    _check_slice(batch_size, process_index, process_count)
    return _eval_batches(source, batch_size, process_index, process_count)


def _eval_batches(
    source: Images, batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    length = len(source)
    if not length:
        return
    global_size = batch_size * process_count
    starts = range(process_index * batch_size, -(-length // global_size) * global_size, global_size)
    parts = [range(first, min(first + batch_size, length)) for first in starts]  # one may be empty
    first_image = source[0]["image"]

    def blank() -> Batch:
        return {
            "image": np.zeros((batch_size, *first_image.shape), first_image.dtype),
            "row": np.zeros(batch_size, np.int32),
            "valid": np.zeros(batch_size, bool),
        }

    def places() -> Iterator[tuple[Batch, int, int]]:
        for part in parts:
            batch = blank()
            for place, index in enumerate(part):
                yield batch, place, index

    def fill(where: tuple[Batch, int, int]) -> Batch:
        batch, place, index = where
        record = source[index]
        batch["image"][place] = record["image"]
        batch["row"][place] = record["row"]
        batch["valid"][place] = True
        return batch

    number = threads.usual_number()
    # By image, so that all threads read one batch; ahead, so that they do while one is computed.
    filled = threads.in_order(fill, places(), threads=number, ahead=max(batch_size, 2 * number))
    with contextlib.closing(filled):
        for part in parts:
            batch = None
            for _ in part:
                batch = next(filled)
            yield batch or blank()


def _check_slice(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            "expected batch_size >= 1 and 0 <= process_index < process_count, found "
            f"{batch_size}, {process_index}, {process_count}"
        )
