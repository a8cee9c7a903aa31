"""A grown model as ordinary torch modules: nothing of Esper is left in it, and nothing of Esper is needed to run it.

Every layer is of its own class again. A layer with fossils has their kernels below ``seeds``, under the keys they had
while the model grew, and ``seeds`` is also the layer's forward hook: a ``torch.fx.GraphModule`` that is called with the
layer's arguments and output and gives ``h + sum_i d_i``. Attributes that others read (``weight``, ``in_features``) stay
where they were, and fused paths, which would go around the kernels, step back where they see a hook.

Where a kernel reads another layer's input (a skip seed), that layer has a forward pre-hook that puts its arguments into
a dictionary under its name, and the model has a forward hook that empties it. These are graphs as well.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MethodType

from torch import fx, nn

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.morphable import MorphableModel
from esper.execution.layers import KasminaLayer, KasminaMultiheadAttention
from esper.execution.seed import Seed


def export(model: MorphableModel) -> nn.Module:
    """Give a copy of the model as plain torch modules, fossils included; its output equals the grown model's.

    Layers with fossils take their input positionally and with a batch dimension, as torch's own containers give it.

    Raises:
        InvalidInputError: Not a wrapped model, or a kernel's class is Esper's own.
        InvalidStateError: A live seed is not FOSSILIZED with alpha 1, all of which are named, or a layer's class has
            changed since the model was wrapped (parametrisations, ``fully_shard``).
    """
    if not isinstance(model, MorphableModel):
        raise InvalidInputError.of("model", "be what wrap() gave", type(model).__name__)
    _require_settled(model)
    model.require_own_classes()
    plain = copy.deepcopy(model.host_module)
    layers = [module for module in plain.modules() if isinstance(module, KasminaLayer)]
    grown = {id(layer) for layer in layers if layer.live_seeds()}
    _settle(plain, {layer.layer_name: layer for layer in layers})
    for encoder in plain.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(module) in grown for module in encoder.modules()):
            encoder.use_nested_tensor = False  # packed input goes around hooks, or breaks in them
    for name, module in plain.named_modules():
        if type(module).__module__.split(".")[0] == "esper":
            raise InvalidInputError.of(
                f"module {name!r}", "be of a class of its own, not Esper's", type(module).__name__
            )
    return plain


def _require_settled(model: MorphableModel) -> None:
    open_seeds = []
    for name, layer in model.kasmina_layers.items():
        for seed in layer.live_seeds():
            state = layer.state_layout.state(seed.index)
            if state is not SeedLifecycleState.FOSSILIZED or layer.state_layout.alpha_blend[seed.index] != 1.0:
                open_seeds.append(f"{name}[{seed.index}] ({state.name})")
    if open_seeds:
        raise InvalidStateError(f"every live seed must be FOSSILIZED to be exported, got {', '.join(open_seeds)}")


def _settle(model: nn.Module, layers: Mapping[str, KasminaLayer]) -> None:
    """Give each layer its own class back, and its fossils a place in it as hooks."""
    axes = {name: _batch_axis(layer) for name, layer in layers.items()}
    fossils = {name: layer.live_seeds() for name, layer in layers.items()}
    for layer in layers.values():
        layer.set_terms(())  # of all, before the first is plain: skip seeds have let their sources go by then
    for layer in layers.values():
        _make_plain(layer)
    kept: dict[str, object] = {}
    for name, seeds in fossils.items():
        if seeds:
            _plant(layers[name], seeds, axes[name], {source: axes[source] for source in _sources(seeds)}, kept)
    sources = _sources(seed for seeds in fossils.values() for seed in seeds)
    for source in sources:
        layers[source].register_forward_pre_hook(partial(_keeping_hook(source), kept))
    if sources:
        model.register_forward_hook(partial(_clearing_hook(), kept), always_call=True)


def _batch_axis(layer: KasminaLayer) -> int:
    return 1 if isinstance(layer, KasminaMultiheadAttention) and not layer.batch_first else 0


def _make_plain(layer: KasminaLayer) -> None:
    """Give the layer its own class back, without its seeds."""
    layer.remove_forward()
    layer._modules.pop("seeds", None)
    del layer.__dict__["_kasmina"]
    layer.__class__ = type(layer).host_class  # type: ignore[assignment]


def _sources(seeds: Iterable[Seed]) -> list[str]:
    return sorted({seed.source for seed in seeds if seed.source})


def _plant(
    layer: nn.Module,
    fossils: Sequence[Seed],
    batch_axis: int,
    source_axes: Mapping[str, int],
    kept: dict[str, object],
) -> None:
    """Put a layer's fossils back as a graph that is its hook; skip seeds find what they read in ``kept``."""
    is_attention = isinstance(layer, nn.MultiheadAttention)
    hook = _fossil_hook(fossils, gives_tuple=is_attention, batch_axis=batch_axis, source_axes=source_axes)
    hook.train(layer.training)
    layer.add_module("seeds", hook)
    # Dynamo does not guard on having no hooks: a graph compiled for a model of this class without fossils would be
    # taken for this one. It does guard on where forward stands.
    layer.forward = MethodType(type(layer).forward, layer)
    layer.register_forward_hook(partial(hook, kept) if source_axes else hook)


