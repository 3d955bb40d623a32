"""Decoded images held in memory or in a file, up to a limit; pixels are the same with any cache.

The file is `PLACE-<S>px-<K>-<decoding>.npy`: the first K images as uint8 [K, S, S, 3], which every
process maps to memory, so that the operating system holds them once, and behind them, as a second
array, bool [K]: which of them could be read.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from clsl_jax import atomic
from clsl_jax.data import images as images_lib
from clsl_jax.data.images import Images
from clsl_jax.data.threads import usual_number
from clsl_jax.errors import InputError

KINDS = ("memory", "disk")


def held_images(count: int, image_size: int, limit_bytes: int) -> int:
    """Returns how many of `count` decoded images fit within the limit, K."""
    return min(count, max(0, limit_bytes) // (image_size**2 * 3))


def cached(
    images: Images,
    *,
    kind: str,
    limit_bytes: int,
    image_size: int,
    path: str | os.PathLike | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Images:
    """Holds the first K images decoded; the others are read from `images` each time.

    An image that cannot be read while the cache is filled is tried again whenever it is asked for.

    Args:
      images: what to hold, uint8 [S, S, 3] each.
      kind: 'memory': an array of this process (and one of each worker process); 'disk': a file that
        all processes share and that later runs find again; one writes it, and the others wait.
      limit_bytes: K is what fits, at 3 S^2 bytes an image.
      image_size: side S in pixels.
      path: of kind 'disk': directory and beginning of the file's name; to name all that decides on
        the images other than size, number and decoding.
      report: takes a line when a file is about to be written, which may take long, or waited for.

    Returns:
      Images with the same records; picklable if `images` is.

    Raises:
      InputError: an unknown kind, or the file cannot be written.
    """
    if kind not in KINDS:
        raise InputError(f"cache={kind!r}: expected one of {', '.join(KINDS)}.")
    count = held_images(len(images), image_size, limit_bytes)
    if not count:
        return images
    shape = (count, image_size, image_size, 3)
    if kind == "memory":
        return _in_memory(images, shape)
    if path is None:
        raise ValueError("path: expected where to keep the file of a cache on disk")
    digest = hashlib.sha256(images_lib.decoding().encode()).hexdigest()[:8]
    path = pathlib.Path(f"{os.fspath(path)}-{image_size}px-{count}-{digest}.npy")
    if _open(path, shape) is None:
        size = f"{np.prod(shape) / 2**30:.2f} GiB"
        report(f"decoding {count} of {len(images)} images, once, to {path} ({size})")
        _write(images, path, shape)
    return DiskCache(images, path, shape)


class _Cache:
    """Images of which the first K are held; subclasses say where."""

    def __init__(self, images: Images, readable: np.ndarray):
        """`readable` is bool [K]: the rows that are held."""
        self._images = images
        self._readable = readable

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        if 0 <= index < len(self._readable) and self._readable[index]:
            return {"image": self._held(int(index)), "row": np.int32(index)}
        return self._images[index]

    def _held(self, index: int) -> np.ndarray:
        raise NotImplementedError


class MemoryCache(_Cache):
    """The first K images in an array of this process."""

    def __init__(self, images: Images, pixels: np.ndarray, readable: np.ndarray):
        """`pixels` is uint8 [K, S, S, 3]."""
        super().__init__(images, readable)
        self._pixels = pixels

    def _held(self, index: int) -> np.ndarray:
        return self._pixels[index]


class DiskCache(_Cache):
    """The first K images in a file; opened anew in every process."""

    def __init__(self, images: Images, path: pathlib.Path, shape: tuple[int, ...]):
        """`path` is a file that `cached` wrote, of `shape` [K, S, S, 3]."""
        self._path, self._shape = path, shape
        self._pixels, readable = self._opened()
        super().__init__(images, readable)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        found = _open(self._path, self._shape)
        if found is None:
            raise InputError(f"{self._path}: decoded images are gone or damaged; start again.")
        return found

    def _held(self, index: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self._opened()[0]
        # A copy, so that waiting for the disk happens here and not where batches are put together.
        return np.array(self._pixels[index])


def _in_memory(images: Images, shape: tuple[int, ...]) -> MemoryCache:
    pixels = np.empty(shape, np.uint8)

    def put(row: int, image: np.ndarray) -> None:
        pixels[row] = image

    readable = _fill(images, shape[0], put)
    pixels.flags.writeable = False
    return MemoryCache(images, pixels, readable)


def _fill(images: Images, count: int, put: Callable[[int, np.ndarray], None]) -> np.ndarray:
    """Hands the first `count` images to `put`, from several threads.

    Returns:
      bool [count]: which could be read.
    """
    readable = np.zeros(count, bool)
    threads = usual_number()
    stop = threading.Event()

    def fill(rows: range) -> None:
        for row in rows:
            if stop.is_set():
                return
            with contextlib.suppress(images_lib.CorruptImage):
                put(row, images[row]["image"])
                readable[row] = True

    fill(range(1))  # opens the files once, before there are threads
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(fill, range(1 + k, count, threads)) for k in range(threads)]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        finally:
            stop.set()
    return readable


def _open(path: pathlib.Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns (pixels, readable) of a file; None if there is none, or it is not whole."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        if pixels.shape != shape or pixels.dtype != np.uint8 or not pixels.flags.c_contiguous:
            return None
        with open(path, "rb") as file:
            file.seek(pixels.offset + pixels.nbytes)
            readable = np.load(file, allow_pickle=False)
            at_end = not file.read(1)
    except (OSError, ValueError, EOFError):
        return None
    whole = at_end and readable.shape == shape[:1] and readable.dtype == bool
    return (pixels, readable) if whole else None


@contextlib.contextmanager
def writer(path: pathlib.Path, *, wait: bool) -> Iterator[bool]:
    """Makes one of the processes that want to write a file its writer, as long as the block lasts.

    Whoever has become the writer looks again whether the file is there. The lock is on an empty
    file beside it, `.NAME.lock`, which is removed at the end; the system lets go when the process
    ends, however it ends. On a file system without locks every process is a writer.

    Args:
      path: of the file, in a directory that exists.
      wait: until no other process is the writer.

    Yields:
      Whether this process is the writer; always True with `wait`.
    """
    name = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        mine = True
        try:
            while not _locked(held.enter_context(open(name, "ab")), name, wait):
                held.close()
        except BlockingIOError:
            mine = False
        except OSError:
            pass  # no locks here, or nothing can be written, which writing the file will tell
        try:
            yield mine
        finally:
            if mine:
                with contextlib.suppress(OSError):
                    name.unlink()


def _locked(lock: BinaryIO, name: pathlib.Path, wait: bool) -> bool:
    """Locks an open file; False if whoever held it has removed it, so that the lock is void."""
    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


class _Outrun(Exception):
    """Another process has put the file there, which others may have opened: it stays."""


def _write(images: Images, path: pathlib.Path, shape: tuple[int, ...]) -> None:
    """Writes the file beside its place and moves it there, or waits for the process that does.

    Without locks every process writes one; the first to finish wins.
    """
    with _unwritable(path, shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writer(path, wait=True):
            if _open(path, shape) is not None:
                return
            atomic.sweep(atomic.leftovers(path.parent))
            atomic.sweep(path.parent.glob(".incomplete-*"))  # of earlier versions
            with contextlib.suppress(_Outrun), atomic.replacing(path) as partial:
                with open(partial, "wb") as file:
                    _write_arrays(images, file, shape)
                if _open(path, shape) is not None:
                    raise _Outrun
        _sync_directory(path.parent)


def _write_arrays(images: Images, file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    start, stride = file.tell(), int(np.prod(shape[1:]))
    end = start + stride * shape[0]
    reserve(file.fileno(), end)

    def put(row: int, image: np.ndarray) -> None:
        # Written, and not stored through a map: on a full disk a map kills the process.
        left, position = memoryview(image.tobytes()), start + row * stride
        while left:
            written = os.pwrite(file.fileno(), left, position)
            left, position = left[written:], position + written

    readable = _fill(images, shape[0], put)
    os.ftruncate(file.fileno(), end)  # rows that could not be read may have been the last ones
    file.seek(end)
    np.save(file, readable)
    file.flush()
    # Here, so that no time passes between looking who was first and moving the file.
    os.fsync(file.fileno())


def reserve(descriptor: int, length: int) -> None:
    """Takes the space of a file at once: a full disk is noticed before hours of work.

    Args:
      descriptor: of the open file.
      length: bytes.

    Raises:
      OSError: there is no such space.
    """
    try:
        os.posix_fallocate(descriptor, 0, length)
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _sync_directory(directory: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can; then the name may be lost
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _unwritable(path: pathlib.Path, shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: {shape[0]} decoded images ({np.prod(shape) / 2**30:.2f} GiB) cannot be "
            f"written ({error.strerror or error}); make room, lower data.cache_gb, name another "
            "directory by the environment variable CLSL_CACHE_DIR, or use data.cache=none."
        ) from error
