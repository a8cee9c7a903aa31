"""Blueprints at rest: versions, tags, genealogy and life cycle, in one transaction each."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Select, func, literal, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from esper.blueprints.ir import canonical_bytes
from esper.contracts import wire
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintCost,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    BlueprintStateChange,
    BlueprintStatistics,
    Lineage,
    SiteKind,
)
from esper.contracts.errors import (
    AlreadyExistsError,
    CapacityExceededError,
    InvalidInputError,
    InvalidTransitionError,
    NotFoundError,
)
from esper.mesh.database import Database
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.services.urza.clock import moment_of, now_us
from esper.services.urza.models import (
    BLUEPRINTS,
    BlueprintNameRow,
    BlueprintRow,
    CostRow,
    LineageRow,
    StateChangeRow,
    StatisticsRow,
    TagRow,
    TotalRow,
)
from esper.services.urza.queries import matching, with_statistics
from esper.services.urza.reference_costs import reference_costs
from esper.services.urza.rules import (
    CONTENT_ID,
    MAX_ACTOR_CHARS,
    MAX_LINEAGE_DEPTH,
    MAX_REASON_CHARS,
    NEXT_STATE,
    BlueprintDraft,
    BlueprintQuery,
    Page,
    PageRequest,
    fitting,
    require_blueprint_name,
    require_content_id,
    require_text,
)

log = logging.getLogger(__name__)

MAX_RELATIVES: Final = 1_000
"""Most relatives that one lineage answer holds."""

_Found = tuple[BlueprintRow, StatisticsRow | None]


class LineageDirection(IntEnum):
    """Which way to walk the genealogy."""

    ANCESTORS = 1
    DESCENDANTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Relative:
    """One relative of a blueprint."""

    blueprint: Blueprint
    """The relative."""
    depth: int
    """Steps away by the shortest way, from 1."""


class BlueprintStore:
    """The blueprints of the library. Safe for many tasks of one event loop."""

    def __init__(self, database: Database, *, max_blueprints: int, token_key: bytes = b"") -> None:
        self._database = database
        self._max_blueprints = max_blueprints
        self._token_key = token_key

    async def create(self, draft: BlueprintDraft) -> tuple[Blueprint, bool]:
        """Store a new version, or give the one that is there; say which.

        The same graph under the same name is the same blueprint, whatever is said of it the second time.

        Raises:
            InvalidBlueprintError: The graph is not legal; the message names the node at fault.
            AlreadyExistsError: The same graph is stored under another name.
            NotFoundError: A parent is not in the library.
            CapacityExceededError: The library holds as many blueprints as it may.
        """
        ir_bytes = canonical_bytes(draft.ir)
        blueprint_id = hashlib.sha256(ir_bytes).hexdigest()
        async with self._database.reading() as session:
            known = await _find(session, BlueprintRow.id == blueprint_id)
        if known is not None:
            return _same_name(_blueprint(known), draft.name), False
        # Laying the graph out at every reference site takes milliseconds that would hold up every other call.
        costs = await asyncio.to_thread(reference_costs, draft.ir, draft.metadata)
        try:
            return await self._insert(draft, blueprint_id, ir_bytes, costs)
        except IntegrityError:
            # Another writer stored the same graph under another name in between: now it is there to be found.
            async with self._database.reading() as session:
                known = await _find(session, BlueprintRow.id == blueprint_id)
            if known is None:
                raise
            return _same_name(_blueprint(known), draft.name), False

    async def get(self, reference: str) -> Blueprint:
        """Give a blueprint by content id, ``name@version``, or ``name`` for its newest version.

        Raises:
            InvalidInputError: The reference is none of the three.
            NotFoundError: There is no such blueprint.
        """
        condition = _condition_of(reference)
        async with self._database.reading() as session:
            found = await _find(session, condition)
        if found is None:
            raise NotFoundError(f"reference must name a stored blueprint, got {reference!r}", parameter="reference")
        return _blueprint(found)

    async def history(self, blueprint_id: str) -> tuple[BlueprintStateChange, ...]:
        """Give the life cycle of a blueprint so far, oldest first; empty for one that is not stored."""
        require_content_id("blueprint_id", blueprint_id)
        steps = select(StateChangeRow).where(StateChangeRow.blueprint_id == blueprint_id)
        async with self._database.reading() as session:
            rows = (await session.scalars(steps.order_by(StateChangeRow.sequence))).all()
        return tuple(_change(row) for row in rows)

    async def search(self, query: BlueprintQuery, page: PageRequest) -> Page[Blueprint]:
        """Give one page of the blueprints that match, ordered by name and version.

        Raises:
            InvalidInputError: The page token is not one that the same query gave.
        """
        after = decode_page_token(page.token, scope=query.scope, arity=2, key=self._token_key)
        async with self._database.reading() as session:
            statement = await matching(session, query)
            if after is not None:
                place = tuple_(literal(str(after[0])), literal(int(after[1] or 0)))
                statement = statement.where(tuple_(BlueprintRow.name, BlueprintRow.version) > place)
            ordered = statement.order_by(BlueprintRow.name, BlueprintRow.version).limit(page.limit + 1)
            found = [tuple(row) for row in (await session.execute(ordered)).all()]
        shown = found[: fitting([len(row[0].ir) for row in found[: page.limit]])]
        items = tuple(_blueprint(row) for row in shown)
        more = len(found) > len(items)
        key = (items[-1].name, items[-1].version) if more else ()
        token = encode_page_token(key, scope=query.scope, key=self._token_key) if more else ""
        return Page(items=items, next_token=token)

    async def lineage(
        self, blueprint_id: str, direction: LineageDirection, *, max_depth: int = 0
    ) -> tuple[Relative, ...]:
        """Give the relatives within ``max_depth`` steps (0 means 100), by depth, then name, then version.

        Raises:
            InvalidInputError: The id is none, or the depth is out of range.
            NotFoundError: The blueprint is not stored.
            CapacityExceededError: There are more than 1,000 relatives, or more than one message holds.
        """
        require_content_id("blueprint_id", blueprint_id)
        if not 0 <= max_depth <= MAX_LINEAGE_DEPTH:
            rule = f"be 1 to {MAX_LINEAGE_DEPTH} steps, or 0 for {MAX_LINEAGE_DEPTH}"
            raise InvalidInputError.of("max_depth", rule, max_depth)
        statement = _relatives(blueprint_id, direction, max_depth or MAX_LINEAGE_DEPTH)
        async with self._database.reading() as session:
            await _require(session, blueprint_id)
            rows = (await session.execute(statement)).all()
        if len(rows) > MAX_RELATIVES or fitting([len(row.ir) for row, _, _ in rows]) < len(rows):
            raise CapacityExceededError(
                f"lineage must hold at most {MAX_RELATIVES} relatives and fit one message, got more; "
                "ask with a smaller max_depth",
                parameter="max_depth",
            )
        return tuple(Relative(blueprint=_blueprint((row, stats)), depth=depth) for row, stats, depth in rows)

    async def set_state(self, blueprint_id: str, state: BlueprintState, *, actor: str, reason: str) -> Blueprint:
        """Take the next step of the life cycle; asking for the state that holds already changes nothing.

        Raises:
            InvalidInputError: The id, actor or reason breaks its rule.
            NotFoundError: The blueprint is not stored.
            InvalidTransitionError: The life cycle does not lead there from where it stands.
        """
        require_content_id("blueprint_id", blueprint_id)
        require_text("actor", actor, max_chars=MAX_ACTOR_CHARS)
        require_text("reason", reason, max_chars=MAX_REASON_CHARS)
        async with self._database.session() as session:
            row, statistics = await _require(session, blueprint_id, lock=True)
            before = BlueprintState(row.state)
            if state is not before:
                _check_step(before, state)
                row.state = int(state)
                await _add_change(session, blueprint_id, before, state, actor=actor, reason=reason)
                await session.flush()
        if state is not before:
            log.info("blueprint_state", extra={"blueprint_id": blueprint_id, "state": state.name, "actor": actor})
        return _blueprint((row, statistics))

    async def _insert(
        self, draft: BlueprintDraft, blueprint_id: str, ir_bytes: bytes, costs: Mapping[SiteKind, BlueprintCost]
    ) -> tuple[Blueprint, bool]:
        async with self._database.session() as session:
            name_row = await self._lock_name(session, draft.name)
            known = await _find(session, BlueprintRow.id == blueprint_id)
            if known is not None:
                return _same_name(_blueprint(known), draft.name), False
            await _check_parents(session, draft.lineage.parent_ids)
            version = name_row.newest_version + 1
            await session.execute(
                update(BlueprintNameRow).where(BlueprintNameRow.name == draft.name).values(newest_version=version)
            )
            row = _row(draft, blueprint_id, ir_bytes, version)
            session.add(row)
            await session.flush()
            session.add_all(TagRow(blueprint_id=blueprint_id, tag=tag) for tag in draft.metadata.tags)
            session.add_all(LineageRow(child_id=blueprint_id, parent_id=parent) for parent in draft.lineage.parent_ids)
            session.add_all(_cost_row(blueprint_id, kind, cost) for kind, cost in costs.items())
            actor = draft.lineage.author or "unknown"
            await _add_change(session, blueprint_id, None, draft.state, actor=actor, reason="stored")
            await session.flush()
            found = await _find(session, BlueprintRow.id == blueprint_id)
            assert found is not None
            await self._take_room(session)
        log.info("blueprint_stored", extra={"blueprint_id": blueprint_id, "blueprint": f"{draft.name}@{version}"})
        return _blueprint(found), True

    async def _lock_name(self, session: AsyncSession, name: str) -> BlueprintNameRow:
        """Give the name's row, made if need be, with no other writer between it and our commit."""
        fresh = self._database.insert(BlueprintNameRow).values(name=name, newest_version=0)
        await session.execute(fresh.on_conflict_do_nothing())
        locked = select(BlueprintNameRow).where(BlueprintNameRow.name == name).with_for_update()
        return (await session.scalars(locked)).one()

    async def _take_room(self, session: AsyncSession) -> None:
        """Count one blueprint more; the last thing a writer does, since all of them wait for this row in line."""
        counted = update(TotalRow).where(TotalRow.name == BLUEPRINTS, TotalRow.total < self._max_blueprints)
        taken = await session.execute(counted.values(total=TotalRow.total + 1).returning(TotalRow.total))
        if taken.first() is None:
            raise CapacityExceededError(
                f"the library must hold at most {self._max_blueprints} blueprints, got one more",
                parameter="max_blueprints",
            )


