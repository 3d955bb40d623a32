"""Images a second at 448 pixels: Pillow, Pillow with draft, ours; one core and the whole pipeline.

    python benchmarks/decode.py [--json=FILE] [--workers=N]

Images are made up: noise at many scales with the spectrum of photographs and a little sensor noise,
as JPEG of quality 90, 500 x 375 and 4000 x 3000, and as WebP of quality 90 and PNG. The ways take
turns; shown are the median of the rounds and the slowest and fastest one. Rates on one core are by
the process's CPU time, those of the pipeline by the clock. Augmentation: flip, two operations of
RandAugment, Cutout.
"""

import argparse
import contextlib
import io
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import cv2
import numpy as np
import rich.console
import rich.table
from PIL import Image
from rounds import between, spread, write

from clsl_jax.data import cache, images, pipeline, stored, transforms

IMAGE_SIZE = 448
KINDS = {
    "JPEG 500 x 375": ("JPEG", 500, 375),
    "WebP 500 x 375": ("WebP", 500, 375),
    "PNG 500 x 375": ("PNG", 500, 375),
    "JPEG 4000 x 3000": ("JPEG", 4000, 3000),
}
AUGMENT = transforms.Augment(flip=True, randaugment_operations=2, cutout=0.5)
CLASS_NAMES = tuple("abcdefghij")
Way = Callable[[bytes], np.ndarray]


