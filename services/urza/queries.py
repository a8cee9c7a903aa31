"""What a query is in SQL.

Every condition is a probe of an index by a blueprint's id, so that a page is read in the order of the listing and ends
with its last row. Where few blueprints meet a condition, that would walk the whole library to fill a page. So the rows
that may meet each indexed condition are counted first, up to a bound; if there are few, the query begins from them.
SQLite's planner, which has no statistics of ours, could not know; PostgreSQL's may do as it likes with either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from sqlalchemy import ColumnElement, Double, Select, and_, cast, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.blueprint import BlueprintBounds, SiteKind
from esper.services.urza.models import BlueprintRow, CostRow, StatisticsRow, TagRow
from esper.services.urza.rules import BlueprintQuery
from esper.services.urza.tag_expression import AllOf, Not, Tag, TagExpression, covers

FEW: Final = 10_000
"""Most rows from which a query begins, rather than from the listing's order."""

_MAX_STARTS: Final = 8
"""Most conditions that are counted."""


def with_statistics() -> Select[*tuple[Any, ...]]:
    """Give the query of every blueprint with its statistics, if any."""
    joined = select(BlueprintRow, StatisticsRow)
    return joined.outerjoin(StatisticsRow, StatisticsRow.blueprint_id == BlueprintRow.id)


async def matching(session: AsyncSession, query: BlueprintQuery) -> Select[*tuple[Any, ...]]:
    """Give the query of the blueprints that meet every condition, in no order, each with its statistics."""
    statement = with_statistics().where(*_conditions(query))
    start = await _start(session, query)
    return statement if start is None else statement.where(BlueprintRow.id.in_(start))


def _conditions(query: BlueprintQuery) -> Iterator[ColumnElement[bool]]:
    for tag in query.all_tags:
        yield _tagged((tag,))
    if query.any_tags:
        yield _tagged(query.any_tags)
    if query.no_tags:
        yield ~_tagged(query.no_tags)
    if query.tags is not None:
        yield _holds(query.tags)
    if query.states:
        yield BlueprintRow.state.in_([int(state) for state in query.states])
    if query.text:
        yield BlueprintRow.searchable.contains(query.text.casefold(), autoescape=True)
    if query.site_kind is not None:
        meant = BlueprintRow.site_kinds.bitwise_and(1 << query.site_kind) != 0
        yield or_(BlueprintRow.site_kinds == 0, meant)
    costs = _costs(query.bounds)
    if costs:
        yield exists().where(CostRow.blueprint_id == BlueprintRow.id, *_at(query.site_kind), *costs)
    yield from _reported(query.bounds)


def _tagged(tags: tuple[str, ...]) -> ColumnElement[bool]:
    return exists().where(TagRow.blueprint_id == BlueprintRow.id, TagRow.tag.in_(tags))


def _holds(expression: TagExpression) -> ColumnElement[bool]:
    if isinstance(expression, Tag):
        return _tagged((expression.name,))
    if isinstance(expression, Not):
        return ~_holds(expression.operand)
    operands = [_holds(operand) for operand in expression.operands]
    return and_(*operands) if isinstance(expression, AllOf) else or_(*operands)


def _costs(bounds: BlueprintBounds) -> list[ColumnElement[bool]]:
    return [
        *_within(CostRow.parameters, bounds.min_parameters, bounds.max_parameters),
        *_within(CostRow.flops, bounds.min_flops, bounds.max_flops),
    ]


def _at(kind: SiteKind | None) -> list[ColumnElement[bool]]:
    return [] if kind is None else [CostRow.site_kind == int(kind)]


def _reported(bounds: BlueprintBounds) -> Iterator[ColumnElement[bool]]:
    """Give the conditions on the statistics; one that is joined to nothing meets none of them."""
    latency = StatisticsRow.latency_ms_sum / func.nullif(StatisticsRow.latency_count, 0)
    yield from _within(latency, bounds.min_latency_ms, bounds.max_latency_ms)
    success = cast(StatisticsRow.kept, Double) / func.nullif(StatisticsRow.trials, 0)
    yield from _within(success, bounds.min_success_rate, bounds.max_success_rate)


def _within(figure: Any, low: float | None, high: float | None) -> Iterator[ColumnElement[bool]]:
    if low is not None:
        yield figure >= low
    if high is not None:
        yield figure <= high


async def _start(session: AsyncSession, query: BlueprintQuery) -> Select[str] | None:
    """Give the ids of the condition that the fewest blueprints meet, if they are few; else ``None``."""
    starts = list(islice(_starts(query), _MAX_STARTS))
    if not starts:
        return None
    counts = [select(func.count()).select_from(start.limit(FEW + 1).subquery()).scalar_subquery() for start in starts]
    row = (await session.execute(select(*counts))).one()
    count, place = min((count, place) for place, count in enumerate(row))
    return starts[place] if count <= FEW else None


def _starts(query: BlueprintQuery) -> Iterator[Select[str]]:
    """Give queries of ids, each by one index, one of which every blueprint that is looked for is among."""
    for tags in _covers(query):
        yield select(TagRow.blueprint_id).where(TagRow.tag.in_(sorted(tags)))
    bounds = query.bounds
    for figure, low, high in (
        (CostRow.parameters, bounds.min_parameters, bounds.max_parameters),
        (CostRow.flops, bounds.min_flops, bounds.max_flops),
    ):
        within = list(_within(figure, low, high))
        if within:
            yield select(CostRow.blueprint_id).where(*within)
    if list(_reported(bounds)):
        yield select(StatisticsRow.blueprint_id)


def _covers(query: BlueprintQuery) -> Iterator[frozenset[str]]:
    for tag in query.all_tags:
        yield frozenset({tag})
    if query.any_tags:
        yield frozenset(query.any_tags)
    if query.tags is not None:
        yield from covers(query.tags)
