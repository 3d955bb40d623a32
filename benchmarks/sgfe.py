"""Time and memory of SGFE's attention, forward and backward: its direct form against ours.

    python benchmarks/sgfe.py [--json=FILE] [--quick]
    python benchmarks/sgfe.py --full      (on an accelerator: the large size is run as well)

The direct form applies both linear layers behind the tanh in turn, as the equation reads, and has
[B, P, C, rank] in memory; 'folded' makes one vector of them first but keeps that tensor; ours
never forms it. Memory is XLA's own analysis of the compiled forward and backward pass at B=32,
P=196, rank 1024 and features 2048 wide (448 pixels, ResNet-101); nothing of that size is run
without --full. Time is taken where the direct form fits, the ways taking turns.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rounds

from clsl_jax.models.alignment import SemanticAttention

LARGE = {"batch": 32, "positions": 196, "rank": 1024, "width": 2048}
SMALL = {"batch": 1, "positions": 196, "rank": 256, "width": 512}
QUICK = {"batch": 1, "positions": 49, "rank": 64, "width": 128}
MIB = 2**20
Attention = Callable[[Any, jax.Array, jax.Array], jax.Array]


def _cross(params: Any, features: jax.Array, semantic: jax.Array) -> jax.Array:
    dtype = features.dtype
    visual = features @ params["visual"]["kernel"].astype(dtype)
    semantic = semantic @ params["semantic"]["kernel"].astype(dtype)
    return jnp.tanh(visual[:, :, None] * semantic[:, None])


def direct_attention(params: Any, features: jax.Array, semantic: jax.Array) -> jax.Array:
    """a = w_t . (W_h tanh(U x * V v) + b_h) + b_t as written."""
    hidden, target = (
        jax.tree.map(lambda p: p.astype(features.dtype), params[name])
        for name in ("hidden", "target")
    )
    values = _cross(params, features, semantic) @ hidden["kernel"] + hidden["bias"]
    return (values @ target["kernel"] + target["bias"])[..., 0].astype(jnp.float32)


def folded_attention(params: Any, features: jax.Array, semantic: jax.Array) -> jax.Array:
    """a = tanh(U x * V v) . (W_h^T w_t) + w_t . b_h + b_t, differentiated by JAX."""
    hidden, target = params["hidden"], params["target"]
    direction = (hidden["kernel"] @ target["kernel"]).astype(features.dtype)
    constant = hidden["bias"] @ target["kernel"] + target["bias"]
    return (_cross(params, features, semantic) @ direction)[..., 0].astype(jnp.float32) + constant


def our_attention(params: Any, features: jax.Array, semantic: jax.Array) -> jax.Array:
    """The project's own."""
    model = SemanticAttention(params["target"]["kernel"].shape[0], features.dtype)
    return model.apply({"params": params}, features, semantic)


FORMS: dict[str, Attention] = {
    "direct": direct_attention,
    "folded": folded_attention,
    "ours": our_attention,
}


def shapes(sizes: Mapping[str, int], classes: int, dtype: str) -> tuple[Any, Any, Any]:
    """(params, features [B, P, D], semantic [B, C, D]) as shapes; parameters are float32."""
    b, p, d = (sizes[k] for k in ("batch", "positions", "width"))
    features = jax.ShapeDtypeStruct((b, p, d), jnp.dtype(dtype))
    semantic = jax.ShapeDtypeStruct((b, classes, d), jnp.dtype(dtype))
    model = SemanticAttention(sizes["rank"])
    variables = jax.eval_shape(model.init, jax.random.key(0), features, semantic)
    return variables["params"], features, semantic


