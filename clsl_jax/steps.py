"""The compiled steps: pure functions of the state and a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clsl_jax import (
    blending,
    corrections,
    device_transforms,
    label_statistics,
    losses,
    optim,
    recovery,
    sharding,
)
from clsl_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD
from clsl_jax.models.clsl import Blend
from clsl_jax.outputs import calibrated, stated_log_odds
from clsl_jax.step_options import StepOptions
from clsl_jax.train_state import SUM_NAMES, TrainState, with_backbone

Batch = Mapping[str, jax.Array]
# Folded into a step's key; dropout has the key itself or its parts.
_AUGMENTATION, _BLENDING = 2**31 - 1, 2**31 - 3


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
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    *,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, batch) -> state`, pure and ready for `jax.jit`.

    The batch holds `image` uint8 [B, S, S, 3], `row` int32 [B] (the image's row in the matrices)
    and, where the teacher sees it, `clean`: the image before augmentation. With a `CLSLHead` as the
    model, images are the backbone's features, float [B, h, w, D].

    On a `mesh` with more than one device along `model`, the backbone has each of its images on one
    device, and the head those of its neighbours along `model` too, as its layers are divided there.
    """
    one_part = _make_part(_placed(model, mesh), options)
    parts = options.accumulate

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        rows = batch["row"]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if options.augment is not None:
            batch = _augmented(batch, jax.random.fold_in(key, _AUGMENTATION), options)
        whole: dict[str, Any] = {}
        if parts > 1:
            annotations = state.annotations[rows]
            whole["known_count"] = jnp.sum(annotations >= 0, dtype=jnp.float32)
            whole["entries"] = annotations.size
        work = functools.partial(one_part, state, whole)
        if parts == 1:
            gradients, terms, batch_stats, found = work(state.batch_stats, batch, key)
        else:
            gradients, terms, batch_stats, found = _in_parts(
                work, parts, state.batch_stats, batch, key
            )
        sound = found["sound"]
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(gradient_norm)
        # Where no image stands out, the gradient alone overflowed: every image had a part in it.
        faulty = ~finite & (~sound | sound.all())

        remembered = _remembered(state, rows, found, finite, options)
        step_sums = {
            "steps": jnp.ones(()),
            "loss": terms["loss"],
            "loss_known": terms["known"],
            "loss_recovered": terms["recovered"],
            "gradient_norm": gradient_norm,
        }
        # The first step of an epoch starts the sums anew, so that no separate reset is needed and
        # the end of an epoch can be done again after an interruption.
        keep = (state.step % options.steps_per_epoch != 0).astype(jnp.float32)
        carried = {name: state.sums[name] * keep for name in SUM_NAMES}
        learned = {
            "params": params,
            "batch_stats": batch_stats,
            "opt_state": opt_state,
            "ema_params": optim.ema_update(state.ema_params, params, options.ema_decay),
            "ema_batch_stats": optim.ema_update(
                state.ema_batch_stats, batch_stats, options.ema_decay
            ),
            "sums": {name: carried[name] + step_sums[name] for name in SUM_NAMES},
        }
        if options.skip_nonfinite:
            before = {name: getattr(state, name) for name in learned} | {"sums": carried}
            learned = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, before)
        return state.replace(
            step=state.step + 1,
            faults=state.faults.at[rows].add(faulty.astype(jnp.int32), mode="drop"),
            fault_step=jnp.where(finite | (state.fault_step >= 0), state.fault_step, state.step),
            faulty_steps=state.faulty_steps + (~finite).astype(jnp.int32),
            **remembered,
            **learned,
        )

    return train_step


