"""How long the train step waits for its images: the pipeline's batches against one that is kept.

    PYTHONPATH=. python benchmarks/waiting.py [--config=configs/scenes.py] [--workers 0 1]
    PYTHONPATH=. python benchmarks/waiting.py --files JPEG WebP PNG

Both train the same network from the same weights, in turn; the first as `clsl_jax.main` does, with
reading and augmentation beside the step, the second with one batch over and over. What the first
takes longer is waiting, or cores that reading takes from the step. Rows are `data.augment_on` and
`data.workers`, processes that read and augment (0: threads of the run's own). With --files the
images are files of 500 x 375 pixels (`benchmarks/decode.py`), decoded anew for each batch.
"""

import argparse
import contextlib
import itertools
import pathlib

import decode
import jax
import rounds

from clsl_jax import command_line, experiment, sharding
from clsl_jax.compiled import compile_steps
from clsl_jax.data import images, pipeline
from clsl_jax.train import StepQueue


def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/scenes.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--augment_on", nargs="+", default=["host", "device"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--files", nargs="+", choices=("JPEG", "WebP", "PNG"), default=[])
    parser.add_argument("--images", type=int, default=256, help="files of each codec")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows, found = [], {}
    sources = options.files or [options.config]
    for source, where, workers in itertools.product(sources, options.augment_on, options.workers):
        config = command_line.config_of([f"--config={options.config}"])
        config.data.augment_on, config.data.workers = where, workers
        sharding.divide_cpu(config.cpu_devices)
        with contextlib.ExitStack() as stack:
            files = None
            if options.files:
                config.data.sizes = (options.images, *config.data.sizes[1:])
                encoded = [decode.photograph(source, 500, 375, n) for n in range(options.images)]
                files, _ = stack.enter_context(decode.prepared_set(encoded, config.data.image_size))
            measured = measure(config, options.steps, options.rounds, files)
        found[f"{source}, {where}, {workers}"] = measured
        read, kept = measured["pipeline"], measured["kept batch"]
        share = max(0.0, 1 - kept["median"] / read["median"])
        rate = 1e3 * config.batch_size / read["median"]
        cells = (rounds.milliseconds(read), rounds.milliseconds(kept))
        rows.append((source, where, str(workers), *cells, f"{100 * share:.0f} %", f"{rate:,.0f}"))
    header = ("images", "augmentation on", "workers", "ms a step", "with a kept batch")
    header += ("waiting", "images/s")
    print(rounds.markdown(f"{options.config}, batches of {config.batch_size}", header, rows))
    rounds.write(options.json, {"machine": rounds.machine(), "milliseconds": found})


def measure(
    config, steps: int, count: int, files: images.Images | None
) -> dict[str, dict[str, float]]:
    """Milliseconds a step of both ways; with `files` in place of the config's training images."""
    built = experiment.build(config)
    compiled = compile_steps(built, config, report=lambda _: None)
    state = built.new_state()
    batches = pipeline.train_iterator(
        files or built.dataset.train.images,
        batch_size=built.batch_size,
        seed=0,
        augment=experiment.augmentation_on("host", config),
        clean_view=experiment.needs_clean_view(built.options, config),
        workers=config.data.workers,
    )

    def put(batch) -> dict[str, jax.Array]:
        return sharding.put_rows(built.mesh, {k: v for k, v in batch.items() if k != "asked"})

    kept = put(next(batches))

    def run(next_batch) -> None:
        nonlocal state
        queue = StepQueue(sharding.TRAIN_AHEAD)
        for _ in range(steps):
            state = compiled.train(state, next_batch())
            queue.add(state.step)
        jax.block_until_ready(state)

    ways = {
        "pipeline": lambda: run(lambda: put(next(batches))),
        "kept batch": lambda: run(lambda: kept),
    }
    found = rounds.alternate(ways, count)
    return {name: {k: v / steps for k, v in row.items()} for name, row in found.items()}


if __name__ == "__main__":
    main()
