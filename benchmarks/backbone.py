"""Forward and backward pass of a backbone: seconds, page faults, memory.

    PYTHONPATH=. python benchmarks/backbone.py [--backbone=resnet101] [--size=448] [--batch=4] \\
        [--json=FILE]
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. python benchmarks/backbone.py

XLA takes a CPU step's temporaries anew from the system every time; with pages of 4 KiB the system
then hands them out one by one, each cleared first. Large pages have to be asked for before the
process starts, as the second line does; `launch/local.sh` does too.
"""

import argparse
import os
import pathlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import rounds

from clsl_jax.models.resnet import build_backbone


def main() -> None:
    """Parses the command line, measures, prints a table of one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    options = parser.parse_args()
    model = build_backbone(options.backbone)
    shape = (options.batch, options.size, options.size, 3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, images[:1], train=False))(jax.random.key(0))

    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        features, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(features)), updated

    arguments = (variables["params"], variables["batch_stats"], images)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile()
    way = "large pages" if "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "") else "as it is"
    jax.block_until_ready(step(*arguments))  # its page faults are not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    found = rounds.alternate({way: lambda: jax.block_until_ready(step(*arguments))}, options.rounds)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (options.rounds + 1)
    memory = step.memory_analysis().temp_size_in_bytes / 2**20
    row = (way, rounds.milliseconds(found[way], 0), f"{faults:,.0f}", f"{memory:,.0f}")
    title = f"{options.backbone}, {options.size} pixels, batch {options.batch}, float32"
    header = ("memory", "ms, forward and backward", "page faults", "temporaries, MiB")
    print(rounds.markdown(title, header, [row]))
    numbers = {"milliseconds": found, "page_faults": faults, "temporaries_mib": memory}
    rounds.write(options.json, {"machine": rounds.machine(), "what": title, **numbers})


if __name__ == "__main__":
    main()
