"""What a run holds, where it cannot, and where there is nothing to hold."""

import errno
import fcntl
import os

import pytest

from clsl_jax.errors import InputError
from clsl_jax.workdir import Workdir


def test_a_directory_of_checkpoints_is_held_as_long_as_the_workdir(tmp_path):
    there = str(tmp_path / "checkpoints")
    with Workdir(str(tmp_path / "a")) as first, Workdir(str(tmp_path / "b")) as second:
        first.hold_checkpoints(there)
        with pytest.raises(InputError, match=f"Another process keeps its checkpoints in {there}: "):
            second.hold_checkpoints(there)
    with Workdir(str(tmp_path / "b")) as second:
        second.hold_checkpoints(there)
    assert os.listdir(there) == [".checkpoints.lock"]


def test_what_has_no_locks(tmp_path, monkeypatch, caplog):
    """Refused as a workdir, and not held as a place of checkpoints, which is said."""

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.chdir(tmp_path)
    with Workdir(str(tmp_path / "run")) as where:
        monkeypatch.setattr(fcntl, "flock", unsupported)
        where.hold_checkpoints(str(tmp_path / "checkpoints"))
        where.hold_checkpoints("gs://bucket/run")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "absl"]
    assert said == (
        f"{tmp_path}/checkpoints is on a file system without locks (Operation not supported): "
        "nothing keeps a second run from saving its checkpoints there, too. Give each run a "
        "--config.checkpoint.dir of its own."
    )
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "run"]
    message = r"file system without locks \(Operation not supported\)"
    with pytest.raises(InputError, match=message), Workdir(str(tmp_path / "run")):
        pass


def test_checkpoints_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("")
    with Workdir(str(tmp_path / "run")) as where:
        message = r"/file cannot be written to \(File exists\): name another directory by --config"
        with pytest.raises(InputError, match=message):
            where.hold_checkpoints(str(tmp_path / "file"))