def _make_part(
    model: nn.Module, options: StepOptions
) -> Callable[..., tuple[Any, Any, Any, dict[str, jax.Array]]]:
    """Returns `one_part(state, whole, batch_stats, part, key)`: what examples make of a state.

    That is (gradients, terms of the loss, batch_stats, what a row keeps: [b, ...] each). `whole` is
    empty or, of a part of a batch, `known_count` and `entries` of all of it (`losses.clsl_loss`).
    """
    elementwise = _elementwise_loss(options)

    def one_part(
        state: TrainState, whole: Mapping[str, Any], batch_stats: Any, part: Batch, key: jax.Array
    ) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, ...]]:
            variables = {"params": params["model"], "batch_stats": batch_stats}
            annotations = state.annotations[part["row"]]
            blended, blend = _blends(state, annotations, key, options)
            (logits, out), updated = model.apply(
                with_backbone(variables, state.frozen),
                normalize(part["image"]),
                params.get("label_embeddings", state.label_embeddings),
                state.adjacency,
                train=True,
                blend=blend,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            targets, weights = _targets(
                state, part["row"], logits, annotations, options, elementwise
            )
            scored = logits
            if options.loss_statistics:
                scored = informed_logits(state.memory, logits, annotations, options)
            loss, terms = losses.clsl_loss(
                scored,
                out["global_logits"],
                annotations,
                targets,
                weights,
                elementwise=elementwise,
                scale=options.scale,
                recovered_scale=_recovered_scale(state.step, options),
                global_scale=options.global_weight,
                smoothing=options.smoothing,
                **whole,
            )
            if options.expected_positives:
                loss += options.expected_positives * losses.expected_positives_loss(
                    stated_log_odds(logits, options), options.positives_per_image
                )
            if blend is not None:
                terms["recovered"] = sum(
                    blending.blending_loss(
                        other,
                        annotations,
                        where,
                        elementwise=elementwise,
                        share=options.blend_share,
                    )
                    for other, where in zip(out["blended_logits"], blended, strict=True)
                )
                loss += _recovered_scale(state.step, options) * terms["recovered"]
            new_stats = dict(updated.get("batch_stats", {}))
            if state.frozen:
                new_stats.pop("backbone", None)
            sound = jnp.isfinite(logits).all(axis=1)
            if out["global_logits"] is not None:
                sound &= jnp.isfinite(out["global_logits"]).all(axis=1)
            kept = (logits, sound, targets, out["semantic_features"])
            return loss, ({"loss": loss, **terms}, new_stats, kept)

        gradients, (terms, new_stats, kept) = jax.grad(loss_fn, has_aux=True)(state.params)
        logits, sound, targets, semantic = kept
        found = {"sound": sound}
        if options.keeps_scores:
            found["taught"], semantic = _teach(model, state, part, logits, semantic, options)
        if options.correction == "correct_for_good":
            found["corrected"] = targets
        if options.keeps_prototypes:
            found["semantic"] = semantic
        return gradients, terms, new_stats, found

    return one_part


def _blends(
    state: TrainState, annotations: jax.Array, key: jax.Array, options: StepOptions
) -> tuple[tuple[jax.Array, ...], Blend | None]:
    """Which labels [B, C] are blended (with the image before; with prototypes), and by what."""
    if options.recovery_mode != "blend":
        return (), None
    prototypes = state.memory["prototypes"]
    drawn = blending.one_unknown(jax.random.fold_in(key, _BLENDING), annotations, prototypes)
    drawn &= state.step >= options.warmup_steps
    where = (blending.known_before(annotations), drawn)

    def blend(semantic: jax.Array) -> list[jax.Array]:
        before = jnp.roll(semantic, 1, axis=0)
        pairs = zip((before, prototypes), where, strict=True)
        return [blending.blend(semantic, other, w, options.blend_share) for other, w in pairs]

    return where, blend


def _augmented(batch: Batch, key: jax.Array, options: StepOptions) -> Batch:
    image = device_transforms.augment_images(key, batch["image"], options.augment)
    clean = {"clean": batch["image"]} if options.clean_view else {}
    return {**batch, **clean, "image": image}


def _in_parts(
    one_part: Callable[[Any, Batch, jax.Array], tuple[Any, Any, Any, Any]],
    parts: int,
    batch_stats: Any,
    batch: Batch,
    key: jax.Array,
) -> tuple[Any, Any, Any, Any]:
    """Runs `one_part` on every `parts`-th example in turn; gradients and terms are summed.

    Batch statistics are of a part, and are recorded part after part.
    """

    def split(x: jax.Array) -> jax.Array:
        # Every device has examples that follow one another: each part takes some from all devices.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(carry: Any, inputs: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        sums, batch_stats = carry
        number, part = inputs
        *found, batch_stats, kept = one_part(batch_stats, part, jax.random.fold_in(key, number))
        return (jax.tree.map(jnp.add, sums, found), batch_stats), kept

    pieces = jax.tree.map(split, dict(batch))
    shapes = jax.eval_shape(
        lambda: one_part(batch_stats, jax.tree.map(lambda x: x[0], pieces), key)[:2]
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), list(shapes))
    (sums, batch_stats), kept = jax.lax.scan(
        body, (zeros, batch_stats), (jnp.arange(parts), pieces)
    )
    return sums[0], sums[1], batch_stats, jax.tree.map(joined, kept)


