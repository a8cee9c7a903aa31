"""Activation checkpointing: whether a forward pass is a recomputation, and whether it may be recomputed later.

A recomputation must do what the pass did that it repeats, and is no pass of its own: it counts nothing, and a seed that
has to be cut off is cut off only when no recomputation can ask for it any more.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.compiler import is_compiling

_graph_task_id: Final = torch._C._current_graph_task_id  # looked up once: every pass with live seeds asks


def is_recomputing() -> bool:
    """Whether autograd's backward is running in this thread: a forward pass inside it repeats an earlier one."""
    return not is_compiling() and _graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether something watches what this forward pass saves for backward, as non-reentrant checkpointing does.

    The reentrant kind saves nothing in its first pass and takes whatever the second one saves. Frames that dynamo
    traces are not asked: it knows neither question.
    """
    if is_compiling():
        return False
    return torch.is_grad_enabled() and checkpointed_part() is not None


def checkpointed_part() -> object | None:
    """Give what stands for the part under non-reentrant checkpointing that runs now; ``None`` outside of any.

    It is the innermost hook on what autograd saves, so other watchers of saved tensors count as parts, too.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]
