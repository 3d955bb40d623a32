import collections
import gc
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from commands import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_images import MemoryImages

from clsl_jax.data import images, pipeline, transforms

AUGMENT = transforms.Augment(flip=True, cutout=0.5, color_jitter=0.3, translate=0.1)


def _source(count, side=8):
    draws = np.random.RandomState(0).randint(0, 256, (count, side, side, 3)).astype(np.uint8)
    return MemoryImages(draws)


def _take(count, source, **options):
    iterator = pipeline.train_iterator(source, **options)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def _assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert np.array_equal(one[key], other[key]), key


def test_batches_have_the_stated_shapes():
    source = _source(10)
    batch = _take(1, source, batch_size=4, seed=0, augment=AUGMENT, clean_view=True)[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((4, 8, 8, 3), np.uint8),
        "row": ((4,), np.int32),
        "clean": ((4, 8, 8, 3), np.uint8),
    }
    assert np.array_equal(batch["clean"], source.images[batch["row"]])
    assert not np.array_equal(batch["clean"], batch["image"])
    plain = _take(1, source, batch_size=4, seed=0)[0]
    assert sorted(plain) == ["image", "row"]
    assert np.array_equal(plain["image"], source.images[plain["row"]])


def test_an_epoch_repeats_no_row_and_the_next_has_another_order():
    source = _source(11)
    batches = _take(12, source, batch_size=3, seed=0)
    epochs = [np.concatenate([b["row"] for b in batches[e * 3 : e * 3 + 3]]) for e in range(4)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 9
        assert rows.min() >= 0
        assert rows.max() < 11
    assert len({tuple(rows) for rows in epochs}) == 4
    for batch in batches:
        assert np.array_equal(batch["image"], source.images[batch["row"]])


def test_seeds_have_different_orders_in_every_epoch():
    """Grain shuffles epoch e by seed + e: seed 1 must not be seed 0 an epoch later."""
    source = _source(12)
    orders = [
        tuple(row for batch in _take(3, source, batch_size=4, seed=seed, start=start)
              for row in batch["row"].tolist())
        for seed in range(3)
        for start in (0, 3, 6)
    ]  # fmt: skip
    assert len(set(orders)) == 9


def test_the_same_image_is_augmented_anew_in_the_next_epoch():
    source = _source(4)
    views = collections.defaultdict(set)
    for batch in _take(5, source, batch_size=4, seed=0, augment=AUGMENT):
        for row, image in zip(batch["row"], batch["image"], strict=True):
            views[int(row)].add(image.tobytes())
    assert [len(views[row]) for row in range(4)] == [5, 5, 5, 5]


@pytest.mark.parametrize("start", [0, 1, 3, 7, 40])
def test_start_continues_exactly(start):
    options = {"batch_size": 3, "seed": 5, "augment": AUGMENT, "clean_view": True}
    whole = _take(start + 4, _source(10), **options)
    _assert_equal(_take(4, _source(10), start=start, **options), whole[start:])


def test_state_continues_exactly_in_the_middle_of_an_epoch():
    options = {"batch_size": 3, "seed": 5, "augment": AUGMENT}
    iterator = pipeline.train_iterator(_source(10), **options)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(6)]
    other = pipeline.train_iterator(_source(10), **options)
    next(other)
    other.set_state(state)
    _assert_equal([next(other) for _ in range(6)], expected)
    iterator.close()
    other.close()


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(6, 40),
    per_process=st.integers(1, 3),
    processes=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_processes_together_see_the_batch_of_one(count, per_process, processes, seed):
    if count < per_process * processes:
        count = per_process * processes
    source, total = _source(count, side=4), 5
    whole = _take(total, source, batch_size=per_process * processes, seed=seed, augment=AUGMENT)
    parts = [
        _take(
            total,
            source,
            batch_size=per_process,
            seed=seed,
            augment=AUGMENT,
            process_index=index,
            process_count=processes,
        )
        for index in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _assert_equal(joined, whole)


@pytest.mark.slow
def test_worker_processes_change_nothing_and_resume():
    options = {"batch_size": 4, "seed": 3, "augment": AUGMENT, "clean_view": True}
    source = _source(18)
    expected = _take(12, source, **options)
    iterator = pipeline.train_iterator(source, workers=2, **options)
    found = [next(iterator) for _ in range(5)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:  # as Ctrl-C does; who stops is for their parent to say
        os.kill(worker.pid, signal.SIGINT)
    state = iterator.get_state()
    found += [next(iterator) for _ in range(7)]
    # Copies, because the batches of workers lie in memory that is given back.
    found = [{key: np.array(value) for key, value in batch.items()} for batch in found]
    _assert_equal(found, expected)
    iterator.set_state(state)
    _assert_equal([next(iterator) for _ in range(3)], expected[5:8])
    iterator.close()
    iterator = pipeline.train_iterator(source, workers=2, start=7, **options)
    _assert_equal([next(iterator) for _ in range(2)], expected[7:9])
    iterator.close()
    del iterator
    gc.collect()


class _Holes:
    """Images of which every third cannot be read."""

    def __init__(self, source):
        self._source = source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index % 3 == 1:
            raise images.CorruptImage(f"row {index} is broken")
        return self._source[index]


def _assert_replaced(batches, source):
    """The neighbour stands in, with its own row; what was asked for is the order of a whole set."""
    options = {"batch_size": 4, "seed": 3}
    for batch, whole in zip(batches, _take(len(batches), source, **options), strict=True):
        asked = batch["asked"]
        assert asked.dtype == np.int32
        assert np.array_equal(asked, whole["row"])
        assert np.array_equal(batch["row"], np.where(asked % 3 == 1, asked + 1, asked))
        assert np.array_equal(batch["clean"], source.images[batch["row"]])


def test_images_that_cannot_be_read_are_replaced_and_said_so():
    source = _source(12)
    tolerant = images.Tolerant(_Holes(source))
    options = {"batch_size": 4, "seed": 3, "augment": AUGMENT, "clean_view": True}
    batches = _take(6, tolerant, **options)
    assert sorted(batches[0]) == ["asked", "clean", "image", "row"]
    _assert_replaced(batches, source)
    _assert_equal(_take(2, tolerant, start=4, **options), batches[4:])


@pytest.mark.slow
def test_a_worker_process_says_so_too():
    source = _source(12)
    options = {"batch_size": 4, "seed": 3, "clean_view": True}
    iterator = pipeline.train_iterator(images.Tolerant(_Holes(source)), workers=1, **options)
    batches = [{k: np.array(v) for k, v in next(iterator).items()} for _ in range(4)]
    iterator.close()
    _assert_replaced(batches, source)
    del iterator
    gc.collect()


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 30), per_process=st.integers(1, 7), processes=st.integers(1, 4))
def test_evaluation_sees_every_image_once_on_any_number_of_processes(count, per_process, processes):
    source = _source(count, side=4)
    parts = [
        list(
            pipeline.eval_batches(
                source, batch_size=per_process, process_index=index, process_count=processes
            )
        )
        for index in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-count // (per_process * processes))}
    seen = []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert batch["image"].shape == (per_process, 4, 4, 3)
            assert batch["image"].dtype == np.uint8
            assert batch["row"].dtype == np.int32
            assert batch["valid"].dtype == bool
            rows = batch["row"][batch["valid"]]
            assert np.array_equal(batch["image"][batch["valid"]], source.images[rows])
            assert not batch["image"][~batch["valid"]].any()
            assert not batch["row"][~batch["valid"]].any()
            seen += rows.tolist()
    assert seen == list(range(count))


class _Read:
    """Images that say which were read; `wait` is called for each but the first."""

    def __init__(self, count, wait=lambda: None):
        self._count, self._wait, self.rows = count, wait, []

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        self.rows.append(index)
        if len(self.rows) > 1:
            self._wait()
        return {"image": np.zeros((2, 2, 3), np.uint8), "row": np.int32(index)}


def test_evaluation_reads_the_images_of_one_batch_at_the_same_time():
    together = threading.Barrier(2, timeout=30)
    source = _Read(8, together.wait)
    (batch,) = pipeline.eval_batches(source, batch_size=8)
    assert batch["row"].tolist() == list(range(8))


def test_evaluation_reads_about_one_batch_ahead():
    source = _Read(3000)
    batches = pipeline.eval_batches(source, batch_size=100)
    for number in (1, 2, 3):
        next(batches)
        # This one and the next are read, the rest is not; the first image twice, for its shape.
        read = 100 * (number + 1) + 1
        wait_for(lambda read=read: len(source.rows) >= read, seconds=30)
        time.sleep(0.1)
        assert len(source.rows) == read
    batches.close()


def test_evaluation_yields_what_is_before_an_image_that_cannot_be_read():
    batches = pipeline.eval_batches(_Holes(_source(12)), batch_size=1)
    assert next(batches)["row"].tolist() == [0]
    with pytest.raises(images.CorruptImage, match="row 1 is broken"):
        next(batches)


def test_steps_per_epoch_by_hand():
    assert pipeline.steps_per_epoch(10, batch_size=3) == 3
    assert pipeline.steps_per_epoch(19, batch_size=3, process_count=2) == 3
    assert pipeline.steps_per_epoch(5, batch_size=3, process_count=2) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 11}, "11"),
        ({"batch_size": 6, "process_count": 2}, "2 processes"),
        ({"batch_size": 0}, "0"),
        ({"batch_size": 2, "process_index": 2, "process_count": 2}, "process_index"),
        ({"batch_size": 2, "seed": -1}, "-1"),
        ({"batch_size": 2, "start": -1}, "-1"),
    ],
)
def test_values_that_cannot_be_used_are_named(options, named):
    with pytest.raises(ValueError) as error:
        pipeline.train_iterator(_source(10), **{"seed": 0, **options})
    assert named in str(error.value)


def test_evaluation_checks_its_slice_at_once():
    with pytest.raises(ValueError, match="batch_size"):
        pipeline.eval_batches(_source(3), batch_size=0)


def test_an_error_of_the_source_reaches_the_caller():
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ValueError(f"row {index} is damaged")

    with pytest.raises(ValueError, match="damaged"):
        next(pipeline.train_iterator(Broken(), batch_size=2, seed=0))
    with pytest.raises(ValueError, match="damaged"):
        next(pipeline.eval_batches(Broken(), batch_size=2))
