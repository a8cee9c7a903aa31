"""Blueprints at rest: versions, tags, genealogy and life cycle, in one transaction each.

Texts of statements are put together from constants and whole numbers; what a caller gives is a parameter.
"""

# ruff: noqa: S608
from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintCost,
    BlueprintState,
    BlueprintStateChange,
    SiteKind,
)
from esper.contracts.errors import (
    AlreadyExistsError,
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    InvalidTransitionError,
    NotFoundError,
)
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement
from esper.mesh.page_token import decode_page_token, encode_page_token
from esper.services.urza import queries
from esper.services.urza.blueprint_records import (
    FIELDS,
    LISTED,
    SOURCE,
    BlueprintRecord,
    blueprint_of,
    rot_of,
)
from esper.services.urza.blueprint_rot import restore, set_aside
from esper.services.urza.blueprint_rows import blueprint_row, find_record, finding_rows
from esper.services.urza.clock import moment_of, now_us
from esper.services.urza.genealogy import LineageDirection, Relative, RelativeRecord, scope_of, walk
from esper.services.urza.models import (
    BLUEPRINTS,
    BlueprintNameRow,
    BlueprintRow,
    LineageRow,
    StateChangeRow,
    TotalRow,
)
from esper.services.urza.reference_costs import reference_costs
from esper.services.urza.rules import (
    CONTENT_ID,
    MAX_ACTOR_CHARS,
    MAX_LINEAGE_DEPTH,
    MAX_REASON_CHARS,
    NEXT_STATES,
    BlueprintDraft,
    BlueprintQuery,
    Page,
    PageRequest,
    fitting,
    require_blueprint_name,
    require_content_id,
    require_text,
)
from esper.services.urza.template_releases import TemplateReleases

log = logging.getLogger(__name__)

MAX_RELATIVES: Final = 1_000
"""Most relatives that one answer holds where no page was asked for."""


