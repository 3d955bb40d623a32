"""What a checkpoint costs to read: all of it, to go on training, or what prediction needs.

    PYTHONPATH=. python benchmarks/restoring.py [--backbone=resnet101] [--images=82081] \\
        [--classes=80] [--rounds=5]

`clsl_jax.predict`, and every run for the weights that are best, read the weights alone: not the
optimizer's moments, of which there are two for each weight, nor the matrices of the training
images. Both ways check every array that they read; they take turns, and read files that the system
still has in memory, by programs that are compiled.
"""

import argparse
import os
import pathlib
import tempfile

import jax
import new_state
import numpy as np
import rounds

from clsl_jax import checkpoint, sharding, train_state
from clsl_jax.models.clsl import CLSL


def main() -> None:
    """Parses the command line, saves a state, reads it, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--images", type=int, default=82081, help="for training")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    model = CLSL(num_classes=options.classes, backbone=options.backbone, rank=1024)
    rows = sharding.padded_rows(options.images)
    embeddings = new_state.inputs(1, 64, options.classes)["embeddings"]
    annotations = np.full((rows, options.classes), -1, np.int8)
    state = new_state.on_all_devices(model, embeddings, annotations)
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    wanted = {
        "the whole state": whole,
        "the weights alone": train_state.weights_alone(whole, ema=True),
    }
    with tempfile.TemporaryDirectory() as directory:
        saver = checkpoint.Checkpointer(os.path.join(directory, "checkpoints"))
        saver.save(state, step=1, meta={}, selection=None)
        saver.wait()
        times = rounds.alternate(
            {
                name: lambda wanted=wanted: saver.restore(wanted, 1)
                for name, wanted in wanted.items()
            },
            options.rounds,
        )
        saver.close()
    sizes = {name: _mebibytes(tree) for name, tree in wanted.items()}
    title = (
        f"{options.backbone}, {options.images:,} images, {options.classes} classes, "
        f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}"
    )
    table = [(name, f"{sizes[name]:,.0f}", rounds.milliseconds(times[name], 0)) for name in wanted]
    print(rounds.markdown(title, ("read", "MiB", "ms"), table))
    rounds.write(
        options.json,
        {"machine": rounds.machine(), "title": title, "mebibytes": sizes, "milliseconds": times},
    )


def _mebibytes(tree: train_state.TrainState) -> float:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf is not checkpoint.LEFT_OUT]
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / 2**20


if __name__ == "__main__":
    main()
