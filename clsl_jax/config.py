"""The configuration: every key with its default, how it is checked and how it is compared.

Configurations are `ml_collections.ConfigDict`s made by `configs/*.py` from `base_config()`. They
stay at the edges: modules and pure functions take plain keyword arguments.
"""

import difflib
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections

from clsl_jax.errors import InputError


class ConfigError(InputError):
    """A configuration that cannot be used; names each key, what was found and what expected."""


def base_config() -> ml_collections.ConfigDict:
    """Returns every key with a neutral default; `configs/*.py` start from here.

    The meaning of each key stands beside it. Numbers that matter for a result are set by the
    configuration files, whose docstrings give the recipe.
    """
    c = ml_collections.ConfigDict()
    c.seed = 0  # initial weights, shuffling, augmentation, dropout
    c.batch_size = 64  # global: summed over all devices and processes
    c.epochs = 60
    c.cpu_devices = 1  # devices into which a CPU is divided; XLA uses more cores that way

    c.memory_gb = 0.0  # memory a device may use; 0: all it has (CPU: the host's, divided)

    c.mesh = ml_collections.ConfigDict()
    # Devices over which wide layers and everything with a size of C are divided; the others divide
    # the images among them. Neighbours in jax.devices(), of any processes; on CPUs of one process.
    c.mesh.model = 1

    c.data = ml_collections.ConfigDict()
    c.data.name = "scenes"
    c.data.dir = ""  # "": the cache for `scenes`; else where the prepared data lies
    c.data.image_size = 448  # images are squashed to a square of this side, in pixels
    c.data.seed = 0  # composition of `scenes`, own validation splits
    c.data.strength = "moderate"  # of co-occurrence in `scenes`: moderate | strong
    c.data.sizes = ()  # train, validation and test images of `scenes`; (): its own
    c.data.validation_fraction = 0.1  # of the training images, where a set has no validation split
    # Images that have no positive label and no unknown one, in every split: keep | drop.
    c.data.without_labels = "keep"
    c.data.max_unreadable = 0.01  # share of the training images above which a run ends
    # Decoded images kept: auto (in memory if all of them fit) | none | memory | disk.
    c.data.cache = "auto"
    c.data.cache_gb = 0.5  # room for them; of a set that is larger, memory and disk keep a part
    c.data.timeout = 600.0  # seconds without a batch after which reading is given up
    c.data.workers = 0  # processes that read and augment; 0: threads of the training process
    c.data.augment_on = "host"  # host | device: in the compiled train step, where a GPU does it
    c.data.flip = True  # horizontal flip with probability 1/2
    c.data.randaugment_operations = 0  # operations an image; 0 turns RandAugment off
    c.data.randaugment_magnitude = 9  # 0 to 30
    c.data.cutout = 0.0  # side of the cut square as a share of the image's side; 0 turns it off
    c.data.color_jitter = 0.0  # strength of brightness, contrast and saturation changes, 0 to 1
    c.data.translate = 0.0  # largest shift as a share of the image's side
    c.data.scale = 0.0  # largest relative change of size

    c.labels = ml_collections.ConfigDict()
    c.labels.protocol = "uniform"  # all | file | released | sst | uniform | single_positive
    c.labels.file = ""  # protocol file: a mask (.npz, .npy) or labels (.csv, .tsv, .parquet)
    c.labels.known_fraction = 0.1  # probability that an entry is known
    c.labels.seed = 0  # of the known-label mask

    c.model = ml_collections.ConfigDict()
    c.model.backbone = "resnet101"
    c.model.pretrained = ""  # file with backbone weights | installed (a package's) | "": random
    c.model.freeze = "none"  # none | backbone: it keeps its pretrained weights
    # Room on disk for the features of a frozen backbone, which are computed once if no augmentation
    # needs the pixels; where they take more, the backbone works in every step.
    c.model.feature_cache_gb = 8.0
    c.model.widths = ()  # channels of each stage; (): the backbone's own
    c.model.encoder_layers = 1
    c.model.encoder_heads = 8
    c.model.encoder_mlp = 2048
    c.model.encoder_dropout = 0.1
    c.model.encoder_norm_first = False
    c.model.positions = True  # sine positions added to the encoder's queries and keys
    c.model.srfl = True  # semantic-related feature learning
    c.model.sgfe = True  # semantic-guided feature enhancement
    c.model.position_residual = False  # with sgfe: a 1x1 convolution beside it, not in the paper
    c.model.global_branch = True  # 1x1 convolution and maximum over positions, training only
    c.model.rank = 1024  # of the low-rank bilinear attention
    # With sgfe, bfloat16 and a CUDA GPU: its attention by models/attention_kernel.py. Else nothing.
    c.model.attention_kernel = False
    c.model.head_dropout = 0.5
    c.model.embeddings = "random"  # random | scenes | an .npz made by `clsl_jax.embed`
    c.model.embedding_dim = 300  # width of random label embeddings
    c.model.learn_embeddings = False  # True: the embeddings are trained with the model
    c.model.remat = "none"  # none | blocks: recompute each block's inside in the backward pass
    c.model.dtype = "float32"  # compute type: float32 | bfloat16; parameters stay float32

    c.graph = ml_collections.ConfigDict()
    c.graph.layers = 0  # graph convolutions on the label embeddings; 0 is the released program
    c.graph.threshold = 0.4  # conditional frequency from which two labels are connected
    c.graph.smoothing = 0.25  # sum of the weights of a label's neighbours
    c.graph.refresh = True  # recompute the graph from the recovered labels every epoch

    c.loss = ml_collections.ConfigDict()
    c.loss.name = "asl"  # asl | bce | hill | focal_margin
    c.loss.gamma_pos = 0.0
    c.loss.gamma_neg = 2.0
    c.loss.clip = 0.0
    c.loss.eps = 1e-5
    c.loss.margin = 1.0  # of positives under hill and focal_margin, in logits
    c.loss.smoothing = 0.0  # known labels y become (1 - smoothing) y + smoothing / 2
    # Known labels are scored by the network and label statistics together (a product of experts):
    # the network learns what the image says beyond what its other labels say.
    c.loss.statistics = False
    c.loss.scale = "balanced"  # balanced | mean | released
    c.loss.global_weight = 1.0  # of the global branch, except in the released loss
    c.loss.expected_positives = 0.0  # weight of the expected-positive regularisation
    c.loss.positives_per_image = 0.0  # what it expects; 0: estimated from the known labels

    c.recovery = ml_collections.ConfigDict()
    # none: known labels only | epoch: from a matrix of scores, at the end of each epoch | online:
    # from the scores of the batch | assume: unknown labels count as negatives | estimate: unknown
    # labels are parameters of their own | blend: images are blended with others that have a label.
    c.recovery.mode = "none"
    c.recovery.weight = 0.8  # lambda: weight of the recovered term
    # The weight grows linearly from 0 over so many epochs; epoch: after the warm-up.
    c.recovery.ramp_epochs = 0.0
    c.recovery.sharpening = "safe"  # online targets: safe | released
    c.recovery.assumed = 0.0  # assume: the target of unknown labels
    c.recovery.assumed_weight = 1.0  # assume: of unknown labels in the loss; 0: 1 / (C - 1)
    # assume: none | self_paced: positive above a threshold | reject, correct, correct_for_good: the
    # largest losses of a batch.
    c.recovery.correction = "none"
    c.recovery.correction_threshold = 0.6  # self_paced
    c.recovery.correction_rate = 0.002  # share of the unknown labels more (for good: anew) an epoch
    c.recovery.estimate_rate = 1.0  # estimate: of gradient descent on their logits
    c.recovery.blend_share = 0.5  # blend: of an image's own features, the rest is the other's
    # epoch: what labels are recovered from: scores (the network's) | statistics (known labels
    # alone, by a mixture model) | both | co_occurrence (of two labels) | prototypes (features).
    c.recovery.source = "scores"
    c.recovery.components = 12  # statistics, both, evaluation.statistics: of the mixture
    c.recovery.branch = "semantic"  # whose scores a teacher gives: semantic | global | mean
    c.recovery.teacher = "ema"  # whose scores are kept: ema | student (its own step's)
    c.recovery.view = "clean"  # the image an EMA teacher sees: clean (no augmentation) | augmented
    c.recovery.momentum = 0.8  # of a row's scores over its visits
    # fixed | adaptive (per class, so precise) | matched (per class, a share of what it should have)
    # | none (every unknown label is its probability). What the network learns by matched and none
    # nobody should be given: adaptive thresholds say what is handed out in the end.
    c.recovery.thresholds = "fixed"
    # Of adaptive thresholds: whose precision it is: known (entries, as labelled) | expected (of the
    # unknown ones, by their own probabilities).
    c.recovery.calibration = "known"
    # epoch: of unknown labels left open, which then count as negatives; 0: they say nothing.
    c.recovery.open_weight = 0.0
    c.recovery.positive_threshold = 0.5  # fixed: a score from here on is a recovered positive
    c.recovery.negative_threshold = 0.5  # fixed: a score below is a recovered negative
    c.recovery.positive_precision = 0.9  # adaptive: what the threshold has to reach
    c.recovery.negative_precision = 0.985
    c.recovery.min_count = 5  # adaptive: entries a threshold must rest on
    # All but fixed: known positives, and negatives, that a class needs; 0 with expected alone.
    c.recovery.min_known = 1
    c.recovery.positive_coverage = 0.5  # matched: share of the expected positives
    c.recovery.negative_coverage = 0.0  # matched: share of the expected negatives
    c.recovery.soft = True  # recovered labels are the scores themselves; False: 0 and 1
    c.recovery.confidence_power = 1.0  # weight |2q-1|**power of a soft label q
    # epoch: epochs before the first recovery, which is at the end of one, so that 0 is as 1; blend:
    # before prototypes. The other modes have none.
    c.recovery.warmup_epochs = 1

    c.optim = ml_collections.ConfigDict()
    c.optim.learning_rate = 9e-5  # peak of the one-cycle schedule
    c.optim.warmup_fraction = 0.2
    c.optim.weight_decay = 1e-4
    c.optim.ema_decay = 0.9983  # every step, all weights and batch statistics
    c.optim.clip_norm = 0.0  # global norm to which gradients are clipped; 0: off
    c.optim.accumulate = 1  # parts in which a batch goes through the network, one after another
    # Steps of a run whose loss or gradient may be NaN or infinite: they are named and change
    # nothing. With one more, or with 0, the run ends.
    c.optim.skip_nonfinite = 0

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.batch_size = 0  # 0: the training batch size
    c.evaluation.weights = "ema"  # ema | raw
    # Probabilities are what label statistics make of the network's: labels that occur together
    # speak for one another.
    c.evaluation.statistics = False
    c.evaluation.convention = (
        "interpolated"  # AP of selection and log: interpolated | uninterpolated
    )
    c.evaluation.unknown = "ignored"  # labels of these splits: ignored | negative, they count so
    c.evaluation.selection = "validation"  # the split that picks the best epoch: validation | test
    c.evaluation.test_every_epoch = (
        False  # also log the test split each epoch (never used to select)
    )
    c.evaluation.pictures = 12  # images on the picture sheet; 0: no sheet

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.dir = ""  # "": in the workdir; else a directory or a bucket (gs://...)
    c.checkpoint.every_epochs = 1
    c.checkpoint.every_steps = 0  # also inside an epoch; 0: only between epochs
    c.checkpoint.keep = 2  # latest ones, besides the best
    return c


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "data.strength": ("moderate", "strong"),
    "data.augment_on": ("host", "device"),
    "data.without_labels": ("keep", "drop"),
    "data.cache": ("auto", "none", "memory", "disk"),
    "labels.protocol": ("all", "file", "released", "sst", "uniform", "single_positive"),
    "model.backbone": (
        "small",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "efficientnet_lite0",
    ),
    "model.freeze": ("none", "backbone"),
    "model.remat": ("none", "blocks"),
    "model.dtype": ("float32", "bfloat16"),
    "loss.name": ("asl", "bce", "hill", "focal_margin"),
    "loss.scale": ("balanced", "mean", "released"),
    "recovery.mode": ("none", "online", "epoch", "assume", "estimate", "blend"),
    "recovery.correction": ("none", "self_paced", "reject", "correct", "correct_for_good"),
    "recovery.source": ("scores", "statistics", "both", "co_occurrence", "prototypes"),
    "recovery.branch": ("semantic", "global", "mean"),
    "recovery.sharpening": ("safe", "released"),
    "recovery.teacher": ("ema", "student"),
    "recovery.view": ("clean", "augmented"),
    "recovery.thresholds": ("fixed", "adaptive", "matched", "none"),
    "recovery.calibration": ("known", "expected"),
    "evaluation.weights": ("ema", "raw"),
    "evaluation.convention": ("interpolated", "uninterpolated"),
    "evaluation.unknown": ("ignored", "negative"),
    "evaluation.selection": ("validation", "test"),
}

