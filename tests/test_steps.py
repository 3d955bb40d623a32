"""The train step: what it may see, how often it compiles, what it does to the state."""

import dataclasses
import functools
import logging
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clsl_jax import (
    epoch_end,
    label_statistics,
    losses,
    optim,
    outputs,
    recovery,
    sharding,
    steps,
    train_state,
)
from clsl_jax.checkpoint import LEFT_OUT
from clsl_jax.data import transforms
from clsl_jax.models.clsl import CLSL, head_of
from clsl_jax.step_options import StepOptions

pytestmark = pytest.mark.slow

N, C, B, SIZE = 48, 6, 16, 16


def make_options(**changes):
    options = StepOptions(steps_per_epoch=3, ema_decay=0.9)
    return dataclasses.replace(options, **changes)


def make_model(**changes):
    plain = {
        "backbone": "small",
        "backbone_widths": (4, 8),
        "encoder_heads": 2,
        "encoder_mlp": 8,
        "rank": 4,
        "head_dropout": 0.1,
        "encoder_dropout": 0.1,
    }
    return CLSL(num_classes=C, **{**plain, **changes})


def make_labels(seed=0, fraction=0.4):
    rng = np.random.default_rng(seed)
    labels = (rng.random((N, C)) < 0.3).astype(np.int8)
    mask = rng.random((N, C)) < fraction
    return labels, np.where(mask, labels, -1).astype(np.int8)


def make_batch(rows, seed=0):
    rng = np.random.default_rng([seed, *rows])
    images = rng.integers(0, 256, (len(rows), SIZE, SIZE, 3), np.uint8)
    return {"image": images, "clean": images[:, ::-1].copy(), "row": np.asarray(rows, np.int32)}


class Harness:
    """Everything needed to run steps on a mesh of some devices.

    The model is the head alone, on the images themselves as features, which compiles in a third of
    the time; `whole` adds backbone and encoder.
    """

    def __init__(
        self,
        options=None,
        devices=1,
        annotations=None,
        learn=False,
        axis=1,
        whole=False,
        model=None,
        **model_changes,
    ):
        self.options = options or make_options()
        self.mesh = sharding.make_mesh(jax.devices()[:devices], model=axis)
        self.model = model or make_model(
            **({} if whole else {"encoder_layers": 0}), **model_changes
        )
        if not whole and model is None:
            self.model = head_of(self.model)
        schedule = optim.one_cycle(1e-2, 30)
        self.optimizer = optim.adamw_cycled(schedule.learning_rate, schedule.beta1)
        embeddings = np.random.default_rng(9).standard_normal((C, 6)).astype(np.float32)
        annotations = make_labels()[1] if annotations is None else annotations

        def init(embeddings, annotations):
            return train_state.init_state(
                self.model,
                self.optimizer,
                seed=3,
                image_size=SIZE,
                label_embeddings=embeddings,
                annotations=annotations,
                learn_embeddings=learn,
                graph_threshold=self.options.graph_threshold,
                graph_smoothing=self.options.graph_smoothing,
                components=self.options.components if self.options.needs_statistics else 0,
                prototypes=self.options.keeps_prototypes,
            )

        arguments = (
            sharding.put_replicated(self.mesh, embeddings),
            sharding.put_matrix(self.mesh, sharding.pad_rows(annotations, -1)),
        )
        shardings = train_state.state_shardings(jax.eval_shape(init, *arguments), self.mesh)
        self.state = jax.jit(init, out_shardings=shardings)(*arguments)
        step = steps.make_train_step(self.model, self.optimizer, self.options, mesh=self.mesh)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        self.recover = jax.jit(
            epoch_end.make_recover(self.options, mesh=self.mesh),
            donate_argnums=0,
            out_shardings=shardings,
        )

    def change(self, batch):
        return batch

    def run(self, count, seed=0):
        for k in range(count):
            start = k % 3 * B
            batch = sharding.put_rows(
                self.mesh, self.change(make_batch(range(start, start + B), seed))
            )
            with jax.transfer_guard("disallow"):
                self.state = self.step(self.state, batch)
            if k % 3 == 2:
                self.state = self.recover(self.state)
        return jax.device_get(self.state)


