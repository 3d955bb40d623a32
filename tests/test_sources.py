import dataclasses
import io
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from clsl_jax.data import cache as cache_lib
from clsl_jax.data import images, scenes, sources, stored

SIZES = {"train": 12, "validation": 5, "test": 7}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    scenes.prepare_scenes(root, sizes=SIZES)
    return root


def _load(root, **options):
    return sources.load_dataset(
        "scenes", directory=root, **{"image_size": 64, "sizes": SIZES, **options}
    )


def _all_images(split):
    return np.stack([split.images[row]["image"] for row in range(len(split.images))])


def test_scenes_come_back_as_composed(cache):
    dataset = _load(cache)
    assert dataset.class_names == scenes.CLASS_NAMES
    for name, split in (
        ("train", dataset.train),
        ("validation", dataset.validation),
        ("test", dataset.test),
    ):
        examples = list(scenes.scene_examples(name, SIZES[name], seed=0))
        assert split.name == name
        assert len(split.images) == SIZES[name]
        assert split.ids == [example.id for example in examples]
        assert np.array_equal(split.labels, [example.labels for example in examples])
        assert split.labels.dtype == np.int8
        assert not split.difficult.any()
        assert _all_images(split).tobytes() == b"".join(e.content for e in examples)
        assert [int(split.images[row]["row"]) for row in range(3)] == [0, 1, 2]
    facts = dataset.facts
    assert facts["strength"] == "moderate"
    expected = scenes.mutual_information(dataset.train.labels)
    assert facts["mutual_information"]["train"] == expected
    assert facts["labels_per_image"]["test"] == dataset.test.labels.sum(axis=1).mean()


def test_fingerprint_follows_the_content(cache, tmp_path):
    fingerprint = _load(cache).fingerprint
    assert len(fingerprint) == 64
    assert _load(tmp_path / "again").fingerprint == fingerprint
    assert _load(tmp_path / "seed", seed=1).fingerprint != fingerprint
    assert _load(tmp_path / "strong", strength="strong").fingerprint != fingerprint


def test_second_use_reads_and_writes_nothing(cache):
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in sorted(cache.rglob("*"))
            if path.is_file()
        }

    before = state()
    assert before
    _load(cache)
    assert state() == before


def test_reading_from_disk_equals_memory_at_any_size_and_in_other_processes(cache):
    held = _load(cache, image_size=40, cache="memory").test
    read = _load(cache, image_size=40, cache="none").test
    assert isinstance(held.images, cache_lib.MemoryCache)
    assert isinstance(read.images, stored.StoredImages)
    assert _all_images(held).shape == (7, 40, 40, 3)
    assert np.array_equal(_all_images(held), _all_images(read))
    copy = pickle.loads(pickle.dumps(read.images))
    assert np.array_equal(copy[3]["image"], held.images[3]["image"])
    with pytest.raises(IndexError):
        read.images[7]


def test_caches_hold_the_same_pixels_and_training_images_come_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path))
    expected = _load(cache, image_size=32, cache="none")
    room = {"cache_gb": 14 * 32 * 32 * 3 / 2**30}  # 12 for training, 2 of 5 for validation
    lines = []
    for kind in ("memory", "disk", "disk"):
        dataset = _load(cache, image_size=32, cache=kind, report=lines.append, **room)
        for name in ("train", "validation", "test"):
            found, wanted = getattr(dataset, name), getattr(expected, name)
            assert np.array_equal(_all_images(found), _all_images(wanted))
    decoded = sorted(path.name for path in (tmp_path / "decoded").iterdir())
    assert [name.rsplit("-", 1)[0] for name in decoded] == [
        f"{expected.fingerprint}-train-32px-12",
        f"{expected.fingerprint}-validation-32px-2",
    ]
    assert len(lines) == 2
    assert "cv" in expected.facts["decoding"]


