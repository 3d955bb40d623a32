"""Ways to convolve on a CPU, forward and backward: single ones of ResNets, and whole ResNets.

    python benchmarks/convolutions.py [--json=FILE] [--quick]

The ways are XLA's own, XLA's with the kernel's gradient as a matrix product over patches, those of
`clsl_jax/models/convolution.py`, and PyTorch's in both memory formats. Each gives the value and
both gradients (of the stem the kernel's alone). They take turns; shown is the median of the rounds
with the fastest and the slowest. On other devices than a CPU 'ours' is XLA's own.

`--divided` runs the JAX ways again on two virtual CPU devices, half of the batch each.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rounds
import torch
import torch_step
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clsl_jax.models import convolution, resnet

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution with a border of half the kernel; sides in pixels, channels in and out."""

    batch: int
    side: int
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1

    @property
    def name(self) -> str:
        """As people write it."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return (
            f"{self.kernel}x{self.kernel}{stride}, {self.side}x{self.side}, "
            f"{self.inputs} to {self.outputs}, batch {self.batch}"
        )

    @property
    def positions(self) -> int:
        """Side of the output map."""
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def gigaflops(self) -> float:
        """Of value and both gradients (the stem: one)."""
        products = self.kernel**2 * self.inputs * self.outputs * self.positions**2 * self.batch
        return 2e-9 * products * (2 if self.inputs == 3 else 3)


CASES = (
    Case(4, 448, 3, 64, 7, 2),
    Case(4, 112, 64, 64, 3),
    Case(4, 112, 64, 256, 1),
    Case(4, 112, 256, 64, 1),
    Case(4, 112, 128, 128, 3, 2),
    Case(4, 112, 256, 512, 1, 2),
    Case(4, 56, 128, 128, 3),
    Case(4, 56, 512, 128, 1),
    Case(4, 56, 256, 256, 3, 2),
    Case(4, 28, 256, 256, 3),
    Case(4, 28, 256, 1024, 1),
    Case(4, 28, 1024, 256, 1),
    Case(4, 28, 512, 512, 3, 2),
    Case(4, 14, 512, 512, 3),
    Case(4, 14, 2048, 512, 1),
    Case(64, 16, 64, 64, 3),
    Case(64, 8, 128, 128, 3),
    Case(64, 4, 256, 256, 3),
    Case(16, 2, 512, 512, 3),
    Case(16, 7, 512, 512, 3),
)
# (name, image size, batch)
BACKBONES = (("resnet18", 64, 64), ("resnet50", 224, 16), ("resnet101", 448, 4))


def xla(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """XLA's own."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def patches(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """XLA's own but for the gradient of the kernel."""
    return _patches(tuple(strides), tuple(map(tuple, padding)), tuple(options.items()), x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _patches(strides: Any, padding: Any, options: Any, x: jax.Array, kernel: jax.Array) -> Any:
    return xla(x, kernel, strides, padding, **dict(options))


def _patches_forward(strides: Any, padding: Any, options: Any, x: Any, kernel: Any) -> Any:
    return xla(x, kernel, strides, padding, **dict(options)), (x, kernel)


def _patches_backward(strides: Any, padding: Any, options: Any, saved: Any, grad: Any) -> Any:
    x, kernel = saved
    _, pull = jax.vjp(lambda x: xla(x, kernel, strides, padding, **dict(options)), x)
    (sh, sw), (_, h, w, o) = strides, grad.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = [
        padded[:, i : i + sh * (h - 1) + 1 : sh, j : j + sw * (w - 1) + 1 : sw]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    matrix = jnp.concatenate(taps, -1).reshape(-1, kernel.size // o)
    return *pull(grad), (matrix.T @ grad.reshape(-1, o)).reshape(kernel.shape)


_patches.defvjp(_patches_forward, _patches_backward)

JAX_WAYS: dict[str, Callable[..., jax.Array]] = {
    "XLA": xla,
    "patches": patches,
    "ours": convolution.conv_general_dilated,
}
TORCH_WAYS = {"PyTorch": torch.contiguous_format, "PyTorch channels last": torch.channels_last}


def single(case: Case) -> dict[str, Callable[[], Any]]:
    """Calls that give value and gradients of one convolution."""
    rng = np.random.default_rng(0)
    k, p = case.kernel, case.kernel // 2
    x = rng.standard_normal((case.batch, case.side, case.side, case.inputs), np.float32)
    kernel = rng.standard_normal((k, k, case.inputs, case.outputs), np.float32)
    side = case.positions
    grad = rng.standard_normal((case.batch, side, side, case.outputs), np.float32)
    stem = case.inputs == 3
    arrays = [jnp.asarray(a) for a in (x, kernel, grad)]
    calls: dict[str, Callable[[], Any]] = {}
    for name, convolve in JAX_WAYS.items():

        def run(x: Any, kernel: Any, grad: Any, convolve: Any = convolve) -> Any:
            y, pull = jax.vjp(
                lambda x, k: convolve(x, k, (case.stride,) * 2, ((p, p),) * 2, **LAYOUT), x, kernel
            )
            return (y, pull(grad)[1]) if stem else (y, *pull(grad))

        compiled = jax.jit(run).lower(*arrays).compile()
        calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*arrays))
    device = rounds.torch_device()
    for name, layout in TORCH_WAYS.items():
        tensors = [
            torch.from_numpy(a).permute(order).to(device).contiguous(memory_format=layout)
            for a, order in ((x, (0, 3, 1, 2)), (kernel, (3, 2, 0, 1)), (grad, (0, 3, 1, 2)))
        ]
        calls[name] = partial(_torch_single, *tensors, case.stride, p, stem)
    return calls


def _torch_single(x: Any, kernel: Any, grad: Any, stride: int, padding: int, stem: bool) -> None:
    torch.nn.functional.conv2d(x, kernel, stride=stride, padding=padding)
    torch.ops.aten.convolution_backward(
        grad, x, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1,
        [not stem, True, False],
    )  # fmt: skip
    _wait()


def _wait() -> None:
    if rounds.torch_device() == "cuda":
        torch.cuda.synchronize()


def whole(name: str, image_size: int, batch: int, *, torch_too: bool = True) -> dict[str, Any]:
    """Calls that give the gradients of a backbone in training; batch spread over JAX's devices."""
    images = np.random.default_rng(0).standard_normal((batch, image_size, image_size, 3))
    images = images.astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, alike = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = jax.device_put(images, rows)
    calls: dict[str, Any] = {}
    standing = resnet.conv_general_dilated
    for way, convolve in JAX_WAYS.items():
        resnet.conv_general_dilated = convolve  # looked up when the network is traced
        try:
            calls[way] = _jax_whole(name, placed, alike)
        finally:
            resnet.conv_general_dilated = standing
    for way, layout in TORCH_WAYS.items() if torch_too else ():
        network = torch_step.backbone(name)[0].train()
        network = network.to(rounds.torch_device(), memory_format=layout)
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(rounds.torch_device())
        calls[way] = partial(_torch_whole, network, tensor.contiguous(memory_format=layout))
    return calls


