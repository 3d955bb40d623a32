"""Reads the pickles inside files of `torch.save` without Python's unpickler and without torch.

A pickle is a program for a stack machine, and Python's machine may call anything it can import. The
one here knows containers, numbers, text and a fixed table of names, all of which it maps to its own
inert constructors: nothing is ever imported or called by a file's wish.

Source: CPython's `pickletools` (the opcodes), `torch/_utils.py` (arguments of the names).
"""

import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

# Expanded views (stride 0) may be far larger than their file; none of a real network comes near.
_MAX_EXPANDED = 1 << 24

DTYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


class RefusedError(Exception):
    """The pickle asks for something outside the table of names."""


class DamagedError(Exception):
    """The pickle is no valid one, or says impossible things."""


_REPR = reprlib.Repr()
_REPR.maxlevel = 2


def shown(value: Any) -> str:
    """A value in a few words; a pickle can build one that takes years to write out."""
    try:
        return f"{_REPR.repr(value):.80}"
    except ValueError:
        return "a number of many digits"


class Name(NamedTuple):
    """An admitted name.

    Attributes:
      kind: 'storage' and 'tensor_type' (value: dtype or None where untyped), 'dtype' or 'call'.
      value: as the kind says; for 'call' a function of this module.
    """

    kind: str
    value: Any


class Storage(NamedTuple):
    """A reference to a block of numbers that stands elsewhere in the file.

    Attributes:
      key: its name there.
      dtype: type of its elements; uint8 for untyped storages.
      length: number of elements.
      start: first element inside the block that `key` names.
    """

    key: str
    dtype: np.dtype
    length: int
    start: int = 0


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def view(self, block: bytes | memoryview) -> np.ndarray:
        """The tensor as a new C-contiguous array.

        Args:
          block: the bytes that the storage's key names, little endian.

        Raises:
          DamagedError: the view reaches outside its storage.
        """
        size = self.dtype.itemsize
        start = self.storage.start * self.storage.dtype.itemsize
        length = self.storage.length * self.storage.dtype.itemsize
        if len(block) < start + length:
            raise DamagedError(f"storage {self.storage.key} has {len(block)} bytes")
        count = int(np.prod(self.shape, dtype=object))
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((n - 1) * step for n, step in steps) if count else 0
        if (last + 1) * size > length and count:
            raise DamagedError(
                f"a tensor of shape {self.shape} reaches beyond storage {self.storage.key}"
            )
        if count * size > max(length, _MAX_EXPANDED):
            raise DamagedError(f"a tensor of shape {self.shape} repeats {length} bytes")
        if not count:
            try:
                return np.zeros(self.shape, self.dtype)
            except ValueError as error:  # the other axes may be of any length
                raise DamagedError(f"a tensor of shape {self.shape}: {error}") from error
        flat = np.frombuffer(block, self.dtype, last + 1, start)[self.offset :]
        steps = zip(self.shape, self.strides, strict=True)
        strides = tuple(step * size if n > 1 else 0 for n, step in steps)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False).copy()


class _Inert:
    """Stands for an object that no weights are in; takes its items and attributes, keeps none."""


def _check_view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype) -> Tensor:
    numbers = (offset, *shape, *strides)
    plain = all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers)
    if not (isinstance(storage, Storage) and plain and len(shape) == len(strides) <= 32):
        what = f"shape {shown(shape)}, strides {shown(strides)}, offset {shown(offset)}"
        raise DamagedError(f"no tensor: {what}")
    return Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def _refuse_metadata(metadata: Any) -> None:
    if metadata:
        raise RefusedError("a tensor that is marked conjugate or negative")


def _rebuild_tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Tensor:
    if not isinstance(storage, Storage):
        raise DamagedError(f"a tensor of {shown(storage)}, which is no storage")
    return _check_view(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    _refuse_metadata(metadata)
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    requires_grad: bool,
    hooks: Any,
    dtype: Name,
    metadata: Any = None,
) -> Tensor:
    _refuse_metadata(metadata)
    if not (isinstance(dtype, Name) and dtype.kind == "dtype"):
        raise DamagedError(f"{shown(dtype)} is no element type")
    return _check_view(storage, offset, shape, strides, dtype.value)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise DamagedError("a parameter that is no tensor")
    return data


def _mapping(items: Any = ()) -> dict:
    return {_key(key): value for key, value in items}


def _inert(*_: Any) -> _Inert:
    return _Inert()


_CALLS = {
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.parameter Parameter": _rebuild_parameter,
    "collections OrderedDict": _mapping,
    # What stands beside the weights in training checkpoints: options, counters, best scores.
    "collections defaultdict": lambda *_: {},
    "argparse Namespace": _inert,
    "types SimpleNamespace": _inert,
    "pathlib PosixPath": _inert,
    "pathlib PurePosixPath": _inert,
    "_codecs encode": _inert,
    "numpy dtype": _inert,
    "numpy ndarray": _inert,
    "numpy.core.multiarray scalar": _inert,
    "numpy.core.multiarray _reconstruct": _inert,
    "numpy._core.multiarray scalar": _inert,
    "numpy._core.multiarray _reconstruct": _inert,
    "torch Size": lambda items=(): _size(items),
    "torch device": _inert,
    **{
        f"{module} {name}": _inert
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "dict", "int", "float")
    },
}


def _size(items: Any) -> tuple[Any, ...]:
    """The tuple of a list or tuple; of text it would be many times as large."""
    if not isinstance(items, (list, tuple)):
        raise DamagedError("a size that is no list of numbers")
    return tuple(items)


