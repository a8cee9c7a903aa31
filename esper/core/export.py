"""A grown model as ordinary torch modules: nothing of Esper is left in it, and nothing of Esper is needed to run it.

Every layer is of its own class again. A layer with fossils has their kernels below ``seeds``, under the keys they had
while the model grew, and ``seeds`` is also the layer's forward hook: a ``torch.fx.GraphModule`` that is called with the
layer's arguments and output and gives ``h + sum_i d_i``. Attributes that others read (``weight``, ``in_features``) stay
where they were, and fused paths, which would go around the kernels, step back where they see a hook.
"""

from __future__ import annotations

import copy
import operator

from torch import fx, nn

from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.morphable import MorphableModel
from esper.execution.layers import KasminaLayer, KasminaMultiheadAttention


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
    for layer in layers:
        _make_plain(layer)
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


def _make_plain(layer: KasminaLayer) -> None:
    """Give the layer its own class back, with its fossils as a graph that is its hook."""
    fossils = {str(seed.index): seed.kernel for seed in layer.live_seeds()}
    batch_axis = 1 if isinstance(layer, KasminaMultiheadAttention) and not layer.batch_first else 0
    layer.set_terms(())
    layer.remove_forward()
    layer._modules.pop("seeds", None)
    del layer.__dict__["_kasmina"]
    kind = type(layer)
    layer.__class__ = kind.host_class  # type: ignore[assignment]
    if fossils:
        seeds = _fossil_hook(fossils, gives_tuple=kind is KasminaMultiheadAttention, batch_axis=batch_axis)
        seeds.train(layer.training)
        layer.add_module("seeds", seeds)
        layer.register_forward_hook(seeds)


def _fossil_hook(fossils: dict[str, nn.Module], *, gives_tuple: bool, batch_axis: int) -> fx.GraphModule:
    """Give ``forward(module, args, output) -> output + deltas`` with the kernels as submodules ``<i>.kernel``."""
    root = nn.Module()
    for index, kernel in fossils.items():
        slot = nn.Module()
        slot.add_module("kernel", kernel)
        root.add_module(index, slot)
    graph = fx.Graph()
    graph.placeholder("module")
    args, output = graph.placeholder("args"), graph.placeholder("output")
    x = graph.call_function(operator.getitem, (args, 0))
    h = graph.call_function(operator.getitem, (output, 0)) if gives_tuple else output
    if batch_axis:
        x, h = (graph.call_method("transpose", (value, 0, batch_axis)) for value in (x, h))
    # The kernels share one view of each, as in the layers: one order of summing gradients.
    views = tuple(graph.call_method("view_as", (value, value)) for value in (x, h))
    total = h
    for index in fossils:
        delta = graph.call_module(f"{index}.kernel", views)
        total = graph.call_function(operator.add, (total, graph.call_method("type_as", (delta, h))))
    if batch_axis:
        total = graph.call_method("transpose", (total, 0, batch_axis))
    if gives_tuple:
        graph.output((total, graph.call_function(operator.getitem, (output, 1))))
    else:
        graph.output(total)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Fossils")
