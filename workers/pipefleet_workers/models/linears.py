"""Linear layers in float32 on a CPU, multiplied by oneDNN where it is faster than torch's own library: twice as fast on AMD.

torch multiplies float32 matrices with MKL, whose fast kernels are for Intel processors. torch contains oneDNN too, which takes
the fast kernels of every processor. `acceleration` calls `faster_linears` before the warm-up. A model for which oneDNN is not
faster, or not exact, stays as it is; nothing is raised.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

FASTER = 1.2
"""oneDNN is used if it is so many times as fast."""
PROBED_ROWS, TRIES = 256, 5
FEWEST_ROWS = 32
"""oneDNN rearranges the weights at each call, which takes longer than the product of so few rows: those of a step of generate()."""
MOST_PROBED = 1 << 23
"""Weights of the largest layer that is timed; a table of a whole vocabulary takes seconds."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest number, between the two libraries."""


def faster_linears(model: Any) -> float:
    """Let the linear layers of `model` multiply through oneDNN if this is faster.

    Returns how many times as fast its most costly kind of layer is now; 1.0 if nothing has changed.
    """
    try:
        layers = list(_layers(model))
        small = [layer for layer in layers if layer.weight.numel() <= MOST_PROBED] or layers[:1]
        gain = _gain(_costliest(small)) if small else 1.0
    except Exception as error:  # noqa: BLE001 - the operator is internal to torch, so another torch may lack or change it
        log.info("linear layers stay as they are: oneDNN does not multiply them (%s)", type(error).__name__)
        return 1.0
    if gain < FASTER:
        return 1.0
    for layer in layers:
        layer.__class__ = OneDnnLinear
    log.info("linear layers: multiplied by oneDNN, %.1f times as fast", gain)
    return gain


def by_onednn(model: Any) -> bool:
    """Whether oneDNN multiplies linear layers of a model."""
    return isinstance(model, nn.Module) and any(isinstance(one, OneDnnLinear) for one in model.modules())


class OneDnnLinear(nn.Linear):
    """A linear layer whose product is computed by oneDNN, outside of autograd."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product, as `nn.Linear` gives it."""
        few = input.numel() < FEWEST_ROWS * self.in_features
        if few or torch.is_grad_enabled() or input.dtype != torch.float32:
            return super().forward(input)
        return _product(input, self.weight, self.bias)


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found


def _layers(model: Any) -> Iterator[nn.Linear]:
    """The plain linear layers of a model; layers or weights of a class of their own may compute something else."""
    for layer in model.modules():
        if type(layer) is nn.Linear and all(_is_plain(one) for one in layer.parameters(recurse=False)):
            yield layer


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether oneDNN can multiply with it. Quantized weights may call themselves float32, but have a class of their own."""
    plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
    return plain and parameter.dtype == torch.float32 and parameter.device.type == "cpu"


def _costliest(layers: list[nn.Linear]) -> nn.Linear:
    """A layer of the shape that all layers of this shape together make the most costly."""
    shapes = Counter[torch.Size]()
    for layer in layers:
        shapes[layer.weight.shape] += layer.weight.numel()
    (shape, _), *_ = shapes.most_common(1)
    return next(layer for layer in layers if layer.weight.shape == shape)


@torch.inference_mode()
def _gain(layer: nn.Linear) -> float:
    """How many times as fast oneDNN multiplies; 0.0 if it gives other numbers."""
    rows = torch.randn(PROBED_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0))
    mine, other = _product(rows, layer.weight, layer.bias), layer(rows)
    if float((mine - other).abs().max()) > TOLERANCE * float(other.abs().max()):
        return 0.0
    return _seconds(lambda: layer(rows)) / _seconds(lambda: _product(rows, layer.weight, layer.bias))


def _seconds(multiply: Callable[[], object]) -> float:
    """The shortest of several tries."""
    tries = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        multiply()
        tries.append(time.perf_counter() - begin)
    return min(tries)
