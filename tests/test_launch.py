"""The launchers, as real processes; Slurm, gcloud, GPUs and the program itself are stand-ins."""

import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import commands
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

LAUNCH = pathlib.Path(commands.REPOSITORY, "launch")
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="the launchers need bash")

# Stands for `python` in an environment: pip and the program write down how they were called.
PYTHON = r"""
case "$*" in
  -c*) exec "$REAL" "$@" ;;
  "-m pip install "*) echo "pip ${*:3}" >>"$CALLS"; exit "${PIP_STATUS:-0}" ;;
  "-m pip "*) exit 0 ;;
  "-m clsl_jax.main"*) [[ -z ${PROGRAM:-} ]] || exec "$REAL" "$PROGRAM" "$@" ;;
esac
{
  printf '%s\n' "$@" "cache ${JAX_COMPILATION_CACHE_DIR:-none}"
  printf '%s\n' "gpus ${CUDA_VISIBLE_DEVICES:-none}" "of ${JAX_NUM_PROCESSES:-one}"
} >"$CALLS.program${JAX_PROCESS_ID:-}"
echo program >>"$CALLS"
# One status a start, of those that are left; then 0.
read -r status rest <"$CALLS.statuses" || true
echo "$rest" >"$CALLS.statuses"
exit "${status:-0}"
"""
# Stands for the program where processes are controlled. Start T of process K writes K.T.pid and, to
# K.T.signals, the signals it gets; it ends as K.T.status says, on SIGTERM as on_term says.
CONTROLLED = r"""
import os, pathlib, signal, sys, time

place = pathlib.Path(os.environ["ORDERS"])
k = os.environ.get("JAX_PROCESS_ID", "0")
start = sum(1 for _ in place.glob(f"{k}.*.pid"))
name = place / f"{k}.{start}"

def got(signum, frame):
    with open(f"{name}.signals", "a") as file:
        print(signal.Signals(signum).name, file=file)
    wish = (place / "on_term").read_text()
    if wish != "ignore" and signum == signal.SIGTERM:
        print(f"stopped {k}.{start}", flush=True)
        os._exit(int(wish))

signal.signal(signal.SIGTERM, got)
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, got)
address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
pathlib.Path(f"{name}.arguments").write_text("\n".join([address, *sys.argv[3:]]))
pathlib.Path(f"{name}.new").write_text(str(os.getpid()))
os.rename(f"{name}.new", f"{name}.pid")
for _ in range(6000):
    if os.path.exists(f"{name}.status"):
        print(f"ended {k}.{start}", flush=True)
        os._exit(int(pathlib.Path(f"{name}.status").read_text()))
    time.sleep(0.01)
os._exit(99)
"""
SRUN = r"""
printf '%s\n' "$@" "cpus ${SRUN_CPUS_PER_TASK:-none}" >"$CALLS.srun"
echo "cache ${JAX_COMPILATION_CACHE_DIR:-none}" >>"$CALLS.srun"
[[ -n ${WAITS:-} ]] || exit "$STATUS"
trap 'exit "$STATUS"' TERM
echo $$ >"$CALLS.pid.new" && mv "$CALLS.pid.new" "$CALLS.pid"
for ((i = 0; i < 600; i++)); do sleep 0.05; done
exit 99
"""
# Comes back only when the tasks have ended, so that they end within slurm.sh's trap.
SCANCEL = r"""
echo "scancel $*" >>"$CALLS"
pid=$(cat "$CALLS.pid")
kill -TERM "$pid"
for ((i = 0; i < 200; i++)); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 0.05; done
"""
SCONTROL = r"""
[[ $1 == show ]] || { echo "$*" >>"$CALLS"; exit; }
echo "JobId=7 JobName=x $JOB StdIn=/dev/null"
"""
# `ssh` runs here, in the directory HOST.
GCLOUD = r"""
printf '%q ' gcloud "$@" >>"$CALLS.gcloud"
echo >>"$CALLS.gcloud"
case "$4" in
  scp) cp "$5" "$HOST/${6#*:}" ;;
  ssh)
    for argument in "$@"; do [[ $argument == --command=* ]] && command=${argument#*=}; done
    cd "$HOST" && exec bash -c "$command"
    ;;
  describe) echo "READY" ;;
esac
"""


def _program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + body, encoding="utf-8")
    path.chmod(0o755)


