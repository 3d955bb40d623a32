import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import wait_for

from clsl_jax.data import cache, images
from clsl_jax.errors import InputError

SIDE = 6
ONE = SIDE * SIDE * 3


class Numbered:
    """Images of random pixels that count how often each is read; some rows cannot be."""

    def __init__(self, count=9, holes=(), wait=0.0, broken=None):
        self.count, self.holes, self.wait, self.broken = count, set(holes), wait, broken
        self.reads = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.reads.append(index)
        time.sleep(self.wait)
        if index == self.broken:
            raise InputError("the directory is gone")
        if index in self.holes:
            raise images.CorruptImage(f"row {index} is broken")
        pixels = np.random.RandomState(index).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        return {"image": pixels, "row": np.int32(index)}


def _cached(source, kind, place, count=100, **options):
    return cache.cached(
        source, kind=kind, limit_bytes=count * ONE + 5, image_size=SIDE, path=place, **options
    )


def _records(source):
    found = []
    for row in range(len(source)):
        try:
            record = source[row]
        except images.CorruptImage as error:
            found.append(str(error))
        else:
            assert sorted(record) == ["image", "row"]
            assert record["image"].dtype == np.uint8
            found.append((record["image"].tobytes(), int(record["row"])))
    return found


def _files(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_how_many_fit_by_hand():
    assert cache.held_images(1000, 448, 2**29) == 891  # 536870912 // 602112
    assert cache.held_images(1000, 64, 2**29) == 1000
    assert cache.held_images(10, 6, 108 * 3 - 1) == 2
    assert cache.held_images(10, 6, -1) == 0


@pytest.mark.parametrize("kind", cache.KINDS)
@pytest.mark.parametrize("count", [0, 1, 4, 9, 50])
def test_records_are_the_same_with_any_cache_and_in_other_processes(tmp_path, kind, count):
    expected = _records(Numbered(holes={0, 2, 8}))
    assert expected[2] == "row 2 is broken"
    held = _cached(Numbered(holes={0, 2, 8}), kind, tmp_path / "set", count)
    assert len(held) == 9
    assert _records(held) == expected
    assert _records(pickle.loads(pickle.dumps(held))) == expected
    assert _records(held) == expected
    for index in (-1, 9):
        with pytest.raises(IndexError):
            held[index]


@pytest.mark.parametrize("kind", cache.KINDS)
def test_what_is_held_is_read_once_and_the_rest_each_time(tmp_path, kind):
    source = Numbered(holes={1})
    held = _cached(source, kind, tmp_path / "set", 4)
    assert sorted(source.reads) == [0, 1, 2, 3]
    source.reads.clear()
    _records(held)
    _records(held)
    assert source.reads == [1, 4, 5, 6, 7, 8] * 2
    source.holes.clear()  # the disk was only away for a while
    assert _records(held) == _records(Numbered())


def test_the_file_is_named_and_filled_as_stated_and_found_again(tmp_path):
    lines = []
    place = tmp_path / "decoded" / "abc-train"
    _cached(Numbered(holes={2}), "disk", place, 4, report=lines.append)
    (name,) = _files(tmp_path)
    assert name.startswith("abc-train-6px-4-")
    assert name.endswith(".npy")
    path = tmp_path / "decoded" / name
    assert len(lines) == 1
    assert "4 of 9 images" in lines[0]
    assert str(path) in lines[0]
    expected = [Numbered()[row]["image"] for row in (0, 1, 3)]
    with open(path, "rb") as file:
        pixels, readable = np.load(file), np.load(file)
    assert pixels.shape == (4, 6, 6, 3)
    assert np.array_equal(pixels[[0, 1, 3]], expected)
    assert readable.tolist() == [True, True, False, True]
    before = path.stat().st_mtime_ns
    source = Numbered(holes={2})
    held = _cached(source, "disk", place, 4, report=lines.append)
    assert source.reads == []
    assert np.array_equal(held[3]["image"], expected[2])
    assert (path.stat().st_mtime_ns, len(lines)) == (before, 1)
    _cached(Numbered(), "disk", place, 5)
    assert len(_files(tmp_path)) == 2


def _cut(content):
    return content[: len(content) - len(content) // 3]


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"",
        lambda content: b"no array" * 100,
        lambda content: content.replace(b"|u1", b"|i1"),
        lambda content: content.replace(b"(4, 6, 6, 3)", b"(4, 6, 3, 6)"),
        lambda content: content.replace(b"False, 'shape'", b"True,  'shape'"),
    ],
)
def test_a_file_that_is_not_whole_is_written_again(tmp_path, damage):
    _cached(Numbered(), "disk", tmp_path / "set", 4)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    held = _cached(Numbered(), "disk", tmp_path / "set", 4)
    assert _records(held) == _records(Numbered())
    assert path.read_bytes() == whole
    assert len(_files(tmp_path)) == 1


