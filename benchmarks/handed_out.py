"""Are labels handed out as right as was asked for? Thresholds of known cells, and expected ones.

    PYTHONPATH=. python benchmarks/handed_out.py WORKDIR [WORKDIR ...]

Each WORKDIR is a finished run of `clsl_jax.main` with recovery, on a set whose hidden labels are
there to be looked up. Prints how often hidden training labels are positive where the run says so
with some probability, and what thresholds of each rule hand out, all runs together.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from finished_run import last_state
from rounds import markdown

from clsl_jax import epoch_end, recovery, sharding

EDGES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0)
RULES = {"known cells": recovery.adaptive_thresholds, "expected": recovery.expected_thresholds}
TARGETS = ((0.9, 0.985), (0.95, 0.99), (0.97, 0.998))


def last_scores(workdir: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, visits, annotations and full labels of a run's training images."""
    built, state = last_state(workdir)
    scores, visits = jax.device_get(epoch_end.recovery_scores(state, built.options.handing_out))
    labels = sharding.pad_rows(built.dataset.train.labels, -1)
    return scores, visits, jax.device_get(state.annotations), labels


def reliability(runs: list[tuple[np.ndarray, ...]]) -> list[list[str]]:
    """Hidden cells by stated probability: [range, cells, mean stated, share of positives]."""
    stated, positive = [], []
    for scores, visits, annotations, labels in runs:
        hidden = (annotations < 0) & (labels >= 0) & (visits > 0)[:, None]
        stated.append(scores[hidden])
        positive.append(labels[hidden] == 1)
    p, y = np.concatenate(stated), np.concatenate(positive)
    place = np.clip(np.searchsorted(EDGES, p, side="right") - 1, 0, len(EDGES) - 2)
    rows = []
    for k, (low, high) in enumerate(itertools.pairwise(EDGES)):
        cell = place == k
        means = [f"{100 * x[cell].mean():.1f}" if cell.any() else "" for x in (p, y)]
        rows.append([f"{100 * low:.0f} to {100 * high:.0f}", f"{cell.sum():,}", *means])
    return rows


def handed_out(runs: list[tuple[np.ndarray, ...]]) -> list[list[str]]:
    """[rule, asked for, precision and recall of positives, then negatives], of all runs."""
    rows = []
    for name, rule in RULES.items():
        for targets in TARGETS:
            counts = []
            for scores, visits, annotations, labels in runs:
                positive, negative = rule(
                    jnp.asarray(scores),
                    jnp.asarray(annotations),
                    jnp.asarray(visits),
                    positive_precision=targets[0],
                    negative_precision=targets[1],
                    min_count=5,
                )
                found = recovery.recover_labels(
                    scores,
                    visits,
                    annotations,
                    positive_threshold=positive,
                    negative_threshold=negative,
                    soft=False,
                )
                counts.append(recovery.recovery_counts(*found, annotations, labels))
            total = jax.tree.map(lambda *x: np.sum(x, axis=0), *counts)
            rates = recovery.recovery_summary(total)["overall"]
            kinds = ("positive_precision", "positive_recall", "negative_precision")
            numbers = [f"{100 * rates[k]:.1f}" for k in (*kinds, "negative_recall")]
            rows.append([name, f"{100 * targets[0]:g}, {100 * targets[1]:g}", *numbers])
    return rows


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    runs = [last_scores(workdir) for workdir in parser.parse_args().workdirs]
    header = ("stated, %", "hidden cells", "mean stated, %", "positive, %")
    print(markdown(f"{len(runs)} runs", header, reliability(runs)))
    header = ("thresholds", "asked for, %", "positives right", "found", "negatives right", "found")
    print(markdown("Handed out", header, handed_out(runs)))


if __name__ == "__main__":
    main()
