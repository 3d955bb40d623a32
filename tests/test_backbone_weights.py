"""Pretrained ResNets against torch, and files that do not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from clsl_jax.errors import InputError
from clsl_jax.models.backbone_weights import load_backbone
from clsl_jax.models.efficientnet import EfficientNetLite0
from clsl_jax.models.resnet import STAGE_SIZES, build_backbone
from clsl_jax.models.weights_file import read_weights


class Block(nn.Module):
    """torchvision's BasicBlock or Bottleneck (stride on the 3x3)."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        plan = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        plan = plan if bottleneck else [(width, 3, stride), (width, 3, 1)]
        last = inputs
        for i, (outputs, size, step) in enumerate(plan, start=1):
            convolution = nn.Conv2d(last, outputs, size, step, size // 2, bias=False)
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            last = outputs
        self.count = len(plan)
        self.downsample = None
        if stride != 1 or inputs != last:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, last, 1, stride, bias=False), nn.BatchNorm2d(last)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.count else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(nn.Module):
    """torchvision's ResNet: names, layout, logits."""

    def __init__(self, name, classes=1000):
        super().__init__()
        bottleneck = name in ("resnet50", "resnet101", "resnet152")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        last = 64
        for stage, (blocks, width) in enumerate(
            zip(STAGE_SIZES[name], (64, 128, 256, 512), strict=True), start=1
        ):
            layers = []
            for i in range(blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                layers.append(Block(last, width, stride, bottleneck))
                last = width * (4 if bottleneck else 1)
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(last, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def torch_resnet(name):
    torch.manual_seed(0)
    network = TorchResNet(name).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network


def empty_variables(model, *arguments):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments, train=False))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def backbone_variables(name):
    return empty_variables(build_backbone(name), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("name", "writing"),
    [
        ("resnet18", "safetensors"),
        ("resnet18", "npz"),
        ("resnet18", "stream"),
        pytest.param("resnet50", "zip", marks=pytest.mark.slow),
        pytest.param("resnet101", "zip", marks=pytest.mark.slow),
    ],
)
def test_logits_match_torch(tmp_path, name, writing):
    network = torch_resnet(name)
    state = network.state_dict()
    if writing == "safetensors":
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(state, path)
    elif writing == "npz":
        path = tmp_path / "a.npz"
        np.savez(path, **{n: a.numpy() for n, a in state.items()})
    else:
        path = tmp_path / "a.pth"
        torch.save(state, path, _use_new_zipfile_serialization=writing == "zip")
    variables, report = load_backbone(name, path, backbone_variables(name))
    assert "dropped, as no part of it: fc." in report
    assert f"fc.weight {tuple(state['fc.weight'].shape)}" in report

    images = np.random.default_rng(0).standard_normal((2, 75, 96, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    model = build_backbone(name)
    features = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    weights = read_weights(path)
    logits = np.asarray(features).mean((1, 2)) @ weights["fc.weight"].T + weights["fc.bias"]
    assert logits.shape == expected.shape == (2, 1000)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """(state dict, file with it, variables of a bare backbone)."""
    state = torch_resnet("resnet18").state_dict()
    path = tmp_path_factory.mktemp("resnet18") / "resnet18.pth"
    torch.save(state, path)
    return state, path, backbone_variables("resnet18")


def test_each_tensor_is_where_it_belongs(resnet18):
    state, path, variables = resnet18
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    loaded, _ = load_backbone("resnet18", path, shapes)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    np.testing.assert_array_equal(
        loaded["params"]["layer2_0"]["downsample_conv"]["kernel"],
        state["layer2.0.downsample.0.weight"].permute(2, 3, 1, 0).numpy(),
    )
    np.testing.assert_array_equal(
        loaded["batch_stats"]["bn1"]["var"], state["bn1.running_var"].numpy()
    )


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_prefixes_half_precision_and_other_parts(tmp_path, resnet18, prefix):
    state, path, variables = resnet18
    other = {f"{prefix}{n}": a.half() for n, a in state.items() if not n.startswith("fc.")}
    if "backbone" in prefix:
        other[f"{prefix.removesuffix('backbone.')}fc2.0.weight"] = torch.ones(2, 2)
    torch.save({"state_dict": other}, tmp_path / "a.pth")
    loaded, report = load_backbone("resnet18", tmp_path / "a.pth", variables)
    expected, _ = load_backbone("resnet18", path, variables)
    assert ("fc2.0.weight (2, 2)" in report) == ("backbone" in prefix)
    for found, right in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-6)


def test_another_architecture_is_one_error_with_ten_of_each(resnet18):
    _, path, _ = resnet18
    with pytest.raises(InputError) as caught:
        load_backbone("resnet50", path, backbone_variables("resnet50"))
    message = str(caught.value)
    assert "resnet18.pth: the weights do not fit the backbone 'resnet50'" in message
    assert re.search(r"missing from the file: layer1\.0\.bn3\.\w+ \(256,\), ", message)
    assert "layer1.0.conv1.weight (64, 64, 3, 3), the model has (64, 64, 1, 1)" in message
    assert message.count(", the model has ") == 10
    assert "Set model.backbone" in message


def test_a_resnet_is_no_efficientnet(resnet18):
    _, path, _ = resnet18
    variables = empty_variables(EfficientNetLite0(), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(InputError, match=r"0 of its 240 tensors.*_blocks\.0\._bn1\.\w+ \(32,\)"):
        load_backbone("efficientnet_lite0", path, variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("layer3.1.bn2.running_mean"),
            r"1 missing.*: layer3\.1\.bn2\.running_mean",
        ),
        (
            lambda s: s.update({"layer5.0.conv1.weight": torch.ones(2, 3)}),
            r"1 in the file, but not in the model: layer5\.0\.conv1\.weight \(2, 3\)",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.ones(65)}),
            r"1 of another shape: bn1\.weight \(65,\), the model has \(64,\)",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.ones(64, dtype=torch.int8)}),
            r"1 not of a floating type: bn1\.weight int8",
        ),
        (
            lambda s: s.update({"bn1.bias": torch.full((64,), torch.nan)}),
            r"1 with NaN or infinity: bn1\.bias",
        ),
        (lambda s: [s.pop(n) for n in list(s) if "bn" in n], r"missing.* and \d+ more"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, resnet18, change, message):
    state, _, variables = resnet18
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_backbone("resnet18", tmp_path / "a.pth", variables)


def test_counters_may_be_missing(tmp_path, resnet18):
    state, _, variables = resnet18
    bare = {n: a for n, a in state.items() if "num_batches" not in n and not n.startswith("fc.")}
    torch.save(bare, tmp_path / "a.pth")
    _, report = load_backbone("resnet18", tmp_path / "a.pth", variables)
    assert report.endswith("100 tensors loaded into the resnet18 backbone; nothing dropped.")


def test_truncated_file(tmp_path, resnet18):
    _, path, variables = resnet18
    (tmp_path / "a.pth").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        load_backbone("resnet18", tmp_path / "a.pth", variables)


def test_a_backbone_that_no_file_fits(resnet18):
    _, path, variables = resnet18
    with pytest.raises(InputError, match=r"'plain', only into resnet18, .*efficientnet_lite0"):
        load_backbone("plain", path, variables)
