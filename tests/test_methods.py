"""From a method's name to numbers: the keys it sets, the targets and the loss of a small batch."""

import functools
import math
import runpy
import types

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from clsl_jax import config as config_lib
from clsl_jax import corrections, epoch_end, experiment, losses, methods, steps, train_state
from clsl_jax.errors import InputError

STEPS = 10  # of an epoch
STILL = optax.sgd(0.0)  # weights stay as they are
ANNOTATIONS = np.array([[1, -1, 0, -1], [-1, -1, -1, 1]], np.int8)
LOGITS = np.array([[2.0, 1.5, -1.0, 0.3], [-0.5, 0.8, -2.0, 3.0]])
KNOWN = ANNOTATIONS >= 0


def options_of(name):
    config = runpy.run_path(commands.CONFIG)["get_config"]()
    with config.unlocked():
        config.update_from_flattened_dict(dict(methods.find(name).settings))
    return experiment.step_options(config, STEPS)


def test_a_rival_has_no_part_of_this_recovery_that_its_paper_has_not():
    config = runpy.run_path(f"{commands.REPOSITORY}/configs/table.py")["get_config"]()
    assert config.recovery.min_known > 1
    for name in ("co_occurrence", "prototypes"):
        with config.unlocked():
            config.update_from_flattened_dict(dict(methods.METHODS[name].settings))
        assert experiment.step_options(config, STEPS).min_known == 1


@pytest.mark.parametrize("recipe", ["scenes", "table", "table:positives", "voc", "coco", "nuswide"])
def test_every_method_can_be_set_over_every_recipe(recipe):
    """And what a recipe makes of the labels that it leaves open has no part in it."""
    file, _, argument = recipe.partition(":")
    get_config = runpy.run_path(f"{commands.REPOSITORY}/configs/{file}.py")["get_config"]
    for name, method in methods.METHODS.items():
        config = get_config(argument) if argument else get_config()
        with config.unlocked():
            config.update_from_flattened_dict(dict(method.settings))
        config_lib.validate(config)
        assert experiment.step_options(config, STEPS).open_weight == 0 or name == "clsl"


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
    """Of two known labels in two classes one is positive; the third has known negatives alone."""
    config = config_lib.base_config()
    config.loss.expected_positives = 1.0
    annotations = np.array([[1, 1, 0], [0, -1, 0], [-1, -1, -1]], np.int8)
    names = ["cat", "dog", "owl"]
    with pytest.raises(InputError, match="no negative is known of dog: set"):
        experiment._positives_per_image(config, annotations, names)
    annotations[1, 1] = 0
    assert experiment._positives_per_image(config, annotations, names) == 0.5 + 0.5 + 0.0
    config.loss.positives_per_image = 2.5
    assert experiment._positives_per_image(config, annotations, names) == 2.5
    assert options_of("epr").expected_positives == 1.0


class Given(nn.Module):
    """Features [B, C, 1, D], those of class c in place c; a logit is a weight times the first."""

    @nn.compact
    def __call__(self, features, embeddings, adjacency, *, train, blend=None):
        semantic = features[:, :, 0]
        weight = self.param("weight", nn.initializers.ones, ())
        return weight * semantic[..., 0], {"global_logits": None, "semantic_features": semantic}


def whole_state(annotations, step, *, student=1.0, teacher=1.0, memory=()):
    """A train state of `Given` before its step `step`, nothing visited, nothing recovered."""
    annotations = jnp.asarray(annotations, jnp.int8)
    nothing = jnp.zeros(annotations.shape, jnp.float32)
    rows = jnp.zeros(len(annotations), jnp.int32)
    params = {"model": {"weight": jnp.float32(student)}}
    return train_state.TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        frozen={},
        opt_state=STILL.init(params),
        ema_params={"model": {"weight": jnp.float32(teacher)}},
        ema_batch_stats={},
        rng=jax.random.key_data(jax.random.key(0)),
        label_embeddings=jnp.zeros(()),
        adjacency=jnp.zeros(()),
        annotations=annotations,
        scores=nothing,
        visits=rows,
        recovered=nothing,
        recovered_weight=nothing,
        memory={name: jnp.asarray(value, jnp.float32) for name, value in dict(memory).items()},
        sums=dict.fromkeys(train_state.SUM_NAMES, jnp.zeros(())),
        faults=rows,
        fault_step=jnp.int32(-1),
        faulty_steps=jnp.int32(0),
    )


