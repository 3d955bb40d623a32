"""Losses against hand arithmetic, a torch formulation and the parity fixtures."""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from clsl_jax.losses import (
    asymmetric_log_odds,
    asymmetric_loss,
    binary_cross_entropy,
    clsl_loss,
    expected_positives_loss,
    focal_margin_log_odds,
    focal_margin_loss,
    hill_log_odds,
    hill_loss,
    known_loss,
    recovered_loss,
)
from clsl_jax.recovery import online_targets

torch = pytest.importorskip("torch")

PARITY = pathlib.Path(
    os.environ.get("CLSL_PARITY_DIR", pathlib.Path(__file__).parent / "parity")
).expanduser()


def fixtures(kind):
    found = []
    for path in sorted(PARITY.glob("*.npz")):
        with np.load(path) as data:
            if json.loads(str(data["config"]))["kind"] == kind:
                found.append(pytest.param(path, id=path.stem))
    assert found, f"{PARITY} has no fixture of kind {kind}"
    return found


def asymmetric_posterior(logits, **settings):
    return jax.nn.sigmoid(asymmetric_log_odds(logits, **settings))


def torch_asymmetric_loss(logits, targets, gamma_pos, gamma_neg, clip, eps):
    """The paper's formula on probabilities."""
    p = torch.sigmoid(logits)
    q = 1 - p
    if clip > 0:
        q = (q + clip).clamp(max=1)
    loss = targets * torch.log(p.clamp(min=eps)) + (1 - targets) * torch.log(q.clamp(min=eps))
    with torch.no_grad():
        p_t = p * targets + q * (1 - targets)
        weight = (1 - p_t) ** (gamma_pos * targets + gamma_neg * (1 - targets))
    return -loss * weight


SETTINGS = [
    (0.0, 2.0, 0.0, 1e-5),
    (1.0, 4.0, 0.05, 1e-5),
    (0.0, 0.0, 0.0, 1e-5),
    (0.5, 1.5, 0.2, 1e-8),
    (0.0, 4.0, 0.05, 1e-3),
]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "clip", "eps"), SETTINGS)
def test_asymmetric_loss_equals_torch(gamma_pos, gamma_neg, clip, eps, soft):
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((40, 20))
    targets = rng.random((40, 20))
    if not soft:
        targets = (targets < 0.3).astype(float)
    x = torch.tensor(logits, requires_grad=True)
    expected = torch_asymmetric_loss(x, torch.tensor(targets), gamma_pos, gamma_neg, clip, eps)
    expected.sum().backward()

    def loss(x):
        return asymmetric_loss(
            x, targets, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip, eps=eps
        )

    with jax.enable_x64(True):
        value = loss(jnp.asarray(logits))
        gradient = jax.grad(lambda x: loss(x).sum())(jnp.asarray(logits))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-9, atol=1e-11)
    single = loss(jnp.asarray(logits, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_asymmetric_loss_by_hand():
    # p = 1/2 and 3/4; a negative at 3/4 is weighted (3/4)^2.
    logits = jnp.array([0.0, 0.0, math.log(3.0), math.log(3.0)])
    targets = jnp.array([1.0, 0.0, 1.0, 0.0])
    expected = [
        math.log(2),
        0.25 * math.log(2),
        math.log(4 / 3),
        0.5625 * math.log(4),
    ]
    np.testing.assert_allclose(asymmetric_loss(logits, targets), expected, rtol=1e-6)
    # clip 1/4: q = 1/4 + 1/4, and 1 - q = 1/2.
    clipped = asymmetric_loss(logits[3:], targets[3:], gamma_neg=3.0, clip=0.25)
    np.testing.assert_allclose(clipped, [0.125 * math.log(2)], rtol=1e-6)


def test_the_focusing_weight_has_no_gradient():
    # d/dz of -log(1 - p) is p; the weight p^2 stands still.
    z = math.log(3.0)
    gradient = jax.grad(lambda x: asymmetric_loss(x, jnp.float32(0.0)))(jnp.float32(z))
    assert float(gradient) == pytest.approx(0.75**2 * 0.75, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("elementwise", [asymmetric_loss, binary_cross_entropy])
def test_extreme_logits_stay_finite(elementwise, target, dtype):
    logits = jnp.array([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4], dtype)
    targets = jnp.full(logits.shape, target, dtype)
    value = elementwise(logits, targets)
    gradient = jax.grad(lambda x: elementwise(x, targets).sum())(logits)
    assert value.dtype == jnp.float32
    assert bool(jnp.isfinite(value).all())
    assert bool((value >= 0).all())
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_extreme_logits_without_a_floor(clip):
    logits = jnp.array([-1e4, 1e4])
    targets = jnp.array([1.0, 0.0])
    value, pullback = jax.vjp(lambda x: asymmetric_loss(x, targets, clip=clip, eps=0.0), logits)
    (gradient,) = pullback(jnp.ones(2))
    assert float(value[0]) == 1e4
    assert bool(jnp.isfinite(value).all())
    assert bool(jnp.isfinite(gradient).all())
    assert float(gradient[0]) == -1.0


def test_the_floor_is_minus_log_eps():
    value = asymmetric_loss(jnp.array([-50.0, 50.0]), jnp.array([1.0, 0.0]), eps=1e-5)
    np.testing.assert_allclose(value, -math.log(1e-5), rtol=1e-6)


def test_small_losses_keep_their_digits():
    # log(1 - sigmoid(20)) rounds away on probabilities in float32; e^-20 is the right value.
    value = asymmetric_loss(jnp.array([20.0]), jnp.array([1.0]))
    np.testing.assert_allclose(value, [math.exp(-20)], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"gamma_neg": -1.0}, {"gamma_pos": -0.1}, {"clip": 1.0}, {"clip": -0.1}, {"eps": 1.0}],
)
def test_asymmetric_loss_rejects(arguments):
    with pytest.raises(ValueError, match="asymmetric_loss"):
        asymmetric_loss(jnp.zeros(2), jnp.zeros(2), **arguments)


def test_binary_cross_entropy_equals_torch():
    rng = np.random.default_rng(1)
    logits, targets = 6 * rng.standard_normal((30, 7)), rng.random((30, 7))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(targets), reduction="none"
    )
    with jax.enable_x64(True):
        value = binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-10)
        check_grads(
            lambda x: binary_cross_entropy(x, targets),
            (jnp.asarray(logits),),
            order=1,
            modes=("rev",),
        )