def _keeping_hook(name: str) -> fx.GraphModule:
    """Give ``forward(kept, module, args)`` that puts a layer's arguments into ``kept``."""
    graph = fx.Graph()
    kept, _, args = (graph.placeholder(name) for name in ("kept", "module", "args"))
    graph.call_method("update", (kept, {name: args}))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph, class_name="Keeping")


def _clearing_hook() -> fx.GraphModule:
    """Give ``forward(kept, module, args, output)`` that empties ``kept``."""
    graph = fx.Graph()
    kept, *_ = (graph.placeholder(name) for name in ("kept", "module", "args", "output"))
    graph.call_method("clear", (kept,))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph, class_name="Clearing")


def _fossil_hook(
    fossils: Sequence[Seed], *, gives_tuple: bool, batch_axis: int, source_axes: Mapping[str, int]
) -> fx.GraphModule:
    """Give ``forward([kept,] module, args, output) -> output + deltas`` with kernels as submodules ``<i>.kernel``."""
    root = nn.Module()
    for seed in fossils:
        slot = nn.Module()
        slot.add_module("kernel", seed.kernel)
        root.add_module(str(seed.index), slot)
    graph = fx.Graph()
    kept = graph.placeholder("kept") if source_axes else None
    graph.placeholder("module")
    args, output = graph.placeholder("args"), graph.placeholder("output")
    inputs = {"": _batch_first(graph, graph.call_function(operator.getitem, (args, 0)), batch_axis)}
    for source, axis in source_axes.items():
        theirs = graph.call_function(operator.getitem, (kept, source))
        inputs[source] = _batch_first(graph, graph.call_function(operator.getitem, (theirs, 0)), axis)
    h = _batch_first(graph, graph.call_function(operator.getitem, (output, 0)) if gives_tuple else output, batch_axis)
    total = _add_deltas(graph, fossils, inputs, h)
    if batch_axis:
        total = graph.call_method("transpose", (total, 0, batch_axis))
    if gives_tuple:
        graph.output((total, graph.call_function(operator.getitem, (output, 1))))
    else:
        graph.output(total)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Fossils")


def _batch_first(graph: fx.Graph, value: fx.Node, batch_axis: int) -> fx.Node:
    return graph.call_method("transpose", (value, 0, batch_axis)) if batch_axis else value


def _add_deltas(graph: fx.Graph, fossils: Sequence[Seed], inputs: Mapping[str, fx.Node], h: fx.Node) -> fx.Node:
    """Add up the deltas. The kernels share one view of each input, as in the layers: one order of summing gradients."""
    views: dict[str, fx.Node] = {}
    h_view: fx.Node | None = None
    total = h
    for seed in fossils:
        if seed.source not in views:
            x = inputs[seed.source]
            views[seed.source] = graph.call_method("view_as", (x, x))
        if h_view is None:
            h_view = graph.call_method("view_as", (h, h))
        delta = graph.call_module(f"{seed.index}.kernel", (views[seed.source], h_view))
        total = graph.call_function(operator.add, (total, graph.call_method("type_as", (delta, h))))
    return total
