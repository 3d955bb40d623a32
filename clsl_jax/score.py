"""Scores a prediction file under every convention of the field.

python -m clsl_jax.score predictions.npz [--json=FILE.json]

Of a run, its directory may be named as well: RUN stands for RUN/predictions.npz.
Papers differ in how they compute AP, whether a *difficult* object counts as absent or not at all,
and whether images without a label are evaluated; one prediction file gives the numbers of each.
Exit status: 0 done; 2 input that cannot be used.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich import box
from rich.table import Table

from clsl_jax import atomic, command_line, metrics, npz
from clsl_jax.errors import InputError, writing

DIFFICULT_AS = ("ignored", "negative")
WITHOUT_LABELS = ("kept", "dropped")
THRESHOLD, TOP_K = 0.5, 3

_NAMES = ("CP", "CR", "CF1", "OP", "OR", "OF1")
_ARRAYS = ("scores", "labels", "ignore", "ids", "class_names")
_MADE_BY = "training or `python -m clsl_jax.main --mode=evaluate`"


def load_predictions(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a prediction file.

    Returns:
      `scores` float64 [N, C] in [0, 1]; `labels` int8 [N, C], 1 positive, 0 negative, -1 unknown;
      `ignore` bool [N, C], True for *difficult*; `ids` [N]; `class_names` [C].

    Raises:
      InputError: no such file, a damaged or foreign one, or arrays that do not fit one another.
    """
    found = npz.read(path, _ARRAYS, made_by=_MADE_BY)
    scores, labels, ignore = found["scores"], found["labels"], found["ignore"]
    faults = []
    if scores.dtype.kind != "f" or scores.ndim != 2 or not scores.size:
        faults.append(f"scores are {_described(scores)}, expected float [images, classes]")
    elif not ((scores >= 0) & (scores <= 1)).all():
        faults.append("scores must be probabilities, from 0 to 1 and no NaN")
    if labels.dtype.kind not in "iub" or not np.isin(labels, (-1, 0, 1)).all():
        faults.append(f"labels are {_described(labels)}, expected 1, 0 or -1 (unknown)")
    if ignore.dtype != np.bool_:
        faults.append(f"ignore is {_described(ignore)}, expected bool")
    for name, array, shape in (
        ("labels", labels, scores.shape),
        ("ignore", ignore, scores.shape),
        ("ids", found["ids"], scores.shape[:1]),
        ("class_names", found["class_names"], scores.shape[1:]),
    ):
        if array.shape != shape:
            faults.append(
                f"{name} have shape {list(array.shape)}, scores have {list(scores.shape)}"
            )
    if found["class_names"].dtype.kind != "U":
        faults.append(f"class_names are {_described(found['class_names'])}, expected text")
    if faults:
        raise InputError(f"{path} is no prediction file of {_MADE_BY}: " + "; ".join(faults) + ".")
    return {**found, "scores": scores.astype(np.float64), "labels": labels.astype(np.int8)}


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def score_convention(
    scores: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray,
    class_names: Sequence[str],
    *,
    convention: str,
    difficult: str = "ignored",
    without_labels: str = "kept",
    threshold: float = THRESHOLD,
    top_k: int = TOP_K,
) -> dict[str, Any]:
    """Returns every metric under one convention, as a JSON-able dict; values lie in [0, 1].

    Entries whose label is unknown count for nothing under any convention. A class without a
    positive has no AP (None) and stays out of the mean; what nothing is left for is None.

    Args:
      scores: probabilities, float [N, C].
      labels: int [N, C], 1 positive, 0 negative, -1 unknown.
      ignore: bool [N, C], True for *difficult*.
      class_names: C names.
      convention: of AP, `interpolated` (VOC 2012) or `uninterpolated` (scikit-learn).
      difficult: `ignored`, or `negative`: whatever its label says.
      without_labels: `kept`, or `dropped`: images with no positive that is not difficult.
      threshold: a class counts as predicted above it.
      top_k: for the second group of numbers: classes an image, each above the threshold too.
    """
    unknown = labels < 0
    if difficult == "negative":
        labels = np.where(ignore, 0, labels)
        skipped = unknown & ~ignore
    else:
        skipped = unknown | ignore
    labels = np.where(skipped, 0, labels)
    kept = np.full(len(labels), True)
    labelled = (labels == 1).any(axis=1)
    if without_labels == "dropped":
        kept = labelled
    scores, labels, skipped = scores[kept], labels[kept], skipped[kept]
    result: dict[str, Any] = {
        "AP_convention": convention,
        "difficult": difficult,
        "without_labels": without_labels,
        "images": int(kept.sum()),
        "images_without_labels": int((~labelled[kept]).sum()),
        "ignored_entries": int(skipped.sum()),
    }
    groups: dict[str, dict[str, Any]] = {
        f"threshold_{threshold}": {"threshold": threshold},
        f"top_{top_k}": {"threshold": threshold, "top_k": top_k},
    }
    if skipped.all():  # no image, or no label
        nothing = dict.fromkeys(_NAMES)
        return result | {
            "mAP": None,
            "AP": dict.fromkeys(class_names),
            **{name: dict(nothing) for name in groups},
        }
    ap = metrics.average_precision(scores, labels, skipped, convention=convention)
    result["mAP"] = finite(metrics.mean_of_defined(ap))
    result["AP"] = {name: finite(v) for name, v in zip(class_names, ap, strict=True)}
    for name, how in groups.items():
        found = metrics.classification_metrics(scores, labels, skipped, **how)
        result[name] = {key: finite(found[key]) for key in _NAMES}
    return result


