"""A live seed: its kernel, its share in the layer's output, and how it fares.

    symbol   meaning                                 shape
    x        the layer's input, or its source's      (batch, *site.input_shape)
    h        the output of the layer's own forward   (batch, *site.output_shape)
    d        the kernel's delta, ``kernel(x, h)``    as h
    alpha    the seed's share                        scalar tensor on the layer's device

The layer gives ``h + sum_i alpha_i * d_i``. Every kernel sees the same h; x is the layer's own input,
or, for a skip seed, that of its source: another layer that runs before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.contracts.blueprint import Site
from esper.contracts.errors import CorruptDataError
from esper.execution.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.execution.layers.holder import SeedHolder


ParameterPlace = tuple[dict[str, nn.Parameter | None], str]
"""A module's own dictionary of parameters, and a name in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a seed was made from; everything is empty for a bare module."""

    ir: bytes | None = None
    """Deterministic bytes of the blueprint's graph."""
    blueprint_id: str = ""
    """Content id of the blueprint."""
    artifact_id: str = ""
    """Kernel that it was loaded from."""
    adaptation_id: str = ""
    """Adaptation it belongs to."""


class BlendMode(Enum):
    """How a seed's delta enters the layer's output."""

    # A value names the tensor to multiply by: a compiled graph has one guard for it, where it would have one a case.
    ALPHA = "alpha"
    """Times its alpha."""
    WHOLE = ""
    """As it is: a fossil, whose alpha is 1."""
    TRIAL = "trial_alpha"
    """Times the alpha of the present trial or counterfactual."""


class Seed(nn.Module):
    """A live seed; a submodule ``seeds.<i>`` of its layer, so moves, saves and modes reach its kernel.

    Both alphas are tensors that are written in place, so a change neither recompiles nor waits for the device.
    """

    alpha: Tensor
    trial_alpha: Tensor
    failures: Tensor

    def __init__(
        self,
        kernel: nn.Module,
        *,
        index: int,
        device: torch.device,
        site: Site | None,
        origin: Origin = Origin(),
        source: str = "",
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("alpha", torch.zeros((), device=device), persistent=False)
        self.register_buffer("trial_alpha", torch.zeros((), device=device), persistent=False)
        # Failures seen by the device: those not yet read and those in a row, packed by `guarded`.
        self.register_buffer("failures", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.index = index
        self.site = site
        self.ir = origin.ir
        self.blueprint_id = origin.blueprint_id
        self.artifact_id = origin.artifact_id
        self.adaptation_id = origin.adaptation_id
        self.source = source
        self.mode = BlendMode.ALPHA
        self.is_silent = True
        self.breaker = CircuitBreaker()
        self._places: tuple[nn.Module, list[ParameterPlace]] | None = None
        # The layer; in a tuple, so that it does not become a submodule.
        self._owner: tuple[SeedHolder, ...] = ()

    def set_alpha(self, alpha: float) -> None:
        """Write alpha into its tensor."""
        self.alpha.fill_(alpha)
        self.is_silent = alpha == 0.0

    def forget_alpha(self) -> None:
        """Give alpha a new tensor: passes before in this very step still need the old one's value in backward."""
        self.alpha = self.alpha.clone()

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the kernel."""
        return sum(parameter.numel() for parameter in self.kernel.parameters() if parameter.requires_grad)

    def parameter_places(self) -> list[ParameterPlace]:
        """Give where the kernel's parameters stand: walking through its modules in every step would cost more."""
        if self._places is None or self._places[0] is not self.kernel:
            places = [(module._parameters, name) for module in self.kernel.modules() for name in module._parameters]
            self._places = (self.kernel, places)
        return self._places[1]

    @property
    def weight(self) -> Tensor | None:
        """The alpha of the seed's mode; ``None`` where the delta enters as it is."""
        name = self.mode._value_  # without the descriptor that value is
        return self._buffers[name] if name else None

    def scaled(self, delta: Tensor, like: Tensor) -> Tensor:
        """Give the delta times the alpha of the seed's mode, in the dtype of ``like``."""
        name = self.mode._value_  # as in `weight`: a property is six guards of a compiled graph
        weight = self._buffers[name] if name else None
        scaled = delta if weight is None else delta * weight
        return scaled if scaled.dtype is like.dtype else scaled.to(like.dtype)

    def get_extra_state(self) -> Tensor:
        """Give what ``load_state_dict`` needs to build this seed again; empty for a bare module."""
        (layer,) = self._owner
        if self.ir is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(layer.grown_seed(self.index).to_bytes()), dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Check that the entry is one of ours; the layer has already acted on it."""
        if not isinstance(state, Tensor):
            raise CorruptDataError(f"a seed's extra state must be a tensor of bytes, got {type(state).__name__}")


def number_of(identity: str) -> int:
    """Give the 64-bit number that stands for an id in the native columns: of its SHA-256; 0 for an empty id."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "little") if identity else 0


def extra_states(state_dict: Mapping[str, object], prefix: str) -> dict[int, Tensor]:
    """Give the extra states of the seeds below ``prefix`` by seed index."""
    start, end = f"{prefix}seeds.", "._extra_state"
    found: dict[int, Tensor] = {}
    for key, value in state_dict.items():
        if key.startswith(start) and key.endswith(end) and key[len(start) : -len(end)].isdecimal():
            if not isinstance(value, Tensor) or value.dtype != torch.uint8:
                raise CorruptDataError(f"{key} must be a tensor of bytes, got {type(value).__name__}")
            found[int(key[len(start) : -len(end)])] = value
    return found
