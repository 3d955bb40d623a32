"""Memory and time of a train step by the keys that save memory, or without what makes it fast.

    PYTHONPATH=. python benchmarks/memory.py [--backbone=resnet101] [--size=448] [--batch=32]
    PYTHONPATH=. python benchmarks/memory.py --without --batch=4 --rounds=3

Nothing is allocated: "kept" is what the forward pass hands to the backward pass, counted in the
traced program, the same on every device; "temporaries" are of the whole step beside weights and
moments, by XLA's analysis of the program compiled for this device; with --h100 for that GPU, which
need not be there (what has to be installed and set: `benchmarks/gpu_traffic.py`). With --rounds,
the same steps are also run and timed, in turn. With --without, each step is the default's with one
of the package's own ways replaced by the formula as written, for XLA to make of it what it will;
names behind it choose some of these steps, beside the default's.
"""

import argparse
import contextlib
import functools
import pathlib
import sys
from unittest import mock

import flax.linen as nn
import gpu_traffic
import jax
import jax.numpy as jnp
import new_state
import rounds

from clsl_jax import optim, steps
from clsl_jax.models import alignment, convolution, norm, resnet
from clsl_jax.models.clsl import CLSL
from clsl_jax.step_options import StepOptions

MIB = 2**20
KEYS = {
    "float32": {},
    "`model.remat=blocks`": {"remat": True},
    "`optim.accumulate=4`": {"accumulate": 4},
    "both": {"remat": True, "accumulate": 4},
    "`model.dtype=bfloat16`": {"dtype": "bfloat16"},
    "all three": {"remat": True, "accumulate": 4, "dtype": "bfloat16"},
}


def written_norm(x, scale, bias, shift, epsilon, dtype):
    """`norm.normalize_batch`, differentiated by JAX."""
    mean, var = norm.two_passes(x, shift)
    return norm._normalised(x, mean, var, scale, bias, epsilon).astype(dtype), mean, var


def written_attention(visual, semantic, direction, attention_kernel=False):
    """`alignment.bilinear_attention` with all of its tanh at once."""
    cross = jnp.tanh(visual[:, :, None] * semantic[:, None])
    return jnp.matmul(cross, direction, preferred_element_type=jnp.float32)


REPLACED = {
    "convolutions by XLA": [(resnet, "conv_general_dilated", jax.lax.conv_general_dilated)],
    "no products of Winograd's": [(convolution, "WINOGRAD", sys.maxsize)],
    "batch norms as written": [(norm, "normalize_batch", written_norm)],
    "sums of residual blocks as written": [
        (resnet, name, lambda x, y: nn.relu(x + y)) for name in ("kept_sum", "rectified_sum")
    ],
    "SGFE's tanh of all classes at once": [(alignment, "bilinear_attention", written_attention)],
}
WITHOUT = {
    "as it is": {},
    **{name: {"replaced": attributes} for name, attributes in REPLACED.items()},
    "all of these": {"replaced": [one for each in REPLACED.values() for one in each]},
}


def prepare(options: argparse.Namespace, *, replaced=(), **settings):
    """`built` with attributes of modules replaced: (module, name, by what)."""
    with contextlib.ExitStack() as stack:
        for attribute in replaced:
            stack.enter_context(mock.patch.object(*attribute))
        return built(options, **settings)


def built(options: argparse.Namespace, *, remat=False, accumulate=1, dtype="float32"):
    """The compiled step, MiB kept for the backward pass, and what makes its state and batch."""
    drawn = new_state.inputs(options.batch, options.size, options.classes)
    model = CLSL(
        num_classes=options.classes,
        backbone=options.backbone,
        rank=1024,
        remat=remat,
        dtype=jnp.dtype(dtype),
    )
    optimizer = optim.adamw_cycled(1e-5)
    init = jax.jit(new_state.initializer(model, optimizer))
    arguments = drawn["embeddings"], drawn["annotations"]
    batch = {"image": drawn["images"], "row": drawn["rows"]}
    settings = StepOptions(steps_per_epoch=100, teacher="student", accumulate=accumulate)
    step = jax.jit(steps.make_train_step(model, optimizer, settings), donate_argnums=0)
    shapes = jax.eval_shape(init, *arguments)
    where = gpu_traffic.one_h100() if options.h100 else None
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (shapes, batch)
    )
    compiled = step.lower(*placed).compile()
    embeddings = jax.ShapeDtypeStruct(drawn["embeddings"].shape, jnp.float32)
    rows = options.batch // accumulate
    images = jax.ShapeDtypeStruct((rows, *drawn["images"].shape[1:]), jnp.float32)

    def logits(params, images, embeddings):
        stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.batch_stats)
        variables = {"params": params, "batch_stats": stats}
        rngs = {"dropout": jax.random.key(0)}
        outputs, _ = model.apply(
            variables, images, embeddings, None, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return outputs[0], outputs[1]["global_logits"]

    residuals = jax.tree.leaves(
        jax.eval_shape(
            lambda params, *given: jax.vjp(lambda p: logits(p, *given), params)[1],
            shapes.params["model"],
            images,
            embeddings,
        )
    )
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in residuals) / MIB
    return compiled, kept, lambda: (init(*arguments), jax.device_put(batch))


def main() -> None:
    """Parses the command line, compiles, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument(
        "--without",
        nargs="*",
        choices=list(WITHOUT)[1:],
        help="steps without what makes it fast: those named here, or every one",
    )
    parser.add_argument("--h100", action="store_true", help="compile for that GPU")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.h100 and options.rounds:
        parser.error("--h100 compiles alone: leave --rounds out.")
    memory, ways = {}, {}
    for name, settings in _chosen(options.without).items():
        compiled, kept, start = prepare(options, **settings)
        memory[name] = (kept, compiled.memory_analysis().temp_size_in_bytes / MIB)
        print(f"{name}: {memory[name][0]:,.0f}, {memory[name][1]:,.0f} MiB", file=sys.stderr)
        if options.rounds:
            ways[name] = functools.partial(_run, compiled, *start())
    times = rounds.alternate(ways, options.rounds) if options.rounds else {}
    rows = [
        (
            name,
            *(f"{size:,.0f}" for size in sizes),
            *((rounds.milliseconds(times[name], 0),) if times else ()),
            *((f"{1e3 * options.batch / times[name]['median']:.2f}",) if times else ()),
        )
        for name, sizes in memory.items()
    ]
    title = (
        f"{options.backbone}, {options.size} px, batch {options.batch}, {options.classes} classes"
    )
    header = (
        "step",
        "kept, MiB",
        "temporaries, MiB",
        *(("ms a step", "images/s") if times else ()),
    )
    print(rounds.markdown(title, header, rows))
    rounds.write(options.json, {"machine": rounds.machine(), "mib": memory, "times": times})


def _chosen(without: list[str] | None) -> dict[str, dict]:
    """Settings of the steps, by name."""
    if without is None:
        return KEYS
    names = ["as it is", *without] if without else list(WITHOUT)
    return {name: WITHOUT[name] for name in names}


def _run(compiled, state, batch) -> None:
    """One step from the same state; it is copied, since the step takes it over."""
    jax.block_until_ready(compiled(jax.tree.map(jnp.copy, state), batch))


if __name__ == "__main__":
    main()
