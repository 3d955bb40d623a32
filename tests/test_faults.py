"""What goes wrong around a run: a full disk, a place that cannot be written, numbers that blow up.

Real processes; the file systems are real ones too, mounted where only the process sees them.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from commands import CONFIG, REPOSITORY, TINY, environment, newest_step, read, run
from test_train import assert_same_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run to which nothing happened."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(tiny_run[0], workdir)
    return workdir


def in_namespace(shared, script):
    """Runs a bash script that may mount file systems of its own; returns (status, output)."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip(f"this system lets no user mount a file system ({shlex.join(unshare)})")
    done = subprocess.run(
        [*unshare, "bash", "-euc", script],
        cwd=REPOSITORY,
        env=environment(shared),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def command(workdir, *arguments):
    words = [sys.executable, "-m", "clsl_jax.main", f"--workdir={workdir}", f"--config={CONFIG}"]
    return shlex.join([*words, *TINY, *arguments])


def test_a_disk_that_is_full_for_a_while(shared, finished, tmp_path):
    """Saves fail and are named, the run goes on, and with room again it ends as if nothing was.

    Only the checkpoints are there: a log that cannot be written ends a run (the next test).
    """
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    status, said = in_namespace(
        shared,
        f"""
        mount -t tmpfs -o size=64m tmpfs {disk}
        {command(tmp_path / "run", f"--config.checkpoint.dir={disk}/checkpoints")} \\
            >{tmp_path}/log 2>&1 &
        until [ -e {disk}/checkpoints/6 ]; do kill -0 $!; sleep 0.02; done
        dd if=/dev/zero of={disk}/ballast bs=64k 2>/dev/null || true
        until grep -q "could not be saved" {tmp_path}/log; do kill -0 $!; sleep 0.02; done
        ls {disk}/checkpoints >{tmp_path}/kept
        rm {disk}/ballast
        wait %1
        cp -r {tmp_path}/run {out}
        cp -r {disk}/checkpoints {out}
        """,
    )
    assert status == 0, said + read(tmp_path / "log")
    log = read(tmp_path / "log")
    assert "No space left on device. The run goes on." in log
    assert "6" in read(tmp_path / "kept").split()
    assert not [name for name in os.listdir(out / "checkpoints") if "tmp" in name]
    assert_same_run(finished, out)


def test_a_disk_that_stays_full(shared, finished, tmp_path):
    """One message, a status that is not 0, the checkpoints from before as they were."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    status, said = in_namespace(
        shared,
        f"""
        mount -t tmpfs -o size=64m tmpfs {disk}
        {command(disk / "run")} >{tmp_path}/log 2>&1 &
        until [ -e {disk}/run/checkpoints/6 ]; do kill -0 $!; sleep 0.02; done
        dd if=/dev/zero of={disk}/ballast bs=64k 2>/dev/null || true
        wait %1 && code=0 || code=$?
        rm {disk}/ballast
        cp -r {disk}/run {out}
        exit $code
        """,
    )
    log = read(tmp_path / "log")
    assert status == 2, said + log
    (error,) = (line for line in log.splitlines() if line.startswith("error: "))
    assert "No space left on device" in error
    assert "un the same command again" in error
    assert newest_step(out) >= 6
    status, _, err = run(shared, out)
    assert status == 0, err
    assert_same_run(finished, out)


def test_a_workdir_that_cannot_be_written(shared, finished, tmp_path):
    before = sorted(os.listdir(finished))
    status, said = in_namespace(
        shared,
        f"mount --bind {finished} {finished}; mount -o remount,bind,ro {finished}; "
        + command(finished),
    )
    assert status == 2
    assert f"--workdir={finished} cannot be written to (Read-only file system)" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(finished)) == before


def test_numbers_that_blow_up_are_named_with_step_and_images(shared, tmp_path):
    """Step 8 is in epoch 2: the checkpoint after epoch 1 is the last sound one, and stays."""
    workdir = tmp_path / "run"
    rate = "--config.optim.learning_rate={}".format
    arguments = [rate(1e18), "--config.checkpoint.every_steps=0"]
    status, out, err = run(shared, workdir, *arguments)
    assert status == 2, out + err
    assert "Traceback" not in err
    assert "The loss or a gradient was NaN or infinite, first in step" in err
    assert "with the training images train-" in err
    assert "optim.skip_nonfinite=N" in err
    assert newest_step(workdir) in (0, 6)
    status, out, err = run(shared, workdir, *arguments, "--config.optim.skip_nonfinite=2")
    assert status == 2
    assert "steps were, 2 are allowed" in err
