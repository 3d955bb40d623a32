"""The compiled steps: pure functions of the state and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from clsl_jax import losses, optim, recovery
from clsl_jax.models.graph import label_adjacency
from clsl_jax.train_state import SUM_NAMES, TrainState, with_backbone

Batch = Mapping[str, jax.Array]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the train step and the end of an epoch do, as plain values.

    Attributes mean what the configuration keys of the same names mean (`config.py`); lengths are in
    steps.
    """

    steps_per_epoch: int
    loss_name: str = "asl"
    gamma_pos: float = 0.0
    gamma_neg: float = 2.0
    clip: float = 0.0
    eps: float = 1e-5
    scale: str = "balanced"
    global_weight: float = 1.0
    recovery_mode: str = "epoch"
    recovery_weight: float = 0.8
    ramp_steps: int = 0
    sharpening: str = "safe"
    teacher: str = "ema"
    momentum: float = 0.8
    thresholds: str = "fixed"
    positive_threshold: float = 0.5
    negative_threshold: float = 0.5
    positive_precision: float = 0.9
    negative_precision: float = 0.985
    min_count: int = 5
    soft: bool = True
    confidence_power: float = 1.0
    warmup_steps: int = 0
    graph_layers: int = 0
    graph_threshold: float = 0.4
    graph_smoothing: float = 0.25
    graph_refresh: bool = True
    ema_decay: float = 0.9983
    evaluate_ema: bool = True


def normalize(images: jax.Array) -> jax.Array:
    """Returns float32 images with ImageNet's mean and standard deviation removed.

    Args:
      images: uint8 [B, H, W, 3], RGB; or the features of a frozen backbone, of a floating type
        [B, h, w, D], which are only cast.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32)
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32) * 255
    std = jnp.asarray(IMAGENET_STD, jnp.float32) * 255
    return (images.astype(jnp.float32) - mean) / std


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, batch) -> state`, pure and ready for `jax.jit`.

    The batch holds `image` uint8 [B, S, S, 3], `row` int32 [B] (the image's row in the matrices)
    and, where the teacher sees it, `clean`: the image before augmentation. With a `CLSLHead` as the
    model, images are the backbone's features, float [B, h, w, D].
    """
    elementwise = _elementwise_loss(options)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        rows = batch["row"]
        annotations = state.annotations[rows]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, ...]]:
            variables = {"params": params["model"], "batch_stats": state.batch_stats}
            (logits, out), updated = model.apply(
                with_backbone(variables, state.frozen),
                normalize(batch["image"]),
                params.get("label_embeddings", state.label_embeddings),
                state.adjacency,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            targets, weights = _targets(state, rows, logits, annotations, options)
            loss, terms = losses.clsl_loss(
                logits,
                out["global_logits"],
                annotations,
                targets,
                weights,
                elementwise=elementwise,
                scale=options.scale,
                recovered_scale=_recovered_scale(state.step, options),
                global_scale=options.global_weight,
            )
            batch_stats = dict(updated.get("batch_stats", {}))
            if state.frozen:
                batch_stats.pop("backbone", None)
            return loss, (terms, logits, batch_stats)

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (terms, logits, batch_stats)), gradients = gradient_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        scores, visits = state.scores, state.visits
        if options.recovery_mode == "epoch":
            taught = _teach(model, state, batch, logits, options)
            scores, visits = recovery.scatter_scores(scores, visits, rows, taught, options.momentum)

        step_sums = {
            "steps": jnp.ones(()),
            "loss": loss,
            "loss_known": terms["known"],
            "loss_recovered": terms["recovered"],
            "gradient_norm": optax.global_norm(gradients),
        }
        # The first step of an epoch starts the sums anew, so that no separate reset is needed and
        # the end of an epoch can be done again after an interruption.
        keep = (state.step % options.steps_per_epoch != 0).astype(jnp.float32)
        sums = {name: state.sums[name] * keep + step_sums[name] for name in SUM_NAMES}
        return state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=optim.ema_update(state.ema_params, params, options.ema_decay),
            ema_batch_stats=optim.ema_update(state.ema_batch_stats, batch_stats, options.ema_decay),
            scores=scores,
            visits=visits,
            sums=sums,
        )

    return train_step


