"""SGFE: values and gradients of the direct form without its memory; SRFL's pairs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clsl_jax import config as config_lib
from clsl_jax import experiment, sharding
from clsl_jax.errors import InputError
from clsl_jax.models import alignment, attention_kernel
from clsl_jax.models.alignment import FeatureEnhancement, SemanticAttention, bilinear_attention
from clsl_jax.models.clsl import CLSLHead
from clsl_jax.models.semantic import SemanticFeatures


def direct_attention(params, features, semantic):
    """The equation taken literally, [B, P, C, rank] and all."""
    visual = features @ params["visual"]["kernel"]
    semantic = semantic @ params["semantic"]["kernel"]
    cross = jnp.tanh(visual[:, :, None] * semantic[..., None, :, :])
    hidden = cross @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return (hidden @ params["target"]["kernel"] + params["target"]["bias"])[..., 0]


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_direct_form_with_all_gradients(shared):
    b, p, c, r = 3, 5, 4, 6
    features, semantic, pull = arrays(0, (b, p, 7), (c, 9) if shared else (b, c, 9), (b, p, c))
    model = SemanticAttention(rank=r)
    params = model.init(jax.random.key(0), features, semantic)["params"]
    params["hidden"]["bias"], params["target"]["bias"] = arrays(1, (r,), (1,))

    def folded(params, features, semantic):
        return jnp.sum(model.apply({"params": params}, features, semantic) * pull)

    def direct(params, features, semantic):
        return jnp.sum(direct_attention(params, features, semantic) * pull)

    for one, other in zip(
        jax.tree.leaves(jax.value_and_grad(folded, (0, 1, 2))(params, features, semantic)),
        jax.tree.leaves(jax.value_and_grad(direct, (0, 1, 2))(params, features, semantic)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "shared"), [(4, False), (9, False), (4, True), (9, True)], ids=str
)
def test_position_logits_are_those_of_the_layer_on_what_is_joined(classes, shared):
    # 4 classes are fewer than the positions, 9 are more.
    b, p = 2, 5
    features, semantic, pull = arrays(
        0, (b, p, 7), (classes, 6) if shared else (b, classes, 6), (b, p, classes)
    )
    model = FeatureEnhancement(rank=3)
    params = model.init(jax.random.key(0), features, semantic, train=False)["params"]
    params["mlp_hidden"]["bias"], params["mlp_out"]["bias"] = arrays(1, (13,), (classes,))

    def ours(params, features, semantic):
        logits, out = model.apply({"params": params}, features, semantic, train=False)
        return jnp.sum(logits * pull) + jnp.sum(out["enhanced_features"])

    def direct(params, features, semantic):
        attention = jax.nn.softmax(direct_attention(params["attention"], features, semantic), -1)
        enhanced = jnp.sum(attention[..., None] * semantic[..., None, :, :], 2)
        hidden, last = params["mlp_hidden"], params["mlp_out"]
        values = jnp.concatenate([enhanced, features], -1) @ hidden["kernel"] + hidden["bias"]
        logits = jax.nn.gelu(values, approximate=False) @ last["kernel"] + last["bias"]
        return jnp.sum(logits * pull) + jnp.sum(enhanced)

    for one, other in zip(
        jax.tree.leaves(jax.value_and_grad(ours, (0, 1, 2))(params, features, semantic)),
        jax.tree.leaves(jax.value_and_grad(direct, (0, 1, 2))(params, features, semantic)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def assert_equals_one_class_at_a_time(logits, gradients, inputs, pull):
    one, other = alignment.class_by_class_logits(*inputs), logits(*inputs)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    for one, other in zip(
        alignment.class_by_class_gradients(*inputs, pull), gradients(*inputs, pull), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("classes", [1, 20, 21, 80, 101])
def test_blocks_of_classes_equal_one_at_a_time(classes):
    # What a GPU does, on the CPU.
    b, p, r = 2, 5, 6
    inputs = arrays(classes, (b, p, r), (b, classes, r), (r,))
    (pull,) = arrays(1, (b, p, classes))
    forms = alignment.in_blocks_logits, alignment.in_blocks_gradients
    assert_equals_one_class_at_a_time(*forms, inputs, pull)


@pytest.mark.parametrize(("classes", "block"), [(20, 20), (45, 15), (80, 20)])
def test_a_gpu_takes_the_classes_in_blocks(classes, block):
    b, p, r = 2, 7, 11
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, p, r), (b, classes, r), (r,))]
    step = jax.jit(jax.grad(lambda *a: jnp.sum(bilinear_attention(*a)), (0, 1, 2)))
    text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    at_once = [int(n) for n in re.findall(rf"tensor<{b}x(\d+)x{p}x{r}xf32>", text)]
    assert max(at_once) == block


@pytest.mark.parametrize(("positions", "classes"), [(8, 12), (5, 7), (49, 20), (1, 1)])
def test_our_kernels_equal_one_class_at_a_time(monkeypatch, positions, classes):
    # What a GPU does, on the CPU and with an exact tanh.
    monkeypatch.setattr(attention_kernel, "_INTERPRETED", True)
    b, r = 2, 16
    inputs = arrays(classes, (b, positions, r), (b, classes, r), (r,))
    (pull,) = arrays(1, (b, positions, classes))
    forms = attention_kernel.logits, attention_kernel.gradients
    assert_equals_one_class_at_a_time(*forms, inputs, pull)
    # The products of bfloat16 are summed in float32.
    low = [x.astype(jnp.bfloat16) for x in inputs]
    found = [attention_kernel.logits(*low), *attention_kernel.gradients(*low, pull)]
    exact = [x.astype(jnp.float32) for x in low]
    wanted = [attention_kernel.logits(*exact), *attention_kernel.gradients(*exact, pull)]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def collectives(program):
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf"\b({kinds})(?:-start)?\(", program.as_text()))


def test_our_kernels_leave_examples_where_they_are(monkeypatch):
    monkeypatch.setattr(attention_kernel, "_INTERPRETED", True)
    mesh = sharding.make_mesh(jax.devices()[:4], model=2)
    here, alike = sharding.by_example(mesh), sharding.replicated(mesh)
    b, p, c, r = 8, 5, 7, 16
    inputs = arrays(4, (b, p, r), (b, c, r), (r,))
    (pull,) = arrays(1, (b, p, c))
    placed = [jax.device_put(x, here if x.ndim > 1 else alike) for x in inputs]
    found = jax.jit(attention_kernel.logits).lower(*placed).compile()
    np.testing.assert_allclose(
        found(*placed), attention_kernel.logits(*inputs), rtol=1e-6, atol=1e-6
    )
    assert found.output_shardings.is_equivalent_to(here, 3)
    assert not collectives(found)
    placed.append(jax.device_put(pull, here))
    found = jax.jit(attention_kernel.gradients).lower(*placed).compile()
    for one, other in zip(found(*placed), attention_kernel.gradients(*inputs, pull), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # The gradient of the direction is a sum over examples; nothing else is exchanged.
    assert collectives(found) == {"all-reduce"}


def head_step(on):
    """Value and gradient of a head's logits, and the shapes of its variables."""
    model = CLSLHead(21, rank=128, dtype=jnp.bfloat16, attention_kernel=on)
    inputs = jnp.zeros((2, 7, 7, 8), jnp.bfloat16), jnp.zeros((21, 5))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, train=False))
    step = jax.value_and_grad(lambda v: jnp.sum(model.apply(v, *inputs, train=False)[0]))
    return step, shapes