class Place:
    """A copy of the launchers with stand-ins for what they call."""

    def __init__(self, root):
        self.root = root
        self.repository = root / "a repository"
        shutil.copytree(LAUNCH, self.repository / "launch")
        for name in ("setup.cfg", "requirements.txt"):
            shutil.copy(LAUNCH.parent / name, self.repository)
        (self.repository / "configs").mkdir()
        (self.repository / "configs" / "coco.py").touch()
        self._calls = root / "calls"
        self.settings = {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(root),
            "CALLS": str(self._calls),
            "REAL": sys.executable,
            "CLSL_VENV": str(root / "environment"),
            "GIT_CEILING_DIRECTORIES": str(root),
        }
        for name, body in (
            ("environment/bin/python", PYTHON),
            ("environment/bin/pip", 'echo "pip $*" >>"$CALLS"'),
            ("bin/srun", SRUN),
            ("bin/scancel", SCANCEL),
            ("bin/scontrol", SCONTROL),
            ("bin/gcloud", GCLOUD),
            ("bin/nvidia-smi", 'for k in ${GPUS:-}; do echo "$k"; done'),
        ):
            _program(root / name, body)
        self.program_ends_with()

    def start(self, script, *arguments, **settings):
        return subprocess.Popen(
            ["bash", str(self.repository / "launch" / script), *arguments],
            cwd=self.root,
            env={**self.settings, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *arguments, **settings):
        """Runs it to the end; returns (exit status, stdout, stderr)."""
        process = self.start(script, *arguments, **settings)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def program_ends_with(self, *statuses):
        pathlib.Path(f"{self._calls}.statuses").write_text(" ".join(map(str, statuses)) + "\n")

    def calls(self, what=""):
        """Lines that a stand-in wrote down; none if it was not called."""
        path = pathlib.Path(f"{self._calls}{what}")
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def _linter(name):
    """The path of a linter that requirements-dev.txt brings, beside this interpreter."""
    return pathlib.Path(sys.executable).parent / name


def _lint(*command):
    return subprocess.run(
        command, cwd=LAUNCH.parent, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("script", [*(f"launch/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_pass_shellcheck(script):
    done = _lint(_linter("shellcheck"), "--external-sources", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_shellcheck_finds_what_is_wrong(tmp_path):
    _program(tmp_path / "wrong.sh", 'rm "$1" $2\n')
    done = _lint(_linter("shellcheck"), str(tmp_path / "wrong.sh"))
    assert done.returncode == 1
    assert "SC2086" in done.stdout


# Slurm.
RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"
REQUEUE = ["requeue 7"]


def _start_slurm(place, status, job=RUNNING, signum=None, **settings):
    """Starts slurm.sh as job 7, whose tasks end with this status; if need be after a signal."""
    settings = {
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(place.repository),
        "STATUS": str(status),
        "JOB": job,
        "WAITS": "yes" if signum else "",
        **settings,
    }
    return place.start("slurm.sh", "--workdir=/shared/my run", **settings)


def _slurm(place, status, job=RUNNING, signum=None, **settings):
    """Runs slurm.sh; returns (exit status, calls of scancel and `scontrol requeue`)."""
    process = _start_slurm(place, status, job, signum, **settings)
    if signum:
        commands.wait_for(lambda: place.calls(".pid"), process, seconds=60)
        process.send_signal(signum)
    process.communicate(timeout=120)
    return process.returncode, place.calls()


@pytest.mark.parametrize(
    ("status", "job", "restarts", "queued"),
    [
        (0, RUNNING, 0, False),
        (2, RUNNING, 0, False),
        (75, RUNNING, 0, True),
        (75, RUNNING, 99, True),
        (75, CANCELLED, 0, False),
        (137, CANCELLED, 0, False),
        (75, "JobState=CANCELLED Reason=None", 0, False),
        (75, "JobState=COMPLETING Reason=None", 0, False),  # preempted: Slurm has queued it
        (75, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", 0, True),
        (75, "JobState=COMPLETING Reason=None PreemptTime=2026-01-02T03:04:05", 0, True),
        (0, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", 0, False),
    ],
)
def test_slurm_queues_again_what_has_work_left(place, status, job, restarts, queued):
    found = _slurm(place, status, job, SLURM_RESTART_COUNT=str(restarts))
    assert found == (status, REQUEUE if queued else [])


def test_slurm_queues_again_what_broke_only_so_often(place):
    queued = []
    for restarts in "0123":
        found, calls = _slurm(place, 9, CLSL_MOST_RESTARTS="2", SLURM_RESTART_COUNT=restarts)
        assert found == 9
        queued.append(len(calls))
    assert queued == [1, 2, 2, 2]
    assert _slurm(place, 9, SLURM_RESTART_COUNT="19")[1] == REQUEUE * 3
    assert _slurm(place, 9, SLURM_RESTART_COUNT="20")[1] == REQUEUE * 3


def test_slurm_says_that_it_queues_no_more(place):
    said, _ = _start_slurm(place, 9, CLSL_MOST_RESTARTS="0").communicate(timeout=120)
    assert "ended with status 9 in a job that was queued again 0 times: no more." in said


@pytest.mark.parametrize(
    ("signum", "status", "job", "queued"),
    [
        (signal.SIGUSR1, 75, RUNNING, True),
        (signal.SIGUSR1, 137, RUNNING, True),
        (signal.SIGUSR1, 0, RUNNING, False),
        (signal.SIGUSR1, 2, RUNNING, False),
        (signal.SIGUSR1, 75, CANCELLED, False),
        (signal.SIGTERM, 75, CANCELLED, False),
        (signal.SIGTERM, 75, RUNNING, True),
    ],
)
def test_slurm_passes_a_signal_to_the_tasks(place, signum, status, job, queued):
    found, calls = _slurm(place, status, job, signum, SLURM_RESTART_COUNT="20")
    assert calls == ["scancel --signal=TERM 7.0", *(REQUEUE if queued else [])]
    assert found == status


def test_slurm_starts_the_tasks_with_what_they_need(place):
    settings = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(place.repository), "STATUS": "0"}
    common = ["--kill-on-bad-exit=1", "python", "-m", "clsl_jax.main", "--distributed"]
    common.append("--stopped_status=75")
    given = ["--workdir=/shared/my run", "--config.note=$HOME 'x'"]
    assert place.run("slurm.sh", *given, **settings)[0] == 0
    default = [*common, "--config=configs/scenes.py", *given]
    assert place.calls(".srun") == [*default, "cpus none", "cache none"]
    settings |= {"SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_ON_NODE": "8"}
    given.append("--config=mine.py")
    assert place.run("slurm.sh", *given, **settings)[0] == 0
    assert place.calls(".srun") == [*common, *given, "cpus 6", "cache /shared/compiled"]


def test_slurm_needs_a_workdir(place):
    status, _, err = place.run("slurm.sh", "--config=x.py", SLURM_SUBMIT_DIR=str(place.repository))
    assert status == 2
    assert "--workdir=DIR is missing" in err
    assert not place.calls(".srun")


# The environment.
def _source(place, *targets, **settings):
    script = 'source launch/environment.sh "$@"; command -v python'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *targets],
        cwd=place.repository,
        env={**place.settings, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_environment_installs_once(place):
    for _ in range(2):
        status, out, _ = _source(place, ".[tpu]", ".")
        assert status == 0
        assert out.splitlines()[-1] == str(place.root / "environment" / "bin" / "python")
    options = "pip install --quiet --disable-pip-version-check -e"
    assert place.calls() == [f"{options} .[tpu]", f"{options} ."]
    later = place.repository / "requirements.txt"
    os.utime(later, (2**32, 2**32))
    _source(place, ".")
    assert len(place.calls()) == 3


def test_environment_tells_what_another_try_can_mend(place):
    assert _source(place, ".", PIP_STATUS="1")[0] == 1
    other = place.root / "other"
    # Interpreters that are too old, found before those of this machine.
    for name in ("python3.12", "python3.11", "python3", "python"):
        _program(place.root / "bin" / name, "exit 1")
    status, _, err = _source(place, CLSL_VENV=str(other))
    assert (status, "no Python 3.11 or newer" in err) == (2, True)
    _program(place.root / "bin" / "python3.12", '[[ "$*" != *venv* ]]')
    status, _, err = _source(place, CLSL_VENV=str(other))
    assert (status, "python3-venv" in err) == (2, True)
    other.mkdir()
    status, _, err = _source(place, CLSL_VENV=str(other), CLSL_PYTHON="/nonexistent/python")
    assert status == 2
    assert "CLSL_PYTHON=/nonexistent/python is no Python 3.11 or newer that can be run" in err
    (other / "mine.txt").touch()
    status, _, err = _source(place, CLSL_VENV=str(other))
    assert (status, "holds something else" in err) == (2, True)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_environment_is_made_with_the_python_that_is_named(place):
    mine, made = place.root / "my pythons" / "python", place.root / "made with"
    mine.parent.mkdir()
    _program(mine, f'[[ "$*" != *venv* ]] || echo "$0" >"{made}"')
    _source(place, CLSL_VENV=str(place.root / "other"), CLSL_PYTHON=str(mine))
    assert made.read_text() == f"{mine}\n"


# One machine.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes needs a number from 1 on, found '0'"),
        (["--processes=two"], "--processes needs a number from 1 on, found 'two'"),
        (["--restarts=1", "--processes"], "--processes needs a number from 1 on, found ''"),
        (["--processes=2", "--restarts", "-1"], "--restarts needs a number from 0 on, found '-1'"),
        (["--restarts="], "--restarts needs a number from 0 on, found ''"),
        (["--restarts", "010"], "--restarts needs a number from 0 on, found '010'"),
    ],
)
def test_local_needs_numbers(place, arguments, message):
    status, _, err = place.run("local.sh", *arguments)
    assert status == 2
    assert message in err
    assert not place.calls(".program")


def test_local_passes_arguments_on(place):
    place.program_ends_with(3)
    given = ["--workdir=my run", "--config.note=$HOME 'x'"]
    assert place.run("local.sh", *given)[0] == 3
    start = ["-m", "clsl_jax.main", "--config=configs/scenes.py", *given]
    assert place.calls(".program") == [*start, "cache none", "gpus none", "of one"]


def test_local_takes_a_configuration_and_workdir_in_two_words(place):
    given = ["--config", "configs/coco.py", "--workdir", "my run", "--config.epochs=2", "-mode"]
    assert place.run("local.sh", *given)[0] == 0
    told = ["--config=configs/coco.py", "--workdir=my run", "--config.epochs=2", "-mode"]
    assert place.calls(".program")[:-3] == ["-m", "clsl_jax.main", *told]
    assert place.run("local.sh", "--processes=2", *given)[0] == 0
    assert (place.repository / "my run.process-1.log").exists()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, ["none", "none"]),
        ({"CLSL_EXTRA": "cuda12", "GPUS": "0 1 2 3"}, ["0,1", "2,3"]),
        ({"CLSL_EXTRA": "cuda13", "GPUS": "0 1 2", "CUDA_VISIBLE_DEVICES": "7,5"}, ["7", "5"]),
    ],
)
def test_local_gives_each_process_its_own_gpus(place, settings, shares):
    status, _, err = place.run("local.sh", "--processes", "2", "--workdir=runs/my run", **settings)
    assert (status, err) == (0, "")
    for k, share in enumerate(shares):
        calls = place.calls(f".program{k}")
        assert calls[:3] == ["-m", "clsl_jax.main", "--distributed"]
        assert calls[-2:] == [f"gpus {share}", "of 2"]
    assert (place.repository / "runs" / "my run.process-1.log").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"CLSL_EXTRA": "cuda12", "GPUS": "0 1 2"}, "--processes 2 cannot share 3 GPUs"),
        ({"CLSL_EXTRA": "cuda12"}, "--processes 2 cannot share 0 GPUs"),
        ({"CLSL_EXTRA": "cuda12", "GPUS": "0 1", "CUDA_VISIBLE_DEVICES": ""}, "share 0 GPUs"),
        ({"CLSL_EXTRA": "tpu"}, "one process drives all chips"),
    ],
)
def test_local_refuses_gpus_that_cannot_be_shared(place, settings, message):
    status, _, err = place.run("local.sh", "--processes=2", **settings)
    assert status == 2
    assert message in err
    assert not place.calls(".program0")