def test_a_file_that_is_gone_is_named_by_processes_that_open_it_later(tmp_path):
    held = _cached(Numbered(), "disk", tmp_path / "set", 4)
    copy = pickle.dumps(held)
    (path,) = tmp_path.iterdir()
    path.unlink()
    assert held[2]["row"] == 2  # still mapped
    with pytest.raises(InputError, match="gone or damaged") as error:
        pickle.loads(copy)[2]
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", cache.KINDS)
def test_an_error_of_the_whole_set_ends_the_filling_and_leaves_nothing(tmp_path, kind):
    source = Numbered(count=2000, broken=20, wait=0.001)
    with pytest.raises(InputError, match="directory is gone"):
        _cached(source, kind, tmp_path / "set", 2000)
    assert len(source.reads) < 1500
    assert _files(tmp_path) == []


def test_unknown_kinds_and_places_are_named(tmp_path):
    with pytest.raises(InputError, match=r"'disc'.*memory, disk"):
        _cached(Numbered(), "disc", tmp_path / "set")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"data\.cache=none"):
        _cached(Numbered(), "disk", file / "set")
    with pytest.raises(ValueError, match="path"):
        _cached(Numbered(), "disk", None)


def _start(place, *, count, wait=0.0, before=""):
    program = (
        f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_cache\n"
        f"{before}\n"
        f"source = test_cache.Numbered({count}, wait={wait})\n"
        "try:\n"
        f"    held = test_cache._cached(source, 'disk', {str(place)!r}, {count})\n"
        f"    print(hash(held[{count} - 1]['image'].tobytes()) and len(held))\n"
        "except test_cache.InputError as error:\n"
        "    print(error)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    for before in (limit, f"{limit}\nimport os\ndel os.posix_fallocate"):
        process = _start(tmp_path / "set", count=100, before=before)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output.count("\n") == 1
        assert "100 decoded images (0.00 GiB) cannot be written (File too large)" in output
        assert "data.cache=none" in output
        assert _files(tmp_path) == []


def test_a_killed_process_leaves_no_file_that_looks_whole(tmp_path):
    process = _start(tmp_path / "set", count=5000, wait=0.01)
    try:
        wait_for(lambda: len(_files(tmp_path)) == 2, process, seconds=60)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    lock, left = _files(tmp_path)
    assert re.fullmatch(r"\.set-6px-5000-[0-9a-f]{8}\.npy\.lock", lock)
    assert re.fullmatch(r"set-6px-5000-[0-9a-f]{8}\.npy\.partial-\d+-[0-9a-f]{8}", left)
    held = _cached(Numbered(5000), "disk", tmp_path / "set", 5000)
    assert np.array_equal(held[4999]["image"], Numbered(5000)[4999]["image"])
    assert len(_files(tmp_path)) == 2
    # Debris of today may belong to a process at work; that of yesterday does not.
    yesterday = time.time() - 90_000
    os.utime(tmp_path / left, (yesterday, yesterday))
    _cached(Numbered(), "disk", tmp_path / "other", 4)
    assert not (tmp_path / left).exists()
    assert len(_files(tmp_path)) == 2


class Watching(Numbered):
    """Reads once `ready()`; notes how many files are being written then."""

    def __init__(self, count, ready, directory):
        super().__init__(count)
        self.ready, self.directory, self.seen = ready, directory, []

    def __getitem__(self, index):
        wait_for(self.ready, seconds=60)
        self.seen.append(len(list(self.directory.glob("*.partial-*"))))
        return super().__getitem__(index)


def fill(place, me, ready):
    """Fills a cache of 60 images in a process of its own; prints what it did for that."""
    source = Watching(60, ready, place.parent)
    try:
        held = _cached(source, "disk", place, 60, report=lambda line: _came(place, me).touch())
    except InputError as error:
        print(error)
        return
    print(len(source.reads), max(source.seen, default=0), _records(held) == _records(Numbered(60)))


def _came(place, name):
    """The file that says that process `name` found no cache, or that something has happened."""
    return place.parents[1] / f"{name} came"


def _start_filling(place, me, *awaited, before=""):
    """Starts a process that reads no image before the `awaited` have come."""
    program = (
        f"import os, pathlib, sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        f"import test_cache\n{before}\nplace = pathlib.Path({os.fspath(place)!r})\n"
        f"def ready(): return all(test_cache._came(place, k).exists() for k in {awaited!r})\n"
        f"test_cache.fill(place, {me!r}, ready)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _outputs(processes):
    """What they print, each to its end."""
    try:
        found = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), found
    return [output for output, _ in found]


NO_LOCKS = """
import errno, fcntl
def unsupported(*_):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
fcntl.flock = unsupported
"""


def test_of_several_processes_one_fills(tmp_path):
    """All four have found no file before one of them decodes its first image."""
    place = tmp_path / "decoded" / "set"
    outputs = _outputs([_start_filling(place, k, *"abcd") for k in "abcd"])
    assert sorted(outputs) == ["0 0 True\n"] * 3 + ["60 1 True\n"]
    (name,) = _files(place.parent)
    assert name.startswith("set-6px-60-")


def test_without_locks_each_fills_and_the_first_file_stays(tmp_path):
    place = tmp_path / "decoded" / "set"
    outputs = _outputs([_start_filling(place, k, *"ab", before=NO_LOCKS) for k in "ab"])
    assert [output.split()[0::2] for output in outputs] == [["60", "True"]] * 2
    assert len(_files(place.parent)) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="shows who waits for the lock")
