"""Where the time of a train step goes: a trace of `jax.profiler`, summed up by kind of operation.

    PYTHONPATH=. python benchmarks/profile_step.py [--config=configs/scenes.py] [--steps=20]

Trains the configuration's first steps on data made up at its size, without evaluation. Operations
are named by XLA; a fusion counts as what its name says. Times are summed over threads, so that on
several cores they exceed the clock.
"""

import argparse
import collections
import glob
import gzip
import importlib.util
import json
import os
import re
import tempfile
import time

import jax
import numpy as np
import rounds

from clsl_jax import experiment, sharding
from clsl_jax.compiled import compile_steps

KINDS = (
    ("collective", r"all-reduce|all-gather|collective|permute"),
    ("convolution", r"conv"),
    ("matrix product", r"dot|gemm|matmul|ynn|onednn"),
    ("reduction", r"reduce|norm"),
    ("gather and scatter", r"gather|scatter|dynamic"),
    ("copy, transpose, pad", r"copy|transpose|pad|concatenate|slice|reshape|broadcast"),
    ("loop over classes (attention)", r"while|call|condition"),
    ("element-wise", r"fusion|add|multiply|select|exp|tanh|log|power|divide|maximum|compare|erf"),
)


def load_config(path: str):
    """The configuration that a file gives."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def operations(directory: str) -> dict[str, tuple[int, float]]:
    """{operation: (times, milliseconds)} of a trace; outer events that hold others are left out."""
    (path,) = glob.glob(os.path.join(directory, "**", "*.trace.json.gz"), recursive=True)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            name = re.sub(r"[._]\d+$", "", event["args"]["hlo_op"])
            found[name][0] += 1
            found[name][1] += event["dur"] / 1e3
    return {name: (int(count), spent) for name, (count, spent) in found.items()}


def kind_of(name: str) -> str:
    """The row of the table that an operation belongs to."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def main() -> None:
    """Parses the command line, traces, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/scenes.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--trace", help="keep the trace in this directory, for TensorBoard or Perfetto"
    )
    parser.add_argument("--json", help="also write the operations to this file")
    options = parser.parse_args()
    config = load_config(options.config)
    sharding.divide_cpu(config.cpu_devices)
    built = experiment.build(config)
    steps = compile_steps(built, config, report=print)
    state = built.new_state()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (built.batch_size, *built.input_shape)).astype(built.input_dtype)
    batch = {"image": images, "row": np.arange(built.batch_size, dtype=np.int32)}
    if experiment.needs_clean_view(built.options, config):
        batch["clean"] = images
    batch = sharding.put_rows(built.mesh, batch)

    def run(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state = steps.train(state, batch)
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - start) / count

    run(3)
    clock = run(options.steps)
    directory = options.trace or tempfile.mkdtemp()
    with jax.profiler.trace(directory):
        traced = run(options.steps)
    found = operations(directory)
    kinds: dict[str, float] = collections.Counter()
    for name, (_, spent) in found.items():
        kinds[kind_of(name)] += spent / options.steps
    total = sum(kinds.values())
    rows = [
        (kind, f"{spent:.2f}", f"{100 * spent / total:.1f}")
        for kind, spent in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    title = f"{options.config}: {clock:.1f} ms a step, {traced:.1f} while traced"
    print(rounds.markdown(title, ("operation", "ms a step, all threads", "percent"), rows))
    top = sorted(found.items(), key=lambda item: -item[1][1])[:15]
    rows = [(n, f"{c / options.steps:.0f}", f"{t / options.steps:.2f}") for n, (c, t) in top]
    print(rounds.markdown("Single operations", ("name", "times a step", "ms a step"), rows))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"milliseconds": clock, "operations": found}, file, indent=2)


if __name__ == "__main__":
    main()
