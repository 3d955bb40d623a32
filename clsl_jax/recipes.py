"""What configurations share."""

import ml_collections

from clsl_jax import config as config_lib


def paper_recipe(arg: str | None, *, file: str) -> ml_collections.ConfigDict:
    """Returns the recipe of the CLSL authors' program, less what differs between data sets.

    ResNet-101, one encoder layer, AdamW with weight decay 1e-4 on everything, one cosine cycle over
    60 epochs, flip, RandAugment and Cutout.

    Args:
      arg: `released` for the authors' loss scale, online recovery and selection on the test split;
        None for this project's, with `adaptive_recovery` from the middle of training on. Known
        labels are drawn as the authors' program does with either.
      file: named in the error.

    Raises:
      ConfigError: if `arg` is anything else.
    """
    if arg not in (None, "", "released"):
        raise config_lib.ConfigError(
            f"{file}:{arg}: expected nothing or 'released' after the colon."
        )
    config = config_lib.base_config()
    config.epochs = 60
    config.data.flip = True
    config.data.randaugment_operations = 2
    config.data.randaugment_magnitude = 9
    config.data.cutout = 0.5
    config.data.workers = 8
    config.labels.known_fraction = 0.1
    config.labels.protocol = "released"
    config.model.backbone = "resnet101"
    config.evaluation.test_every_epoch = True
    if arg == "released":
        config.graph.layers = 0
        config.graph.refresh = False
        config.loss.scale = "released"
        config.recovery.mode = "online"
        config.recovery.sharpening = "released"
        config.recovery.weight = 0.8
        config.evaluation.selection = "test"
        config.data.validation_fraction = 0.0  # trained on every image of the training split
    else:
        adaptive_recovery(config, warmup_epochs=config.epochs // 2)
    return config


def adaptive_recovery(config: ml_collections.ConfigDict, *, warmup_epochs: int) -> None:
    """Sets the recovery that did best over pretrained features (docs/study.md).

    Hard labels, by thresholds of each class that are 95 % (positives) and 99 % (negatives) right on
    the known cells. Of a class with fewer than six known positives or negatives none are
    recovered: thresholds that rest on so few are not as right (docs/study.md).

    Args:
      config: is changed.
      warmup_epochs: before the first recovery; the features have to have settled.
    """
    config.recovery.mode = "epoch"
    config.recovery.thresholds = "adaptive"
    config.recovery.soft = False
    config.recovery.positive_precision = 0.95
    config.recovery.negative_precision = 0.99
    config.recovery.min_known = 6
    config.recovery.weight = 1.0
    config.recovery.warmup_epochs = warmup_epochs
    config.recovery.momentum = 0.5


def positives_recovery(config: ml_collections.ConfigDict, *, warmup_epochs: int) -> None:
    """Sets what did best on validation where positives alone are known, and not how many.

    That was over pretrained features; from random weights it ends up sure of everything
    (docs/study-details.md).

    Unknown labels count as negatives at first, then by the probabilities of a teacher that has
    learned so. Known and unknown ones have a mean loss each, by which the few positives weigh as
    much as all others. In evaluation what is unknown counts as negative.

    Args:
      config: is changed.
      warmup_epochs: before the first recovery.
    """
    soft_recovery(config, warmup_epochs=warmup_epochs)
    config.recovery.open_weight = 1.0
    config.recovery.confidence_power = 0.0
    config.recovery.min_known = 0
    config.loss.name = "bce"
    config.evaluation.unknown = "negative"


def soft_recovery(config: ml_collections.ConfigDict, *, warmup_epochs: int) -> None:
    """Sets the recovery that did best on `scenes` (docs/study-details.md).

    The network learns from averaged probabilities of every unknown label, weighted by how sure they
    are. What is handed out in the end are labels, by thresholds of each class beyond which, by
    these probabilities, 90 % (positives) and 98.5 % (negatives) are right.

    Args:
      config: is changed.
      warmup_epochs: before the first recovery; the features have to have settled.
    """
    config.recovery.mode = "epoch"
    config.recovery.thresholds = "none"
    config.recovery.calibration = "expected"
    config.recovery.positive_precision = 0.9
    config.recovery.negative_precision = 0.985
    config.recovery.confidence_power = 1.0
    config.recovery.weight = 1.0
    config.recovery.warmup_epochs = warmup_epochs
    config.recovery.momentum = 0.5
