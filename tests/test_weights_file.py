"""Files of weights against torch's and safetensors' own writers, and against bad files."""

import argparse
import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clsl_jax.errors import InputError
from clsl_jax.models.weights_file import read_weights

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
TMP_PATH_IS_SHARED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def save(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            assert found[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())
        else:
            assert found[name].dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(found[name], tensor.numpy())
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].flags.c_contiguous


@pytest.fixture
def state():
    """Every kind of view and element type that weights come in."""
    torch.manual_seed(0)
    block = torch.randn(4, 5, 6)
    return OrderedDict(
        {
            "plain": torch.randn(3, 4),
            "transposed": block.permute(2, 0, 1),
            "row": block[1],
            "every_other": block[:, ::2, 1:],
            "last": block[3, 4, 5],
            "expanded": torch.randn(1, 3).expand(4, 3),
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(7),
            "half": torch.randn(5).half(),
            "bfloat16": torch.randn(5).bfloat16(),
            "double": torch.randn(5).double(),
            "int32": torch.arange(5, dtype=torch.int32),
            "uint8": torch.arange(5, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "complex64": torch.randn(2, dtype=torch.complex64),
        }
    )


@FORMATS
def test_torch_files(tmp_path, state, zipped):
    assert_same(read_weights(save(tmp_path / "a.pth", state, zipped)), state)


def test_element_types_without_a_storage_of_their_own(tmp_path):
    state = {"a": torch.arange(6).to(torch.uint16).reshape(2, 3).T}
    assert_same(read_weights(save(tmp_path / "a.pt", state)), state)


@FORMATS
def test_state_dict_of_a_module(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = save(tmp_path / "a.pth", module.state_dict(), zipped)
    assert_same(read_weights(path), module.state_dict())


@FORMATS
@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema"])
def test_training_checkpoints_are_unwrapped(tmp_path, zipped, key):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {f"module.{n}": a for n, a in module.state_dict().items()}
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, size=(448, 448)),
        "best": np.float64(0.5),
        "device": torch.device("cpu"),
        "shape": torch.ones(2, 3).shape,
        "optimizer": optimizer.state_dict(),
        key: state,
    }
    found = read_weights(save(tmp_path / "a.pth", content, zipped))
    assert_same(found, module.state_dict())


def test_averaged_weights_come_before_the_raw_ones(tmp_path):
    content = {"state_dict": {"a": torch.zeros(2)}, "state_dict_ema": {"a": torch.ones(2)}}
    np.testing.assert_array_equal(read_weights(save(tmp_path / "a.pth", content))["a"], [1, 1])


@FORMATS
def test_tensors_beside_a_state_dict_are_no_weights(tmp_path, zipped):
    """As the accuracy that PyTorch's ImageNet example saves, or the state of a generator."""
    module = torch.nn.Linear(3, 2)
    content = {"state_dict": module.state_dict(), "best_acc1": torch.tensor([76.1])}
    assert_same(read_weights(save(tmp_path / "a.pth", content, zipped)), module.state_dict())


def test_prefixes_are_taken_off_only_where_all_names_have_them(tmp_path):
    compiled = {"module._orig_mod.a": torch.ones(1), "module._orig_mod.b.c": torch.ones(1)}
    assert list(read_weights(save(tmp_path / "a.pth", compiled))) == ["a", "b.c"]
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_weights(save(tmp_path / "b.pth", mixed))) == ["module.a", "b"]


def write_tar(path):
    """The archive of torch before 0.1.10, which today's torch reads and no longer writes."""
    block = np.arange(24, dtype=np.float32)
    storages, tensors, main = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(1, storages, 2)
    pickle.dump((100, "cpu", torch.FloatStorage), storages, 2)
    storages.write(struct.pack("<q", block.size) + block.tobytes())
    pickle.dump([(101, 100, 12, 12)], storages, 2)
    pickle.dump(2, tensors, 2)
    for key, storage, shape, strides, offset in (
        (200, 100, (2, 3, 4), (12, 1, 3), 0),
        (201, 101, (5,), (2,), 1),
    ):
        pickle.dump((key, storage, torch.FloatTensor), tensors, 2)
        tensors.write(struct.pack("<i4x", len(shape)))
        tensors.write(struct.pack(f"<{len(shape)}q", *shape))
        tensors.write(struct.pack(f"<{len(shape)}q", *strides))
        tensors.write(struct.pack("<q", offset))

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return {"first": "200", "second": "201"}.get(item) if item in tokens else None

    tokens = ["first", "second"]
    Pickler(main, 2).dump(OrderedDict([("a.weight", tokens[0]), ("b.weight", tokens[1])]))
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("storages", storages), ("tensors", tensors), ("pickle", main)):
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    return path


