"""What the train step and recovery need on many devices: bytes a device, collectives a step.

    PYTHONPATH=. python benchmarks/scaling.py [--json=FILE] [--quick]
    PYTHONPATH=. python benchmarks/scaling.py --tpu v5e:2x4 v5e:8x8      (after: pip install libtpu)

Nothing is run: the whole step (ResNet-101 at 448 pixels, 32 images a device, recovery by an EMA
teacher) is compiled ahead of time for so many simulated CPU devices; the program is read. Memory
is XLA's own analysis, of its CPU backend: arguments (the state and a batch) are the same on any
backend, temporaries are not. Collectives are those of the partitioned program; GPU and TPU backends
combine neighbouring ones, the bytes are the same. Bytes are those of a collective's result on one
device. With --tpu the programs are those that libtpu, which needs no TPU for it, compiles for
slices of these topologies, and so are all figures.
"""

import argparse
import os
import pathlib
import time

import hlo

SETTINGS = (
    # name, images, classes
    ("COCO", 82_081, 80),
    ("OpenImages", 9_011_219, 600),
)
LAYOUTS = ((8, 1), (64, 1), (256, 1), (256, 8))  # devices, those along `model`
QUICK = (("small", 2_000, 24),), ((8, 1), (8, 2))
HEADER = (
    "set",
    "images x classes",
    "devices (data x model)",
    "matrices",
    "state and batch",
    "temporaries",
    "collectives a step",
    "of a step",
    "of a recovery",
)
GIB, MIB = 2**30, 2**20


def measure(
    images: int, classes: int, devices: list, along_model: int, options: argparse.Namespace
) -> dict:
    """One row: the compiled train step and recovery on a mesh of these devices."""
    import jax
    import jax.numpy as jnp
    import new_state

    from clsl_jax import epoch_end, optim, sharding, steps, train_state
    from clsl_jax.models.clsl import CLSL
    from clsl_jax.step_options import StepOptions

    mesh = sharding.make_mesh(devices, model=along_model)
    model = CLSL(
        num_classes=classes, backbone=options.backbone, dtype=jnp.dtype(options.dtype), rank=1024
    )
    schedule = optim.one_cycle(1e-4, 1000)
    optimizer = optim.adamw_cycled(schedule.learning_rate, schedule.beta1)
    step_options = StepOptions(steps_per_epoch=100, thresholds="adaptive", soft=False)
    size = options.image_size

    rows = sharding.padded_rows(images)
    state = jax.eval_shape(
        new_state.initializer(model, optimizer),
        jax.ShapeDtypeStruct((classes, 300), jnp.float32),
        jax.ShapeDtypeStruct((rows, classes), jnp.int8),
    )
    shardings = train_state.state_shardings(state, mesh)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    batch_size = options.batch * len(devices)
    examples = sharding.by_example(mesh)
    image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=examples)
    row = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=examples)
    batch = {"image": image, "clean": image, "row": row}
    found = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "model": along_model,
        "images": images,
        "classes": classes,
    }
    for name, function, arguments in (
        (
            "train_step",
            steps.make_train_step(model, optimizer, step_options, mesh=mesh),
            (state, batch),
        ),
        ("recover", epoch_end.make_recover(step_options, mesh=mesh), (state,)),
    ):
        start = time.perf_counter()
        jitted = jax.jit(function, out_shardings=shardings, donate_argnums=0)
        compiled = jitted.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        found[name] = {
            "seconds_to_compile": time.perf_counter() - start,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "collectives": hlo.collectives(compiled.as_text()),
        }
    matrices = [getattr(state, name) for name in (*train_state.MATRICES, "visits", "faults")]
    found["matrices"] = sum(
        x.sharding.shard_shape(x.shape)[0]
        * (x.sharding.shard_shape(x.shape)[1] if x.ndim > 1 else 1)
        * x.dtype.itemsize
        for x in matrices
    )
    return found


def cells(row: dict) -> tuple[str, ...]:
    """A row as text, under `HEADER`."""
    step, recover = row["train_step"]["collectives"], row["recover"]["collectives"]

    def total(kinds: dict) -> str:
        return f"{sum(size for _, size in kinds.values()) / MIB:,.1f} MiB"

    device = "" if row["device"] == "cpu" else f" {row['device']}"
    return (
        row["name"],
        f"{row['images']:,} x {row['classes']}",
        f"{row['devices']}{device} ({row['devices'] // row['model']} x {row['model']})",
        f"{row['matrices'] / MIB:,.1f} MiB",
        f"{row['train_step']['arguments'] / GIB:.2f} GiB",
        f"{row['train_step']['temporaries'] / GIB:.2f} GiB",
        ", ".join(f"{count} {kind}" for kind, (count, _) in sorted(step.items())),
        total(step),
        total(recover),
    )


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=32, help="images a device")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--sets", nargs="+", choices=[name for name, _, _ in SETTINGS])
    parser.add_argument(
        "--tpu",
        nargs="+",
        metavar="TOPOLOGY",
        help="slices, as v5e:2x4, to compile for in place of simulated devices",
    )
    parser.add_argument("--quick", action="store_true", help="a small network, 8 simulated devices")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    options = parser.parse_args()
    settings, layouts = QUICK if options.quick else (SETTINGS, LAYOUTS)
    if options.sets:
        settings = [setting for setting in settings if setting[0] in options.sets]
    if options.quick:
        options.backbone, options.image_size, options.batch = "resnet18", 64, 4
    # Before JAX starts.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.tpu:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no host of a TPU to ask
    else:  # what LLVM makes of it does not matter here
        os.environ["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={max(d for d, _ in layouts)} "
            "--xla_backend_optimization_level=0"
        )
    import jax
    import rounds
    from jax.experimental import topologies

    if options.tpu:
        slices = [(topologies.get_topology_desc(name, "tpu").devices, 1) for name in options.tpu]
    else:
        slices = [(jax.devices()[:number], along_model) for number, along_model in layouts]
    rows = []
    for name, images, classes in settings:
        for devices, along_model in slices:
            row = {"name": name, **measure(images, classes, devices, along_model, options)}
            rows.append(row)
            print(*cells(row), sep=" | ", flush=True)
    print()
    print(rounds.table(HEADER, [cells(row) for row in rows]))
    given = {k: v for k, v in vars(options).items() if k != "json"}
    rounds.write(options.json, {"settings": given, "rows": rows})


if __name__ == "__main__":
    main()
