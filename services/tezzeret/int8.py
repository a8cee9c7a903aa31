"""Int8 weights for inference: a quarter of the bytes, whatever kind of map they belong to.

    linear       torch's dynamic quantisation: inputs are quantised as they come, the product is taken in int8
    convolution  weights in int8 with a scale for each output channel, ``w = round(127 * w / max |w|) * max |w| / 127``;
                 written out where they are used, and the sum is taken in the input's own type

torch's own dynamic quantisation of convolutions is not used: on the shipped templates its forms differ from the module
by up to the whole output.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.services.tezzeret.compiler import quiet

LINEAR: Final = "int8_dynamic"
"""Name of what was done where linear maps were quantised."""
CONVOLUTION: Final = "int8_weights"
"""Name of what was done where convolutions were."""

_MOST: Final = 127


class _Int8Conv(nn.Module):
    """What convolutions of any number of dimensions keep."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
        scale = torch.where(largest > 0, largest / _MOST, torch.ones_like(largest))
        self.register_buffer("weight", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups


class _Int8Conv1d(_Int8Conv):
    """A one-dimensional convolution."""

    def forward(self, x: Tensor) -> Tensor:
        # The type is that of the input: a constant one would have the weights written out when the form is frozen.
        weight = self.weight.to(x.dtype) * self.scale  # type: ignore[operator]
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Int8Conv2d(_Int8Conv):
    """A two-dimensional convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale  # type: ignore[operator]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def quantize(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Give a module with int8 weights in all its maps, and what was done; a module without maps as it is.

    The module is changed in place.
    """
    done: list[str] = []
    if any(isinstance(part, nn.Linear) for part in module.modules()):
        with quiet():
            module = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        done.append(LINEAR)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Conv1d | nn.Conv2d):
            owner, _, own_name = name.rpartition(".")
            form = _Int8Conv1d(part) if isinstance(part, nn.Conv1d) else _Int8Conv2d(part)
            setattr(module.get_submodule(owner), own_name, form)
            if CONVOLUTION not in done:
                done.append(CONVOLUTION)
    return module, tuple(done)
