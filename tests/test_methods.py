"""From a method's name to numbers: the keys it sets, the targets and the loss of a small batch."""

import math
import runpy
import types

import commands
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clsl_jax import config as config_lib
from clsl_jax import corrections, experiment, losses, methods, steps

STEPS = 10  # of an epoch
ANNOTATIONS = np.array([[1, -1, 0, -1], [-1, -1, -1, 1]], np.int8)
LOGITS = np.array([[2.0, 1.5, -1.0, 0.3], [-0.5, 0.8, -2.0, 3.0]])
KNOWN = ANNOTATIONS >= 0


def options_of(name):
    config = runpy.run_path(commands.CONFIG)["get_config"]()
    with config.unlocked():
        config.update_from_flattened_dict(dict(methods.METHODS[name].settings))
    return experiment.step_options(config, STEPS)


def test_a_rival_has_no_part_of_this_recovery_that_its_paper_has_not():
    config = runpy.run_path(f"{commands.REPOSITORY}/configs/table.py")["get_config"]()
    assert config.recovery.min_known > 1
    for name in ("co_occurrence", "prototypes"):
        with config.unlocked():
            config.update_from_flattened_dict(dict(methods.METHODS[name].settings))
        assert experiment.step_options(config, STEPS).min_known == 1


def state_in(epoch):
    """What `_targets` reads of a train state; no row was seen, nothing was recovered."""
    nothing = jnp.zeros(LOGITS.shape, jnp.float32)
    return types.SimpleNamespace(
        step=jnp.int32(epoch * STEPS),
        recovered=nothing,
        recovered_weight=nothing,
        scores=nothing + 0.3,
        visits=jnp.zeros(len(LOGITS), jnp.int32),
    )


def taught(name, epoch):
    """(total loss, targets and weights of unknown cells) in an epoch, counted from 0."""
    options = options_of(name)
    elementwise = steps._elementwise_loss(options)
    logits, annotations = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(ANNOTATIONS)
    state = state_in(epoch)
    targets, weights = steps._targets(
        state, jnp.arange(2), logits, annotations, options, elementwise
    )
    loss, _ = losses.clsl_loss(
        logits,
        None,
        annotations,
        targets,
        weights,
        elementwise=elementwise,
        scale=options.scale,
        recovered_scale=steps._recovered_scale(state.step, options),
        smoothing=options.smoothing,
    )
    return float(loss), np.asarray(targets)[~KNOWN], np.asarray(weights)[~KNOWN]


def bce(targets):
    z, t = torch.tensor(LOGITS), torch.tensor(targets)
    return torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none").numpy()


def labels(unknown):
    """The known labels, and `unknown` (in the order of the cells) elsewhere."""
    found = ANNOTATIONS.astype(float)
    found[~KNOWN] = unknown
    return found


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# Unknown logits, in order: 1.5, 0.3, -0.5, 0.8, -2.0. The larger one is, the larger its loss.
NEGATIVE, ALL = [0.0] * 5, [1.0] * 5


@pytest.mark.parametrize("epoch", [0, 3])
def test_known_labels_alone(epoch):
    loss, _, _ = taught("known_bce", epoch)
    assert loss == pytest.approx(bce(labels(NEGATIVE))[KNOWN].mean(), rel=1e-5)
    loss, _, _ = taught("known_asl", epoch)
    p = sigmoid(LOGITS)
    asl = np.where(labels(NEGATIVE) == 1, -np.log(p), -(p**2) * np.log(1 - p))
    assert loss == pytest.approx(asl[KNOWN].mean(), rel=1e-5)
    # The product with label statistics has the same targets; its odds are tested in test_steps.
    assert options_of("known_product").loss_statistics
    assert options_of("known_product").evaluate_statistics
    assert not options_of("known_asl").loss_statistics
    assert taught("known_product", epoch)[0] == pytest.approx(loss)


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    ("name", "targets", "weights"),
    [
        ("negative_bce", NEGATIVE, ALL),
        # Label smoothing of 0.1 in two classes: 0.95 and 0.05.
        ("negative_smooth", [0.05] * 5, ALL),
        ("negative_weak", NEGATIVE, [1 / 3] * 5),  # 1 / (C - 1)
    ],
)
def test_unknown_labels_as_negatives(name, epoch, targets, weights):
    loss, found, weight = taught(name, epoch)
    np.testing.assert_allclose(found, targets, rtol=1e-6)
    np.testing.assert_allclose(weight, weights, rtol=1e-6)
    expected = labels(targets)
    if name == "negative_smooth":
        expected[KNOWN] = 0.9 * expected[KNOWN] + 0.05
    scale = labels(weights)
    scale[KNOWN] = 1
    assert loss == pytest.approx((bce(expected) * scale).mean(), rel=1e-5)


def test_hill_and_the_asymmetric_loss_of_assumed_negatives():
    p, m = sigmoid(LOGITS), sigmoid(LOGITS - 1)
    positive = labels(NEGATIVE) == 1
    hill = np.where(positive, -((1 - m) ** 2) * np.log(m), (1.5 - p) * p**2)
    assert taught("hill", 1)[0] == pytest.approx(hill.mean(), rel=1e-5)
    asl = np.where(positive, -np.log(p), -(p**2) * np.log(1 - p))
    assert taught("negative_asl", 1)[0] == pytest.approx(asl.mean(), rel=1e-5)


