"""The whole training step against PyTorch's: images a second, memory, use of the device.

    python benchmarks/step.py [--json=FILE] [--quick]
    python benchmarks/step.py --apart      (each way in a process of its own, still in turn)
    python benchmarks/step.py --classes 20 80 500 --dtype float32 bfloat16 --batch 32 \\
        --peak_tflops 989      (on an accelerator; --batch sweep: doubled until memory ends)

A step is forward and backward pass, asymmetric loss of both branches at the balanced scale, AdamW,
moving average of all weights and statistics, and scores scattered into their rows. PyTorch's is in
`benchmarks/torch_step.py`; bfloat16 is its autocast. The ways take turns, except in a sweep, where
each has the device to itself. FLOPs are PyTorch's count of the products of its network and stand
for every way, so that what one saves by a better form shows as a higher utilisation.
"""

import argparse
import contextlib
import functools
import gc
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share a device

import jax
import jax.numpy as jnp
import new_state
import numpy as np
import rounds
import torch
import torch_step
import traces

from clsl_jax import config, optim, steps
from clsl_jax.models.clsl import CLSL
from clsl_jax.step_options import StepOptions

MIB = 2**20
OURS = "ours (JAX)"
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class OurStep:
    """The project's train step, compiled; call it with nothing."""

    def __init__(self, options: argparse.Namespace, dtype: str, drawn: dict[str, np.ndarray]):
        model = CLSL(
            num_classes=len(drawn["embeddings"]),
            backbone=options.backbone,
            rank=options.rank,
            attention_kernel=options.attention_kernel,
            dtype=jnp.dtype(dtype),
        )
        optimizer = optim.adamw_cycled(1e-5)

        new = new_state.initializer(model, optimizer)

        def init(embeddings: jax.Array, annotations: jax.Array) -> Any:
            shape = annotations.shape
            return new(embeddings, annotations).replace(
                recovered=jnp.full(shape, 0.25), recovered_weight=jnp.full(shape, 0.5)
            )

        self.state = jax.jit(init)(drawn["embeddings"], drawn["annotations"])
        self.batch = {"image": jnp.asarray(drawn["images"]), "row": jnp.asarray(drawn["rows"])}
        teacher = "ema" if options.ema_teacher else "student"
        step = steps.make_train_step(
            model, optimizer, StepOptions(steps_per_epoch=100, teacher=teacher)
        )
        start = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))

    def __call__(self) -> None:
        """Begins one step."""
        self.state = self.compiled(self.state, self.batch)

    def block(self) -> None:
        """Waits until the device is done."""
        jax.block_until_ready(self.state)

    def memory_mib(self) -> float:
        """Arguments, temporaries and results that reuse no argument, by XLA's analysis."""
        found = self.compiled.memory_analysis()
        size = found.argument_size_in_bytes + found.temp_size_in_bytes
        return (size + found.output_size_in_bytes - found.alias_size_in_bytes) / MIB


def make_torch(
    options: argparse.Namespace, dtype: str, drawn: dict[str, np.ndarray], form: str, mode: str
) -> torch_step.TorchStep:
    """PyTorch's step in one of its modes."""
    device = rounds.torch_device()
    return torch_step.TorchStep(
        options.backbone,
        device=device,
        form=form,
        amp=dtype == "bfloat16",
        ema_teacher=options.ema_teacher,
        images=torch.from_numpy(drawn["images"]),
        rows=torch.from_numpy(drawn["rows"]).long(),
        embeddings=torch.from_numpy(drawn["embeddings"]),
        annotations=torch.from_numpy(drawn["annotations"]),
        rank=options.rank,
        **torch_step.WAYS[mode],
    )