@lru_cache(maxsize=2_048)
def _ir_of(data: bytes) -> BlueprintIR:
    """Give the graph of stored bytes; the values are frozen, so sharing them is safe."""
    return wire.parse(data, BlueprintIR)


def _blueprint(found: _Found | tuple[Any, ...]) -> Blueprint:
    row, statistics = found
    return Blueprint(
        id=row.id,
        name=row.name,
        version=row.version,
        ir=_ir_of(row.ir),
        metadata=wire.parse(row.blueprint_metadata, BlueprintMetadata),
        lineage=wire.parse(row.lineage, Lineage),
        state=BlueprintState(row.state),
        created_at=moment_of(row.created_at_us),
        statistics=None if statistics is None else statistics_of(statistics),
    )


def statistics_of(row: StatisticsRow) -> BlueprintStatistics:
    """Give the statistics that a row stands for."""
    return BlueprintStatistics(
        trials=row.trials,
        kept=row.kept,
        mean_contribution=mean(row.contribution_sum, row.contribution_count),
        mean_latency_ms=mean(row.latency_ms_sum, row.latency_count),
    )


def mean(total: float, count: int) -> float | None:
    """Give the mean of ``count`` figures that add up to ``total``; ``None`` of none."""
    return total / count if count else None


def _row(draft: BlueprintDraft, blueprint_id: str, ir_bytes: bytes, version: int) -> BlueprintRow:
    return BlueprintRow(
        id=blueprint_id,
        name=draft.name,
        version=version,
        state=int(draft.state),
        ir=ir_bytes,
        blueprint_metadata=wire.serialize(draft.metadata),
        lineage=wire.serialize(draft.lineage),
        searchable=f"{draft.name}\n{draft.metadata.description}".casefold(),
        site_kinds=_mask(draft.metadata.site_kinds),
        created_at_us=now_us(),
    )


