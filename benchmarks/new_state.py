"""The state of a train step that the benchmark programs run or compile."""

from collections.abc import Callable

import jax
import optax

from clsl_jax import train_state
from clsl_jax.models.clsl import CLSL


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