def _jax_whole(name: str, images: jax.Array, alike: NamedSharding) -> Callable[[], Any]:
    model = resnet.build_backbone(name)
    init = jax.jit(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False),
        out_shardings=alike,
    )
    variables = init()

    def loss(params: Any, images: jax.Array) -> Any:
        y, updated = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.square(y)), updated

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=alike)
    compiled = step.lower(variables["params"], images).compile()
    return lambda: jax.block_until_ready(compiled(variables["params"], images))


def _torch_whole(network: torch.nn.Module, images: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(images).square().sum().backward()
    _wait()


def show(title: str, first: str, found: list[dict]) -> None:
    """Prints a table: milliseconds of each way, the best one in bold."""
    if not found:
        return
    ways = list(found[0]["milliseconds"])
    lines = []
    for row in found:
        times = row["milliseconds"]
        best = min(times, key=lambda way: times[way]["median"])
        cells = [rounds.milliseconds(times[way], 0 if row["long"] else 1) for way in ways]
        cells = [f"**{c}**" if w == best else c for w, c in zip(ways, cells, strict=True)]
        lines.append([row["name"], *cells])
    print(rounds.markdown(title, [first, *ways], lines), flush=True)


def main() -> None:
    """Measures, prints tables and perhaps writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="small maps and a ResNet-18 only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("single", "whole"), help="leave the other part out")
    parser.add_argument("--divided", action="store_true", help="whole ones on two devices as well")
    parser.add_argument("--devices", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    results: dict[str, Any] = {
        "machine": {**rounds.machine(), "torch": torch.__version__, "devices": jax.device_count()},
        "single": [],
        "whole": [],
    }
    cases = [c for c in CASES if c.side <= 8] if options.quick else CASES
    for case in cases if options.only != "whole" else ():
        times = rounds.alternate(single(case), options.rounds)
        row = {"name": case.name, "gigaflops": case.gigaflops, "milliseconds": times}
        results["single"].append({**row, "long": False})
    show("Value and gradients of one convolution, ms", "convolution", results["single"])
    for name, size, batch in BACKBONES[:1] if options.quick else BACKBONES:
        if options.only == "single":
            break
        if options.quick:
            batch = 8
        calls = whole(name, size, batch, torch_too=not options.devices)
        times = rounds.alternate(calls, options.rounds)
        row = {"name": f"{name}, {size}x{size}, batch {batch}", "milliseconds": times}
        results["whole"].append({**row, "long": True})
        del calls
        jax.clear_caches()
    parts = f", {options.devices} devices" if options.devices else ""
    show(f"Backbone, forward and backward, ms{parts}", "backbone", results["whole"])
    rounds.write(options.json, results)
    if options.divided:
        again = [sys.executable, __file__, "--only=whole", "--devices=2"]
        again += ["--quick"] if options.quick else []
        again += [f"--rounds={options.rounds}"]
        if options.json:
            again.append(f"--json={options.json.with_suffix('.divided.json')}")
        subprocess.run(again, check=True, env=os.environ)


if __name__ == "__main__":
    main()
