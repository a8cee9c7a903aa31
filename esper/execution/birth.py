"""Fitting a seed's first weights to what its site carries, before its first step; its delta stays what it was.

    symbol   meaning                                                              shape
    x, h     what the kernel reads: the layer's input and its host's output       (batch, ...)
    y        output of one map of the kernel: linear, low rank, convolution       (units, samples)
    a        what the activations that y feeds give                               (units, samples)
    m        mean of a unit's y                                                   (units)
    s        root of the mean of the units' variances                             scalar

Map by map, in the graph's order, weight and bias are divided by s and m / s is taken from the bias: y then has a unit's
mean of 0 and a variance of 1. A unit whose a is 0 on the whole batch is drawn anew, as it was drawn and at the map's
new scale, at most ``MAX_DRAWS`` times. What lies on the two sides of a map is thus matched whatever x and h are shifted
and scaled by.

Only what was drawn is fitted, and only where an activation is fed unit by unit: by the map itself, or through norms,
pooling and changes of layout. So maps that begin at zero are left alone, which holds the delta where it is, and so are
those that feed attention, another map, a sum or a product, where it is not said what a unit should be. A map stays as
it was drawn where y does not vary (a single example, constant inputs) or is not finite, and a unit that does not vary
keeps its mean.

Sources: D. Mishkin and J. Matas, All you need is a good init, ICLR 2016 (layer-sequential unit variance);
P. Krähenbühl et al., Data-dependent initializations of convolutional neural networks, ICLR 2016 (means).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from esper.blueprints import Plan, ir_from_bytes, plan
from esper.blueprints.operator_base import NODE_KEY, initialise
from esper.execution.bulkhead import is_closed
from esper.execution.gradient_gate import readable
from esper.execution.incubation import Norms, as_weights, output_without
from esper.execution.overrides import GrowingModel, SeedRef, find_seed
from esper.execution.seed import Seed, number_of

MAX_DRAWS: Final = 8
"""Times that units which are dead on the batch are drawn anew, at most."""

_FLOOR: Final = 1e-10
"""Variance over mean square at which values count as constant: what rounding leaves of float32."""
_MAPS: Final = {"linear": "node", "low_rank": "up", "conv": "node", "depthwise_conv": "node"}
"""Operators that map features, and which of its modules gives a node's output."""
_KEEPS_UNITS: Final = frozenset(
    {"layer_norm", "group_norm", "rms_norm", "pool", "global_pool", "align", "like", "to_tokens", "to_signal"}
)
"""Operators whose unit i comes from unit i of their first input, moved and scaled at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Map:
    """One map of a kernel that is fitted; values are named by nodes of the blueprint, with their feature axis."""

    module: nn.Module
    init: str
    output: tuple[str, int]
    activations: tuple[tuple[str, int], ...]


def seen_at_site(
    model: GrowingModel, ref: SeedRef, run: Callable[[], object], *, norms: Norms = "running"
) -> tuple[Tensor, Tensor] | None:
    """Give the x and h that a live seed's kernel reads while ``run`` runs the model, as a trial of it would.

    Seeds of its layer are off meanwhile, so that h is the host's. Nothing is left behind, and nothing is compiled: it
    is run once. ``None`` where the run does not come by the layer, or a skip seed's source.

    Raises:
        NotFoundError, InvalidStateError: No kernel stands at the seed.
    """
    seed, layer = find_seed(model, ref), model.kasmina_layers[ref.layer]
    source = model.kasmina_layers[seed.source] if seed.source else layer
    seen: dict[str, Tensor] = {}

    def see_x(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        del module, out
        seen["x"] = source.to_site(source.seed_input(args, kwargs)).detach().clone()

    def see_h(module: nn.Module, args: object, out: object) -> None:
        del module, args
        seen["h"] = layer.to_site(layer.seed_output(out)).detach().clone()

    off = [SeedRef(ref.layer, other.index) for other in layer.live_seeds()]
    handles = [source.register_forward_hook(see_x, with_kwargs=True), layer.register_forward_hook(see_h)]
    try:
        with _uncompiled(layer._kasmina.skips.host):
            output_without(model, off, run, norms=norms)
    finally:
        for handle in handles:
            handle.remove()
    return (seen["x"], seen["h"]) if len(seen) == 2 else None


@contextmanager
def _uncompiled(host: nn.Module) -> Iterator[None]:
    """Let modules that were compiled in place run as they are: a graph would be compiled for one pass."""
    found = [(module, module._compiled_call_impl) for module in host.modules() if module._compiled_call_impl]
    for module, _ in found:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in found:
            module._compiled_call_impl = compiled


@torch.no_grad()
def fit_to_site(seed: Seed, x: Tensor, h: Tensor, *, random_seed: int) -> tuple[str, ...]:
    """Fit a seed's weights to a batch at its site, in place; gives the maps that were fitted, by node.

    Equal weights, batches and random seeds give equal weights; no global random stream is drawn from. A seed that is
    no blueprint's own module, or whose delta would change, is left as it was.

    Raises:
        Exception: Whatever the kernel raises; its weights are then as they were.
    """
    if not is_closed(seed) or seed.ir is None or seed.site is None:
        return ()
    kernel = seed.kernel
    assert isinstance(kernel, fx.GraphModule)
    maps = list(_maps_of(plan(ir_from_bytes(seed.ir), seed.site), kernel))
    if not maps:
        return ()
    born = [parameter.clone() for parameter in kernel.parameters()]
    with torch.autocast(h.device.type, enabled=False):
        batch = _BatchAtSite(kernel, *(as_weights(kernel, readable(value)) for value in (x, h)))
        draw = torch.Generator().manual_seed(number_of(f"draws after birth {random_seed}"))
        keeps = False
        try:
            delta = batch.run(())
            fitted = tuple(part.output[0] for part in maps if _fit(part, batch, draw))
            keeps = torch.equal(batch.run(()), delta)
        finally:
            if not keeps:
                for parameter, value in zip(kernel.parameters(), born, strict=True):
                    parameter.copy_(value)
    return fitted if keeps else ()


def _maps_of(layout: Plan, kernel: fx.GraphModule) -> Iterator[_Map]:
    """Give the maps that are fitted, in the order in which they run."""
    for step in layout.steps:
        part, init = _MAPS.get(step.node.op), step.call.attributes.get("init")
        if part is None or init == "zero":
            continue
        activations = tuple(_activations_after(layout, step.node.name))
        if activations:
            yield _Map(
                module=kernel.get_submodule(f"{part}_{step.node.name}"),
                init=step.call.word("init"),
                output=(step.node.name, step.output.channel_dim),
                activations=activations,
            )


def _activations_after(layout: Plan, name: str) -> Iterator[tuple[str, int]]:
    """Give the activations that a node feeds unit by unit, with their feature axis."""
    for step in layout.steps:
        if step.node.inputs[:1] != (name,):
            continue
        if step.node.op == "activation":
            yield step.node.name, step.output.channel_dim
        elif step.node.op in _KEEPS_UNITS:
            yield from _activations_after(layout, step.node.name)


class _BatchAtSite:
    """A kernel on one batch, and what its nodes give there."""

    def __init__(self, kernel: fx.GraphModule, x: Tensor, h: Tensor) -> None:
        self._kernel, self._x, self._h = kernel, x, h

    def run(self, names: Iterable[str], seen: dict[str, Tensor] | None = None) -> Tensor:
        """Give the delta; what the nodes of these names give goes to ``seen``."""
        delta: Tensor = _Recorder(self._kernel, frozenset(names), {} if seen is None else seen).run(self._x, self._h)
        return delta

    def units(self, places: Iterable[tuple[str, int]]) -> list[Tensor]:
        """Give the values of nodes as (units, samples), in float32 at least; places are nodes and feature axes."""
        seen: dict[str, Tensor] = {}
        wanted = list(places)
        self.run((name for name, _ in wanted), seen)
        rows = (seen[name].movedim(axis, 0).flatten(1) for name, axis in wanted)
        return [value.to(torch.promote_types(value.dtype, torch.float32)) for value in rows]


class _Recorder(fx.Interpreter):
    """Runs a kernel node by node, and keeps what some nodes of its blueprint give."""

    def __init__(self, kernel: fx.GraphModule, names: frozenset[str], seen: dict[str, Tensor]) -> None:
        super().__init__(kernel)
        self._names, self._seen = names, seen

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; of those that a blueprint's node became the last one counts."""
        value = super().run_node(n)
        name = n.meta.get(NODE_KEY)
        if name in self._names:
            self._seen[name] = value
        return value


