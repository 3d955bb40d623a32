"""Every file a user hands in, mutilated: read as something valid, or an `InputError` that names it.

Nothing in a file runs, nothing hangs, and no room is made for what a file only says it holds. The
Python file of `--config` is the exception: it is code by design, as ml_collections has it.
"""

import ast
import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from commands import CONFIG, REPOSITORY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_weights_file import tensor_program, write_tar

import clsl_jax
from clsl_jax import config as config_lib
from clsl_jax import embed, npz, score
from clsl_jax.data import partial
from clsl_jax.data.formats import table
from clsl_jax.data.label_file import read_label_file
from clsl_jax.errors import InputError
from clsl_jax.models.weights_file import read_weights
from clsl_jax.text import glove, names
from clsl_jax.workdir import Workdir

CLASSES = ("cat", "dog", "tree")
IDS = ["a.jpg", "sub/b.jpg", "c.jpg", "d é.jpg"]
LABELS = np.array([[1, 0, 0], [0, 1, -1], [1, 1, 0], [0, 0, 1]], np.int8)
MASK = LABELS != 0
ROWS = [["image", *CLASSES]] + [
    [i, *map(str, r)] for i, r in zip(IDS, MASK.astype(int), strict=True)
]
SEEDS = st.integers(0, 2**32 - 1)
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
STRANGE = [
    "",
    "\0",
    "é",
    "\ufeff",
    "\u202e",
    "\U0010ffff",
    "𝟙",
    "\r",
    "\n",
    '"',
    ",",
    "\t",
    "nan",
    "-0",
]
SECONDS = 20
SMALL = 32 << 20  # bytes that reading a file of some kilobytes may take


def examples(count):
    """The same examples each time; a seed cannot be shrunk to anything simpler."""
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=count,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


class OutOfTime(BaseException):
    """No `Exception`: a reader's own handlers must not take it for a damaged file."""


@contextlib.contextmanager
def in_time():
    """Fails what hangs over one file."""

    def out_of_time(*_):
        raise OutOfTime(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the images of `IDS`; `marker` in it would be the work of a payload."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "sub").mkdir()
    for name in IDS:
        (folder / name).write_bytes(b"no image")
    yield folder
    assert not (folder / "marker").exists()


# What is read, and what it promises.


def labels_of_a_run(path):
    found = read_label_file(path, ids=IDS, class_names=CLASSES, labels=LABELS)
    assert (found.dtype, found.shape) == (np.int8, LABELS.shape)
    assert np.isin(found, (-1, 0, 1)).all()


def own_table(path, **how):
    listing = table.read_own_table(path, images=path.parent, **how)
    for split in listing.splits.values():
        assert split.labels.dtype == np.int8
        assert split.labels.shape == (len(split.ids), len(listing.class_names))
        assert np.isin(split.labels, (-1, 0, 1)).all()
        assert len(set(split.ids)) == len(split.paths) == len(split.ids)


def label_lists(path):
    own_table(path, columns=table.Columns(labels="cat"))


def embeddings(path):
    found = embed.load_embeddings(str(path), CLASSES)
    assert found.dtype == np.float32
    assert found.shape == (3, found.shape[1])
    assert np.isfinite(found).all()


def predictions(path):
    found = score.load_predictions(str(path))
    assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()
    assert found["labels"].shape == found["ignore"].shape == found["scores"].shape
    assert np.isin(found["labels"], (-1, 0, 1)).all()
    scored = score.score_file(str(path))
    json.dumps(scored, allow_nan=False).encode()
    score.tables(scored)


def weights(path):
    found = read_weights(path)
    assert found
    for name, array in found.items():
        name.encode()
        assert array.flags.c_contiguous
        array.astype(np.complex128)


def stored_config(path):
    config = Workdir.stored_config(str(path.parent))
    config_lib.validate(config)
    assert config_lib.to_json(config_lib.from_json(config_lib.to_json(config), "again"))


def label_list(path):
    for label in names.read_labels(str(path)):
        assert label.name
        assert label.text


def word_vectors(path):
    found, _, _ = glove.embed([names.Label("a", "red bus")], source=str(path))
    assert found.dtype == np.float32
    assert found.shape == (1, found.shape[1])
    assert np.isfinite(found).all()


# Genuine files.

ARRAYS = {
    "embeddings": {
        "embeddings": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "class_names": np.array(CLASSES),
    },
    "predictions": {
        "scores": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3),
        "labels": LABELS,
        "ignore": ~MASK,
        "ids": np.array(IDS),
        "class_names": np.array(CLASSES),
    },
    "weights": {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(3, np.float16)},
}


