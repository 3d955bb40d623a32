"""PyTorch state dicts (names to arrays) to variables.

Two kinds are read: torchvision's ResNets, and checkpoints of the CLSL authors' program, all of it
or the part after the backbone. Names are checked on both sides: what the file lacks, what the model
has no place for, and shapes that differ are one error that lists them all.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from clsl_jax.errors import InputError, listed

Path = tuple[str, ...]
Variables = Mapping[str, Any]

_HEAD_MODULES = {
    ("semantic", "hidden"): "ttd.0",
    ("semantic", "norm"): "ttd.1",
    ("semantic", "out"): "ttd.3",
    ("enhancement", "attention", "visual"): "attention2.linear1",
    ("enhancement", "attention", "semantic"): "attention2.linear2",
    ("enhancement", "attention", "hidden"): "attention2.hidden_linear",
    ("enhancement", "attention", "target"): "attention2.target_linear",
    ("enhancement", "mlp_hidden"): "fc2.0",
    ("enhancement", "mlp_out"): "fc2.3",
    ("global_branch",): "fc0",
    ("classifier",): "fc1",
}
# Written as Conv1d of size 1: their weights are [out, in, 1].
_POINTWISE = {("semantic", "hidden"), ("semantic", "out"), ("global_branch",), ("pooled",)}
# Names of our leaves, and of the counter beside them, in PyTorch's modules.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "in_proj_kernel": "in_proj_weight",
    "in_proj_bias": "in_proj_bias",
}
COUNTER = "num_batches_tracked"
# An nn.Sequential of a ResNet's children: 2 and 3 are the ReLU and the maximum.
_SEQUENTIAL = {"conv1": "0", "bn1": "1"} | {f"layer{i}": str(i + 3) for i in range(1, 5)}
_LISTED = 50


class TorchLayout(NamedTuple):
    """How a state dict names what is not always named alike.

    Attributes:
      wrapper: before every name: '' or 'module.' (DataParallel).
      backbone: before the backbone's names; None means 'backbone.' in a whole model and nothing
        for a bare ResNet.
      sequential: the backbone is an nn.Sequential of its children ('0.weight') and not named as in
        torchvision ('conv1.weight').
    """

    wrapper: str = ""
    backbone: str | None = None
    sequential: bool = False


def find_layout(state: Mapping[str, Any]) -> TorchLayout:
    """The layout of a state dict, from its stem: the one 4-D weight with 3 input channels.

    A state without such a weight has no backbone; its layout then tells only the wrapper.

    Raises:
      InputError: several weights could be the stem, or it is named in neither known way.
    """
    wrapper = "module." if state and all(n.startswith("module.") for n in state) else ""
    stems = [n for n, a in state.items() if len(np.shape(a)) == 4 and np.shape(a)[1] == 3]
    if not stems:
        return TorchLayout(wrapper)
    stem = stems[0].removeprefix(wrapper)
    for ending, sequential in (("conv1.weight", False), ("0.weight", True)):
        prefix = stem.removesuffix(ending)
        if len(stems) == 1 and prefix != stem and (not prefix or prefix.endswith(".")):
            return TorchLayout(wrapper, prefix, sequential)
    raise InputError(
        f"state dict: cannot tell the backbone by its stem; found {', '.join(stems)}, expected one "
        "convolution of 3 channels named '...conv1.weight' or '...0.weight'."
    )


def import_torch(state: Mapping[str, Any], variables: Variables) -> dict[str, Any]:
    """Variables with the values of a state dict.

    Args:
      state: torch names to arrays (or CPU tensors without gradient), of `CLSL`, of `CLSLHead` or of
        a bare `ResNet`. `num_batches_tracked` is not read: nothing here counts batches.
      variables: `params` and `batch_stats` of the model, as values or as shapes (`jax.eval_shape`);
        says what is expected.

    Returns:
      Variables of the same structure, NumPy arrays of the same types.

    Raises:
      InputError: names are missing or left over, or shapes differ; all of them are listed.
    """
    layout = find_layout(state)
    filled, missing, misshapen, expected = {}, [], [], set()
    for path, name, leaf in _entries(variables, layout):
        expected |= {name, _counter(name)} if path[0] == "batch_stats" else {name}
        shape = torch_shape(path, leaf.shape)
        if name not in state:
            missing.append(name)
        elif np.shape(state[name]) != shape:
            misshapen.append(f"{name} is {np.shape(state[name])}, the model has {shape}")
        else:
            filled[path] = from_torch(path, np.array(state[name], leaf.dtype))
    _raise_if_any(
        {
            "missing from the state dict": missing,
            "left over, without a place in the model": sorted(set(state) - expected),
            "of another shape": misshapen,
        }
    )
    return traverse_util.unflatten_dict(filled)


def torch_shapes(variables: Variables, layout: TorchLayout) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dict of variables, which may be shapes; without counters."""
    return {n: torch_shape(path, leaf.shape) for path, n, leaf in _entries(variables, layout)}


def _entries(variables: Variables, layout: TorchLayout) -> Iterator[tuple[Path, str, Any]]:
    """(path, torch name, leaf) of every variable."""
    if layout.backbone is None:
        is_bare = any("conv1" in tree or "bn1" in tree for tree in variables.values())
        layout = layout._replace(backbone="" if is_bare else "backbone.")
    pooled = "fc1" if "global_branch" in variables.get("params", {}) else "fc0"
    for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
        _, *modules, last = path
        name = _module_name(tuple(modules), layout, pooled) + "." + LEAVES[last]
        yield path, layout.wrapper + name, leaf


def _module_name(modules: Path, layout: TorchLayout, pooled: str) -> str:
    """Torch name of the module at a path of names."""
    if modules in _HEAD_MODULES:
        return _HEAD_MODULES[modules]
    if modules == ("pooled",):
        return pooled
    if modules[0] == "encoder":
        return ".".join(modules).replace("layers_", "layers.")
    if modules[0] == "graph":
        return ".".join(modules).replace("layer_", "")
    if modules[0] == "backbone":
        modules = modules[1:]
    first, *rest = re.sub(r"^(layer\d+)_", r"\1.", ".".join(modules)).split(".")
    if layout.sequential:
        first = _SEQUENTIAL[first]
    name = ".".join([first, *rest])
    name = name.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return layout.backbone + name


def _counter(name: str) -> str:
    return name.rsplit(".", 1)[0] + "." + COUNTER


def _is_transposed(path: Path) -> bool:
    return path[-1] in ("kernel", "in_proj_kernel") and path[1] != "classifier"


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of the variable at a path."""
    if not _is_transposed(path):
        return tuple(shape)
    tail = (1,) if path[1:-1] in _POINTWISE else ()
    *window, inputs, outputs = shape
    return (outputs, inputs, *window, *tail)


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """The variable at a path, of PyTorch's tensor for it."""
    if not _is_transposed(path):
        return array
    if path[1:-1] in _POINTWISE:
        array = array[..., 0]
    return np.ascontiguousarray(np.moveaxis(array, (0, 1), (-1, -2)))


def _raise_if_any(problems: Mapping[str, Sequence[str]]) -> None:
    parts = []
    for what, names in problems.items():
        if names:
            parts.append(f"{len(names)} {what}: {listed(names, _LISTED)}")
    if parts:
        raise InputError(
            "the state dict does not fit the model; " + "; ".join(parts) + ". Build the model with "
            "the same parts and sizes."
        )
