"""Small trees in the genuine layout of the data sets, and the command that prepares them."""

import io
import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image

from clsl_jax.data import stored
from clsl_jax.data.images import encode_png
from clsl_jax.data.shards import Example

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def command(*arguments):
    return [sys.executable, "-m", "clsl_jax.prepare", *map(str, arguments)]


def prepare(*arguments):
    """Runs `python -m clsl_jax.prepare`; returns (exit status, stdout, stderr)."""
    done = subprocess.run(
        command(*arguments),
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def picture(seed, size=(12, 10), mode="RGB", file_format="JPEG"):
    """Encoded noise; equal for equal arguments."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


# Of a run on a `drawn_set`.
DRAWN = (
    "--config.data.name=table",
    "--config.data.sizes=()",
    "--config.labels.protocol=all",
    "--config.epochs=2",
    "--config.batch_size=8",
    "--config.evaluation.batch_size=8",
)


def drawn_set(root, class_names, change):
    """A prepared set of noise, 32 training images and 8 of each other split.

    `change(split, row, encoded, labels)` gives what is stored of an image; `stored` keeps it.
    """
    rng = np.random.default_rng(0)

    def example(split, row):
        encoded = encode_png(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        labels = (rng.random(len(class_names)) < 0.5).astype(np.int8)
        return Example(*change(split, row, encoded, labels), f"{split}-{row}")

    splits = {
        split: [example(split, row) for row in range(count)]
        for split, count in (("train", 32), ("validation", 8), ("test", 8))
    }
    stored.prepare(
        root, name="table", config="own", version="1.0.0", class_names=class_names, splits=splits
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def voc_annotation(name, objects):
    """An annotation as VOC writes it; `objects` are (class, difficult), None: without that tag."""
    parts = "<part>\n<name>head</name>\n<bndbox><xmin>1</xmin></bndbox>\n</part>\n"
    found = "".join(
        f"\t<object>\n\t\t<name>{kind}</name>\n\t\t<pose>Left</pose>\n\t\t<truncated>1</truncated>\n"
        + ("" if difficult is None else f"\t\t<difficult>{difficult}</difficult>\n")
        + (parts if kind == "person" else "")
        + "\t</object>\n"
        for kind, difficult in objects
    )
    return (
        f"<annotation>\n\t<folder>VOC</folder>\n\t<filename>{name}.jpg</filename>\n"
        f"\t<source>\n\t\t<database>The VOC2007 Database</database>\n\t</source>\n{found}"
        "</annotation>\n"
    )


def voc_tree(root, year, sets, *, class_files=()):
    """Writes VOCdevkit/VOC<year>; `sets` are {set: {name: objects, or None without annotation}}."""
    home = root / "VOCdevkit" / f"VOC{year}"
    from clsl_jax.data.formats.voc import CLASS_NAMES

    for image_set, images in sets.items():
        write(home / "ImageSets/Main" / f"{image_set}.txt", "".join(f"{n}\n" for n in images))
        for name, objects in images.items():
            write(home / "JPEGImages" / f"{name}.jpg", picture(int(name[-6:])))
            if objects is not None:
                write(home / "Annotations" / f"{name}.xml", voc_annotation(name, objects))
    for image_set, labels in class_files:
        for kind in CLASS_NAMES:
            lines = [f"{name} {labels.get((name, kind), -1):2d}\n" for name in sets[image_set]]
            write(home / "ImageSets/Main" / f"{kind}_{image_set}.txt", "".join(lines))
    return root


def coco_tree(root, *, plain=0):
    """Five images: an empty one, a crowd, a grey and a CMYK JPEG; and `plain` more a split."""
    names = [*(n for n in range(1, 81) if n != 12), 90]
    categories = [
        {"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in names
    ]
    categories.reverse()
    content = {"train2014": [], "val2014": []}
    marks = {
        "train2014": [(9, 90, 0), (9, 90, 0), (9, 1, 1), (25, 13, 1), (31, 2, 0)],
        "val2014": [(42, 1, 0)],
    }
    modes = {"train2014": {9: "RGB", 25: "L", 30: "RGB", 31: "CMYK"}, "val2014": {42: "RGB"}}
    for first, images in ((100, "train2014"), (200, "val2014")):
        for number in range(first, first + plain):
            modes[images][number] = "RGB"
            marks[images] += [(number, names[number % 3], 0), (number, names[3 + number % 5], 0)]
    for images, by_number in modes.items():
        for number in sorted(by_number, reverse=True):
            name = f"COCO_{images}_{number:012d}.jpg"
            content[images].append({"license": 5, "file_name": name, "height": 10, "id": number})
            write(root / images / name, picture(number, mode=by_number[number]))
        annotations = [
            {
                "segmentation": [[1.0, 2.0, 3.0]] if not crowd else {"counts": [1, 2], "size": [3]},
                "iscrowd": crowd,
                "image_id": image,
                "category_id": category,
                "bbox": [1.5, 2, 3, 4],
                "id": place,
            }
            for place, (image, category, crowd) in enumerate(marks[images])
        ]
        write(
            root / "annotations" / f"instances_{images}.json",
            json.dumps(
                {
                    "info": {"year": 2014},
                    "images": content[images],
                    "licenses": [{"id": 5, "name": "CC"}],
                    "annotations": annotations,
                    "categories": categories,
                }
            ),
        )
    return root


NUSWIDE_CONCEPTS = [f"concept{number:02d}" for number in range(81)]


def nuswide_tree(root, names, *, nested=True, lost=(), period=40):
    """The official lists; `names` are {Train or Test: names with a backslash}.

    Image r of a list has concept c if r + c is a multiple of `period`; those of `lost` are not on
    disk.
    """
    write(root / "Concepts81.txt", "".join(f"{name} \r\n" for name in NUSWIDE_CONCEPTS))
    for part, listed in names.items():
        write(root / "ImageList" / f"{part}Imagelist.txt", "".join(f"{n}\r\n" for n in listed))
        for column, concept in enumerate(NUSWIDE_CONCEPTS):
            marks = ["1" if (row + column) % period == 0 else "0" for row in range(len(listed))]
            path = root / "Groundtruth/TrainTestLabels" / f"Labels_{concept}_{part}.txt"
            write(path, "".join(f"{mark}\n" for mark in marks))
        for number, name in enumerate(listed):
            if name not in lost:
                place = name.replace("\\", "/") if nested else name.split("\\")[1]
                write(root / "Flickr" / place, picture(10 * len(listed) + number))
    return root


def vg500_tree(root, sets, positives, *, folder=""):
    """SSGRL's partition; `sets` are {train or test: names below `root`, folders included}."""
    for split, names in sets.items():
        listed = "".join(f"{name.rpartition('/')[2]}\n" for name in names)
        write(root / folder / f"{split}_list_500.txt", listed)
    write(root / folder / "vg_category_500_labels_index.json", json.dumps(positives))
    for number, name in enumerate(name for names in sets.values() for name in names):
        write(root / name, picture(number))
    return root