def archive(arrays, compression=zipfile.ZIP_DEFLATED):
    """An `.npz` of arrays, or of bytes that are to stand for one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, array in arrays.items():
            file.writestr(f"{name}.npy", array if isinstance(array, bytes) else array_bytes(array))
    return buffer.getvalue()


def array_bytes(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def mask_arrays():
    facts = {"shape": list(MASK.shape), "sha256": partial.matrix_sha256(MASK), "seed": 3}
    return {"bits": np.packbits(MASK), "facts": np.array(json.dumps(facts))}


def parquet(columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def genuine():
    """{name: (reader, content)}; the name's ending is the file's."""
    state = {n: torch.from_numpy(a) for n, a in ARRAYS["weights"].items()}
    zipped, stream, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"epoch": 3, "state_dict": state}, zipped)
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    with tempfile.TemporaryDirectory() as directory:
        tar.write(write_tar(pathlib.Path(directory, "tar")).read_bytes())
    rows = {s: "\n".join(s.join(row) for row in ROWS).encode() for s in ",;\t"}
    columns = dict(zip(ROWS[0], map(list, zip(*ROWS[1:], strict=True)), strict=True))
    numbers = {n: c if n == "image" else list(map(int, c)) for n, c in columns.items()}
    return {
        "known_mask.npz": (labels_of_a_run, archive(mask_arrays())),
        "mask.npy": (labels_of_a_run, array_bytes(MASK)),
        "integers.npy": (labels_of_a_run, array_bytes(MASK.astype(np.int64))),
        "labels.csv": (labels_of_a_run, rows[","]),
        "labels.tsv": (labels_of_a_run, rows["\t"]),
        "labels.parquet": (labels_of_a_run, parquet(columns)),
        "table.csv": (own_table, rows[";"]),
        "table.tsv": (own_table, rows["\t"]),
        "table.parquet": (own_table, parquet(numbers)),
        "lists.csv": (label_lists, b"image;cat;split\na.jpg;x;train\nsub/b.jpg;y;test\n"),
        "embeddings.npz": (embeddings, archive(ARRAYS["embeddings"])),
        "predictions.npz": (predictions, archive(ARRAYS["predictions"])),
        "weights.npz": (weights, archive(ARRAYS["weights"])),
        "weights.safetensors": (weights, safetensors.numpy.save(ARRAYS["weights"])),
        "zip.pth": (weights, zipped.getvalue()),
        "stream.pth": (weights, stream.getvalue()),
        "tar.pth": (weights, tar.getvalue()),
        "config.json": (stored_config, config_lib.to_json(config_lib.base_config()).encode()),
        "labels.txt": (label_list, "cat\ndog\tpet dog\nd é\n".encode()),
        "glove.txt": (word_vectors, b"2 2\nred 1 2.5\nbus -3e-2 4\n"),
    }


GENUINE = genuine()
ARCHIVES = {
    "known_mask.npz": mask_arrays(),
    "embeddings.npz": ARRAYS["embeddings"],
    "predictions.npz": ARRAYS["predictions"],
    "weights.npz": ARRAYS["weights"],
}


def refusal(reader, place):
    """The message by which a reader refuses what is there; None if that is valid."""
    try:
        with in_time():
            reader(place)
    except InputError as error:
        return str(error)
    return None


def attempt(folder, name, content):
    """Reads a file of this content; True if it was valid, False if it was refused by name."""
    reader, _ = GENUINE[name]
    path = folder / name
    path.write_bytes(content)
    try:
        message = refusal(reader, path)
    finally:
        path.unlink()
    assert message is None or name in message
    return message is None


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files_are_read(folder, name):
    assert attempt(folder, name, GENUINE[name][1])


def mutated(content, chance):
    """Content with one to six changes: a flip, a cut, a piece elsewhere, an extreme number, …"""
    content = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice([1, 1, 2, 4, 8, 30, 200]))
        kind = chance.randrange(9)
        if kind < 2 and content:
            content[at - 1] ^= 1 << chance.randrange(8)
        elif kind == 2 and content:
            content[at - 1] = chance.choice([0, 9, 10, 34, 44, 48, 57, 91, 127, 128, 255])
        elif kind == 3:
            content[at:at] = chance.randbytes(chance.randint(1, 9))
        elif kind == 4:
            del content[at:end]
        elif kind == 5 and chance.random() < 0.3:
            del content[at:]
        elif kind == 6:
            content[at:at] = content[at:end] * chance.choice([1, 1, 2, 50])
        elif kind == 7:
            width = chance.choice("IQ")
            number = chance.choice(EXTREMES) % 2 ** (8 * struct.calcsize(width))
            content[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", number)
        else:
            content[at:at] = (
                chance.choice(STRANGE).encode() or str(chance.choice(EXTREMES)).encode()
            )
    return bytes(content)


@pytest.mark.parametrize("name", GENUINE)
@given(seed=SEEDS)
@examples(60)
def test_changed_bytes(folder, name, seed):
    attempt(folder, name, mutated(GENUINE[name][1], random.Random(seed)))


@pytest.mark.parametrize("name", GENUINE)
@pytest.mark.parametrize("content", [b"", b"\0", b"\x80", b"\xff" * 99, b"PK\x03\x04", b"PAR1PAR1"])
def test_foreign_content(folder, name, content):
    assert not attempt(folder, name, content) or name.endswith((".txt", ".json"))


@pytest.mark.parametrize("name", GENUINE)
def test_a_directory_in_its_place(folder, name):
    place = folder / "directories" / name
    place.mkdir(parents=True)
    with pytest.raises(InputError, match=name):
        GENUINE[name][0](place)
    place.rmdir()
    if name == "config.json":
        return  # then there is no run, which another message says
    with pytest.raises(InputError, match=name):
        GENUINE[name][0](place)


class Payload:
    """Makes the marker when Python's unpickler reads it."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def payloads(folder):
    marker = str(folder / "marker")
    return [
        Payload(os.system, f"touch {marker}"),
        Payload(eval, f"open({marker!r}, 'w')"),
        Payload(exec, f"open({marker!r}, 'w')"),
        Payload(subprocess.check_call, ["touch", marker]),
        Payload(pathlib.Path.touch, pathlib.Path(marker)),
        Payload(open, marker, "w"),
        Payload(np.save, marker, 1),
        Payload(getattr, Payload(__import__, "os"), "getcwd"),
    ]


