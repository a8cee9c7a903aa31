"""What Tamiyo keeps: state packets, decisions, and every field report as it came; the posterior is learned from them.

What another policy learned is kept apart: it teaches as reports do, and is no part of any run's history here.

Payloads are wire bytes with a CRC-32 beside them. Reports are never changed or thrown away, so a posterior can be
learned anew by a later version of the model. A row that no longer reads is left where it is, counted and reported;
what it taught is missing, and nothing else. A SQLite file that is damaged as a whole is set aside under another name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CompoundSelect,
    LargeBinary,
    Row,
    Select,
    cast,
    delete,
    exists,
    func,
    literal,
    null,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts import wire
from esper.contracts.decision import AdaptationDecision, AdaptationPlan
from esper.contracts.errors import CorruptDataError
from esper.contracts.lesson import Lesson
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.mesh.database import Database
from esper.mesh.wire_store import WireStore, open_or_set_aside
from esper.services.tamiyo.choices import Choice, digest_of
from esper.services.tamiyo.tables import (
    Base,
    ChoiceRow,
    DecisionRow,
    LessonRow,
    PacketRow,
    PartRow,
    PlanRow,
    ReportRow,
    RivalRow,
    SchemaRow,
)

SCHEMA_VERSION: Final = 2
"""Version of the tables. Version 1 kept no choices, parts and plans: what was decided then cannot be taken again."""

PACKETS_KEPT: Final = 2_000
"""Newest packets of one run that are kept."""

_MAX_IDS: Final = 500
_MAX_PARTS_REMEMBERED: Final = 20_000
_LessonColumns = tuple[int, str, str, bytes, int, bytes | None, int | None, int]
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


LessonKey = tuple[int, str]
"""Where a lesson stands among all: when it came, in microseconds, and the id of its report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredReport:
    """A report with what was known of its blueprint when it came."""

    key: LessonKey
    """Where it stands."""
    report: FieldReport
    """The report."""
    family: str
    """Family of its blueprint's operators; empty when the blueprint was not known."""
    is_own: bool = True
    """Whether it was reported here; the decision behind it is in this store, if anywhere."""
    begun: AdaptationDecision | None = None
    """The decision that began it, if it is known and was asked for; that of one from elsewhere always is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """A plan with which a run gave up a decision that was pending."""

    received_us: int
    """When it came, in microseconds; in one order with reports and lessons."""
    plan: AdaptationPlan
    """The plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """One run as it is read back: its packets in order, and the decisions taken on them."""

    packets: tuple[SystemStatePacket, ...]
    """Packets by sequence."""
    decisions: dict[int, tuple[AdaptationDecision, ...]]
    """Decisions by the sequence of their packet; those of a race in order."""
    choices: dict[int, Choice] = field(default_factory=dict)
    """What they hung on, where that is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPacket:
    """One packet with all that is kept of the decision on it."""

    sequence: int
    """Its sequence."""
    packet: SystemStatePacket | None
    """The packet; ``None`` where it no longer reads."""
    decisions: tuple[AdaptationDecision, ...]
    """What was decided on it, as far as it reads."""
    choice: Choice | None
    """What that hung on; ``None`` where it was not kept."""


class TamiyoStore(WireStore):
    """Tamiyo's tables. Safe for many tasks of one event loop."""

    owner = "Tamiyo"
    metadata = Base.metadata
    schema_row = SchemaRow
    schema_version = SCHEMA_VERSION
    older_versions = (1,)

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._moment_us = 0
        self._kept_parts: set[str] = set()

    async def prepare(self) -> None:
        """See `WireStore.prepare`; moments go on from the newest one that is kept."""
        await super().prepare()
        columns = (ReportRow.received_us, LessonRow.received_us, PlanRow.received_us)
        async with self._database.reading() as session:
            newest = [await session.scalar(select(func.max(column))) for column in columns]
        self._moment_us = max(moment or 0 for moment in newest)

    @property
    def moment_us(self) -> int:
        """The newest moment at which a report, a lesson or a plan came, in microseconds; 0 before the first."""
        return self._moment_us

    def _next_moment(self) -> int:
        """Give the present moment, after every one before it even where the clock was set back."""
        self._moment_us = max(_microseconds(datetime.now(UTC)), self._moment_us + 1)
        return self._moment_us

    async def keep(
        self,
        packet: SystemStatePacket,
        decisions: Sequence[AdaptationDecision],
        choice: Choice,
        parts: Mapping[str, bytes],
    ) -> None:
        """Keep a packet with the decisions on it, at least one; the first of equal ones stands.

        ``parts`` holds all that ``choice`` names; what is kept already is not written again.
        """
        packet_bytes = wire.serialize(packet)
        key = {"run_id": packet.run_id, "sequence": packet.sequence}
        rows = [
            self._database.insert(PacketRow).values(**key, payload=packet_bytes, crc32=zlib.crc32(packet_bytes)),
            self._database.insert(DecisionRow).values(**key, **_columns(decisions[0])),
            *(
                self._database.insert(RivalRow).values(**key, place=place, **_columns(rival))
                for place, rival in enumerate(decisions[1:], start=1)
            ),
            self._database.insert(ChoiceRow).values(**key, **asdict(choice)),
        ]
        missing = parts.keys() - self._kept_parts
        new = [{"digest": digest, "payload": parts[digest]} for digest in missing]
        rows += [
            self._database.insert(PartRow).values(new[start : start + _MAX_IDS])
            for start in range(0, len(new), _MAX_IDS)
        ]
        async with self._database.session() as session:
            for row in rows:
                await session.execute(row.on_conflict_do_nothing())
            if packet.sequence > PACKETS_KEPT:
                await self._drop(session, packet.run_id, packet.sequence - PACKETS_KEPT)
        if len(self._kept_parts) > _MAX_PARTS_REMEMBERED:
            self._kept_parts.clear()
        self._kept_parts.update(missing)

    async def _drop(self, session: AsyncSession, run_id: str, up_to: int) -> None:
        """Let a run's oldest packets go, and the lists of places that no packet names any more."""
        old = (ChoiceRow.run_id == run_id, ChoiceRow.sequence <= up_to)
        lists = (await session.scalars(select(ChoiceRow.candidates).where(*old).distinct())).all()
        await session.execute(delete(ChoiceRow).where(*old))
        await session.execute(delete(PacketRow).where(PacketRow.run_id == run_id, PacketRow.sequence <= up_to))
        unnamed = ~exists().where(ChoiceRow.candidates == PartRow.digest)
        await session.execute(delete(PartRow).where(PartRow.digest.in_(lists), unnamed))
        self._kept_parts.difference_update(lists)

    async def parts(self, digests: Iterable[str]) -> dict[str, bytes]:
        """Give parts by their digests.

        Raises:
            CorruptDataError: One is missing, or is not what its digest says.
        """
        wanted = list(dict.fromkeys(digests))
        found: dict[str, bytes] = {}
        for start in range(0, len(wanted), _MAX_IDS):
            query = select(PartRow).where(PartRow.digest.in_(wanted[start : start + _MAX_IDS]))
            async with self._database.reading() as session:
                found.update((row.digest, row.payload) for row in (await session.scalars(query)).all())
        for digest in wanted:
            if digest not in found or digest_of(found[digest]) != digest:
                got = "nothing" if digest not in found else digest_of(found[digest])
                raise CorruptDataError(f"part {digest} of a recorded decision must read, got {got}")
        return found

    async def newest_sequence(self, run_id: str) -> int:
        """Give the sequence of a run's newest packet; 0 where nothing is known of it."""
        async with self._database.reading() as session:
            newest = await session.scalar(select(func.max(PacketRow.sequence)).where(PacketRow.run_id == run_id))
        return newest or 0

    async def packets(self, run_id: str, limit: int, after: int) -> list[StoredPacket]:
        """Give a run's packets past one sequence, in order, each with all that is kept of the decision on it."""
        mine = (PacketRow.run_id == run_id, PacketRow.sequence > after)
        async with self._database.reading() as session:
            query = select(PacketRow).where(*mine).order_by(PacketRow.sequence).limit(limit)
            rows = (await session.scalars(query)).all()
        if not rows:
            return []
        bounds = rows[0].sequence, rows[-1].sequence
        decided, choices = await self._decided(run_id, bounds), await self._choices(run_id, bounds)
        return [
            StoredPacket(
                sequence=row.sequence,
                packet=self.read(row.payload, row.crc32, SystemStatePacket, f"{run_id}/{row.sequence}"),
                decisions=decided.get(row.sequence, ()),
                choice=choices.get(row.sequence),
            )
            for row in rows
        ]

    async def _choices(self, run_id: str, bounds: tuple[int, int] | None = None) -> dict[int, Choice]:
        query = select(ChoiceRow).where(ChoiceRow.run_id == run_id)
        if bounds is not None:
            query = query.where(ChoiceRow.sequence.between(*bounds))
        async with self._database.reading() as session:
            rows = (await session.scalars(query)).all()
        return {
            row.sequence: Choice(
                previous_sequence=row.previous_sequence,
                moment_us=row.moment_us,
                num_lessons=row.num_lessons,
                candidates=row.candidates,
                settings=row.settings,
            )
            for row in rows
        }

    async def add_plan(self, plan: AdaptationPlan) -> None:
        """Keep a plan with which a run gave up a decision that was pending; the first of one adaptation stands."""
        payload = wire.serialize(plan)
        row = self._database.insert(PlanRow).values(
            run_id=plan.run_id,
            adaptation_id=plan.adaptation_id,
            received_us=self._next_moment(),
            payload=payload,
            crc32=zlib.crc32(payload),
        )
        async with self._database.session() as session:
            await session.execute(row.on_conflict_do_nothing())

    async def plans_of(self, run_id: str) -> list[StoredPlan]:
        """Give the plans of a run that gave up what was pending, in the order in which they came."""
        query = select(PlanRow).where(PlanRow.run_id == run_id).order_by(PlanRow.received_us)
        async with self._database.reading() as session:
            rows = (await session.scalars(query)).all()
        read = [(row.received_us, self.read(row.payload, row.crc32, AdaptationPlan, row.adaptation_id)) for row in rows]
        return [StoredPlan(received_us=moment, plan=plan) for moment, plan in read if plan is not None]

    async def decisions(self, run_id: str, sequence: int) -> tuple[AdaptationDecision, ...]:
        """Give the decisions taken on one packet; empty when there are none."""
        return (await self._decided(run_id, (sequence, sequence))).get(sequence, ())

    async def decision_of(self, adaptation_id: str) -> AdaptationDecision | None:
        """Give the decision that began an adaptation; ``None`` when it was not ours."""
        async with self._database.reading() as session:
            first = await session.scalar(select(DecisionRow).where(DecisionRow.adaptation_id == adaptation_id))
            row: DecisionRow | RivalRow | None = first or await session.get(RivalRow, adaptation_id)
        return None if row is None else self.read(row.payload, row.crc32, AdaptationDecision, row.adaptation_id)

    async def decisions_of(self, adaptation_ids: Sequence[str]) -> dict[str, AdaptationDecision]:
        """Give the decisions that began adaptations, by adaptation; those that are not ours are left out."""
        found: dict[str, AdaptationDecision] = {}
        for start in range(0, len(adaptation_ids), _MAX_IDS):
            wanted = adaptation_ids[start : start + _MAX_IDS]
            first = select(DecisionRow).where(DecisionRow.adaptation_id.in_(wanted))
            rivals = select(RivalRow).where(RivalRow.adaptation_id.in_(wanted))
            async with self._database.reading() as session:
                rows: list[DecisionRow | RivalRow] = [
                    *(await session.scalars(first)).all(),
                    *(await session.scalars(rivals)).all(),
                ]
            for row in rows:
                decision = self.read(row.payload, row.crc32, AdaptationDecision, row.adaptation_id)
                if decision is not None:
                    found[row.adaptation_id] = decision
        return found

    async def run(self, run_id: str) -> StoredRun:
        """Give a run's packets and decisions; empty when nothing is known of it."""
        async with self._database.reading() as session:
            rows = (
                await session.scalars(select(PacketRow).where(PacketRow.run_id == run_id).order_by(PacketRow.sequence))
            ).all()
        read = [self.read(row.payload, row.crc32, SystemStatePacket, f"{run_id}/{row.sequence}") for row in rows]
        decided = await self._decided(run_id)
        packets = tuple(packet for packet in read if packet is not None)
        return StoredRun(packets=packets, decisions=decided, choices=await self._choices(run_id))

    async def _decided(
        self, run_id: str, bounds: tuple[int, int] | None = None
    ) -> dict[int, tuple[AdaptationDecision, ...]]:
        """Give the decisions of a run, or those on its packets from one to another, by sequence."""
        first, rivals = select(DecisionRow).where(DecisionRow.run_id == run_id), select(RivalRow)
        rivals = rivals.where(RivalRow.run_id == run_id).order_by(RivalRow.sequence, RivalRow.place)
        if bounds is not None:
            first = first.where(DecisionRow.sequence.between(*bounds))
            rivals = rivals.where(RivalRow.sequence.between(*bounds))
        async with self._database.reading() as session:
            rows: list[DecisionRow | RivalRow] = [
                *(await session.scalars(first)).all(),
                *(await session.scalars(rivals)).all(),
            ]
        found: dict[int, tuple[AdaptationDecision, ...]] = {}
        for row in rows:
            decision = self.read(row.payload, row.crc32, AdaptationDecision, row.adaptation_id)
            if decision is not None:
                found[row.sequence] = (*found.get(row.sequence, ()), decision)
        return found

    async def reports_of(self, run_id: str) -> list[StoredReport]:
        """Give the reports of one run in the order in which they came."""
        return await self._reports(run_id)

    async def reports(self) -> list[StoredReport]:
        """Give every report that reads, our own and those of lessons, in the order in which they came."""
        async with self._database.reading() as session:
            rows = (await session.execute(_in_order(_taught("")))).all()
        return self._read_reports(rows)

    async def _reports(self, run_id: str) -> list[StoredReport]:
        async with self._database.reading() as session:
            rows = (await session.execute(_in_order(_reported(run_id)))).all()
        return self._read_reports(rows)

    def _read_reports(self, rows: Sequence[Row[*_LessonColumns]]) -> list[StoredReport]:
        found = (self._read_report(row) for row in rows)
        return [one for one in found if one is not None]

    def _read_report(self, row: Row[*_LessonColumns]) -> StoredReport | None:
        report = self.read(row.payload, row.crc32, FieldReport, row.report_id)
        if report is None:
            return None
        begun = None
        if row.decision is not None:
            begun = self.read(row.decision, row.decision_crc32, AdaptationDecision, report.adaptation_id)
        key = (row.received_us, row.report_id)
        return StoredReport(key=key, report=report, family=row.family, is_own=bool(row.is_own), begun=begun)

    async def lessons(
        self, run_id: str, limit: int, after: LessonKey | None
    ) -> Sequence[tuple[LessonKey, Lesson | None]]:
        """Give what was learned, in the order in which it came, those past ``after`` only; an empty run means all.

        ``None`` stands for one whose report no longer reads.
        """
        found = await self.learned(run_id, limit, after)
        return [
            (key, None if one is None else Lesson(report=one.report, family=one.family, decision=one.begun))
            for key, one in found
        ]

    async def learned(
        self, run_id: str, limit: int, after: LessonKey | None
    ) -> Sequence[tuple[LessonKey, StoredReport | None]]:
        """Give what was learned as `lessons` does, each with whether it is our own; the decisions that began it too."""
        query = _in_order(_taught(run_id), after).limit(limit)
        async with self._database.reading() as session:
            rows = (await session.execute(query)).all()
        read = [((row.received_us, row.report_id), self._read_report(row)) for row in rows]
        begun = await self.decisions_of([one.report.adaptation_id for _, one in read if one is not None and one.is_own])
        return [
            (key, replace(one, begun=begun.get(one.report.adaptation_id)) if one is not None and one.is_own else one)
            for key, one in read
        ]

    async def add_lessons(self, lessons: Sequence[Lesson]) -> tuple[Sequence[Lesson], int]:
        """Keep the lessons that are new; give them, and how many others are known with another content.

        One that is known and no longer reads is new, and takes its place.
        """
        known = await self._known([lesson.report.report_id for lesson in lessons])
        num_differing = 0
        added: list[Lesson] = []
        async with self._database.session() as session:
            for lesson in lessons:
                name, columns = lesson.report.report_id, _lesson_columns(lesson)
                if name in known:
                    num_differing += known[name] != columns["payload"]
                    continue
                columns["received_us"] = self._next_moment()  # read back, they come in this order
                row = self._database.insert(LessonRow).values(report_id=name, **columns)
                await session.execute(row.on_conflict_do_update(index_elements=[LessonRow.report_id], set_=columns))
                known[name] = columns["payload"]
                added.append(lesson)
        return added, num_differing

    async def _known(self, report_ids: Sequence[str]) -> dict[str, bytes]:
        """Give the bytes of reports that are kept and read; what another version wrote, as this one would."""
        given = select(LessonRow).where(LessonRow.report_id.in_(report_ids))
        own = select(ReportRow).where(ReportRow.report_id.in_(report_ids))
        async with self._database.reading() as session:
            rows: list[ReportRow | LessonRow] = [
                *(await session.scalars(given)).all(),
                *(await session.scalars(own)).all(),  # the last word: what was reported here is what counts
            ]
        read = ((row.report_id, self.read(row.payload, row.crc32, FieldReport, row.report_id)) for row in rows)
        return {name: wire.serialize(report) for name, report in read if report is not None}

    async def add_report(self, report: FieldReport, family: str) -> bool:
        """Keep a report; false when one with its id is there already."""
        payload = wire.serialize(report)
        row = self._database.insert(ReportRow).values(
            report_id=report.report_id,
            run_id=report.run_id,
            received_us=self._next_moment(),
            family=family,
            payload=payload,
            crc32=zlib.crc32(payload),
        )
        async with self._database.session() as session:
            added = await session.scalar(row.on_conflict_do_nothing().returning(ReportRow.report_id))
        return added is not None

    async def num_reports(self) -> int:
        """Give how many reports are kept."""
        async with self._database.reading() as session:
            return int(await session.scalar(select(func.count()).select_from(ReportRow)) or 0)

    async def list_decisions(
        self, run_id: str, limit: int, after: tuple[int, str] | None
    ) -> Sequence[tuple[tuple[int, str], AdaptationDecision]]:
        """Give decisions newest first with their sort keys, those below ``after`` only; an empty run means all."""
        kept = union_all(*(_listed(table, run_id) for table in (DecisionRow, RivalRow))).subquery()
        query = select(kept).order_by(kept.c.created_us.desc(), kept.c.adaptation_id.desc())
        if after is not None:
            query = query.where(tuple_(kept.c.created_us, kept.c.adaptation_id) < after)
        async with self._database.reading() as session:
            rows = (await session.execute(query.limit(limit))).all()
        found: list[tuple[tuple[int, str], AdaptationDecision]] = []
        for row in rows:
            decision = self.read(row.payload, row.crc32, AdaptationDecision, row.adaptation_id)
            if decision is not None:
                found.append(((row.created_us, row.adaptation_id), decision))
        return found


