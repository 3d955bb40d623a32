"""The train state: all that a run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clsl_jax import label_statistics, sharding
from clsl_jax.checkpoint import LEFT_OUT
from clsl_jax.models.clsl import CLSL, backbone_of, head_of
from clsl_jax.models.graph import label_adjacency


@flax.struct.dataclass
class TrainState:
    """All that a training run carries from step to step.

    N is the number of training images padded to a multiple of 256, C the number of classes. How
    each array lies on the devices: `state_shardings`.

    Attributes:
      step: int32 [], updates done.
      params: {"model": Flax parameters, "label_embeddings": [C, E] if they are learned}.
      batch_stats: running means and variances of the batch norms.
      frozen: variables of a backbone that is not trained, {"params": ..., "batch_stats": ...};
        `params`, `batch_stats` and `opt_state` then have nothing of it. Else {}.
      opt_state: state of the optimiser.
      ema_params: exponential moving average of `params`.
      ema_batch_stats: exponential moving average of `batch_stats`.
      rng: uint32 key data; each step folds its number into it.
      label_embeddings: float32 [C, E], fixed embeddings of the label texts.
      adjacency: float32 [C, C], normalised label graph of the graph convolution.
      annotations: int8 [N, C], 1 positive, 0 negative, -1 unknown: all that training may see.
      scores: float32 [N, C] in [0, 1], the teacher's probabilities averaged over a row's visits
        (label estimates by `recovery.mode=estimate`, likenesses by `recovery.source=prototypes`).
      visits: int32 [N], how often the row's scores were updated.
      recovered: float32 [N, C] in [0, 1], recovered labels; known entries hold the label. After the
        last step they are what is handed out (`epoch_end.make_recover`).
      recovered_weight: float32 [N, C] in [0, 1], their weights in the loss; 0 where still unknown.
      memory: "prototypes" float32 [C, D] where labels are recovered from them or features blended
        with them; what `label_statistics.fit_statistics` keeps of the known labels where recovery
        or prediction use it; else {}.
      sums: float32 [] each, sums over the steps of the epoch so far; `steps` counts them.
      faults: int32 [N], steps with a row's image whose loss or gradient was not finite.
      fault_step: int32 [], the first of these steps, counted from 0; -1 if there was none.
      faulty_steps: int32 [], how many there were.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    frozen: Any
    opt_state: Any
    ema_params: Any
    ema_batch_stats: Any
    rng: jax.Array
    label_embeddings: jax.Array
    adjacency: jax.Array
    annotations: jax.Array
    scores: jax.Array
    visits: jax.Array
    recovered: jax.Array
    recovered_weight: jax.Array
    memory: Mapping[str, jax.Array]
    sums: Mapping[str, jax.Array]
    faults: jax.Array
    fault_step: jax.Array
    faulty_steps: jax.Array


_MIXTURE = 2**31 - 2  # folded into the run's key, as the numbers of steps are
MATRICES = ("annotations", "scores", "recovered", "recovered_weight")
SUM_NAMES = ("steps", "loss", "loss_known", "loss_recovered", "gradient_norm")


def init_state(
    model: CLSL,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    image_size: int,
    label_embeddings: jax.Array,
    annotations: jax.Array,
    learn_embeddings: bool,
    graph_threshold: float,
    graph_smoothing: float,
    prototypes: bool = False,
    components: int = 0,
    backbone: Mapping[str, Any] | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      model: called as `model(images, embeddings, adjacency, train=...)`.
      optimizer: updates `params`.
      seed: of the initial weights and of every random draw in training.
      image_size: side of the square images, in pixels.
      label_embeddings: float32 [C, E].
      annotations: int8 [N, C], N padded; rows without an image are -1.
      learn_embeddings: whether the embeddings are parameters.
      graph_threshold, graph_smoothing: of the label graph, see `label_adjacency`.
      prototypes: whether a prototype of each class is kept; needs srfl.
      components: of the mixture that is fitted to the known labels; 0 for none.
      backbone: `params` and `batch_stats` to start the backbone with, not drawn then. Needed where
        the model freezes it.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    known = annotations >= 0
    adjacency = label_adjacency(
        (annotations == 1).astype(jnp.float32),
        known.astype(jnp.float32),
        graph_threshold,
        graph_smoothing,
    )
    network, size = model, (2, image_size, image_size, 3)
    if backbone:
        # The network that draws is the head alone: the same draws, and nothing of a large backbone
        # is compiled for the sake of values that are thrown away.
        network = head_of(model)
        size, _ = backbone_shapes(model, image_size, batch_size=2)
    variables = network.init(
        init_key, jnp.zeros(size, jnp.float32), label_embeddings, adjacency, train=False
    )
    variables = {"batch_stats": {}, **variables}
    frozen: Any = {}
    if backbone and model.freeze_backbone:
        frozen = {"batch_stats": {}, **backbone}
    elif backbone:
        variables = with_backbone(variables, backbone)
    params = {"model": variables["params"]}
    if learn_embeddings:
        params["label_embeddings"] = label_embeddings
    batch_stats = variables["batch_stats"]
    shape = annotations.shape
    memory: dict[str, jax.Array] = {}
    if prototypes:
        width = variables["params"]["semantic"]["out"]["kernel"].shape[-1]
        memory["prototypes"] = jnp.zeros((shape[1], width), jnp.float32)
    if components:
        memory |= label_statistics.fit_statistics(
            jax.random.fold_in(step_key, _MIXTURE), annotations, components
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        frozen=frozen,
        opt_state=optimizer.init(params),
        # Copies: a donated buffer may stand in one place only.
        ema_params=jax.tree.map(jnp.copy, params),
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats),
        rng=jax.random.key_data(step_key),
        label_embeddings=label_embeddings,
        adjacency=adjacency,
        annotations=annotations,
        scores=jnp.zeros(shape, jnp.float32),
        visits=jnp.zeros(shape[:1], jnp.int32),
        recovered=(annotations == 1).astype(jnp.float32),
        recovered_weight=jnp.zeros(shape, jnp.float32),
        memory=memory,
        sums={name: jnp.zeros((), jnp.float32) for name in SUM_NAMES},
        faults=jnp.zeros(shape[:1], jnp.int32),
        fault_step=jnp.full((), -1, jnp.int32),
        faulty_steps=jnp.zeros((), jnp.int32),
    )