def test_the_payloads_would_run(tmp_path):
    for payload in payloads(tmp_path)[:-1]:
        pickle.loads(pickle.dumps(payload))
        made = list(tmp_path.glob("marker*"))
        assert made
        made[0].unlink()


# Members of archives, with checksums that are right.

DTYPES = ["?", "i1", "u1", "i8", ">u8", "f2", ">f4", "f8", "g", "c8", "S3", "U2", "V4", "M8[s]"]
DTYPES += ["m8", "U0", [("a", "f4"), ("b", "U3")], "(2,)f4"]
SHAPES = [(), (0,), (1,), (3,), (4,), (0, 3), (3, 0), (3, 4), (4, 3), (4, 3, 1), (12,), (1,) * 32]
HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 16, 0)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (True, 3.0)}",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (1099511627776,)}",
    "{'descr': '<U536870911', 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (3,)}",
    "{'descr': 'i4, (', 'fortran_order': True, 'shape': ()}",
    "{'descr': '<f4', 'shape': (3,), ['x']: 1}",
    "{'descr': __import__('os').system('true')}",
    "{'descr': " + "(" * 300 + "}",
    "{" * 5000,
    "\0",
]


def npy(header, data=b"\0" * 48, version=1):
    text = header.encode("latin-1") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text) % 2**16)
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def strange_array(array, chance, folder):
    """Another array in the place of `array`, or bytes that are nearly one."""
    kind = chance.randrange(8)
    array = np.asarray(array)
    if kind == 0:
        return np.zeros(chance.choice(SHAPES), chance.choice(DTYPES))
    if kind == 1:
        return np.array([chance.choice(payloads(folder))] * 3, object)
    if kind == 2:
        return npy(chance.choice(HEADERS), version=chance.choice([1, 1, 2, 3, 9]))
    if kind == 3:
        return mutated(array_bytes(array), chance)
    if kind == 4 and array.dtype.kind == "f":
        array = array.astype(chance.choice(["f2", ">f4", "f8", "g"]))
        with np.errstate(over="ignore"):
            array.flat[chance.randrange(array.size)] = chance.choice(
                [np.nan, np.inf, -1e9, 1e300, 1e-45]
            )
        return array
    if kind == 5 and array.dtype.kind in "iub":
        return array.astype(chance.choice(["i1", ">i2", "u8", "?"])) - chance.choice([0, 1, 2])
    if kind == 6 and array.dtype.kind == "U":
        array = array.copy().reshape(-1)
        points = array.view(np.uint32)
        points[chance.randrange(points.size)] = chance.choice(
            [0, 10, 0xD800, 0x10FFFF, 0x110000, 2**31]
        )
        return array
    return chance.choice(
        [array.T, array[..., None], array[:0] if array.ndim else array, array.ravel()]
    )