def test_bce_is_asl_without_focus():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(3 * rng.standard_normal((9, 5)), jnp.float32)
    targets = jnp.asarray(rng.random((9, 5)), jnp.float32)
    plain = asymmetric_loss(logits, targets, gamma_pos=0.0, gamma_neg=0.0, eps=0.0)
    np.testing.assert_allclose(plain, binary_cross_entropy(logits, targets), rtol=1e-6)


LOSSES = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])


def test_known_loss_by_hand():
    known = jnp.array([[1, 0, 0], [0, 1, 1]], bool)
    assert float(known_loss(LOSSES, known)) == pytest.approx(49 / 3, rel=1e-6)
    assert float(known_loss(LOSSES, known, scale="released")) == 49_000
    everything = jnp.ones((2, 3), bool)
    assert float(known_loss(LOSSES, everything)) == 10.5
    assert float(known_loss(LOSSES, everything, scale="released")) == 10_500
    nothing = jnp.zeros((2, 3), bool)
    assert float(known_loss(LOSSES, nothing)) == 0
    assert float(known_loss(LOSSES, nothing, scale="released")) == 0


def test_recovered_loss_by_hand():
    unknown = jnp.array([[0, 1, 1], [1, 0, 1]], bool)
    weight = jnp.array([[9.0, 1.0, 0.5], [0.25, 9.0, 0.0]])
    # 2 + 2 + 2 over four unknown entries; weights at known entries count for nothing.
    assert float(recovered_loss(LOSSES, weight, unknown)) == 1.5
    assert float(recovered_loss(LOSSES, weight, unknown, scale="released")) == 10_500
    assert float(recovered_loss(LOSSES, weight, jnp.zeros((2, 3), bool))) == 0
    # 2 + 2 of two unknown entries, over the four known ones, which are more; in two parts as well.
    fewer = jnp.array([[0, 1, 0], [1, 0, 0]], bool)
    assert float(recovered_loss(LOSSES, weight, fewer)) == 1.0
    of_all = {"unknown_count": jnp.float32(2), "entries": 6}
    rows = (slice(0, 1), slice(1, 2))
    parts = [recovered_loss(LOSSES[r], weight[r], fewer[r], **of_all) for r in rows]
    assert [float(part) for part in parts] == [0.5, 0.5]