def photograph(codec: str, width: int, height: int, seed: int) -> bytes:
    """Returns the file of an image, of quality 90 where its codec knows one."""
    draws = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    grain = 2
    while grain < min(width, height):
        shape = (max(2, height // grain), max(2, width // grain))
        brightness = draws.standard_normal((*shape, 1), np.float32)
        colours = brightness + 0.3 * draws.standard_normal((*shape, 3), np.float32)
        # Photographs are strongest at large scales; the power is chosen for usual sizes of files.
        coarse = colours * (grain / min(width, height)) ** 0.5
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        grain *= 2
    pixels *= 55 / pixels.std()
    pixels += 120 + 5 * draws.standard_normal(pixels.shape, np.float32)
    buffer = io.BytesIO()
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.save(buffer, codec, quality=90)
    return buffer.getvalue()


def by_pillow(encoded: bytes) -> np.ndarray:
    """The plain way."""
    with Image.open(io.BytesIO(encoded)) as image:
        return _resized_by_pillow(image)


def by_pillow_with_draft(encoded: bytes) -> np.ndarray:
    """The plain way, at reduced scale where that is enough."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        return _resized_by_pillow(image)


def _resized_by_pillow(image: Image.Image) -> np.ndarray:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))


def by_us(encoded: bytes) -> np.ndarray:
    """The project's own."""
    return images.resize_image(images.decode_image(encoded, at_least=IMAGE_SIZE), IMAGE_SIZE)


WAYS: dict[str, Way] = {
    "Pillow": by_pillow,
    "Pillow, draft": by_pillow_with_draft,
    "ours": by_us,
}


def one_core(encoded: Sequence[bytes], rounds: int, least_seconds: float) -> list[dict]:
    """Rates of every way, with and without augmentation."""
    rates: dict[tuple[str, bool], list[float]] = {(w, a): [] for w in WAYS for a in (False, True)}
    for way in WAYS.values():
        way(encoded[0])
    for number in range(rounds):
        for name, augmented in rates:
            rng = np.random.default_rng(number)  # the same operations for every way
            done, start = 0, time.process_time()
            # Whole passes only, so that every way is timed on the same images.
            while (spent := time.process_time() - start) < least_seconds:
                for content in encoded:
                    image = WAYS[name](content)
                    if augmented:
                        AUGMENT(image, rng)
                    done += 1
            rates[name, augmented].append(done / spent)
    return [
        {"way": name, "augmented": augmented, **spread(values)}
        for (name, augmented), values in rates.items()
    ]


@contextlib.contextmanager
def prepared_set(
    encoded: Sequence[bytes], image_size: int = IMAGE_SIZE
) -> Iterator[tuple[images.Images, images.Images]]:
    """A prepared set in a temporary directory: (read and decoded each time, held on disk)."""
    with tempfile.TemporaryDirectory() as root:
        labels = np.eye(len(CLASS_NAMES), dtype=np.int8)
        examples = [
            stored.Example(content, labels[row % len(labels)], f"{row}.jpg")
            for row, content in enumerate(encoded)
        ]
        directory = stored.prepare(
            root,
            name="photographs",
            config="main",
            version="1.0.0",
            class_names=CLASS_NAMES,
            splits={"train": examples},
        )
        read = stored.StoredImages(stored.open_prepared(directory), "train", image_size)
        held = cache.cached(
            read,
            kind="disk",
            limit_bytes=len(encoded) * image_size**2 * 3,
            image_size=image_size,
            path=pathlib.Path(root) / "decoded",
        )
        yield read, held


def whole_pipeline(
    encoded: Mapping[str, Sequence[bytes]],
    workers: Sequence[int],
    rounds: int,
    batches: int,
    batch_size: int,
) -> list[dict]:
    """Rates of augmented batches, from files of each kind and from the cache on disk."""
    rates: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        sources = {}
        for kind, files in encoded.items():
            sources[kind], held = stack.enter_context(prepared_set(files))
        sources["cache on disk"] = held
        for _ in range(rounds):
            for name, source in sources.items():
                for count in workers:
                    rate = _pipeline_rate(source, count, batches, batch_size)
                    rates.setdefault((name, count), []).append(rate)
    return [
        {"way": name, "workers": count, **spread(values)} for (name, count), values in rates.items()
    ]


def _pipeline_rate(source: images.Images, workers: int, batches: int, batch_size: int) -> float:
    iterator = pipeline.train_iterator(
        source, batch_size=batch_size, seed=0, augment=AUGMENT, workers=workers
    )
    # What was prepared while the first batch was waited for must be used up before the clock runs.
    ahead = 2 * min(8, os.cpu_count() or 2) + 4 * workers
    for _ in range(ahead):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    rate = batches * batch_size / (time.perf_counter() - start)
    iterator.close()
    return rate


def show(results: dict) -> None:
    """Prints the tables."""
    console = rich.console.Console()
    for kind, found in results["one_core"].items():
        kilobytes = results["mean_bytes"][kind] / 1000
        table = _table(
            f"{kind} ({kilobytes:.0f} kB) to {IMAGE_SIZE}: images/s on one core",
            ("decode and resize", "and augment"),
        )
        for name in WAYS:
            plain, augmented = (
                next(r for r in found if (r["way"], r["augmented"]) == (name, flag))
                for flag in (False, True)
            )
            table.add_row(name, between(plain), between(augmented))
        console.print(table)
    table = _table(
        f"Pipeline on {results['cores']} cores, augmented: images/s",
        ("worker processes", "images/s"),
    )
    for row in results["pipeline"]:
        table.add_row(row["way"], str(row["workers"] or "0 (threads)"), between(row))
    console.print(table)
    console.print(results["decoding"])


def _table(title: str, columns: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("way")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main() -> None:
    """Measures, prints tables and perhaps writes JSON."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--workers", type=int, default=max(2, cores or 2), help="of the last rows")
    parser.add_argument(
        "--images", type=int, default=64, help="small ones a codec; 1 large for 16 of them"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each way on one core")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time of a round, at least")
    parser.add_argument("--pipeline-rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=30, help="that are timed in a round")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    encoded = {
        kind: [
            photograph(codec, width, height, seed)
            for seed in range(arguments.images if width < 1000 else max(1, arguments.images // 16))
        ]
        for kind, (codec, width, height) in KINDS.items()
    }
    results = {
        "image_size": IMAGE_SIZE,
        "mean_bytes": {kind: statistics.mean(map(len, found)) for kind, found in encoded.items()},
        "one_core": {
            kind: one_core(found, arguments.rounds, arguments.seconds)
            for kind, found in encoded.items()
        },
        "pipeline": whole_pipeline(
            {kind: files for kind, files in encoded.items() if KINDS[kind][1] < 1000},
            sorted({0, 1, arguments.workers}),
            arguments.pipeline_rounds,
            arguments.batches,
            arguments.batch_size,
        ),
        "decoding": images.decoding(),
        "cores": cores,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    show(results)
    write(arguments.json, results)


if __name__ == "__main__":
    main()
