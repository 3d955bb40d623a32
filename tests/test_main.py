"""The command line: every wrong input gives one message and exit status 2; how commands end."""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest
from absl import flags
from commands import CONFIG, REPOSITORY, interrupts, read, run

from clsl_jax import command_line, errors
from clsl_jax import config as config_lib
from clsl_jax.errors import InputError
from clsl_jax.preemption import PreemptionGuard

CASES = [
    (["--config=configs/nope.py"], "nope.py"),
    (
        ["--config=nope.py", "--config.seed=3"],
        f"--config=nope.py: there is no such file in {REPOSITORY}; run",
    ),
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


@pytest.mark.parametrize("override", ["--config.epoch=3", "--noconfig.epoch", "-config.epoch"])
def test_the_key_that_does_not_exist_is_the_one_that_is_named(override):
    argv = ["--config", "my_config.py", "--workdir=a.config.b", "--config.epochs=2", override]
    message = command_line._unknown_key(argv, config_lib.base_config(), "my_config.py")
    assert message.startswith("There is no configuration key 'epoch'. Near ones: epochs")
    assert command_line._unknown_key(argv[:-1], config_lib.base_config(), "my_config.py") is None
    for key in ("", "epochs\n"):
        message = command_line._unknown_key([f"--config.{key}=3"], config_lib.base_config(), "a.py")
        assert message.startswith(f"There is no configuration key '{key}'.")


@pytest.mark.slow
def test_a_workdir_that_cannot_be_made(shared, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(shared, tmp_path / "file" / "run", f"--config={CONFIG}", tiny=False)
    assert status == 2
    assert "cannot be written to" in err


def program(work):
    """Returns the words of a command that does `work`, some lines of Python."""
    lines = "\n    ".join(work.strip().splitlines())
    text = f"""
import concurrent.futures, time
from absl import flags
from clsl_jax import command_line, errors

def define_flags():
    flags.DEFINE_string("out", None, "A place.")
    flags.DEFINE_string("separator", None, "Text.")

def work(arguments):
    {lines}

command_line.run(define_flags, work)
"""
    return [sys.executable, "-c", text]


def ended(words, **how):
    """Returns (exit status, stdout, stderr) of a command."""
    done = subprocess.run(
        words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **how
    )
    return done.returncode, done.stdout, done.stderr


def test_a_command_does_not_wait_for_a_thread_that_hangs():
    """As one that reads from a storage which has stopped to answer does."""
    words = program("""
concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 1000)
raise errors.Unavailable("reading hangs")
""")
    assert ended(words, stdout=subprocess.PIPE) == (1, "", "error: reading hangs\n")


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EIO, 1), (errno.ESTALE, 1)],
)
def test_what_cannot_be_written_now_may_be_later(code, status):
    """By the exit status, which tells launchers whether to start it again."""
    with (
        pytest.raises(InputError, match=re.escape(os.strerror(code))) as raised,
        errors.writing("--workdir=x", ": name another"),
    ):
        raise OSError(code, os.strerror(code))
    assert raised.value.status == status