class Controlled:
    """local.sh with processes that end when they are told to."""

    def __init__(self, place):
        self._place = place
        self._orders = place.root / "orders"
        self._orders.mkdir()
        self.on_term("0")
        program = place.root / "program.py"
        program.write_text(CONTROLLED, encoding="utf-8")
        place.settings |= {"ORDERS": str(self._orders), "PROGRAM": str(program)}
        self.script = None

    def start(self, *arguments):
        # As from a terminal, whatever this process does with Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.script = self._place.start("local.sh", *arguments, "--workdir=runs/my run")
        finally:
            signal.signal(signal.SIGINT, before)

    def on_term(self, wish):
        """Every process ends with this status on SIGTERM, or `ignore`s it."""
        (self._orders / "on_term").write_text(wish)

    def wait_for(self, *names):
        """Waits until these run, such as "1.0", the first start of process 1."""
        paths = [self._orders / f"{name}.pid" for name in names]
        commands.wait_for(lambda: all(path.exists() for path in paths), self.script, seconds=60)

    def end(self, **statuses):
        """Lets processes end, such as `p1_0=7`."""
        for name, status in statuses.items():
            path = self._orders / f"{name[1:].replace('_', '.')}.status"
            path.with_suffix(".new").write_text(str(status))
            path.with_suffix(".new").rename(path)

    def kill(self, name, signum=signal.SIGKILL):
        os.kill(int(commands.read(self._orders / f"{name}.pid")), signum)

    def finish(self):
        """Waits for the script; returns (exit status, what it said of the processes)."""
        out, _ = self.script.communicate(timeout=60)
        assert self.running() == []
        return self.script.returncode, out.removeprefix("Installing . (once; about a minute) ...\n")

    def running(self):
        return [name for name in self.started() if self._runs(name)]

    def _runs(self, name):
        try:
            self.kill(name, 0)
        except ProcessLookupError:
            return False
        return True

    def started(self):
        return sorted(path.stem for path in self._orders.glob("*.pid"))

    def told(self, name, what):
        path = self._orders / f"{name}.{what}"
        return commands.read(path).splitlines() if path.exists() else []

    def log(self, k):
        return commands.read(self._place.repository / "runs" / f"my run.process-{k}.log")

    def close(self):
        for name in self.running():
            self.kill(name)
        if self.script is not None and self.script.poll() is None:
            self.script.kill()
            self.script.communicate()


