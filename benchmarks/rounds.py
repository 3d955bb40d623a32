"""What the benchmark programs share: rounds in which the ways take turns, and Markdown tables."""

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tabulate import tabulate


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Times every way once a round, in turn, after a call of each that is not counted.

    Every other round is from the last to the first, so that none always follows the slowest.

    Args:
      ways: functions by name; each returns only when its work is done.
      rounds: how often each is timed.

    Returns:
      For each way the `spread` by the clock and `cpu`, the median of the process's time on all
      cores (spent waiting in a loop as well); milliseconds.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for number in range(rounds):
        for name, way in list(ways.items())[:: -1 if number % 2 else 1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            way()
            spent = time.perf_counter() - start, time.process_time() - start_cpu
            found[name].append((1e3 * spent[0], 1e3 * spent[1]))
    result = {}
    for name, pairs in found.items():
        clock, cpu = zip(*pairs, strict=True)
        result[name] = {**spread(clock), "cpu": statistics.median(cpu)}
    return result


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Returns `median`, `least` and `most`, of times or rates."""
    return {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}


def between(row: Mapping[str, float], form: str = ".1f") -> str:
    """Returns `median (least..most)` of a `spread`."""
    return f"{row['median']:{form}} ({row['least']:{form}}..{row['most']:{form}})"


def milliseconds(row: Mapping[str, float], digits: int = 1) -> str:
    """Returns `median (fastest..slowest)` of a `spread` of times."""
    return between(row, f".{digits}f")


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a `table` under its title."""
    return f"### {title}\n\n{table(header, rows)}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, the first column left and the others right."""
    sides = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=sides)


def machine() -> dict[str, Any]:
    """Returns the device, its software and the environment that may change its speed."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def torch_device() -> str:
    """The kind of device that JAX uses, as PyTorch names it."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: pathlib.Path | None, results: Mapping[str, Any]) -> None:
    """Writes JSON where a file is named."""
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
