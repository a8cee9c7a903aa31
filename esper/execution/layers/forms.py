"""The two forms of a Kasmina class: at rest its ``forward`` is its parent's, in its busy form it is ``busy_forward``.

A layer goes from one to the other by its ``__class__``. A ``forward`` in the instance does the same, but makes the
instance's dictionary outgrow the table of names that Python shares between a class's instances (768 bytes a layer), and
dynamo then walks through the module's own call, which takes some 30 guards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

if TYPE_CHECKING:
    from esper.execution.layers.base import KasminaLayer

_by_class: Final[dict[type[nn.Module], tuple[type[KasminaLayer], type[KasminaLayer]]]] = {}
"""The form at rest and the busy form, by either."""


def pair_forms(at_rest: type[KasminaLayer], busy: type[KasminaLayer]) -> None:
    """Let layers of one class go over to the other while they have something to do, and back."""
    _by_class[at_rest] = _by_class[busy] = (at_rest, busy)


def form_of(cls: type[nn.Module], *, is_busy: bool) -> type[KasminaLayer] | None:
    """Give one of the two forms of a class; ``None`` where others derived it (parametrisations, ``fully_shard``)."""
    pair = _by_class.get(cls)
    return None if pair is None else pair[is_busy]
