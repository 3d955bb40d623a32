"""From a configuration to everything a run needs: data, known labels, model, optimiser, steps."""

import dataclasses
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clsl_jax import embed, optim, sharding, steps
from clsl_jax.data import partial, pipeline, sources, transforms
from clsl_jax.errors import InputError
from clsl_jax.models.backbone_weights import load_backbone
from clsl_jax.models.clsl import CLSL
from clsl_jax.models.resnet import BACKBONES


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration made concrete.

    Attributes:
      dataset: train, validation and test splits.
      mask: bool [N, C], True where a training label may be seen.
      annotations: int8 [N, C], 1 / 0 / -1 unknown: all that training sees of the labels.
      mesh: of devices.
      model: the Linen module.
      options: of the train step.
      label_embeddings: float32 [C, E], as the run starts with them.
      steps_per_epoch: full batches of the training split.
      total_steps: updates of the whole run.
      pretrained: file of backbone weights, or "".
      init: `init(label_embeddings, annotations) -> TrainState`, compiled.
      abstract_state: shapes, types and shardings of the state.
      optimizer: the gradient transformation.
      batch_size: of training, over all devices.
      eval_batch_size: of evaluation, over all devices.
    """

    dataset: sources.Dataset
    mask: np.ndarray
    annotations: np.ndarray
    mesh: Mesh
    model: Any
    options: steps.StepOptions
    label_embeddings: np.ndarray
    steps_per_epoch: int
    total_steps: int
    pretrained: str
    init: Callable[[jax.Array, jax.Array], steps.TrainState]
    abstract_state: steps.TrainState
    optimizer: optax.GradientTransformation
    batch_size: int
    eval_batch_size: int

    def new_state(self, report: Callable[[str], None] = lambda line: None) -> steps.TrainState:
        """Returns the state before the first step, with pretrained weights if any are named.

        Args:
          report: takes a line on the weights that were loaded.

        Raises:
          InputError: if the weights do not fit the backbone, naming the tensors.
        """
        annotations = sharding.pad_rows(self.annotations, partial.UNKNOWN)
        state = self.init(
            sharding.put_replicated(self.mesh, self.label_embeddings),
            sharding.put_global_rows(self.mesh, annotations),
        )
        if not self.pretrained:
            return state
        variables = {"params": state.params["model"], "batch_stats": state.batch_stats}
        variables, line = load_backbone(
            self.model.backbone, self.pretrained, jax.device_get(variables)
        )
        report(line)

        def put(tree: Any) -> Any:
            return sharding.put_replicated(self.mesh, tree)

        return state.replace(
            params={**state.params, "model": put(variables["params"])},
            batch_stats=put(variables["batch_stats"]),
            ema_params={**state.ema_params, "model": put(variables["params"])},
            ema_batch_stats=put(variables["batch_stats"]),
        )


def build(
    config: ml_collections.ConfigDict, *, devices: list[jax.Device] | None = None
) -> Experiment:
    """Loads the data and builds the model and its steps; compiles nothing yet.

    Args:
      config: validated.
      devices: to run on; all by default.

    Raises:
      InputError: if data and configuration do not fit each other, saying how.
    """
    mesh = sharding.make_mesh(devices)
    eval_batch_size = config.evaluation.batch_size or config.batch_size
    sharding.check_divides(config.batch_size, mesh)
    sharding.check_divides(eval_batch_size, mesh)
    dataset = load_data(config)
    labels = dataset.train.labels
    steps_per_epoch = pipeline.steps_per_epoch(len(labels), batch_size=config.batch_size)
    if steps_per_epoch == 0:
        raise InputError(
            f"batch_size={config.batch_size} is larger than the training split of "
            f"{len(labels)} images: choose a smaller one."
        )
    mask = partial.known_mask(
        config.labels.protocol, labels, config.labels.known_fraction, config.labels.seed
    )
    annotations = partial.annotate(labels, mask)
    model = build_model(config, len(dataset.class_names))
    options = step_options(config, steps_per_epoch)
    schedule = optim.one_cycle(
        config.optim.learning_rate,
        config.epochs * steps_per_epoch,
        warmup_fraction=config.optim.warmup_fraction,
    )
    optimizer = optim.adamw_cycled(
        schedule.learning_rate,
        schedule.beta1,
        weight_decay=config.optim.weight_decay,
        max_gradient_norm=config.optim.clip_norm,
    )
    embeddings = label_embeddings(config, dataset.class_names)

    def init(label_embeddings: jax.Array, annotations: jax.Array) -> steps.TrainState:
        return steps.init_state(
            model,
            optimizer,
            seed=config.seed,
            image_size=config.data.image_size,
            label_embeddings=label_embeddings,
            annotations=annotations,
            learn_embeddings=config.model.learn_embeddings,
            options=options,
        )

    shapes = (
        jax.ShapeDtypeStruct(embeddings.shape, jnp.float32),
        jax.ShapeDtypeStruct((sharding.padded_rows(len(labels)), labels.shape[1]), jnp.int8),
    )
    abstract = jax.eval_shape(init, *shapes)
    shardings = steps.state_shardings(abstract, sharding.by_row(mesh), sharding.replicated(mesh))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return Experiment(
        dataset=dataset,
        mask=mask,
        annotations=annotations,
        mesh=mesh,
        model=model,
        options=options,
        label_embeddings=embeddings,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        pretrained=config.model.pretrained,
        init=jax.jit(init, out_shardings=shardings),
        abstract_state=abstract,
        optimizer=optimizer,
        batch_size=config.batch_size,
        eval_batch_size=eval_batch_size,
    )


def load_data(config: ml_collections.ConfigDict) -> sources.Dataset:
    """Returns the data set that the configuration names."""
    sizes = dict(zip(("train", "validation", "test"), config.data.sizes, strict=False))
    return sources.load_dataset(
        config.data.name,
        directory=config.data.dir or None,
        image_size=config.data.image_size,
        seed=config.data.seed,
        strength=config.data.strength,
        sizes=sizes or None,
        validation_fraction=config.data.validation_fraction,
    )


def augmentation(config: ml_collections.ConfigDict) -> transforms.Augment:
    """Returns the augmentation that the configuration describes."""
    return transforms.Augment(
        flip=config.data.flip,
        randaugment_operations=config.data.randaugment_operations,
        randaugment_magnitude=config.data.randaugment_magnitude,
        cutout=config.data.cutout,
        color_jitter=config.data.color_jitter,
        translate=config.data.translate,
        scale=config.data.scale,
    )


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> CLSL:
    """Returns the model that the configuration describes."""
    m = config.model
    if m.backbone not in BACKBONES:
        raise InputError(f"model.backbone={m.backbone!r}: expected one of {', '.join(BACKBONES)}.")
    return CLSL(
        num_classes=num_classes,
        backbone=m.backbone,
        backbone_widths=tuple(m.widths) or None,
        encoder_layers=m.encoder_layers,
        encoder_heads=m.encoder_heads,
        encoder_mlp=m.encoder_mlp,
        encoder_dropout=m.encoder_dropout,
        encoder_norm_first=m.encoder_norm_first,
        positions=m.positions,
        srfl=m.srfl,
        sgfe=m.sgfe,
        global_branch=m.global_branch,
        graph_layers=config.graph.layers,
        rank=m.rank,
        head_dropout=m.head_dropout,
        dtype=jnp.dtype(m.dtype),
    )


def label_embeddings(config: ml_collections.ConfigDict, class_names: Sequence[str]) -> np.ndarray:
    """Returns float32 [C, E]: those of a file, or random directions of about unit length.

    Raises:
      InputError: if the file cannot be read or is not for these classes.
    """
    if config.model.embeddings != "random":
        return embed.load_embeddings(config.model.embeddings, class_names)
    width = config.model.embedding_dim
    draws = np.random.default_rng([config.seed, 1]).standard_normal((len(class_names), width))
    return (draws / np.sqrt(width)).astype(np.float32)


def step_options(config: ml_collections.ConfigDict, steps_per_epoch: int) -> steps.StepOptions:
    """Returns the configuration's part of the train step as plain values."""
    r, g, loss = config.recovery, config.graph, config.loss
    return steps.StepOptions(
        steps_per_epoch=steps_per_epoch,
        loss_name=loss.name,
        gamma_pos=loss.gamma_pos,
        gamma_neg=loss.gamma_neg,
        clip=loss.clip,
        eps=loss.eps,
        scale=loss.scale,
        global_weight=loss.global_weight,
        recovery_mode=r.mode,
        recovery_weight=r.weight,
        ramp_steps=round(r.ramp_epochs * steps_per_epoch),
        sharpening=r.sharpening,
        teacher=r.teacher,
        momentum=r.momentum,
        thresholds=r.thresholds,
        positive_threshold=r.positive_threshold,
        negative_threshold=r.negative_threshold,
        positive_precision=r.positive_precision,
        negative_precision=r.negative_precision,
        min_count=r.min_count,
        soft=r.soft,
        confidence_power=r.confidence_power,
        warmup_steps=r.warmup_epochs * steps_per_epoch,
        graph_layers=g.layers,
        graph_threshold=g.threshold,
        graph_smoothing=g.smoothing,
        graph_refresh=g.refresh,
        ema_decay=config.optim.ema_decay,
        evaluate_ema=config.evaluation.weights == "ema",
    )


def needs_clean_view(options: steps.StepOptions, config: ml_collections.ConfigDict) -> bool:
    """Returns whether batches carry the image before augmentation as well."""
    return (
        options.recovery_mode == "epoch"
        and options.teacher == "ema"
        and config.recovery.view == "clean"
    )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    names = ("clsl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
