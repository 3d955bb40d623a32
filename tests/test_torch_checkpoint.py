"""A torch checkpoint of the whole model, evaluated by the command line, against torch itself."""

import json

import numpy as np
import pytest
import torch
from commands import CONFIG, environment, run
from torch_clsl import TorchCLSL, resnet

from clsl_jax import npz
from clsl_jax.data import scenes, sources
from clsl_jax.imagenet import IMAGENET_MEAN, IMAGENET_STD

WIDTHS, D, E = (8, 8, 8, 16), 16, 6
ARGUMENTS = (
    f"--config={CONFIG}",
    "--mode=evaluate",
    "--config.data.sizes=(32,16,24)",
    "--config.model.backbone=resnet18",
    f"--config.model.widths={WIDTHS}",
    "--config.model.encoder_heads=4",
    "--config.model.encoder_mlp=24",
    "--config.model.rank=12",
    "--config.model.learn_embeddings=False",
    "--config.model.global_branch=True",
    "--config.evaluation.batch_size=16",
    "--config.batch_size=16",
)


@pytest.mark.slow
def test_it_scores_as_torch_does(tmp_path, monkeypatch):
    torch.manual_seed(0)
    classes = len(scenes.CLASS_NAMES)
    model = TorchCLSL("clsl", c=classes, e=E, d=D, backbone=resnet((2, 2, 2, 2), WIDTHS))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    model.eval()
    weights = tmp_path / "best_ema_model.pth"
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, weights)
    embeddings = np.random.default_rng(0).standard_normal((classes, E)).astype(np.float32)
    npz.write(
        str(tmp_path / "labels.npz"),
        {"embeddings": embeddings, "class_names": np.asarray(scenes.CLASS_NAMES, np.str_)},
    )
    arguments = (
        *ARGUMENTS,
        f"--weights={weights}",
        f"--config.model.embeddings={tmp_path / 'labels.npz'}",
    )
    status, out, err = run(str(tmp_path), tmp_path / "run", *arguments, tiny=False)
    assert status == 0, err
    assert "test, last" in out

    monkeypatch.setenv("CLSL_CACHE_DIR", environment(str(tmp_path))["CLSL_CACHE_DIR"])
    sizes = {"train": 32, "validation": 16, "test": 24}
    test = sources.load_dataset("scenes", image_size=64, sizes=sizes).test
    pixels = np.stack([test.images[i]["image"] for i in range(24)]) / 255
    inputs = torch.tensor(((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits, _, _ = model(inputs.float(), torch.tensor(embeddings))
    found = np.load(tmp_path / "run" / "predictions.npz")
    np.testing.assert_allclose(found["scores"], logits.sigmoid().numpy(), rtol=1e-4, atol=1e-5)
    assert found["ids"].tolist() == test.ids
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["weights"] == str(weights)

    status, _, err = run(
        str(tmp_path),
        tmp_path / "other",
        *arguments,
        "--config.model.global_branch=False",
        tiny=False,
    )
    assert status == 2
    assert "best_ema_model.pth" in err
    assert "fc0.weight" in err
