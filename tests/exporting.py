"""Variables as PyTorch's state dicts: the way back of `pretrained.import_torch`."""

import numpy as np

from clsl_jax.models import pretrained
from clsl_jax.models.pretrained import TorchLayout
from clsl_jax.models.resnet import BOTTLENECK, STAGE_SIZES

PLAIN = TorchLayout()


def export_torch(variables, *, layout=PLAIN):
    """The state dict of variables, or of any tree like them (gradients, moments).

    With `batch_stats`, every norm has the counter that torch wants, at 0.
    """
    state = {}
    for path, name, leaf in pretrained._entries(variables, layout):
        array = np.asarray(leaf)
        if pretrained._is_transposed(path):
            array = np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))
        state[name] = array.reshape(pretrained.torch_shape(path, leaf.shape))
        if path[0] == "batch_stats":
            state[pretrained._counter(name)] = np.zeros((), np.int64)
    return state


def backbone_name(state):
    """Which ResNet a state dict has, by its blocks and the convolutions of each."""
    wrapper, prefix, sequential = pretrained.find_layout(state)
    stages = range(4, 8) if sequential else [f"layer{i}" for i in range(1, 5)]
    blocks = [[n for n in state if n.startswith(f"{wrapper}{prefix}{stage}.")] for stage in stages]
    sizes = tuple(sum(n.endswith("conv1.weight") for n in names) for names in blocks)
    bottleneck = any(n.endswith("conv3.weight") for names in blocks for n in names)
    (name,) = (x for x, y in STAGE_SIZES.items() if y == sizes and (x in BOTTLENECK) == bottleneck)
    return name
