"""Composes a folder of photographs with a table from cut-out ones, as `table` is measured on.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default*.deb stamps
    python benchmarks/photographs.py --stamps=stamps/usr/share/tuxpaint/stamps --out=photographs
    python -m clsl_jax.prepare --dataset=table --source=photographs/labels.csv --out=DATA
    python -m clsl_jax.main --config=configs/table.py --workdir=runs/photographs \\
        --config.data.dir=DATA
    python benchmarks/photographs.py --out=photographs --compare=runs/photographs/recovered.csv

Each image shows one to four photographs of animals, plants, food and things on a plain ground; the
label is the kind of thing. Photographs of the training images never occur in the test images. The
training cells are empty with probability --unknown; `truth.csv` has them all, which only --compare
reads. The photographs are GPL-2: they are for measuring and stay out of this
repository.
"""

import argparse
import csv
import pathlib

import numpy as np
from PIL import Image, ImageFilter

# Class: folders of the stamps below --stamps. Drawings (`cartoon`) are left out.
CLASSES = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish", "animals/mammals/aquatic"),
    "insect": ("animals/insects",),
    "cattle": ("animals/mammals/bovines", "animals/mammals/deer", "animals/mammals/equines"),
    "furry animal": (
        "animals/mammals",
        "animals/mammals/rodents",
        "animals/mammals/bears",
        "animals/mammals/cats",
        "animals/mammals/dogs",
        "animals/marsupials",
    ),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "tree": ("plants", "plants/trees"),
    "road sign": ("town/roadsigns",),
    "tool": ("household/tools", "household/arttools"),
    "clothing": ("clothes", "clothes/hats"),
    "musical instrument": (
        "hobbies/music/string",
        "hobbies/music/brass",
        "hobbies/music/wind",
        "hobbies/music/percussion",
    ),
    "vehicle": (
        "vehicles",
        "vehicles/auto",
        "vehicles/construction",
        "vehicles/emergency",
        "vehicles/race",
        "vehicles/ship",
        "vehicles/flight/planes",
        "military/vehicles",
    ),
    "planet": ("space/planets", "space/moon"),
    "christmas": ("seasonal/christmas",),
    "halloween": ("seasonal/halloween",),
    "sport": ("sports",),
}
SIZE = 224
SPLITS = {"train": 500, "validation": 120, "test": 400}


def load_stamps(root: pathlib.Path) -> dict[str, list[Image.Image]]:
    """Returns the cut-out photographs of each class, RGBA, at most `SIZE` on a side."""
    found = {}
    for name, folders in CLASSES.items():
        paths = sorted(p for folder in folders for p in (root / folder).glob("*.png"))
        found[name] = []
        for path in paths:
            if path.stem.endswith("_mirror") or path.stem.endswith("_flip"):
                continue
            with Image.open(path) as image:
                stamp = image.convert("RGBA")
            box = stamp.getchannel("A").getbbox()
            if box:
                stamp = stamp.crop(box)
                stamp.thumbnail((SIZE, SIZE))
                found[name].append(stamp)
        if len(found[name]) < 2:
            raise SystemExit(
                f"{root}: {len(found[name])} photographs of {name} in {', '.join(folders)}; "
                "--stamps is the folder that holds animals, food, plants and so on."
            )
    return found


def compose(
    stamps: dict[str, list[Image.Image]], rng: np.random.Generator
) -> tuple[Image.Image, set[str]]:
    """Returns an image and the classes that are in it."""
    small = rng.integers(60, 220, (4, 4, 3)).astype(np.uint8)
    ground = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    ground = ground.filter(ImageFilter.GaussianBlur(6))
    # Later classes are likelier beside their neighbours in the list: labels that co-occur.
    names = list(CLASSES)
    first = int(rng.integers(len(names)))
    chosen = [names[first]]
    for _ in range(int(rng.integers(0, 4))):
        near = (first + int(rng.integers(1, 4))) % len(names)
        chosen.append(names[near] if rng.random() < 0.5 else names[int(rng.integers(len(names)))])
    for name in chosen:
        stamp = stamps[name][int(rng.integers(len(stamps[name])))]
        side = rng.uniform(0.35, 0.6) * SIZE
        ratio = side / max(stamp.size)
        stamp = stamp.resize([max(8, round(length * ratio)) for length in stamp.size])
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        stamp = stamp.rotate(float(rng.uniform(-15, 15)), expand=True)
        place = [int(rng.integers(max(1, SIZE - length + 1))) for length in stamp.size]
        ground.paste(stamp, place, stamp)
    return ground, set(chosen)


def write_folder(stamps_root: pathlib.Path, out: pathlib.Path, unknown: float, seed: int) -> None:
    """Writes images/, labels.csv and truth.csv."""
    stamps = load_stamps(stamps_root)
    parts: dict[str, dict[str, list[Image.Image]]] = {"train": {}, "test": {}}
    draw = np.random.default_rng([seed, 1])
    for name, found in stamps.items():
        order = draw.permutation(len(found))
        cut = round(0.6 * len(found))
        parts["train"][name] = [found[i] for i in order[:cut]]
        parts["test"][name] = [found[i] for i in order[cut:]]
    (out / "images").mkdir(parents=True)
    header = ["image", "split", *CLASSES]
    with open(out / "labels.csv", "w", newline="") as a, open(out / "truth.csv", "w") as b:
        labels, truth = csv.writer(a), csv.writer(b)
        labels.writerow(header)
        truth.writerow(header)
        for split, count in SPLITS.items():
            rng = np.random.default_rng([seed, 2, len(split)])
            for number in range(count):
                image, present = compose(parts["test" if split == "test" else "train"], rng)
                path = f"images/{split}-{number:04d}.jpg"
                image.save(out / path, quality=90)
                cells = [str(int(name in present)) for name in CLASSES]
                truth.writerow([path, split, *cells])
                hidden = rng.random(len(cells)) < (unknown if split == "train" else 0)
                shown = ["" if h else cell for h, cell in zip(hidden, cells, strict=True)]
                labels.writerow([path, split, *shown])
    total = sum(map(len, stamps.values()))
    print(f"{out}: {sum(SPLITS.values())} images of {total} photographs, {len(CLASSES)} classes.")


def compare(out: pathlib.Path, recovered: pathlib.Path) -> None:
    """Prints how many hidden cells were recovered, and how many of them rightly."""
    tables = []
    for path in (out / "labels.csv", out / "truth.csv", recovered):
        with open(path, newline="") as file:
            tables.append({row["image"]: row for row in csv.DictReader(file)})
    given, truth, found = tables
    hidden = [
        (truth[image][name], found[image][name])
        for image in found
        for name in CLASSES
        if given[image][name] == ""
    ]
    for kind, word in (("1", "positives"), ("0", "negatives")):
        right = sum(t == kind and f == kind for t, f in hidden)
        said = sum(f == kind for _, f in hidden)
        there = sum(t == kind for t, _ in hidden)
        precision = f"{100 * right / said:.1f} %" if said else "--"
        print(
            f"hidden {word}: {there}; recovered {said}, {precision} of them right; "
            f"{100 * right / max(there, 1):.1f} % found"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=pathlib.Path, help="folder of the cut-out photographs")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--unknown", type=float, default=0.7, help="share of empty training cells")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=pathlib.Path, help="recovered.csv of a run")
    args = parser.parse_args()
    if args.compare:
        compare(args.out, args.compare)
    elif args.stamps is None:
        parser.error("--stamps is missing: the folder of the cut-out photographs")
    else:
        write_folder(args.stamps, args.out, args.unknown, args.seed)


if __name__ == "__main__":
    main()