def _find_name(module: str, name: str) -> Name:
    """The admitted name; RefusedError for every other."""
    if f"{module} {name}" in _CALLS:
        return Name("call", _CALLS[f"{module} {name}"])
    if module == "torch" and name in DTYPES:
        return Name("dtype", DTYPES[name])
    if module in ("torch", "torch.cuda", "torch.storage"):
        if name == "UntypedStorage":
            return Name("storage", DTYPES["uint8"])
        for ending, kind in (("Storage", "storage"), ("Tensor", "tensor_type")):
            if name.removesuffix(ending) in _STORAGES and name.endswith(ending):
                return Name(kind, DTYPES[_STORAGES[name.removesuffix(ending)]])
    raise RefusedError(f"{module}.{name}")


def _key(key: Any) -> Any:
    # Deeply nested tuples as keys overflow the C stack while they are hashed.
    if key is not None and not isinstance(key, str | bytes | int | float):
        raise DamagedError(f"a dictionary key of type {type(key).__name__}")
    return key


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": _Inert}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine; one run."""

    def __init__(self, persistent: Callable[[Any], Any]):
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Opcodes run, and values that calls were given: a call may copy all of a list, and many
        # calls may name the same one.
        self.steps = self.given = 0

    def pop_mark(self) -> list[Any]:
        """The items since the last mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def step(self, op: str, arg: Any) -> None:
        """Runs one opcode (all but STOP)."""
        self.steps += 1
        stack = self.stack
        if op in _LITERALS:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(arg)] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(arg)])
        elif op == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self.pop_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op not in ("PROTO", "FRAME"):
            self.build(op, arg)

    def build(self, op: str, arg: Any) -> None:
        """Opcodes that make or fill an object."""
        if op in _TUPLES:
            count = _TUPLES[op]
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif op in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items = self.pop_mark()
            made = {"TUPLE": tuple, "LIST": list, "DICT": _pairs, "FROZENSET": _inert}[op](items)
            self.stack.append(made)
        elif op in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "ADDITEMS"):
            self.fill(op)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            if op == "STACK_GLOBAL":
                name, module = self.stack.pop(), self.stack.pop()
            else:
                module, _, name = arg.partition(" ")
            self.stack.append(_find_name(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, name = self.stack.pop(), self.stack.pop()
            if not (isinstance(name, Name) and name.kind == "call"):
                raise RefusedError(f"a call of {shown(name)}")
            containers = (a for a in arguments if isinstance(a, (list, tuple, dict)))
            self.given += len(arguments) + sum(map(len, containers))
            if self.given > 10_000 + 100 * self.steps:
                raise DamagedError("calls that repeat the same values")
            self.stack.append(name.value(*arguments))
        elif op == "BUILD":
            # Attributes: hooks, metadata, options. None of them is a weight.
            self.stack.pop()
        elif op in ("BINPERSID", "PERSID"):
            self.stack.append(self.persistent(self.stack.pop() if op == "BINPERSID" else arg))
        else:
            raise RefusedError(f"the opcode {op}")

    def fill(self, op: str) -> None:
        """Puts items into the container below them."""
        one = {"SETITEM": 2, "APPEND": 1}.get(op)
        if one:
            items = self.stack[-one:]
            del self.stack[-one:]
        else:
            items = self.pop_mark()
        container = self.stack[-1]
        if isinstance(container, _Inert):
            return
        if op.startswith("SETITEM") and isinstance(container, dict):
            container.update(_pairs(items))
        elif op.startswith("APPEND") and isinstance(container, list):
            container.extend(items)
        else:
            raise DamagedError(f"{op} on a {type(container).__name__}")


def _pairs(items: list[Any]) -> dict:
    if len(items) % 2:
        raise DamagedError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def load(file: BinaryIO, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Runs one pickle; the file then stands behind it.

    Args:
      file: a seekable binary file that stands where the pickle begins.
      persistent: makes an object of a persistent id; None refuses them.

    Returns:
      dict, list, tuple, numbers, text, `Name`, `Tensor`, and stand-ins for everything else.

    Raises:
      RefusedError: it names something that is not in the table.
      DamagedError: it is no valid pickle.
    """
    machine = _Machine(persistent or _no_persistent)
    try:
        for opcode, arg, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, arg)
    except (RefusedError, DamagedError):
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as e:
        raise DamagedError(f"{type(e).__name__}: {e}") from e
    raise DamagedError("the pickle has no end")


def _no_persistent(reference: Any) -> Any:
    raise DamagedError(f"an unexpected reference {shown(reference)}")


def storage_key(key: Any) -> str:
    """The key of a storage as text; torch writes them as text and as numbers.

    Raises:
      DamagedError: it is neither.
    """
    if not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 64)):
        raise DamagedError(f"a storage of the name {shown(key)}")
    return str(key)


def storage_reference(reference: Any) -> Any:
    """The storage that a persistent id ('storage', type, key, location, length[, view]) means.

    Raises:
      RefusedError: the id is another kind of thing: a module's class.
      DamagedError: it is none.
    """
    if not (isinstance(reference, tuple) and 5 <= len(reference) <= 6) or reference[0] != "storage":
        kind = reference[0] if isinstance(reference, tuple) and reference else reference
        if kind == "module":
            raise RefusedError("a module's class")
        raise DamagedError(f"reference {shown(kind)}")
    _, name, key, _, length, *view = reference
    if not (isinstance(name, Name) and name.kind == "storage" and isinstance(length, int)):
        raise DamagedError(f"storage {shown(key)}")
    start = 0
    if view and view[0] is not None:
        _, start, length = view[0]
    if not (isinstance(start, int) and 0 <= start < 1 << 62 and 0 <= length < 1 << 62):
        numbers = f"{shown(length)} elements from {shown(start)}"
        raise DamagedError(f"storage {shown(key)} of {numbers}")
    return Storage(storage_key(key), name.value, length, start)
