"""From a configuration to everything a run needs: data, known labels, model, optimiser, steps."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from clsl_jax import cluster, embed, features, optim, sharding, train_state
from clsl_jax.config import ConfigError
from clsl_jax.data import label_file, partial, pipeline, scenes, sources, transforms
from clsl_jax.errors import InputError, listed
from clsl_jax.models import efficientnet
from clsl_jax.models.backbone_weights import load_backbone
from clsl_jax.models.clsl import CLSL, head_of
from clsl_jax.step_options import StepOptions
from clsl_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Network:
    """What a checkpoint is of: a model and its state, without any data.

    Attributes:
      mesh: of devices.
      model: the Linen module, from images on.
      options: of the train step.
      label_embeddings: float32 [C, E], as the run starts with them.
      pretrained: file of backbone weights, 'installed', or "".
      features_shape: [h, w, D], what this backbone makes of an image; () without such weights.
      backbone_shapes: of the variables that this file fills; {} without one.
      init: `init(label_embeddings, annotations, backbone variables) -> TrainState`, compiled.
      abstract_state: shapes, types and shardings of the state.
      optimizer: the gradient transformation.
    """

    mesh: Mesh
    model: CLSL
    options: StepOptions
    label_embeddings: np.ndarray
    pretrained: str
    features_shape: tuple[int, ...]
    backbone_shapes: Mapping[str, Any]
    init: Callable[[jax.Array, jax.Array, Any], TrainState]
    abstract_state: TrainState
    optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Experiment(Network):
    """A configuration made concrete: a network and what it is trained and evaluated on.

    Attributes:
      dataset: train, validation and test splits.
      annotations: int8 [N, C], 1 / 0 / -1 unknown: all that training sees of the labels.
      step_model: what train and predict step call: `model`, or its head where the features of a
        frozen backbone are computed once.
      input_shape, input_dtype: of an image, or of its features, as the steps take them.
      steps_per_epoch: full batches of the training split.
      total_steps: updates of the whole run.
      batch_size: of training, over all devices.
      eval_batch_size: of evaluation, over all devices.
      unknown: what unknown labels are when predictions are scored: `ignored` or `negative`.
    """

    dataset: sources.Dataset
    annotations: np.ndarray
    step_model: Any
    input_shape: tuple[int, ...]
    input_dtype: Any
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    eval_batch_size: int
    unknown: str

    def new_state(self, report: Callable[[str], None] = lambda line: None) -> TrainState:
        """Returns the state before the first step, with pretrained weights if any are named.

        Args:
          report: takes a line on the weights that were loaded.

        Raises:
          InputError: if the weights do not fit the backbone, naming the tensors.
        """
        backbone: Mapping[str, Any] = {}
        if self.pretrained:
            backbone, line = cluster.agree(self._read_backbone)
            report(line)
        elif self.model.backbone != "small":
            report(
                f"The {self.model.backbone} starts from random weights: model.pretrained is empty."
            )
        return self.init(
            sharding.put_replicated(self.mesh, self.label_embeddings),
            sharding.put_matrix(self.mesh, sharding.pad_rows(self.annotations, partial.UNKNOWN)),
            sharding.put_replicated(self.mesh, backbone),
        )

    def _read_backbone(self) -> tuple[Mapping[str, Any], str]:
        file = backbone_file(self.pretrained, self.model.backbone)
        return load_backbone(self.model.backbone, file, self.backbone_shapes)

    def scored_labels(self, split: sources.Split) -> np.ndarray:
        """Returns the labels int8 [N, C] that predictions of a split are scored by."""
        return scored_labels(split.labels, self.unknown)

    @property
    def mask(self) -> np.ndarray:
        """bool [N, C], True where a training label may be seen."""
        return self.annotations >= 0

    @property
    def caches_features(self) -> bool:
        """Whether the steps take features of the frozen backbone in place of images."""
        return self.step_model is not self.model


def build(
    config: ml_collections.ConfigDict,
    *,
    embeddings_file: str = "",
    report: Callable[[str], None] = lambda line: None,
    training: bool = True,
) -> Experiment:
    """Loads the data and builds the model and its steps; compiles nothing yet.

    Args:
      config: validated.
      embeddings_file: a run's own copy of its label embeddings, used if it exists.
      report: takes a line where images are decoded into a cache, labels read from a file, or known
        labels will teach or show little.
      training: whether it is to be trained, for which some labels have to be known to be absent.

    Raises:
      InputError: if data and configuration do not fit each other, saying how.
    """
    mesh = sharding.make_mesh(model=config.mesh.model)
    eval_batch_size = config.evaluation.batch_size or config.batch_size
    sharding.check_divides("batch_size", config.batch_size, mesh, parts=config.optim.accumulate)
    sharding.check_divides("evaluation.batch_size", eval_batch_size, mesh)
    dataset = load_data(config, report)
    labels = dataset.train.labels
    rows, along_data = sharding.padded_rows(len(labels)), mesh.shape["data"]
    if rows % along_data:
        raise InputError(
            f"{rows:,} rows of labels do not spread over {along_data} devices: use 1, 2, 4, 8 or "
            f"another power of two of them, up to {sharding.ROW_MULTIPLE}, or set mesh.model so "
            "that so many are left along data."
        )
    steps_per_epoch = pipeline.steps_per_epoch(len(labels), batch_size=config.batch_size)
    if steps_per_epoch == 0:
        fits = 2 ** (max(len(labels), 1).bit_length() - 1)
        raise InputError(
            f"batch_size={config.batch_size} is larger than the training split of "
            f"{len(labels)} images: choose a smaller one, such as --config.batch_size={fits}."
        )
    annotations = known_labels(config, dataset, report)
    options = dataclasses.replace(
        step_options(config, steps_per_epoch),
        positives_per_image=_positives_per_image(config, annotations, dataset.class_names),
    )
    if options.needs_statistics:
        _check_statistics(annotations, dataset.class_names)
    if training:
        _check_known(config, options, annotations, dataset.class_names, report)
    _check_selection(config, dataset, annotations, report)
    network = build_network(
        config,
        options,
        mesh=mesh,
        class_names=dataset.class_names,
        images=len(labels),
        embeddings_file=embeddings_file,
    )
    caches_features = _caches_features(config, network.features_shape, dataset)
    size = config.data.image_size
    return Experiment(
        **vars(network),
        dataset=dataset,
        annotations=annotations,
        step_model=head_of(network.model) if caches_features else network.model,
        input_shape=network.features_shape if caches_features else (size, size, 3),
        input_dtype=features.DTYPE if caches_features else np.uint8,
        steps_per_epoch=steps_per_epoch,
        total_steps=options.total_steps,
        batch_size=config.batch_size,
        eval_batch_size=eval_batch_size,
        unknown=config.evaluation.unknown,
    )


def build_together(
    config: ml_collections.ConfigDict,
    *,
    embeddings_file: str = "",
    report: Callable[[str], None] = lambda line: None,
    training: bool = True,
) -> Experiment:
    """Does `build` in every process of a run, and checks that all have the same data.

    Raises:
      InputError: as `build`, in every process whichever it happened in; or if the processes have
        different images, known labels or label embeddings.
    """
    built = cluster.agree(
        lambda: build(config, embeddings_file=embeddings_file, report=report, training=training)
    )
    cluster.check_alike(
        {
            "images": built.dataset.fingerprint,
            "known labels": partial.matrix_sha256(built.annotations),
            "label embeddings": built.label_embeddings.tobytes().hex(),
        }
    )
    return built


def build_network(
    config: ml_collections.ConfigDict,
    options: StepOptions,
    *,
    mesh: Mesh,
    class_names: Sequence[str],
    images: int,
    embeddings_file: str = "",
) -> Network:
    """Builds what checkpoints of a run are of, without its data; compiles nothing yet.

    Args:
      config: validated.
      options: of the train step, of `step_options`.
      mesh: of devices.
      class_names: C names.
      images: of the training split.
      embeddings_file: as of `build`.

    Raises:
      InputError: if no such network can be built, saying why.
    """
    model = build_model(config, len(class_names))
    pretrained = config.model.pretrained
    features_shape, backbone_shapes = (), {}
    if pretrained:
        with _building():
            (_, *features_shape), backbone_shapes = train_state.backbone_shapes(
                model, config.data.image_size
            )
    schedule = optim.one_cycle(
        config.optim.learning_rate,
        options.total_steps,
        warmup_fraction=config.optim.warmup_fraction,
    )
    optimizer = optim.adamw_cycled(
        schedule.learning_rate,
        schedule.beta1,
        weight_decay=config.optim.weight_decay,
        max_gradient_norm=config.optim.clip_norm,
    )
    embeddings = label_embeddings(config, class_names, embeddings_file)

    def init(label_embeddings: jax.Array, annotations: jax.Array, backbone: Any) -> TrainState:
        return train_state.init_state(
            model,
            optimizer,
            seed=config.seed,
            image_size=config.data.image_size,
            label_embeddings=label_embeddings,
            annotations=annotations,
            learn_embeddings=config.model.learn_embeddings,
            graph_threshold=options.graph_threshold,
            graph_smoothing=options.graph_smoothing,
            prototypes=options.keeps_prototypes,
            components=options.components if options.needs_statistics else 0,
            backbone=backbone,
        )

    # Placed as `Experiment.new_state` places them, so that one trace of `init` serves both.
    everywhere = sharding.replicated(mesh)
    divided = sharding.by_row_and_class(mesh, len(class_names))
    matrix_shape = sharding.padded_rows(images), len(class_names)
    shapes = (
        jax.ShapeDtypeStruct(embeddings.shape, jnp.float32, sharding=everywhere),
        jax.ShapeDtypeStruct(matrix_shape, jnp.int8, sharding=divided),
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), backbone_shapes
        ),
    )
    with _building():
        abstract = jax.eval_shape(init, *shapes)
    shardings = train_state.state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return Network(
        mesh=mesh,
        model=model,
        options=options,
        label_embeddings=embeddings,
        pretrained=pretrained,
        features_shape=tuple(features_shape),
        backbone_shapes=backbone_shapes,
        init=jax.jit(init, out_shardings=shardings),
        abstract_state=abstract,
        optimizer=optimizer,
    )


@contextlib.contextmanager
def _building() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"No network can be built of the keys model.*: {error}") from error


def backbone_file(pretrained: str, backbone: str) -> str:
    """Returns the file of the weights that `model.pretrained` names.

    Raises:
      InputError: if the weights of an installed package are asked for and not to be had.
    """
    if pretrained != "installed":
        return pretrained
    if backbone != "efficientnet_lite0":
        raise ConfigError(
            "model.pretrained=installed: only model.backbone=efficientnet_lite0 has weights in an "
            f"installable package, found {backbone!r}; name a file of weights."
        )
    return os.fspath(efficientnet.weights_path())


def _features_stay(config: ml_collections.ConfigDict) -> bool:
    """Whether an image's features are the same all through a run."""
    return config.model.freeze == "backbone" and augmentation(config).is_identity


