"""What a query is in SQL, as scripts for `Database.read`.

Every condition is a probe of an index by a blueprint's id, so that a page is read in the order of the listing and ends
with its last row. Where few blueprints meet a condition, that would walk the whole library to fill a page. So the rows
that may meet each indexed condition are counted first, up to a bound; if there are few, the query begins from them, and
tags are looked at before a blueprint's own row is. SQLite's planner, which has no statistics of ours, could not know;
PostgreSQL's may do as it likes with either. Counts are remembered for some seconds: they say where a query begins,
never what it finds.

Every text is put together from constants of this module and whole numbers; what a caller gives is a parameter.
"""

# ruff: noqa: S608
from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from esper.contracts.blueprint import BlueprintBounds
from esper.contracts.tag_expression import AllOf, Not, Tag, TagExpression, covers
from esper.mesh.driver_reads import ReadScript, Statement
from esper.services.urza.blueprint_records import FIELDS, LISTED, SOURCE, BlueprintRecord
from esper.services.urza.rules import BlueprintQuery

FEW: Final = 10_000
"""Most rows from which a query begins, rather than from the listing's order."""

_WALKED: Final = "b.id"
"""Id of the blueprint at hand where a query walks the names."""
_MAX_STARTS: Final = 8
"""Most conditions that are counted."""
_PLACE: Final = re.compile(r"\$(\d+)")
_TOTAL: Final = "SELECT total FROM urza_totals WHERE name = 'blueprints'"


class Parameters:
    """Values of one statement, each under the next number."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: Any) -> str:
        """Take a value; give what stands for it in the text."""
        self.values.append(value)
        return f"${len(self.values)}"

    def put_all(self, values: Sequence[Any]) -> str:
        """Take values; give what stands for all of them in a list."""
        return ", ".join(map(self.put, values))

    def statement(self, text: str) -> Statement:
        """Give the statement that these are the values of."""
        return Statement(text, tuple(self.values))


_Sql = Callable[[Parameters], str]
"""Puts its values among a statement's and gives its text."""


class RecentCounts:
    """How many rows met a condition a moment ago; wrong figures cost time, never an answer. Safe in any thread."""

    def __init__(self, *, keep_s: float = 10.0, max_entries: int = 4_096) -> None:
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._known: dict[Statement, tuple[float, int]] = {}

    def get(self, condition: Statement) -> int | None:
        """Give the count of a condition if it is recent."""
        until, count = self._known.get(condition, (0.0, 0))
        return count if time.monotonic() < until else None

    def put(self, condition: Statement, count: int) -> None:
        """Remember a count."""
        self._known.pop(condition, None)
        self._known[condition] = (time.monotonic() + self._keep_s, count)
        while len(self._known) > self._max_entries:
            self._known.pop(next(iter(self._known)), None)


def search(
    query: BlueprintQuery, after: tuple[str, int] | None, limit: int, counts: RecentCounts | None = None
) -> ReadScript[list[BlueprintRecord]]:
    """Give the first ``limit`` blueprints after a name and version that meet every condition, in that order."""
    rows = yield (yield from page(query, after, limit, counts))
    return [BlueprintRecord(*row) for row in rows]


def page(
    query: BlueprintQuery, after: tuple[str, int] | None, limit: int, counts: RecentCounts | None = None
) -> ReadScript[Statement]:
    """Give the statement by which `search` reads its page, once it is known where to begin."""
    start = yield from _start(query, limit, counts or RecentCounts())
    sql = Parameters()
    if start is None:
        conditions = list(_tag_conditions(query, sql, _WALKED))
    else:
        among = " AND ".join((start(sql), *_tag_conditions(query, sql, "f.blueprint_id")))
        conditions = [f"b.id IN ({among})"]
    conditions += _conditions(query, sql)
    if after is not None:
        conditions.append(f"(b.name, b.version) > ({sql.put_all(after)})")
    where = " AND ".join([*conditions, LISTED])
    return sql.statement(f"SELECT {FIELDS} FROM {SOURCE} WHERE {where} ORDER BY b.name, b.version LIMIT {limit:d}")


def _tag_conditions(query: BlueprintQuery, sql: Parameters, key: str) -> Iterator[str]:
    """Give the conditions on the tags of the blueprint whose id is in a column."""
    for tag in query.all_tags:
        yield _tagged((tag,), sql, key)
    if query.any_tags:
        yield _tagged(query.any_tags, sql, key)
    if query.no_tags:
        yield f"NOT {_tagged(query.no_tags, sql, key)}"
    if query.tags is not None:
        yield _holds(query.tags, sql, key)


def _conditions(query: BlueprintQuery, sql: Parameters) -> Iterator[str]:
    """Give the conditions that are not on tags."""
    if query.states:
        yield f"b.state IN ({sql.put_all([int(state) for state in query.states])})"
    if query.text:
        yield f"b.searchable LIKE {sql.put(_containing(query.text.casefold()))} ESCAPE '/'"
    if query.site_kind is not None:
        yield f"(b.site_kinds = 0 OR (b.site_kinds & {sql.put(1 << query.site_kind)}) <> 0)"
    yield from _cost_conditions(query, sql)
    yield from _reported(query.bounds, sql)


def _cost_conditions(query: BlueprintQuery, sql: Parameters) -> Iterator[str]:
    bounds = query.bounds
    costs = [
        *_within("parameters", bounds.min_parameters, bounds.max_parameters, sql),
        *_within("flops", bounds.min_flops, bounds.max_flops, sql),
    ]
    if not costs:
        return
    if query.site_kind is not None:
        costs.append(f"site_kind = {sql.put(int(query.site_kind))}")
    yield f"EXISTS (SELECT 1 FROM urza_blueprint_costs WHERE blueprint_id = b.id AND {' AND '.join(costs)})"


