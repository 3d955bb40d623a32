"""What goes wrong around a run: a full disk, a place that cannot be written, numbers that blow up.

Real processes; the file systems are real ones too, mounted where only the process sees them.
"""

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import (
    CONFIG,
    REPOSITORY,
    TINY,
    environment,
    free_port,
    interrupts,
    newest_step,
    read,
    run,
    start,
    wait_for,
)
from test_train import assert_same_run, saved_arrays

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run to which nothing happened."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(tiny_run[0], workdir)
    return workdir


def in_namespace(shared, script, **layout):
    """Runs a bash script that may mount file systems of its own; returns (status, output)."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip(f"this system lets no user mount a file system ({shlex.join(unshare)})")
    done = subprocess.run(
        [*unshare, "bash", "-euc", script],
        cwd=REPOSITORY,
        env=environment(shared, **layout),
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
        kill -STOP $!  # or it may be at its best epoch by the time that the disk is full
        dd if=/dev/zero of={disk}/ballast bs=64k 2>/dev/null || true
        kill -CONT $!
        until grep -q "could not be saved" {tmp_path}/log; do kill -0 $!; sleep 0.02; done
        kill -STOP $!
        ls {disk}/checkpoints >{tmp_path}/kept
        rm {disk}/ballast
        kill -CONT $!
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


def test_a_disk_that_two_processes_find_full(shared, tmp_path):
    """Who cannot write says so and ends with status 2, and the other one with it.

    With room again the run goes on.
    """
    disk, run_ = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    train = command(run_, f"--config.checkpoint.dir={disk}/checkpoints", "--distributed")
    status, said = in_namespace(
        shared,
        f"""
        mount -t tmpfs -o size=64m tmpfs {disk}
        both() {{
            export JAX_NUM_PROCESSES=2 JAX_COORDINATOR_ADDRESS=127.0.0.1:$1
            JAX_PROCESS_ID=0 {train} >{tmp_path}/$2.0 2>&1 & zero=$!
            JAX_PROCESS_ID=1 {train} >{tmp_path}/$2.1 2>&1 & one=$!
        }}
        stop_the_other() {{  # as a launcher does, after 20 s
            while kill -0 $zero && kill -0 $one; do sleep 0.1; done
            for _ in {{1..200}}; do kill -0 $zero || kill -0 $one || break; sleep 0.1; done
            kill -KILL $zero $one || true
        }}
        ended() {{
            wait $zero && code=0 || code=$?
            wait $one && code=$code,0 || code=$code,$?
            echo $code
        }}
        both {free_port()} full
        until [ -e {disk}/checkpoints/6 ]; do kill -0 $zero $one; sleep 0.02; done
        dd if=/dev/zero of={disk}/ballast bs=64k 2>/dev/null || true
        stop_the_other 2>/dev/null
        ended
        rm {disk}/ballast
        both {free_port()} again
        ended
        """,
        processes=2,
    )
    assert status == 0, said
    logs = {name: read(tmp_path / name) for name in ("full.0", "full.1", "again.0")}
    full, again = said.split()
    assert again == "0,0", (said, logs)
    refused = []
    for status, name in zip(full.split(","), ("full.0", "full.1"), strict=True):
        errors = [line for line in logs[name].splitlines() if line.startswith("error: ")]
        assert status != "0"
        assert len(errors) == (status == "2"), (said, logs)
        refused += errors
    assert refused, (said, logs)
    for error in refused:
        assert "could not be saved" in error
        assert "No space left on device. Make room and run the same command again" in error
    assert "Going on from step" in logs["again.0"]


def test_storage_that_is_gone_for_a_while_ends_the_run_so_that_it_is_started_again(
    shared, finished, tmp_path
):
    """With status 1, which launchers start again; a full disk, above, waits for somebody."""
    out = tmp_path / "out"
    place, gone = out / "checkpoints", tmp_path / "gone"
    process = start(shared, out)
    wait_for(lambda: place.exists() and newest_step(out) >= 6, process)
    process.send_signal(signal.SIGSTOP)
    place.rename(gone)
    place.write_text("nothing is mounted here")
    process.send_signal(signal.SIGCONT)
    said, log = process.communicate(timeout=300)
    assert process.returncode == 1, said + log
    assert "could not be saved" in said
    assert "The run goes on." in said
    (error,) = log.splitlines()
    assert error.startswith("error: The checkpoint of step 24 could not be saved in")
    assert ". Run the same command again: it goes on from" in error
    place.unlink()
    gone.rename(place)
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


def test_ctrl_c_saves_and_the_run_goes_on(shared, finished, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    with interrupts(signal.default_int_handler):
        process = start(shared, workdir)
    wait_for(lambda: newest_step(workdir) >= 4, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == "Ctrl-C: it stops where it can save all; once more ends it at once.\n"
    assert "everything is saved. Run the same command to go on." in out
    stopped = newest_step(workdir)
    assert 4 <= stopped < 24
    status, out, err = run(shared, workdir)
    assert status == 0, err
    assert f"Going on from step {stopped} of 24" in out
    assert_same_run(finished, workdir)


# The command itself, but that the images of step 8 never come.
HANGING = """
import time
from clsl_jax import main
from clsl_jax.data import pipeline
train_iterator = pipeline.train_iterator

