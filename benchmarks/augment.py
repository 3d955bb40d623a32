"""Images a second that are augmented on the host and in a compiled step.

    python benchmarks/augment.py [--json=FILE]

The host's way is `transforms.Augment` on one core, one image after another, by the thread's CPU
time. The other is `device_transforms.augment_images` on JAX's default backend, whole batches that
are there already, by the clock; where that backend is the CPU it uses all cores. Both take turns;
shown are the median of the rounds and the slowest and fastest one. Images are made up: noise at
two scales.
"""

import argparse
import functools
import os
import pathlib
import platform
import time
from collections.abc import Callable

import cv2
import jax
import numpy as np
from rounds import between, markdown, spread, write

from clsl_jax import device_transforms
from clsl_jax.data import transforms

SETTINGS = {
    "flip": transforms.Augment(flip=True),
    "flip, cutout": transforms.Augment(flip=True, cutout=0.5),
    "flip, RandAugment, cutout": transforms.Augment(
        flip=True, randaugment_operations=2, randaugment_magnitude=9, cutout=0.5
    ),
}


def made_up_images(count: int, side: int) -> np.ndarray:
    """Returns uint8 [N, S, S, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(20, 235, (count, 8, 8, 3)).astype(np.float32)
    size = (side, side)
    large = np.stack([cv2.resize(c, size, interpolation=cv2.INTER_CUBIC) for c in coarse])
    return np.clip(large + 5 * rng.standard_normal(large.shape), 0, 255).astype(np.uint8)


def rate(
    work: Callable[[int], None], images: int, clock: Callable[[], float], least_seconds: float
) -> float:
    """Images a second by `clock`, of passes `work(number)` that change `images` each."""
    passes, start = 0, clock()
    while (spent := clock() - start) < least_seconds:
        work(passes)
        passes += 1
    return passes * images / spent


def measure(side: int, batch_size: int, rounds: int, least_seconds: float) -> list[dict]:
    """Rates of both ways, of every setting, at one size."""
    batch = made_up_images(batch_size, side)
    resident = jax.device_put(batch)
    keys = list(jax.random.split(jax.random.key(0), 16))
    rows = []
    for name, augment in SETTINGS.items():
        start = time.perf_counter()
        step = jax.jit(functools.partial(device_transforms.augment_images, augment=augment))
        compiled = step.lower(keys[0], resident).compile()
        compile_seconds = time.perf_counter() - start
        rng = np.random.default_rng(0)

        def on_host(number: int, augment=augment, rng=rng) -> None:
            for image in batch:
                augment(image, rng)

        def on_device(number: int, compiled=compiled) -> None:
            compiled(keys[number % len(keys)], resident).block_until_ready()

        on_host(0)
        on_device(0)
        host, device = [], []
        for _ in range(rounds):
            host.append(rate(on_host, batch_size, time.thread_time, least_seconds))
            device.append(rate(on_device, batch_size, time.perf_counter, least_seconds))
        rows.append(
            {
                "setting": name,
                "side": side,
                "host": spread(host),
                "device": spread(device),
                "compile_seconds": compile_seconds,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


def show(results: dict) -> None:
    """Prints a Markdown table."""
    title = f"Images/s, batches of {results['batch_size']} on {results['device']}"
    header = ("augmentation", "pixels", "host, one core", "device", "ratio", "compilation")
    lines = [
        (
            row["setting"],
            str(row["side"]),
            between(row["host"], ",.0f"),
            between(row["device"], ",.0f"),
            f"{row['device']['median'] / row['host']['median']:.2f}",
            f"{row['compile_seconds']:.1f} s",
            f"{row['temporary_bytes'] / 2**20:.0f} MiB",
        )
        for row in results["rows"]
    ]
    print(markdown(title, (*header, "memory"), lines))


def main() -> None:
    """Measures, prints a table and perhaps writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448], help="in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of each way")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round, at least")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    results = {
        "rows": [
            row
            for side in arguments.sides
            for row in measure(side, arguments.batch_size, arguments.rounds, arguments.seconds)
        ],
        "batch_size": arguments.batch_size,
        "device": f"{jax.default_backend()} ({jax.devices()[0].device_kind})",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    show(results)
    write(arguments.json, results)


if __name__ == "__main__":
    main()