@pytest.mark.parametrize("name", ARCHIVES)
@given(seed=SEEDS)
@examples(150)
def test_changed_members(folder, name, seed):
    chance = random.Random(seed)
    arrays = dict(ARCHIVES[name])
    keys = list(arrays)
    for _ in range(chance.choice([1, 1, 2])):
        key, other = chance.choice(keys), chance.choice(keys)
        kind = chance.randrange(8)
        if kind == 0:
            arrays[key], arrays[other] = arrays[other], arrays[key]
        elif kind == 1:
            arrays[chance.choice([key + ".x", "../" + key, "/" + key, key.upper(), "é\0"])] = (
                arrays[key]
            )
        elif kind == 2 and len(arrays) > 1:
            arrays[key] = pickle.dumps(chance.choice(payloads(folder)), chance.randrange(6))
        else:
            arrays[key] = strange_array(ARCHIVES[name][key], chance, folder)
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
    attempt(folder, name, archive(arrays, chance.choice(methods)))


@pytest.mark.filterwarnings("ignore:Reading .*Python 2")
@pytest.mark.parametrize("name", ["mask.npy", "integers.npy"])
@given(seed=SEEDS)
@examples(100)
def test_changed_arrays(folder, name, seed):
    found = strange_array(MASK.astype(int), random.Random(seed), folder)
    attempt(folder, name, found if isinstance(found, bytes) else array_bytes(found))


@pytest.mark.parametrize("text", [0xD800, 0x110000])
def test_text_that_is_no_unicode(folder, text):
    arrays = dict(ARRAYS["embeddings"])
    arrays["class_names"] = arrays["class_names"].copy()
    arrays["class_names"].view(np.uint32)[1] = text
    assert not attempt(folder, "embeddings.npz", archive(arrays))


@given(seed=SEEDS)
@examples(100)
def test_changed_facts_of_a_mask(folder, seed):
    chance = random.Random(seed)
    arrays = mask_arrays()
    facts = json.loads(str(arrays["facts"]))
    facts[chance.choice(["shape", "sha256"])] = strange_value(chance)
    if chance.random() < 0.5:
        facts["shape"] = [chance.choice([*EXTREMES, -1, 3, 4.0, True, "4", None]) for _ in range(2)]
    text = chance.choice([json.dumps(facts), json.dumps(strange_value(chance)), "[" * 10**5])
    assert not attempt(folder, "known_mask.npz", archive(arrays | {"facts": np.array(text)}))


def strange_value(chance, depth=2):
    """A value as JSON can have it."""
    simple = [
        None,
        True,
        -1,
        0,
        3,
        0.5,
        1e400,
        -1e400,
        float("nan"),
        10**400,
        "",
        "epoch",
        *STRANGE,
    ]
    if depth and chance.random() < 0.3:
        inner = [strange_value(chance, depth - 1) for _ in range(chance.randrange(4))]
        return inner if chance.random() < 0.5 else dict(zip("abcd", inner, strict=False))
    return chance.choice(simple + [[], {}, [[]], "\ud800", 2**63, 2**64])


# Configurations.


@given(seed=SEEDS)
@examples(300)
def test_changed_values_of_a_stored_configuration(folder, seed):
    chance = random.Random(seed)
    stored = config_lib.base_config().to_dict()
    for _ in range(chance.choice([1, 1, 3])):
        section = chance.choice([stored, *(v for v in stored.values() if isinstance(v, dict))])
        if section:
            key = chance.choice(list(section))
            section[chance.choice([key, key, key, key + ".x", "", "é", "data.name"])] = (
                strange_value(chance)
            )
    attempt(folder, "config.json", json.dumps(stored).encode())


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, "NaN"])
def test_stored_configurations_beyond_pythons_limits(folder, text):
    assert not attempt(folder, "config.json", text.encode())