# (key, lowest, highest); None leaves that side open.
_RANGES: Sequence[tuple[str, float | None, float | None]] = (
    ("batch_size", 1, None),
    ("epochs", 1, None),
    ("cpu_devices", 1, 256),
    ("mesh.model", 1, None),
    ("seed", 0, 2**32 - 1),
    ("data.seed", 0, 2**32 - 1),
    ("labels.seed", 0, 2**32 - 1),
    ("data.image_size", 8, 8192),
    ("data.validation_fraction", 0, 0.9),
    ("data.workers", 0, 1024),
    ("data.max_unreadable", 0, 1),
    ("data.cache_gb", 0, None),
    ("data.cutout", 0, 1),
    ("data.color_jitter", 0, 1),
    ("data.translate", 0, 1),
    ("data.scale", 0, 0.99),
    ("data.randaugment_operations", 0, 10),
    ("data.randaugment_magnitude", 0, 30),
    ("labels.known_fraction", 0, 1),
    ("model.feature_cache_gb", 0, None),
    ("model.encoder_layers", 0, None),
    ("model.encoder_heads", 1, None),
    ("model.encoder_mlp", 1, None),
    ("model.encoder_dropout", 0, 0.99),
    ("model.head_dropout", 0, 0.99),
    ("model.rank", 1, None),
    ("model.embedding_dim", 1, None),
    ("graph.layers", 0, None),
    ("graph.threshold", 0, 1),
    ("graph.smoothing", 0, 1),
    ("loss.gamma_pos", 0, None),
    ("loss.gamma_neg", 0, None),
    ("loss.clip", 0, 0.999),
    ("loss.eps", 1e-30, 0.1),
    ("loss.margin", 0, None),
    ("loss.smoothing", 0, 1),
    ("loss.global_weight", 0, None),
    ("loss.expected_positives", 0, None),
    ("loss.positives_per_image", 0, None),
    ("recovery.assumed", 0, 1),
    ("recovery.assumed_weight", 0, None),
    ("recovery.correction_threshold", 0, 1),
    ("recovery.correction_rate", 0, 1),
    ("recovery.estimate_rate", 0, None),
    ("recovery.blend_share", 0.001, 0.999),
    ("recovery.components", 1, None),
    ("recovery.weight", 0, None),
    ("recovery.ramp_epochs", 0, None),
    ("recovery.momentum", 0, 0.9999),
    ("recovery.positive_threshold", 0, 1),
    ("recovery.negative_threshold", 0, 1),
    ("recovery.positive_precision", 0, 1),
    ("recovery.negative_precision", 0, 1),
    ("recovery.min_count", 1, 2**31 - 1),
    ("recovery.open_weight", 0, None),
    ("recovery.min_known", 0, 2**31 - 1),
    ("recovery.positive_coverage", 0, 1),
    ("recovery.negative_coverage", 0, 1),
    ("recovery.confidence_power", 0, None),
    ("recovery.warmup_epochs", 0, None),
    ("optim.learning_rate", 0, None),
    ("optim.warmup_fraction", 0.0, 0.9),
    ("optim.weight_decay", 0, None),
    ("optim.ema_decay", 0, 1),
    ("optim.clip_norm", 0, None),
    ("optim.accumulate", 1, None),
    ("optim.skip_nonfinite", 0, None),
    ("memory_gb", 0, None),
    ("data.timeout", 0.001, None),
    ("evaluation.batch_size", 0, None),
    ("evaluation.pictures", 0, 100),
    ("checkpoint.every_epochs", 1, None),
    ("checkpoint.every_steps", 0, None),
    ("checkpoint.keep", 2, None),
)

