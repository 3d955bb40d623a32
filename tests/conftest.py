"""Eight virtual CPU devices for every test, compiled quickly and once; set before JAX starts."""

import atexit
import os
import pathlib
import shutil
import tempfile

import commands
import hypothesis
import pytest

# Most of the suite's time would be LLVM's.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What makes rich take a file for a terminal.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
    os.environ.pop(name, None)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of pytest-xdist inherit it
    compiled = tempfile.mkdtemp(prefix="clsl-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_addoption(parser):
    """`--kills=20`: the run of two processes is killed as often as the run of one is."""
    parser.addoption("--kills", type=int, default=4, help="of one of two processes (at least 4)")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Directory of what commands compile and compose, for all of them."""
    return str(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def tiny_run(shared):
    """A run that nobody interrupted: (workdir, what it printed). To be copied, not changed."""
    workdir = pathlib.Path(shared) / "finished"
    status, out, err = commands.run(shared, workdir, "--config.evaluation.pictures=2")
    assert status == 0, err
    return workdir, out


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that two workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# The same examples on every run: a failure is there again tomorrow.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")
