"""The command line: every wrong input gives one message and exit status 2."""

import subprocess
import sys

import pytest
from commands import CONFIG, REPOSITORY, run

CASES = [
    (["--config=configs/nope.py"], "nope.py"),
    ([f"--config={CONFIG}", "--config.batchsize=3"], "Near ones: batch_size"),
    ([f"--config={CONFIG}", "--config.known_fraction=0.3"], "labels.known_fraction"),
    ([f"--config={CONFIG}", "--config.batch_size=many"], "batch_size"),
    ([f"--config={CONFIG}", "--config.labels.known_fraction=3.0"], "expected between 0 and 1"),
    ([f"--config={CONFIG}", "--workdri=x"], "workdir"),
    ([f"--config={CONFIG}", "extra"], "Unexpected argument 'extra'"),
    ([f"--config={CONFIG}:weak"], "expected nothing, moderate or strong"),
    ([f"--config={CONFIG}", "--mode=evaluate"], "There is no run in"),
    ([], "--config=FILE is missing"),
    (
        [f"--config={CONFIG}", "--config.data.sizes=(96,48,48)", "--config.batch_size=100000"],
        "larger than the training split",
    ),
    ([f"--config={CONFIG}", "--config.model.backbone=resnet19"], "resnet19"),
    (["--config=configs/voc.py"], "data.dir"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "expected"), CASES)
def test_wrong_input(shared, tmp_path, arguments, expected):
    status, _, err = run(shared, tmp_path / "run", *arguments, tiny=False)
    assert status == 2, err
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_workdir_that_cannot_be_made(shared, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(shared, tmp_path / "file" / "run", f"--config={CONFIG}", tiny=False)
    assert status == 2
    assert "cannot be written to" in err


def test_a_command_does_not_wait_for_a_thread_that_hangs():
    """As one that reads from a storage which has stopped to answer does."""
    program = """
import concurrent.futures, time
from clsl_jax import command_line, errors

def work(arguments):
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 1000)
    raise errors.Stuck("reading hangs")

command_line.run(lambda: None, work)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: reading hangs\n")