def assert_same_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_the_weights_alone_are_what_prediction_takes_and_no_more(learn, ema):
    model = make_model(freeze_backbone=True)

    def init(embeddings, annotations, backbone):
        return train_state.init_state(
            model,
            optax.adamw(1e-3),
            seed=0,
            image_size=SIZE,
            label_embeddings=embeddings,
            annotations=annotations,
            learn_embeddings=learn,
            graph_threshold=0.4,
            graph_smoothing=0.25,
            prototypes=True,
            components=2,
            backbone=backbone,
        )

    state = jax.eval_shape(
        init,
        jax.ShapeDtypeStruct((C, 6), jnp.float32),
        jax.ShapeDtypeStruct((256, C), jnp.int8),
        train_state.backbone_shapes(model, SIZE)[1],
    )
    wanted = train_state.weights_alone(state, ema=ema)
    taken = jax.tree.leaves(train_state.evaluation_weights(wanted, ema=ema))
    assert LEFT_OUT not in taken
    assert taken == jax.tree.leaves(train_state.evaluation_weights(state, ema=ema))
    # The backbone is among them, and nothing else is read.
    fixed = jax.tree.leaves((wanted.frozen, wanted.adjacency))
    assert set(map(id, fixed)) <= set(map(id, taken))
    read = [leaf for leaf in jax.tree.leaves(wanted) if leaf is not LEFT_OUT]
    assert sorted(map(id, read)) == sorted(map(id, taken))
    for left in (wanted.opt_state, wanted.scores, wanted.memory["prototypes"]):
        assert set(jax.tree.leaves(left)) == {LEFT_OUT}


RECOVERIES = [
    {"recovery_mode": "none"},
    {"recovery_mode": "online"},
    {"recovery_mode": "online", "scale": "released", "sharpening": "released"},
    {"recovery_mode": "epoch", "teacher": "student", "accumulate": 2, "skip_nonfinite": 1},
    {"recovery_mode": "epoch", "augment": transforms.Augment(flip=True, cutout=0.5)},
    {"recovery_mode": "epoch", "thresholds": "adaptive", "soft": False, "graph_layers": 1},
    {
        "recovery_mode": "epoch",
        "thresholds": "none",
        "total_steps": 6,
        "source": "both",
        "loss_statistics": True,
        "evaluate_statistics": True,
    },
    {"recovery_mode": "epoch", "thresholds": "matched", "soft": False, "total_steps": 6},
]


@pytest.mark.parametrize("changes", RECOVERIES)
def test_compiles_once_and_never_touches_the_host(changes, caplog):
    layers = changes.get("graph_layers", 0)
    whole = changes["recovery_mode"] == "epoch"
    harness = Harness(make_options(**changes), devices=8, whole=whole, graph_layers=layers)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        state = harness.run(6)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1
    assert sum("recover" in message for message in compiled) == 1
    assert state.step == 6
    assert state.sums["steps"] == 3
    assert np.isfinite(state.sums["loss"])


ASSUMED = {"recovery_mode": "assume", "scale": "mean", "loss_name": "bce"}
OF_OTHER_PAPERS = {
    "large losses for good": {
        **ASSUMED,
        "correction": "correct_for_good",
        "correction_rate": 0.05,
    },
    "self-paced": {**ASSUMED, "loss_name": "focal_margin", "correction": "self_paced"},
    "estimated": {
        "recovery_mode": "estimate",
        "scale": "mean",
        "loss_name": "bce",
        "expected_positives": 1.0,
        "positives_per_image": 1.5,
    },
    "prototypes": {"source": "prototypes", "min_count": 1, "thresholds": "adaptive"},
    "both": {"source": "both", "components": 3, "branch": "mean"},
    "blended": {"recovery_mode": "blend", "loss_name": "bce"},
    "co-occurrence": {"source": "co_occurrence", "thresholds": "adaptive", "min_count": 1},
}


