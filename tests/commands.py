"""Runs the command line in processes of its own, as a user would, on a run of a few seconds."""

import os
import subprocess
import sys

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
    "--config.evaluation.pictures=2",
    "--config.checkpoint.every_steps=4",
    "--config.recovery.thresholds=fixed",
    "--config.recovery.soft=True",
    "--config.recovery.warmup_epochs=1",
)


def environment(shared, devices=1):
    """Environment with the caches of `shared` (a directory) and so many virtual devices."""
    settings = {
        **os.environ,
        "CLSL_CACHE_DIR": os.path.join(shared, "data"),
        "JAX_COMPILATION_CACHE_DIR": os.path.join(shared, f"compiled-{devices}"),
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


def run(shared, workdir, *arguments, **how):
    """Runs it to the end; returns (exit status, stdout, stderr)."""
    process = start(shared, workdir, *arguments, **how)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err