@pytest.fixture
def controlled(place):
    controlled = Controlled(place)
    yield controlled
    controlled.close()


@pytest.mark.slow
def test_local_stops_the_others_ten_seconds_after_one_failed(controlled):
    controlled.on_term("ignore")  # as one that waits for the others in a collective
    controlled.start("--processes", "3")
    controlled.wait_for("0.0", "1.0", "2.0")
    controlled.end(p1_0=7)
    began = time.monotonic()
    commands.wait_for(lambda: "1.0" not in controlled.running(), controlled.script)
    while time.monotonic() < began + 9:
        assert controlled.running() == ["0.0", "2.0"]
        time.sleep(0.2)
    assert controlled.finish()[0] == 7
    assert time.monotonic() - began < 14


def test_local_lets_the_others_say_their_last_words(controlled):
    controlled.start("--processes=2")
    controlled.wait_for("0.0", "1.0")
    controlled.kill("0.0")
    commands.wait_for(lambda: controlled.running() == ["1.0"], controlled.script)
    controlled.end(p1_0=6)
    assert controlled.finish() == (137, "")  # of the one that failed first: 128 + SIGKILL
    assert controlled.log(1) == "ended 1.0\n"


@pytest.mark.parametrize(
    ("statuses", "status"),
    [((0, 0), 0), ((0, 3), 3), ((4, 0), 4), ((134, 2), 2)],  # refused, whatever that did to others
)
def test_local_keeps_the_exit_status(controlled, statuses, status):
    controlled.start("--processes=2")
    controlled.wait_for("0.0", "1.0")
    controlled.end(p0_0=statuses[0], p1_0=statuses[1])
    assert controlled.finish() == (status, "ended 0.0\n")
    assert controlled.log(1) == "ended 1.0\n"


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [0, 75])
def test_local_passes_a_signal_to_all(controlled, processes, signum, status):
    controlled.on_term(str(status))
    controlled.start(f"--processes={processes}", "--restarts=5")
    names = [f"{k}.0" for k in range(processes)]
    controlled.wait_for(*names)
    if signum == signal.SIGINT:  # a terminal sends it to every process of the foreground
        os.killpg(controlled.script.pid, signum)
    else:
        controlled.script.send_signal(signum)
    assert controlled.finish() == (status, "stopped 0.0\n")
    assert controlled.started() == names  # and none anew, whatever the status
    assert [controlled.told(name, "signals") for name in names] == [["SIGTERM"]] * processes


