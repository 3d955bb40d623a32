"""Data workers that die or hang: real processes, and batches that do not differ for it."""

import gc
import multiprocessing
import os
import signal
import time
from multiprocessing import shared_memory

import numpy as np
import pytest
from commands import wait_for

from clsl_jax.data import pipeline
from clsl_jax.data import watched as watched_lib
from clsl_jax.data.watched import MOST_TRIES, Watched
from clsl_jax.errors import InputError, Unavailable


class Images:
    """40 images; reading one goes wrong in a way, once or always."""

    def __init__(self, fault=None, marker=None, seconds=1000):
        self.fault, self.marker, self.seconds = fault, marker, seconds

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 17 and self.fault and not (self.marker and os.path.exists(self.marker)):
            if self.marker:
                with open(self.marker, "w", encoding="utf-8"):
                    pass
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "hang":
                time.sleep(self.seconds)
            raise InputError("image 17 is no image")
        return {"image": np.full((2, 2, 3), index, np.uint8), "row": np.int32(index)}


def watched(images, *, start=0, workers=0, timeout=60.0, report=lambda line: None):
    def make(position):
        return pipeline.train_iterator(
            images, batch_size=8, seed=3, workers=workers, start=position
        )

    return Watched(make, start=start, timeout=timeout, report=report)


class Named(Images):
    """Images whose readers name their shared memory as no other process does."""

    prefix = f"/{os.getpid():x}_"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.prefix = Named.prefix

    def __getitem__(self, index):
        shared_memory._SHM_NAME_PREFIX = self.prefix
        return super().__getitem__(index)

    def held(self):
        """Returns what lies in shared memory."""
        return [name for name in os.listdir("/dev/shm") if f"/{name}".startswith(self.prefix)]


def rows(data, count):
    try:
        return [next(data)["row"].tolist() for _ in range(count)]
    finally:
        data.close()


@pytest.fixture(scope="module")
def expected():
    """Ten batches, straight from the pipeline: two epochs."""
    data = pipeline.train_iterator(Images(), batch_size=8, seed=3)
    return [next(data)["row"].tolist() for _ in range(10)]


@pytest.mark.parametrize("start", [0, 3])
def test_nothing_changes_where_nothing_goes_wrong(expected, start):
    assert rows(watched(Images(), start=start), 10 - start) == expected[start:]


@pytest.mark.parametrize(
    ("fault", "timeout", "workers"), [("die", 60.0, 1), ("die", 60.0, 2), ("hang", 30.0, 1)]
)
def test_a_lost_worker_is_replaced_and_no_batch_differs(
    expected, tmp_path, fault, timeout, workers
):
    said = []
    images = Images(fault, str(tmp_path / "happened"))
    data = watched(images, workers=workers, timeout=timeout, report=said.append)
    assert rows(data, 10) == expected
    assert (tmp_path / "happened").exists()
    # On a busy machine those that replace the hanging ones may be late as well.
    assert len(said) == 1 if fault == "die" else 1 <= len(said) < MOST_TRIES
    what = {"die": "a data worker died", "hang": "the data workers hang"}[fault]
    assert all(what in line for line in said)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_died_while_nobody_asked_is_replaced(expected, tmp_path, workers):
    """As it may while an epoch is evaluated, or before the first batch of a run that goes on."""
    said = []
    images = Images("die", str(tmp_path / "happened"))
    data = watched(images, workers=workers, report=said.append)
    end = time.monotonic() + 60
    while not (tmp_path / "happened").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.5)
    assert rows(data, 10) == expected
    assert len(said) == 1
    assert "a data worker died" in said[0]


def test_a_worker_that_dies_again_and_again_ends_the_run(tmp_path):
    said = []
    data = watched(Images("die"), workers=1, report=said.append)
    with pytest.raises(Unavailable, match=r"a data worker died .exit status -9.*data\.workers=0"):
        rows(data, 10)
    assert said[-2] == said[-1]  # the same batch, three times with the one in the error


def test_a_thread_that_hangs_ends_the_run():
    data = watched(Images("hang", seconds=5), timeout=1.0)
    with pytest.raises(
        Unavailable, match=r"reading hangs, nothing for 1 s.*machine, or raise data\.timeout"
    ):
        rows(data, 10)


def test_an_error_in_reading_reaches_the_loop():
    data = watched(Images("raise"))
    with pytest.raises(InputError, match="image 17 is no image"):
        rows(data, 10)


needs_dev_shm = pytest.mark.skipif(
    not os.path.isdir("/dev/shm"), reason="this system does not show its shared memory"
)


@needs_dev_shm
@pytest.mark.parametrize(("workers", "taken"), [(1, 1), (2, 1), (2, 3)])
def test_workers_that_are_closed_end_by_themselves_and_leave_no_shared_memory(
    workers, taken, monkeypatch
):
    monkeypatch.setattr(watched_lib, "_PATIENCE", 60.0)  # this machine may be busy
    images = Named()
    before = multiprocessing.active_children()
    data = watched(images, workers=workers)
    for _ in range(taken):
        next(data)
    started = [child for child in multiprocessing.active_children() if child not in before]
    assert len(started) == workers
    wait_for(lambda: len(images.held()) >= 4)  # batches of two arrays wait
    data.close()
    wait_for(lambda: not images.held(), seconds=5)  # Grain frees the last in a thread
    assert [worker.exitcode for worker in started] == [0] * workers


@needs_dev_shm
def test_a_worker_that_hangs_when_it_is_closed_is_killed_and_leaves_no_shared_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(watched_lib, "_PATIENCE", 1.0)
    images = Named("hang", str(tmp_path / "happened"))
    before = multiprocessing.active_children()
    data = watched(images, workers=1, start=40)
    next(data)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    wait_for((tmp_path / "happened").exists)
    wait_for(images.held)
    start = time.monotonic()
    data.close()
    assert time.monotonic() - start < 15  # it would hang for longer
    wait_for(lambda: worker.exitcode == -signal.SIGKILL, seconds=5)
    gc.collect()  # what Grain raises holds the batch before
    wait_for(lambda: not images.held(), seconds=5)


def test_closing_waits_neither_for_workers_that_start_nor_for_a_thread_that_hangs():
    before = set(multiprocessing.active_children())
    data = watched(Images(), workers=1)
    start = time.monotonic()
    data.close()
    assert time.monotonic() - start < 4
    wait_for(lambda: not set(multiprocessing.active_children()) - before)
    data = watched(Images("hang", seconds=5))
    time.sleep(0.5)
    start = time.monotonic()
    data.close()
    assert time.monotonic() - start < 4
