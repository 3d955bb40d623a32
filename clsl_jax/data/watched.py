"""Batches that keep coming: workers that die or hang are replaced, at the same position."""

import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from clsl_jax.errors import Unavailable

Batch = Mapping[str, np.ndarray]
# Tries to get one batch; a worker that dies of its image, not by chance, dies again.
MOST_TRIES = 3
_GLANCE = 0.5  # seconds between two looks at the workers
_PATIENCE = 3.0  # seconds that workers have to end by themselves
_GRACE = 2.0  # seconds in which Grain, which looks once a second, sees that they were killed


class Watched:
    """An endless iterator of batches that looks after the worker processes behind it.

    As the order of images is a function of the position, workers that are started anew go on where
    the others stopped, and no batch differs.
    """

    def __init__(
        self,
        make: Callable[[int], Iterator[Batch]],
        *,
        start: int,
        timeout: float,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Starts reading.

        Args:
          make: `make(position)` returns the iterator from a batch on, as `train_iterator` does; its
            `close()` is called in the thread that reads, and may hang.
          start: position of the first batch.
          timeout: seconds without a batch after which its workers are given up.
          report: takes a line where workers are replaced.
        """
        self._make, self._position = make, start
        self._timeout, self._report = timeout, report
        self._reader = _Reader(make, start)

    def __iter__(self) -> "Watched":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          Unavailable: no batch came, three times over, or once without workers.
          Exception: what reading raised.
        """
        for attempt in range(1, MOST_TRIES + 1):
            try:
                batch = self._reader.get(self._timeout)
            except _Lost as lost:
                self._reader.close(patience=0)
                message = f"The images of step {self._position + 1} do not come: {lost}"
                if attempt == MOST_TRIES or not lost.replaceable:
                    instead = "set data.workers=0, " if lost.replaceable else ""
                    raise Unavailable(
                        f"{message} Look at the storage and the memory of this machine, {instead}"
                        "or raise data.timeout; the same command goes on from the last checkpoint."
                    ) from None
                self._report(f"{message} New ones go on from there.")
                self._reader = _Reader(self._make, self._position)
            else:
                self._position += 1
                return batch
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends the workers, within seconds, and frees the shared memory of batches not asked for.

        Workers that do not end by themselves are killed; a batch of theirs may then stay in shared
        memory until this process ends.
        """
        self._reader.close(patience=_PATIENCE)


class _Lost(Exception):
    """No batch will come."""

    def __init__(self, message: str, replaceable: bool) -> None:
        super().__init__(message)
        self.replaceable = replaceable


class _Reader:
    """A thread that draws batches, so that waiting for one can end."""

    def __init__(self, make: Callable[[int], Iterator[Batch]], start: int) -> None:
        self._batches: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        before = set(multiprocessing.active_children())
        self._iterator = make(start)
        self._before, self._workers = before, set[Any]()
        self._thread = threading.Thread(target=self._draw, name="batches", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        try:
            for batch in self._iterator:
                if not self._workers:  # all of them are there when the first batch is
                    self._remember_workers()
                self._put(batch)
                del batch  # its memory would stay taken while the next one is read
                if self._closed.is_set():
                    return
        except Exception as error:  # it belongs to the one who waits
            self._put(error)
        finally:
            self._iterator.close()

    def _put(self, found: Any) -> None:
        while not self._closed.is_set():
            try:
                self._batches.put(found, timeout=_GLANCE)
                return
            except queue.Full:
                continue

    def get(self, timeout: float) -> Batch:
        end = time.monotonic() + timeout
        while True:
            try:
                found = self._batches.get(timeout=min(_GLANCE, timeout))
            except queue.Empty:
                self._look(time.monotonic() > end, timeout)
                continue
            if isinstance(found, RuntimeError) and "terminated unexpectedly" in str(found):
                # Grain notices by itself where it has one worker; where it has more, it waits.
                self._look(False, timeout)
                raise _Lost("a data worker died.", True)
            if isinstance(found, Exception):
                raise found
            return found

    def _remember_workers(self) -> None:
        """A worker that has died is no active child any more."""
        self._workers |= set(multiprocessing.active_children()) - self._before

    def _look(self, late: bool, timeout: float) -> None:
        self._remember_workers()
        dead = [worker for worker in tuple(self._workers) if not worker.is_alive()]
        if dead:
            raise _Lost(f"a data worker died (exit status {dead[0].exitcode}).", True)
        if late:
            who = "the data workers hang" if self._workers else "reading hangs"
            raise _Lost(f"{who}, nothing for {timeout:g} s.", bool(self._workers))

    def close(self, patience: float) -> None:
        """Has the thread close the iterator, as no other may while it reads, and kills the rest.

        Args:
          patience: seconds to wait for it; 0 kills at once, and leaves the thread to itself.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        # Workers that have yet to start would take too long to end.
        patience = patience if self._workers else min(patience, _GLANCE)
        self._remember_workers()
        self._drop()  # it may wait for room
        self._thread.join(timeout=patience)
        for worker in tuple(self._workers):
            worker.kill()
        if patience and self._workers:
            self._thread.join(timeout=_GRACE)
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._batches.get_nowait()
