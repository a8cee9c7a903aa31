"""What the control service keeps: the last state of every run, and every event of its adaptations.

Payloads are wire bytes; columns beside them are for finding. An event is known by its place in the stream, so one that
comes again changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import BigInteger, Index, LargeBinary, MetaData, SmallInteger, String, select, tuple_
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from esper.contracts.run import ENDED_RUN_PHASES, RunPhase, SystemStatePacket
from esper.contracts.wire import parse, serialize
from esper.mesh.database import Database

MAX_ADAPTATION_ID: Final = 128
"""Longest adaptation id, in characters."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Base(DeclarativeBase):
    """Base of Tolaria's tables."""

    metadata = MetaData()


class RunRow(Base):
    """One run with its last state packet."""

    __tablename__ = "tolaria_runs"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)
    phase: Mapped[int] = mapped_column(SmallInteger)
    started_us: Mapped[int] = mapped_column(BigInteger, index=True)
    finished_us: Mapped[int | None] = mapped_column(BigInteger)
    packet: Mapped[bytes] = mapped_column(LargeBinary)


class EventRow(Base):
    """One event of one adaptation."""

    __tablename__ = "tolaria_events"
    __table_args__ = (Index("ix_tolaria_events_run", "run_id", "stream_sequence"),)

    stream_sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    run_id: Mapped[str] = mapped_column(String(64))
    adaptation_id: Mapped[str] = mapped_column(String(MAX_ADAPTATION_ID))
    kind: Mapped[str] = mapped_column(String(16))
    payload: Mapped[bytes] = mapped_column(LargeBinary)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """One run as it was last heard of."""

    packet: SystemStatePacket
    """Last state packet."""
    started_at: datetime
    """When it was announced."""
    finished_at: datetime | None
    """When it ended; ``None`` until then."""
    started_us: int
    """``started_at`` in whole microseconds: the sort key of listings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent:
    """One event of one adaptation as it came."""

    adaptation_id: str
    """Adaptation."""
    kind: str
    """``decision``, ``seed``, ``plan`` or ``field_report``."""
    payload: bytes
    """The message's bytes."""


class TolariaStore:
    """Runs and events in SQLite or PostgreSQL. Safe for concurrent use within one event loop."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    async def open(cls, url: str) -> TolariaStore:
        """Open the store and create what is missing.

        Raises:
            UnavailableError: The store cannot be reached.
        """
        database = Database.open(url)
        try:
            await database.create_all(Base.metadata)
        except BaseException:
            await database.close()
            raise
        return cls(database)

    async def keep_packet(self, packet: SystemStatePacket) -> bool:
        """Keep a packet as the run's last; false when it is no newer than the one kept."""
        moment_us = _microseconds(packet.created_at)
        ended = packet.phase in ENDED_RUN_PHASES
        async with self.database.session() as session:
            row = await session.get(RunRow, packet.run_id, with_for_update=True)
            if row is None:
                row = RunRow(run_id=packet.run_id, started_us=moment_us, sequence=0)
                session.add(row)
            if packet.sequence <= row.sequence:
                return False
            row.sequence, row.phase = packet.sequence, int(packet.phase)
            row.finished_us = moment_us if ended else None
            row.packet = serialize(packet)
        return True

    async def keep_event(self, run_id: str, stream_sequence: int, event: StoredEvent) -> bool:
        """Keep an event; false when it was kept before."""
        async with self.database.session() as session:
            if await session.get(EventRow, stream_sequence) is not None:
                return False
            session.add(
                EventRow(
                    stream_sequence=stream_sequence,
                    run_id=run_id,
                    adaptation_id=event.adaptation_id,
                    kind=event.kind,
                    payload=event.payload,
                )
            )
        return True

    async def run(self, run_id: str) -> StoredRun | None:
        """Give one run, or ``None``."""
        async with self.database.reading() as session:
            row = await session.get(RunRow, run_id)
            return None if row is None else _stored(row)

    async def list_runs(self, phases: Sequence[RunPhase], limit: int, after: tuple[int, str] | None) -> list[StoredRun]:
        """Give runs newest first, after a position (start in microseconds, run id)."""
        query = select(RunRow).order_by(RunRow.started_us.desc(), RunRow.run_id.desc()).limit(limit)
        if phases:
            query = query.where(RunRow.phase.in_([int(phase) for phase in phases]))
        if after is not None:
            query = query.where(tuple_(RunRow.started_us, RunRow.run_id) < after)
        async with self.database.reading() as session:
            return [_stored(row) for row in (await session.scalars(query)).all()]

    async def events(self, run_id: str) -> list[StoredEvent]:
        """Give a run's events in the order of the stream."""
        query = select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.stream_sequence)
        async with self.database.reading() as session:
            rows = (await session.scalars(query)).all()
        return [StoredEvent(adaptation_id=row.adaptation_id, kind=row.kind, payload=row.payload) for row in rows]


def _stored(row: RunRow) -> StoredRun:
    return StoredRun(
        packet=parse(row.packet, SystemStatePacket),
        started_at=_moment(row.started_us),
        finished_at=None if row.finished_us is None else _moment(row.finished_us),
        started_us=row.started_us,
    )


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
