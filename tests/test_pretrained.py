"""State dicts in and out: round trips, prefixes, and every way in which names can be wrong."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exporting import export_torch
from hypothesis import strategies as st

from clsl_jax.errors import InputError
from clsl_jax.models import pretrained
from clsl_jax.models.clsl import CLSL, CLSLHead
from clsl_jax.models.pretrained import TorchLayout
from clsl_jax.models.resnet import build_backbone

C, E = 3, 8


def shapes_of(model, inputs, embeddings=None, adjacency=None):
    arguments = (inputs,) if embeddings is None else (inputs, embeddings, adjacency)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, train=False))


def fill(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(s.dtype), shapes)


def whole(**settings):
    model = CLSL(C, backbone="small", backbone_widths=(4, 8), encoder_mlp=6, rank=5, **settings)
    return fill(shapes_of(model, jnp.zeros((1, 32, 32, 3)), jnp.zeros((C, E)), jnp.eye(C)))


def head(**settings):
    model = CLSLHead(C, encoder_mlp=6, rank=5, **settings)
    return fill(shapes_of(model, jnp.zeros((1, 2, 2, 8)), jnp.zeros((C, E)), jnp.eye(C)))


def bare(name="small", **settings):
    return fill(shapes_of(build_backbone(name, **settings), jnp.zeros((1, 32, 32, 3))))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    st.fixed_dictionaries(
        {
            "srfl": st.booleans(),
            "sgfe": st.booleans(),
            "position_residual": st.booleans(),
            "global_branch": st.booleans(),
            "encoder_layers": st.integers(0, 2),
            "encoder_final_norm": st.booleans(),
            "graph_layers": st.integers(0, 2),
        }
    ),
    st.sampled_from(["", "module."]),
    st.sampled_from(["backbone.", "model.features.", "net."]),
    st.booleans(),
    st.booleans(),
)
def test_round_trip(settings, wrapper, prefix, sequential, with_backbone):
    variables = whole(**settings) if with_backbone else head(**settings)
    layout = TorchLayout(wrapper, prefix if with_backbone else None, sequential and with_backbone)
    state = export_torch(variables, layout=layout)
    if state:
        assert pretrained.find_layout(state) == layout
    assert_same(pretrained.import_torch(state, variables), variables)


def test_names_and_axes_of_torchvision():
    variables = bare("resnet50", widths=(2, 2, 2, 2))
    state = export_torch(variables)
    params = variables["params"]
    np.testing.assert_array_equal(
        state["conv1.weight"], params["conv1"]["kernel"].transpose(3, 2, 0, 1)
    )
    assert state["layer3.5.conv2.weight"].shape == (2, 2, 3, 3)
    assert state["layer1.0.downsample.0.weight"].shape == (8, 2, 1, 1)
    assert state["layer1.0.downsample.1.running_var"].shape == (8,)
    assert state["bn1.num_batches_tracked"] == 0
    assert state["bn1.num_batches_tracked"].dtype == np.int64
    assert len(state) == 318  # torchvision's resnet50 has 320 with fc


def test_names_and_axes_of_the_authors_head():
    state = export_torch(head())
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes["encoder.layers.0.self_attn.in_proj_weight"] == (24, 8)
    assert shapes["attention2.target_linear.weight"] == (1, 5)
    assert shapes["ttd.0.weight"] == (16, 16, 1)
    assert shapes["ttd.3.weight"] == (8, 16, 1)
    assert shapes["fc0.weight"] == (C, 8, 1)
    assert shapes["fc2.3.weight"] == (C, 16)
    assert "ttd.1.num_batches_tracked" in shapes


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("layout", [TorchLayout("", ""), TorchLayout("module.", "a.b.", True)])
def test_round_trip_of_each_resnet(name, layout):
    variables = bare(name, widths=(1, 1, 1, 1))
    state = export_torch(variables, layout=layout)
    assert pretrained.find_layout(state) == layout
    assert_same(pretrained.import_torch(state, variables), variables)


def test_a_stem_that_is_not_clear_is_an_error():
    with pytest.raises(InputError, match=r"found first\.weight"):
        pretrained.find_layout({"first.weight": np.zeros((4, 3, 7, 7))})
    stem = np.zeros((4, 3, 7, 7))
    with pytest.raises(InputError, match=r"found a\.conv1\.weight, b\.conv1\.weight"):
        pretrained.find_layout({"a.conv1.weight": stem, "b.conv1.weight": stem})


def test_counters_are_not_needed():
    variables = bare()
    state = export_torch(variables)
    state = {n: a for n, a in state.items() if not n.endswith("num_batches_tracked")}
    assert_same(pretrained.import_torch(state, variables), variables)


def test_all_that_is_wrong_is_in_one_error():
    variables = head()
    state = export_torch(variables)
    del state["ttd.0.bias"], state["fc2.3.weight"]
    state["extra.weight"] = np.zeros(3)
    state["other.num_batches_tracked"] = np.zeros((), np.int64)
    state["fc0.weight"] = state["fc0.weight"][..., 0]
    with pytest.raises(InputError) as caught:
        pretrained.import_torch(state, variables)
    message = str(caught.value)
    assert "2 missing from the state dict: " in message
    for name in ("ttd.0.bias", "fc2.3.weight"):
        assert name in message.split("left over")[0]
    assert "extra.weight, other.num_batches_tracked" in message
    assert "fc0.weight is (3, 8), the model has (3, 8, 1)" in message


def test_head_only_state_does_not_fit_a_whole_model_and_the_other_way():
    with pytest.raises(InputError, match=r"missing from the state dict: .*backbone.conv1.weight"):
        pretrained.import_torch(export_torch(head()), whole())
    with pytest.raises(InputError, match=r"left over.*backbone.conv1.weight"):
        pretrained.import_torch(export_torch(whole()), head())


def test_a_classifier_that_the_model_has_not_is_left_over():
    variables = whole()
    backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
    state = export_torch(fill(backbone, seed=1), layout=TorchLayout(backbone=""))
    state |= {"fc.weight": np.zeros((10, 8)), "fc.bias": np.zeros(10)}
    with pytest.raises(InputError, match=r"2 left over.*fc.bias, fc.weight"):
        pretrained.import_torch(state, backbone)