def test_tar_archives_of_the_first_torch(tmp_path):
    path = write_tar(tmp_path / "a.pth")
    assert_same(read_weights(path), torch.load(path, weights_only=False))
    np.testing.assert_array_equal(read_weights(path)["b.weight"], [13, 15, 17, 19, 21])


def test_safetensors(tmp_path, state):
    state = {n: a.detach().contiguous() for n, a in state.items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors")
    assert sorted(found) == sorted(state)
    assert_same({n: found[n] for n in state}, state)


def test_npz(tmp_path):
    arrays = {"a.weight": np.arange(6.0).reshape(2, 3).T, "b": np.float16([1, 2]), "c": np.int64(3)}
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "a.npz", **arrays)
        found = read_weights(tmp_path / "a.npz")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


class Evil:
    """Runs a command when Python's unpickler reads it."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def payloads(marker):
    command = f"touch {marker}"
    return {
        "os.system": Evil(os.system, command),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "sys.exit": Evil(sys.exit, 3),
    }


@FORMATS
@pytest.mark.parametrize("name", list(payloads("")))
def test_files_that_want_to_run_code_are_refused(tmp_path, zipped, name):
    marker = tmp_path / "marker"
    content = {"a": torch.ones(2), "state_dict": {"b": torch.ones(1)}, "x": payloads(marker)[name]}
    path = save(tmp_path / "a.pth", content, zipped)
    with pytest.raises(InputError, match=r"a\.pth: refused.*run code"):
        read_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_code_in_a_bare_pickle_is_refused_at_every_protocol(tmp_path, protocol):
    marker = tmp_path / "marker"
    content = {"a": Evil(os.system, f"touch {marker}")}
    (tmp_path / "a.pth").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(InputError, match=r"refused.*asks for (posix|nt)\.system"):
        read_weights(tmp_path / "a.pth")
    assert not marker.exists()


def handmade(path, program):
    """A zip archive around pickle opcodes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", b"\0" * 16)
    return path


@pytest.mark.parametrize(
    "program",
    [
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # named, not called
        b"cbuiltins\ngetattr\n.",
        b"ctorch.hub\nload\n.",
        b"ctorch._utils\n_rebuild_wrapper_subclass\n.",
        b"ctorch\nFloatStorage\n(K\x01tR.",  # a call of what is no call
        b"ccollections\nOrderedDict.__init__\n.",
    ],
)
def test_opcodes_and_names_outside_the_table_are_refused(tmp_path, program):
    with pytest.raises(InputError, match="refused"):
        read_weights(handmade(tmp_path / "a.pth", program))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"0.",
        b"}h\x05.",
        b"]K\x01s.",
        b"}(K\x01u.",
        b"}(K\x01tK\x02s.",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"}r\xff\xff\xff\xff.",  # a memo index that makes Python's unpickler take 64 GB
        b"X\x04\x00\x00\x00\xff\xff\xff\xff.",
    ],
)
def test_broken_pickles_are_errors(tmp_path, program):
    with pytest.raises(InputError, match="damaged"):
        read_weights(handmade(tmp_path / "a.pth", program))


def test_a_size_is_no_text(tmp_path):
    """Or a few bytes of a file would ask for a tuple of many letters, as often as it likes."""
    path = handmade(tmp_path / "a.pth", b"}S'size'\nctorch\nSize\n(S'aaaa'\ntRs.")
    with pytest.raises(InputError, match=r"damaged.*a size that is no list of numbers"):
        read_weights(path)


def tensor_program(offset, shape, strides, length=4):
    """A state dict of one tensor with these numbers, as pickle opcodes."""

    def integers(values):
        return b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"

    return (
        b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage"
        b"\nS'0'\nS'cpu'\nI%d\ntQ"
        % length
        + b"I%d\n" % offset
        + integers(shape)
        + integers(strides)
        + b"I00\nNtRs."
    )