COMMANDS = """
import json, os, sys, types
import clsl_jax
from clsl_jax import config, main

# What would start JAX, and is not wanted here.
for name in ("cluster", "torch_checkpoint", "train"):
    sys.modules["clsl_jax." + name] = types.ModuleType(name)
    setattr(clsl_jax, name, sys.modules["clsl_jax." + name])
clsl_jax.cluster.meet = lambda where: None
clsl_jax.train.train_and_evaluate = lambda found, _: print(config.validate(found) or "valid")
print("ready", flush=True)
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2), os.close(read)
        sys.argv[1:] = json.loads(line)
        main.cli()
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def command():
    """Runs a command line as `python -m clsl_jax.main` would, up to the checked configuration."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": REPOSITORY},
    )

    def run(*arguments):
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        with in_time():
            return json.loads(process.stdout.readline())

    assert process.stdout.readline() == "ready\n"
    yield run
    process.stdin.close()
    process.wait()


@given(seed=SEEDS)
@examples(120)
def test_changed_overrides(command, seed):
    chance = random.Random(seed)
    flat = config_lib.flatten(config_lib.base_config())
    arguments = ["--workdir=nowhere", f"--config={CONFIG}"]
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice(list(flat))
        key = chance.choice(
            [key] * 5 + [key + ".x", key + "[0]", "." + key, key[1:], "", key + "\n"]
        )
        value = chance.choice(
            [str(strange_value(chance)), str(flat.get(key)), "(1, 'a')", "(" * 300]
        )
        no = chance.choice(["--config"] * 5 + ["--noconfig", "-config"])
        arguments.append(f"{no}.{key}" + chance.choice([f"={value}".replace("\0", "")] * 4 + [""]))
    status, said = command(*arguments)
    assert (status, said) == (0, "valid\n") or (status == 2 and said.startswith("error: ")), said
    if status == 2:
        assert any(part in said for part in ("config", *flat)), said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "get_config"),
        (b"def get_config(", "never closed"),
        (b"\xff", "decode"),
        (b"x\0", "null bytes"),
        (b"import nothing_such", "nothing_such"),
        (b"get_config = 3", "TypeError"),
        (b"def get_config():\n    open('nothing')", "cannot be loaded: [Errno 2] No such file"),
        (b"def get_config():\n    return {'seed': 1}\n", "returns a dict, expected a ConfigDict"),
        (b"def get_config():\n    return (1, 2)\n", "returns a tuple"),
        (b"from ml_collections import *\nget_config = ConfigDict", "seed is missing"),
        (None, "no such file"),
    ],
)
def test_broken_configuration_files(command, tmp_path, text, expected):
    path = tmp_path / "own.py"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    status, said = command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert status == 2, said
    assert said.startswith("error: ")
    assert expected in said


# Tables.


@pytest.mark.parametrize("name", ["labels.csv", "table.tsv", "lists.csv"])
@given(seed=SEEDS)
@examples(100)
def test_changed_cells(folder, name, seed):
    chance = random.Random(seed)
    separator = {"labels.csv": ",", "table.tsv": "\t", "lists.csv": ";"}[name]
    rows = [line.split(separator) for line in GENUINE[name][1].decode().split("\n")]
    for _ in range(chance.choice([1, 2, 5])):
        row = chance.choice(rows)
        place = chance.randrange(len(row) or 1)
        cells = [*STRANGE, "x" * 5000, "../a.jpg", "/dev/zero", "split", "1.0", "-1", "a.jpg\0"]
        row[place : place + chance.randrange(3)] = [chance.choice(cells)] * chance.randrange(2, 4)
    attempt(folder, name, "\n".join(map(separator.join, rows)).encode())


@given(seed=SEEDS)
@examples(100)
def test_columns_of_other_types(folder, seed):
    chance = random.Random(seed)
    types = [
        pyarrow.array([2**63 - 1, None, 0, 1], pyarrow.int64()),
        pyarrow.array([-(2**62), 2**62, 0, 1], pyarrow.timestamp("ms")),
        pyarrow.array([2**31 - 1, -(2**31), 0, 1], pyarrow.date32()),
        pyarrow.array([2**62, 0, 1, None], pyarrow.duration("s")),
        pyarrow.array([1e300, float("nan"), float("inf"), -0.0]),
        pyarrow.array([[1], None, [], [[1][0]] * 9]),
        pyarrow.array([{"a": "x"}, None, {}, {"a": "y"}]),
        pyarrow.array([b"\xff", b"", None, b"\0"]),
        pyarrow.array(["1", "0", None, "1"]).dictionary_encode(),
        pyarrow.nulls(4),
        pyarrow.array([True, False, None, True]),
    ]
    columns = {"image": pyarrow.array(IDS)} | dict.fromkeys(CLASSES, pyarrow.array([1, 0, 1, 0]))
    for _ in range(chance.choice([1, 2])):
        columns[chance.choice([*columns, "", "split", "é"])] = chance.choice(types)
    attempt(folder, chance.choice(["labels.parquet", "table.parquet"]), parquet(columns))