def finite(value: Any) -> float | None:
    """A number as JSON can hold it: None of NaN and of what has no end."""
    return float(value) if np.isfinite(value) else None


def score_file(path: str) -> dict[str, Any]:
    """Returns what a prediction file holds and its metrics under all eight conventions.

    Raises:
      InputError: as `load_predictions`.
    """
    found = load_predictions(path)
    labels, ignore = found["labels"], found["ignore"]
    names = found["class_names"].tolist()
    results = [
        score_convention(
            found["scores"],
            labels,
            ignore,
            names,
            convention=convention,
            difficult=difficult,
            without_labels=without_labels,
        )
        for difficult, without_labels, convention in itertools.product(
            DIFFICULT_AS, WITHOUT_LABELS, metrics.CONVENTIONS
        )
    ]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": os.path.basename(path),
        "sha256": digest,
        "images": len(labels),
        "classes": names,
        "images_without_labels": int((~((labels == 1) & ~ignore).any(axis=1)).sum()),
        "difficult_entries": int(ignore.sum()),
        "unknown_entries": int(((labels < 0) & ~ignore).sum()),
        "results": results,
    }


def tables(scored: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of mean AP and of the classification metrics, in percent."""
    by = {(r["difficult"], r["without_labels"], r["AP_convention"]): r for r in scored["results"]}
    precision = _table("Mean average precision, percent", "images", *metrics.CONVENTIONS)
    decisions = _table("Precision, recall and F1, percent", "predicted", *_NAMES)
    for difficult, without_labels in itertools.product(DIFFICULT_AS, WITHOUT_LABELS):
        rows = [by[difficult, without_labels, convention] for convention in metrics.CONVENTIONS]
        precision.add_row(
            difficult, without_labels, str(rows[0]["images"]), *(percent(r["mAP"]) for r in rows)
        )
        for name, shown in (
            (f"threshold_{THRESHOLD}", f"above {THRESHOLD}"),
            (f"top_{TOP_K}", f"and top {TOP_K}"),
        ):
            numbers = (percent(rows[0][name][key]) for key in _NAMES)
            decisions.add_row(difficult, without_labels, shown, *numbers)
    return [precision, decisions]


def _table(title: str, *columns: str) -> Table:
    # So that 80 columns, the width of a pipe, hold all of it.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("difficult")
    table.add_column("no label")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def percent(value: float | None) -> str:
    """A share of 1 as text, 12.34; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}"


def _summary(scored: Mapping[str, Any]) -> str:
    counts = (
        ("images without labels", scored["images_without_labels"]),
        ("difficult entries", scored["difficult_entries"]),
        ("entries of unknown label", scored["unknown_entries"]),
    )
    parts = [f"{scored['images']} images, {len(scored['classes'])} classes"]
    return ", ".join(parts + [f"{count or 'no'} {what}" for what, count in counts])


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("json", None, "Also write every number, with AP per class, to this file.")


def _work(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise InputError(
            f"{len(arguments)} prediction files given: write "
            "`python -m clsl_jax.score predictions.npz`, or the directory of a run."
        )
    path = arguments[0]
    if os.path.isdir(path):
        path = os.path.join(path, "predictions.npz")
    command_line.check_outputs(flags.FLAGS, {"json": ".json"}, inputs=[path])
    scored = score_file(path)
    console = command_line.console()
    console.print(f"{path}: {_summary(scored)}", soft_wrap=True)
    for table in tables(scored):
        console.print(table)
    if flags.FLAGS.json:
        text = json.dumps(scored, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with writing(flags.FLAGS.json, ": name another place"):
            atomic.write_text(atomic.target(flags.FLAGS.json), text)
        console.print(f"Written: {flags.FLAGS.json}", soft_wrap=True)


def cli() -> None:
    """Entry point of the console script."""
    command_line.run(define_flags, _work)


if __name__ == "__main__":
    cli()