def hanging(*arguments, start, **named):
    for step, batch in enumerate(train_iterator(*arguments, start=start, **named), start + 1):
        if step == 8:
            print("step 8 hangs", flush=True)
            time.sleep(1000)
        yield batch

pipeline.train_iterator = hanging
main.cli()
"""


def test_a_second_ctrl_c_ends_a_run_and_its_workers_at_once(shared, tmp_path):
    with interrupts(signal.default_int_handler):
        process = start(shared, tmp_path / "run", "--config.data.workers=1", program=HANGING)
    assert any("step 8 hangs" in line for line in process.stdout)
    (worker,) = data_workers(process.pid)
    process.send_signal(signal.SIGINT)
    assert "once more ends it at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), seconds=10)


# The command itself, but that the gradients of step 8 are NaN; it prints the rows of its images.
PLANTED = """
import jax
import jax.numpy as jnp
from clsl_jax import main, steps
from clsl_jax.data import pipeline
train_iterator, make_part = pipeline.train_iterator, steps._make_part

def told(*arguments, start, **named):
    for step, batch in enumerate(train_iterator(*arguments, start=start, **named), start + 1):
        if step == 8:
            print("rows", sorted(batch["row"].tolist()), flush=True)
        yield batch

def planted(*arguments):
    work = make_part(*arguments)

    def part(state, *more):
        gradients, *others = work(state, *more)
        factor = jnp.where(state.step == 7, jnp.nan, 1.0)
        return jax.tree.map(lambda gradient: gradient * factor, gradients), *others

    return part

pipeline.train_iterator, steps._make_part = told, planted
main.cli()
"""


def test_a_step_that_is_not_finite_ends_the_run_or_is_left_out(shared, tmp_path):
    """Step 8 is in epoch 2: the checkpoint after epoch 1 is the last sound one, and stays."""
    workdir = tmp_path / "run"
    status, out, err = run(shared, workdir, program=PLANTED)
    assert status == 2, out + err
    assert "Traceback" not in err
    assert "The loss or a gradient was NaN or infinite, first in step 8 of 24" in err
    assert "The checkpoint of step 6 is sound" in err
    assert "optim.skip_nonfinite=N" in err
    rows = ast.literal_eval(out.split("rows ")[1].splitlines()[0])
    assert f"with the training images train-{rows[0]:06} (row {rows[0]}), train-{rows[1]:06}" in err
    assert newest_step(workdir) == 6
    more = "--config.optim.skip_nonfinite=1"
    status, out, err = run(shared, workdir, more, program=PLANTED)
    assert status == 0, err
    assert "Going on from step 6 of 24" in out
    assert "Steps left out so far: 1, allowed: 1." in out
    step, arrays = saved_arrays(workdir)
    assert step == 24
    for key, array in arrays.items():
        assert np.isfinite(array).all(), key


def test_more_steps_that_are_not_finite_than_are_allowed(shared, tmp_path):
    """The rate is such that no step after the first few is finite."""
    workdir = tmp_path / "run"
    arguments = ["--config.optim.learning_rate=1e18", "--config.optim.skip_nonfinite=2"]
    status, out, err = run(shared, workdir, *arguments)
    assert status == 2, out + err
    assert "Traceback" not in err
    assert "steps were, 2 are allowed" in err


def test_a_data_worker_that_is_killed_in_a_run(shared, finished, tmp_path):
    """The operating system ends it, as where memory runs out; the run's bits are the same."""
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    process = start(shared, workdir, "--config.data.workers=1")
    wait_for(lambda: newest_step(workdir) >= 4, process)
    (worker,) = data_workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "do not come" in out
    assert "New ones go on from there." in out
    assert_same_run(finished, workdir)


def data_workers(parent):
    """Process ids of the workers that `parent` reads images with (Linux)."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            ran_by = int(read(f"/proc/{name}/stat").rpartition(")")[2].split()[1])
            words = read(f"/proc/{name}/cmdline")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if ran_by == parent and "spawn_main" in words:
            found.append(int(name))
    return found