def test_local_passes_every_signal_on(controlled):
    controlled.on_term("ignore")
    controlled.start("--processes=2")
    controlled.wait_for("0.0", "1.0")
    for times in (1, 2):
        controlled.script.send_signal(signal.SIGTERM)
        commands.wait_for(
            lambda: all(len(controlled.told(name, "signals")) == times for name in ("0.0", "1.0")),  # noqa: B023
            controlled.script,
        )
    controlled.end(p0_0=0, p1_0=0)
    assert controlled.finish()[0] == 0


ANEW = "The processes ended with status {}; starting them anew.\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_local_starts_anew_what_broke(controlled, processes):
    controlled.start("--restarts", "3", f"--processes={processes}")
    for start, status in enumerate((1, 75, 137, 0)):
        names = [f"{k}.{start}" for k in range(processes)]
        controlled.wait_for(*names)
        assert controlled.running() == names
        controlled.end(**{f"p{k}_{start}": status for k in range(processes)})
    said = "".join(f"ended 0.{t}\n" + ANEW.format(n) for t, n in enumerate((1, 75, 137)))
    assert controlled.finish() == (0, said + "ended 0.3\n")
    arguments = [controlled.told(f"0.{start}", "arguments") for start in range(4)]
    start = ["--config=configs/scenes.py", "--workdir=runs/my run"]
    if processes == 1:
        assert arguments == [["", *start]] * 4
        return
    assert [line[1:] for line in arguments] == [["--distributed", *start]] * 4
    assert all(line[0].startswith("127.0.0.1:") for line in arguments)
    assert controlled.told("1.3", "arguments") == arguments[3]
    assert controlled.log(1) == "".join(f"ended 1.{start}\n" for start in range(4))