def _placed(model: nn.Module, mesh: Mesh | None) -> nn.Module:
    if mesh is None or mesh.shape["model"] == 1:
        return model
    where = sharding.by_row(mesh)
    return model.clone(place=lambda x: jax.lax.with_sharding_constraint(x, where))


def _elementwise_loss(options: StepOptions) -> Callable[[jax.Array, jax.Array], jax.Array]:
    if options.loss_name == "bce":
        return losses.binary_cross_entropy
    if options.loss_name == "hill":
        return functools.partial(losses.hill_loss, margin=options.margin)
    if options.loss_name == "focal_margin":
        return functools.partial(losses.focal_margin_loss, margin=options.margin)

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


def informed_logits(
    statistics: Mapping[str, jax.Array],
    logits: jax.Array,
    annotations: jax.Array,
    options: StepOptions,
) -> jax.Array:
    """A network's logits with what label statistics make of the image's other labels.

    The two form a product of experts, of which the network alone is trained: a label that its
    company makes likely teaches it little. Other labels that are unknown count by what the network
    says of them, as all do in a test image. Where the recovered labels are the network's own
    (source "scores"), those of unknown labels stay as they are.

    Args:
      statistics: from `label_statistics.fit_statistics`.
      logits: [B, C].
      annotations: [B, C].
      options: of the run; the loss is asl or bce.

    Returns:
      float32 [B, C]; calibrated, they are `label_statistics.informed_probabilities`. The gradient
      of each is that of its own logit.

    Source: Hinton, Training Products of Experts by Minimizing Contrastive Divergence, 2002; Clark
    et al., Don't Take the Easy Way Out, arXiv 1909.03683 (a fixed expert beside the trained one).
    """
    scores = jax.lax.stop_gradient(calibrated(logits, options))
    ratios = label_statistics.others_log_ratios(statistics, annotations, scores)
    if options.source == "scores":  # recovered labels are what the network alone says
        ratios = jnp.where(annotations >= 0, ratios, 0.0)
    if options.loss_name != "asl":
        return logits + ratios
    return losses.asymmetric_shift(
        logits, ratios, gamma_pos=options.gamma_pos, gamma_neg=options.gamma_neg
    )


def _recovered_scale(step: jax.Array, options: StepOptions) -> jax.Array:
    if options.recovery_mode == "none":
        return jnp.zeros(())
    ramp: Any = 1.0
    if options.ramp_steps:
        since = step - (options.warmup_steps if options.recovery_mode == "epoch" else 0)
        ramp = jnp.clip((since + 1) / options.ramp_steps, 0.0, 1.0)
    return jnp.asarray(options.recovery_weight * ramp, jnp.float32)


def _targets(
    state: TrainState,
    rows: jax.Array,
    logits: jax.Array,
    annotations: jax.Array,
    options: StepOptions,
    elementwise: losses.ElementwiseLoss,
) -> tuple[jax.Array, jax.Array]:
    """Returns targets and weights [B, C] of the recovered term."""
    if options.recovery_mode == "assume":
        epoch = state.step // options.steps_per_epoch
        growing = epoch if options.correction != "correct_for_good" else jnp.minimum(epoch, 1)
        targets, weights = corrections.assumed_targets(
            logits,
            elementwise(logits, jnp.full_like(logits, options.assumed)),
            annotations,
            state.recovered[rows] > 0.5,
            correction=options.correction,
            assumed=options.assumed,
            threshold=options.correction_threshold,
            share=options.correction_rate * growing,
            active=epoch > 0,
        )
        return targets, weights * (options.assumed_weight or 1.0 / max(annotations.shape[1] - 1, 1))
    if options.recovery_mode == "estimate":
        return _estimates(state, rows), jnp.ones(annotations.shape, jnp.float32)
    if options.recovery_mode == "online":
        # The released scale takes soft targets into the asymmetric loss as they are.
        calibrates = options.scale != "released"
        targets = recovery.online_targets(
            logits,
            annotations,
            sharpening=options.sharpening,
            log_odds=lambda x: stated_log_odds(x, options) if calibrates else x,
        )
        return targets, (annotations < 0).astype(jnp.float32)
    targets, weights = state.recovered[rows], state.recovered_weight[rows]
    if options.open_weight:
        weights = jnp.where((annotations < 0) & (weights == 0), options.open_weight, weights)
    return targets, weights


