"""Compiled graphs that hold a grown structure: noted while they are traced, dropped before they become too many.

Dynamo keeps what it compiled for a frame until ``recompile_limit`` versions (8) stand beside each other; the next one
is an error under ``fullgraph=True``, and eager execution without it. Every growth makes a version, and no step will ask
for most of the older ones again. Once half of the limit is taken up, the next change of structure drops the frame's
versions, and their memory with them; a few are kept because a seed that is culled brings the version before it back. A
frame that other models run through as well compiles once more for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.eval_frame import remove_from_cache
from torch.compiler import is_compiling

from esper.execution.bulkhead import is_closed
from esper.execution.device_guard import gated, guarded
from esper.execution.gradient_gate import readable
from esper.execution.layers.forward import kasmina_forward
from esper.execution.layers.ranks import require_synchronised
from esper.execution.traced_gate import watch_traced

if TYPE_CHECKING:
    from esper.execution.layers.base import KasminaLayer
    from esper.execution.layers.record import LayerRecord
    from esper.execution.seed import Seed

_frames: Final[set[CodeType]] = set()


def busy_forward(layer: KasminaLayer, *args: Any, **kwargs: Any) -> Any:
    """Give the parent's output, plus what the live seeds add; measure the pass where it is due.

    Inside a graph nothing is measured, and the device looks after failures. There every attribute, method and function
    that is met is a guard that each pass of the graph evaluates, so this asks for no more than it needs.

    Raises:
        InvalidStateError: As ``require_synchronised``.
    """
    if not is_compiling():
        return kasmina_forward(layer, args, kwargs)
    record = layer._kasmina
    if record.terms:
        comptime(_note)
    is_common = record.is_common
    out = layer.__class__.host_class.forward(layer, *args, **kwargs) if is_common else _host(layer, args, kwargs)
    if not record.terms:
        return out
    h = layer.seed_output(out)
    x_site, h_site = layer.to_site(layer.seed_input(args, kwargs)), layer.to_site(h)
    total = h_site
    for seed in record.terms:
        x = x_site if is_common else _input_of(record, seed, x_site)
        x = gated(x) if x.requires_grad else readable(x)
        own_h = gated(h_site) if h_site.requires_grad else readable(h_site)
        kernel: Any = seed._modules["kernel"]
        delta = kernel.forward(x, own_h) if is_common else _delta(seed, x, own_h)
        total = total + guarded(seed, delta, h_site, counted=True)  # said, because a default would be one more guard
    return layer.with_output(out, layer.from_site(total, like=h))


def settle_common(record: LayerRecord) -> None:
    """Note whether the layer is as most are: its seeds are all closed and read its own input, and nothing else does."""
    is_common = not record.is_read and record.displaced is None
    record.is_common = is_common and all(is_closed(seed) and not seed.source for seed in record.terms)


def _host(layer: KasminaLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    record = layer._kasmina
    if record.is_read:
        record.skips.keep(layer.layer_name, layer.to_site(layer.seed_input(args, kwargs)))
    if record.displaced is not None:
        return record.displaced(*args, **kwargs)
    return type(layer).host_class.forward(layer, *args, **kwargs)


def _input_of(record: LayerRecord, seed: Seed, x: Tensor) -> Tensor:
    return record.skips.input_of(seed.source) if seed.source else x


def _delta(seed: Seed, x: Tensor, h: Tensor) -> Tensor:
    """Run a kernel where no bulkhead is; one that is not closed has copies.

    A closed kernel has no hooks, so its ``forward`` is asked: its call would be guarded class by class.
    """
    delta: Tensor = seed.kernel.forward(x, h) if is_closed(seed) else seed.kernel(x.clone(), h.clone())
    return delta


def _note(context: ComptimeContext) -> None:
    _frames.add(context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.root_tx.f_code)
    traced: Any = context.get_local("layer")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    layer: KasminaLayer = traced.value
    require_synchronised(layer, layer._kasmina.terms)
    settle_common(layer._kasmina)  # a kernel may have been changed since
    watch_traced(layer, layer._kasmina.terms)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # asked for inside traced frames, too
def structure_changed() -> None:
    """Drop what was compiled for frames that hold as many versions as may stand beside each other."""
    limit = max(1, dynamo_config.recompile_limit // 2)
    for frame in [frame for frame in _frames if len(_debug_get_cache_entry_list(frame)) >= limit]:
        remove_from_cache(frame)
        _frames.discard(frame)