@pytest.mark.parametrize("changes", OF_OTHER_PAPERS.values(), ids=OF_OTHER_PAPERS)
def test_rules_of_other_papers(changes, caplog):
    """One compilation; known cells stay; the end of an epoch done twice is done once."""
    options = make_options(**changes)
    harness = Harness(options, devices=2)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        once = harness.run(6)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1
    assert sum("recover" in message for message in compiled) == 1
    assert np.isfinite(once.sums["loss"])
    annotations = make_labels()[1]
    known = annotations >= 0
    np.testing.assert_array_equal(once.annotations[:N], annotations)
    np.testing.assert_array_equal(once.recovered[:N][known], annotations[known])
    np.testing.assert_array_equal(once.recovered_weight[:N][known], 0)
    np.testing.assert_array_equal(once.recovered_weight[N:], 0)
    if options.correction == "correct_for_good":
        # 5 % of a batch's unknown cells, rounded up, in the second epoch only.
        corrected = (once.recovered[:N] > 0) & ~known
        batches = [slice(k, k + B) for k in range(0, N, B)]
        expected = [math.ceil(0.05 * (~known[rows]).sum() - 1e-4) for rows in batches]
        assert [int(corrected[rows].sum()) for rows in batches] == expected
    elif options.recovery_mode == "blend":
        assert (once.memory["prototypes"] != 0).all()
        assert once.sums["loss_recovered"] > 0
    elif options.recovery_mode != "assume":
        assert (once.recovered_weight[:N][~known] > 0).any()
    assert_same_trees(once, jax.device_get(harness.recover(harness.state)))


def test_the_first_step_by_hand():
    """Sums, EMA, scores and visits after one step, from separate evaluations of the parts."""
    harness = Harness(make_options(recovery_mode="epoch", teacher="ema"))

    def average(tree):  # as if after other steps: averages that are not the weights
        return jax.tree.map(lambda x: 0.8 * x, tree)

    harness.state = harness.state.replace(
        ema_params=average(harness.state.ema_params),
        ema_batch_stats=average(harness.state.ema_batch_stats),
    )
    before = jax.device_get(harness.state)
    batch = make_batch(range(B))
    logits, _ = harness.model.apply(
        {"params": before.ema_params["model"], "batch_stats": before.ema_batch_stats},
        steps.normalize(jnp.asarray(batch["clean"])),
        before.label_embeddings,
        before.adjacency,
        train=False,
    )
    harness.state = harness.step(harness.state, sharding.put_rows(harness.mesh, batch))
    after = jax.device_get(harness.state)
    assert after.step == 1
    assert after.sums["steps"] == 1
    np.testing.assert_array_equal(after.visits[:B], 1)
    np.testing.assert_array_equal(after.visits[B:], 0)
    p = np.asarray(jax.nn.sigmoid(logits), np.float64)
    np.testing.assert_allclose(after.scores[:B], p**3 / (p**3 + 1 - p), rtol=1e-4)
    np.testing.assert_array_equal(after.scores[B:], 0)
    jax.tree.map(
        lambda old, new, ema: np.testing.assert_allclose(
            ema, 0.9 * old + 0.1 * new, rtol=1e-4, atol=1e-7
        ),
        (before.ema_params, before.ema_batch_stats),
        (after.params, after.batch_stats),
        (after.ema_params, after.ema_batch_stats),
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before.params, after.params)
    assert any(jax.tree.leaves(moved))
    for ema, params, batch_stats in (
        (True, after.ema_params, after.ema_batch_stats),
        (False, after.params, after.batch_stats),
    ):
        weights = train_state.evaluation_weights(after, ema=ema)
        assert_same_trees(weights["params"], params["model"])
        assert_same_trees(weights["batch_stats"], batch_stats)


def test_normalize():
    image = np.array([[[[0, 128, 255]]]], np.uint8)
    found = steps.normalize(jnp.asarray(image))[0, 0, 0]
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_known_entries_never_change_and_padding_is_never_recovered():
    harness = Harness(make_options(warmup_steps=0, confidence_power=0.0))
    annotations = make_labels()[1]
    state = harness.run(9)
    known = annotations >= 0
    np.testing.assert_array_equal(state.recovered[:N][known], annotations[known])
    np.testing.assert_array_equal(state.recovered_weight[:N][known], 0)
    assert (state.recovered_weight[:N][~known] > 0).all()
    np.testing.assert_array_equal(state.recovered_weight[N:], 0)
    np.testing.assert_array_equal(state.annotations[:N], annotations)