def test_local_starts_all_anew_where_one_was_killed(controlled):
    controlled.start("--processes=2", "--restarts=1")
    controlled.wait_for("0.0", "1.0")
    controlled.kill("1.0")
    commands.wait_for(lambda: controlled.running() == ["0.0"], controlled.script)
    controlled.end(p0_0=134)
    controlled.wait_for("0.1", "1.1")
    controlled.end(p0_1=0, p1_1=0)
    status, said = controlled.finish()
    assert status == 0
    # Both ended within half a second, which to local.sh is one moment.
    assert said in ["ended 0.0\n" + ANEW.format(n) + "ended 0.1\n" for n in (134, 137)]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--restarts=9"], 0), (["--restarts=9"], 2), ([], 1), (["--restarts=0"], 75)],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_local_starts_nothing_anew(controlled, processes, arguments, status):
    controlled.start(*arguments, f"--processes={processes}")
    controlled.wait_for(*(f"{k}.0" for k in range(processes)))
    controlled.end(**{f"p{k}_0": status for k in range(processes)})
    assert controlled.finish() == (status, "ended 0.0\n")
    assert controlled.started() == [f"{k}.0" for k in range(processes)]


def test_local_starts_anew_only_so_often(controlled):
    controlled.start("--restarts=2")
    for start, status in enumerate((9, 8, 7)):
        controlled.wait_for(f"0.{start}")
        controlled.end(**{f"p0_{start}": status})
    assert controlled.finish()[0] == 7
    assert controlled.started() == ["0.0", "0.1", "0.2"]


# TPU hosts.
WHERE = ("--tpu=my-tpu", "--zone=a-b", "--bucket=gs://bucket/my run")
SPECIAL = '--config.data.dir=/a b/$HOME\'s "x" *;'


@pytest.fixture
def hosts(place):
    """The launchers in a git repository, and a host to copy it to."""
    if not shutil.which("git"):
        pytest.skip("tpu_vm.sh needs git")
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--message=x"],
    ):
        subprocess.run(["git", *command], cwd=place.repository, env=place.settings, check=True)
    host = place.root / "host"
    host.mkdir()
    place.settings["HOST"] = str(host)
    _program(place.root / "bin" / "sleep", "exit 0")
    return place


def test_tpu_vm_quotes_what_it_passes_on(hosts):
    status, out, err = hosts.run("tpu_vm.sh", *WHERE, "--project=p", "--dry-run", "--", SPECIAL)
    assert (status, err) == (0, "")
    assert not hosts.calls(".gcloud")
    said = [shlex.split(line) for line in out.splitlines()]
    assert len(said) == 3
    assert all({"--zone=a-b", "--project=p", "--worker=all"} <= set(line) for line in said)

    status, _, err = hosts.run("tpu_vm.sh", *WHERE, "--project=p", "--", SPECIAL)
    assert (status, err) == (0, "")
    assert hosts.calls(".program")[:-2] == [
        *("-m", "clsl_jax.main", "--distributed", "--stopped_status=75", "--workdir=runs/my run"),
        "--config.checkpoint.dir=gs://bucket/my run/checkpoints",
        *(SPECIAL, "cache gs://bucket/my run/compiled"),
    ]
    assert hosts.calls() == [
        "pip install --quiet --disable-pip-version-check -e .[tpu]",
        *("pip install --quiet gcsfs", "program"),
    ]
    host = hosts.root / "host"
    assert (host / "configs" / "coco.py").exists()
    # What --dry-run said is what was done, apart from the archive's own name.
    done = [shlex.split(line) for line in hosts.calls(".gcloud")]
    said[0][5] = done[0][5]
    assert said == done
    assert not os.path.exists(done[0][5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (WHERE[1:], "--tpu=... is missing"),
        ((WHERE[0], WHERE[2]), "--zone=... is missing"),
        (WHERE[:2], "--bucket=... is missing"),
        ((*WHERE[:2], "--bucket=/disk/run"), "expected gs://BUCKET/RUN"),
        ((*WHERE[:2], "--bucket=gs://"), "expected gs://BUCKET/RUN"),
        ((*WHERE, "--config=x.py"), "unknown argument '--config=x.py'"),
    ],
)
def test_tpu_vm_refuses_wrong_arguments(hosts, arguments, message):
    status, out, err = hosts.run("tpu_vm.sh", *arguments, "--dry-run")
    assert (status, out) == (2, "")
    assert message in err