def makers(
    options: argparse.Namespace, dtype: str, drawn: dict[str, np.ndarray]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of the ways and what makes each."""
    if options.only != "torch":
        yield OURS, lambda: OurStep(options, dtype, drawn)
    for mode in options.torch if options.only != "ours" else ():
        for form in options.forms:
            yield (
                f"PyTorch {mode}, {form}",
                lambda mode=mode, form=form: make_torch(options, dtype, drawn, form, mode),
            )


def prepare(make: Callable[[], Any], steps: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Makes a way and runs it once: (call of so many steps, what is known before it is timed)."""
    on_cuda = rounds.torch_device() == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make()

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        step.block()
        return time.perf_counter() - start

    first = run(1)
    if isinstance(step, OurStep):
        facts = {
            "compile_seconds": step.compile_seconds,
            "memory_mib": step.memory_mib(),
            # Of the whole process since its start: of use where this is the only JAX program.
            "peak_of_process_mib": (jax.devices()[0].memory_stats() or {}).get(
                "peak_bytes_in_use", float("nan")
            )
            / MIB,
        }
    else:
        facts = {
            # What the first step takes longer than the second.
            "compile_seconds": max(0.0, first - run(1)),
            "memory_mib": torch.cuda.max_memory_allocated() / MIB if on_cuda else None,
        }
    if on_cuda:
        torch.cuda.empty_cache()
    return functools.partial(run, steps), {"parameters": step.parameters, **facts}


def compare(options: argparse.Namespace, dtype: str, classes: int, batch: int) -> list[dict]:
    """All ways at one size, in alternating rounds."""
    drawn = new_state.inputs(batch, options.image_size, classes)
    calls, facts, begun = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, make in makers(options, dtype, drawn):
            if options.apart:
                spawn = multiprocessing.get_context("spawn")
                pool = stack.enter_context(ProcessPoolExecutor(1, spawn))
                begun[name] = pool.submit(begin, options, dtype, drawn, name)
                if rounds.torch_device() == "cpu":  # all first steps at once may exceed its memory
                    begun[name].result()
                calls[name] = lambda pool=pool: pool.submit(take_turn).result()
            else:
                calls[name], facts[name] = prepare(make, options.steps)
        facts |= {name: future.result() for name, future in begun.items()}
        times = rounds.alternate(calls, options.rounds)
        if options.trace:
            (run,) = calls.values()
            title = f"{dtype}, {classes} classes, batch {batch}"
            traces.show(lambda count: 1e3 * run() / count, options.steps, title, options.trace)
    return rows(options, dtype, classes, batch, facts, times)


_apart: list[Callable[[], Any]] = []  # in a process of `--apart`: the way that it runs


def begin(
    options: argparse.Namespace, dtype: str, drawn: dict[str, np.ndarray], name: str
) -> dict[str, Any]:
    """Makes the way of this process; returns what is known of it."""
    call, facts = prepare(dict(makers(options, dtype, drawn))[name], options.steps)
    _apart.append(call)
    return facts


def take_turn() -> None:
    """A round of the way of this process, to its end."""
    _apart[0]()


def sweep(options: argparse.Namespace, dtype: str, classes: int) -> list[dict]:
    """Every way by itself, the batch doubled until memory ends."""
    found = []
    for name in [name for name, _ in makers(options, dtype, new_state.inputs(1, 32, classes))]:
        batch = 4
        while True:
            drawn = new_state.inputs(batch, options.image_size, classes)
            make = dict(makers(options, dtype, drawn))[name]
            try:
                call, facts = prepare(make, options.steps)
                times = rounds.alternate({name: call}, options.rounds)
            except Exception as error:  # each framework has its own type, or several
                if not any(text in str(error) for text in OUT_OF_MEMORY):
                    raise
                found.append(
                    {"way": name, "dtype": dtype, "classes": classes, "batch": batch, "fits": False}
                )
                call = make = None
                release()
                break
            found += rows(options, dtype, classes, batch, {name: facts}, times)
            call = make = None
            release()
            batch *= 2
            if batch > new_state.ROWS:
                break
    return found


def release() -> None:
    """Gives memory of what is no longer used back to the device."""
    gc.collect()
    jax.clear_caches()
    if rounds.torch_device() == "cuda":
        torch.cuda.empty_cache()


def rows(
    options: argparse.Namespace,
    dtype: str,
    classes: int,
    batch: int,
    facts: dict[str, dict],
    times: dict[str, dict],
) -> list[dict]:
    """What was found, a row a way."""
    flops = torch_step.model_flops(
        options.backbone,
        batch=batch,
        image_size=options.image_size,
        classes=classes,
        embedding_dim=new_state.EMBEDDING_DIM,
        rank=options.rank,
    )
    found = []
    for name, time_of in times.items():
        time_of = {key: value / options.steps for key, value in time_of.items()}
        row = {"way": name, "dtype": dtype, "classes": classes, "batch": batch, "fits": True}
        row |= {**facts[name], "milliseconds": time_of}
        row["images_per_second"] = 1e3 * batch / time_of["median"]
        row["flops"] = flops
        if options.peak_tflops:
            row["utilisation"] = flops / (time_of["median"] * 1e9 * options.peak_tflops)
        found.append(row)
    return found


def show(found: list[dict], title: str) -> None:
    """Prints a table."""
    best: dict[tuple, float] = {}
    for row in found:
        if row["fits"] and row["way"] != OURS:
            key = (row["dtype"], row["classes"], row["batch"])
            best[key] = max(best.get(key, 0.0), row["images_per_second"])
    lines = []
    for row in found:
        start = [row["way"], row["dtype"], str(row["classes"]), str(row["batch"])]
        if not row["fits"]:
            lines.append([*start, "out of memory", *[""] * 6])
            continue
        memory, use = row["memory_mib"], row.get("utilisation")
        digits = 1 if row["milliseconds"]["median"] < 1000 else 0
        rival = best.get((row["dtype"], row["classes"], row["batch"]))
        lines.append(
            [
                *start,
                f"{row['images_per_second']:.2f}",
                f"{row['images_per_second'] / rival:.2f}" if rival else "",
                rounds.milliseconds(row["milliseconds"], digits),
                f"{row['compile_seconds']:.0f}",
                "not measured" if memory is None else f"{memory:,.0f}",
                f"{use:.1%}" if use else "",
                f"{row['parameters']:,}",
            ]
        )
    header = ["way", "type", "classes", "batch", "images/s", "of best PyTorch"]
    header += ["ms a step", "compile s", "memory MiB", "FLOP use", "parameters"]
    print(rounds.markdown(title, header, lines), flush=True)


def main() -> None:
    """Measures, prints a table and perhaps writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = list(torch_step.WAYS)
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 at 64 pixels")
    parser.add_argument("--backbone", default="resnet101", choices=list(torch_step.STAGE_SIZES))
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--classes", type=int, nargs="+", help="20 80, and 500 off the CPU")
    parser.add_argument("--dtype", nargs="+", help="float32, and bfloat16 off the CPU")
    parser.add_argument("--batch", default="4", help="a number, or sweep (accelerators only)")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a round: 10, and 1 on a CPU")
    parser.add_argument(
        "--attention_kernel", action="store_true", help="ours with model.attention_kernel"
    )
    parser.add_argument("--ema_teacher", action="store_true", help="scores by the moving average")
    parser.add_argument(
        "--torch", nargs="*", choices=modes, help="all, and those that do not compile on a CPU"
    )
    parser.add_argument(
        "--only", choices=("ours", "torch"), help="one of the two by itself, in its own process"
    )
    parser.add_argument("--apart", action="store_true", help="each way in its own process")
    parser.add_argument(
        "--forms", nargs="+", choices=torch_step.FORMS, default=list(torch_step.FORMS)
    )
    parser.add_argument("--trace", help="with --only ours: trace steps into this directory")
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the device at the type")
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    if options.quick:
        options.backbone, options.image_size, options.rank, options.rounds = "resnet18", 64, 64, 3
        options.classes, options.dtype = options.classes or [20], options.dtype or ["float32"]
    if options.trace and (options.only != "ours" or options.apart or options.batch == "sweep"):
        parser.error("--trace goes with --only ours, and with neither --apart nor --batch sweep.")
    options.classes = options.classes or ([20, 80] if on_cpu else [20, 80, 500])
    options.dtype = options.dtype or (["float32"] if on_cpu else ["float32", "bfloat16"])
    options.steps = options.steps or (1 if on_cpu else 10)
    if options.attention_kernel:
        for dtype in options.dtype:
            if misfits := config.attention_kernel_misfits(dtype, options.rank):
                parser.error("; ".join(misfits))
    if options.torch is None:
        options.torch = modes[:2] if rounds.torch_device() == "cpu" else modes
    if options.batch == "sweep" and on_cpu:
        parser.error("--batch sweep fills a device's memory; on a CPU give a number.")
    found = []
    for dtype in options.dtype:
        for classes in options.classes:
            if options.batch == "sweep":
                part = sweep(options, dtype, classes)
            else:
                part = compare(options, dtype, classes, int(options.batch))
            release()
            title = f"Training step, {options.backbone} at {options.image_size}"
            show(part, f"{title}, {rounds.machine()['device']}")
            found += part
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    about = {**rounds.machine(), "torch": torch.__version__}
    rounds.write(options.json, {"machine": about, "settings": settings, "rows": found})


if __name__ == "__main__":
    main()
