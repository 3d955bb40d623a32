"""`results.json`, `predictions.npz`, the picture sheet and the closing table."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from clsl_jax import (
    atomic,
    epoch_end,
    evaluate,
    experiment,
    label_tables,
    metrics,
    npz,
    outputs,
    sharding,
)
from clsl_jax.data import partial, sources
from clsl_jax.experiment import Experiment
from clsl_jax.score import percent, score_convention
from clsl_jax.train_state import TrainState
from clsl_jax.workdir import Workdir
from clsl_jax.writer import LOG_NAME, RunLog, read_log

PREDICTIONS_NAME = "predictions.npz"
PICTURES_NAME = "pictures.png"


def write(
    name: str,
    *,
    config: ml_collections.ConfigDict,
    built: Experiment,
    workdir: Workdir,
    log: RunLog,
    scores: Mapping[tuple[str, str], np.ndarray],
    epochs: Mapping[str, int],
    recovery: Mapping[str, Any],
    state: TrainState | None,
    unreadable: Sequence[str],
    mask_sha256: str,
    explain: Callable[[jax.Array], Any],
    source: str = "",
) -> dict[str, Any]:
    """Scores predictions under every convention and leaves everything in the workdir.

    Args:
      name: of the JSON file.
      config: of the run.
      built: its experiment.
      workdir: its directory.
      log: its console.
      scores: {(weights, split): float [N, C]}; weights are `last` or `best`.
      epochs: {weights: epoch they are from}.
      recovery: figures of the recovered labels at the end.
      state: whose `recovered` are the labels to hand out; None writes none.
      unreadable: ids of the training images in whose place others stood.
      mask_sha256: of the known-label mask.
      explain: `images -> (probabilities, position weights)` with the best weights.
      source: file of the weights, where they are not this run's.

    Returns:
      What the JSON file holds.
    """
    drawn = config.labels.protocol not in ("all", "file")
    by_fraction = config.labels.protocol in partial.BY_FRACTION
    result = {
        "dataset": _dataset_facts(built),
        "labels": {
            "protocol": config.labels.protocol,
            "known_fraction": config.labels.known_fraction if by_fraction else None,
            "seed": config.labels.seed if drawn else None,
            "known_entries": int((built.annotations >= 0).sum()),
            "entries": int(built.annotations.size),
            "mask_sha256": mask_sha256,
            "annotations_sha256": partial.matrix_sha256(built.annotations),
            "file": config.labels.file,
        },
        "seed": config.seed,
        "images": ("turned upright, " if built.dataset.upright else "")
        + f"squashed to {config.data.image_size} x {config.data.image_size}, no crop",
        "weights": source or f"{config.evaluation.weights} of the parameters and batch statistics",
        "selection": {
            "rule": f"highest {config.evaluation.selection} mAP "
            f"({config.evaluation.convention} AP) among the saved epochs; the latest of equals",
            "split": config.evaluation.selection,
            "epochs": dict(epochs),
        },
        "best_on_test": _best_on_test(workdir, config.evaluation.convention),
        "versions": experiment.versions(),
        "recovery": dict(recovery),
        "unreadable_training_images": list(unreadable),
        "results": _scored(scores, epochs, built),
    }
    if jax.process_index() == 0:
        _write_predictions(workdir.path(PREDICTIONS_NAME), built, scores["best", "test"])
    tables = _label_tables(built, state, scores, log)
    if tables is not None:
        result["recovery"].update(tables.held_out)
    if jax.process_index() == 0:
        _write_label_tables(workdir, built, tables)
    pictured = min(config.evaluation.pictures, len(built.dataset.test.labels))
    explained = _explain(built, explain, pictured) if pictured else None
    if jax.process_index() == 0:
        if explained is not None:
            note = f"weights of epoch {epochs['best']}"
            _write_pictures(workdir.path(PICTURES_NAME), built, explained, note)
        # Last: where it is, everything is.
        atomic.write_text(workdir.path(name), json.dumps(result, indent=2, sort_keys=True) + "\n")
    _print(log, result, workdir, name, tables=tables, pictured=explained is not None)
    return result


def recovery_line(values: Mapping[str, Any]) -> str:
    """Returns, in a few words, what was recovered, and how rightly where that can be known."""
    if values["recovery/positive_recall"] is not None:
        precision, recall = (values[f"recovery/positive_{k}"] for k in ("precision", "recall"))
        right = "  -- " if precision is None else f"{100 * precision:4.1f}%"
        return f"recovered positives {right} right, {100 * recall:4.1f}% found"
    found = [values[f"recovery/recovered_{kind}"] for kind in ("positives", "negatives")]
    share = 100 * sum(found) / max(values["recovery/unknown"], 1)
    return f"recovered {found[0]:,} positives, {found[1]:,} negatives ({share:.1f}% of the unknown)"


class _Tables(NamedTuple):
    """Labels int8 [N, C] and probabilities [N, C] of all splits; figures of the held-out images."""

    labels: np.ndarray
    probabilities: np.ndarray
    held_out: dict[str, Any]


def _label_tables(
    built: Experiment,
    state: TrainState | None,
    scores: Mapping[tuple[str, str], np.ndarray],
    log: RunLog,
) -> _Tables | None:
    """Returns what goes into the tables of recovered labels, None of none or of far too many.

    A training image has the recovered labels of the state; the others have what the last weights
    say, by the same thresholds, where these are on a network's probabilities.
    """
    if state is None or built.options.recovery_mode != "epoch":
        return None
    splits = _tabled(built)
    cells = sum(split.labels.size for split in splits)
    if cells > label_tables.MOST_CELLS:
        log.console.print(
            f"{label_tables.RECOVERED_NAME} and {label_tables.PROBABILITIES_NAME} are not written: "
            f"{cells:,} cells are more than {label_tables.MOST_CELLS:,}. The training images' "
            "labels are in the last checkpoint, in `recovered` and `recovered_weight`; how right "
            "they are is not tried on held-out images."
        )
        return None
    count, options = len(built.annotations), built.options.handing_out

    whole = sharding.replicated(built.mesh)

    @functools.partial(jax.jit, out_shardings=whole)
    def recovered_from(state: TrainState) -> tuple[Any, ...]:
        # Whole on every device: sums of the same order, so the same digits on any layout.
        state = jax.lax.with_sharding_constraint(state, whole)
        found = epoch_end.recovery_scores(state, options)
        thresholds = epoch_end.recovery_thresholds(state, *found, options)
        return *found, state.recovered, state.recovered_weight, thresholds

    *found, thresholds = jax.device_get(recovered_from(state))
    kept, visits, recovered, weight = (x[:count] for x in found)
    labels = [label_tables.recovered_labels(built.annotations, recovered, weight)]
    probabilities = [np.where(visits[:, None] > 0, kept, np.nan)]
    # Thresholds on scores of another kind say nothing of what is predicted.
    predicted = "both" if options.evaluate_statistics else "scores"
    fits = options.source == predicted and options.branch == "semantic"
    active = fits and int(state.step) >= options.warmup_steps
    given = []
    for split in splits[1:]:
        predictions = scores["last", split.name]
        probability = np.asarray(outputs.stated_probabilities(predictions, options))
        unknown = np.full_like(split.labels, partial.UNKNOWN)
        given.append(
            label_tables.fill_labels(
                unknown, probability, *thresholds, soft=options.soft, active=active
            )
        )
        labels.append(np.where(split.labels == partial.UNKNOWN, given[-1], split.labels))
        probabilities.append(probability)
    held_out = held_out_precision(
        np.concatenate([built.scored_labels(split) for split in splits[1:]]), np.concatenate(given)
    )
    return _Tables(np.concatenate(labels), np.concatenate(probabilities), held_out)


def held_out_precision(labels: np.ndarray, given: np.ndarray) -> dict[str, Any]:
    """Returns how right the thresholds of recovery are on images that nothing was trained on.

    It is the one honest estimate where unknown training labels really are unknown.

    Args:
      labels: int8 [N, C], -1 unknown. As predictions are scored by: where what is unknown counts as
        absent, positives are at least as right, negatives at most.
      given: int8 [N, C], what the thresholds make of every cell, known or not; -1 nothing.

    Returns:
      `recovery/held_out_positives` and `..._negatives`, how many known cells are given so, and
      `recovery/held_out_positive_precision` and `..._negative_precision`, the share of these that
      is labelled so, None of none.
    """
    values: dict[str, Any] = {}
    for kind, label in (("positive", 1), ("negative", 0)):
        taken = (labels != partial.UNKNOWN) & (given == label)
        count = int(taken.sum())
        right = float((labels[taken] == label).mean()) if count else None
        values[f"recovery/held_out_{kind}s"] = count
        values[f"recovery/held_out_{kind}_precision"] = right
    return values


def _tabled(built: Experiment) -> list[sources.Split]:
    """Returns the splits, each image once: without a validation split of the training images."""
    dataset = built.dataset
    validation = [] if dataset.validates_on_train else [dataset.validation]
    return [dataset.train, *validation, dataset.test]


def _write_label_tables(workdir: Workdir, built: Experiment, tables: _Tables | None) -> None:
    if tables is None:
        return
    splits = _tabled(built)
    named = {
        "ids": [name for split in splits for name in split.ids],
        "splits": [split.name for split in splits for _ in split.ids],
        "class_names": built.dataset.class_names,
    }
    labels, probabilities, _ = tables
    path = workdir.path(label_tables.RECOVERED_NAME)
    label_tables.write_labels(path, labels, **named)
    path = workdir.path(label_tables.PROBABILITIES_NAME)
    label_tables.write_probabilities(path, probabilities, **named)


def _dataset_facts(built: Experiment) -> dict[str, Any]:
    dataset = built.dataset
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "classes": list(dataset.class_names),
        "images": {name: len(getattr(dataset, name).labels) for name in sources.SPLITS},
        "facts": dict(dataset.facts),
    }


def _scored(
    scores: Mapping[tuple[str, str], np.ndarray], epochs: Mapping[str, int], built: Experiment
) -> list[dict[str, Any]]:
    rows = []
    for (label, split_name), values in scores.items():
        split = getattr(built.dataset, split_name)
        for convention in metrics.CONVENTIONS:
            found = score_convention(
                values,
                built.scored_labels(split),
                split.difficult,
                built.dataset.class_names,
                convention=convention,
            )
            named = {"weights": label, "epoch": epochs[label], "split": split_name}
            rows.append({**named, "unknown": built.unknown, **found})
    return rows


def _best_on_test(workdir: Workdir, convention: str) -> dict[str, Any] | None:
    """Returns the highest test mAP of any epoch, where the test split was logged each epoch.

    Papers that pick their epoch on the test split report this number; nothing here is chosen by it.
    """
    key = f"test/mAP_{convention}"
    path = workdir.path(LOG_NAME)
    rows = read_log(path) if os.path.exists(path) else []
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return None
    best = max(rows, key=lambda row: row[key])
    return {"epoch": best["epoch"], "mAP": best[key], "AP_convention": convention}


def _explain(
    built: Experiment, explain: Callable[[jax.Array], Any], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns images [n, H, W, 3], probabilities [n, C] and heat [n, h, w, C] of test images."""
    images = np.stack([built.dataset.test.images[i]["image"] for i in range(count)])
    at_once = built.eval_batch_size // built.mesh.size
    found = evaluate.explain(images, explain, built.options, mesh=built.mesh, at_once=at_once)
    return images, *found