def test_parquet_of_far_more_rows_than_bytes(folder):
    content = parquet({"image": pyarrow.nulls(3_000_000, pyarrow.string())})
    assert len(content) < 50_000
    assert not attempt(folder, "table.parquet", content)


@pytest.mark.parametrize(
    "text", ["2 0\nred\n", "1 " + "9" * 5000 + "\nred 1\n", "red 1e300\nbus 1\n"]
)
def test_word_vectors_of_impossible_widths_and_numbers(folder, text):
    assert not attempt(folder, "glove.txt", text.encode())


# Pickles of torch.

GLOBALS = ["os system", "posix system", "builtins eval", "builtins exec", "builtins getattr"]
GLOBALS += ["builtins __import__", "subprocess Popen", "nt system", "pathlib Path", "io open"]
GLOBALS += [
    "numpy load",
    "numpy save",
    "torch load",
    "torch.hub load",
    "torch.storage _load_from_bytes",
]
GLOBALS += [
    "pickle loads",
    "functools partial",
    "operator attrgetter",
    "collections OrderedDict.update",
]
KNOWN = [
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch Size",
]
KNOWN += ["torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch float32"]
KNOWN += [
    "torch._utils _rebuild_tensor",
    "collections defaultdict",
    "builtins set",
    "_codecs encode",
]


def packed(program, form):
    """A `.pth` of the three formats around pickle opcodes, with 16 bytes of numbers."""
    buffer = io.BytesIO()
    if form == "zip.pth":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", program)
            file.writestr("archive/data/0", b"\0" * 16)
    elif form == "stream.pth":
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        buffer.write(b"".join(pickle.dumps(part, 2) for part in head) + program)
        buffer.write(pickle.dumps(["0"], 2) + struct.pack("<q", 4) + b"\0" * 16)
    else:
        none = pickle.dumps(0, 2)
        storages = none + pickle.dumps([], 2)
        with tarfile.open(fileobj=buffer, mode="w:") as file:
            for name, data in (("storages", storages), ("tensors", none), ("pickle", program)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def named(name):
    return b"c" + "\n".join(name.split(" ")).encode() + b"\n"


def opcodes(chance):
    """A piece of a pickle."""
    number = chance.choice([*EXTREMES, -1, 3])
    reference = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    pieces = [b"(", b"t", b"l", b"d", b"}", b"]", b")", b"0", b"1", b"2", b"N", b"\x88", b"a", b"e"]
    pieces += [
        b"s",
        b"u",
        b"b",
        b"R",
        b"\x81",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x8f",
        b"\x90",
        b"\x94",
    ]
    pieces += [b"q\0", b"h\0", b"Q", b"i" + named("os system")[1:], b"o", b"\x92", b"\x93", b"\x91"]
    pieces += [
        b"I%d\n" % number,
        b"L%dL\n" % number,
        b"K\2",
        b"S'0'\n",
        b"Vb\n",
        b"G" + b"\x7f" * 8,
    ]
    pieces += [reference] * 3 + [named(name) for name in KNOWN] * 2
    return chance.choice(pieces)


@pytest.mark.parametrize("form", ["zip.pth", "stream.pth", "tar.pth"])
@given(seed=SEEDS)
@examples(250)
def test_programs_of_pickles(folder, form, seed):
    chance = random.Random(seed)
    if chance.random() < 0.5:
        program = b"".join(opcodes(chance) for _ in range(chance.randint(1, 30))) + b"."
    else:
        numbers = [chance.choice([0, 1, 2, 4, *EXTREMES[-5:]]) for _ in range(6)]
        program = tensor_program(numbers[0], numbers[1:3], numbers[3:5], numbers[5])
        at = chance.randrange(len(program))
        program = program[:at] + opcodes(chance) * chance.choice([0, 1, 3]) + program[at:]
    attempt(folder, form, packed(program, form))


@pytest.mark.parametrize("form", ["zip.pth", "stream.pth", "tar.pth"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_payloads_and_names_outside_the_table(folder, form, protocol):
    state = {"a": 1, "state_dict": {}}
    for payload in payloads(folder):
        for content in (payload, {"x": payload} | state, state | {"state_dict": {"b": [payload]}}):
            assert not attempt(folder, form, packed(pickle.dumps(content, protocol), form))
    for name in GLOBALS:
        call = named(name) + b"(S'touch %s'\ntR." % os.fsencode(folder / "marker")
        assert not attempt(folder, form, packed(b"}S'a'\n" + call[:-1] + b"s.", form))


@pytest.mark.parametrize(
    "name", [name for name in GENUINE if name.endswith((".npz", ".npy", ".pth"))]
)
def test_a_bare_pickle_in_place_of_a_file(folder, name):
    for payload in payloads(folder):
        for protocol in range(6):
            assert not attempt(folder, name, pickle.dumps(payload, protocol))
        arrays = dict.fromkeys(
            ["bits", "facts", *ARRAYS["predictions"]], np.array([payload], object)
        )
        assert not attempt(folder, name, archive(arrays))
    if not name.endswith(".pth"):
        assert not attempt(folder, name, array_bytes(np.array([payload, 1], object)))


# Files that say they hold more than they do, or make much of little.


def refused_cheaply(folder, name, content):
    tracemalloc.start()
    try:
        assert not attempt(folder, name, content)
        assert tracemalloc.get_traced_memory()[1] < SMALL + 3 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**40,), (10**5, 10**5), (2**62, 4)])
