"""What is to be said of a data set before anybody trains on it: counts, broken images, copies."""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clsl_jax.data import stored
from clsl_jax.data.formats.listing import ImageList, Listing, without_labels
from clsl_jax.data.inspection import DAMAGED, MISSING, READABLE, UNREADABLE, Inspected
from clsl_jax.errors import printable

_USABLE = (READABLE, DAMAGED)


def usable_rows(inspected: Sequence[Inspected]) -> list[int]:
    """Returns the rows whose image can be decoded."""
    return [row for row, found in enumerate(inspected) if found.state in _USABLE]


def content_sha256(
    class_names: Sequence[str],
    splits: Mapping[str, ImageList],
    inspected: Mapping[str, Sequence[Inspected]],
) -> str:
    """Returns a SHA-256 of everything that goes into a prepared set."""
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for split, images in splits.items():
        rows = [[name, f.sha256] for name, f in zip(images.ids, inspected[split], strict=True)]
        digest.update(json.dumps([split, rows]).encode())
        digest.update(np.ascontiguousarray(images.labels, np.int8).tobytes())
    return digest.hexdigest()


def build_report(
    listing: Listing,
    splits: Mapping[str, ImageList],
    inspected: Mapping[str, Sequence[Inspected]],
    *,
    source: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns all that was found, as JSON values.

    Of each split: counts over all of its images, as data sets are published, and over those that
    can be decoded class by class, as these alone will teach and be scored.

    Args:
      listing: the set; its published counts are what is found is held against.
      splits: its images, split as they will be stored.
      inspected: for each split a result an image.
      source: where it was read.
      notes: further ones than the listing's.
    """
    duplicates, leaks = _copies(splits, inspected)
    modes = collections.Counter(f.mode for found in inspected.values() for f in found if f.mode)
    sizes = np.array(
        [(f.width, f.height) for found in inspected.values() for f in found if f.width]
    )
    published = listing.published
    return {
        "dataset": listing.name,
        "source": printable(source),
        "classes": _held_against(len(listing.class_names), published.classes),
        "splits": {
            split: {
                "images": _held_against(len(images.ids), published.images.get(split)),
                "labels": _held_against(
                    int((images.labels == 1).sum()), published.labels.get(split)
                ),
                "without_labels": _held_against(
                    int(without_labels(images.labels).sum()), published.without_labels.get(split)
                ),
                "negative": int((images.labels == 0).sum()),
                "unknown": int((images.labels == -1).sum()),
                "difficult": int((images.labels == stored.DIFFICULT).sum()),
                "per_class": _per_class(
                    listing.class_names, images.labels[usable_rows(inspected[split])]
                ),
                **{
                    state: [
                        {"id": name, "path": printable(str(path)), "reason": f.reason}
                        for name, path, f in zip(
                            images.ids, images.paths, inspected[split], strict=True
                        )
                        if f.state == state
                    ]
                    for state in (MISSING, UNREADABLE, DAMAGED)
                },
            }
            for split, images in splits.items()
        },
        "duplicates": duplicates,
        "leaks": leaks,
        "modes": dict(sorted(modes.items())),
        "pixels": {
            name: [int(v) for v in np.quantile(sizes, q, axis=0, method="nearest")]
            for name, q in (("smallest", 0), ("median", 0.5), ("largest", 1))
        }
        if len(sizes)
        else {},
        "notes": [*listing.notes, *notes],
    }


def _held_against(found: int, published: int | None) -> dict[str, int | None]:
    return {"found": found, "published": published}


def _per_class(class_names: Sequence[str], labels: np.ndarray) -> dict[str, dict[str, int]]:
    counts = {
        name: (labels == value).sum(axis=0)
        for name, value in (
            ("positive", 1),
            ("negative", 0),
            ("unknown", -1),
            ("difficult", stored.DIFFICULT),
        )
    }
    return {
        class_name: {name: int(count[c]) for name, count in counts.items()}
        for c, class_name in enumerate(class_names)
    }


def _copies(
    splits: Mapping[str, ImageList], inspected: Mapping[str, Sequence[Inspected]]
) -> tuple[list[dict[str, list[str]]], list[dict[str, list[str]]]]:
    """Returns images of equal content: those of one split, and those that several splits share."""
    places: dict[str, dict[str, list[str]]] = {}
    for split, images in splits.items():
        for name, found in zip(images.ids, inspected[split], strict=True):
            if found.state in _USABLE:
                places.setdefault(found.sha256, {}).setdefault(split, []).append(name)
    duplicates = [
        {split: names}
        for found in places.values()
        for split, names in found.items()
        if len(names) > 1
    ]
    return duplicates, [found for found in places.values() if len(found) > 1]