class BlueprintStore:
    """The blueprints of the library. Safe for many tasks of one event loop."""

    def __init__(self, database: Database, *, max_blueprints: int, token_key: bytes = b"") -> None:
        self._database = database
        self._max_blueprints = max_blueprints
        self._token_key = token_key
        self._counts = queries.RecentCounts()
        self._watch: Callable[[str, BlueprintState], Awaitable[None]] | None = None
        self.templates = TemplateReleases(database)
        """Releases whose templates are in the library, in their order."""

    async def create(self, draft: BlueprintDraft) -> tuple[Blueprint, bool]:
        """Store a new version, or give the one that is there; say which.

        The same graph under the same name is the same blueprint, whatever is said of it the second time. If its row
        has rotted, the draft puts right what cannot be read; one that was set aside is listed again.

        Raises:
            InvalidBlueprintError: The graph is not legal; the message names the node at fault.
            AlreadyExistsError: The same graph is stored under another name.
            NotFoundError: A parent is not in the library.
            CapacityExceededError: The library holds as many blueprints as it may.
        """
        ir_bytes = canonical_bytes(draft.ir)
        blueprint_id = hashlib.sha256(ir_bytes).hexdigest()
        known, is_listed = await self._database.read(_known(blueprint_id))
        if known is not None and (known.name != draft.name or (is_listed and rot_of(known) is None)):
            return _same_name(known, draft.name), False
        # Laying the graph out at every reference site takes milliseconds that would hold up every other call.
        costs = await asyncio.to_thread(reference_costs, draft.ir, draft.metadata)
        if known is not None:
            return await self._restore(draft, blueprint_id, ir_bytes, costs), False
        try:
            return await self._insert(draft, blueprint_id, ir_bytes, costs)
        except IntegrityError:
            # Another writer stored the same graph under another name in between: now it is there to be found.
            known = await self._database.read(_by_id(blueprint_id))
            if known is None:
                raise
            return _same_name(known, draft.name), False

    async def get(self, reference: str) -> Blueprint:
        """Give a blueprint by content id, ``name@version``, or ``name`` for its newest version.

        Raises:
            InvalidInputError: The reference is none of the three.
            NotFoundError: There is no such blueprint.
            CorruptDataError: Its row has rotted; it was set aside.
        """
        record, _ = await self.get_record(reference)
        async with self.watching_rot((record,)):
            return blueprint_of(record)

    async def get_record(self, reference: str) -> tuple[BlueprintRecord, tuple[BlueprintStateChange, ...]]:
        """As `get`, at rest and with its life cycle so far, oldest first."""
        found = await self._database.read(_with_history(_condition_of(reference)))
        if found is None:
            raise NotFoundError(f"reference must name a stored blueprint, got {reference!r}", parameter="reference")
        return found

    async def version_records(self, name: str) -> tuple[BlueprintRecord, ...]:
        """Give every version under a name, at rest, oldest first; none where nothing is stored under it.

        Raises:
            InvalidInputError: No blueprint may have that name.
        """
        return await self._database.read(_versions(require_blueprint_name("name", name)))

    async def history(self, blueprint_id: str) -> tuple[BlueprintStateChange, ...]:
        """Give the life cycle of a blueprint so far, oldest first; empty for one that is not stored."""
        return await self._database.read(_history(require_content_id("blueprint_id", blueprint_id)))

    async def search(self, query: BlueprintQuery, page: PageRequest) -> Page[Blueprint]:
        """Give one page of the blueprints that match, ordered by name and version.

        Raises:
            InvalidInputError: The page token is not one that the same query gave.
            CorruptDataError: The row of one of them has rotted; it was set aside, and the page can be asked for again.
        """
        found = await self.search_records(query, page)
        async with self.watching_rot(found.items):
            return Page(items=tuple(map(blueprint_of, found.items)), next_token=found.next_token)

    async def search_records(self, query: BlueprintQuery, page: PageRequest) -> Page[BlueprintRecord]:
        """As `search`, at rest."""
        scope = query.scope if page.token else ""  # a first page is bound to nothing
        token = decode_page_token(page.token, scope=scope, arity=2, key=self._token_key)
        after = None if token is None else (str(token[0]), int(token[1] or 0))
        found = await self._database.read(queries.search(query, after, page.limit + 1, self._counts))
        shown = found[: fitting([len(record.ir) for record in found[: page.limit]])]
        next_token = ""
        if len(found) > len(shown):
            key = (shown[-1].name, shown[-1].version)
            next_token = encode_page_token(key, scope=query.scope, key=self._token_key)
        return Page(items=tuple(shown), next_token=next_token)

    async def lineage(
        self, blueprint_id: str, direction: LineageDirection, *, max_depth: int = 0, page: PageRequest | None = None
    ) -> Page[Relative]:
        """Give the relatives within ``max_depth`` steps (0 means 100), by depth, then name, then version.

        Without a page, all of them at once.

        Raises:
            InvalidInputError: The id is none, the depth is out of range, or the page token is not one that the same
                walk gave.
            NotFoundError: The blueprint is not stored.
            CapacityExceededError: No page was asked for, and there are more than 1,000 relatives, or more than one
                message holds.
            CorruptDataError: As for `search`.
        """
        found = await self.lineage_records(blueprint_id, direction, max_depth=max_depth, page=page)
        async with self.watching_rot([record for record, _ in found.items]):
            items = tuple(Relative(blueprint=blueprint_of(record), depth=depth) for record, depth in found.items)
            return Page(items=items, next_token=found.next_token)

    async def lineage_records(
        self, blueprint_id: str, direction: LineageDirection, *, max_depth: int = 0, page: PageRequest | None = None
    ) -> Page[RelativeRecord]:
        """As `lineage`, at rest."""
        require_content_id("blueprint_id", blueprint_id)
        if not 0 <= max_depth <= MAX_LINEAGE_DEPTH:
            rule = f"be 1 to {MAX_LINEAGE_DEPTH} steps, or 0 for {MAX_LINEAGE_DEPTH}"
            raise InvalidInputError.of("max_depth", rule, max_depth)
        depth = max_depth or MAX_LINEAGE_DEPTH
        scope = scope_of(blueprint_id, direction, depth)
        token = decode_page_token("" if page is None else page.token, scope=scope, arity=3, key=self._token_key)
        after = None if token is None else (int(token[0] or 0), str(token[1]), int(token[2] or 0))
        limit = MAX_RELATIVES if page is None else page.limit
        found = await self._database.read(_relatives(blueprint_id, direction, depth, after, limit + 1))
        shown = found[: fitting([len(one.record.ir) for one in found[:limit]])]
        if len(found) == len(shown):
            return Page(items=shown, next_token="")
        if page is None:
            raise CapacityExceededError(
                f"lineage must hold at most {MAX_RELATIVES} relatives and fit one message, got more; "
                "ask for it page by page, or with a smaller max_depth",
                parameter="page_size",
            )
        return Page(items=shown, next_token=encode_page_token(shown[-1].place, scope=scope, key=self._token_key))

    @asynccontextmanager
    async def watching_rot(self, records: Sequence[BlueprintRecord]) -> AsyncIterator[None]:
        """Set aside those of some records that turn out to have rotted while an answer is made of them."""
        try:
            yield
        except CorruptDataError:
            for record in records:
                if rot_of(record) is not None:
                    await self.set_aside(record.id)
            raise

    async def set_aside(self, blueprint_id: str) -> bool:
        """Keep a blueprint whose row has rotted out of every listing; say whether it was listed until now.

        What its row holds stays for people to look into, and whoever asks for it by name or id is told that it is
        damaged, until `create` is given its graph again. A sound one is left alone.

        Raises:
            NotFoundError: The blueprint is not stored.
        """
        async with self._database.session() as session:
            record = await _locked(session, blueprint_id)
            rot = rot_of(record)
            changed = rot is not None and await set_aside(session, record, rot)
        if changed:
            extra = {"blueprint_id": blueprint_id, "blueprint": f"{record.name}@{record.version}", "error": str(rot)}
            log.error("blueprint_set_aside", extra=extra)
        return changed

    def watch_state(self, watch: Callable[[str, BlueprintState], Awaitable[None]]) -> None:
        """Have somebody told of every change of state, by blueprint, once it is stored."""
        self._watch = watch

    async def set_state(
        self,
        blueprint_id: str,
        state: BlueprintState,
        *,
        actor: str,
        reason: str,
        before: BlueprintState | None = None,
        release: str = "",
    ) -> Blueprint:
        """Take a step of the life cycle, on or back to the offer; asking for the state that holds changes nothing.

        With ``before``, only from that state: who decided by what was read is not overtaken by another's steps. With
        ``release``, only while none newer than that release of templates is known.

        Raises:
            InvalidInputError: The id, actor or reason breaks its rule.
            NotFoundError: The blueprint is not stored.
            InvalidTransitionError: The life cycle does not lead there from where it stands, or it stands elsewhere, or
                a newer release is known.
        """
        require_content_id("blueprint_id", blueprint_id)
        require_text("actor", actor, max_chars=MAX_ACTOR_CHARS)
        require_text("reason", reason, max_chars=MAX_REASON_CHARS)
        async with self._database.session() as session:
            if release:
                await self.templates.require_newest(session, release)
            record = await _locked(session, blueprint_id)
            held = BlueprintState(record.state)
            if state is not held:
                _check_step(held, state, before)
                this = update(BlueprintRow).where(BlueprintRow.id == blueprint_id)
                await session.execute(this.values(state=int(state)))
                await _add_change(session, blueprint_id, held, state, actor=actor, reason=reason)
                await session.flush()
        if state is not held:
            log.info("blueprint_state", extra={"blueprint_id": blueprint_id, "state": state.name, "actor": actor})
            if self._watch is not None:
                await self._watch(blueprint_id, state)
        return blueprint_of(record._replace(state=int(state)))

    async def _restore(
        self, draft: BlueprintDraft, blueprint_id: str, ir_bytes: bytes, costs: Mapping[SiteKind, BlueprintCost]
    ) -> Blueprint:
        """Put a blueprint whose row has rotted right by a draft of its graph."""
        await self.set_aside(blueprint_id)
        async with self._database.session() as session:
            record = await _locked(session, blueprint_id)
            record = await restore(session, record, draft, ir_bytes, costs)
        extra = {"blueprint_id": blueprint_id, "blueprint": f"{record.name}@{record.version}"}
        log.warning("blueprint_restored", extra=extra)
        return blueprint_of(record)

    async def _insert(
        self, draft: BlueprintDraft, blueprint_id: str, ir_bytes: bytes, costs: Mapping[SiteKind, BlueprintCost]
    ) -> tuple[Blueprint, bool]:
        async with self._database.session() as session:
            name_row = await self._lock_name(session, draft.name)
            known = await find_record(session, blueprint_id)
            if known is not None:
                return _same_name(known, draft.name), False
            await _check_parents(session, draft.lineage.parent_ids)
            version = name_row.newest_version + 1
            await session.execute(
                update(BlueprintNameRow).where(BlueprintNameRow.name == draft.name).values(newest_version=version)
            )
            session.add(blueprint_row(draft, blueprint_id, ir_bytes, version))
            await session.flush()
            session.add_all(LineageRow(child_id=blueprint_id, parent_id=parent) for parent in draft.lineage.parent_ids)
            session.add_all(finding_rows(blueprint_id, draft.metadata, costs))
            actor = draft.lineage.author or "unknown"
            await _add_change(session, blueprint_id, None, draft.state, actor=actor, reason="stored")
            await session.flush()
            found = await find_record(session, blueprint_id)
            assert found is not None
            await self._take_room(session)
        log.info("blueprint_stored", extra={"blueprint_id": blueprint_id, "blueprint": f"{draft.name}@{version}"})
        return blueprint_of(found), True

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