@functools.cache
def train_step_of(name):
    return jax.jit(steps.make_train_step(Given(), STILL, options_of(name)))


@functools.cache
def recover_of(name):
    return jax.jit(epoch_end.make_recover(options_of(name)))


def seen(name, state, *batches):
    """The state after a step of each batch, {"image" and "clean": [B, C] or [B, C, D]}."""
    for batch in batches:
        features = {
            view: jnp.asarray(x, jnp.float32).reshape(len(x), len(x[0]), 1, -1)
            for view, x in batch.items()
        }
        rows = jnp.arange(len(batch["image"]), dtype=jnp.int32)
        state = train_step_of(name)(state, {"row": rows, **features})
    return state


def recovered(name, state):
    """(labels, weights) [N, C] at the end of an epoch, of a method's own settings."""
    state = recover_of(name)(state)
    return np.asarray(state.recovered), np.asarray(state.recovered_weight)


def test_curriculum_takes_what_the_student_last_said_clearly():
    """s(2.2) = 0.9002 and s(2.19) = 0.8993: the threshold 0.9 lies between; likewise at 0.1."""
    annotations = [[1, -1], [-1, 0], [-1, -1], [-1, -1]]
    said = [[0.0, 2.2], [2.19, -3.0], [-2.2, -2.19]]  # the fourth row is not seen
    first, last = {"image": [[5.0] * 2] * 3}, {"image": said}
    state = seen("curriculum", whole_state(annotations, 2 * STEPS - 2, teacher=-1.0), first, last)
    labels, weights = recovered("curriculum", state)
    np.testing.assert_array_equal(labels, [[1, 1], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(weights, [[0, 1], [0, 0], [1, 0], [0, 0]])
    # One step before the end of the second epoch, the configuration's warm-up, nothing is.
    assert not recovered("curriculum", state.replace(step=state.step - 1))[1].any()

    state = recover_of("curriculum")(state)
    sums = seen("curriculum", state, last).sums
    # Known: logit 0 of a positive, -3 of a negative. Recovered: 2 of the batch's 4 unknown cells.
    known = (math.log(2) + math.log1p(math.exp(-3))) / 2
    assert float(sums["loss_known"]) == pytest.approx(known, rel=1e-5)
    assert float(sums["loss_recovered"]) == pytest.approx(
        2 * math.log1p(math.exp(-2.2)) / 4, rel=1e-5
    )
    assert float(sums["loss"]) == pytest.approx(
        float(sums["loss_known"] + sums["loss_recovered"]), rel=1e-5
    )


def test_the_ema_teacher_teaches_what_it_last_said_of_the_clean_image():
    annotations = [[1, -1], [-1, 0], [-1, -1]]
    clean = [[1.0, 2.0], [-1.0, 3.0]]  # the third row is not seen
    before = {"image": [[7.0] * 2] * 2, "clean": [[9.0] * 2] * 2}
    last = {"image": [[-4.0] * 2] * 2, "clean": clean}
    start = whole_state(annotations, 2 * STEPS - 2, student=3.0, teacher=0.5)
    state = seen("ema_teacher", start, before, last)
    labels, weights = recovered("ema_teacher", state)
    moved = 0.99 * 0.5 + 0.01 * 3.0  # theta' after the step before, at optim.ema_decay = 0.99
    expected = [[1, sigmoid(2 * moved)], [sigmoid(-moved), 0], [0, 0]]
    np.testing.assert_allclose(labels, expected, rtol=1e-5)
    np.testing.assert_array_equal(weights, [[0, 1], [1, 0], [0, 0]])

    # The student learns on the other view: logits 3 * -4, whose loss at q is 12 q up to e^-12.
    state = recover_of("ema_teacher")(state)
    sums = seen("ema_teacher", state, last).sums
    taught_mean = 12 * (sigmoid(2 * moved) + sigmoid(-moved)) / 2
    assert float(sums["loss_recovered"]) == pytest.approx(taught_mean, rel=1e-4)
    assert float(sums["loss_known"]) == pytest.approx(12 / 2, rel=1e-4)

    # Where nothing is augmented, as in the table's configuration, there is one view for both.
    table = runpy.run_path(f"{commands.REPOSITORY}/configs/table.py")["get_config"]()
    assert experiment.augmentation(table).is_identity
    alone = seen("ema_teacher", start, {"image": clean})
    np.testing.assert_allclose(alone.scores[:2], sigmoid(0.5 * np.array(clean)), rtol=1e-5)


def test_co_occurrence_takes_what_known_positives_make_sure():
    """Classes a, b, c: b is there with a and is not with c, in six images each.

    P(b) = (6 + 1) / (12 + 2) = 1/2. At a known cell, which is left out itself, P(b | a) is
    (5 + 1/2) / (5 + 1) and P(b | c) (0 + 1/2) / (5 + 1); at an unknown one 6.5 / 7 and 0.5 / 7.
    P(a) = (7 + 1) / (8 + 2). Nothing is known of c's absence.
    """
    both, other, a, c, no_a, nothing = (
        [1, 1, -1],
        [-1, 0, 1],
        [1, -1, -1],
        [-1, -1, 1],
        [0, -1, -1],
        [-1, -1, -1],
    )
    state = whole_state([both] * 6 + [other] * 6 + [a, c, no_a, nothing], 2 * STEPS)
    options = options_of("co_occurrence")
    scores, visits = jax.jit(functools.partial(epoch_end.recovery_scores, options=options))(state)
    np.testing.assert_allclose(
        scores[:, 1], [5.5 / 6] * 6 + [0.5 / 6] * 6 + [6.5 / 7, 0.5 / 7, 0.5, 0.5], rtol=1e-5
    )
    # P(a | b) at six known cells, P(a) elsewhere: c was never seen beside a known a.
    np.testing.assert_allclose(scores[:, 0], [5.8 / 6] * 6 + [0.8] * 10, rtol=1e-5)
    np.testing.assert_array_equal(visits, [1] * 15 + [0])

    thresholds = jax.jit(functools.partial(epoch_end.recovery_thresholds, options=options))
    positive, negative = thresholds(state, scores, visits)
    # b: every known cell from the first of 1024 edges above 0.5 / 6 on is positive, every one below
    # the last edge under 5.5 / 6 negative. a: 7 of 8 from 0.8 on are too few, 6 of 6 above are not.
    np.testing.assert_allclose(positive[:2], [820 / 1024, 86 / 1024])
    np.testing.assert_allclose(negative[1], 938 / 1024)
    assert positive[2] > 1
    assert (negative[jnp.array([0, 2])] < 0).all()

    labels, weights = recovered("co_occurrence", state)
    expected = np.zeros((16, 3))
    expected[12, 1] = expected[13, 1] = 1  # 6.5 / 7 a positive, 0.5 / 7 a negative, 1/2 is both
    np.testing.assert_array_equal(weights, expected)
    known = np.maximum(np.asarray(state.annotations), 0)
    known[12, 1] = 1
    np.testing.assert_array_equal(labels, known)
    assert not recovered("co_occurrence", state.replace(step=jnp.int32(2 * STEPS - 1)))[1].any()


def test_prototypes_take_what_is_as_like_them_as_known_positives():
    """Class 0 has the prototype (1, 0), class 1 none yet, so that all likenesses are 1/2.

    (3, 4) and (-3, 4) have cosines of 0.6 and -0.6: likenesses of 0.8 and 0.2; (24, 7) and (-24, 7)
    of 0.98 and 0.02.
    """
    annotations = [[1, 1]] * 6 + [[0, 0]] * 6 + [[-1, -1]] * 4
    features = [[[3, 4], [0, 2]]] * 6 + [[[-3, 4], [1, 1]]] * 6
    features += [[[24, 7], [0, 2]], [[-24, 7], [1, 1]], [[0, 5], [0, 2]]]  # not the last row
    prototypes = {"prototypes": [[1, 0], [0, 0]]}
    state = seen(
        "prototypes",
        whole_state(annotations, 2 * STEPS - 1, memory=prototypes),
        {"image": features},
    )
    likeness = [0.8] * 6 + [0.2] * 6 + [0.98, 0.02, 0.5]
    np.testing.assert_allclose(state.scores[:15, 0], likeness, atol=1e-6)
    np.testing.assert_allclose(state.scores[:15, 1], 0.5, atol=1e-6)
    # 0.99 of the old one and 0.01 of the mean; the first mean as it is.
    np.testing.assert_allclose(state.memory["prototypes"], [[1.02, 0.04], [0, 2]], rtol=1e-5)

    options = options_of("prototypes")
    thresholds = jax.jit(functools.partial(epoch_end.recovery_thresholds, options=options))
    positive, negative = thresholds(state, state.scores, state.visits)
    np.testing.assert_allclose([positive[0], negative[0]], [205 / 1024, 819 / 1024])
    labels, weights = recovered("prototypes", state)
    np.testing.assert_array_equal(weights, [[0, 0]] * 12 + [[1, 0], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(
        labels, [[1, 1]] * 6 + [[0, 0]] * 6 + [[1, 0], [0, 0], [0, 0], [0, 0]]
    )


def test_where_no_threshold_is_right_enough_a_transfer_is_known_labels_alone():
    """Half of the images with a have b: no threshold has 90 % on one side."""
    rows = [[1, 1], [1, 0]] * 3 + [[1, -1]]
    state = whole_state(rows, 2 * STEPS)
    assert not recovered("co_occurrence", state)[1].any()
    features = np.random.default_rng(0).normal(size=(7, 2, 2))
    features[:6] = [[1, 1], [1, 1]]  # known positives and negatives look the same
    start = whole_state(rows, 2 * STEPS - 1, memory={"prototypes": [[1, 0], [0, 1]]})
    state = seen("prototypes", start, {"image": features})
    assert not recovered("prototypes", state)[1].any()
    for name in ("co_occurrence", "prototypes"):
        assert "nothing is recovered" in methods.find(name).note
        # `taught` has a state of which nothing was recovered.
        assert taught(name, 5)[0] == taught("known_bce", 5)[0]


def test_statistics_alone_teach_the_posterior_of_the_known_labels():
    """Two equally likely kinds of images, with classes of (0.8, 0.8, 0.2) and (0.2, 0.4, 0.6).

    With the first class the kinds are 0.8 to 0.2; without the second and with the third, 0.2 * 0.2
    to 0.6 * 0.6, they are 0.1 to 0.9.
    """
    kinds = np.array([[0.8, 0.8, 0.2], [0.2, 0.4, 0.6]])
    memory = {
        "frequencies": kinds.mean(axis=0),
        "mixture_prior": np.log([0.5, 0.5]),
        "mixture_logits": np.log(kinds / (1 - kinds)),
    }
    annotations = [[1, -1, -1], [-1, 0, 1], [-1, -1, -1]]
    state = whole_state(annotations, STEPS, memory=memory)
    labels, weights = recovered("statistics", state)
    # 0.8 * 0.8 + 0.2 * 0.4, 0.8 * 0.2 + 0.2 * 0.6, 0.1 * 0.8 + 0.9 * 0.2
    np.testing.assert_allclose(labels, [[1, 0.72, 0.28], [0.26, 0, 1], [0, 0, 0]], rtol=1e-5)
    np.testing.assert_array_equal(weights, [[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert not recovered("statistics", state.replace(step=jnp.int32(STEPS - 1)))[1].any()

    # At logits of 0 a positive costs log 2, a negative a quarter of it: 1/4 + 3/4 q at q. Of three
    # known labels two are positive; of six unknown cells three are taught; their weight is 1/2.
    state = recover_of("statistics")(state)
    sums = seen("statistics", state, {"image": [[0.0] * 3] * 3}).sums
    known, unknown = 2.25 / 3, (0.75 + 0.75 * (0.72 + 0.28 + 0.26)) / 6
    assert float(sums["loss"]) == pytest.approx((known + 0.5 * unknown) * math.log(2), rel=1e-5)


def test_methods_that_recover_by_the_epoch_have_no_label_statistics_besides():
    for name in ("curriculum", "ema_teacher", "co_occurrence", "prototypes", "statistics"):
        options = options_of(name)
        assert options.recovery_mode == "epoch"
        assert not options.loss_statistics
        assert not options.evaluate_statistics
        assert not options.hands_out_others
        assert options.loss_name == ("asl" if name == "statistics" else "bce")
        if name in ("co_occurrence", "prototypes"):  # as the configuration has it
            assert (options.teacher, options.momentum) == ("ema", 0.5)


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