def test_a_head_has_our_kernels_where_the_configuration_says_so():
    def kernels(on):
        step, shapes = head_step(on)
        return set(re.findall(r"name=_(\w+)_kernel", str(jax.make_jaxpr(step)(shapes))))

    assert kernels(True) == {"logits", "semantic", "visual"}
    assert not kernels(False)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="lowers only beside a GPU")
@pytest.mark.parametrize(("platform", "kernels"), [("cuda", 3), ("cpu", 0), ("tpu", 0)])
def test_our_kernels_are_compiled_for_a_cuda_gpu_alone(platform, kernels):
    step, shapes = head_step(on=True)
    text = jax.jit(step).trace(shapes).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("xla.gpu.triton") == kernels


@pytest.mark.parametrize(
    ("rank", "dtype", "message"),
    [(256, "float32", "model.dtype='float32'"), (96, "bfloat16", "model.rank=96")],
)
def test_what_our_kernels_cannot_do_is_refused(rank, dtype, message):
    config = config_lib.base_config()
    config.model.attention_kernel, config.model.rank, config.model.dtype = True, rank, dtype
    with pytest.raises(InputError, match=f"{message}: expected with model.attention_kernel=True"):
        config_lib.validate(config)


def test_a_jax_without_triton_is_told_of(monkeypatch):
    config = config_lib.base_config()
    config.model.attention_kernel, config.model.dtype = True, "bfloat16"
    config_lib.validate(config)
    assert experiment.build_model(config, 20).attention_kernel
    monkeypatch.setattr(attention_kernel, "triton", None)
    with pytest.raises(InputError, match=r"no jax\.experimental\.pallas\.triton\. Set it"):
        experiment.build_model(config, 20)


