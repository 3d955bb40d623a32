"""One run on several layouts of processes and devices: real processes, collectives on the CPU."""

import json
import os
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from commands import (
    CONFIG,
    TINY,
    environment,
    newest_step,
    read,
    run_several,
    start_several,
    wait_for,
)
from test_train import assert_same_run, saved_arrays

from clsl_jax import command_line, experiment
from clsl_jax.writer import read_log

pytestmark = pytest.mark.slow

# 20 steps: 4 epochs of 5; every part that exchanges something between devices is on.
STEPS = (
    f"--config={CONFIG}",
    *(x.replace("(96,", "(80,").replace("(8,16)", "(8,)") for x in TINY),
    "--config.graph.layers=1",
    "--config.model.encoder_layers=0",
    # A small rate: Adam makes a whole step out of a gradient that is nothing but rounding.
    "--config.optim.learning_rate=1e-4",
    "--config.recovery.thresholds=none",  # adaptive ones hand out at the end
    "--config.recovery.min_count=1",
    "--config.recovery.positive_precision=0.3",
    "--config.recovery.negative_precision=0.8",
)
LAYOUTS = {"1x1": (1, 1), "1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2)}  # processes, devices of each
# Among how many devices of a process classes and wide layers are divided.
MODEL = {"1x1": 1, "1x8": 1, "2x4": 4, "4x2": 2}


def of_layout(name, model=None):
    """Arguments of a run on a layout, its wide layers divided among so many devices."""
    model = model or MODEL[name]
    return (*STEPS, f"--config.mesh.model={model}", "--config.checkpoint.every_steps=0")


def pictures_of(workdir):
    """The argument of a run that drew so many."""
    pictures = json.loads((workdir / "config.json").read_text())["evaluation"]["pictures"]
    return f"--config.evaluation.pictures={pictures}"


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory):
    """{layout: workdir}, each trained from its start."""
    found = {}
    for name, (processes, devices) in LAYOUTS.items():
        workdir = tmp_path_factory.mktemp("run") / name
        more = () if name == "1x1" else ("--config.evaluation.pictures=2",)
        statuses, said = run_several(
            shared, workdir, *of_layout(name), *more, processes=processes, devices=devices
        )
        assert statuses == [0] * processes, said[0]
        assert not any("epoch" in text for text in said[1:])
        found[name] = workdir
    return found