def _fit(part: _Map, batch: _BatchAtSite, draw: torch.Generator) -> bool:
    """Bring one map to unit variance and its units to mean 0, none of them dead; false where it cannot be told."""
    factor = _standardise(part, batch)
    if factor is None:
        return False
    for _ in range(MAX_DRAWS):
        dead = torch.stack([(value == 0).all(1) for value in batch.units(part.activations)]).all(0)
        if not bool(dead.any()):
            break
        drawn = initialise(copy.deepcopy(part.module).to("cpu", torch.float32), part.init, draw)
        for own, fresh in zip(part.module.parameters(), drawn.parameters(), strict=True):
            own[dead] = fresh.to(own)[dead] * factor
        again = _standardise(part, batch)
        factor = factor if again is None else factor * again
    return True


def _standardise(part: _Map, batch: _BatchAtSite) -> Tensor | None:
    """Scale a map to unit variance and shift its units to mean 0; gives the factor, ``None`` where y is constant."""
    weight, bias = part.module.weight, part.module.bias
    assert isinstance(weight, Tensor)
    (y,) = batch.units([part.output])
    variance, mean = torch.var_mean(y, dim=1, correction=0)
    limit = _FLOOR * y.square().mean()
    if not bool(variance.mean() > limit):  # nor is it where a value is not finite
        return None
    factor = variance.mean().rsqrt()
    weight.mul_(factor)
    if isinstance(bias, Tensor):
        bias.copy_((bias - torch.where(variance > limit, mean, 0.0)) * factor)
    return factor