def squared(logits, targets):
    return jnp.square(logits - targets)


Z1 = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
Z0 = jnp.array([[2.0, 0.0, 1.0], [1.0, 3.0, 0.0]])
ANNOTATIONS = jnp.array([[1, -1, 0], [-1, 0, -1]], jnp.int8)
RECOVERED = jnp.array([[0.0, 1.0, 1.0], [0.5, 1.0, 0.0]])
WEIGHT = jnp.array([[7.0, 1.0, 7.0], [0.5, 7.0, 0.0]])


def test_clsl_loss_balanced_by_hand():
    total, terms = clsl_loss(
        Z1, Z0, ANNOTATIONS, RECOVERED, WEIGHT, elementwise=squared, recovered_scale=0.5
    )
    # Known entries: z1 (1-1)^2 + (3-0)^2 + (1-0)^2, z0 (2-1)^2 + (1-0)^2 + (3-0)^2, each over 3.
    known = 10 / 3 + 11 / 3
    # Unknown: z1 1*(2-1)^2 + .5*(0-.5)^2, z0 1*(0-1)^2 + .5*(1-.5)^2, each over 3.
    recovered = 1.125 / 3 + 1.125 / 3
    assert float(terms["known"]) == pytest.approx(known, rel=1e-6)
    assert float(terms["recovered"]) == pytest.approx(recovered, rel=1e-6)
    assert float(total) == pytest.approx(known + 0.5 * recovered, rel=1e-6)
    total, _ = clsl_loss(
        Z1,
        Z0,
        ANNOTATIONS,
        RECOVERED,
        WEIGHT,
        elementwise=squared,
        recovered_scale=0.5,
        global_scale=0.1,
    )
    assert float(total) == pytest.approx((10 + 1.1 + 0.5 * (1.125 + 0.1125)) / 3, rel=1e-6)


def test_clsl_loss_released_by_hand():
    total, terms = clsl_loss(
        Z1, Z0, ANNOTATIONS, RECOVERED, WEIGHT, elementwise=squared, scale="released"
    )
    # Targets of z0: [[1, 1, 0], [.5, 0, 0]]; squares 1 1 1 .25 9 0.
    assert float(terms["known"]) == 10_000
    assert float(terms["recovered"]) == pytest.approx(12_250 / 6, rel=1e-6)
    assert float(total) == pytest.approx(10_000 + 0.8 * 12_250 / 6, rel=1e-6)


@pytest.mark.parametrize("scale", ["balanced", "released"])
def test_clsl_loss_without_global_branch(scale):
    total, terms = clsl_loss(
        Z1, None, ANNOTATIONS, RECOVERED, WEIGHT, elementwise=squared, scale=scale
    )
    known, recovered = {"balanced": (10 / 3, 1.125 / 3), "released": (10_000, 0)}[scale]
    assert float(terms["known"]) == pytest.approx(known, rel=1e-6)
    assert float(terms["recovered"]) == pytest.approx(recovered, rel=1e-6)
    assert float(total) == pytest.approx(known + 0.8 * recovered, rel=1e-6)


@pytest.mark.parametrize("fill", [-1, 0, 1])
@pytest.mark.parametrize("scale", ["balanced", "released"])
def test_clsl_loss_is_finite_with_no_or_every_label_known(scale, fill):
    annotations = jnp.full((2, 3), fill, jnp.int8)

    def loss(z1, z0):
        return clsl_loss(z1, z0, annotations, RECOVERED, WEIGHT, scale=scale)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(Z1, Z0)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("scale", ["balanced", "released"])
def test_recovered_labels_carry_no_gradient(scale):
    def loss(recovered, weight):
        return clsl_loss(Z1, Z0, ANNOTATIONS, recovered, weight, scale=scale)[0]

    for gradient in jax.grad(loss, argnums=(0, 1))(RECOVERED, WEIGHT):
        assert not bool(gradient.any())