def test_ctrl_c_ends_a_command_with_one_line():
    """Though a thread is at work."""
    words = program("""
thread = concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 1000)
print("at work", flush=True)
thread.result()
""")
    with interrupts(signal.default_int_handler):
        process = subprocess.Popen(
            words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Stopped by Ctrl-C.\n")


def test_a_run_in_the_background_goes_on_ignoring_ctrl_c():
    with interrupts(signal.SIG_IGN), PreemptionGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        assert not guard.reached()


@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, "-m", "clsl_jax.main", "--help"],
        program("print('at the end')"),  # of which nobody hears before it is over
        program("command_line.console().print('at once')"),
        program("print('before'), command_line.refuse_arguments(['more'])"),
    ],
    ids=["help", "print", "console", "refused"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_a_command_quietly(words, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    status, _, err = ended(words, stdout=writer)
    os.close(writer)
    expected = 2 if "refuse_arguments" in words[-1] and not unbuffered else 1
    assert (status, "Traceback" in err, "BrokenPipe" in err) == (expected, False, False)


def test_a_broken_pipe_of_another_kind_keeps_its_traceback():
    status, _, err = ended(program("raise BrokenPipeError('of a worker')"), stdout=subprocess.PIPE)
    assert status == 1
    assert err.startswith("Traceback")
    assert err.endswith("BrokenPipeError: of a worker\n")


def test_the_home_directory_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    words = program("print(flags.FLAGS.out, flags.FLAGS.separator, *arguments)")
    given = ["--out=~/a=b", "--separator=~", "~/c"]
    assert ended([*words, *given], stdout=subprocess.PIPE)[1] == f"{tmp_path}/a=b ~ ~/c\n"
    (tmp_path / "own.py").write_text(read(CONFIG))
    config = command_line.config_of(["--config=~/own.py", "--config.data.dir=~/data"])
    assert config.data.dir == f"{tmp_path}/data"


def outputs(**given):
    """Returns the flags of a command that writes two files."""
    values = flags.FlagValues()
    for name in ("out", "pictures"):
        flags.DEFINE_string(name, None, "A file.", flag_values=values)
    values(["", *(f"--{name}={path}" for name, path in given.items())])
    return values


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"out": "photo.jpg"}, "--out=photo.jpg .*: it is there and ends in .jpg, not .csv; name"),
        ({"out": "read.csv"}, "--out=read.csv .*: this command reads it; name another place"),
        ({"out": "nowhere/../read.csv"}, "there is no folder nowhere/..; make it first"),
        ({"out": "./folder/../read.csv"}, "this command reads it"),
        ({"out": "link.csv"}, "this command reads it"),
        ({"out": "new", "pictures": "new"}, "--pictures=new .*: --out is written there; name"),
        ({"out": "old", "pictures": "folder/../old"}, "--out is written there"),
        ({"out": "folder"}, "--out=folder .*: it is a folder; name another place"),
        ({"out": "/dev/null"}, "it is a device or a pipe; name another place"),
        ({"out": "/dev/stdout"}, "what this command prints goes there|a device or a pipe"),
        ({"out": "protected.csv"}, "it is protected against writing; name another place"),
        ({"out": "lost.csv"}, "there is no folder .*/gone; make it first"),
    ],
)
def test_outputs_that_would_replace_something(tmp_path, monkeypatch, given, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "read.csv", "old", "protected.csv"):
        (tmp_path / name).write_text(name)
    (tmp_path / "protected.csv").chmod(0o444)
    (tmp_path / "link.csv").symlink_to("read.csv")
    (tmp_path / "lost.csv").symlink_to("gone/a.csv")
    endings = {"out": ".csv", "pictures": ".png"}
    with pytest.raises(InputError, match=fault):
        command_line.check_outputs(outputs(**given), endings, inputs=["read.csv"])


def test_outputs_that_may_be_written(tmp_path):
    (tmp_path / "old.csv").write_text("of an earlier call")
    (tmp_path / "link.png").symlink_to("new.png")
    endings = {"out": ".csv", "pictures": ".png"}
    (tmp_path / "results.json").write_text("of no run")
    several = ({}, {"out": "old.csv", "pictures": "link.png"}, {"out": "A.CSV"}, {"out": "a"})
    for given in (*several, {"out": "glove.6B.300d"}, {"out": "recovered.csv"}):
        values = outputs(**{name: tmp_path / path for name, path in given.items()})
        command_line.check_outputs(values, endings, inputs=[tmp_path / "a.jpg"])


@pytest.mark.slow
def test_what_a_run_keeps_is_not_replaced(tiny_run, tmp_path):
    workdir, _ = tiny_run
    names = sorted(path.name for path in workdir.iterdir() if path.is_file())
    assert {"config.json", "results.json", "recovered.csv"} <= set(names)
    for name in (*names, "evaluation.json"):
        if not name.startswith("."):
            values, endings = outputs(out=workdir / name), {"out": os.path.splitext(name)[1]}
            with pytest.raises(InputError, match=r"it is of the run in .*; name another place"):
                command_line.check_outputs(values, endings)
    command_line.check_outputs(outputs(out=workdir / "scores.json"), {"out": ".json"})


def test_an_output_where_the_command_prints(tmp_path):
    out = tmp_path / "a.json"
    words = program("""
print("kept")
command_line.check_outputs(flags.FLAGS, {"out": ".json"})
""")
    with open(out, "w", encoding="utf-8") as file:
        status, _, err = ended([*words, f"--out={out}"], stdout=file)
    assert (status, read(out)) == (2, "kept\n")
    assert err == (
        f"error: --out={out} cannot be written: what this command prints goes there; name another "
        "place.\n"
    )