def test_labels_left_open_may_count_as_negatives():
    """As `assume` has them, as long as nothing is recovered; then those that still are open."""
    changes = {"scale": "mean", "loss_name": "bce", "recovery_weight": 1.0}
    opened = Harness(make_options(open_weight=0.5, warmup_steps=9, **changes)).run(3)
    assumed = Harness(make_options(recovery_mode="assume", assumed_weight=0.5, **changes)).run(3)
    assert opened.sums["loss_recovered"] > 0
    for a, b in zip(jax.tree.leaves(opened.params), jax.tree.leaves(assumed.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

    options = make_options(open_weight=0.5, soft=False, positive_threshold=0.5, **changes)
    harness = Harness(dataclasses.replace(options, negative_threshold=0.0))
    state = harness.run(3)
    unknown = make_labels()[1] < 0
    found = unknown & (state.scores[:N] >= 0.5)
    assert 0 < found.sum() < unknown.sum()
    np.testing.assert_array_equal(state.recovered_weight[:N], found)
    logits = jnp.zeros((N, C))
    targets, weights = steps._targets(
        state, np.arange(N), logits, make_labels()[1], options, losses.binary_cross_entropy
    )
    np.testing.assert_array_equal(targets[unknown], found[unknown])
    np.testing.assert_array_equal(weights[unknown], np.where(found, 1.0, 0.5)[unknown])


def test_recovery_waits_for_the_warm_up():
    harness = Harness(make_options(warmup_steps=6))
    assert (harness.run(3).recovered_weight == 0).all()
    harness = Harness(make_options(warmup_steps=6))
    assert (harness.run(6).recovered_weight > 0).any()


def test_the_end_of_an_epoch_done_twice_is_done_once():
    options = make_options(thresholds="adaptive", min_count=1, graph_layers=1)
    harness = Harness(options, graph_layers=1)
    once = harness.run(3)
    twice = jax.device_get(harness.recover(harness.state))
    assert_same_trees(once, twice)


def test_the_graph_of_known_and_recovered_labels_by_hand():
    """Row a: how probable b is where a is known to be positive, every cell with a label alike."""
    options = make_options(thresholds="none", total_steps=6, graph_layers=1, graph_threshold=0.3)
    harness = Harness(options, graph_layers=1)
    before = np.asarray(harness.state.adjacency)

    def graph(state):
        seen = ((state.annotations >= 0) | (state.recovered_weight > 0)).astype(np.float64)
        first = (state.annotations == 1).astype(np.float64)
        together, seen = (np.einsum("na,nb->ab", first, x) for x in (state.recovered * seen, seen))
        edges = (together >= 0.3 * seen) & ~np.eye(C, dtype=bool)
        assert 0 < edges.sum() < C * (C - 1)
        weights = np.eye(C) + 0.25 * edges / np.maximum(edges.sum(axis=0), 1)
        scale = 1 / np.sqrt(weights.sum(axis=1))
        return scale[:, None] * weights.T * scale

    state = harness.run(3)
    np.testing.assert_allclose(state.adjacency, graph(state), atol=1e-5)
    assert np.abs(state.adjacency - before).max() > 0.01
    # In the end, too, it is of what was learned from, and not of what is handed out.
    state = harness.run(3)
    assert np.abs(state.adjacency - graph(state)).max() > 0.01
    fixed = dataclasses.replace(options, graph_refresh=False)
    np.testing.assert_array_equal(Harness(fixed, graph_layers=1).run(3).adjacency, before)


@pytest.mark.parametrize("devices", [1, 8])
def test_matched_thresholds_teach_a_share_of_what_each_class_should_have(devices):
    rule = {"positive_coverage": 0.5, "negative_coverage": 0.4, "min_known": 2}
    options = make_options(thresholds="matched", total_steps=6, soft=False, **rule)
    state = Harness(options, devices=devices).run(3)
    matrices = (state.scores, state.annotations, state.visits)
    positive, negative = recovery.matched_thresholds(*matrices, **rule)
    open_ = (state.annotations < 0) & (state.visits > 0)[:, None]
    expected = (state.scores >= positive).astype(int) - (state.scores < negative)
    given = np.where(state.recovered > 0, 1, -1) * state.recovered_weight
    np.testing.assert_array_equal(given, np.where(open_, expected, 0))
    for side in (1, -1):
        assert 0 < (given == side).sum() < (given != side).sum()


@pytest.mark.parametrize(
    ("calibration", "rule"),
    [("known", recovery.adaptive_thresholds), ("expected", recovery.expected_thresholds)],
)
@pytest.mark.parametrize(("taught", "devices"), [("none", 1), ("matched", 1), ("matched", 8)])
def test_other_labels_are_learned_from_than_the_safe_ones_that_are_handed_out(
    taught, devices, calibration, rule
):
    options = make_options(
        thresholds=taught,
        soft=taught == "none",
        calibration=calibration,
        confidence_power=0.0,
        total_steps=6,
        positive_precision=0.8,
        negative_precision=0.8,
        min_count=1,
    )
    annotations = make_labels()[1]
    known = annotations >= 0

    def safe(state):
        thresholds = rule(
            state.scores,
            state.annotations,
            state.visits,
            positive_precision=0.8,
            negative_precision=0.8,
        )
        labels, weight = recovery.recover_labels(
            state.scores,
            state.visits,
            state.annotations,
            positive_threshold=thresholds[0],
            negative_threshold=thresholds[1],
            soft=False,
        )
        assert 0 < weight.sum() < (~known).sum()
        return labels, weight

    harness = Harness(options, devices=devices)
    state = harness.run(3)
    if taught == "none":  # every label
        np.testing.assert_array_equal(state.recovered_weight[:N], ~known)
        np.testing.assert_array_equal(
            state.recovered[:N], np.where(known, annotations, state.scores[:N])
        )
    else:  # positives alone, by the options' own shares
        thresholds = recovery.matched_thresholds(
            state.scores,
            state.annotations,
            state.visits,
            positive_coverage=0.5,
            negative_coverage=0.0,
        )
        expected = ~known & (state.scores[:N] >= thresholds[0])
        assert 0 < expected.sum() < safe(state)[1].sum()
        np.testing.assert_array_equal(state.recovered_weight[:N], expected)
        np.testing.assert_array_equal(state.recovered[:N] > 0, expected | (annotations == 1))
    # Whoever asks half way gets the safe ones all the same.
    assert_same_trees(epoch_end.recovered_labels(state, options.handing_out), safe(state))

    state = harness.run(3)
    assert_same_trees((state.recovered, state.recovered_weight), safe(state))


@pytest.mark.parametrize("taught", ["none", "matched", "adaptive"])
def test_labels_are_handed_out_by_what_predictions_are_made_of(taught):
    """Statistics that are asked when predicting alone; what is learned from does not ask them."""
    options = make_options(thresholds=taught, evaluate_statistics=True, components=3)
    state = Harness(options).run(3)
    learned, given = (
        epoch_end.recovery_scores(state, asked)[0][:N] for asked in (options, options.handing_out)
    )
    informed = label_statistics.informed_probabilities(
        state.memory, state.annotations[:N], state.scores[:N]
    )
    np.testing.assert_array_equal(learned, state.scores[:N])
    np.testing.assert_allclose(given, learned if taught == "adaptive" else informed, rtol=1e-5)
    assert np.abs(informed - learned).max() > 0.01


@pytest.mark.parametrize("loss_name", ["asl", "bce"])
@pytest.mark.parametrize("source", ["both", "scores"])
def test_informed_logits_stand_for_posteriors_given_the_other_labels(loss_name, source):
    options = make_options(loss_name=loss_name, source=source, loss_statistics=True)
    annotations = make_labels()[1]
    statistics = label_statistics.fit_statistics(jax.random.key(1), annotations, 3)
    logits = jnp.asarray(np.random.default_rng(2).normal(size=annotations.shape), jnp.float32)
    found = steps.informed_logits(statistics, logits, annotations, options)
    scores = outputs.calibrated(logits, options)
    expected = label_statistics.informed_probabilities(statistics, annotations, scores)
    if source == "scores":
        expected = jnp.where(annotations >= 0, expected, scores)
    np.testing.assert_allclose(outputs.calibrated(found, options), expected, rtol=1e-3, atol=1e-5)
    # What an unknown label teaches goes to its own logit, not to those that it is judged by.
    weights = jnp.asarray(np.random.default_rng(3).normal(size=annotations.shape), jnp.float32)

    def taught(logits):
        return jnp.sum(weights * steps.informed_logits(statistics, logits, annotations, options))

    gradient = np.asarray(jax.grad(taught)(logits)) / np.asarray(weights)
    slope = 1.0 if loss_name == "bce" else 3 - 2 * jax.nn.sigmoid(logits)
    new_slope = 1.0 if loss_name == "bce" else 3 - 2 * jax.nn.sigmoid(found)
    np.testing.assert_allclose(gradient, slope / new_slope * np.ones_like(gradient), rtol=1e-3)


def test_known_labels_are_scored_with_statistics():
    """The loss of a first step without dropout, from the network's own logits."""
    options = make_options(
        recovery_mode="none", loss_statistics=True, evaluate_statistics=True, components=3
    )
    harness = Harness(options, head_dropout=0.0, global_branch=False)
    before = jax.device_get(harness.state)
    batch = make_batch(range(B))
    logits, _ = harness.model.apply(
        {"params": before.params["model"], "batch_stats": before.batch_stats},
        steps.normalize(batch["image"]),
        before.label_embeddings,
        before.adjacency,
        train=True,
        mutable=["batch_stats"],
    )[0]
    annotations = before.annotations[batch["row"]]
    p = label_statistics.informed_probabilities(
        before.memory, annotations, outputs.calibrated(logits, options)
    )
    known = annotations >= 0
    # The asymmetric loss at the sigmoid s that stands for p: odds(p) = s^3 / (1 - s).
    odds = np.asarray(p / (1 - p), np.float64)
    low, high = np.zeros(odds.shape), np.ones(odds.shape)
    for _ in range(60):
        s = (low + high) / 2
        above = s**3 / np.maximum(1 - s, 1e-300) > odds
        low, high = np.where(above, low, s), np.where(above, s, high)
    loss = np.where(annotations == 1, -np.log(s), -(s**2) * np.log1p(-s))
    found = harness.run(1).sums["loss_known"]
    np.testing.assert_allclose(found, loss[known].mean(), rtol=1e-3)


def test_predictions_with_statistics_are_posteriors_of_what_the_network_says():
    harness = Harness(make_options(evaluate_statistics=True, components=3, recovery_mode="none"))
    state = harness.run(3)
    weights = train_state.evaluation_weights(state, ema=True)
    images = make_batch(range(B))["image"]
    found = steps.make_predict_step(harness.model, harness.options)(weights, images)
    plain = dataclasses.replace(harness.options, evaluate_statistics=False)
    sigmoid = steps.make_predict_step(harness.model, plain)(weights, images)
    kept = weights["statistics"]
    ratios = label_statistics.evidence(
        outputs.stated_probabilities(sigmoid, plain), kept["frequencies"]
    )
    # Bayes' rule, component by component.
    on = np.asarray(jax.nn.sigmoid(kept["mixture_logits"]), np.float64)  # [K, C]
    odds = np.exp(np.asarray(ratios, np.float64))  # [B, C]
    either = on[None] * odds[:, None] + 1 - on[None]  # [B, K, C]
    joint = np.exp(np.asarray(kept["mixture_prior"])) * either.prod(axis=2)
    share = joint / joint.sum(axis=1, keepdims=True)
    expected = (share[..., None] * (on[None] * odds[:, None] / either)).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(outputs.stated_probabilities(found, harness.options), found)
    # The statistics are those of the known labels, before and after training.
    np.testing.assert_allclose(
        kept["frequencies"], label_statistics.label_frequencies(make_labels()[1]), rtol=1e-6
    )


def test_the_weight_of_the_recovered_term_ramps_up():
    options = make_options(recovery_mode="online", recovery_weight=2.0, ramp_steps=4)
    found = [float(steps._recovered_scale(jnp.int32(k), options)) for k in range(6)]
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    # From the first recovery on, where there is one.
    options = make_options(recovery_weight=2.0, ramp_steps=4, warmup_steps=3)
    assert options.recovery_mode == "epoch"
    found = [float(steps._recovered_scale(jnp.int32(k), options)) for k in range(8)]
    np.testing.assert_allclose(found, [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("loss_name", ["asl", "bce", "hill", "focal_margin"])
def test_estimates_that_the_network_states_already_stay(loss_name):
    """Whatever the loss makes of a sigmoid: it is no probability but for the cross-entropy."""
    options = make_options(recovery_mode="estimate", loss_name=loss_name)
    logits = jnp.linspace(-3, 3, 12).reshape(3, 4)
    stated = jax.nn.sigmoid(outputs.stated_log_odds(logits, options))
    state = types.SimpleNamespace(
        visits=jnp.ones(3, jnp.int32), scores=stated, annotations=jnp.full((3, 4), -1, jnp.int8)
    )
    found, _ = steps._teach(None, state, {"row": jnp.arange(3)}, logits, None, options)
    np.testing.assert_allclose(found, stated, atol=1e-6)


def test_expected_positives_are_counted_in_stated_probabilities():
    """New weights give logits near 0: a half by the cross-entropy, a fifth by `asl` (4, 1)."""
    counted = {}
    for loss_name in ("bce", "asl"):
        given = {"loss_name": loss_name, "recovery_mode": "none", "positives_per_image": 0.0}
        without, with_it = (
            Harness(make_options(**given, expected_positives=weight)).run(1).sums["loss"]
            for weight in (0.0, 1.0)
        )
        counted[loss_name] = float(with_it - without) ** 0.5
    assert counted["bce"] == pytest.approx(0.5, abs=0.05)
    assert counted["asl"] == pytest.approx(0.2, abs=0.05)


def test_learned_embeddings_move_and_fixed_ones_do_not():
    learned = Harness(learn=True)
    start = np.asarray(learned.state.label_embeddings)
    state = learned.run(3)
    assert np.abs(state.params["label_embeddings"] - start).max() > 0
    np.testing.assert_array_equal(state.label_embeddings, start)
    weights = train_state.evaluation_weights(state, ema=False)
    np.testing.assert_array_equal(weights["label_embeddings"], state.params["label_embeddings"])
    assert "label_embeddings" not in Harness().run(1).params


@pytest.mark.parametrize("devices", [8])
def test_more_devices_give_the_same_training(devices):
    """To float tolerance: sums over the batch are taken in another order."""
    options = make_options(recovery_mode="epoch", confidence_power=0.0)
    one, many = (Harness(options, devices=n, whole=True).run(6) for n in (1, devices))
    np.testing.assert_allclose(one.sums["loss"], many.sums["loss"], rtol=1e-4)
    np.testing.assert_allclose(one.scores, many.scores, atol=2e-3)
    np.testing.assert_array_equal(one.visits, many.visits)


@pytest.mark.parametrize(
    "switch", [{"srfl": False}, {"sgfe": False}, {"global_branch": False}, {"graph_layers": 2}]
)
def test_parts_switch_off(switch):
    options = make_options(graph_layers=switch.get("graph_layers", 0))
    state = Harness(options, **switch).run(3)
    assert np.isfinite(state.sums["loss"])
    assert optax.tree.norm(state.params) > 0


def test_an_axis_for_classes_and_wide_layers_gives_the_same_training():
    options = make_options(recovery_mode="epoch", thresholds="adaptive", min_count=1)
    one = Harness(options, learn=True, whole=True)
    divided = Harness(options, devices=8, axis=2, learn=True, whole=True)
    shards = {
        "scores": divided.state.scores,
        "embeddings": divided.state.params["label_embeddings"],
        "wide": divided.state.opt_state.mu["model"]["enhancement"]["mlp_hidden"]["kernel"],
        "backbone": divided.state.params["model"]["backbone"]["conv1"]["kernel"],
    }
    fraction = {k: x.addressable_shards[0].data.size / x.size for k, x in shards.items()}
    assert fraction == {"scores": 1 / 8, "embeddings": 1 / 2, "wide": 1 / 2, "backbone": 1}
    a, b = one.run(6), divided.run(6)
    np.testing.assert_allclose(a.sums["loss"], b.sums["loss"], rtol=1e-4)
    np.testing.assert_allclose(a.scores, b.scores, atol=2e-3)
    np.testing.assert_array_equal(a.visits, b.visits)


class OnFeatures(Harness):
    """Steps of a head without batch norms or dropout: images are independent of each other."""

    def __init__(self, options, **more):
        model = head_of(make_model(srfl=False, encoder_layers=0, head_dropout=0.0))
        super().__init__(options, model=model, **more)

    def change(self, batch):
        return {k: x if k == "row" else x.astype(np.float32) / 255 for k, x in batch.items()}


@pytest.mark.parametrize("scale", ["balanced", "released"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_in_parts_is_the_batch(scale, devices):
    mode = "epoch" if scale == "balanced" else "online"
    options = make_options(recovery_mode=mode, scale=scale, confidence_power=0.0)
    whole = OnFeatures(options).run(6)
    in_parts = OnFeatures(dataclasses.replace(options, accumulate=4), devices=devices).run(6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for name in ("scores", "recovered_weight", "sums"):
        jax.tree.map(same, getattr(in_parts, name), getattr(whole, name))
    # Kernels: the gradient of the attention's biases is nothing but rounding.
    for a, b in zip(jax.tree.leaves(in_parts.params), jax.tree.leaves(whole.params), strict=True):
        if a.ndim > 1:
            same(a, b)
    assert whole.sums["loss"] > 0


class WithFault(OnFeatures):
    """The image of row 21 is not finite; rows 16 to 31 make step 2."""

    value = np.nan

    def change(self, batch):
        batch = super().change(batch)
        for name in ("image", "clean"):
            batch[name][batch["row"] == 21, 0, 0] = self.value
        return batch


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_is_named_with_its_rows(value, monkeypatch):
    monkeypatch.setattr(WithFault, "value", value)
    state = WithFault(make_options()).run(3)
    assert (state.fault_step, state.faulty_steps) == (1, 2)  # the third step has NaN weights
    np.testing.assert_array_equal(state.faults[16:32], np.arange(16, 32) == 21)
    assert np.isnan(state.sums["loss"])


def test_a_step_that_is_not_finite_can_be_left_out():
    """Weights, moments, averages and scores are those of a run that never saw that batch."""
    options = make_options(skip_nonfinite=1)
    before = WithFault(options).run(1)
    after = WithFault(options).run(2)
    assert (after.step, after.fault_step, after.faulty_steps) == (2, 1, 1)
    np.testing.assert_array_equal(np.flatnonzero(after.faults), [21])
    names = ("params", "ema_params", "opt_state", "batch_stats", "sums", "scores", "visits")
    for name in names:
        assert_same_trees(getattr(after, name), getattr(before, name))
    sound = OnFeatures(options).run(1)
    assert_same_trees(before.params, sound.params)
    assert np.isfinite(WithFault(options).run(6).sums["loss"])


def test_a_gradient_alone_that_is_not_finite_is_a_fault_of_the_whole_batch(monkeypatch):
    def rooted(options):  # its value is finite, its gradient is 0 / 0
        return lambda z, t: losses.binary_cross_entropy(z, t) + jnp.sqrt(z - z)

    monkeypatch.setattr(steps, "_elementwise_loss", rooted)
    harness = OnFeatures(make_options(skip_nonfinite=1))
    before = jax.device_get(harness.state.params)
    state = harness.run(1)
    assert (state.fault_step, state.faulty_steps) == (0, 1)
    np.testing.assert_array_equal(np.flatnonzero(state.faults), np.arange(B))
    assert_same_trees(state.params, before)
    assert (state.visits == 0).all()


def test_images_changed_on_the_device_and_a_teacher_that_sees_them_clean():
    augment = transforms.Augment(flip=True, randaugment_operations=2, cutout=0.5)
    options = make_options(recovery_mode="epoch", teacher="ema")

    class Plain(Harness):
        def change(self, batch):  # what the teacher sees without augmentation on the host
            return {"image": batch["image"], "row": batch["row"]}

    plain = Plain(options).run(1)
    clean = Plain(dataclasses.replace(options, augment=augment)).run(1)
    seen = Plain(dataclasses.replace(options, augment=augment, clean_view=False)).run(1)
    # The first scores are of the first weights: they tell what the teacher saw.
    np.testing.assert_array_equal(clean.scores, plain.scores)
    assert np.abs(seen.scores - plain.scores).max() > 1e-3
    assert clean.sums["loss"] != plain.sums["loss"]


def test_online_targets_leave_a_network_where_it_stands():
    """Not sharpened, a target is what the logit stands for: the loss pulls it nowhere."""
    for options in (
        make_options(recovery_mode="online"),
        make_options(recovery_mode="online", loss_name="bce"),
        make_options(recovery_mode="online", scale="released"),
        make_options(recovery_mode="online", sharpening="released"),
    ):
        logits = jnp.linspace(-3.0, 1.0, C)[None]  # the largest is 1: as sharp as it is
        unknown = jnp.full((1, C), -1, jnp.int8)
        elementwise = steps._elementwise_loss(options)
        targets, weights = steps._targets(None, None, logits, unknown, options, elementwise)
        assert float(weights.min()) == 1
        pull = jax.grad(lambda z, t=targets, loss=elementwise: jnp.sum(loss(z, t)))(logits)
        np.testing.assert_allclose(pull, 0, atol=1e-6)


def test_scores_that_nothing_is_recovered_from_are_not_computed():
    harness = Harness(make_options(recovery_mode="epoch", source="co_occurrence"))
    state = harness.run(2)
    assert int(state.visits.max()) == 0
    assert float(state.scores.max()) == 0
    recovered = epoch_end.make_recover(harness.options)(state)
    assert float(recovered.recovered_weight.max()) > 0