def test_tpu_vm_starts_again_what_was_stopped(hosts):
    hosts.program_ends_with(75, 134, 0)
    assert hosts.run("tpu_vm.sh", *WHERE)[0] == 0
    assert hosts.calls().count("program") == 3
    assert sum(" describe " in line for line in hosts.calls(".gcloud")) == 2
    hosts.program_ends_with(2, 0)
    assert hosts.run("tpu_vm.sh", *WHERE)[0] == 2
    assert hosts.calls().count("program") == 4


def test_tpu_vm_tries_again_where_pip_failed(hosts):
    assert hosts.run("tpu_vm.sh", *WHERE, PIP_STATUS="1")[0] == 1
    assert sum(" scp " in line for line in hosts.calls(".gcloud")) == 21
    assert "program" not in hosts.calls()


def test_tpu_vm_ends_where_a_host_has_no_python(hosts):
    for name in ("python3.12", "python3.11", "python3", "python"):
        _program(hosts.root / "bin" / name, "exit 1")
    status, _, err = hosts.run("tpu_vm.sh", *WHERE, CLSL_VENV=str(hosts.root / "none"))
    assert status == 2
    assert "no Python 3.11 or newer" in err
    assert len(hosts.calls(".gcloud")) == 2  # one copy, one try


def test_tpu_vm_tells_what_it_does_not_send(hosts):
    (hosts.repository / "configs" / "mine.py").touch()
    status, _, err = hosts.run("tpu_vm.sh", *WHERE, "--dry-run")
    assert status == 0
    assert "warning:" in err
    assert "configs/mine.py" in err
    shutil.rmtree(hosts.repository / ".git")
    status, out, err = hosts.run("tpu_vm.sh", *WHERE, "--dry-run")
    assert (status, out) == (2, "")
    assert "error: 'git archive HEAD' failed" in err


# Kubernetes.
KUBERNETES = "1.37"
MANIFESTS = {"tpu": "gke.yaml", "gpu": "gke-gpu.yaml"}