def test_released_recovery_trains_the_global_branch_only():
    def loss(z1, recovered):
        return clsl_loss(z1, Z0, ANNOTATIONS, recovered, WEIGHT, scale="released")[0]

    gradient = jax.grad(loss)
    np.testing.assert_array_equal(gradient(Z1, RECOVERED), gradient(Z1, 1 - RECOVERED))
    assert not bool(jnp.where(ANNOTATIONS < 0, gradient(Z1, RECOVERED), 0).any())


def test_clsl_loss_compiles_once_under_a_ramp():
    loss = jax.jit(
        lambda ramp: clsl_loss(Z1, Z0, ANNOTATIONS, RECOVERED, WEIGHT, recovered_scale=ramp)[0]
    )
    first, second = loss(jnp.float32(0.0)), loss(jnp.float32(2.0))
    assert float(second) > float(first)
    assert loss._cache_size() == 1


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="'huge' is unknown: use one of balanced, released"):
        clsl_loss(Z1, Z0, ANNOTATIONS, RECOVERED, WEIGHT, scale="huge")


@pytest.mark.parametrize("path", fixtures("losses"))
def test_losses_equal_the_released_program(path):
    data = np.load(path)
    eps = json.loads(str(data["config"]))["eps"]
    logits = jnp.asarray(data["logits"])
    labels, soft = jnp.asarray(data["labels"]), jnp.asarray(data["soft_targets"])
    annotations = jnp.where(data["known"] == 1, labels, -1).astype(jnp.int8)
    for row in data["rows"]:
        case = dict(zip((str(name) for name in data["columns"]), row, strict=True))

        def elementwise(x, t, case=case):
            return asymmetric_loss(
                x,
                t,
                gamma_pos=case["gamma_pos"],
                gamma_neg=case["gamma_neg"],
                clip=case["clip"],
                eps=eps,
            )

        def masked(x, elementwise=elementwise):
            return clsl_loss(
                x, None, annotations, soft, soft, elementwise=elementwise, scale="released"
            )[0]

        def of_soft(x, elementwise=elementwise):
            return recovered_loss(elementwise(x, soft), soft, soft, scale="released")

        for name, loss in (("masked_loss_sum_x1000", masked), ("soft_loss_mean_x1000", of_soft)):
            if np.isnan(case[name]):
                continue
            value, gradient = jax.value_and_grad(loss)(logits)
            norm = case[name.split("_")[0] + "_grad_norm"]
            assert float(value) == pytest.approx(case[name], rel=2e-5)
            assert float(jnp.linalg.norm(gradient)) == pytest.approx(norm, rel=2e-5)


@pytest.mark.parametrize("path", fixtures("head"))
def test_head_losses_equal_the_released_program(path):
    """Targets and both terms from the fixture's own outputs: no model is involved."""
    data = np.load(path)
    config = json.loads(str(data["config"]))
    p = data["train_probs"].astype(np.float64)
    z1 = jnp.asarray(np.log(p) - np.log1p(-p), jnp.float32)
    annotations = jnp.asarray(np.where(data["known"] == 1, data["labels"], -1).astype(np.int8))
    targets = online_targets(z1, annotations, sharpening="released")
    if "train_recovered_targets" in data:
        np.testing.assert_allclose(targets, data["train_recovered_targets"], atol=2e-4)
    z0 = jnp.asarray(data["train_global_logits"]) if "train_global_logits" in data else None
    total, terms = clsl_loss(
        z1,
        z0,
        annotations,
        targets,
        targets,
        elementwise=lambda x, t: asymmetric_loss(
            x,
            t,
            gamma_pos=config["gamma_pos"],
            gamma_neg=config["gamma_neg"],
            clip=config["clip"],
        ),
        scale="released",
        recovered_scale=config["recovery_weight"],
    )
    assert float(terms["known"]) == pytest.approx(float(data["train_loss_known"]), rel=2e-4)
    assert float(terms["recovered"]) == pytest.approx(float(data["train_loss_recovered"]), rel=2e-4)
    assert float(total) == pytest.approx(float(data["train_loss_total"]), rel=2e-4)


@pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "clip"), [(0, 2, 0), (0, 0, 0), (1, 4, 0), (0, 2, 0.05)]
)
@pytest.mark.parametrize("q", [0.02, 0.2, 0.5, 0.9])
def test_the_posterior_is_where_the_expected_gradient_vanishes(gamma_pos, gamma_neg, clip, q):
    """Oracle: the gradient of the loss itself, weighted by q and 1 - q, changes sign there."""
    named = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "clip": clip}

    def expected_loss(x):
        positive = asymmetric_loss(x, jnp.float32(1), eps=1e-12, **named)
        negative = asymmetric_loss(x, jnp.float32(0), eps=1e-12, **named)
        return q * positive + (1 - q) * negative

    slope = jax.jit(jax.grad(expected_loss))
    low, high = -8.0, 12.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    np.testing.assert_allclose(asymmetric_posterior(jnp.float32(low), **named), q, atol=2e-4)


def test_the_posterior_of_even_odds_by_hand():
    # (1/8) / (1/8 + 1/2)
    np.testing.assert_allclose(asymmetric_posterior(jnp.zeros(1)), 0.2, rtol=1e-6)
    extreme = asymmetric_posterior(jnp.array([-1e4, 1e4]))
    np.testing.assert_array_equal(extreme, [0.0, 1.0])


def test_the_expected_loss_by_hand():
    from clsl_jax.losses import expected_loss

    logits, targets = jnp.array([0.3, 0.3, 0.3]), jnp.array([0.0, 1.0, 0.25])
    p = 1 / (1 + np.exp(-0.3))
    positive, negative = -np.log(p), -(p**2) * np.log(1 - p)
    found = expected_loss(asymmetric_loss)(logits, targets)
    expected = [negative, positive, 0.25 * positive + 0.75 * negative]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    even = expected_loss(binary_cross_entropy)(logits, targets)
    np.testing.assert_allclose(even, binary_cross_entropy(logits, targets), rtol=1e-6)


def test_hill_loss_by_hand():
    """arXiv 2112.07368: positives -(1 - m)^2 log m with m = s(x - 1), negatives (3/2 - p) p^2."""
    x = math.log(3.0)  # p = 3/4
    m = 3 / (3 + math.e)
    np.testing.assert_allclose(hill_loss(x, 1.0), -((1 - m) ** 2) * math.log(m), rtol=1e-6)
    np.testing.assert_allclose(hill_loss(x, 0.0), 0.75 * 0.5625, rtol=1e-6)
    np.testing.assert_allclose(hill_loss(0.0, 1.0, margin=0.0), 0.25 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_the_gradient_of_a_negative_under_hill_has_the_shape_of_a_hill(p):
    """3 p^2 (1 - p)^2: what looks like a positive is left alone."""
    with jax.enable_x64(True):
        x = jnp.asarray(math.log(p / (1 - p)))
        found = jax.grad(lambda x: hill_loss(x, jnp.zeros(())))(x)
    np.testing.assert_allclose(found, 3 * p**2 * (1 - p) ** 2, rtol=1e-6)


def test_focal_margin_loss_by_hand():
    x = math.log(3.0)
    m = 3 / (3 + math.e)
    np.testing.assert_allclose(focal_margin_loss(x, 1.0), -((1 - m) ** 2) * math.log(m), rtol=1e-6)
    np.testing.assert_allclose(focal_margin_loss(x, 0.0), -0.5625 * math.log(0.25), rtol=1e-6)
    plain = focal_margin_loss(x, 1.0, margin=0.0, gamma=0.0)
    np.testing.assert_allclose(plain, binary_cross_entropy(x, 1.0), rtol=1e-6)


@pytest.mark.parametrize("loss", [hill_loss, focal_margin_loss])
def test_losses_of_far_logits_are_finite_with_finite_gradients(loss):
    x = jnp.array([-200.0, -30.0, 0.0, 30.0, 200.0])
    for target in (0.0, 1.0):
        value = loss(x, jnp.full(5, target))
        gradient = jax.grad(lambda x, y=target: loss(x, jnp.full(5, y)).sum())(x)
        assert np.isfinite(value).all()
        assert (value >= 0).all()
        assert np.isfinite(gradient).all()


def test_expected_positives_by_hand():
    """((mean of 1.25 and 0.5 positives) - 2) / 2, squared."""
    logits = jnp.array([[math.log(3.0), 0.0], [-50.0, 0.0]])
    np.testing.assert_allclose(expected_positives_loss(logits, 2.0), (-1.125 / 2) ** 2, rtol=1e-6)
    assert float(expected_positives_loss(jnp.zeros((4, 6)), 3.0)) == 0.0


def test_mean_scale_counts_a_known_and_an_assumed_label_alike():
    """BCE against the labels with unknown as negative, over all entries."""
    logits = jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    annotations = jnp.array([[1, -1, 0], [-1, -1, 1]], jnp.int8)
    loss, terms = clsl_loss(
        logits,
        None,
        annotations,
        jnp.zeros((2, 3)),
        jnp.ones((2, 3)),
        elementwise=binary_cross_entropy,
        scale="mean",
        recovered_scale=1.0,
    )
    x, y = torch.tensor(np.asarray(logits)), torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, y)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    known = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    share = known[torch.tensor(np.asarray(annotations)) >= 0].sum() / 6
    np.testing.assert_allclose(terms["known"], share.item(), rtol=1e-6)