def _write_predictions(path: str, built: Experiment, scores: np.ndarray) -> None:
    split = built.dataset.test
    npz.write(
        path,
        {
            "scores": scores,
            "labels": built.scored_labels(split),
            "ignore": split.difficult,
            "ids": np.asarray(split.ids, dtype=np.str_),
            "class_names": np.asarray(built.dataset.class_names, dtype=np.str_),
        },
    )


def _write_pictures(
    path: str,
    built: Experiment,
    explained: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    note: str,
) -> None:
    from clsl_jax import pictures  # matplotlib is slow to import

    images, probabilities, heat = explained
    test = built.dataset.test
    pictures.picture_sheet(
        path,
        images=images,
        labels=built.scored_labels(test)[: len(images)],
        probabilities=probabilities,
        heat=heat,
        class_names=built.dataset.class_names,
        names=test.ids[: len(images)],
        title=f"{built.dataset.name}: test images, {note}",
    )


def _print(
    log: RunLog,
    result: Mapping[str, Any],
    workdir: Workdir,
    name: str,
    *,
    tables: _Tables | None,
    pictured: bool,
) -> None:
    rows = []
    for row in result["results"]:
        if row["AP_convention"] != "interpolated":
            continue
        at = row["threshold_0.5"]
        numbers = (row["mAP"], at["CF1"], at["OF1"], row["top_3"]["CF1"], row["top_3"]["OF1"])
        label = f"{row['split']}, {row['weights']} (epoch {row['epoch']})"
        rows.append((label, *(percent(number) for number in numbers)))
    header = ("percent", "mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1")
    labels = result["labels"]
    share = labels["known_entries"] / labels["entries"]
    title = (
        f"{result['dataset']['name']}, {100 * share:.1f} % of the training labels known "
        f"({labels['protocol']}); AP interpolated"
    )
    absent = any(row["unknown"] == "negative" for row in result["results"])
    note = ", unknown labels scored as absent" if absent else ""
    log.table(title + note, header, rows)
    found = result["recovery"]
    if found.get("recovery/positive_recall") is not None:
        recall, right = (found[f"recovery/positive_{k}"] for k in ("recall", "precision"))
        rightly = "" if right is None else f", {100 * right:.1f} % of the recovered positives right"
        log.console.print(
            f"Hidden training labels: {100 * recall:.1f} % of the positives recovered{rightly}."
        )
    elif found:
        log.console.print(f"Unknown training labels: {recovery_line(found)}.")
    right = [
        f"{100 * found[key]:.1f} % of {found[f'recovery/held_out_{kind}s']:,} {kind}s"
        for kind in ("positive", "negative")
        if found.get(key := f"recovery/held_out_{kind}_precision") is not None
    ]
    if right:
        log.console.print(
            f"The same thresholds on held-out images: {', '.join(right)} right{note}."
        )
    names = [name, PREDICTIONS_NAME]
    if pictured:
        names.append(PICTURES_NAME)
    if tables is not None:
        names += [label_tables.RECOVERED_NAME, label_tables.PROBABILITIES_NAME]
    log.console.print("Written: " + ", ".join(workdir.path(n) for n in names))
