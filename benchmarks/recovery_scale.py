"""How label recovery grows with images, classes and devices: time, memory and collectives.

    python benchmarks/recovery_scale.py [--json=FILE] [--quick] [--rules RULE ...]

Measured: what one of D devices does, for real on the default device: it keeps N / D rows, and of
the 32 D rows of a step, which it is given all of, scatters those that are its own; which of them
are there twice is looked for by all devices together, and not timed. Sizes above --limit_gb are
left out. Compiled ahead of time from shapes alone: the functions over N x C sharded by row over D
simulated devices, of which XLA's analysis gives arguments and temporaries of one device, and the
compiled program the collectives and how many bytes each device puts into them. Nothing of N x C is
ever allocated for that.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import rounds
from jax.sharding import Mesh, PartitionSpec

from clsl_jax import recovery, sharding

SIMULATED = 256
MIB = 2**20
IMAGES = (5_011, 82_081, 1_000_000, 9_000_000)
CLASSES = (20, 80, 600)
DEVICES = (1, 8, 64, 256)
QUICK_IMAGES, QUICK_CLASSES, QUICK_DEVICES = (5_011, 82_081), (20, 80), (1, 8)
BATCH_A_DEVICE = 32


scatter = functools.partial(recovery.scatter_scores, momentum=0.8)
PRECISION = {"positive_precision": 0.9, "negative_precision": 0.985, "min_count": 5}
COVERAGE = {"positive_coverage": 0.5, "negative_coverage": 0.9}
RULES = {  # how thresholds are found: `recovery.thresholds` and `recovery.calibration`
    "adaptive": functools.partial(recovery.adaptive_thresholds, **PRECISION),
    "expected": functools.partial(recovery.expected_thresholds, **PRECISION),
    "matched": functools.partial(recovery.matched_thresholds, **COVERAGE),
}


def recover(scores: Any, visits: Any, annotations: Any, positive: Any, negative: Any) -> Any:
    """Labels and weights of the whole matrix."""
    return recovery.recover_labels(
        scores,
        visits,
        annotations,
        positive_threshold=positive,
        negative_threshold=negative,
        confidence_power=1.0,
    )


def programs(
    n: int, c: int, batch: int, shape: Callable[..., Any], mesh: Mesh, rules: Sequence[str]
) -> dict[str, tuple]:
    """Each function with its arguments and those it may overwrite.

    Args:
      n: rows.
      c: classes.
      batch: rows that a step scatters.
      shape: makes an argument of (shape, type, whether it is sharded by row).
      mesh: over whose devices histograms of known labels are summed, as in a run.
      rules: of `RULES`.
    """

    def together(rule: str) -> Callable[..., Any]:
        return jax.shard_map(
            functools.partial(RULES[rule], axis_name="data"),
            mesh=mesh,
            in_specs=sharding.by_row(mesh).spec,
            out_specs=PartitionSpec(),
        )

    scores, annotations = shape((n, c), jnp.float32, True), shape((n, c), jnp.int8, True)
    visits, rows = shape((n,), jnp.int32, True), shape((batch,), jnp.int32, True)
    new = shape((batch, c), jnp.float32, True)
    limits = (shape((c,), jnp.float32, False),) * 2
    return {
        "scatter": (scatter, (scores, visits, rows, new), (0, 1)),
        **{rule: (together(rule), (scores, annotations, visits), ()) for rule in rules},
        "recover": (recover, (scores, visits, annotations, *limits), ()),
    }


def rows_of_device(n: int, devices: int) -> int:
    """Rows of the padded matrix that one device keeps."""
    return sharding.padded_rows(n) // devices


def measured(n: int, c: int, devices: int, count: int, rules: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of one device's part."""
    rows = rows_of_device(n, devices)
    key = jax.random.key(0)
    scores = jax.random.uniform(key, (rows, c))
    annotations = jnp.where(
        jax.random.uniform(jax.random.key(1), (rows, c)) < 0.7, -1, scores > 0.8
    ).astype(jnp.int8)
    visits = jnp.ones(rows, jnp.int32)
    batch = min(BATCH_A_DEVICE, rows) * devices
    # The rows of this device are 0 ... rows - 1; the others' are dropped.
    picked = jax.random.permutation(key, rows * devices)[:batch].astype(jnp.int32)
    new = jax.random.uniform(key, (batch, c))
    scattering = jax.jit(functools.partial(scatter, distinct=True), donate_argnums=(0, 1))
    state = [jnp.copy(scores), jnp.copy(visits)]

    def scatter_once() -> None:
        state[:] = jax.block_until_ready(scattering(*state, picked, new))

    label = jax.jit(recover)
    finds = {rule: jax.jit(RULES[rule]) for rule in rules}
    positive, negative = finds[rules[0]](scores, annotations, visits)

    def finding(find: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(find(scores, annotations, visits))

    calls = {
        "scatter": scatter_once,
        **{rule: finding(find) for rule, find in finds.items()},
        "recover": lambda: jax.block_until_ready(
            label(scores, visits, annotations, positive, negative)
        ),
    }
    return rounds.alternate(calls, count)


def needed_bytes(n: int, c: int, devices: int) -> int:
    """What `measured` holds at once: three float matrices more than the state's two, and int8."""
    return rows_of_device(n, devices) * (21 * c + 8)


def compiled(n: int, c: int, devices: int, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Memory of one device and its collectives, of each function over the whole matrices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    by_row, alike = sharding.by_row(mesh), sharding.replicated(mesh)

    def shape(size: Sequence[int], dtype: Any, sharded: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=by_row if sharded else alike)

    found = {}
    batch = BATCH_A_DEVICE * devices
    parts = programs(sharding.padded_rows(n), c, batch, shape, mesh, rules)
    for name, (function, arguments, donated) in parts.items():
        out = alike if name in RULES else by_row
        lowered = jax.jit(function, out_shardings=out, donate_argnums=donated).lower(*arguments)
        program = lowered.compile()
        memory = program.memory_analysis()
        found[name] = {
            "arguments_mib": memory.argument_size_in_bytes / MIB,
            "temporaries_mib": memory.temp_size_in_bytes / MIB,
            "outputs_mib": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / MIB,
            "collectives": {
                kind: {"count": count, "mib": size / MIB}
                for kind, (count, size) in hlo.collectives(program.as_text()).items()
            },
        }
    return found


def show_measured(found: list[dict], rules: Sequence[str]) -> None:
    """Prints the table of times."""
    lines = [
        [
            f"{r['images']:,} x {r['classes']}, {r['devices']}",
            f"{r['rows']:,}",
            *(rounds.milliseconds(r["milliseconds"][k], 2) for k in r["milliseconds"]),
        ]
        for r in found
    ]
    header = ["images x classes, devices", "rows of one", "scatter ms (a step)"]
    header += [f"thresholds, {rule}, ms (an epoch)" for rule in rules]
    header += ["recover ms (an epoch)"]
    print(rounds.markdown("Label recovery: what one of D devices does", header, lines), flush=True)


def show_compiled(found: list[dict], rules: Sequence[str]) -> None:
    """Prints the table of memory and collectives."""
    lines = []
    for r in found:
        line = [f"{r['images']:,} x {r['classes']}, {r['devices']}"]
        for part in r["functions"].values():
            sent = [
                f"{entry['count']:.0f} {kind} ({entry['mib']:.2g} MiB)"
                for kind, entry in part["collectives"].items()
            ]
            line.append(
                f"{part['arguments_mib']:,.1f} + {part['temporaries_mib']:,.1f} + "
                f"{part['outputs_mib']:,.1f}"
            )
            line.append(", ".join(sent) or "none")
        lines.append(line)
    header = ["images x classes, devices"]
    for name in ("scatter", *(f"thresholds, {rule}" for rule in rules), "recover"):
        header += [f"{name}: MiB of arguments + temporaries + results", "collectives"]
    title = "Label recovery over simulated devices: memory of one, and collectives"
    print(rounds.markdown(title, header, lines), flush=True)


def simulate(
    cases: Sequence[tuple[int, int, int]], rules: Sequence[str], path: pathlib.Path
) -> None:
    """Compiles every case over simulated devices of the CPU and writes what was found."""
    found = []
    for n, c, d in cases:
        functions = compiled(n, c, d, rules)
        found.append({"images": n, "classes": c, "devices": d, "functions": functions})
    rounds.write(path, {"rows": found})


def simulated(arguments: Sequence[str]) -> list[dict]:
    """Runs this program again as one of `SIMULATED` devices: times are of a whole CPU."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "found.json"
        devices = f"--xla_force_host_platform_device_count={SIMULATED}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, f"--simulate={path}", *arguments]
        subprocess.run(command, check=True, env=environment)
        return json.loads(path.read_text())["rows"]


def main() -> None:
    """Measures, prints tables and perhaps writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="two numbers of images, 1 and 8")
    parser.add_argument("--timed_only", action="store_true", help="simulate no devices")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["adaptive"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit_gb", type=float, default=4.0, help="largest part that is run")
    parser.add_argument("--simulate", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    images, classes, devices = options.images, options.classes, options.devices
    if options.quick:
        images, classes, devices = QUICK_IMAGES, QUICK_CLASSES, QUICK_DEVICES
    cases = [(n, c, d) for n in images for c in classes for d in devices]
    if options.simulate:
        simulate(cases, options.rules, options.simulate)
        return
    timed = []
    for n, c, d in cases:
        row = {"images": n, "classes": c, "devices": d, "rows": rows_of_device(n, d)}
        if needed_bytes(n, c, d) <= options.limit_gb * 2**30:
            times = measured(n, c, d, options.rounds, options.rules)
            timed.append({**row, "milliseconds": times})
    show_measured(timed, options.rules)
    analysed = []
    if not options.timed_only:
        analysed = simulated(sys.argv[1:])
        show_compiled(analysed, options.rules)
    results = {"machine": rounds.machine(), "batch_of_a_device": BATCH_A_DEVICE}
    rounds.write(options.json, {**results, "measured": timed, "compiled": analysed})


if __name__ == "__main__":
    main()