# Keys that change neither what a checkpoint holds nor, beyond the compute type's precision, the
# weights. Of the saved epochs the best is chosen: checkpoint.every_epochs says which these are.
SAFE_TO_CHANGE = (
    "cpu_devices",
    "data.dir",
    "data.workers",
    "data.max_unreadable",
    "data.cache",
    "data.cache_gb",
    "data.timeout",
    "labels.file",
    "memory_gb",
    "mesh.model",
    "model.remat",
    "model.attention_kernel",
    "optim.skip_nonfinite",
    "evaluation.batch_size",
    "evaluation.pictures",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep",
)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"section.key": value} for a nested configuration."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def near_keys(key: str, keys: Iterable[str]) -> list[str]:
    """Returns up to three keys like `key`, by their whole dotted name or by its last part."""
    keys = list(keys)
    last = key.rsplit(".", 1)[-1]
    same_last = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    by_name = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    lasts = difflib.get_close_matches(last, {k.rsplit(".", 1)[-1] for k in keys}, n=3, cutoff=0.6)
    by_last = [k for match in lasts for k in keys if k.rsplit(".", 1)[-1] == match]
    return list(dict.fromkeys(same_last + by_name + by_last))[:3]


def unknown_key_message(
    key: str, config: Mapping[str, Any], *, file: str = "clsl_jax/config.py"
) -> str:
    """Returns the message for an override of a key that does not exist; `file` has all keys."""
    near = near_keys(key, flatten(config))
    hint = f" Near ones: {', '.join(near)}." if near else ""
    return f"There is no configuration key '{key}'.{hint} All keys: {file}."


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every value.

    Raises:
      ConfigError: naming every key at fault with its value and what is allowed.
    """
    flat = flatten(config)
    misfits = _misfits(flat)
    problems = list(misfits.values())
    for key, allowed in _CHOICES.items():
        if key not in misfits and flat[key] not in allowed:
            problems.append(f"{key}={flat[key]!r}: expected one of {', '.join(allowed)}")
    for key, low, high in _RANGES:
        if key in misfits:
            continue
        value = flat[key]
        if (low is not None and value < low) or (high is not None and value > high):
            expected = f"at least {low}" if high is None else f"between {low} and {high}"
            problems.append(f"{key}={value!r}: expected {expected}")
    if misfits:  # what follows compares values
        _refuse(problems)
    if len(config.data.sizes) not in (0, 3):
        problems.append(f"data.sizes={config.data.sizes!r}: expected three numbers or ()")
    if (config.labels.protocol == "file") != bool(config.labels.file):
        problems.append(
            f"labels.protocol={config.labels.protocol!r} and labels.file={config.labels.file!r}: "
            "protocol file needs a file, and no other protocol has one"
        )
    if config.model.freeze == "backbone" and not config.model.pretrained:
        problems.append(
            "model.freeze='backbone' would keep random weights: name a file in model.pretrained"
        )
    if config.model.attention_kernel:
        problems += attention_kernel_misfits(config.model.dtype, config.model.rank)
    problems += _recovery_misfits(config)
    if config.recovery.mode == "epoch" and config.recovery.thresholds == "fixed":
        low, high = config.recovery.negative_threshold, config.recovery.positive_threshold
        if low > high:
            problems.append(
                f"recovery.negative_threshold={low} lies above recovery.positive_threshold={high}"
            )
    if problems:
        _refuse(problems)


def attention_kernel_misfits(dtype: str, rank: int) -> list[str]:
    """Returns why `model.attention_kernel` cannot be used with these, if so.

    Its tanh is as precise as bfloat16 needs; it keeps rows of `rank` numbers in registers.
    """
    advice, problems = "expected with model.attention_kernel=True", []
    if dtype != "bfloat16":
        problems.append(f"model.dtype={dtype!r}: {advice} 'bfloat16'")
    if not 128 <= rank <= 1024 or rank & (rank - 1):
        problems.append(f"model.rank={rank}: {advice} a power of two from 128 to 1024")
    return problems


def _recovery_misfits(config: ml_collections.ConfigDict) -> list[str]:
    """Returns what of losses and recovery does not go together."""
    r, problems = config.recovery, []
    if config.loss.scale == "released" and r.mode not in ("online", "none"):
        problems.append(
            "loss.scale='released' sees recovered labels only of the batch at hand: "
            "set recovery.mode=online or none, or loss.scale=balanced"
        )
    if r.correction != "none" and r.mode != "assume":
        problems.append(f"recovery.correction={r.correction!r} goes with recovery.mode=assume")
    if r.open_weight and r.mode not in ("epoch", "none"):
        problems.append(f"recovery.open_weight={r.open_weight} goes with recovery.mode=epoch")
    if r.open_weight and r.ramp_epochs:
        problems.append(
            "recovery.open_weight counts from the first step on, recovery.ramp_epochs from the end "
            "of the warm-up: set one of them to 0"
        )
    if r.open_weight and r.soft and r.confidence_power:
        problems.append(
            "recovery.open_weight takes a soft label without weight for one that was left open: "
            "set recovery.confidence_power=0, or recovery.soft=False"
        )
    if r.source != "scores" and r.mode not in ("epoch", "none"):
        problems.append(f"recovery.source={r.source!r} goes with recovery.mode=epoch")
    from_prototypes = r.mode == "epoch" and r.source == "prototypes"
    for name, used in (("source", from_prototypes), ("mode", r.mode == "blend")):
        if used and not config.model.srfl:
            problems.append(f"recovery.{name}={r[name]!r} needs the features of model.srfl=True")
    if from_prototypes:
        needed = {"thresholds": "adaptive", "calibration": "known", "soft": False}
        if any(r[name] != value for name, value in needed.items()):
            problems.append(
                "recovery.source='prototypes' scores are likenesses, no probabilities: set "
                + ", ".join(f"recovery.{name}={value}" for name, value in needed.items())
            )
    by_known = r.calibration == "known" or r.thresholds == "matched"
    if r.mode == "epoch" and r.thresholds != "fixed" and by_known and not r.min_known:
        problems.append(
            "recovery.min_known=0: thresholds by known labels need some; set it to 1 or more, or "
            "recovery.calibration=expected with recovery.thresholds=adaptive or none"
        )
    if r.mode == "epoch" and r.thresholds == "matched" and r.soft:
        problems.append(
            "recovery.thresholds='matched' teaches hard labels: set recovery.soft=False"
        )
    if r.mode == "epoch" and r.thresholds == "none" and not r.soft:
        problems.append("recovery.thresholds='none' teaches soft labels: set recovery.soft=True")
    keeps_branch = r.mode == "epoch" and r.source in ("scores", "both")
    if r.branch != "semantic" and r.mode != "none" and not keeps_branch:
        problems.append(
            f"recovery.branch={r.branch!r} goes with recovery.mode=epoch and "
            "recovery.source=scores or both"
        )
    if r.branch != "semantic" and (r.teacher != "ema" or not config.model.global_branch):
        problems.append(
            f"recovery.branch={r.branch!r} needs recovery.teacher=ema and model.global_branch=True"
        )
    if config.loss.statistics and (config.loss.name not in ("asl", "bce") or config.loss.clip):
        problems.append("loss.statistics=True goes with loss.name=asl or bce, and loss.clip=0")
    if config.loss.statistics and not config.evaluation.statistics:
        problems.append(
            "loss.statistics=True leaves to label statistics what they can say: set "
            "evaluation.statistics=True, so that predictions ask them too"
        )
    whole_batch = {
        "loss.expected_positives": bool(config.loss.expected_positives),
        "recovery.correction": r.correction not in ("none", "self_paced"),
        "recovery.source=prototypes": from_prototypes,
        "recovery.mode=estimate": r.mode == "estimate",
        "recovery.mode=blend": r.mode == "blend",
    }
    for name in (
        name for name, used in whole_batch.items() if used and config.optim.accumulate > 1
    ):
        problems.append(f"{name} looks at a batch as a whole: set optim.accumulate=1")
    return problems


def _refuse(problems: Iterable[str]) -> NoReturn:
    raise ConfigError("The configuration cannot be used:\n  " + "\n  ".join(problems))


def _misfits(flat: Mapping[str, Any]) -> dict[str, str]:
    """Returns {key: what is wrong} where a key is missing or its value is of another type."""
    found = {}
    for key, default in flatten(base_config()).items():
        if key not in flat:
            found[key] = f"{key} is missing: start from clsl_jax.config.base_config()"
        elif what := _expected(flat[key], default):
            found[key] = f"{key}={reprlib.repr(flat[key])}: expected {what}"
    return found


def _expected(value: Any, default: Any) -> str:
    """Returns what a value should be if it cannot stand in a default's place, else nothing."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) and number and abs(value) < 2**63
    fits, what = {
        bool: (isinstance(value, bool), "True or False"),
        int: (whole, "a whole number"),
        float: (number and abs(value) <= sys.float_info.max, "a finite number"),
        str: (_is_text(value), "text"),
        tuple: (
            isinstance(value, (tuple, list))
            and all(type(entry) is int and 0 < entry < 2**63 for entry in value),
            "whole numbers from 1 in brackets",
        ),
    }[type(default)]
    return "" if fits else what


