"""An ablation with imported functions: what image, labels, and both tell of the hidden labels.

    PYTHONPATH=. python benchmarks/label_correlation.py WORKDIR

WORKDIR is a finished run of `clsl_jax.main`. Its last network is asked about the training images,
label statistics are fitted to the known labels alone, and each is scored on the hidden ones, which
nothing here learns from; then the same on the test images, of which no label is known.
"""

import dataclasses
import sys

import jax
import numpy as np
from finished_run import last_state
from rounds import markdown

from clsl_jax import evaluate, label_statistics, metrics, outputs, steps
from clsl_jax.train_state import evaluation_weights


def scored(probabilities: jax.Array, labels: np.ndarray, hidden: np.ndarray) -> list[str]:
    """[mean average precision in percent, log loss] over the hidden cells, [N, C] each."""
    p = np.asarray(probabilities, np.float64)
    value = metrics.mean_average_precision(p, np.where(hidden, labels, -1))
    right = np.where(labels == 1, p, 1 - p)[hidden]
    return [f"{100 * value:.2f}", f"{-np.log(np.maximum(right, 1e-6)).mean():.4f}"]


def main(workdir: str) -> None:
    """Prints the table of a run."""
    built, state = last_state(workdir)
    weights = evaluation_weights(state, ema=built.options.evaluate_ema)
    alone = dataclasses.replace(built.options, evaluate_statistics=False)
    predict = jax.jit(steps.make_predict_step(built.model, alone))
    kept = label_statistics.fit_statistics(jax.random.key(0), built.annotations, components=12)

    rows = []
    unknown = np.full(built.dataset.test.labels.shape, -1, np.int8)
    for name, split, known in (
        ("hidden training labels", built.dataset.train, built.annotations),
        ("test", built.dataset.test, unknown),
    ):
        sigmoid = evaluate.predict(split.images, weights, predict, mesh=built.mesh, batch_size=250)
        image = outputs.stated_probabilities(sigmoid, alone)
        labels = label_statistics.informed_probabilities(kept, known)
        both = label_statistics.informed_probabilities(kept, known, image)
        hidden = (known < 0) & (split.labels >= 0)
        for what, found in (("image", image), ("labels", labels), ("both", both)):
            rows.append([f"{name}, {what}", *scored(found, split.labels, hidden)])
    print(markdown(workdir, ["from", "mAP", "log loss"], rows))


if __name__ == "__main__":
    main(sys.argv[1])
