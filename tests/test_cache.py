import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

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
        deadline = time.monotonic() + 60
        while not _files(tmp_path):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (left,) = _files(tmp_path)
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


def test_two_processes_fill_at_once(tmp_path):
    processes = [_start(tmp_path / "set", count=60, wait=0.02) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["60\n", "60\n"]
    assert len(_files(tmp_path)) == 1
    source = Numbered(60)
    assert _records(_cached(source, "disk", tmp_path / "set", 60)) == _records(Numbered(60))
    assert source.reads == []