def test_blocks_of_classes_saturate_and_pass_nan_on():
    visual = jnp.array([[[100.0], [-100.0], [jnp.nan]]])
    semantic, direction = jnp.full((1, 2, 1), 10.0), jnp.ones(1)
    found = alignment.in_blocks_logits(visual, semantic, direction)
    np.testing.assert_array_equal(found[0, :, 0], [1.0, -1.0, np.nan])
    gradients = alignment.in_blocks_gradients(visual, semantic, direction, jnp.ones((1, 3, 2)))
    np.testing.assert_array_equal(gradients[0][0, :2], 0.0)


def test_bfloat16_sums_in_float32():
    visual, semantic, direction = arrays(2, (2, 3, 256), (2, 4, 256), (256,))
    exact = bilinear_attention(visual, semantic, direction)
    low = [a.astype(jnp.bfloat16) for a in (visual, semantic, direction)]
    near = bilinear_attention(*low)
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, exact, atol=0.02 * np.abs(exact).max())
    gradients = jax.grad(lambda *a: jnp.sum(bilinear_attention(*a)), (0, 1, 2))(*low)
    assert {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}


def test_no_array_of_batch_classes_positions_and_rank_in_memory():
    b, p, c, r = 4, 49, 40, 256
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, p, r), (b, c, r), (r,), (b, p, c))]

    def temporary(function):
        step = jax.grad(lambda x, v, u, pull: jnp.sum(function(x, v, u) * pull), (0, 1, 2))
        return jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * b * p * c * r
    assert temporary(bilinear_attention) < whole / 8
    assert temporary(lambda x, v, u: jnp.tanh(x[:, :, None] * v[:, None]) @ u) > whole / 2


def test_semantic_features_are_those_of_concatenated_pairs():
    features, embeddings = arrays(3, (2, 7, 5), (4, 3))
    model = SemanticFeatures()
    variables = model.init(jax.random.key(0), features, embeddings, train=False)
    params = variables["params"]
    params["hidden"]["bias"] = arrays(4, (8,))[0]
    mean = jnp.broadcast_to(features.mean(axis=1)[:, None], (2, 4, 5))
    pairs = jnp.concatenate([jnp.broadcast_to(embeddings[None], (2, 4, 3)), mean], -1)
    hidden = pairs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    # Its running mean and variance are still 0 and 1.
    hidden = jax.nn.gelu(hidden / np.sqrt(1 + 1e-5), approximate=False)
    expected = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    found = model.apply(variables, features, embeddings, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
