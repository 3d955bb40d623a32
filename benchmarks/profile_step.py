"""Where the time of a train step goes: a trace of `jax.profiler`, summed up by kind of operation.

    PYTHONPATH=. python benchmarks/profile_step.py [--config=configs/scenes.py] [--steps=20]

Trains the configuration's first steps on data made up at its size, without evaluation.
"""

import argparse
import pathlib
import time

import jax
import numpy as np
import rounds
import traces

from clsl_jax import command_line, experiment, sharding
from clsl_jax.compiled import compile_steps


def main() -> None:
    """Parses the command line, traces, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/scenes.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--trace", help="keep the trace in this directory, for TensorBoard or Perfetto"
    )
    parser.add_argument("--read", help="only show the trace of --steps that is in this directory")
    parser.add_argument("--json", type=pathlib.Path, help="also write the operations to this file")
    options = parser.parse_args()
    if options.read:
        traces.show_operations(traces.operations(options.read), options.steps, options.read)
        return
    config = command_line.config_of([f"--config={options.config}"])
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
    clock, found = traces.show(run, options.steps, options.config, options.trace)
    rounds.write(options.json, {"milliseconds": clock, "operations": found})


if __name__ == "__main__":
    main()