def random_arrays(tree: Any) -> Any:
    """Normal arrays in place of shapes, small enough for tanh to keep a slope."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        (0.1 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def compile_step(attention: Attention, arguments: tuple) -> jax.stages.Compiled:
    """Forward and backward pass, to every parameter and both inputs."""

    def loss(*arguments: Any) -> jax.Array:
        # Squared, so that the gradient differs from entry to entry as in training.
        return jnp.sum(jnp.square(attention(*arguments)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()


def memory(sizes: Mapping[str, int], classes: int, dtype: str) -> dict[str, float]:
    """MiB of temporaries of every form."""
    arguments = shapes(sizes, classes, dtype)
    return {
        name: compile_step(form, arguments).memory_analysis().temp_size_in_bytes / MIB
        for name, form in FORMS.items()
    }


def times(
    sizes: Mapping[str, int], classes: int, dtype: str, count: int, limit_mib: float
) -> dict[str, dict[str, float] | None]:
    """Milliseconds of every form; None for one that needs more temporaries than the limit."""
    found: dict[str, Any] = dict.fromkeys(FORMS)
    arguments = random_arrays(shapes(sizes, classes, dtype))
    calls = {}
    for name, form in FORMS.items():
        step = compile_step(form, arguments)
        if step.memory_analysis().temp_size_in_bytes / MIB <= limit_mib:
            calls[name] = lambda step=step: jax.block_until_ready(step(*arguments))
    return {**found, **rounds.alternate(calls, count)}


def memory_limit() -> float:
    """MiB that a form may take to be run: nine tenths of an accelerator's memory, 4 GiB here."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return 0.9 * limit / MIB if limit else 4096.0


def show(title: str, found: list[dict]) -> None:
    """Prints a table."""
    kinds = [kind for kind in ("temporaries_mib", "milliseconds") if kind in found[0]]
    header = ["classes"]
    for kind in kinds:
        unit = "temporaries, MiB" if kind == "temporaries_mib" else "ms"
        header += [f"{form}: {unit}" for form in FORMS] + ["direct / ours"]
    lines = []
    for row in found:
        line = [f"{row['classes']}, {row['dtype']}"]
        if "temporaries_mib" in kinds:
            sizes = row["temporaries_mib"]
            line += [f"{sizes[form]:,.0f}" for form in FORMS]
            line.append(f"{sizes['direct'] / sizes['ours']:.0f}")
        if "milliseconds" in kinds:
            spent = row["milliseconds"]
            line += [
                rounds.milliseconds(spent[form]) if spent[form] else "too large" for form in FORMS
            ]
            both = spent["direct"] and spent["ours"]
            line.append(
                f"{spent['direct']['median'] / spent['ours']['median']:.1f}" if both else ""
            )
        lines.append(line)
    print(rounds.markdown(title, header, lines), flush=True)


def main() -> None:
    """Measures, prints tables and perhaps writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 20 and 80 classes")
    parser.add_argument("--full", action="store_true", help="run the large size as well")
    parser.add_argument("--classes", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    small = QUICK if options.quick else SMALL
    classes = options.classes or ([20, 80] if options.quick else [20, 80, 200, 500])
    cases = [(c, dtype) for dtype in options.dtype for c in classes]
    device = rounds.machine()["device"]
    large_rows, small_rows = [], []
    for c, dtype in cases:
        row: dict[str, Any] = {"classes": c, "dtype": dtype}
        row["temporaries_mib"] = memory(LARGE, c, dtype)
        if options.full:
            row["milliseconds"] = times(LARGE, c, dtype, options.rounds, memory_limit())
        large_rows.append(row)
    show(f"SGFE's attention, forward and backward, {LARGE}, {device}", large_rows)
    for c, dtype in cases:
        spent = times(small, c, dtype, options.rounds, memory_limit())
        small_rows.append({"classes": c, "dtype": dtype, "milliseconds": spent})
    show(f"The same at {small}, {device}", small_rows)
    results = {"machine": rounds.machine(), "large": LARGE, "small": small}
    rounds.write(options.json, {**results, "large_rows": large_rows, "small_rows": small_rows})


if __name__ == "__main__":
    main()