@pytest.mark.parametrize("name", [*ARCHIVES, "mask.npy"])
def test_arrays_that_are_declared_huge(folder, name, shape):
    for dtype in ("<f4", "|b1", "<U9", "<U400000000"):
        huge = npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")
        arrays = dict.fromkeys(ARCHIVES.get(name, ()), huge)
        refused_cheaply(folder, name, archive(arrays) if arrays else huge)


def test_a_mask_whose_facts_are_huge(folder):
    for shape in ([2**20, 2**20], [2**40, 1], [4, 2**31]):
        facts = np.array(json.dumps({"shape": shape, "sha256": ""}))
        refused_cheaply(folder, "known_mask.npz", archive(mask_arrays() | {"facts": facts}))


@pytest.mark.parametrize("name", ARCHIVES)
def test_zip_bombs(folder, name, monkeypatch):
    monkeypatch.setattr(npz, "_UNPACKED", SMALL)
    zeros = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (50000000,)}", bytes(50_000_000))
    key = next(iter(ARCHIVES[name]))
    bomb = archive(ARCHIVES[name] | {key: zeros})
    refused_cheaply(folder, name, bomb)
    # The same, but it says that it is small; and of a kind that cannot be unpacked in parts.
    size = struct.pack("<I", len(zeros))
    assert bomb.count(size) == 2
    refused_cheaply(folder, name, bomb.replace(size, struct.pack("<I", 150)))
    if name == "weights.npz":
        refused_cheaply(
            folder, name, archive({key: zeros}, zipfile.ZIP_BZIP2).replace(size, b"\x96\0\0\0")
        )


def test_members_of_a_torch_archive_that_lie_on_one_another(folder):
    tensor = tensor_program(0, (2**18,), (1,), 2**18)[1:-2]
    tensors = (tensor.replace(b"X\1\0\0\0a", b"S'%d'\n" % n) for n in range(100))
    tensors = (t.replace(b"S'0'\nS'cpu'", b"S'%d'\nS'cpu'" % n) for n, t in enumerate(tensors))
    # Each holds the next one with its header, so that all of them are whole.
    infos, content = [], bytes(1 << 20)
    for number in reversed(range(100)):
        info = zipfile.ZipInfo(f"archive/data/{number}")
        info.CRC = zlib.crc32(content)
        info.file_size = info.compress_size = len(content)
        content = info.FileHeader() + content
        infos.append((info, len(content)))
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("archive/data.pkl", b"}" + b"s".join(tensors) + b"s.")
        for info, size in infos:
            info.header_offset = len(content) - size
            file.filelist.append(info)
    refused_cheaply(folder, "zip.pth", buffer.getvalue())


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_members_of_a_tar_that_are_no_plain_files(folder, kind):
    member = tarfile.TarInfo("storages")
    member.type, member.linkname = kind, "storages"
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if kind == tarfile.GNUTYPE_SPARSE:
        header[483:495] = b"77777777777\0"  # its size with its holes: 8 GB
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    refused_cheaply(folder, "tar.pth", bytes(header) + bytes(10240))


def program_of(*parts):
    return b"".join(parts) + b"."


