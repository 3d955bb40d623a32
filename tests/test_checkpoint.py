"""Checkpoints: bit-equal on any number of devices, damage found and named."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clsl_jax import checkpoint, sharding
from clsl_jax.checkpoint import LEFT_OUT, Checkpointer, CheckpointError, checksums
from clsl_jax.errors import InputError, Unavailable


def make_state(seed=0, devices=8):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(seed)
    return {
        "matrix": sharding.put_matrix(mesh, rng.random((512, 5), np.float32)),
        "labels": sharding.put_matrix(mesh, rng.integers(-1, 2, (512, 5)).astype(np.int8)),
        "weights": sharding.put_replicated(mesh, rng.standard_normal((64, 48)).astype(np.float32)),
        "half": sharding.put_replicated(mesh, jnp.asarray(rng.random(7), jnp.bfloat16)),
        "step": sharding.put_replicated(mesh, np.int32(seed)),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def save(checkpointer, step, state=None, selection=0.5, **meta):
    checkpointer.save(state or make_state(step), step=step, meta=meta, selection=selection)
    checkpointer.wait()


def save_two(directory):
    """Leaves sound checkpoints of the steps 1 and 2."""
    checkpointer = Checkpointer(str(directory))
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restores_bit_equal_on_other_numbers_of_devices(tmp_path, devices):
    state = make_state(3, devices=8)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 3, state, note="kept")
    found, meta, step = checkpointer.restore_latest(abstract(make_state(0, devices=devices)))
    assert step == 3
    assert meta["note"] == "kept"
    assert_same(found, state)
    assert len(found["matrix"].sharding.device_set) == devices
    checkpointer.close()


def test_devices_share_the_writing_of_large_arrays_only(tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:8])
    # Of float32: the largest that is written whole is 32 bytes short of `LEAST_SHARE`.
    shapes = {"bias": (48,), "largest_whole": (2**15 - 1, 8), "large": (2**15, 8)}
    state = {
        name: sharding.put_replicated(
            mesh, np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        )
        for name, shape in shapes.items()
    }
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 1, state)
    found, _, _ = checkpointer.restore_latest(abstract(state))
    checkpointer.close()
    assert_same(found, state)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        written = reader.metadata(tmp_path / "1" / "state").item_metadata
    parts = {name: written[name].storage.chunk_shape for name in shapes}
    assert parts == {**shapes, "large": (2**12, 8)}


def test_checksums_do_not_depend_on_devices_and_see_any_change():
    one, eight = (checksums(make_state(1, devices=n)) for n in (1, 8))
    assert one == eight
    state = make_state(1, devices=1)
    swapped = {**state, "matrix": state["matrix"].at[jnp.array([0, 1])].set(state["matrix"][1::-1])}
    changed = np.array(checksums(swapped)) != np.array(one)
    # Leaves come in the order of their names: half, labels, matrix, step, weights.
    assert changed.tolist() == [False, False, True, False, False]
    square = np.random.default_rng(0).random((4, 4), np.float32)
    moved = square.copy()
    moved[0, 3], moved[1, 1] = square[1, 1], square[0, 3]
    mesh = sharding.make_mesh(jax.devices()[:1])
    squares = [sharding.put_replicated(mesh, x) for x in (square, square.T, moved)]
    found = {tuple(checksums([x])) for x in squares}
    assert len(found) == 3


def test_keeps_the_latest_two_and_the_best(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    for step, selection in [(1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.9), (6, 0.1), (7, 0.2)]:
        save(checkpointer, step, selection=selection)
    save(checkpointer, 8, selection=None)
    assert checkpointer.best_steps() == [5, 7]
    assert checkpointer.steps() == [5, 7, 8]
    checkpointer.close()
    again = Checkpointer(str(tmp_path), read_only=True)
    assert again.best_steps() == [5, 7]
    again.close()


def test_a_step_can_be_saved_again(tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 4, make_state(0), selection=None, epoch_done=False)
    save(checkpointer, 4, make_state(1), epoch_done=True)
    found, meta, _ = checkpointer.restore_latest(abstract(make_state()))
    assert meta["epoch_done"] is True
    assert_same(found, make_state(1))
    checkpointer.close()


def test_a_step_that_cannot_be_saved_again_is_kept(tmp_path, monkeypatch):
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 4)
    save(checkpointer, 8)

    def full(*unused, **also_unused):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._manager, "save", full)
        with pytest.raises(CheckpointError, match=r"step 8 could not be saved.*No space left"):
            save(checkpointer, 8, make_state(9))
    assert checkpointer.steps() == [4, 8]
    found, _, step = checkpointer.restore_latest(abstract(make_state()))
    assert step == 8
    assert_same(found, make_state(8))
    save(checkpointer, 8, make_state(9))
    assert_same(checkpointer.restore(abstract(make_state()), 8)[0], make_state(9))
    checkpointer.close()
    assert sorted(os.listdir(tmp_path)) == ["4", "8"]


@pytest.mark.parametrize("late", ["while it is tidied", "after it was tidied"])
@pytest.mark.parametrize("next_one", ["save", "close"])
def test_what_a_failed_save_left_is_removed_later(tmp_path, monkeypatch, late, next_one):
    """A thread may still write there while the failure is told, and after."""
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 4)
    left = tmp_path / "8.orbax-checkpoint-tmp"

    def fail(*unused, **also_unused):
        left.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def busy(*unused, **also_unused):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer._manager, "save", fail)
        if late == "while it is tidied":
            patched.setattr(type(checkpointer._directory), "rmtree", busy)
        with pytest.raises(CheckpointError, match=r"step 8 could not be saved.*No space left"):
            save(checkpointer, 8)
    if late == "after it was tidied":
        assert not left.exists()
        left.mkdir()
    assert left.exists()
    if next_one == "save":
        save(checkpointer, 12)
        assert sorted(os.listdir(tmp_path)) == ["12", "4"]
    checkpointer.close()
    assert not left.exists()


@pytest.mark.parametrize("killed", ["before the new one is whole", "before the old one is removed"])
def test_a_kill_while_a_step_is_saved_again(tmp_path, killed):
    with_old = killed == "before the old one is removed"
    checkpointer = Checkpointer(str(tmp_path / "run"))
    save(checkpointer, 8)
    shutil.copytree(tmp_path / "run" / "8", tmp_path / "old")
    save(checkpointer, 8, make_state(9))
    checkpointer.close()
    shutil.move(tmp_path / "old", tmp_path / "run" / "replaced-8")
    if not with_old:
        shutil.rmtree(tmp_path / "run" / "8")
    again = Checkpointer(str(tmp_path / "run"))
    found, _, step = again.restore_latest(abstract(make_state()))
    assert step == 8
    assert_same(found, make_state(9 if with_old else 8))
    again.close()
    assert os.listdir(tmp_path / "run") == ["8"]


def test_a_place_that_keeps_nothing_is_named(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*/file/below: Not a directory"):
        Checkpointer(str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match=r"in nosuch://bucket/run: .*pip install gcsfs"):
        Checkpointer("nosuch://bucket/run")


def test_nothing_saved(tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    assert checkpointer.restore_latest(abstract(make_state())) is None
    assert checkpointer.best_steps() == []
    checkpointer.close()


def files_of(directory):
    return [
        os.path.join(where, name)
        for where, _, names in os.walk(directory)
        for name in names
        if os.path.getsize(os.path.join(where, name))
    ]


def largest_file(directory):
    return max(files_of(directory), key=os.path.getsize)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


def flip(path, share=0.5):
    place = int(share * os.path.getsize(path))
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0xFF]))


def flip_two(path):
    """Far apart: a kilobyte anywhere in a file may be a node that TensorStore reads no more."""
    flip(path, 0.25)
    flip(path, 0.75)


@pytest.mark.parametrize("damage", [truncate, flip_two, os.remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, caplog):
    save_two(tmp_path)
    damage(largest_file(tmp_path / "2"))
    checkpointer = Checkpointer(str(tmp_path))
    with caplog.at_level("WARNING"):
        found, _, step = checkpointer.restore_latest(abstract(make_state()))
    assert step == 1
    assert_same(found, make_state(1))
    assert str(tmp_path / "2") in caplog.text
    assert (tmp_path / "damaged-2").is_dir()
    save(checkpointer, 2)
    assert checkpointer.restore_latest(abstract(make_state()))[2] == 2
    checkpointer.close()


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
def test_whatever_file_is_damaged_no_other_arrays_are_restored(tmp_path, damage):
    """Of the older checkpoint, or of this one where the file was not needed: as they were saved."""
    save_two(tmp_path / "whole")
    steps, metrics = [], tmp_path / "whole" / "2" / "metrics" / "metrics"
    for number, path in enumerate(sorted(files_of(tmp_path / "whole" / "2"))):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / os.path.relpath(path, tmp_path / "whole"))
        if path == str(metrics):
            with pytest.raises(CheckpointError, match=r"metrics/metrics is damaged. Move .*/2 els"):
                Checkpointer(str(copy), read_only=True)
        checkpointer = Checkpointer(str(copy))
        found, _, step = checkpointer.restore_latest(abstract(make_state()))
        checkpointer.close()
        assert_same(found, make_state(step))
        steps.append(step)
    assert set(steps) == {1, 2}


@pytest.mark.parametrize("file", ["metrics/metrics", "meta/metadata", "state/_METADATA"])
def test_storage_that_does_not_answer_is_no_damage(tmp_path, file):
    """Else the checkpoint would be set aside, and with all of them the run begun anew."""
    save_two(tmp_path)
    sound = tmp_path / "2" / file
    kept = sound.rename(tmp_path / "2" / "kept")
    sound.symlink_to("/proc/self/mem")  # the page at 0 of any process is an input/output error
    with pytest.raises(Unavailable, match="Input/output error") as raised:
        Checkpointer(str(tmp_path)).restore_latest(abstract(make_state()))
    assert raised.value.status == 1
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    sound.unlink()
    kept.rename(sound)
    checkpointer = Checkpointer(str(tmp_path))
    assert checkpointer.restore_latest(abstract(make_state()))[2] == 2
    checkpointer.close()


def test_what_tensorstore_says_of_storage_that_does_not_answer():
    """It quotes the system, as of a file that is opened: seen with `ELOOP`."""
    said = ValueError('UNKNOWN: Failed to open: "/mnt/d/f": Stale file handle [os_error_code=116]')
    wrapped = RuntimeError("Encountered error while reading array index")
    wrapped.__cause__ = said
    assert checkpoint._may_pass(wrapped)
    assert checkpoint._reason(wrapped) == "Stale file handle"
    assert not checkpoint._may_pass(RuntimeError("DATA_LOSS: CRC-32C checksum verification failed"))


def test_a_reader_moves_nothing(tmp_path):
    save_two(tmp_path)
    files = [p for p in (tmp_path / "2" / "state").rglob("*") if p.is_file()]
    os.truncate(max(files, key=os.path.getsize), 100)
    before = sorted(os.listdir(tmp_path))
    reader = Checkpointer(str(tmp_path), read_only=True)
    assert reader.restore_latest(abstract(make_state()))[2] == 1
    reader.close()
    assert sorted(os.listdir(tmp_path)) == before


def test_where_the_metric_of_all_is_damaged_none_is_moved(tmp_path):
    """Training would begin anew, though the states are whole."""
    save_two(tmp_path)
    for step in ("1", "2"):
        truncate(tmp_path / step / "metrics" / "metrics")
    with pytest.raises(CheckpointError, match=r"is damaged\. Move .* all of them to start anew"):
        Checkpointer(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_all_damaged_is_an_error_and_nothing_is_moved(tmp_path):
    save_two(tmp_path)
    for step in ("1", "2"):
        truncate(largest_file(tmp_path / step))
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(CheckpointError, match="No sound checkpoint is left"):
        checkpointer.restore_latest(abstract(make_state()))
    assert (tmp_path / "1").is_dir()
    assert (tmp_path / "2").is_dir()
    checkpointer.close()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": np.zeros((3, 3), np.float32)},
        {"weights": np.zeros((64, 48), np.int32)},
        {"more": np.zeros((3, 3), np.float32)},
        {"weights": None},
    ],
    ids=["another shape", "another type", "one more", "one less"],
)
def test_another_models_checkpoint_is_refused(tmp_path, change):
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 1)
    other = make_state()
    for name, array in change.items():
        if array is None:
            del other[name]
        else:
            other[name] = sharding.put_replicated(sharding.make_mesh(), array)
    with pytest.raises(CheckpointError, match="cannot be used"):
        checkpointer.restore(abstract(other), 1)
    checkpointer.close()


def test_what_is_not_accepted_is_not_read(tmp_path):
    """What a reader asks of `meta` comes before the arrays, whose shapes may be others too."""
    checkpointer = Checkpointer(str(tmp_path))
    for step in (1, 2):
        save(checkpointer, step, data="old")
    other = {**make_state(), "weights": sharding.put_replicated(sharding.make_mesh(), np.zeros(3))}

    def accept(meta):
        if meta["data"] != "new":
            raise InputError(f"It is of {meta['data']} data.")

    with pytest.raises(InputError, match=r"It is of old data\.") as refused:
        checkpointer.restore_latest(abstract(other), accept=accept)
    assert not isinstance(refused.value, CheckpointError)
    assert checkpointer.steps() == [1, 2]  # neither is taken for damaged
    save(checkpointer, 3, data="new")
    state, _, step = checkpointer.restore_latest(abstract(make_state()), accept=accept)
    assert step == 3
    assert_same(state, make_state(3))
    checkpointer.close()


def test_what_is_left_out_is_not_read(tmp_path):
    state = make_state(4)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 4, state)
    three = sharding.replicated(sharding.make_mesh(jax.devices()[:3]))
    read = ("half", "step", "weights")  # the others' rows do not spread over three
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=three) if name in read else LEFT_OUT
        for name, x in state.items()
    }
    found, _ = checkpointer.restore(wanted, 4)
    assert found["labels"] is found["matrix"] is LEFT_OUT
    assert_same({name: found[name] for name in read}, {name: state[name] for name in read})
    # Of what is read each has the checksum that was saved of it, and of the rest nothing is said.
    path = tmp_path / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for place, name in enumerate(sorted(state)):
        sums = list(meta["checksums"])
        sums[place] += 1
        path.write_text(json.dumps({**meta, "checksums": sums}))
        if name in read:
            with pytest.raises(CheckpointError, match=r"1 arrays are not what was saved"):
                checkpointer.restore(wanted, 4)
        else:
            assert checkpointer.restore(wanted, 4)[0]["step"] == 4
    for sums in ([*meta["checksums"], 0], meta["checksums"][:-1]):
        path.write_text(json.dumps({**meta, "checksums": sums}))
        with pytest.raises(CheckpointError, match="checksum"):
            checkpointer.restore(wanted, 4)
    checkpointer.close()


def test_a_checkpoint_by_orbaxs_own_defaults_is_read(tmp_path):
    """As versions wrote it that left Orbax the division of arrays."""
    state = make_state(7)
    meta = {
        "format": checkpoint.FORMAT_VERSION,
        "checksums": checksums(state),
    }
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(
            7,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )
    checkpointer = Checkpointer(str(tmp_path))
    found, _, step = checkpointer.restore_latest(abstract(make_state()))
    checkpointer.close()
    assert step == 7
    assert_same(found, state)


def test_a_checkpoint_of_an_older_format_is_refused_by_its_number(tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 1)
    checkpointer.close()
    path = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "format": checkpoint.FORMAT_VERSION - 1}))
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"1 cannot be used: format 5, this program reads 6"):
        checkpointer.restore_latest(abstract(make_state()))
    checkpointer.close()