def _manifest(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def _jobset(kind):
    (jobset,) = _manifest(MANIFESTS[kind])
    return jobset


def _pod(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def _without_defaults(given, found):
    """What is `found`, less the keys that are not `given`; numbers as they were given."""
    if isinstance(given, dict) and isinstance(found, dict):
        return {k: _without_defaults(given[k], v) for k, v in found.items() if k in given}
    if isinstance(given, list) and isinstance(found, list):
        pairs = itertools.zip_longest(given, found)
        return [_without_defaults(*pair) for pair in pairs]
    return found


def _check_jobset(jobset):
    """Raises or fails if Kubernetes or JobSet does not know a key or a value of it."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    kubernetes_validate.validate({**job, **replicated["template"]}, KUBERNETES, strict=True)
    model = models.JobsetV1alpha2JobSet
    known = json.loads(model.from_dict(jobset).to_json())
    assert _without_defaults(jobset, known) == jobset


@pytest.mark.parametrize("kind", MANIFESTS)
def test_jobset_is_what_kubernetes_knows(kind):
    _check_jobset(_jobset(kind))


@pytest.mark.parametrize("where", ["pod", "jobset"])
def test_what_kubernetes_does_not_know_is_found(where):
    jobset = _jobset("tpu")
    spec = _pod(jobset) if where == "pod" else jobset["spec"]
    spec["restartPolice"] = "Never"
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError), match="Police"):
        _check_jobset(jobset)


def test_volumes_are_those_of_the_jobs():
    claims, files = {}, None
    for part in _manifest("gke-volumes.yaml"):
        kubernetes_validate.validate(part, KUBERNETES, strict=True)
        if part["kind"] == "PersistentVolumeClaim":
            claims[part["metadata"]["name"]] = part["spec"]
        else:
            files = part["spec"]
    assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
    for pod in (files, *(_pod(_jobset(kind)) for kind in MANIFESTS)):
        volumes = [v["persistentVolumeClaim"] for v in pod["volumes"] if "emptyDir" not in v]
        assert {volume["claimName"] for volume in volumes} == set(claims)
        assert pod["securityContext"]["fsGroup"] == 1000
        assert pod["containers"][0]["image"] == "IMAGE"


def test_the_jobs_differ_only_by_the_accelerator():
    jobs = [_jobset(kind) for kind in MANIFESTS]
    for job in jobs:
        (container,) = _pod(job)["containers"]
        del _pod(job)["nodeSelector"], container["resources"]
        container["env"] = container["env"][:2]
        container.pop("securityContext", None)
        container.pop("command", None)
    assert jobs[0] == jobs[1]
    (container,) = _pod(_jobset("gpu"))["containers"]
    assert "securityContext" not in container  # the image's user


def test_a_tpu_pod_runs_its_arguments():
    (container,) = _pod(_jobset("tpu"))["containers"]
    given = ["printf", "%s\n", "a b", "$HOME 'x'"]
    done = _lint(*container["command"], *given)
    assert (done.returncode, done.stdout) == (0, "a b\n$HOME 'x'\n")


@pytest.mark.parametrize("kind", MANIFESTS)
def test_jobset_names_what_it_has(kind):
    jobset = _jobset(kind)
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], _pod(jobset)
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    shared = next(volumes[key] for key, path in mounts.items() if path == "/dev/shm")
    assert shared["emptyDir"] == {"medium": "Memory"}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    assert container["args"][:3] == ["python", "-m", "clsl_jax.main"]
    assert "--stopped_status=75" in container["args"]
    paths = [text.split("=", 1)[1] for text in container["args"] if re.search("=/", text)]
    assert paths
    for path in paths:
        assert any(path.startswith(mount + "/") for mount in mounts.values())
    assert pod["subdomain"] == name
    assert job["parallelism"] == job["completions"]
    settings = {setting["name"]: setting.get("value") for setting in container["env"]}
    limits, selector = container["resources"]["limits"], pod["nodeSelector"]
    if kind == "tpu":
        assert list(limits) == ["google.com/tpu"]
        assert "cloud.google.com/gke-tpu-topology" in selector
        assert "JAX_COORDINATOR_ADDRESS" not in settings
        return
    assert list(limits) == ["nvidia.com/gpu"]
    assert list(selector) == ["cloud.google.com/gke-accelerator"]
    assert settings["JAX_PLATFORMS"] == "cuda"
    assert int(settings["JAX_NUM_PROCESSES"]) == job["completions"]
    port = container["ports"][0]["containerPort"]
    assert settings["JAX_COORDINATOR_ADDRESS"] == f"{name}-{replicated['name']}-0-0.{name}:{port}"
    index = next(s for s in container["env"] if s["name"] == "JAX_PROCESS_ID")
    assert index["valueFrom"]["fieldRef"]["fieldPath"].endswith(
        "['batch.kubernetes.io/job-completion-index']"
    )


# The image.
DOCKERFILE = LAUNCH / "Dockerfile"


def _instructions():
    """(word, rest) of every instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_dockerfile_passes_hadolint():
    done = _lint(_linter("hadolint"), str(DOCKERFILE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_image_has_what_it_copies_and_what_the_jobs_name():
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    copied = []
    for word, rest in _instructions():
        if word == "COPY":
            *sources, _ = rest.split()
            copied += sources
    for source in copied:
        assert (LAUNCH.parent / source).exists()
        assert f"!{source.split('/')[0]}" in sent
    instructions = dict(_instructions())
    assert instructions["USER"] == "1000:1000"
    for kind in MANIFESTS:
        (container,) = _pod(_jobset(kind))["containers"]
        assert container["workingDir"] == instructions["WORKDIR"]
        config = next(a for a in container["args"] if a.startswith("--config="))
        assert config.split("=")[1].split("/")[0] in copied


@pytest.mark.parametrize(
    ("accelerator", "target"),
    [("cpu", "."), ("cuda12", ".[cuda12]"), ("cuda13", ".[cuda13]"), ("tpu", ".[tpu]")],
)
def test_image_installs_for_the_accelerator(place, accelerator, target):
    _program(place.root / "bin" / "pip", 'echo "pip $*" >>"$CALLS"')
    (step,) = (rest for word, rest in _instructions() if word == "RUN" and "pip" in rest)
    settings = {**place.settings, "ACCELERATOR": accelerator}
    subprocess.run(["sh", "-c", step], env=settings, check=True)
    assert place.calls() == [f"pip install --no-cache-dir --editable {target} gcsfs"]
    settings["ACCELERATOR"] = "gpu"
    done = subprocess.run(["sh", "-c", step], env=settings, check=False, capture_output=True)
    assert (done.returncode, len(place.calls())) == (2, 1)
