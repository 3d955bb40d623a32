"""Reads files of weights: safetensors, PyTorch's three formats, and NumPy's.

No file gets to run code: safetensors has none in it, `.npz` is read without pickles, and PyTorch's
pickles go through `torch_pickle`, whose machine knows no calls but its own. Torch is not needed.

Source: `torch/serialization.py` for the zip archive (since 1.6), the stream of pickles (0.1.10 to
1.5) and the tar archive (before; torchvision's first ResNets are such files).
"""

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from clsl_jax import npz
from clsl_jax.errors import InputError
from clsl_jax.models import torch_pickle
from clsl_jax.models.torch_pickle import DamagedError, RefusedError, Storage, Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".npz")
# In this order, so that averaged weights win over the raw ones beside them.
ENVELOPES = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "weights",
    "params",
    "net",
    "module",
)
_PREFIXES = ("module.", "_orig_mod.")
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# What the tensors of a file may take: so many times its storages, or so many bytes. Each tensor is
# an array of its own, and a small file could name the same numbers any number of times.
_SHARED = 16
_EXPANDED = 1 << 27
_SAVE_AGAIN = "Download or copy the file again, and compare its size and checksum."
_CONVERT = (
    "Where the file was made, save model.state_dict() alone, or convert that to .safetensors."
)
_SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "C64": "<c8",
}


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The named arrays of a file of weights.

    A checkpoint that keeps its weights under one of `ENVELOPES` is unwrapped (the first of them
    that is there; averaged weights come first), and the prefixes that DataParallel ('module.') and
    torch.compile ('_orig_mod.') put before every name are taken off. What is no array (epochs,
    options, optimizer state) is left out.

    Args:
      path: a file ending in one of `SUFFIXES`; `.pth`, `.pt`, `.bin` and `.tar` are PyTorch's.

    Returns:
      Names to C-contiguous arrays of the file's own types (bfloat16 as
      `ml_dtypes.bfloat16`).

    Raises:
      InputError: no such file, another ending, another kind of file than its ending says, a
        truncated or damaged one, one that asks for code to be run, or one without arrays.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: weights are read from files ending in {', '.join(SUFFIXES)}, not "
            f"{suffix or 'without an ending'!r}. Name such a file, or rename this one if its "
            "ending is wrong."
        )
    if not os.path.isfile(path):
        what = "is a directory" if os.path.isdir(path) else "does not exist or may not be read"
        raise InputError(f"{path}: the file of weights {what}; give the path of a file.")
    readers = {".safetensors": read_safetensors, ".npz": _read_npz}
    try:
        found = readers.get(suffix, _read_torch)(path)
    except RefusedError as error:
        raise InputError(
            f"{path}: refused. Reading it would have to run code of the file's choosing: it asks "
            f"for {error}; only plain tensors and containers are read. {_CONVERT}"
        ) from error
    except DamagedError as error:
        raise InputError(
            f"{path}: truncated, damaged or no {suffix} file of weights ({error}). {_SAVE_AGAIN}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    return _strip_prefixes(found, path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of that format, bfloat16 among them, by their names as they are.

    Raises:
      DamagedError: it is cut off or none.
      OSError: it cannot be read.
    """
    try:
        # Not safetensors.numpy: it has no bfloat16.
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise DamagedError(str(error)) from error
    arrays = {}
    # The library returns them in a different order each time.
    for name, entry in sorted(entries, key=lambda item: item[0]):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise DamagedError(f"{name} has the element type {entry['dtype']}, which is not read")
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        try:
            arrays[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        except (ValueError, OverflowError) as error:  # more axes, or longer ones, than NumPy's
            raise DamagedError(f"{name}: {error}") from error
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        with npz.opened(path) as archive:
            for name in archive.namelist():
                if not name.endswith(".npy"):
                    raise DamagedError(f"{name} is none of NumPy's arrays")
                array = npz.member(archive, name)
                if array.dtype.kind not in "fiubc":
                    raise DamagedError(f"{name} holds {array.dtype}, which is no kind of number")
                arrays[name.removesuffix(".npy")] = np.asarray(array, order="C")
    except npz.PickleError as error:
        raise RefusedError(f"a pickle, in {error}") from error
    except npz.ArrayError as error:
        raise DamagedError(str(error)) from error
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(4)
        if not start:
            raise DamagedError("the file is empty")
        if start == b"PK\x03\x04":
            return _read_zip(file)
        content = start + file.read()  # not mapped, or whoever changes the file ends the process
    if start[:1] == b"\x80":
        return _read_stream(io.BytesIO(content))
    if content[257:262] == b"ustar" or b"\0" in content[:100]:
        return _read_tar(io.BytesIO(content))
    raise DamagedError(f"it begins with {start!r}, which none of PyTorch's formats does")


def _select(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, in an envelope or itself."""

    def tensors(mapping: Any) -> dict[str, Tensor]:
        items = mapping.items() if isinstance(mapping, dict) else ()
        return {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}

    if not isinstance(content, dict):
        raise DamagedError(
            f"it holds a {type(content).__name__}, not a mapping of names to tensors"
        )
    # Beside a state dict in its envelope there may be tensors that are no weights.
    inside = (tensors(content.get(name)) for name in ENVELOPES)
    found = next((t for t in (*inside, tensors(content)) if t), None)
    if found is None:
        names = ", ".join(repr(key) for key in list(content)[:10])
        raise DamagedError(f"no tensors under {names or 'no name at all'}")
    return found


def _views(tensors: Mapping[str, Tensor], block: Callable[[str], Any]) -> dict[str, np.ndarray]:
    """Arrays of tensors; `block` gives the little-endian bytes of a storage's key."""
    blocks: dict[str, Any] = {}
    arrays = {}
    size = room = 0
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in blocks:
            blocks[key] = block(key)
            room += _SHARED * len(blocks[key])
        arrays[name] = tensor.view(blocks[key])
        size += arrays[name].nbytes
        if size > max(room, _EXPANDED):
            raise DamagedError(
                f"up to {name}, its tensors take {size:,} bytes, many times those in the file"
            )
    return arrays


# What zipfile raises on archives that were tampered with.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, EOFError, KeyError, ValueError, RuntimeError, OverflowError),
    *(IndexError, struct.error),
)


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise DamagedError("a zip archive, but without PyTorch's data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in names:
                raise RefusedError("TorchScript code")
            if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
                # PyTorch never compresses, and a small file could otherwise fill the memory.
                raise DamagedError("a compressed archive")
            if sum(i.file_size for i in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise DamagedError("members that take more than the file")
            order = f"{root}byteorder"
            if order in names and archive.read(order) != b"little":
                raise DamagedError("written on a big-endian machine, which is not read")
            data = io.BytesIO(archive.read(pickles[0]))
            content = torch_pickle.load(data, torch_pickle.storage_reference)
            return _views(_select(content), lambda key: archive.read(f"{root}data/{key}"))
    except _ZIP_ERRORS as error:
        raise DamagedError(str(error)) from error


def _read_stream(content: BinaryIO) -> dict[str, np.ndarray]:
    magic, protocol, system = (torch_pickle.load(content) for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise DamagedError("a pickle, but not one of PyTorch's")
    if system.get("little_endian") is not True:
        raise DamagedError("written on a big-endian machine, which is not read")
    itemsize: dict[str, int] = {}

    def persistent(reference: Any) -> Storage:
        storage = torch_pickle.storage_reference(reference)
        itemsize[storage.key] = storage.dtype.itemsize
        return storage

    tensors = _select(torch_pickle.load(content, persistent))
    keys = torch_pickle.load(content)
    if not isinstance(keys, list):
        raise DamagedError("no list of storages")
    blocks = {}
    for key in map(torch_pickle.storage_key, keys):
        if key not in itemsize:
            raise DamagedError(f"storage {key:.80} is used by no tensor")
        blocks[key] = _read_block(content, itemsize[key])
    return _views(tensors, lambda key: _lookup(blocks, key))


def _read_block(content: Any, itemsize: int) -> bytes:
    """A length (int64, in elements) and that many elements."""
    (length,) = struct.unpack("<q", _read_exactly(content, 8))
    return _read_exactly(content, length * itemsize)


def _read_exactly(content: Any, count: int) -> bytes:
    data = content.read(count) if 0 <= count < 1 << 62 else b""
    if len(data) != count or count < 0:
        raise DamagedError(f"{count} bytes expected, {len(data)} left")
    return data


def _lookup(table: Mapping[str, Any], key: Any) -> Any:
    name = torch_pickle.storage_key(key)
    if name not in table:
        raise DamagedError(f"the reference {name:.80} leads nowhere")
    return table[name]


def _read_tar(file: BinaryIO) -> dict[str, np.ndarray]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = {}
            for name in ("storages", "tensors", "pickle"):
                member = archive.getmember(name)
                # Links may lead in a circle, and a sparse file is as large as it says.
                if not member.isreg() or member.issparse():
                    raise DamagedError(f"{name} is no plain file")
                members[name] = io.BytesIO(archive.extractfile(member).read())
    except (tarfile.TarError, KeyError, ValueError, OverflowError) as error:
        raise DamagedError(f"no complete tar archive of PyTorch's: {error}") from error

    blocks, storages = _read_tar_storages(members["storages"])
    tensors = {}
    for _ in range(_read_count(members["tensors"])):
        key, storage, *_ = _read_tuple(members["tensors"], 3)
        (dims,) = struct.unpack("<i4x", _read_exactly(members["tensors"], 8))
        if not 0 <= dims <= 32:
            raise DamagedError(f"a tensor of {dims} axes")
        data = _read_exactly(members["tensors"], 8 * (2 * dims + 1))
        numbers = struct.unpack(f"<{2 * dims + 1}q", data)
        if min(numbers) < 0:
            raise DamagedError(f"a tensor with the shape and strides {numbers}")
        owner = _lookup(storages, storage)
        tensors[torch_pickle.storage_key(key)] = Tensor(
            owner, numbers[-1], numbers[:dims], numbers[dims:-1], owner.dtype
        )

    known = {**storages, **tensors}

    def persistent(reference: Any) -> Any:
        if isinstance(reference, tuple):
            raise RefusedError("a module's class")
        return _lookup(known, reference)

    found = _select(torch_pickle.load(members["pickle"], persistent))
    return _views(found, lambda key: _lookup(blocks, key))


def _read_tar_storages(file: BinaryIO) -> tuple[dict[str, bytes], dict[str, Storage]]:
    """Bytes of each storage, and storages (views among them) by key."""
    blocks, storages = {}, {}
    for _ in range(_read_count(file)):
        key, _, name = _read_tuple(file, 3)
        if not (isinstance(name, torch_pickle.Name) and name.kind == "storage"):
            raise DamagedError(f"storage {torch_pickle.shown(key)} has no type")
        key = torch_pickle.storage_key(key)
        blocks[key] = _read_block(file, name.value.itemsize)
        length = len(blocks[key]) // name.value.itemsize
        storages[key] = Storage(key, name.value, length)
    views = torch_pickle.load(file)
    for view in views if isinstance(views, list) else ():
        if not isinstance(view, tuple) or len(view) != 4:
            raise DamagedError("a storage view of another form")
        key, root, offset, length = view
        if not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, length)):
            numbers = f"{torch_pickle.shown(length)} from {torch_pickle.shown(offset)}"
            raise DamagedError(f"a storage view of {numbers}")
        owner = _lookup(storages, root)
        storages[torch_pickle.storage_key(key)] = owner._replace(
            start=owner.start + offset, length=length
        )
    return blocks, storages


def _read_count(file: BinaryIO) -> int:
    count = torch_pickle.load(file)
    if not isinstance(count, int) or count < 0:
        raise DamagedError(f"a count of {torch_pickle.shown(count)}")
    return count


def _read_tuple(file: BinaryIO, length: int) -> tuple:
    found = torch_pickle.load(file)
    if not isinstance(found, tuple) or len(found) != length:
        raise DamagedError(f"{length} values expected, found {torch_pickle.shown(found)}")
    return found


def _strip_prefixes(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    if not arrays:
        raise InputError(f"{path}: there is no array in it; expected a model's weights.")
    while any(all(name.startswith(prefix) for name in arrays) for prefix in _PREFIXES):
        arrays = {name.split(".", 1)[1]: array for name, array in arrays.items()}
    return arrays