def _caches_features(
    config: ml_collections.ConfigDict, shape: tuple[int, ...], dataset: sources.Dataset
) -> bool:
    """Whether features of `shape` [h, w, D] are computed once: they stay, and there is room."""
    if not _features_stay(config):
        return False
    splits = ("train", *scored_splits(config, dataset))
    count = sum(len(getattr(dataset, name).labels) for name in splits)
    return features.size_in_bytes(shape, count) <= config.model.feature_cache_gb * 2**30


def load_data(
    config: ml_collections.ConfigDict, report: Callable[[str], None] = lambda line: None
) -> sources.Dataset:
    """Returns the data set that the configuration names."""
    cache = config.data.cache
    if cache == "auto" and _features_stay(config) and config.model.feature_cache_gb > 0:
        cache = "none"  # each image is read once, if at all
    sizes = dict(zip(sources.SPLITS, config.data.sizes, strict=False))
    return sources.load_dataset(
        config.data.name,
        directory=config.data.dir or None,
        image_size=config.data.image_size,
        seed=config.data.seed,
        strength=config.data.strength,
        sizes=sizes or None,
        validation_fraction=config.data.validation_fraction,
        without_labels=config.data.without_labels,
        cache=cache,
        cache_gb=config.data.cache_gb,
        report=report,
    )