def test_the_handmade_tensor_is_read_when_its_numbers_are_right(tmp_path):
    found = read_weights(handmade(tmp_path / "a.pth", tensor_program(0, (2, 2), (2, 1))))
    np.testing.assert_array_equal(found["a"], np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "length"),
    [
        (0, (5,), (1,), 4),
        (3, (2,), (1,), 4),
        (0, (2, 2), (3, 1), 4),
        (-1, (2,), (1,), 4),
        (0, (2,), (-1,), 4),
        (0, (-2,), (1,), 4),
        (0, (2, 2), (1,), 4),
        (0, (1 << 40,), (0,), 4),
        (0, (1 << 40, 1 << 40), (0, 0), 4),
        (0, (2,), (1 << 61,), 4),
        (0, (4,), (1,), 5),
        (0, (4,), (1,), -5),
    ],
)
def test_tensors_outside_their_storage_are_errors(tmp_path, offset, shape, strides, length):
    path = handmade(tmp_path / "a.pth", tensor_program(offset, shape, strides, length))
    with pytest.raises(InputError, match="damaged"):
        read_weights(path)


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(2), b=np.array([Evil(os.system, "true")], object))
    with pytest.raises(InputError, match=r"refused.*a pickle, in b"):
        read_weights(tmp_path / "a.npz")


def test_whole_modules_and_torchscript_are_refused_with_advice(tmp_path):
    module = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_weights(save(tmp_path / "a.pth", module))
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear|module's class"):
        read_weights(save(tmp_path / "b.pth", module, zipped=False))
    handmade(tmp_path / "c.pt", b"}.")
    with zipfile.ZipFile(tmp_path / "c.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"}.")
    with pytest.raises(InputError, match="TorchScript"):
        read_weights(tmp_path / "c.pt")


def whole_files(folder):
    """One intact file of every format."""
    state = {"a.weight": torch.arange(600.0).reshape(20, 30).T, "a.bias": torch.ones(30)}
    save(folder / "zip.pth", state)
    save(folder / "stream.pth", state, zipped=False)
    write_tar(folder / "tar.pth")
    arrays = {n: a.numpy() for n, a in state.items()}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)
    safetensors.torch.save_file(
        {n: a.contiguous() for n, a in state.items()}, folder / "s.safetensors"
    )
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("intact"))


# A tar archive ends in 10 KB of zeros that nobody needs.
@pytest.mark.parametrize("index", range(6))
@given(share=st.floats(0, 1, exclude_max=True))
@TMP_PATH_IS_SHARED
def test_truncated_files_are_errors_wherever_they_end(tmp_path, intact, index, share):
    content = intact[index].read_bytes()
    if intact[index].stem == "tar":
        content = content.rstrip(b"\0")
    path = tmp_path / f"cut{intact[index].suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut\.\w+: truncated, damaged"):
        read_weights(path)


@pytest.mark.parametrize("index", range(6))
@given(data=st.data())
@TMP_PATH_IS_SHARED
def test_damaged_files_are_read_or_input_errors(tmp_path, intact, index, data):
    content = bytearray(intact[index].read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{intact[index].suffix}"
    path.write_bytes(content)
    # Anything but an InputError fails the test.
    with contextlib.suppress(InputError):
        assert all(isinstance(array, np.ndarray) for array in read_weights(path).values())


@given(content=st.binary(max_size=300), suffix=st.sampled_from(["pth", "npz", "safetensors"]))
@TMP_PATH_IS_SHARED
def test_foreign_bytes_are_errors(tmp_path, content, suffix):
    path = tmp_path / f"foreign.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|refused|no array"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_file_of_another_format_than_its_ending_says(tmp_path, intact, suffix):
    for source in intact:
        if source.suffix != suffix:
            path = tmp_path / f"{source.stem}{suffix}"
            path.write_bytes(source.read_bytes())
            with pytest.raises(InputError, match=f"no {suffix} file of weights"):
                read_weights(path)


def test_paths_that_are_no_files_of_weights(tmp_path):
    for name in ("missing.pth", f"{'long' * 99}.pth"):
        with pytest.raises(InputError, match="does not exist or may not be read"):
            read_weights(tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        read_weights(tmp_path / "folder.pth")
    for name in ("weights.onnx", "weights"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=r"files ending in \.safetensors, \.pth"):
            read_weights(tmp_path / name)
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no array"):
        read_weights(tmp_path / "none.npz")


def test_torch_files_without_a_state_dict(tmp_path):
    with pytest.raises(InputError, match="holds a Tensor"):
        read_weights(save(tmp_path / "a.pth", torch.ones(2)))
    with pytest.raises(InputError, match="no tensors under 'epoch', 'optimizer'"):
        read_weights(save(tmp_path / "b.pth", {"epoch": 1, "optimizer": {}}))


def test_reading_does_not_import_torch(tmp_path):
    path = save(tmp_path / "a.pth", {"a": torch.ones(2)})
    program = (
        "import sys; from clsl_jax.models.weights_file import read_weights; "
        f"print(read_weights({str(path)!r})['a'].sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["2.0", "False"], done.stderr