def test_the_cache_chosen_by_itself_holds_all_or_nothing(cache):
    room = sum(SIZES.values()) * 32 * 32 * 3 / 2**30
    whole = _load(cache, image_size=32, cache_gb=room)
    assert isinstance(whole.test.images, cache_lib.MemoryCache)
    for less in (0.0, room * 0.999):
        part = _load(cache, image_size=32, cache_gb=less)
        assert isinstance(part.test.images, stored.StoredImages)


def test_tfds_reads_the_directory_by_itself(cache):
    import tensorflow_datasets as tfds

    directory = scenes.prepare_scenes(cache, sizes=SIZES)
    builder = tfds.builder_from_directory(directory)
    assert builder.info.splits["train"].num_examples == 12
    assert builder.info.metadata["class_names"] == list(scenes.CLASS_NAMES)
    record = builder.as_data_source("test")[2]
    expected = list(scenes.scene_examples("test", 3, seed=0))[2]
    assert record["image"].tobytes() == expected.content
    assert np.array_equal(record["labels"], expected.labels)


def test_tensorflow_is_never_imported(tmp_path):
    program = (
        "import sys\n"
        "from clsl_jax.data import pipeline, sources\n"
        f"d = sources.load_dataset('scenes', directory={str(tmp_path)!r}, image_size=64, "
        f"sizes={SIZES!r})\n"
        "next(pipeline.train_iterator(d.train.images, batch_size=2, seed=0))\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path / "chosen"))
    _load(None)
    assert (tmp_path / "chosen" / "scenes").is_dir()
    monkeypatch.delenv("CLSL_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_directory() == tmp_path / ".cache" / "clsl_jax"


def _start_composing(root, size):
    program = (
        "from clsl_jax.data import scenes\n"
        f"print(scenes.prepare_scenes({str(root)!r}, sizes={{'train': {size}, 'validation': 2, "
        "'test': 2}))\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    process = _start_composing(tmp_path, 100_000)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("scenes/.incomplete-*/*.array_record")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    left = list(tmp_path.glob("scenes/*"))
    assert [path.name.startswith(".incomplete-") for path in left] == [True]
    with pytest.raises(ValueError, match="no prepared"):
        sources.find_prepared("scenes", tmp_path)
    assert len(_load(tmp_path).train.images) == 12
    # Debris of today may belong to a process at work; that of yesterday does not.
    assert left[0].exists()
    yesterday = time.time() - 90_000
    os.utime(left[0], (yesterday, yesterday))
    _load(tmp_path, seed=1)
    assert not left[0].exists()


@pytest.mark.slow
def test_two_processes_compose_at_once(tmp_path):
    processes = [_start_composing(tmp_path, 150) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    dataset = _load(tmp_path, sizes={"train": 150, "validation": 2, "test": 2})
    assert len(dataset.train.images) == 150
    assert not list(tmp_path.glob("scenes/.incomplete-*"))


def _damage(root, name, change):
    (path,) = root.rglob(name)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "name", ["scenes-train.array_record*", "index.npz", "metadata.json", "features.json"]
)
def test_a_file_cut_off_is_named(tmp_path, name):
    _load(tmp_path)
    path = _damage(tmp_path, name, lambda content: content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged prepared data") as error:
        _load(tmp_path)
    assert path.name in str(error.value)
    assert str(path.parent) in str(error.value)
    assert "Delete it" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    _load(tmp_path)
    (path,) = tmp_path.rglob("scenes-test.array_record*")
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        _load(tmp_path)


def test_changed_bytes_are_noticed(tmp_path):
    _load(tmp_path)

    def overwrite(content):
        middle = len(content) // 4  # ArrayRecord pads its files: the last half may be padding
        changed = bytes(255 - value for value in content[middle : middle + 64])
        return content[:middle] + changed + content[middle + 64 :]

    _damage(tmp_path, "scenes-train.array_record*", overwrite)
    _damage(tmp_path, "scenes-test.array_record*", overwrite)
    for kind in ("none", "memory"):
        dataset = _load(tmp_path, cache=kind)
        shown = [int(dataset.train.images[row]["row"]) for row in range(12)]
        assert shown != list(range(12))
        assert [int(dataset.train.images[row]["asked"]) for row in range(12)] == list(range(12))
        with pytest.raises(images.CorruptImage, match="damaged prepared data"):
            _all_images(dataset.test)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="CLSL_CACHE_DIR"):
        _load(file)


def test_unknown_names_and_values_are_named(tmp_path):
    for name, options, named in (
        ("imagenet", {}, "imagenet"),
        ("scenes", {"strength": "weak"}, "weak"),
        ("scenes", {"image_size": 0, "sizes": SIZES}, "image_size=0"),
        ("scenes", {"cache": "disc", "sizes": SIZES}, "data.cache='disc'"),
        ("scenes", {"cache_gb": -1, "sizes": SIZES}, "data.cache_gb=-1"),
        ("scenes", {"cache_gb": float("inf"), "sizes": SIZES}, "data.cache_gb=inf"),
        ("scenes", {"without_labels": "maybe", "sizes": SIZES}, "without_labels='maybe'"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            sources.load_dataset(name, directory=tmp_path, **{"image_size": 64, **options})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sources.PREPARED_NAMES)
def test_a_set_that_is_not_prepared_says_what_is_missing(tmp_path, name):
    for directory in (None, tmp_path, tmp_path / "nowhere", tmp_path / ("long" * 99)):
        with pytest.raises(ValueError, match=name) as error:
            sources.load_dataset(name, directory=directory, image_size=64)
        assert "data.dir" in str(error.value)
        assert "dataset_info.json" in str(error.value)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="not a prepared data set"):
        sources.load_dataset(name, directory=tmp_path, image_size=64)


def _encode(image, file_format, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def _photographs(count, split):
    """Images of many sizes and formats, with unknown and difficult labels."""
    for row in range(count):
        draws = np.random.RandomState(row)
        image = draws.randint(0, 256, (20 + row, 30, 3)).astype(np.uint8)
        encoded = _encode(image, ("JPEG", "PNG")[row % 2])
        yield stored.Example(encoded, np.array([row % 2, -1, 2, 1], np.int8), f"{split}/{row}")


def _prepare(root, name="voc2007", version="1.0.0", splits=("train", "test")):
    return stored.prepare(
        root,
        name=name,
        config="main",
        version=version,
        class_names=("a", "b", "c", "d"),
        splits={split: lambda split=split: _photographs(20, split) for split in splits},
    )


def test_any_prepared_set_can_be_read(tmp_path):
    _prepare(tmp_path)
    dataset = sources.load_dataset("voc2007", directory=tmp_path, image_size=16, cache="none")
    assert dataset.name == "voc2007"
    assert dataset.class_names == ("a", "b", "c", "d")
    assert dataset.test.labels[:2].tolist() == [[0, -1, 0, 1], [1, -1, 0, 1]]
    assert dataset.test.difficult[0].tolist() == [False, False, True, False]
    assert dataset.test.images[5]["image"].shape == (16, 16, 3)
    assert dataset.test.ids[4] == "test/4"


def test_a_validation_split_is_held_out_where_there_is_none(tmp_path):
    directory = _prepare(tmp_path)
    dataset = sources.load_prepared(directory, image_size=8, seed=3, validation_fraction=0.25)
    assert (len(dataset.train.images), len(dataset.validation.images)) == (15, 5)
    assert sorted(dataset.train.ids + dataset.validation.ids) == sorted(
        f"train/{row}" for row in range(20)
    )
    whole = sources.load_prepared(directory, image_size=8, validation_fraction=0.0)
    assert whole.validation.ids == whole.train.ids
    for split in (dataset.train, dataset.validation):
        for row, name in enumerate(split.ids):
            original = int(name.split("/")[1])
            record = split.images[row]
            assert record["row"] == row
            assert np.array_equal(record["image"], whole.train.images[original]["image"])
            assert np.array_equal(split.labels[row], whole.train.labels[original])
    again = sources.load_prepared(directory, image_size=8, seed=3, validation_fraction=0.25)
    assert again.validation.ids == dataset.validation.ids
    other = sources.load_prepared(directory, image_size=8, seed=4, validation_fraction=0.25)
    assert other.validation.ids != dataset.validation.ids


def test_copies_of_an_image_are_held_out_together(tmp_path):
    """Each image twice, under two names; of the pairs none is on both sides."""

    def twice():
        for example in _photographs(20, "train"):
            yield example
            yield dataclasses.replace(example, id=f"{example.id} again")

    directory = stored.prepare(
        tmp_path,
        name="twice",
        config="main",
        version="1.0.0",
        class_names=("a", "b", "c", "d"),
        splits={"train": twice, "test": lambda: _photographs(5, "test")},
    )
    prepared = stored.open_prepared(directory)
    assert prepared.copies["train"].tolist() == [[k + 1, k] for k in range(0, 40, 2)]
    assert prepared.copies["test"].shape == (0, 2)
    dataset = sources.load_prepared(directory, image_size=8, validation_fraction=0.25)
    held, kept = (
        {name.removesuffix(" again") for name in split.ids}
        for split in (dataset.validation, dataset.train)
    )
    assert (len(dataset.validation.ids), len(held)) == (10, 5)
    assert not held & kept


def _damaged_set(root, *, damaged, splits=("train", "test"), **options):
    """12 images a split, in `damaged` rows with other bytes; row r has label r % 3, 0: none."""

    def examples(split):
        for row in range(12):
            image = np.random.RandomState(row).randint(0, 256, (20, 30, 3)).astype(np.uint8)
            encoded = bytearray(_encode(image, "PNG"))
            if row in damaged:
                encoded[40:60] = bytes(20)
            labels = ([0, 0], [1, 0], [0, 2])[row % 3]
            yield stored.Example(bytes(encoded), np.array(labels, np.int8), f"{split}/{row}.png")

    directory = stored.prepare(
        root,
        name="voc2007",
        config="main",
        version="1.0.0",
        class_names=("a", "b"),
        splits={split: lambda split=split: examples(split) for split in splits},
    )
    return sources.load_prepared(directory, image_size=8, validation_fraction=0.0, **options)


@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
def test_damaged_training_images_are_replaced_and_others_are_errors(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CLSL_CACHE_DIR", str(tmp_path / "home"))
    dataset = _damaged_set(tmp_path, damaged={5, 6, 11}, cache=kind)
    whole = _damaged_set(tmp_path / "whole", damaged=(), cache="none")
    for _ in range(2):
        records = [dataset.train.images[row] for row in range(12)]
        assert [int(r["row"]) for r in records] == [0, 1, 2, 3, 4, 7, 7, 7, 8, 9, 10, 0]
        assert [int(r["asked"]) for r in records] == list(range(12))
        for record in records:
            expected = whole.train.images[int(record["row"])]["image"]
            assert np.array_equal(record["image"], expected)
    for split, name in ((dataset.validation, "train"), (dataset.test, "test")):
        assert np.array_equal(split.images[4]["image"], whole.test.images[4]["image"])
        with pytest.raises(images.CorruptImage) as error:
            split.images[6]
        message = str(error.value)
        assert f"{name} row 6 ({name}/6.png)" in message
        assert str(tmp_path / "voc2007") in message
    assert "train row 6 (train/6.png)" in dataset.train.images.reason(6)


def test_files_that_are_gone_are_no_matter_of_single_images(tmp_path):
    dataset = _damaged_set(tmp_path, damaged=(), cache="none")
    (tmp_path / "voc2007/main/1.0.0/features.json").unlink()
    with pytest.raises(ValueError, match="cannot be opened") as error:
        dataset.train.images[0]
    assert not isinstance(error.value, images.CorruptImage)


def test_images_without_labels_stay_or_go(tmp_path):
    kept = _damaged_set(tmp_path, damaged=())
    assert kept.facts["without_labels_rule"] == "keep"
    assert kept.facts["dropped_without_labels"] == {"train": 0, "test": 0}
    assert len(kept.train.images) == len(kept.test.images) == 12
    dataset = _damaged_set(tmp_path, damaged=(), without_labels="drop")
    assert dataset.facts["without_labels_rule"] == "drop"
    # 2 is difficult, which is no label.
    assert dataset.facts["dropped_without_labels"] == {"train": 8, "test": 8}
    assert dataset.fingerprint == kept.fingerprint
    for split, whole in ((dataset.train, kept.train), (dataset.test, kept.test)):
        assert split.ids == [f"{split.name}/{row}.png" for row in (1, 4, 7, 10)]
        assert split.labels.tolist() == [[1, 0]] * 4
        assert split.difficult.shape == (4, 2)
        for row, original in enumerate((1, 4, 7, 10)):
            assert split.images[row]["row"] == row
            expected = whole.images[original]["image"]
            assert np.array_equal(split.images[row]["image"], expected)


def test_images_without_labels_go_before_a_validation_split_is_held_out(tmp_path):
    _damaged_set(tmp_path, damaged=())
    dataset = sources.load_dataset(
        "voc2007",
        directory=tmp_path,
        image_size=8,
        validation_fraction=0.25,
        without_labels="drop",
    )
    assert (len(dataset.train.ids), len(dataset.validation.ids)) == (3, 1)
    names = sorted(dataset.train.ids + dataset.validation.ids)
    assert names == sorted(f"train/{row}.png" for row in (1, 4, 7, 10))


def test_unknown_labels_stay_and_a_split_without_any_label_is_named(tmp_path):
    def examples(labels):
        image = _encode(np.zeros((4, 4, 3), np.uint8), "PNG")
        return [stored.Example(image, np.array(c, np.int8), str(i)) for i, c in enumerate(labels)]

    def load(name, test):
        splits = {"train": examples([[0, -1], [0, 0], [1, 2]]), "test": examples(test)}
        directory = stored.prepare(
            tmp_path, name=name, config="m", version="1.0.0", class_names=("a", "b"), splits=splits
        )
        return sources.load_prepared(
            directory, image_size=4, validation_fraction=0.0, without_labels="drop"
        )

    assert load("some", [[1, 1]]).train.ids == ["0", "2"]
    with pytest.raises(ValueError, match="no image of split test has a label"):
        load("none", [[0, 2], [0, 0]])


def test_the_newest_version_is_read_and_a_test_split_is_needed(tmp_path):
    for version in ("1.9.0", "1.10.0"):
        _prepare(tmp_path, version=version)
    assert sources.find_prepared("voc2007", tmp_path).name == "1.10.0"
    leftover = tmp_path / "voc2007" / ".incomplete" / "2.0.0"
    leftover.mkdir(parents=True)
    (leftover / "dataset_info.json").write_text("")
    assert sources.find_prepared("voc2007", tmp_path).name == "1.10.0"
    directory = _prepare(tmp_path, name="other", splits=("train",))
    with pytest.raises(ValueError, match="no split test"):
        sources.load_prepared(directory, image_size=8)


@pytest.mark.parametrize("directory", [".hidden/sets", "a/..", "a/../.b"])
def test_a_set_is_found_wherever_its_directory_lies(tmp_path, directory):
    (tmp_path / "a").mkdir()
    _prepare(tmp_path / directory)
    assert sources.find_prepared("voc2007", tmp_path / directory).is_dir()


def test_datasets_do_not_change(cache):
    with pytest.raises(dataclasses.FrozenInstanceError):
        _load(cache).name = "other"
