"""Karn's dealings with Urza: stores what it proposes, with its ancestors, and looks up designs that others made."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from esper.contracts.blueprint import Blueprint, BlueprintState
from esper.contracts.errors import AlreadyExistsError, NotFoundError
from esper.contracts.wire import from_wire, to_wire
from esper.v1 import blueprint_pb2, urza_service_pb2

log = logging.getLogger(__name__)

_MAX_GENERATIONS = 32

Find = Callable[[str], Awaitable[Blueprint | None]]
"""Gives a design that is known here, by content id."""


class Library:
    """Urza over its stub. Belongs to the event loop of its channel."""

    def __init__(self, urza: Any, *, call_timeout_s: float = 20.0) -> None:
        self._urza = urza
        self._timeout_s = call_timeout_s

    async def store(self, design: Blueprint, find: Find, generation: int = 0) -> Blueprint:
        """Store a design and give it as the library has it; ancestors it lacks are stored first, as ``find`` has them.

        Raises:
            NotFoundError: The library lacks an ancestor that is not known here either.
            UnavailableError: The library cannot be reached.
        """
        try:
            return await self._create(design)
        except AlreadyExistsError:
            # Somebody stored the same graph under another name: that one is the design.
            return await self.get(design.id)
        except NotFoundError:
            found = [await find(name) for name in design.lineage.parent_ids]
            parents = [parent for parent in found if parent is not None]
            if not parents or generation >= _MAX_GENERATIONS:
                raise
            for parent in parents:
                await self.store(parent, find, generation + 1)
            return await self._create(design)

    async def get(self, reference: str) -> Blueprint:
        """Give a blueprint by content id.

        Raises:
            NotFoundError: The library has none.
            UnavailableError: The library cannot be reached.
        """
        request = urza_service_pb2.GetBlueprintRequest(reference=reference)
        answer = await self._urza.GetBlueprint(request, timeout=self._timeout_s)
        return from_wire(answer.blueprint, Blueprint)

    async def _create(self, design: Blueprint) -> Blueprint:
        message = to_wire(design)
        assert isinstance(message, blueprint_pb2.Blueprint)
        state = BlueprintState.VALIDATED if design.lineage.author == "karn" else BlueprintState.DRAFT
        request = urza_service_pb2.CreateBlueprintRequest(
            name=design.name,
            ir=message.ir,
            metadata=message.metadata,
            lineage=message.lineage,
            state=blueprint_pb2.BlueprintState.ValueType(int(state)),
        )
        answer = await self._urza.CreateBlueprint(request, timeout=self._timeout_s)
        if answer.created:
            log.info("design_stored", extra={"blueprint_id": design.id, "blueprint_name": design.name})
        return from_wire(answer.blueprint, Blueprint)
