"""Running a model with its seeds otherwise than they stand, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.contracts.errors import InvalidInputError, NotFoundError
from esper.execution.layers.base import KasminaLayer
from esper.execution.random_streams import frozen_streams
from esper.execution.seed import BlendMode, Seed


class SeedRef(NamedTuple):
    """One seed of a model."""

    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""


class GrowingModel(Protocol):
    """What this package needs of a wrapped model (``esper.core.morphable.MorphableModel``)."""

    @property
    def kasmina_layers(self) -> Mapping[str, KasminaLayer]:
        """The layers that can hold seeds, by name."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give the model's output."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Give every module."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give every parameter."""
        ...


def find_seed(model: GrowingModel, ref: SeedRef) -> Seed:
    """Give the module of a live seed.

    Raises:
        NotFoundError: The model has no such layer.
        InvalidInputError: The layer has no such seed.
        InvalidStateError: No kernel stands there.
    """
    layer = model.kasmina_layers.get(ref.layer)
    if layer is None:
        raise NotFoundError(f"layer must be one of {', '.join(model.kasmina_layers)}, got {ref.layer!r}")
    return layer.require_seed(ref.seed_index)


@contextmanager
def seeds_at(model: GrowingModel, alphas: Mapping[SeedRef, float]) -> Iterator[None]:
    """Let these live seeds take part at these alphas meanwhile, whatever their states; 0 is off. Others stay.

    Nothing is measured meanwhile. A compiled model compiles this once for each set of seeds, not for each alpha.

    Raises:
        NotFoundError: The model has no such layer.
        InvalidStateError: No kernel stands at a seed.
        InvalidInputError: An alpha is outside [0, 1].
    """
    chosen = {ref: find_seed(model, ref) for ref in alphas}
    _check_alphas(alphas)
    layers = {ref.layer: model.kasmina_layers[ref.layer] for ref in alphas}
    try:
        with unmeasured(model):
            for ref, seed in chosen.items():
                seed.mode = BlendMode.TRIAL
                seed.trial_alpha.fill_(alphas[ref])
                seed.is_silent = alphas[ref] == 0.0
            for name, layer in layers.items():
                kept = [seed for seed in layer._kasmina.terms if SeedRef(name, seed.index) not in alphas]
                # Silent ones as well: with and without a seed are then one compiled graph.
                added = [seed for ref, seed in chosen.items() if ref.layer == name]
                layer.set_terms(tuple(sorted((*kept, *added), key=lambda seed: seed.index)))
            yield
    finally:
        for layer in layers.values():
            layer.refresh_terms()


def named_seeds(
    model: GrowingModel, configurations: Iterable[Mapping[SeedRef, float]]
) -> dict[str, dict[SeedRef, Seed]]:
    """Give the live seeds that configurations name, by layer.

    Raises:
        As :func:`seeds_at`.
    """
    found: dict[str, dict[SeedRef, Seed]] = {}
    for alphas in configurations:
        for ref in alphas:
            of_layer = found.setdefault(ref.layer, {})
            if ref not in of_layer:
                of_layer[ref] = find_seed(model, ref)
        _check_alphas(alphas)
    return found


def _check_alphas(alphas: Mapping[SeedRef, float]) -> None:
    for ref, alpha in alphas.items():
        if not 0.0 <= alpha <= 1.0:
            raise InvalidInputError.of(f"alpha of {ref.layer}[{ref.seed_index}]", "be in [0, 1]", alpha)


@contextmanager
def unmeasured(model: GrowingModel) -> Iterator[None]:
    """Count and measure no forward pass meanwhile."""
    records = [layer._kasmina for layer in model.kasmina_layers.values()]
    paused = [holder for record in records for holder in (record, record.pulse) if not holder.is_paused]
    for holder in paused:
        holder.is_paused = True
    try:
        yield
    finally:
        for holder in paused:
            holder.is_paused = False


def every_module(model: GrowingModel) -> Iterator[nn.Module]:
    """Give every module of the model, and the one that was wrapped: its own mode and hooks are not the wrapper's."""
    yield from model.modules()
    layers: Mapping[str, KasminaLayer] = getattr(model, "kasmina_layers", {})  # a plain module is its own host
    yield from {layer._kasmina.skips.host for layer in layers.values()}


@contextmanager
def evaluating(model: GrowingModel) -> Iterator[None]:
    """Run in eval mode without gradients; modes, buffers and random streams are as before afterwards."""
    flags = {module: module.training for module in every_module(model)}
    try:
        with torch.no_grad(), frozen_streams():
            for module in flags:
                module.training = False
            yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def frozen_buffers(model: GrowingModel) -> Iterator[None]:
    """Leave every buffer as it was, to the bit, though modules run in training mode.

    Batch and instance norms are kept from updating their statistics, while they go on normalising by the batch; the
    buffers of other modules are copied, and put back where the run changed them.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    norms = [module for module in norms if module.training]
    saved: list[tuple[Tensor, Tensor, int]] = []
    for module in model.modules():
        if not isinstance(module, _NormBase | Seed):
            own = (value for value in module._buffers.values() if value is not None)
            saved.extend((value, value.detach().clone(), value._version) for value in own)
    with ExitStack() as undo:
        for module in norms:
            undo.callback(setattr, module, "track_running_stats", True)
            module.track_running_stats = False
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before, version in saved:
                    if value._version != version:
                        value.copy_(before)