class _Condition(NamedTuple):
    """Which blueprint is meant."""

    text: str
    parameters: tuple[Any, ...]


def _condition_of(reference: str) -> _Condition:
    if CONTENT_ID.fullmatch(reference):
        return _Condition("b.id = $1", (reference,))
    name, at, version = reference.partition("@")
    require_blueprint_name("reference", name)
    if not at:
        newest = "(SELECT max(version) FROM urza_blueprints WHERE name = $1)"
        return _Condition(f"b.name = $1 AND b.version = {newest}", (name,))
    if not version.isascii() or not version.isdigit() or not 1 <= int(version[:10]) <= 2**31 - 1 or len(version) > 10:
        raise InvalidInputError.of("reference", "be a content id, name or name@version with a version >= 1", reference)
    return _Condition("b.name = $1 AND b.version = $2", (name, int(version)))


def _by_id(blueprint_id: str) -> ReadScript[BlueprintRecord | None]:
    rows = yield Statement(f"SELECT {FIELDS} FROM {SOURCE} WHERE b.id = $1", (blueprint_id,))
    return BlueprintRecord(*rows[0]) if rows else None


def _known(blueprint_id: str) -> ReadScript[tuple[BlueprintRecord | None, bool]]:
    """Give a blueprint with whether listings hold it."""
    rows = yield Statement(f"SELECT {FIELDS}, {LISTED} FROM {SOURCE} WHERE b.id = $1", (blueprint_id,))
    return (BlueprintRecord(*rows[0][:-1]), bool(rows[0][-1])) if rows else (None, False)