def _is_text(value: Any) -> bool:
    """Whether a value is text that may also be a path."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the resolved configuration as readable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, where: str) -> ml_collections.ConfigDict:
    """Returns the configuration that `to_json` wrote.

    Args:
      text: the JSON.
      where: path named in errors.

    Raises:
      ConfigError: if the text is not such a configuration.
    """
    advice = "Restore it or use a new workdir."
    try:
        stored = json.loads(text)
        found = flatten(stored) if isinstance(stored, dict) else {}
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits too
        raise ConfigError(f"{where} is not JSON ({error}). {advice}") from None
    if not isinstance(stored, dict):
        raise ConfigError(f"{where} holds no configuration. {advice}")
    config = base_config()
    known = flatten(config)
    strange = [key for key in found if key not in known]
    if strange:
        raise ConfigError(f"{where}: " + unknown_key_message(strange[0], config))
    try:
        if misfits := _misfits(known | found):
            _refuse(misfits.values())
        for key, value in found.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}\n{advice}") from None
    return config


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old, new)} for every key whose value differs."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Refuses to continue a run under another configuration.

    Raises:
      ConfigError: naming the keys that differ and may not.
    """
    unsafe = {k: v for k, v in changed_keys(old, new).items() if k not in SAFE_TO_CHANGE}
    if unsafe:
        rows = "\n  ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in unsafe.items())
        raise ConfigError(
            f"{where} was started with another configuration:\n  {rows}\n"
            "Give the same values to continue it, or another --workdir for a new run."
        )
