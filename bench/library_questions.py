"""What a library is asked, through its gRPC face and in SQL by hand; both draw from the same blueprints."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from bench import library_sql as sql
from bench.library_rows import VERSIONS_PER_NAME, Shelf, blueprint_id
from bench.library_sql import HandSql
from esper.contracts.wire import to_message
from esper.execution.keys import SigningKey
from esper.v1 import blueprint_pb2
from esper.v1 import urza_service_pb2 as pb

SEARCHES: Final = {
    "search, rare tag": (("chosen",), ()),
    "search, common tag": (("validated",), ()),
    "search, tag expression": (("series", "small"), ("validated",)),
}
"""Tags that must be there and tags that must not, by search."""
CALLS: Final = {
    "put": "CreateBlueprint",
    "get": "GetBlueprint",
    **dict.fromkeys(SEARCHES, "SearchBlueprints"),
    "ancestors": "GetLineage",
    "descendants": "GetLineage",
}
"""Name of the call by question."""

Question = Callable[[], Awaitable[Any]]
"""Asks once."""

_TRIES: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A filled library, as its clients and as its database's own driver reach it."""

    shelf: Shelf
    """What it was filled with."""
    stub: Any
    """The library over gRPC."""
    hand: HandSql
    """Its database."""
    sample_id: str
    """A blueprint that came through the API."""
    key: SigningKey
    """Key whose kernels it takes."""
    fresh: Iterator[int]
    """Numbers of blueprints that it does not hold."""
    drawn: random.Random
    """Draws the blueprints that are asked for."""

    def request(self, name: str) -> Any:
        """Give one request; for ``put`` a blueprint that is not there, else one drawn anew where one is named."""
        if name == "put":
            return create_request(self.shelf, next(self.fresh), "grown-by-api")
        if name in SEARCHES:
            all_tags, no_tags = SEARCHES[name]
            return pb.SearchBlueprintsRequest(all_tags=all_tags, no_tags=no_tags)
        wanted = self._drawn_id()
        if name == "get":
            return pb.GetBlueprintRequest(reference=wanted)
        ways = {"ancestors": pb.LINEAGE_DIRECTION_ANCESTORS, "descendants": pb.LINEAGE_DIRECTION_DESCENDANTS}
        return pb.GetLineageRequest(blueprint_id=wanted, direction=ways[name])

    def question(self, name: str, num_puts: int) -> Question:
        """Give the call through the library; puts are made ready beforehand, for so many calls."""
        call = getattr(self.stub, CALLS[name])
        if name == "put":
            ready = iter([self.request(name) for _ in range(num_puts)])
            return lambda: call(next(ready))
        return lambda: call(self.request(name))

    async def question_by_hand(self, name: str, num_puts: int) -> Question:
        """Give the same question in SQL; of the two ways to search, the one that is faster on this database."""
        fetch = self.hand.fetch
        if name == "put":
            made = await sql.rows_by_hand(self.hand, self.sample_id)
            ready = iter([made(self.shelf, next(self.fresh), "grown-by-hand") for _ in range(num_puts)])
            return lambda: self.hand.put(next(ready))
        if name == "get":
            return self._get_by_hand
        if name in SEARCHES:
            return await self._search_by_hand(name)
        walk = sql.lineage(ancestors=name == "ancestors")
        return lambda: fetch(walk, self._drawn_id())

    async def _search_by_hand(self, name: str) -> Question:
        all_tags, no_tags = SEARCHES[name]
        ways = {
            sql.search_by_tag(all_tags, no_tags, dialect=self.hand.dialect): 0.0,
            sql.search_by_name(all_tags, no_tags): 0.0,
        }
        for way in ways:
            took_s: list[float] = []
            for _ in range(_TRIES):
                begun = time.perf_counter()
                await self.hand.fetch(way, *all_tags, *no_tags)
                took_s.append(time.perf_counter() - begun)
            ways[way] = statistics.median(took_s)
        fastest = min(ways, key=ways.__getitem__)
        return lambda: self.hand.fetch(fastest, *all_tags, *no_tags)

    async def _get_by_hand(self) -> Any:
        wanted = self._drawn_id()
        return [await self.hand.fetch(statement, wanted) for statement in sql.GET]

    def _drawn_id(self) -> str:
        """Give the middle version of some name: as many ancestors as descendants, the same for all."""
        name = self.drawn.randrange(self.shelf.size // VERSIONS_PER_NAME)
        return blueprint_id(name * VERSIONS_PER_NAME + VERSIONS_PER_NAME // 2)


def create_request(shelf: Shelf, number: int, name: str = "") -> pb.CreateBlueprintRequest:
    """Give what stores a blueprint of a shelf; under its own name, or as the next version of another."""
    draft = shelf.draft(number)
    return pb.CreateBlueprintRequest(
        name=name or draft.name,
        ir=to_message(draft.ir, blueprint_pb2.BlueprintIR),
        metadata=to_message(draft.metadata, blueprint_pb2.BlueprintMetadata),
        lineage=to_message(draft.lineage, blueprint_pb2.Lineage),
        state=blueprint_pb2.BlueprintState.ValueType(draft.state),
    )
