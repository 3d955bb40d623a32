"""The optimiser against torch.optim.AdamW under OneCycleLR, step by step."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clsl_jax.optim import adamw_cycled, ema_update, one_cycle

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
    return found


def torch_cycle(peak, total_steps, warmup_fraction, weight_decay=1e-4, params=None):
    params = params or [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(params, lr=peak, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=total_steps, pct_start=warmup_fraction
    )
    return optimizer, scheduler


@pytest.mark.parametrize("warmup_fraction", [0.2, 0.3])
@pytest.mark.parametrize("total_steps", [7, 30, 33, 200])
def test_one_cycle_equals_torch(total_steps, warmup_fraction):
    optimizer, scheduler = torch_cycle(9e-5, total_steps, warmup_fraction)
    schedule = one_cycle(9e-5, total_steps, warmup_fraction=warmup_fraction)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        assert float(schedule.learning_rate(step)) == pytest.approx(group["lr"], rel=2e-6)
        assert float(schedule.beta1(step)) == pytest.approx(group["betas"][0], rel=2e-6)
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()


def test_one_cycle_by_hand():
    schedule = one_cycle(1.0, 11, warmup_fraction=4 / 11)
    rates = [float(schedule.learning_rate(step)) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[3] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1 / 25 / 1e4)
    assert np.argmax(rates) == 3
    # Step 1 of 3: cos(pi / 3) = 1/2, three quarters of the way still to go.
    assert rates[1] == pytest.approx(1 - 0.75 * (1 - 1 / 25))
    assert float(schedule.beta1(0)) == pytest.approx(0.95)
    assert float(schedule.beta1(3)) == pytest.approx(0.85)
    assert float(schedule.beta1(10)) == pytest.approx(0.95)


def test_one_cycle_stays_at_its_end():
    schedule = one_cycle(1.0, 10)
    assert float(schedule.learning_rate(9)) == float(schedule.learning_rate(1_000_000))
    assert float(schedule.beta1(9)) == float(schedule.beta1(1_000_000))


@pytest.mark.parametrize("total_steps", range(1, 12))
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.2, 0.5, 1.0])
def test_one_cycle_is_finite_for_any_length(total_steps, warmup_fraction):
    schedule = one_cycle(1.0, total_steps, warmup_fraction=warmup_fraction)
    steps = jnp.arange(total_steps)
    rates, decays = jax.vmap(schedule.learning_rate)(steps), jax.vmap(schedule.beta1)(steps)
    assert bool(((rates >= 0) & (rates <= 1.0)).all())
    assert bool(((decays > 0.849) & (decays < 0.951)).all())


@pytest.mark.parametrize(
    ("total_steps", "warmup_fraction", "match"),
    [(0, 0.2, "total_steps"), (10, 1.5, "warmup_fraction"), (10, -0.1, "warmup_fraction")],
)
def test_one_cycle_rejects(total_steps, warmup_fraction, match):
    with pytest.raises(ValueError, match=match):
        one_cycle(1.0, total_steps, warmup_fraction=warmup_fraction)


@pytest.mark.parametrize("path", fixtures("trajectory"))
def test_learning_rates_of_the_released_program(path):
    data = np.load(path)
    config = json.loads(str(data["config"]))
    schedule = one_cycle(
        config["peak_learning_rate"],
        config["total_steps"],
        warmup_fraction=config["warmup_fraction"],
    )
    steps = jnp.arange(len(data["learning_rates"]))
    np.testing.assert_allclose(
        jax.vmap(schedule.learning_rate)(steps), data["learning_rates"], rtol=2e-6
    )


SHAPES = {"kernel": (4, 5), "bias": (5,), "scale": ()}


def random_tree(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(spread * rng.standard_normal(shape), np.float32)
        for name, shape in SHAPES.items()
    }


def test_thirty_steps_equal_torch():
    peak, steps, decay = 0.05, 30, 0.1
    start = random_tree(0)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer, scheduler = torch_cycle(peak, steps, 0.2, decay, list(theirs.values()))
    schedule = one_cycle(peak, steps)
    ours = jax.tree.map(jnp.asarray, start)
    transformation = adamw_cycled(schedule.learning_rate, schedule.beta1, weight_decay=decay)
    state = transformation.init(ours)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(steps):
        gradients = random_tree(index + 1, spread=10.0 ** (index % 5 - 3))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        optimizer.step()
        if index < steps - 1:
            scheduler.step()
        ours, state = step(ours, state, gradients)
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                ours[name], parameter.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name
            )
    assert int(state.count) == steps
    assert step._cache_size() == 1


def test_adamw_by_hand():
    # First step from rest: the bias-corrected Adam direction is the sign of the gradient.
    params = {"w": jnp.array([2.0, -4.0])}
    transformation = adamw_cycled(0.1, 0.9, weight_decay=0.5, eps=0.0)
    updates, _ = transformation.update(
        {"w": jnp.array([3.0, -0.01])}, transformation.init(params), params
    )
    expected = np.array([-0.1 * 0.5 * 2.0 - 0.1, 0.1 * 0.5 * 4.0 + 0.1])
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_adamw_with_constant_rate_equals_optax():
    params = jax.tree.map(jnp.asarray, random_tree(0))
    ours = adamw_cycled(0.01, 0.9, weight_decay=0.02)
    theirs = optax.adamw(0.01, b1=0.9, weight_decay=0.02)
    our_state, their_state = ours.init(params), theirs.init(params)
    for index in range(5):
        gradients = random_tree(index + 10)
        our_updates, our_state = ours.update(gradients, our_state, params)
        their_updates, their_state = theirs.update(gradients, their_state, params)
        for name in SHAPES:
            np.testing.assert_allclose(our_updates[name], their_updates[name], rtol=1e-4, atol=1e-8)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    clipping = adamw_cycled(0.1, 0.9, max_gradient_norm=1.0)
    plain = adamw_cycled(0.1, 0.9)
    _, clipped_state = clipping.update(gradients, clipping.init(params), params)
    scaled = jax.tree.map(lambda g: g / 5.0, gradients)
    _, plain_state = plain.update(scaled, plain.init(params), params)
    moments = clipped_state[1].mu
    for name in params:
        np.testing.assert_allclose(moments[name], plain_state.mu[name], rtol=1e-6)
    np.testing.assert_allclose(moments["b"], [0.1 * 0.8], rtol=1e-5)


def test_update_needs_the_parameters():
    transformation = adamw_cycled(0.1)
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(params, transformation.init(params))


def test_the_optimizer_learns():
    schedule = one_cycle(0.3, 200)
    transformation = adamw_cycled(schedule.learning_rate, schedule.beta1, weight_decay=0.0)
    goal = jnp.array([1.0, -2.0, 3.0])
    params = jnp.zeros(3)
    state = transformation.init(params)

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(2 * (params - goal), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    np.testing.assert_allclose(params, goal, atol=0.05)


def test_ema_by_hand():
    ema = {"w": jnp.array([1.0, 2.0])}
    new = {"w": jnp.array([3.0, 2.0])}
    averaged = ema_update(ema, new, 0.75)
    np.testing.assert_array_equal(averaged["w"], [1.5, 2.0])
    for decay, expected in ((0.0, new), (1.0, ema)):
        np.testing.assert_array_equal(ema_update(ema, new, decay)["w"], expected["w"])


def test_ema_rejects_another_structure():
    with pytest.raises(ValueError):
        ema_update({"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, 0.9)