def known_labels(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    report: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """Returns the annotations int8 [N, C] of the training split: all that training sees of labels.

    Raises:
      InputError: if the protocol is unknown, or its file not for this data.
    """
    train = dataset.train
    if config.labels.protocol == "file":
        annotations = label_file.read_label_file(
            config.labels.file, ids=train.ids, class_names=dataset.class_names, labels=train.labels
        )
        known = annotations >= 0
        report(
            f"{config.labels.file}: {known.sum():,} known labels of {known.any(axis=1).sum():,} of "
            f"the {len(known):,} training images"
        )
        return annotations
    mask = partial.known_mask(
        config.labels.protocol, train.labels, config.labels.known_fraction, config.labels.seed
    )
    return partial.annotate(train.labels, mask)


def _positives_per_image(
    config: ml_collections.ConfigDict, annotations: np.ndarray, class_names: Sequence[str]
) -> float:
    """Returns how many positives an image is expected to have, where the loss asks for it.

    Raises:
      InputError: if the known labels cannot tell.
    """
    if config.loss.positives_per_image or not config.loss.expected_positives:
        return config.loss.positives_per_image
    if named := listed(_always_there(annotations, class_names), 5):
        raise InputError(
            "loss.expected_positives needs the number of positives an image has, which known "
            f"positives alone do not tell, and no negative is known of {named}: set "
            "loss.positives_per_image."
        )
    positives, negatives = (annotations == 1).sum(axis=0), (annotations == 0).sum(axis=0)
    return float((positives / np.maximum(positives + negatives, 1)).sum())


def _check_statistics(annotations: np.ndarray, class_names: Sequence[str]) -> None:
    """Refuses label statistics of classes that by the known labels are always there."""
    if named := listed(_always_there(annotations, class_names), 5):
        raise InputError(
            "Label statistics (loss.statistics, evaluation.statistics, recovery.source=statistics "
            "or both) need known negatives beside known positives, and there are none of "
            f"{named}: label some images as negative for these, or turn them off."
        )


def _check_known(
    config: ml_collections.ConfigDict,
    options: StepOptions,
    annotations: np.ndarray,
    class_names: Sequence[str],
    report: Callable[[str], None],
) -> None:
    """Refuses no known label; or positives alone, if nothing else says that some may be absent."""
    given = f" in {config.labels.file}" if config.labels.protocol == "file" else ""
    if not (annotations >= 0).any():
        raise InputError(
            f"No training label is known{given}, so that nothing can be learned; expected 1 or 0 "
            "in some cells of training images."
        )
    assumed = options.recovery_mode == "assume" or (
        options.recovery_mode == "epoch" and options.open_weight > 0
    )
    if options.expected_positives or (assumed and options.recovery_weight > 0):
        return
    if not (annotations == 0).any():
        absent = (
            "write 0 there"
            if given
            else "prepare it with --empty=negative (what its lists leave out: --unlisted=negative)"
        )
        raise InputError(
            f"No training label is known to be absent{given}, and from known positives alone a "
            "network learns that everything is in every image. If what a table leaves empty is not "
            f"there, {absent}; if it may be there, train by configs/table.py:positives, or set as "
            "there recovery.mode=epoch, recovery.open_weight=1 and evaluation.unknown=negative."
        )
    if named := _always_there(annotations, class_names):
        report(
            f"Of {len(named)} of {len(class_names)} classes no training label is known to be "
            f"absent, so that they will be found in every image: {listed(named, 5)}."
        )


def _always_there(annotations: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Returns the classes of which positives are known and no negative is."""
    positives, negatives = ((annotations == kind).any(axis=0) for kind in (1, 0))
    return [class_names[c] for c in np.flatnonzero(positives & ~negatives)]


def _check_selection(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    annotations: np.ndarray,
    report: Callable[[str], None],
) -> None:
    """Refuses splits that cannot pick an epoch, or would by hidden labels of training images."""
    train = dataset.train
    evaluated = scored_splits(config, dataset)
    for name in sources.SPLITS:
        split = getattr(dataset, name)
        if not len(split.labels):
            raise InputError(
                f"The {name} split has no image. It takes some: prepare the data with rows for it, "
                f"or raise --config.data.validation_fraction={config.data.validation_fraction}."
            )
        scored = name == config.evaluation.selection
        labels = scored_labels(split.labels, config.evaluation.unknown)
        there, absent = (((labels == kind) & ~split.difficult).any(axis=0) for kind in (1, 0))
        if scored and not there.any():
            raise InputError(
                f"No image of the {name} split is labelled as positive for any class, so that no "
                "epoch could be picked by it: label some of its images, or pick by another split "
                "(evaluation.selection)."
            )
        if name in evaluated and not there.any():
            report(
                f"No image of the {name} split is labelled as positive for any class: it will have "
                "no mAP."
            )
        if there.any() and not (there & absent).any():
            found = (
                f"Of no class has the {name} split a label that is known to be absent beside one "
                "that is there, so that every mAP would be 100 %: "
            )
            advice = "count what is unknown as absent (evaluation.unknown=negative)"
            if scored:
                raise InputError(
                    f"{found}label some of its images, {advice}, or pick by another split "
                    "(evaluation.selection)."
                )
            if name in evaluated:
                report(f"{found}label some of its images, or {advice}.")
    if (
        config.evaluation.selection == "validation"
        and dataset.validates_on_train
        and (annotations != train.labels).any()
    ):
        raise InputError(
            "data.validation_fraction=0 validates on the training images, whose hidden labels "
            "would pick the best epoch: set a fraction, or evaluation.selection=test."
        )


def scored_labels(labels: np.ndarray, unknown: str) -> np.ndarray:
    """Returns labels int8 [N, C] to score predictions by; `unknown` is `ignored` or `negative`."""
    return np.maximum(labels, 0) if unknown == "negative" else labels


def scored_splits(config: ml_collections.ConfigDict, dataset: sources.Dataset) -> tuple[str, ...]:
    """Returns the splits to evaluate: training images as validation only where these may select."""
    if dataset.validates_on_train and config.evaluation.selection == "test":
        return ("test",)
    return ("validation", "test")


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


def augmentation_on(place: str, config: ml_collections.ConfigDict) -> transforms.Augment | None:
    """Returns the augmentation that the `host` or the `device` does, None if it does none."""
    augment = augmentation(config)
    return None if augment.is_identity or config.data.augment_on != place else augment


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> CLSL:
    """Returns the model that the configuration describes."""
    m = config.model
    if m.attention_kernel:
        from clsl_jax.models import attention_kernel  # Pallas takes its time to import

        if attention_kernel.triton is None:
            raise InputError(
                f"model.attention_kernel=True: jax {jax.__version__} has no "
                "jax.experimental.pallas.triton. Set it to False, with which a run may go on too."
            )
        # Or a program for several devices is never found in the compilation cache.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
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
        position_residual=m.position_residual,
        sgfe=m.sgfe,
        global_branch=m.global_branch,
        graph_layers=config.graph.layers,
        rank=m.rank,
        attention_kernel=m.attention_kernel,
        head_dropout=m.head_dropout,
        freeze_backbone=m.freeze == "backbone",
        remat=m.remat == "blocks",
        dtype=jnp.dtype(m.dtype),
    )


def label_embeddings(
    config: ml_collections.ConfigDict, class_names: Sequence[str], copy: str = ""
) -> np.ndarray:
    """Returns float32 [C, E]: those of a file, or random directions of about unit length.

    'scenes' names the file of the embedded set, so that a run does not depend on where it lies.
    `copy`, if that file exists, holds what a run was started with.

    Raises:
      InputError: if the file cannot be read or is not for these classes.
    """
    if copy and os.path.exists(copy):
        remedy = (
            "The run in this workdir was started with these classes: start anew in another "
            "--workdir, or bring back the data set that it had."
        )
        return embed.load_embeddings(copy, class_names, remedy=remedy)
    named = config.model.embeddings
    if named != "random":
        path = os.fspath(scenes.LABEL_EMBEDDINGS) if named == "scenes" else named
        return embed.load_embeddings(path, class_names)
    width = config.model.embedding_dim
    draws = np.random.default_rng([config.seed, 1]).standard_normal((len(class_names), width))
    return (draws / np.sqrt(width)).astype(np.float32)


def step_options(config: ml_collections.ConfigDict, steps_per_epoch: int) -> StepOptions:
    """Returns the configuration's part of the train step as plain values."""
    r, g, loss = config.recovery, config.graph, config.loss
    return StepOptions(
        steps_per_epoch=steps_per_epoch,
        loss_name=loss.name,
        gamma_pos=loss.gamma_pos,
        gamma_neg=loss.gamma_neg,
        clip=loss.clip,
        eps=loss.eps,
        scale=loss.scale,
        global_weight=loss.global_weight,
        margin=loss.margin,
        smoothing=loss.smoothing,
        expected_positives=loss.expected_positives,
        recovery_mode=r.mode,
        assumed=r.assumed,
        assumed_weight=r.assumed_weight,
        open_weight=r.open_weight,
        correction=r.correction,
        correction_threshold=r.correction_threshold,
        correction_rate=r.correction_rate,
        estimate_rate=r.estimate_rate,
        blend_share=r.blend_share,
        source=r.source,
        components=r.components,
        branch=r.branch,
        recovery_weight=r.weight,
        ramp_steps=round(r.ramp_epochs * steps_per_epoch),
        sharpening=r.sharpening,
        teacher=r.teacher,
        momentum=r.momentum,
        thresholds=r.thresholds,
        positive_threshold=r.positive_threshold,
        negative_threshold=r.negative_threshold,
        calibration=r.calibration,
        positive_precision=r.positive_precision,
        negative_precision=r.negative_precision,
        min_count=r.min_count,
        min_known=r.min_known,
        positive_coverage=r.positive_coverage,
        negative_coverage=r.negative_coverage,
        soft=r.soft,
        confidence_power=r.confidence_power,
        # The first recovery is at the end of an epoch.
        warmup_steps=max(r.warmup_epochs, int(r.mode == "epoch")) * steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        graph_layers=g.layers,
        graph_threshold=g.threshold,
        graph_smoothing=g.smoothing,
        graph_refresh=g.refresh,
        ema_decay=config.optim.ema_decay,
        accumulate=config.optim.accumulate,
        augment=augmentation_on("device", config),
        clean_view=r.view == "clean",
        skip_nonfinite=config.optim.skip_nonfinite,
        evaluate_statistics=config.evaluation.statistics,
        loss_statistics=config.loss.statistics,
        evaluate_ema=config.evaluation.weights == "ema",
    )


def needs_clean_view(options: StepOptions, config: ml_collections.ConfigDict) -> bool:
    """Returns whether batches carry the image before augmentation as well."""
    return (
        options.recovery_mode == "epoch"
        and options.keeps_scores
        and options.teacher == "ema"
        and options.clean_view
        and augmentation_on("host", config) is not None
    )


def _sources_sha256() -> str:
    """Returns a digest of the package's own modules: what tells one state of it from another."""
    package = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.glob("**/*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# As the program starts: the files may be others when its results are written.
_SOURCES = _sources_sha256()


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on, with a digest of the package's sources."""
    names = ("clsl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["clsl_jax"] += f" (sources {_SOURCES[:12]})"
    return found
