"""Loading a state dict with grown structure: whole, or not at all.

The structure comes first, then the values. What does not fit leaves the model as it was to the bit: the same seed
modules, so that an optimizer's parameters are the model's still, in the same states, with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.contracts.run import Contribution
from esper.execution.layers import KasminaLayer
from esper.execution.seed import Seed, extra_states
from esper.execution.state import SeedStates


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stand:
    """What stood at a layer."""

    layer: KasminaLayer
    bank: nn.Module | None
    seeds: dict[str, nn.Module | None]
    contributions: dict[int, Contribution]
    num_kept: int

    @classmethod
    def of(cls, layer: KasminaLayer) -> _Stand:
        bank = layer._modules.get("seeds")
        return cls(
            layer=layer,
            bank=bank,
            seeds={} if bank is None else dict(bank._modules),
            contributions=dict(layer._kasmina.contributions),
            num_kept=layer._kasmina.num_kept,
        )

    def put_back(self) -> None:
        layer, record = self.layer, self.layer._kasmina
        layer._modules.pop("seeds", None)
        if self.bank is not None:
            layer._modules["seeds"] = self.bank
            self.bank._modules = dict(self.seeds)
        for seed in self.seeds.values():
            if isinstance(seed, Seed):
                seed.set_alpha(float(layer.state_layout.alpha_blend[seed.index]))
        record.contributions = dict(self.contributions)
        record.num_kept = self.num_kept
        layer.refresh_terms()


def load_whole(
    host: nn.Module,
    layers: Mapping[str, KasminaLayer],
    states: SeedStates,
    state_dict: Mapping[str, Any],
    *,
    assign: bool = False,
    prefix: str = "",
    load: Callable[..., Any] | None = None,
) -> Any:
    """Bring the layers' seeds to those that the state dict names, then load every value, strictly.

    ``prefix`` stands before the layers' names in the state dict; ``load`` is the way to load, the host's by default.

    Raises:
        CorruptDataError: A seed's entry is not ours, or is damaged.
        InvalidBlueprintError: A seed's graph is not legal at its site.
        RuntimeError: torch's own: keys or shapes do not fit.
    """
    load = load or host.load_state_dict
    with _undone_on_error(layers, states):
        for name, layer in layers.items():
            layer.clear_others(extra_states(state_dict, f"{prefix}{name}."))
            layer.grow_to(state_dict, f"{prefix}{name}.")
        own = host.state_dict()
        if _fits(own, state_dict):
            return load(state_dict, assign=assign)
        before = dict(own) if assign else {key: _copied(value) for key, value in own.items()}
        try:
            return load(state_dict, assign=assign)
        except BaseException:
            load(before, assign=assign)
            raise


@contextmanager
def _undone_on_error(layers: Mapping[str, KasminaLayer], states: SeedStates) -> Iterator[None]:
    stood, snapshot, step = [_Stand.of(layer) for layer in layers.values()], states.snapshot(), states.step
    try:
        yield
    except BaseException:
        states.restore(snapshot)
        states.step = step
        for stand in stood:
            stand.put_back()
        raise


def _fits(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> bool:
    """Whether keys and shapes are those of the model, so that loading copies and nothing else."""
    return own.keys() == state_dict.keys() and all(
        _shape(value) == _shape(state_dict[key]) for key, value in own.items() if not key.endswith("_extra_state")
    )


def _shape(value: object) -> object:
    return value.shape if isinstance(value, torch.Tensor) else type(value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