def _versions(name: str) -> ReadScript[tuple[BlueprintRecord, ...]]:
    rows = yield Statement(f"SELECT {FIELDS} FROM {SOURCE} WHERE b.name = $1 ORDER BY b.version", (name,))
    return tuple(BlueprintRecord(*row) for row in rows)


def _with_history(
    condition: _Condition,
) -> ReadScript[tuple[BlueprintRecord, tuple[BlueprintStateChange, ...]] | None]:
    rows = yield Statement(f"SELECT {FIELDS} FROM {SOURCE} WHERE {condition.text}", condition.parameters)
    if not rows:
        return None
    record = BlueprintRecord(*rows[0])
    changes = yield from _history(record.id)
    # Where each statement has a snapshot of its own, the state may have moved on between the two.
    return (record._replace(state=int(changes[-1].to_state)) if changes else record), changes


def _history(blueprint_id: str) -> ReadScript[tuple[BlueprintStateChange, ...]]:
    rows = yield Statement(
        "SELECT from_state, to_state, actor, reason, changed_at_us FROM urza_state_changes "
        "WHERE blueprint_id = $1 ORDER BY sequence",
        (blueprint_id,),
    )
    return tuple(
        BlueprintStateChange(
            from_state=None if from_state is None else BlueprintState(from_state),
            to_state=BlueprintState(to_state),
            actor=actor,
            reason=reason,
            changed_at=moment_of(changed_at_us),
        )
        for from_state, to_state, actor, reason, changed_at_us in rows
    )


async def _locked(session: AsyncSession, blueprint_id: str) -> BlueprintRecord:
    found = await find_record(session, blueprint_id, lock=True)
    if found is None:
        raise _unknown(blueprint_id)
    return found


def _unknown(blueprint_id: str) -> NotFoundError:
    return NotFoundError(f"blueprint_id must name a stored blueprint, got {blueprint_id!r}", parameter="blueprint_id")


def _same_name(record: BlueprintRecord, name: str) -> Blueprint:
    if record.name != name:
        raise AlreadyExistsError(
            f"ir must be a graph that no other name holds, got the one of {record.name}@{record.version} for {name!r}",
            parameter="ir",
        )
    return blueprint_of(record)


async def _check_parents(session: AsyncSession, parent_ids: tuple[str, ...]) -> None:
    stored = set((await session.scalars(select(BlueprintRow.id).where(BlueprintRow.id.in_(parent_ids)))).all())
    missing = [parent for parent in parent_ids if parent not in stored]
    if missing:
        raise NotFoundError(
            f"lineage.parent_ids must name stored blueprints, got {missing[0]!r}", parameter="lineage.parent_ids"
        )


def _check_step(held: BlueprintState, after: BlueprintState, before: BlueprintState | None) -> None:
    allowed = NEXT_STATES[held]
    if after not in allowed:
        then = " or ".join(state.name for state in allowed) or "nothing"
        raise InvalidTransitionError(
            f"state must follow the life cycle ({held.name} leads to {then}), got {after.name}", parameter="state"
        )
    if before is not None and held is not before:
        raise InvalidTransitionError(
            f"state must be {before.name} for this step to {after.name}, got {held.name}", parameter="state"
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


def _relatives(
    blueprint_id: str, direction: LineageDirection, max_depth: int, after: tuple[int, str, int] | None, limit: int
) -> ReadScript[tuple[RelativeRecord, ...]]:
    """Walk; a blueprint without relatives there must itself be stored."""
    found = yield from walk(blueprint_id, direction, max_depth, after, limit)
    if not found and (yield from _by_id(blueprint_id)) is None:
        raise _unknown(blueprint_id)
    return found
