"""Runs the command line in processes of its own, as a user would, on a run of a few seconds."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
CONFIG = os.path.join(REPOSITORY, "configs", "scenes.py")
# Compiling for speed would take most of the time.
QUICK = "--xla_backend_optimization_level=0"
TINY = (
    "--config.data.sizes=(96,48,48)",
    "--config.batch_size=16",
    "--config.epochs=4",
    "--config.model.widths=(8,16)",
    "--config.model.rank=8",
    "--config.model.encoder_mlp=16",
    "--config.model.embeddings=random",
    "--config.model.embedding_dim=8",
    "--config.evaluation.batch_size=48",
    "--config.evaluation.pictures=0",
    "--config.checkpoint.every_steps=4",
    "--config.recovery.thresholds=fixed",
    "--config.recovery.soft=True",
    "--config.recovery.warmup_epochs=1",
    "--config.model.global_branch=True",
)


def environment(shared, devices=1, processes=1):
    """Environment with the caches of `shared` (a directory) and so many virtual devices."""
    settings = {
        **os.environ,
        "CLSL_CACHE_DIR": os.path.join(shared, "data"),
        "JAX_COMPILATION_CACHE_DIR": os.path.join(shared, f"compiled-{processes}x{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
    }
    return settings


def start(shared, workdir, *arguments, devices=1, tiny=True, program=None):
    """Starts `python -m clsl_jax.main`, or a program in its place; the caller waits for it."""
    what = ["-c", program] if program else ["-m", "clsl_jax.main"]
    command = [sys.executable, *what, f"--workdir={workdir}"]
    if tiny:
        command += [f"--config={CONFIG}", *TINY]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment(shared, devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_several(shared, workdir, *arguments, processes, devices, program=None, apart=False):
    """Starts so many processes of one run, each with so many devices, as on as many hosts.

    They share the workdir, or each has one of its own, `workdir-K`, if they are `apart`.
    """
    address = f"127.0.0.1:{free_port()}"
    what = ["-c", program] if program else ["-m", "clsl_jax.main"]
    started = []
    for k in range(processes):
        settings = environment(shared, devices, processes)
        settings["JAX_COORDINATOR_ADDRESS"] = address
        settings["JAX_NUM_PROCESSES"], settings["JAX_PROCESS_ID"] = str(processes), str(k)
        own = f"--workdir={workdir}-{k}" if apart else f"--workdir={workdir}"
        with open(f"{workdir}.{k}.log", "w", encoding="utf-8") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *what, own, *arguments, "--distributed"],
                    cwd=REPOSITORY,
                    env=settings,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def run_several(shared, workdir, *arguments, **how):
    """Runs them to the end; returns (exit statuses, what each printed)."""
    started = start_several(shared, workdir, *arguments, **how)
    try:
        statuses = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return statuses, [read(f"{workdir}.{k}.log") for k in range(len(started))]


def wait_for(condition, *processes, seconds=300):
    """Waits until `condition()` holds; fails if a process ends before, or it takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "it ended before"
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def newest_step(workdir):
    """The last checkpoint of a run, 0 for none."""
    steps = [int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit()]
    return max(steps, default=0)


def read(path):
    """Returns a file's text."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def run(shared, workdir, *arguments, **how):
    """Runs it to the end; returns (exit status, stdout, stderr)."""
    process = start(shared, workdir, *arguments, **how)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@contextlib.contextmanager
def interrupts(handler):
    """Has this process, and those that it starts, take Ctrl-C so."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