def _elementwise_loss(options: StepOptions) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if options.loss_name == "bce":
        return losses.binary_cross_entropy

    def elementwise(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return losses.asymmetric_loss(
            logits,
            targets,
            gamma_pos=options.gamma_pos,
            gamma_neg=options.gamma_neg,
            clip=options.clip,
            eps=options.eps,
        )

    # The authors' program puts soft targets into the asymmetric loss itself.
    return elementwise if options.scale == "released" else losses.expected_loss(elementwise)


def _recovered_scale(step: jax.Array, options: StepOptions) -> jax.Array:
    if options.recovery_mode == "none":
        return jnp.zeros(())
    ramp = jnp.minimum(1.0, (step + 1) / options.ramp_steps) if options.ramp_steps else 1.0
    return jnp.asarray(options.recovery_weight * ramp, jnp.float32)


def _targets(
    state: TrainState,
    rows: jax.Array,
    logits: jax.Array,
    annotations: jax.Array,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array]:
    """Returns targets and weights [B, C] of the recovered term."""
    if options.recovery_mode == "online":
        targets = recovery.online_targets(logits, annotations, sharpening=options.sharpening)
        return targets, (annotations < 0).astype(jnp.float32)
    return state.recovered[rows], state.recovered_weight[rows]


def _teach(
    model: nn.Module, state: TrainState, batch: Batch, logits: jax.Array, options: StepOptions
) -> jax.Array:
    """Returns the teacher's calibrated probabilities [B, C], without gradient."""
    if options.teacher == "ema":
        variables = {"params": state.ema_params["model"], "batch_stats": state.ema_batch_stats}
        logits, _ = model.apply(
            with_backbone(variables, state.frozen),
            normalize(batch.get("clean", batch["image"])),
            state.ema_params.get("label_embeddings", state.label_embeddings),
            state.adjacency,
            train=False,
        )
    return calibrated(jax.lax.stop_gradient(logits), options)


def calibrated(logits: jax.Array, options: StepOptions) -> jax.Array:
    """Returns the probabilities that logits stand for under the loss they were trained by."""
    if options.loss_name == "bce":
        return jax.nn.sigmoid(logits)
    return losses.asymmetric_posterior(
        logits, gamma_pos=options.gamma_pos, gamma_neg=options.gamma_neg, clip=options.clip
    )


def recovery_thresholds(state: TrainState, options: StepOptions) -> tuple[jax.Array, jax.Array]:
    """Returns the thresholds of positives and negatives, [C] or scalar, as `recover` uses them."""
    if options.thresholds == "adaptive":
        return recovery.adaptive_thresholds(
            state.scores,
            state.annotations,
            state.visits,
            positive_precision=options.positive_precision,
            negative_precision=options.negative_precision,
            min_count=options.min_count,
        )
    return jnp.float32(options.positive_threshold), jnp.float32(options.negative_threshold)


def make_recover(options: StepOptions) -> Callable[[TrainState], TrainState]:
    """Returns `recover(state) -> state`, the end of an epoch: one call over the whole matrices.

    Done twice, it gives what it gives once.
    """

    def recover(state: TrainState) -> TrainState:
        if options.recovery_mode == "epoch":
            positive, negative = recovery_thresholds(state, options)
            recovered, weight = recovery.recover_labels(
                state.scores,
                state.visits,
                state.annotations,
                positive_threshold=positive,
                negative_threshold=negative,
                soft=options.soft,
                confidence_power=options.confidence_power,
                active=state.step >= options.warmup_steps,
            )
            state = state.replace(recovered=recovered, recovered_weight=weight)
        if options.graph_layers and options.graph_refresh and options.recovery_mode == "epoch":
            known = (state.annotations >= 0).astype(jnp.float32)
            adjacency = label_adjacency(
                state.recovered,
                known + state.recovered_weight,
                options.graph_threshold,
                options.graph_smoothing,
            )
            state = state.replace(adjacency=adjacency)
        return state

    return recover


def make_predict_step(
    model: nn.Module, *, explain: bool = False
) -> Callable[[Mapping[str, Any], jax.Array], Any]:
    """Returns `predict_step(weights, images)`, pure and ready for `jax.jit`.

    `weights` is what `evaluation_weights` returns. The result is the probabilities float32 [B, C];
    with `explain` also where each class was seen, [B, P, C], summing to 1 over positions, and the
    attention over classes at each position, [B, P, C] (None without SGFE).
    """

    def predict_step(weights: Mapping[str, Any], images: jax.Array) -> Any:
        logits, out = model.apply(
            {"params": weights["params"], "batch_stats": weights["batch_stats"]},
            normalize(images),
            weights["label_embeddings"],
            weights["adjacency"],
            train=False,
        )
        probabilities = jax.nn.sigmoid(logits)
        if explain:
            return probabilities, out.get("position_weights"), out.get("attention")
        return probabilities

    return predict_step