def _remembered(
    state: TrainState,
    rows: jax.Array,
    found: Mapping[str, jax.Array],
    finite: jax.Array,
    options: StepOptions,
) -> dict[str, Any]:
    """Returns what a step changes of the matrices and the memory, from what its rows keep."""
    kept = jnp.where(finite, rows, -1) if options.skip_nonfinite else rows
    changed: dict[str, Any] = {}
    if options.keeps_scores:
        momentum = options.momentum if options.recovery_mode == "epoch" else 0.0
        changed["scores"], changed["visits"] = recovery.scatter_scores(
            state.scores, state.visits, kept, found["taught"], momentum
        )
    if options.correction == "correct_for_good":
        changed["recovered"] = _correct_for_good(
            state.recovered, state.annotations, kept, found["corrected"]
        )
    if options.keeps_prototypes:
        before = state.memory["prototypes"]
        moved = blending.update_prototypes(
            before, found["semantic"], state.annotations[rows], options.ema_decay
        )
        changed["memory"] = {**state.memory, "prototypes": jnp.where(finite, moved, before)}
    return changed


def _estimates(state: TrainState, rows: jax.Array) -> jax.Array:
    """Label estimates [B, C]; 1/2 until a row was seen."""
    return jnp.where((state.visits[rows] == 0)[:, None], 0.5, state.scores[rows])


def _correct_for_good(
    recovered: jax.Array, annotations: jax.Array, rows: jax.Array, targets: jax.Array
) -> jax.Array:
    """Writes the unknown cells of a batch that were corrected to positives into their rows."""
    positive = (targets > 0.5) & (annotations[rows] < 0)
    rows = jnp.where(rows < 0, recovered.shape[0], rows)
    return recovered.at[rows].max(positive.astype(recovered.dtype), mode="drop")


def _teach(
    model: nn.Module,
    state: TrainState,
    batch: Batch,
    logits: jax.Array,
    semantic: jax.Array | None,
    options: StepOptions,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scores [B, C] that a step keeps, and the features [B, C, D] that they are of.

    The scores, without gradient, are the teacher's calibrated probabilities or, with recovery
    "estimate", the estimates one step on.
    """
    if options.recovery_mode == "estimate":
        estimates = corrections.estimate_update(
            _estimates(state, batch["row"]),
            stated_log_odds(logits, options),
            state.annotations[batch["row"]],
            rate=options.estimate_rate,
            positives=options.positives_per_image,
            positives_weight=options.expected_positives,
        )
        return estimates, semantic
    out: Mapping[str, Any] = {"semantic_features": semantic}
    if options.teacher == "ema":
        variables = {"params": state.ema_params["model"], "batch_stats": state.ema_batch_stats}
        logits, out = model.apply(
            with_backbone(variables, state.frozen),
            normalize(batch.get("clean", batch["image"])),
            state.ema_params.get("label_embeddings", state.label_embeddings),
            state.adjacency,
            train=False,
        )
        if options.branch == "global":
            logits = out["global_logits"]
        elif options.branch == "mean":
            logits = 0.5 * (logits + out["global_logits"])
    semantic = jax.lax.stop_gradient(out["semantic_features"])
    if options.source == "prototypes":
        return blending.prototype_scores(semantic, state.memory["prototypes"]), semantic
    return calibrated(jax.lax.stop_gradient(logits), options), semantic


def make_predict_step(
    model: nn.Module,
    options: StepOptions,
    *,
    explain: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[Mapping[str, Any], jax.Array], Any]:
    """Returns `predict_step(weights, images)`, pure and ready for `jax.jit`.

    `weights` is what `evaluation_weights` returns. The result is what the network says, float32
    [B, C]: the sigmoid of its logits or, with `options.evaluate_statistics`, the probabilities
    that label statistics make of it (`label_statistics.informed_probabilities`, no label known);
    with `explain` also where each class was seen, [B, P, C], summing to 1 over positions (None
    for a model without position logits).
    """
    model = _placed(model, mesh)

    def predict_step(weights: Mapping[str, Any], images: jax.Array) -> Any:
        logits, out = model.apply(
            {"params": weights["params"], "batch_stats": weights["batch_stats"]},
            normalize(images),
            weights["label_embeddings"],
            weights["adjacency"],
            train=False,
        )
        if options.evaluate_statistics:
            unknown = jnp.full(logits.shape, -1, jnp.int8)
            probabilities = label_statistics.informed_probabilities(
                weights["statistics"], unknown, calibrated(logits, options)
            )
        else:
            probabilities = jax.nn.sigmoid(logits)
        if explain:
            return probabilities, out["position_weights"]
        return probabilities

    return predict_step
