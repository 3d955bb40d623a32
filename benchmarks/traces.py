"""Where the time of a step goes: a trace of `jax.profiler`, summed up by kind of operation.

Operations are named by XLA; a fusion counts as what its name says. Times are summed over threads,
so that on several cores they exceed the clock.
"""

import collections
import glob
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable

import jax
import rounds

KINDS = (
    ("collective", r"all-reduce|all-gather|collective|permute"),
    ("convolution", r"conv(?!ert)"),
    ("matrix product", r"dot|gemm|matmul|ynn|onednn|nvjet|cutlass"),
    ("reduction", r"reduce|norm"),
    ("gather and scatter", r"gather|scatter|dynamic"),
    ("copy, transpose, pad", r"copy|transpose|pad|concatenate|slice|reshape|broadcast"),
    ("loop over classes (attention)", r"while|call|condition"),
    ("element-wise", r"fusion|add|multiply|select|exp|tanh|log|power|divide|maximum|compare|erf"),
)


def operations(directory: str) -> dict[str, tuple[int, float]]:
    """{operation: (times, milliseconds)} of the last trace in a directory.

    Outer events that hold others are left out. What a GPU runs as a CUDA graph has the kernel's
    name in place of the graph's.
    """
    paths = glob.glob(os.path.join(directory, "**", "*.trace.json.gz"), recursive=True)
    with gzip.open(max(paths, key=os.path.getmtime), "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            name = event["args"]["hlo_op"]
            if name.startswith("command_buffer"):
                name = event["name"]
            name = re.sub(r"[._]\d+$", "", name)
            found[name][0] += 1
            found[name][1] += event["dur"] / 1e3
    return {name: (int(count), spent) for name, (count, spent) in found.items()}


def kind_of(name: str) -> str:
    """The row of the table that an operation belongs to."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def show_operations(found: dict[str, tuple[int, float]], steps: int, title: str) -> None:
    """Prints the tables of a trace of so many steps."""
    kinds: dict[str, float] = collections.Counter()
    for name, (_, spent) in found.items():
        kinds[kind_of(name)] += spent / steps
    total = sum(kinds.values())
    lines = [
        (kind, f"{spent:.2f}", f"{100 * spent / total:.1f}")
        for kind, spent in sorted(kinds.items(), key=lambda item: -item[1])
    ]
    print(rounds.markdown(title, ("operation", "ms a step, all threads", "percent"), lines))
    top = sorted(found.items(), key=lambda item: -item[1][1])[:15]
    lines = [(n, f"{c / steps:.0f}", f"{t / steps:.2f}") for n, (c, t) in top]
    print(rounds.markdown("Single operations", ("name", "times a step", "ms a step"), lines))


def show(
    run: Callable[[int], float], steps: int, title: str, directory: str | None = None
) -> tuple[float, dict[str, tuple[int, float]]]:
    """Traces `run(steps)`, which returns milliseconds a step, and prints where they go.

    Returns the milliseconds without the trace, and `operations` of it.
    """
    clock = run(steps)
    directory = directory or tempfile.mkdtemp()
    with jax.profiler.trace(directory):
        traced = run(steps)
    found = operations(directory)
    show_operations(found, steps, f"{title}: {clock:.1f} ms a step, {traced:.1f} while traced")
    return clock, found