def _columns(decision: AdaptationDecision) -> dict[str, Any]:
    """Give the columns that both tables of decisions have."""
    payload = wire.serialize(decision)
    return {
        "adaptation_id": decision.adaptation_id,
        "created_us": _microseconds(decision.created_at),
        "payload": payload,
        "crc32": zlib.crc32(payload),
    }


def _lesson_columns(lesson: Lesson) -> dict[str, Any]:
    payload = wire.serialize(lesson.report)
    decision = None if lesson.decision is None else wire.serialize(lesson.decision)
    return {
        "run_id": lesson.report.run_id,
        "family": lesson.family,
        "payload": payload,
        "crc32": zlib.crc32(payload),
        "decision": decision,
        "decision_crc32": None if decision is None else zlib.crc32(decision),
    }


def _reported(run_id: str) -> Select[*_LessonColumns]:
    """Give the query of our own reports, of one run or of all, in the columns of lessons."""
    none, no_crc = cast(null(), LargeBinary).label("decision"), cast(null(), BigInteger).label("decision_crc32")
    own = literal(1).label("is_own")
    one = ReportRow
    query = select(one.received_us, one.report_id, one.family, one.payload, one.crc32, none, no_crc, own)
    return query.where(one.run_id == run_id) if run_id else query


def _taught(run_id: str) -> CompoundSelect[*_LessonColumns]:
    """Give the query of all that was learned, of one run or of all: our own reports, and lessons."""
    one, own = LessonRow, literal(0).label("is_own")
    given = select(
        one.received_us, one.report_id, one.family, one.payload, one.crc32, one.decision, one.decision_crc32, own
    )
    return union_all(_reported(run_id), given.where(one.run_id == run_id) if run_id else given)


