"""What a train step moves through a GPU's memory, by XLA's program for one that need not be there.

    pip install jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION      (as `jax` is)
    JAX_PLATFORMS=cuda,cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=. \\
        XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0" \\
        python benchmarks/gpu_traffic.py [--classes=20] [--batch=64] [--dtype=bfloat16] [--top=0] \\
            [--json=FILE]

Compiles the step of `benchmarks/step.py` ahead of time for an H100 and sums, over the kernels of
the optimised program, what each reads and writes; a loop's as often as it turns, and of an array
that it goes through a turn's part. Without a device XLA times nothing and takes the first way of
each convolution and product that it has, which does not change what goes through memory; their
workspaces are left out. No step of that program is faster than its time at --bandwidth.
"""

import argparse
import pathlib
import re

import hlo
import jax
import jax.numpy as jnp
import new_state
import rounds
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from clsl_jax import optim, steps
from clsl_jax.models.clsl import CLSL
from clsl_jax.step_options import StepOptions

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 13 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NO_TRAFFIC = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "async-done")
KINDS = (
    ("convolutions", r"__cudnn\$conv"),
    ("matrix products", r"__cublas|__triton_gemm"),
    ("sums and what is fused with them", r"reduce"),
    ("element by element", r"."),
)


def one_h100() -> NamedSharding:
    """Where arrays lie that a program for one H100 takes, which need not be there to compile it."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return NamedSharding(topologies.make_mesh(topology, (1,), ("all",)), PartitionSpec())


def program(options: argparse.Namespace) -> str:
    """The optimised program of the step, as text."""
    everywhere = one_h100()
    model = CLSL(
        num_classes=options.classes, backbone=options.backbone, dtype=jnp.dtype(options.dtype)
    )
    optimizer = optim.adamw_cycled(1e-5)

    def shape(*size: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=everywhere)

    c, side = options.classes, options.image_size
    init = new_state.initializer(model, optimizer)
    state = jax.eval_shape(init, shape(c, 768, dtype="float32"), shape(1024, c, dtype="int8"))
    state = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), state)
    batch = {
        "image": shape(options.batch, side, side, 3, dtype="uint8"),
        "row": shape(options.batch, dtype="int32"),
    }
    step = steps.make_train_step(
        model, optimizer, StepOptions(steps_per_epoch=100, teacher="student")
    )
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()


def kernels(text: str) -> list[tuple[float, str, str]]:
    """(bytes, kind, what it is) of every kernel of a program."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line.strip())

    def walk(name: str, times: int, turns: int = 1) -> list[tuple[float, str, str]]:
        def size(types: str) -> float:
            """Bytes of arrays, without workspaces; a turn's part where a loop goes through one."""
            arrays = re.findall(r"\w+\[[\d,]*\]", re.sub(r", [su]8\[\d+\]", "", types))
            return sum(
                hlo.size_of(array) / (turns if f"[{turns}," in array else 1) for array in arrays
            )

        found, types = [], {}
        for line in bodies[name]:
            parts = re.match(r"(?:ROOT )?%([\w.\-]+) = (.+?) ([\w\-]+)\((.*)", line)
            if not parts:
                continue
            result, types[parts[1]], operation, rest = parts.groups()
            if operation == "while":
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.\-]+)", line)
                n = int(count[1]) if count else 1
                found += walk(body[1], times * n, n)
            elif operation in ("call", "conditional", "async-start"):
                for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                    found += walk(called, times, turns)
            elif operation not in NO_TRAFFIC:
                # What runs beside other kernels reads where it starts and writes where it is done.
                read = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                arrays = [types.get(name, "") for name in read]
                if operation.endswith("-done"):
                    arrays = [types[result]]
                elif not operation.endswith("-start"):
                    arrays.append(types[result])
                moved = sum(map(size, arrays))
                target = re.search(r'custom_call_target="([^"]+)"', line)
                about = target[1] if target else result
                kind = next(kind for kind, pattern in KINDS if re.search(pattern, about))
                source = re.search(r'op_name="([^"]*)"', line)
                found.append((times * moved, kind, f"{result} ({source[1] if source else ''})"))
        return found

    return walk(entry, 1)


def main() -> None:
    """Compiles, sums, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s")
    parser.add_argument("--top", type=int, default=0, help="also print so many kernels")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    options = parser.parse_args()
    found = kernels(program(options))
    sums = {kind: 0.0 for kind, _ in KINDS}
    for moved, kind, _ in found:
        sums[kind] += moved
    lines = [*sums.items(), ("all", sum(sums.values()))]
    rows = [
        (kind, f"{moved / 1e9:.1f}", f"{moved / options.bandwidth / 1e9:.1f}")
        for kind, moved in lines
    ]
    title = f"{options.backbone}, {options.image_size} pixels, batch {options.batch}, "
    title += f"{options.classes} classes, {options.dtype}"
    print(rounds.markdown(title, ("kernels", "GB", f"ms at {options.bandwidth} TB/s"), rows))
    for moved, _, what in sorted(found, reverse=True)[: options.top]:
        print(f"{moved / 1e9:8.3f} GB  {what}")
    rounds.write(options.json, {"what": title, "bytes": sums, "kernels": found})


if __name__ == "__main__":
    main()
