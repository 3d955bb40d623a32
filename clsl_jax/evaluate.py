"""Prediction over a whole split, on any number of devices and processes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clsl_jax import outputs, sharding
from clsl_jax.data import images as images_lib
from clsl_jax.data import pipeline
from clsl_jax.step_options import StepOptions


def predict(
    images: images_lib.Images,
    weights: Mapping[str, Any],
    predict_step: Callable[[Mapping[str, Any], jax.Array], jax.Array],
    *,
    mesh: Mesh,
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Returns the probabilities float32 [N, C] of every image, on every process.

    Args:
      images: none of them is dropped; the last batch is padded and the padding is masked out.
      weights: of `train_state.evaluation_weights`.
      predict_step: compiled for `batch_size` images.
      mesh: of devices.
      batch_size: over all devices.
      poll: called before each batch; may raise to stop.
    """
    scores = np.zeros((len(images), len(weights["label_embeddings"])), np.float32)
    pending: list[tuple[Any, Any]] = []
    for batch in batches(images, mesh=mesh, batch_size=batch_size):
        poll()
        probabilities = predict_step(weights, batch["image"])
        pending.append((batch, probabilities))
        # So that the host prepares while the device works.
        if len(pending) > sharding.EVALUATION_AHEAD:
            _collect(scores, *pending.pop(0))
    for entry in pending:
        _collect(scores, *entry)
    return scores


def batches(
    images: images_lib.Images, *, mesh: Mesh, batch_size: int
) -> Iterator[Mapping[str, jax.Array]]:
    """Yields padded global batches: `image` [B, S, S, 3], `row` [B], `valid` [B]."""
    local = pipeline.eval_batches(
        images,
        batch_size=batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in local:
        yield sharding.put_rows(mesh, dict(batch))


def _collect(scores: np.ndarray, batch: Mapping[str, jax.Array], probabilities: jax.Array) -> None:
    rows, valid, values = gather((batch["row"], batch["valid"], probabilities))
    scores[rows[valid]] = values[valid]


def explain(
    images: np.ndarray,
    explain_step: Callable[[jax.Array], Any],
    options: StepOptions,
    *,
    mesh: Mesh,
    at_once: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns probabilities [n, C] of images and where each class was seen, on every process.

    Args:
      images: uint8 [n, S, S, 3].
      explain_step: `images -> (predictions, position weights)`.
      options: of the run: the probabilities are those that its predictions stand for.
      mesh: of devices.
      at_once: images that each device is given at a time, all of them the same ones.

    Returns:
      (probabilities, heat [n, h, w, C], summing to 1 over positions; None if the model has none).
    """
    count, size = len(images), min(at_once, len(images))
    padded = np.concatenate([images, np.repeat(images[-1:], -count % size, axis=0)])
    found = [
        gather(explain_step(sharding.put_replicated(mesh, padded[start : start + size])))
        for start in range(0, count, size)
    ]
    predictions = np.concatenate([part for part, _ in found])[:count]
    probabilities = np.array(outputs.stated_probabilities(predictions, options))
    if found[0][1] is None:
        return probabilities, None
    weights = np.concatenate([part for _, part in found])[:count]
    side = round(weights.shape[1] ** 0.5)
    return probabilities, weights.reshape(count, side, side, -1)


def gather(tree: Any) -> Any:
    """Returns global arrays as NumPy arrays; with several processes, every one must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