def backbone_shapes(
    model: CLSL, image_size: int, *, batch_size: int = 1
) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """Returns the shape [B, h, w, D] of what the backbone makes of square images, and the shapes of
    its variables."""
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32)
    network = backbone_of(model)

    def run(images: jax.Array) -> tuple[jax.Array, Any]:
        return network.init_with_output(jax.random.key(0), images, train=False)

    features, variables = jax.eval_shape(run, images)
    return features.shape, variables


def with_backbone(variables: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `params` and `batch_stats` of a head with those of a backbone, if any, beside them.

    Args:
      variables: of `CLSLHead`; returned as they are where `backbone` is empty.
      backbone: `params` and perhaps `batch_stats`, or nothing.
    """
    return {
        kind: {**tree, "backbone": backbone[kind]} if kind in backbone else tree
        for kind, tree in variables.items()
    }


# Parameters spread over the mesh axis `model`, by the last names of their path, and the axis that
# is: columns of a layer that widens, rows of the one after it; classes wherever there are any.
MODEL_SHARDED = {
    ("linear1", "kernel"): 1,
    ("linear2", "kernel"): 0,
    ("semantic", "hidden", "kernel"): 1,
    ("semantic", "out", "kernel"): 0,
    ("attention", "visual", "kernel"): 1,
    ("attention", "semantic", "kernel"): 1,
    ("mlp_hidden", "kernel"): 1,
    ("mlp_out", "kernel"): 1,
    ("global_branch", "kernel"): 1,
    ("pooled", "kernel"): 1,
    ("classifier", "kernel"): 0,
    ("label_embeddings",): 0,
}


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns a tree like `state` (arrays or their shapes) that holds each array's sharding.

    Matrices with a row for each image are spread by row over `data` and by class over `model`; the
    wide layers of the head, whatever has a size of C, and their moments and averages over `model`;
    all else, the backbone above all, is held whole by every device.
    """
    size = mesh.shape["model"]

    def of_weight(path: Any, x: Any) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        spec: list[str | None] = [None] * len(x.shape)
        for suffix, axis in MODEL_SHARDED.items():
            is_it = names[-len(suffix) :] == suffix and "backbone" not in names
            if is_it and x.shape[axis] % size == 0:
                spec[axis] = "model"
        return NamedSharding(mesh, PartitionSpec(*spec))

    matrix = sharding.by_row_and_class(mesh, state.annotations.shape[1])
    shardings = jax.tree_util.tree_map_with_path(of_weight, state)
    rows = sharding.by_row(mesh)
    return shardings.replace(**dict.fromkeys(MATRICES, matrix), visits=rows, faults=rows)


def weights_alone(abstract_state: TrainState, *, ema: bool) -> TrainState:
    """Returns what is to be restored of a state for `evaluation_weights`: without anything else.

    Neither the matrices of the training images, which a cluster may hold and one device may not,
    nor the optimiser's state, which is as large as the weights or twice that.
    """
    # Each leaf is an object of its own; one that was shared would be read needlessly.
    needed = {id(leaf) for leaf in jax.tree.leaves(evaluation_weights(abstract_state, ema=ema))}
    return jax.tree.map(lambda leaf: leaf if id(leaf) in needed else LEFT_OUT, abstract_state)


def evaluation_weights(state: TrainState, *, ema: bool) -> dict[str, Any]:
    """Returns what prediction needs of a state: the averaged weights, or the raw ones."""
    params = state.ema_params if ema else state.params
    batch_stats = state.ema_batch_stats if ema else state.batch_stats
    return {
        **with_backbone({"params": params["model"], "batch_stats": batch_stats}, state.frozen),
        "label_embeddings": params.get("label_embeddings", state.label_embeddings),
        "adjacency": state.adjacency,
        "statistics": {k: v for k, v in state.memory.items() if k != "prototypes"},
    }