@pytest.fixture(scope="module")
def start_parameters(shared):
    """{path: array} of the run's parameters, and of their EMA, before the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSL_CACHE_DIR", environment(shared)["CLSL_CACHE_DIR"])
        state = experiment.build(command_line.config_of(STEPS)).new_state()
    tree = {"params": state.params, "ema_params": state.ema_params}
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(array) for path, array in leaves}


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_any_layout_gives_the_same_numbers(runs, start_parameters, layout):
    assert_close_runs(runs["1x1"], runs[layout], start_parameters)


@pytest.mark.parametrize(("begun", "ended"), [("4x2", "1x1"), ("1x1", "2x4")])
def test_a_run_goes_on_on_another_layout(shared, runs, start_parameters, tmp_path, begun, ended):
    """Its last five steps on other processes and devices than the first fifteen."""
    workdir = tmp_path / "run"
    shutil.copytree(runs[begun], workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    assert newest_step(workdir) == 15
    (workdir / "results.json").unlink()
    processes, devices = LAYOUTS[ended]
    statuses, said = run_several(
        shared, workdir, *of_layout(ended), pictures_of(workdir),
        processes=processes, devices=devices,
    )  # fmt: skip
    assert statuses == [0] * processes, said[0]
    assert "Going on from step 15 of 20" in said[0]
    assert_close_runs(runs["1x1"], workdir, start_parameters)


def assert_close_runs(expected, found, start_parameters):
    """To a thousandth of an array's largest entry, weights of how far they have come."""
    step, one = saved_arrays(expected)
    other_step, other = saved_arrays(found)
    assert step == other_step == 20
    assert one.keys() == other.keys()
    assert one["['recovered_weight']"].sum() > 50
    assert start_parameters.keys() <= one.keys()
    for key, array in one.items():
        if key in start_parameters:
            moved = np.linalg.norm(array - start_parameters[key])
            # Some biases have a gradient that is nothing but rounding.
            assert np.linalg.norm(other[key] - array) <= 1e-3 * moved + 1e-6, key
        elif array.dtype.kind == "f":
            atol = 1e-3 * np.abs(array).max() + 1e-10
            np.testing.assert_allclose(other[key], array, rtol=0, atol=atol, err_msg=key)
        else:
            np.testing.assert_array_equal(other[key], array, err_msg=key)
    ways = [np.linalg.norm(one[key] - start) for key, start in start_parameters.items()]
    assert np.median(ways) > 1e-5  # far above rounding
    losses = [
        [row["train/loss"] for row in read_log(workdir / "log.jsonl")]
        for workdir in (expected, found)
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


# Groups with devices of several processes, as on GPUs: on CPUs a train step may hang for ever,
# where prediction, whose one loop stands between all other exchanges, does not.
ACROSS = """
from clsl_jax import main, sharding
sharding._check_groups = lambda devices, model: None
main.cli()
"""


@pytest.mark.parametrize(
    ("saved", "restored", "model", "rounding"),
    [
        ("1x1", "4x2", 1, 0),
        ("4x2", "1x8", 2, 0),
        ("2x4", "1x8", 1, 0),
        ("1x8", "2x4", 4, 0),
        # Of layers in halves, an AMD EPYC without AVX-512 rounds the sums otherwise.
        ("1x1", "4x2", 2, 1e-6),
        ("4x2", "1x1", 1, 1e-6),
        ("1x1", "2x1", 2, 1e-6),
    ],
)
def test_a_checkpoint_is_evaluated_alike_on_another_layout(
    shared, runs, tmp_path, saved, restored, model, rounding
):
    """Restored on other processes and devices: every number of the evaluation is the same."""
    workdir = tmp_path / "run"
    shutil.copytree(runs[saved], workdir)
    processes, devices = {**LAYOUTS, "2x1": (2, 1)}[restored]
    statuses, said = run_several(
        shared, workdir, "--mode=evaluate", *of_layout(restored, model), pictures_of(workdir),
        processes=processes, devices=devices, program=ACROSS if model > devices else None,
    )  # fmt: skip
    assert statuses == [0] * processes, said[0]
    before, after = (
        json.loads((workdir / name).read_text()) for name in ("results.json", "evaluation.json")
    )
    for key in ("results", "recovery", "labels", "dataset"):
        assert after[key] == before[key], key
    with np.load(runs[saved] / "predictions.npz") as a, np.load(workdir / "predictions.npz") as b:
        np.testing.assert_allclose(b["scores"], a["scores"], rtol=0, atol=rounding)
    for name in ("recovered.csv", "probabilities.csv")[: 1 if rounding else 2]:
        assert (runs[saved] / name).read_bytes() == (workdir / name).read_bytes()


RESTORED = """
import sys
import jax, numpy as np
from clsl_jax import cluster, command_line, evaluate, experiment
from clsl_jax.checkpoint import Checkpointer

cluster.join()
workdir, *arguments = (x.removeprefix("--workdir=") for x in sys.argv[1:-1])
built = experiment.build(command_line.config_of(arguments))
checkpointer = Checkpointer(f"{workdir}/checkpoints", keep=2, read_only=True)
state, _, _ = checkpointer.restore_latest(built.abstract_state)
leaves, _ = jax.tree_util.tree_flatten_with_path(evaluate.gather(state))
if jax.process_index() == 0:
    np.savez(f"{workdir}/restored.npz", **{jax.tree_util.keystr(k): x for k, x in leaves})
cluster.leave(0)
"""


@pytest.mark.parametrize(("saved", "restored"), [("4x2", "1x8"), ("1x1", "2x4")])
def test_a_checkpoint_has_the_same_bits_on_another_layout(shared, runs, tmp_path, saved, restored):
    workdir = tmp_path / "run"
    shutil.copytree(runs[saved], workdir)
    processes, devices = LAYOUTS[restored]
    statuses, said = run_several(
        shared, workdir, *of_layout(restored),
        processes=processes, devices=devices, program=RESTORED,
    )  # fmt: skip
    assert statuses == [0] * processes, said[0]
    _, arrays = saved_arrays(runs[saved])
    with np.load(workdir / "restored.npz") as found:
        names = {
            "".join(f"[{x}]" if x.isdigit() else f"['{x}']" for x in re.findall(r"\w+", key)): key
            for key in found.files
        }
        assert names.keys() == arrays.keys()
        for name, key in names.items():
            np.testing.assert_array_equal(found[key], arrays[name], err_msg=name)


def test_one_of_two_processes_is_killed_then_one_stopped(shared, runs, tmp_path, pytestconfig):
    """SIGKILL to one, `--kills` times, SIGTERM to one, and the run ends with the same bits."""
    chance = random.Random(0)
    more = pytestconfig.getoption("kills") - 4
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    processes, devices = LAYOUTS["2x4"]
    arguments = (
        *STEPS,
        f"--config.mesh.model={MODEL['2x4']}",
        "--config.checkpoint.every_steps=1",
    )

    def started_until(condition):
        started = start_several(shared, workdir, *arguments, processes=processes, devices=devices)
        wait_for(condition, *started)
        return started

    def compiling():
        return "compiled" in read(f"{workdir}.0.log")

    def saved_again(before):
        return lambda: newest_step(workdir) > before

    # While it compiles, then just after a next checkpoint: a step, an evaluation, the next save.
    # More of them at any moment before that, which takes `seconds`.
    seconds = 0.0
    for moment in ("start", "checkpoint", *["any"] * more, "checkpoint", "alone"):
        saved, begun = saved_again(newest_step(workdir)), time.monotonic()
        if moment == "any":
            end = begun + chance.uniform(0, 0.7 * seconds)
            started = started_until(lambda end=end, saved=saved: time.monotonic() > end or saved())
        else:
            started = started_until(compiling if moment == "start" else saved)
            seconds = time.monotonic() - begun
            time.sleep(chance.uniform(0, 0.3))
        killed = chance.choice(started)
        killed.send_signal(signal.SIGKILL)
        if moment == "alone":  # nothing takes care of the others: they end by themselves
            others = [process.wait(timeout=200) for process in started if process is not killed]
            assert 0 not in others
        time.sleep(chance.uniform(0, 1))
        for process in started:  # what srun, JobSet or local.sh do with the other one
            process.kill()
            process.wait()
    started = started_until(saved_again(newest_step(workdir)))
    chance.choice(started).send_signal(signal.SIGTERM)
    assert [p.wait(timeout=120) for p in started] == [0, 0]
    assert "Stopped after step" in read(f"{workdir}.0.log")
    assert newest_step(workdir) < 20
    statuses, said = run_several(shared, workdir, *arguments, processes=processes, devices=devices)
    assert statuses == [0] * processes, said[0]
    assert "Going on from step" in said[0]
    assert_same_run(runs["2x4"], workdir)


def test_processes_with_workdirs_of_their_own(shared, tmp_path):
    """As on hosts without a common disk, but for the checkpoints: what process 0 has is enough."""
    workdir, how = tmp_path / "run", {"processes": 2, "devices": 1, "apart": True}
    arguments = (
        *STEPS,
        "--config.epochs=2",
        "--config.checkpoint.every_steps=0",
        f"--config.checkpoint.dir={tmp_path / 'checkpoints'}",
    )
    statuses, said = run_several(shared, workdir, *arguments, **how)
    assert statuses == [0, 0], said[0]
    results = (tmp_path / "run-0" / "results.json").read_bytes()
    assert not (tmp_path / "run-1" / "config.json").exists()
    statuses, said = run_several(shared, workdir, "--mode=evaluate", **how)
    assert statuses == [0, 0], said[0]
    evaluated = json.loads((tmp_path / "run-0" / "evaluation.json").read_bytes())
    assert evaluated["results"] == json.loads(results)["results"]

    # On another machine in the place of the first one.
    shutil.rmtree(tmp_path / "run-0")
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    statuses, said = run_several(shared, workdir, *arguments, **how)
    assert statuses == [0, 0], said[0]
    assert "Going on from step 5 of 10" in said[0]
    assert (tmp_path / "run-0" / "results.json").read_bytes() == results


def test_a_second_run_in_the_workdir_is_refused_by_all_processes(shared, runs, tmp_path):
    import fcntl

    workdir = tmp_path / "run"
    workdir.mkdir()
    with open(workdir / ".lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        statuses, said = run_several(shared, workdir, *STEPS, processes=2, devices=1)
    assert statuses == [2, 2]
    assert "Another process is running" in said[0]
    assert "Process 0 cannot go on" in said[1]
    assert os.listdir(workdir) == [".lock"]


def test_processes_wait_for_one_that_compiles_longer(shared, tmp_path):
    """The first collective over all devices, by itself, gives up after half a minute."""
    program = """
import os, time
from clsl_jax import compiled, main

compile_one = compiled._compile

def late(*given):
    compiled._compile = compile_one
    time.sleep(40)
    return compile_one(*given)

if os.environ["JAX_PROCESS_ID"] == "1":
    compiled._compile = late
main.cli()
"""
    statuses, said = run_several(
        shared, tmp_path / "run", *STEPS, "--config.epochs=1", processes=2, devices=2,
        program=program,
    )  # fmt: skip
    assert statuses == [0, 0], said


def test_processes_of_one_host_are_counted(shared, tmp_path):
    """They share its memory. Of three, two have one host name and one another."""
    program = """
import os, socket
socket.gethostname = lambda: "one" if os.environ["JAX_PROCESS_ID"] == "1" else "another"
from clsl_jax import cluster

cluster.join()
mine = 2**37 + 5 - 2**20 * int(os.environ["JAX_PROCESS_ID"])
print("here:", cluster.processes_here(), cluster.smallest(mine))
cluster.leave(0)
"""
    statuses, said = run_several(shared, tmp_path / "run", processes=3, devices=1, program=program)
    assert statuses == [0, 0, 0], said
    found = [re.findall(r"here: (\d) (\d+)", text) for text in said]
    assert found == [[(count, str(2**37 - 2**21))] for count in "212"]


def test_no_process_is_aborted_because_another_left_before_it(shared, tmp_path):
    """Both refuse; the one that the other depends on is done two seconds earlier, or later."""
    for slow in (0, 1):
        program = f"""
import sys, time
from clsl_jax import cluster

class Slow:
    def flush(self):
        time.sleep(2)

cluster.join()
import jax
if jax.process_index() == {slow}:
    sys.stdout = Slow()
cluster.leave(2)
"""
        statuses, said = run_several(
            shared, tmp_path / "run", processes=2, devices=1, program=program
        )
        assert statuses == [2, 2], said


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("errors.InputError('a wrong path')", [2, 2]),
        ("errors.Unavailable('reading hangs')", [1, 1]),
        ("OSError(errno.EIO, 'storage that does not answer')", [1, 1]),
    ],
)
def test_what_may_pass_ends_no_process_for_good(shared, tmp_path, raised, expected):
    """Status 2 of any of them would end the job, and no launcher start it again."""
    program = f"""
import errno
from clsl_jax import cluster, errors, main

def work():
    import jax
    if jax.process_index() == 1:
        raise {raised}

main._run = lambda values, config: cluster.agree(work)
main.cli()
"""
    statuses, said = run_several(
        shared, tmp_path / "run", *STEPS, processes=2, devices=1, program=program
    )
    assert statuses == expected, said
    assert "error: Process 1 cannot go on: see what it says." in said[0]