def test_splc_from_the_second_epoch_on():
    """Positive where the sigmoid exceeds 0.6: of the unknown logits 1.5 and 0.8."""
    assert taught("splc", 0)[1].tolist() == NEGATIVE
    loss, targets, weights = taught("splc", 1)
    assert targets.tolist() == [1, 0, 0, 1, 0]
    assert weights.tolist() == ALL
    p, m = sigmoid(LOGITS), sigmoid(LOGITS - 1)
    positive, negative = -((1 - m) ** 2) * np.log(m), -(p**2) * np.log(1 - p)
    expected = np.where(labels(targets) == 1, positive, negative)
    assert loss == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("ll_r", (0.0, 0.002, 0.006)), ("ll_ct", (0.0, 0.002, 0.006)), ("ll_cp", (0.0, 0.001, 0.001))],
)
def test_large_losses(name, shares, monkeypatch):
    """Nothing in the first epoch; then a share that grows with the epochs, or not (for good)."""
    asked = []
    large_losses = corrections.large_losses

    def seen(found, candidates, share):
        asked.append(float(share))
        return large_losses(found, candidates, share)

    monkeypatch.setattr(corrections, "large_losses", seen)
    assert taught(name, 0)[1:][0].tolist() == NEGATIVE
    for epoch in (1, 3):
        _, targets, weights = taught(name, epoch)
        # One of five, rounded up: the largest loss is that of logit 1.5.
        rejected = [0, 1, 1, 1, 1] if name == "ll_r" else ALL
        assert weights.tolist() == rejected
        assert targets.tolist() == (NEGATIVE if name == "ll_r" else [1, 0, 0, 0, 0])
    np.testing.assert_allclose(asked, shares, rtol=1e-5)


def test_role_starts_from_one_half():
    loss, targets, weights = taught("role", 0)
    assert targets.tolist() == [0.5] * 5
    assert weights.tolist() == ALL
    assert loss == pytest.approx(bce(labels([0.5] * 5)).mean(), rel=1e-5)
    assert options_of("role").expected_positives == 1.0
    assert options_of("role").recovery_mode == "estimate"


def test_expected_positives_are_those_of_the_known_labels():
    """Of two known labels in the first class one is positive; the third has known negatives."""
    config = config_lib.base_config()
    config.loss.expected_positives = 1.0
    annotations = np.array([[1, 1, 0], [0, -1, 0], [-1, -1, -1]], np.int8)
    assert experiment._positives_per_image(config, annotations) == 0.5 + 1.0 + 0.0
    config.loss.positives_per_image = 2.5
    assert experiment._positives_per_image(config, annotations) == 2.5
    assert options_of("epr").expected_positives == 1.0


def test_what_recovers_from_scores():
    expected = {
        "curriculum": ("scores", "student", "fixed", 0.9, 0.1, False, 0.0, "bce"),
        "ema_teacher": ("scores", "ema", "fixed", 0.0, 0.0, True, 0.0, "bce"),
        "co_occurrence": ("co_occurrence", "ema", "adaptive", 0.5, 0.5, False, 0.5, "bce"),
        "prototypes": ("prototypes", "ema", "adaptive", 0.5, 0.5, False, 0.5, "bce"),
        "statistics": ("statistics", "ema", "fixed", 0.0, 0.0, True, 0.5, "asl"),
    }
    for name, found in expected.items():
        o = options_of(name)
        assert o.recovery_mode == "epoch"
        assert not o.loss_statistics
        assert not o.evaluate_statistics
        assert found == (
            o.source,
            o.teacher,
            o.thresholds,
            o.positive_threshold,
            o.negative_threshold,
            o.soft,
            o.momentum,
            o.loss_name,
        ), name


def test_every_number_of_the_configuration_arrives():
    """Each key that the steps take has a value of its own, under the option of its name."""
    named = {
        "loss.name": "loss_name",
        "loss.statistics": "loss_statistics",
        "recovery.mode": "recovery_mode",
        "recovery.weight": "recovery_weight",
        "evaluation.statistics": "evaluate_statistics",
    }
    elsewhere = {  # in steps, of other values, or not for the steps
        "recovery.ramp_epochs",
        "recovery.warmup_epochs",
        "recovery.view",
        "loss.positives_per_image",
    }
    config = config_lib.base_config()
    keys = [
        key
        for key in config_lib.flatten(config)
        if key.startswith(("loss.", "recovery.", "graph.")) and key not in elsewhere
    ]
    keys += ["optim.ema_decay", "optim.accumulate", "optim.skip_nonfinite", "evaluation.statistics"]
    for number, key in enumerate(keys, 1):
        old = config_lib.flatten(config)[key]
        new = {bool: not old, int: number, float: number / 1000, str: f"<{key}>"}[type(old)]
        with config.unlocked():
            config.update_from_flattened_dict({key: new})
    config.recovery.ramp_epochs, config.recovery.warmup_epochs, config.epochs = 1.5, 2, 7
    config.evaluation.weights = "raw"
    found = experiment.step_options(config, STEPS)
    for key in keys:
        section, _, last = key.rpartition(".")
        names = [named.get(key, f"{section}_{last}"), last]
        name = next(name for name in names if hasattr(found, name))
        assert getattr(found, name) == config_lib.flatten(config)[key], key
    assert (found.ramp_steps, found.warmup_steps, found.total_steps) == (15, 20, 70)
    assert not found.evaluate_ema
    assert math.isclose(found.gamma_neg, (keys.index("loss.gamma_neg") + 1) / 1000)