def test_smoothing_softens_known_labels_only():
    logits = jnp.array([[0.7, -0.3]])
    annotations = jnp.array([[1, -1]], jnp.int8)
    found, _ = clsl_loss(
        logits,
        None,
        annotations,
        jnp.array([[0.0, 1.0]]),
        jnp.ones((1, 2)),
        elementwise=binary_cross_entropy,
        recovered_scale=0.5,
        smoothing=0.2,
    )
    softened = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([0.7, -0.3]), torch.tensor([0.9, 1.0]), reduction="none"
    )
    np.testing.assert_allclose(found, (softened[0] + 0.5 * softened[1]).item(), rtol=1e-6)


@pytest.mark.parametrize(("gamma_pos", "gamma_neg"), [(0, 2), (0, 0), (1, 4)])
@pytest.mark.parametrize("ratio", [-15.0, -1.0, 0.0, 0.5, 12.0])
def test_a_shift_multiplies_the_odds(gamma_pos, gamma_neg, ratio):
    from clsl_jax.losses import asymmetric_shift

    named = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg}
    logits = jnp.linspace(-6.0, 6.0, 41)
    found = asymmetric_shift(logits, jnp.full_like(logits, ratio), **named)

    def log_odds(x):  # from the posterior's closed form, in float64
        p = 1 / (1 + np.exp(-np.asarray(x, np.float64)))
        return (gamma_neg + 1) * np.log(p) - (gamma_pos + 1) * np.log1p(-p)

    np.testing.assert_allclose(log_odds(found), log_odds(logits) + ratio, atol=2e-5)
    q = asymmetric_posterior(jnp.float32(0.3), **named)
    shifted = asymmetric_shift(jnp.float32(0.3), jnp.log(2.0), **named)
    odds = asymmetric_posterior(shifted, **named)
    np.testing.assert_allclose(odds / (1 - odds), 2 * q / (1 - q), rtol=1e-4)
    # The derivative against differences of the function.
    slope = jax.vmap(jax.grad(lambda x: asymmetric_shift(x, jnp.float32(ratio), **named)))(logits)
    differences = np.diff(np.asarray(found, np.float64)) / np.diff(np.asarray(logits, np.float64))
    middle = (np.asarray(slope)[1:] + np.asarray(slope)[:-1]) / 2
    np.testing.assert_allclose(differences, middle, rtol=2e-2)


@pytest.mark.parametrize("margin", [0.0, 1.0])
@pytest.mark.parametrize(
    ("loss", "log_odds"),
    [(hill_loss, hill_log_odds), (focal_margin_loss, focal_margin_log_odds)],
)
def test_stated_odds_are_where_the_expected_gradient_vanishes(loss, log_odds, margin):
    logits = jnp.linspace(-8.0, 8.0, 65)
    q = jax.nn.sigmoid(log_odds(logits, margin=margin))

    def slope(target):
        targets = jnp.full_like(logits, target)
        return jax.grad(lambda x: jnp.sum(loss(x, targets, margin=margin)))(logits)

    positive, negative = slope(1.0), slope(0.0)
    pull = q * positive + (1.0 - q) * negative
    np.testing.assert_allclose(pull / (jnp.abs(positive) + negative), 0, atol=2e-5)
    assert (np.diff(q) >= 0).all()
    assert q[0] < 0.01 < 0.99 < q[-1]
    extreme = log_odds(jnp.array([-1e4, 1e4]), margin=margin)
    assert np.isfinite(np.asarray(extreme)).all()
