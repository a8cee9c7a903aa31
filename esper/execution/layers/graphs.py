"""Compiled graphs that hold a grown structure: noted while they are traced, dropped before they become too many.

Dynamo keeps what it compiled for a frame until ``recompile_limit`` versions (8) stand beside each other; the next one
is an error under ``fullgraph=True``, and eager execution without it. Every growth makes a version, and no step will ask
for most of the older ones again. Once half of the limit is taken up, the next change of structure drops the frame's
versions, and their memory with them; a few are kept because a seed that is culled brings the version before it back. A
frame that other models run through as well compiles once more for them.
"""

from __future__ import annotations

from types import CodeType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch._dynamo.config as dynamo_config
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.eval_frame import remove_from_cache

from esper.execution.layers.ranks import require_synchronised

if TYPE_CHECKING:
    from esper.execution.layers.base import KasminaLayer

_frames: Final[set[CodeType]] = set()


def note_frame(layer: KasminaLayer) -> None:  # noqa: ARG001 - read where the frame is traced
    """Note the frame that is being compiled, and check its seeds; costs nothing when the graph runs.

    Raises:
        InvalidStateError: As ``require_synchronised``.
    """
    comptime(_note)


def _note(context: ComptimeContext) -> None:
    _frames.add(context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.root_tx.f_code)
    traced: Any = context.get_local("layer")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    layer: KasminaLayer = traced.value
    require_synchronised(layer, layer._kasmina.terms)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # asked for inside traced frames, too
def structure_changed() -> None:
    """Drop what was compiled for frames that hold as many versions as may stand beside each other."""
    limit = max(1, dynamo_config.recompile_limit // 2)
    for frame in [frame for frame in _frames if len(_debug_get_cache_entry_list(frame)) >= limit]:
        remove_from_cache(frame)
        _frames.discard(frame)