def _cost_row(blueprint_id: str, kind: SiteKind, cost: BlueprintCost) -> CostRow:
    return CostRow(blueprint_id=blueprint_id, site_kind=int(kind), parameters=cost.parameters, flops=cost.flops)


def _change(row: StateChangeRow) -> BlueprintStateChange:
    return BlueprintStateChange(
        from_state=None if row.from_state is None else BlueprintState(row.from_state),
        to_state=BlueprintState(row.to_state),
        actor=row.actor,
        reason=row.reason,
        changed_at=moment_of(row.changed_at_us),
    )


def _mask(kinds: tuple[SiteKind, ...]) -> int:
    return sum(1 << kind for kind in kinds)


def _condition_of(reference: str) -> Any:
    if CONTENT_ID.fullmatch(reference):
        return BlueprintRow.id == reference
    name, at, version = reference.partition("@")
    require_blueprint_name("reference", name)
    if not at:
        newest = select(func.max(BlueprintRow.version)).where(BlueprintRow.name == name).scalar_subquery()
        return (BlueprintRow.name == name) & (BlueprintRow.version == newest)
    if not version.isascii() or not version.isdigit() or not 1 <= int(version[:10]) <= 2**31 - 1 or len(version) > 10:
        raise InvalidInputError.of("reference", "be a content id, name or name@version with a version >= 1", reference)
    return (BlueprintRow.name == name) & (BlueprintRow.version == int(version))


