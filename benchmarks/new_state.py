"""State and batch of a train step that the benchmark programs run or compile."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from clsl_jax import sharding, train_state
from clsl_jax.models.clsl import CLSL

ROWS, EMBEDDING_DIM = 1024, 768


def inputs(batch: int, image_size: int, classes: int) -> dict[str, np.ndarray]:
    """Images, rows, embeddings and annotations (30 % known), drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    annotations = (rng.random((ROWS, classes)) < 0.1).astype(np.int8)
    annotations[rng.random(annotations.shape) > 0.3] = -1
    return {
        "images": rng.integers(0, 256, (batch, image_size, image_size, 3), np.uint8),
        "rows": rng.permutation(ROWS)[:batch].astype(np.int32),
        "embeddings": rng.standard_normal((classes, EMBEDDING_DIM)).astype(np.float32),
        "annotations": annotations,
    }


def initializer(
    model: CLSL, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array, jax.Array], train_state.TrainState]:
    """Returns what makes the state of label embeddings [C, E] and annotations [N, C]."""

    def init(embeddings: jax.Array, annotations: jax.Array) -> train_state.TrainState:
        return train_state.init_state(
            model,
            optimizer,
            seed=0,
            image_size=64,  # no parameter depends on it
            label_embeddings=embeddings,
            annotations=annotations,
            learn_embeddings=False,
            graph_threshold=0.4,
            graph_smoothing=0.25,
        )

    return init


def on_all_devices(
    model: CLSL, embeddings: np.ndarray, annotations: np.ndarray
) -> train_state.TrainState:
    """Returns the state of a model trained by AdamW, laid on all devices as a run lays its own."""
    state = jax.jit(initializer(model, optax.adamw(1e-4)))(embeddings, annotations)
    mesh = sharding.make_mesh()
    return jax.device_put(state, train_state.state_shardings(state, mesh))