def test_an_error_of_one_process_ends_all(shared, tmp_path):
    """JAX alone would wait for five minutes and then abort both, whatever was wrong."""
    workdir = tmp_path / "run"
    (workdir / "log.jsonl").mkdir(parents=True)  # process 0 alone opens it
    start = time.monotonic()
    statuses, said = run_several(
        shared, workdir, *STEPS, "--config.epochs=1", processes=2, devices=2
    )
    assert statuses[0] == 1, said[0]
    assert "Is a directory" in said[0]
    assert statuses[1] != 0
    assert time.monotonic() - start < 250


def test_checksums_of_many_arrays_never_wait_for_one_another(shared, tmp_path):
    """Devices that took up the collectives of many programs in different orders would, for ever."""
    program = """
import faulthandler
faulthandler.dump_traceback_later(100, exit=True)
from clsl_jax import cluster
cluster.join()
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as Axes
from clsl_jax import checkpoint

random = np.random.default_rng(0)
arrays = [random.normal(size=(80, 16 + 8 * (k % 3))).astype(np.float32) for k in range(60)]
layouts = [Axes(), Axes("data"), Axes(None, "model"), Axes("data", "model")] * 15

def checksums(*devices):
    mesh = jax.make_mesh(devices, ("data", "model"), devices=jax.devices()[:np.prod(devices)])
    placed = [NamedSharding(mesh, axes) for axes in layouts]
    return checkpoint.checksums(jax.device_put(arrays, placed))

expected = checksums(1, 1)
for _ in range(5):
    assert checksums(4, 2) == expected
cluster.leave(0)
"""
    statuses, said = run_several(shared, tmp_path / "run", processes=1, devices=8, program=program)
    assert statuses == [0], said
