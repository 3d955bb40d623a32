"""The launchers, as real processes; Slurm, gcloud, GPUs and the program itself are stand-ins."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import commands
import pytest
import yaml

LAUNCH = pathlib.Path(commands.REPOSITORY, "launch")
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="the launchers need bash")

# Stands for `python` in an environment: pip and the program write down how they were called.
PYTHON = r"""
case "$*" in
  -c*) exec "$REAL" "$@" ;;
  "-m pip install "*) echo "pip ${*:3}" >>"$CALLS"; exit "${PIP_STATUS:-0}" ;;
  "-m pip "*) exit 0 ;;
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    done = subprocess.run(
        ["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Slurm.
RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"
REQUEUE = ["requeue 7"]


def _slurm(place, status, job=RUNNING, signum=None, **settings):
    """Runs slurm.sh as job 7; returns (exit status, calls of scancel and `scontrol requeue`)."""
    settings = {
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(place.repository),
        "STATUS": str(status),
        "JOB": job,
        "WAITS": "yes" if signum else "",
        **settings,
    }
    process = place.start("slurm.sh", "--workdir=/shared/my run", **settings)
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
    (other / "mine.txt").touch()
    status, _, err = _source(place, CLSL_VENV=str(other))
    assert (status, "holds something else" in err) == (2, True)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


# One machine.
@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--processes=two"], ["--processes"]])
def test_local_needs_a_number_of_processes(place, arguments):
    status, _, err = place.run("local.sh", *arguments)
    assert status == 2
    assert "--processes needs a number" in err
    assert not place.calls(".program")


def test_local_passes_arguments_on(place):
    place.program_ends_with(3)
    given = ["--workdir=my run", "--config.note=$HOME 'x'"]
    assert place.run("local.sh", *given)[0] == 3
    start = ["-m", "clsl_jax.main", "--config=configs/scenes.py", *given]
    assert place.calls(".program") == [*start, "cache none", "gpus none", "of one"]


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
def _jobset(gpus):
    """gke.yaml as it stands, or with the parts for GPUs in place of those for TPUs."""
    lines = (LAUNCH / "gke.yaml").read_text(encoding="utf-8").splitlines()
    if gpus:
        within = False
        for number, line in enumerate(lines):
            within = "# [GPU]" in line or (within and re.match(r" *# +\S", line) is not None)
            if "[TPU]" in line:
                lines[number] = ""
            elif line.endswith("# [GPU]") or (within and "# [GPU]" not in line):
                lines[number] = line.replace("# ", "", 1)
    return yaml.safe_load("\n".join(lines))


@pytest.mark.parametrize("gpus", [False, True])
def test_jobset_names_what_it_has(gpus):
    jobset = _jobset(gpus)
    name = jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    shared = next(volumes[key] for key, path in mounts.items() if path == "/dev/shm")
    assert shared["emptyDir"] == {"medium": "Memory"}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    assert "--stopped_status=75" in container["command"]
    paths = [text.split("=", 1)[1] for text in container["command"] if re.search("=/", text)]
    assert paths
    for path in paths:
        assert any(path.startswith(mount + "/") for mount in mounts.values())
    assert pod["subdomain"] == name
    assert job["parallelism"] == job["completions"]
    settings = {setting["name"]: setting.get("value") for setting in container["env"]}
    limits, selector = container["resources"]["limits"], pod["nodeSelector"]
    if not gpus:
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
