"""Memory and time of SGFE's attention, folded and by class, against its direct form.

    python benchmarks/attention_memory.py [--json=FILE]

Memory is XLA's own analysis of the compiled forward and backward pass at B=32, C=80, P=196, rank
1024, features and semantic vectors 2048 wide (COCO at 448 pixels with a ResNet-101); nothing of
that size is run. Time is measured at a small size, where the direct form fits. Both are of the
default backend.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from clsl_jax.models.alignment import SemanticAttention

LARGE = {"batch": 32, "classes": 80, "positions": 196, "rank": 1024, "width": 2048}
SMALL = {"batch": 4, "classes": 20, "positions": 49, "rank": 256, "width": 512}
MIB = 2**20


def direct_attention(params: dict, features: jax.Array, semantic: jax.Array) -> jax.Array:
    """a = w_t . (W_h tanh(U x * V v) + b_h) + b_t as written, with [B, P, C, rank] in memory."""
    visual = features @ params["visual"]["kernel"]
    semantic = semantic @ params["semantic"]["kernel"]
    cross = jnp.tanh(visual[:, :, None] * semantic[:, None])
    hidden = cross @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return (hidden @ params["target"]["kernel"] + params["target"]["bias"])[..., 0]


def folded_attention(params: dict, features: jax.Array, semantic: jax.Array) -> jax.Array:
    """The project's own."""
    rank = params["target"]["kernel"].shape[0]
    return SemanticAttention(rank).apply({"params": params}, features, semantic)


def shapes(sizes: dict[str, int]) -> tuple[dict, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """(params, features [B, P, D], semantic [B, C, D]) as shapes."""
    b, c, p, d = (sizes[k] for k in ("batch", "classes", "positions", "width"))
    features = jax.ShapeDtypeStruct((b, p, d), jnp.float32)
    semantic = jax.ShapeDtypeStruct((b, c, d), jnp.float32)
    model = SemanticAttention(sizes["rank"])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *zeros((features, semantic))))
    return params["params"], features, semantic


def zeros(tree: object) -> object:
    """Arrays of zeros in place of shapes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)


def compile_step(attention: Callable, arguments: tuple) -> jax.stages.Compiled:
    """Forward and backward pass, to every parameter and both inputs."""

    def loss(*arguments: object) -> jax.Array:
        # Squared, so that the gradient differs from entry to entry as in training.
        return jnp.sum(jnp.square(attention(*arguments)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()


def milliseconds(step: jax.stages.Compiled, arguments: tuple, repeats: int = 5) -> float:
    """Least of several runs, after one that is not counted."""
    jax.block_until_ready(step(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def random_arrays(tree: object) -> object:
    """Standard normal arrays in place of shapes."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def measure() -> dict:
    """Temporary memory at the large size and time at the small one, of both forms."""
    b, c, p, r = (LARGE[k] for k in ("batch", "classes", "positions", "rank"))
    result = {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "large": LARGE,
        "small": SMALL,
        "tensor_bcpr_mib": 4 * b * c * p * r / MIB,
        "forms": {},
    }
    for name, attention in (("direct", direct_attention), ("folded", folded_attention)):
        memory = compile_step(attention, shapes(LARGE)).memory_analysis()
        small = shapes(SMALL)
        result["forms"][name] = {
            "temporary_mib": memory.temp_size_in_bytes / MIB,
            "arguments_mib": memory.argument_size_in_bytes / MIB,
            "outputs_mib": memory.output_size_in_bytes / MIB,
            "small_ms": milliseconds(compile_step(attention, small), random_arrays(small)),
        }
    return result


def main() -> None:
    """Prints the table; writes the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    result = measure()
    print(
        f"SGFE attention, forward and backward, {result['backend']} ({result['device']}), float32"
    )
    print(f"large: {LARGE}; one [B, C, P, rank] tensor: {result['tensor_bcpr_mib']:,.0f} MiB")
    print(f"small: {SMALL}")
    print(f"{'form':<8}{'temporary MiB (large)':>24}{'time ms (small)':>18}")
    for name, form in result["forms"].items():
        print(f"{name:<8}{form['temporary_mib']:>24,.1f}{form['small_ms']:>18.1f}")
    forms = result["forms"]
    for unit, key in (("memory", "temporary_mib"), ("time", "small_ms")):
        print(f"{unit}: direct / folded = {forms['direct'][key] / forms['folded'][key]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