REPEATED = tensor_program(0, (2**20, 4), (0, 1))[:-1]
BOMBS = {
    # A tuple of two of the same, sixty times over, where a message would show it.
    "called": program_of(b"]", b"2\x86" * 60, b")R"),
    "referred to": program_of(b"]", b"2\x86" * 60, b"Q"),
    "as a shape": program_of(
        *(named("torch._utils _rebuild_tensor_v2"), b"((S'storage'\nctorch\nFloatStorage\nS'0'\n"),
        *(b"S'cpu'\nI4\ntQI0\n]", b"2\x86" * 60, b"\x85)I00\nNtR"),
    ),
    "as a storage's key": program_of(
        *(b"(S'storage'\nctorch\nFloatStorage\n]", b"2\x86" * 60, b"S'cpu'\nI4\ntQ"),
    ),
    "copied by calls": program_of(
        *(b"](", b"K\1" * 100_000, b"e\x85q\0", (named("torch Size") + b"h\0R0") * 100_000, b"}"),
    ),
    "named by many tensors": program_of(
        *(b"}(", REPEATED[1 : REPEATED.index(b"R")] + b"Rq\1"),
        *(b"S'%d'\nh\1" % number for number in range(20_000)),
        b"u",
    ),
    "digits": program_of(b"\x8b", struct.pack("<i", 10**6), b"\x7f" * 10**6),
    "depth": program_of(b"(" * 10**5),
    "tuples in tuples": program_of(b")", b"\x85" * 10**5),
}


@pytest.mark.parametrize("form", ["zip.pth", "stream.pth", "tar.pth"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_small_pickles_that_make_much(folder, form, bomb, monkeypatch):
    monkeypatch.setattr("clsl_jax.models.weights_file._EXPANDED", 1 << 25)
    path = folder / form
    path.write_bytes(packed(BOMBS[bomb], form))
    with pytest.raises(InputError, match=form):
        read_weights(path)


def test_counts_in_a_tar_of_many_digits(folder):
    for count in (-(10**5000), 10**5000, -1, "x"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:") as file:
            for name in ("storages", "tensors", "pickle"):
                data = pickle.dumps(count, 2)
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        assert not attempt(folder, "tar.pth", buffer.getvalue())


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**62, 4], [1] * 65, [0] + [2**20] * 9])
def test_shapes_of_nothing_that_numpy_has_not(folder, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 4]}
    header = json.dumps({"a": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(0 if 0 in shape else 4)
    attempt(folder, "weights.safetensors", content)
    for form in ("zip.pth", "stream.pth"):
        attempt(folder, form, packed(tensor_program(0, shape, [1] * len(shape)), form))


# Code that runs what a file says.

RUN = {"eval", "exec", "compile", "__import__"}
LOADS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "yaml"}


def dangerous_calls(source):
    """Returns what in Python source could run code from data, as (line, text)."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or ""] + [name.name for name in node.names]
            if any(module.split(".")[0] in LOADS for module in modules):
                found.append((node.lineno, ast.unparse(node)))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        pickles = [k for k in node.keywords if k.arg == "allow_pickle"]
        if (
            name in RUN
            or name.removeprefix("builtins.") in RUN
            or (
                name.split(".")[0] in LOADS
                and name.endswith(("load", "loads", "Unpickler", "open"))
            )
            or any(
                not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in pickles
            )
            or (name == "np.load" and len(node.args) > 1)
            or name == "os.system"
            or name.endswith("read_pickle")
            or any(k.arg == "shell" for k in node.keywords)
        ):
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_the_scan_finds_what_it_is_for():
    for line in (
        *(
            "import pickle",
            "from torch import load",
            "torch.load(f)",
            "eval(x)",
            "builtins.exec(x)",
        ),
        *(
            "np.load(f, allow_pickle=True)",
            "np.load(f, allow_pickle=flag)",
            "np.load(f, None, True)",
            "os.system(x)",
        ),
        *("import torch.hub", "subprocess.run(x, shell=True)"),
    ):
        assert dangerous_calls(line), line
    assert not dangerous_calls("np.load(f); np.load(f, allow_pickle=False); torch_pickle.load(f)")


def test_nothing_in_the_package_runs_what_a_file_says():
    # `--config=FILE.py` is run by ml_collections, by design: a configuration is a program.
    package = pathlib.Path(clsl_jax.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert len(files) > 50
    found = {
        str(path.relative_to(package)): calls
        for path in files
        if (calls := dangerous_calls(path.read_text(encoding="utf-8")))
    }
    assert found == {}