async def _find(session: AsyncSession, condition: Any, *, lock: bool = False) -> _Found | None:
    statement = with_statistics().where(condition)
    if lock:
        statement = statement.with_for_update(of=BlueprintRow)
    row = (await session.execute(statement)).one_or_none()
    return None if row is None else (row[0], row[1])


async def _require(session: AsyncSession, blueprint_id: str, *, lock: bool = False) -> _Found:
    found = await _find(session, BlueprintRow.id == blueprint_id, lock=lock)
    if found is None:
        raise NotFoundError(
            f"blueprint_id must name a stored blueprint, got {blueprint_id!r}", parameter="blueprint_id"
        )
    return found


def _same_name(blueprint: Blueprint, name: str) -> Blueprint:
    if blueprint.name != name:
        raise AlreadyExistsError(
            f"ir must be a graph that no other name holds, got the one of {blueprint.name}@{blueprint.version} "
            f"for {name!r}",
            parameter="ir",
        )
    return blueprint


async def _check_parents(session: AsyncSession, parent_ids: tuple[str, ...]) -> None:
    stored = set((await session.scalars(select(BlueprintRow.id).where(BlueprintRow.id.in_(parent_ids)))).all())
    missing = [parent for parent in parent_ids if parent not in stored]
    if missing:
        raise NotFoundError(
            f"lineage.parent_ids must name stored blueprints, got {missing[0]!r}", parameter="lineage.parent_ids"
        )


def _check_step(before: BlueprintState, after: BlueprintState) -> None:
    allowed = NEXT_STATE.get(before)
    if after is not allowed:
        then = "nothing" if allowed is None else allowed.name
        raise InvalidTransitionError(
            f"state must follow the life cycle ({before.name} leads to {then}), got {after.name}", parameter="state"
        )


async def _add_change(
    session: AsyncSession,
    blueprint_id: str,
    before: BlueprintState | None,
    after: BlueprintState,
    *,
    actor: str,
    reason: str,
) -> None:
    taken = select(func.count()).select_from(StateChangeRow).where(StateChangeRow.blueprint_id == blueprint_id)
    sequence = 1 + (await session.scalar(taken) or 0)
    session.add(
        StateChangeRow(
            blueprint_id=blueprint_id,
            sequence=sequence,
            from_state=None if before is None else int(before),
            to_state=int(after),
            actor=actor,
            reason=reason,
            changed_at_us=now_us(),
        )
    )


def _relatives(blueprint_id: str, direction: LineageDirection, max_depth: int) -> Select[*tuple[Any, ...]]:
    """Give the query that walks the edges; UNION keeps one row per relative and depth, however many ways lead there."""
    from_column, to_column = LineageRow.child_id, LineageRow.parent_id
    if direction is LineageDirection.DESCENDANTS:
        from_column, to_column = to_column, from_column
    walk = (
        select(to_column.label("id"), literal(1).label("depth"))
        .where(from_column == blueprint_id)
        .cte("walk", recursive=True)
    )
    step = select(to_column, walk.c.depth + 1).where(from_column == walk.c.id, walk.c.depth < max_depth)
    walk = walk.union(step)
    nearest = select(walk.c.id, func.min(walk.c.depth).label("depth")).group_by(walk.c.id).subquery()
    return (
        with_statistics()
        .add_columns(nearest.c.depth)
        .join(nearest, nearest.c.id == BlueprintRow.id)
        .order_by(nearest.c.depth, BlueprintRow.name, BlueprintRow.version)
        .limit(MAX_RELATIVES + 1)
    )
