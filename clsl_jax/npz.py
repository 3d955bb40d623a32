"""`.npz` files: written whole or not at all, and read without trusting them."""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from clsl_jax import atomic
from clsl_jax.errors import InputError, first_line

# What an archive may unpack into: so much, or so many times its own bytes. A few kilobytes of
# deflated zeros could otherwise fill the memory.
_UNPACKED = 1 << 28
_RATIO = 50
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArrayError(Exception):
    """Bytes that are no array; says why, for a message that names the file."""


class PickleError(ArrayError):
    """An array of Python objects, which only running code could read."""


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz`; a reader sees the old file or the new one, never a part.

    The bytes are a function of the arrays alone.

    Raises:
      OSError: the place cannot be written to.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with atomic.replacing(path) as partial, open(partial, "wb") as file:
        file.write(buffer.getvalue())


def read(path: str, names: Sequence[str], *, made_by: str) -> dict[str, np.ndarray]:
    """Returns the named arrays of an `.npz`; whatever else is in the file is not touched.

    Pickles are never loaded, so that a file from somebody else cannot run anything, and nothing
    larger than what the file holds is made room for.

    Args:
      path: of the file.
      names: arrays that must be there.
      made_by: what writes such files, for the message.

    Raises:
      InputError: no such file, not an `.npz`, damaged, an array missing or holding Python objects.
    """
    hint = f"expected an .npz made by {made_by}"
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file; {hint}.")
    try:
        is_archive = zipfile.is_zipfile(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if not is_archive:
        raise InputError(f"{path} is not an .npz file, or it was cut off; {hint}.")
    try:
        with opened(path) as archive:
            present = {name.removesuffix(".npy") for name in archive.namelist()}
            missing = [name for name in names if f"{name}.npy" not in archive.namelist()]
            found = {name: member(archive, f"{name}.npy") for name in names if name not in missing}
    except ArrayError as error:
        raise InputError(f"{path} is damaged or of a foreign kind ({error}); {hint}.") from None
    if missing:
        holds = ", ".join(sorted(present)) or "nothing"
        raise InputError(f"{path} lacks {', '.join(missing)} (it holds {holds}); {hint}.")
    return found


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Opens an archive whose members together are no larger than such a file may be.

    Raises:
      ArrayError: it is no zip archive, is damaged, or would unpack into far more than it is.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile fails in many ways on a file that was tampered with
            raise ArrayError(first_line(error, 200)) from error
        with archive:
            if any(i.compress_type not in _COMPRESSIONS for i in archive.infolist()):
                raise ArrayError("it is compressed by a method that NumPy does not use")
            total = sum(info.file_size for info in archive.infolist())
            if total > max(_UNPACKED, _RATIO * size):
                raise ArrayError(f"its {size:,} bytes would unpack into {total:,}")
            yield archive


def member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Returns an array of an archive of `opened`.

    Raises:
      PickleError: it holds Python objects.
      ArrayError: it is damaged or no array.
    """
    size = archive.getinfo(name).file_size
    try:
        with archive.open(name) as file:
            # All of it first: only that checks its checksum before it is parsed. Without a length
            # zipfile would unpack up to 2 GB before it looks at the size.
            data = file.read(size + 1)
    except Exception as error:  # as above, and zlib
        raise ArrayError(f"{name}: {first_line(error, 200)}") from error
    try:
        return parse(data)
    except ArrayError as error:
        raise type(error)(f"{name}: {error}") from error


def parse(data: bytes) -> np.ndarray:
    """Returns the array in the bytes of a `.npy` file.

    Raises:
      PickleError: it holds Python objects.
      ArrayError: it is damaged or no array, says that it is larger than it is, or is text that is
        no Unicode.
    """
    file = io.BytesIO(data)
    try:
        header = _HEADERS.get(np.lib.format.read_magic(file))
        if header is None:
            raise ArrayError("a version of NumPy's format that is not read")
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise PickleError("a pickle of Python objects, which is not read")
        # Before NumPy makes room for it; elements of no bytes would make any number of them free.
        left = len(data) - file.tell()
        if not dtype.itemsize or min(shape, default=0) < 0:
            raise ArrayError(f"an array of {dtype} {list(shape)}")
        if math.prod(shape) * dtype.itemsize > left:
            raise ArrayError(f"{dtype} {list(shape)} takes more than the {left:,} bytes there are")
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind == "U":
            # Numbers beyond Unicode, or half of a pair, fail wherever the text is used later.
            "".join(array.ravel().tolist()).encode().decode()
    except ArrayError:
        raise
    except Exception as error:  # NumPy's parser fails in many ways on what is no header
        raise ArrayError(first_line(error, 200)) from error
    return array