def _tagged(tags: Sequence[str], sql: Parameters, key: str) -> str:
    # Along the names PostgreSQL would rather join all tags and sort; what has a limit it has to probe row by row.
    probe = " LIMIT 1 OFFSET 0" if key == _WALKED else ""
    among = f"blueprint_id = {key} AND tag IN ({sql.put_all(tags)})"
    return f"EXISTS (SELECT 1 FROM urza_blueprint_tags WHERE {among}{probe})"


def _holds(expression: TagExpression, sql: Parameters, key: str) -> str:
    if isinstance(expression, Tag):
        return _tagged((expression.name,), sql, key)
    if isinstance(expression, Not):
        return f"NOT {_holds(expression.operand, sql, key)}"
    joined = " AND " if isinstance(expression, AllOf) else " OR "
    return f"({joined.join(_holds(operand, sql, key) for operand in expression.operands)})"


def _containing(text: str) -> str:
    """Give the pattern of what contains a text."""
    escaped = text.replace("/", "//").replace("%", "/%").replace("_", "/_")
    return f"%{escaped}%"


def _reported(bounds: BlueprintBounds, sql: Parameters) -> Iterator[str]:
    """Give the conditions on the statistics; one that is joined to nothing meets none of them."""
    latency = "s.latency_ms_sum / NULLIF(s.latency_count, 0)"
    yield from _within(latency, bounds.min_latency_ms, bounds.max_latency_ms, sql)
    success = "CAST(s.kept AS DOUBLE PRECISION) / NULLIF(s.trials, 0)"
    yield from _within(success, bounds.min_success_rate, bounds.max_success_rate, sql)


def _within(figure: str, low: float | None, high: float | None, sql: Parameters) -> Iterator[str]:
    if low is not None:
        yield f"{figure} >= {sql.put(low)}"
    if high is not None:
        yield f"{figure} <= {sql.put(high)}"


def _start(query: BlueprintQuery, limit: int, known: RecentCounts) -> ReadScript[_Sql | None]:
    """Give the ids of the condition that the fewest blueprints meet, if they are few; else ``None``."""
    starts = list(islice(_starts(query), _MAX_STARTS))
    if not starts:
        return None
    *counts, total = yield from _counted([_few(start) for start in starts] + [Statement(_TOTAL)], known)
    count, place = min((count, place) for place, count in enumerate(counts))
    if count > FEW:
        return None
    # Where nothing else has to hold, the listing's order comes to a full page after so many rows.
    alone = len([*_tag_conditions(query, Parameters(), ""), *_conditions(query, Parameters())]) == 1
    return None if alone and count > limit and limit * total < count * count else starts[place]


def _counted(wanted: Sequence[Statement], known: RecentCounts) -> ReadScript[list[int]]:
    """Give one whole number for each statement, all that are not known by one of their own."""
    found = {one: known.get(one) for one in wanted}
    unknown = [one for one, count in found.items() if count is None]
    if unknown:
        sql = Parameters()
        texts = (f"({_renumbered(one, sql)})" for one in unknown)
        [row] = yield sql.statement(f"SELECT {', '.join(texts)}")
        for one, count in zip(unknown, row, strict=True):
            known.put(one, count)
            found[one] = count
    return [found[one] or 0 for one in wanted]


def _renumbered(statement: Statement, sql: Parameters) -> str:
    """Give a statement's text as a part of one that has other values before it."""
    parts = _PLACE.split(statement.text)
    values = (sql.put(statement.parameters[int(number) - 1]) for number in parts[1::2])
    return parts[0] + "".join(value + text for value, text in zip(values, parts[2::2], strict=True))


def _few(start: _Sql) -> Statement:
    sql = Parameters()
    return sql.statement(f"SELECT count(*) FROM ({start(sql)} LIMIT {FEW + 1}) few")


def _starts(query: BlueprintQuery) -> Iterator[_Sql]:
    """Give queries of ids, each by one index, one of which every blueprint that is looked for is among.

    Each ends in a condition, so that more may follow; ids are in ``f.blueprint_id``.
    """
    for tags in _covers(query):
        yield partial(_in_tags, sorted(tags))
    bounds = query.bounds
    if bounds.min_parameters is not None or bounds.max_parameters is not None:
        yield partial(_in_costs, "f.parameters", bounds.min_parameters, bounds.max_parameters)
    if bounds.min_flops is not None or bounds.max_flops is not None:
        yield partial(_in_costs, "f.flops", bounds.min_flops, bounds.max_flops)
    if list(_reported(bounds, Parameters())):
        yield lambda _sql: "SELECT f.blueprint_id FROM urza_statistics f WHERE f.trials >= 0"


def _in_tags(tags: Sequence[str], sql: Parameters) -> str:
    return f"SELECT f.blueprint_id FROM urza_blueprint_tags f WHERE f.tag IN ({sql.put_all(tags)})"


def _in_costs(figure: str, low: float | None, high: float | None, sql: Parameters) -> str:
    return f"SELECT f.blueprint_id FROM urza_blueprint_costs f WHERE {' AND '.join(_within(figure, low, high, sql))}"


def _covers(query: BlueprintQuery) -> Iterator[frozenset[str]]:
    for tag in query.all_tags:
        yield frozenset({tag})
    if query.any_tags:
        yield frozenset(query.any_tags)
    if query.tags is not None:
        yield from covers(query.tags)