@pytest.mark.parametrize("end", ["killed", "failed"])
def test_who_waits_for_a_writer_that_ends_fills_in_its_place(tmp_path, end):
    place = tmp_path / "decoded" / "set"
    fails = "def broken(*_): raise test_cache.InputError('the directory is gone')\n"
    before = f"{fails}test_cache.Numbered.__getitem__ = broken" if end == "failed" else ""
    first = _start_filling(place, "first", "end", before=before)
    second = None

    def waits():
        links = pathlib.Path(f"/proc/{second.pid}/fd").iterdir()
        return any(os.path.realpath(link).endswith(".npy.lock") for link in links)

    try:
        wait_for(lambda: list(place.parent.glob("set-*.partial-*")), first, seconds=60)
        second = _start_filling(place, "second", "end")
        wait_for(waits, first, second, seconds=60)
        assert len(list(place.parent.glob("set-*"))) == 1
        if end == "killed":
            first.kill()
            first.communicate()
        _came(place, "end").touch()
        if end == "failed":
            assert _outputs([first]) == ["the directory is gone\n"]
        partials = {"killed": 2, "failed": 1}[end]  # that of the dead, which is swept a day later
        assert _outputs([second]) == [f"60 {partials} True\n"]
    finally:
        for process in filter(None, (first, second)):
            process.kill()
    assert len(_files(place.parent)) == partials