def _in_order(
    rows: Select[*_LessonColumns] | CompoundSelect[*_LessonColumns], after: LessonKey | None = None
) -> Select[*_LessonColumns]:
    kept = rows.subquery()
    query = select(kept).order_by(kept.c.received_us, kept.c.report_id)
    return query if after is None else query.where(tuple_(kept.c.received_us, kept.c.report_id) > after)


def _listed(table: type[DecisionRow | RivalRow], run_id: str) -> Select[int, str, bytes, int]:
    """Give the query of what a list of decisions shows, of one run or of all."""
    query = select(table.created_us, table.adaptation_id, table.payload, table.crc32)
    return query.where(table.run_id == run_id) if run_id else query


async def open_store(url: str) -> TamiyoStore:
    """Open the store at a database URL; a damaged SQLite file is set aside and a new one begun.

    Raises:
        CorruptDataError: A store other than a SQLite file is damaged.
        InvalidStateError: The tables are those of another version.
        UnavailableError: The store cannot be reached.
    """
    return await open_or_set_aside(url, _prepared)


async def _prepared(url: str) -> TamiyoStore:
    store = TamiyoStore(Database.open(url))
    try:
        await store.prepare()
        await store.reports()
    except BaseException:
        await store.database.close()
        raise
    return store


def _microseconds(moment: datetime) -> int:
    return round((moment - _EPOCH).total_seconds() * 1e6)
