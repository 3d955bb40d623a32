"""The whole network: against PyTorch, in every combination of its switches, in bfloat16."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exporting import export_torch
from torch_clsl import TorchCLSL, resnet

from clsl_jax.models import pretrained
from clsl_jax.models.clsl import CLSL, CLSLHead, softmax_pool

VARIANTS = {
    "clsl": {},
    "without_recovery": {"global_branch": False},
    "without_srfl": {"srfl": False, "global_branch": False},
    "baseline": {"encoder_layers": 0, "srfl": False, "sgfe": False, "global_branch": False},
}
SIZES = {"encoder_heads": 4, "encoder_mlp": 24, "rank": 12}
NO_DROPOUT = {"encoder_dropout": 0.0, "head_dropout": 0.0}
C, E, D = 5, 12, 16


@pytest.fixture(autouse=True)
def same_weights():
    """PyTorch's own first seed is another one in every process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nearly all the time of these tests is XLA's; the arrays are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def state_of(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def scramble(module):
    """Other than initial norms and statistics, so that mistaking one for another shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith(("weight", "var")) else noise - 0.5)


def compare(module, model, torch_inputs, inputs, embeddings):
    """Outputs in both modes, gradients of every weight, running statistics after the pass."""
    scramble(module)
    state = state_of(module)
    shapes = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), inputs, embeddings, None
    )
    layout = pretrained.find_layout(state)
    variables = pretrained.import_torch(state, shapes)
    table = torch.from_numpy(embeddings)

    z1, z0, s = module.eval()(torch_inputs, table)
    logits, out = jax.jit(partial(model.apply, train=False))(variables, inputs, embeddings)
    np.testing.assert_allclose(logits, z1.detach(), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(out["position_logits"], s.detach(), rtol=2e-4, atol=2e-5)
    assert (out["global_logits"] is None) == (z0 is None)

    pull = normal(9, *logits.shape)
    z1, z0, _ = module.train()(torch_inputs, table)
    loss = (z1 * torch.from_numpy(pull)).sum() + (0.0 if z0 is None else z0.square().sum())
    loss.backward()

    def objective(params):
        (logits, out), updated = model.apply(
            {**variables, "params": params}, inputs, embeddings, train=True, mutable=["batch_stats"]
        )
        z0 = out["global_logits"]
        loss = jnp.sum(logits * pull) + (0.0 if z0 is None else jnp.sum(z0**2))
        return loss, (z0, updated)

    gradients, (logits0, updated) = jax.jit(jax.grad(objective, has_aux=True))(variables["params"])
    if z0 is not None:
        np.testing.assert_allclose(logits0, z0.detach(), rtol=2e-4, atol=2e-5)
    gradients = export_torch({"params": gradients}, layout=layout)
    expected = {name: weight.grad.numpy() for name, weight in module.named_parameters()}
    assert sorted(gradients) == sorted(expected)
    # Two biases of the attention shift all classes alike and have gradients that are rounding.
    floor = 1e-5 * max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=0, atol=2e-3 * scale + floor, err_msg=name
        )
    after = export_torch(dict(updated), layout=layout) if updated else {}
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(after[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("variant", "layers", "norm_first", "final_norm", "positions"),
    [
        ("clsl", 1, False, False, True),
        ("clsl", 2, True, True, True),
        ("clsl", 0, False, False, True),
        ("without_recovery", 1, True, False, False),
        ("without_srfl", 2, False, False, True),
        ("baseline", 1, False, False, True),
    ],
)
def test_head_equals_pytorch(variant, layers, norm_first, final_norm, positions):
    module = TorchCLSL(
        variant,
        c=C,
        e=E,
        d=D,
        layers=layers,
        norm_first=norm_first,
        final_norm=final_norm,
        use_positions=positions,
    )
    settings = {
        "encoder_layers": layers,
        "encoder_norm_first": norm_first,
        "encoder_final_norm": final_norm,
        "positions": positions,
    }
    model = CLSLHead(C, **(settings | SIZES | NO_DROPOUT | VARIANTS[variant]))
    features = normal(1, 3, D, 4, 3)
    compare(
        module,
        model,
        torch.from_numpy(features),
        features.transpose(0, 2, 3, 1),
        normal(2, C, E),
    )


@pytest.mark.parametrize("sequential", [False, True])
def test_whole_network_equals_pytorch(sequential):
    backbone = resnet((2, 2, 2, 2), (8, 8, 8, D))
    if sequential:
        backbone = torch.nn.Sequential(*backbone.children())
    module = TorchCLSL("clsl", c=C, e=E, d=D, backbone=backbone)
    model = CLSL(
        C,
        backbone="resnet18",
        backbone_widths=(8, 8, 8, D),
        **SIZES,
        **NO_DROPOUT,
    )
    images = normal(1, 3, 3, 45, 58)
    compare(module, model, torch.from_numpy(images), images.transpose(0, 2, 3, 1), normal(2, C, E))


@pytest.mark.parametrize(
    ("srfl", "sgfe", "global_branch", "graph_layers", "encoder_layers"),
    list(product([False, True], [False, True], [False, True], [0, 2], [0, 1])),
)
def test_every_combination_of_switches(srfl, sgfe, global_branch, graph_layers, encoder_layers):
    model = CLSLHead(
        C,
        srfl=srfl,
        sgfe=sgfe,
        global_branch=global_branch,
        graph_layers=graph_layers,
        encoder_layers=encoder_layers,
        **SIZES,
    )
    features, embeddings, adjacency = normal(1, 2, 3, 3, D), normal(2, C, E), np.eye(C)
    arguments = features, embeddings, adjacency
    variables = model.init(jax.random.key(0), *arguments, train=False)
    (logits, out), _ = model.apply(
        variables,
        *arguments,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )
    assert logits.shape == (2, C)
    assert np.isfinite(logits).all()
    assert out["grid"] == (3, 3)
    present = {name for name, value in out.items() if value is not None}
    assert ("global_logits" in present) == global_branch
    assert ("semantic_features" in present) == srfl
    assert ("attention" in present) == sgfe
    assert ("position_weights" in present) == (sgfe or not srfl)
    assert ("label_nodes" in present) == (srfl or sgfe)
    parts = set(variables["params"])
    assert ("graph" in parts) == (graph_layers > 0 and (srfl or sgfe))
    assert ("encoder" in parts) == (encoder_layers > 0)
    assert ("semantic" in parts, "enhancement" in parts) == (srfl, sgfe)
    if sgfe:
        np.testing.assert_allclose(out["attention"].sum(-1), 1.0, rtol=1e-5)
    if "position_weights" in present:
        np.testing.assert_allclose(out["position_weights"].sum(1), 1.0, rtol=1e-5)


def test_the_position_residual_is_a_linear_classifier_beside_sgfe():
    features, embeddings = normal(1, 2, 3, 3, D), normal(2, C, E)
    model = CLSLHead(C, position_residual=True, **SIZES)
    variables = model.init(jax.random.key(0), features, embeddings, train=False)
    _, out = model.apply(variables, features, embeddings, train=False)
    pooled = variables["params"]["pooled"]
    beside = np.asarray(out["features"]) @ pooled["kernel"] + pooled["bias"]
    # At the start it is all there is.
    np.testing.assert_allclose(out["position_logits"], beside, rtol=1e-5, atol=1e-6)

    last = variables["params"]["enhancement"]["mlp_out"]
    last["kernel"] = normal(3, *last["kernel"].shape)
    _, out = model.apply(variables, features, embeddings, train=False)
    without = CLSLHead(C, **SIZES)
    own = {name: part for name, part in variables["params"].items() if name != "pooled"}
    _, plain = without.apply({**variables, "params": own}, features, embeddings, train=False)
    np.testing.assert_allclose(
        out["position_logits"], plain["position_logits"] + beside, rtol=1e-5, atol=1e-6
    )


def test_no_graph_layers_is_as_if_there_were_no_graph():
    features, embeddings = normal(1, 2, 3, 3, D), normal(2, C, E)
    model = CLSLHead(C, graph_layers=0, **SIZES)
    variables = model.init(jax.random.key(0), features, embeddings, train=False)
    plain, _ = model.apply(variables, features, embeddings, train=False)
    given, out = model.apply(variables, features, embeddings, np.ones((C, C)), train=False)
    np.testing.assert_array_equal(plain, given)
    np.testing.assert_array_equal(out["label_nodes"], embeddings)


def test_a_graph_needs_its_adjacency_and_embeddings_a_row_a_class():
    features, embeddings = normal(1, 2, 3, 3, D), normal(2, C, E)
    with pytest.raises(ValueError, match="no adjacency"):
        CLSLHead(C, graph_layers=1, **SIZES).init(
            jax.random.key(0), features, embeddings, train=False
        )
    with pytest.raises(ValueError, match=r"expected \(5, E\)"):
        CLSLHead(C, **SIZES).init(jax.random.key(0), features, embeddings[1:], train=False)
    with pytest.raises(ValueError, match="unknown backbone 'resnet7'"):
        CLSL(C, backbone="resnet7").init(
            jax.random.key(0), normal(1, 1, 32, 32, 3), embeddings, train=False
        )


def test_bfloat16_computes_near_float32_and_keeps_float32_where_promised():
    images, embeddings, adjacency = normal(1, 4, 64, 64, 3), normal(2, C, E), np.eye(C)
    arguments = images, embeddings, adjacency
    models = [
        CLSL(C, backbone="small", graph_layers=1, dtype=dtype, **SIZES, **NO_DROPOUT)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    variables = jax.jit(partial(models[1].init, train=False))(jax.random.key(0), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (exact, _), (near, out) = [
        jax.jit(partial(m.apply, train=True, mutable=["batch_stats"]))(variables, *arguments)[0]
        for m in models
    ]
    for name in ("attention_logits", "attention", "position_logits", "position_weights"):
        assert out[name].dtype == jnp.float32, name
    assert near.dtype == out["global_logits"].dtype == jnp.float32
    assert out["features"].dtype == out["semantic_features"].dtype == jnp.bfloat16
    np.testing.assert_allclose(near, exact, atol=0.05 * np.abs(exact).max() + 0.02)


def test_softmax_pool_by_hand():
    logits = jnp.log(jnp.array([[[1.0], [3.0]]]))
    pooled, weights = softmax_pool(logits)
    np.testing.assert_allclose(weights[0, :, 0], [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 0], 0.75 * np.log(3.0), rtol=1e-6)


def loss_and_parameters(**changes):
    """A loss of the parameters alone, and their shapes."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((2, 32, 32, 3)), jnp.float32)
    embeddings = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    no_dropout = {"encoder_dropout": 0.0, "head_dropout": 0.0}
    model = CLSL(num_classes=3, encoder_mlp=8, rank=4, **no_dropout, **changes)
    init = partial(model.init, jax.random.key(0), images, embeddings, train=False)

    def loss(variables):
        (logits, _), _ = model.apply(
            variables, images, embeddings, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(logits**2)

    return loss, init


@pytest.mark.parametrize("backbone", ["small", "resnet18", "efficientnet_lite0"])
def test_recomputing_blocks_keeps_less_for_the_backward_pass(backbone):
    kept = []
    for remat in (False, True):
        loss, init = loss_and_parameters(backbone=backbone, remat=remat)
        shapes = jax.eval_shape(init)
        backward = jax.eval_shape(lambda x, loss=loss: jax.vjp(loss, x)[1], shapes)
        kept.append(sum(x.size for x in jax.tree.leaves(backward)))
        weights = sum(x.size for x in jax.tree.leaves(shapes))
    assert kept[1] - weights < 0.8 * (kept[0] - weights)


def test_recomputing_blocks_changes_no_number():
    results = []
    for remat in (False, True):
        loss, init = loss_and_parameters(backbone="small", backbone_widths=(4, 8), remat=remat)
        results.append(jax.jit(jax.value_and_grad(loss))(jax.jit(init)()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + abs(a).max())),
        *results,
    )
