"""What Nissa keeps: every durable event of every run, chained by hash, and the anomalies it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import BigInteger, Boolean, Index, LargeBinary, MetaData, String, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from esper.contracts.decision import Anomaly
from esper.contracts.errors import NotFoundError, UnavailableError
from esper.contracts.wire import parse, serialize
from esper.mesh.database import Database
from esper.services.nissa.chain import GENESIS, ChainedEvent, ChainVerdict, seal, verify_chain


class Base(DeclarativeBase):
    """Base of Nissa's tables."""

    metadata = MetaData()


class RunRow(Base):
    """One run that was heard."""

    __tablename__ = "nissa_runs"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    started_us: Mapped[int] = mapped_column(BigInteger, index=True)
    ended: Mapped[bool] = mapped_column(Boolean, default=False)


class EventRow(Base):
    """One event with its place in the run's chain."""

    __tablename__ = "nissa_events"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    key: Mapped[str] = mapped_column(String(320), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    recorded_us: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    previous: Mapped[bytes] = mapped_column(LargeBinary)
    digest: Mapped[bytes] = mapped_column(LargeBinary)


class AnomalyRow(Base):
    """One anomaly as it was last seen."""

    __tablename__ = "nissa_anomalies"
    __table_args__ = (Index("ix_nissa_anomalies_run", "run_id", "first_seen_us"),)

    anomaly_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64))
    first_seen_us: Mapped[int] = mapped_column(BigInteger)
    resolved: Mapped[bool] = mapped_column(Boolean)
    announced: Mapped[bool] = mapped_column(Boolean)
    acknowledged_by: Mapped[str] = mapped_column(String(128), default="")
    payload: Mapped[bytes] = mapped_column(LargeBinary)


MAX_ANOMALIES: Final = 500
"""Most anomalies a listing gives."""

_MAX_HEADS: Final = 256
"""Runs whose chain heads are remembered; others are looked up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEvent:
    """One event that came off the stream."""

    run_id: str
    """Run."""
    key: str
    """Identity of the message in its stream; a second one with the same key changes nothing."""
    kind: str
    """Kind, as in its subject."""
    recorded_at: datetime
    """When the stream took it."""
    payload: bytes
    """The message's bytes."""


class NissaStore:
    """Runs, events and anomalies in SQLite or PostgreSQL. Safe for concurrent use within one event loop."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._heads: dict[str, tuple[int, bytes]] = {}

    @classmethod
    async def open(cls, url: str) -> NissaStore:
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

    async def append(self, event: NewEvent, *, ended: bool | None = None) -> bool:
        """Add an event to its run's chain; false when it is there already.

        Args:
            event: The event.
            ended: Whether the run is over with it; ``None`` leaves what is known.

        Raises:
            UnavailableError: The store cannot be reached, or another writer took the place in the chain; try again.
        """
        head = self._heads.get(event.run_id)
        if head is not None and ended is None:
            try:
                await self._extend(event, head)
            except IntegrityError:  # known already, or another writer was faster: look before the next try
                self._heads.pop(event.run_id, None)
            else:
                return True
        return await self._look_and_extend(event, ended)

    async def _extend(self, event: NewEvent, head: tuple[int, bytes]) -> None:
        """Add an event after a head that was seen before; one statement."""
        link = _link(event, head)
        async with self.database.session() as session:
            await session.execute(self.database.insert(EventRow).values(**link))
        self._note_head(event.run_id, link)

    async def _look_and_extend(self, event: NewEvent, ended: bool | None) -> bool:
        try:
            async with self.database.session() as session:
                known = select(EventRow.position).where(EventRow.key == event.key)
                if await session.scalar(known) is not None:
                    return False
                run = await session.get(RunRow, event.run_id)
                if run is None:
                    run = RunRow(run_id=event.run_id, started_us=_microseconds(event.recorded_at), ended=False)
                    session.add(run)
                if ended is not None:
                    run.ended = ended
                link = _link(event, await self._head(session, event.run_id))
                session.add(EventRow(**link))
        except IntegrityError as error:
            raise UnavailableError(f"the chain of run {event.run_id} was extended by another writer") from error
        self._note_head(event.run_id, link)
        return True

    async def _head(self, session: AsyncSession, run_id: str) -> tuple[int, bytes]:
        newest = (
            select(EventRow.position, EventRow.digest)
            .where(EventRow.run_id == run_id)
            .order_by(EventRow.position.desc())
            .limit(1)
        )
        last = (await session.execute(newest)).first()
        return (0, GENESIS) if last is None else (int(last[0]), bytes(last[1]))

    def _note_head(self, run_id: str, link: Mapping[str, Any]) -> None:
        self._heads.pop(run_id, None)
        self._heads[run_id] = (link["position"], link["digest"])
        if len(self._heads) > _MAX_HEADS:
            del self._heads[next(iter(self._heads))]

    async def events(self, run_id: str) -> list[ChainedEvent]:
        """Give a run's events in the order of its chain; empty for an unknown run."""
        query = select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.position)
        async with self.database.reading() as session:
            return [_event(row) for row in (await session.scalars(query)).all()]

    async def verify_chain(self, run_id: str) -> ChainVerdict:
        """Check a run's chain."""
        return verify_chain(await self.events(run_id))

    async def newest_run(self) -> str | None:
        """Give the run that was first heard last, or ``None``."""
        query = select(RunRow.run_id).order_by(RunRow.started_us.desc(), RunRow.run_id.desc()).limit(1)
        async with self.database.reading() as session:
            return await session.scalar(query)

    async def knows_run(self, run_id: str) -> bool:
        """Tell whether a run was ever heard."""
        async with self.database.reading() as session:
            return await session.get(RunRow, run_id) is not None

    async def live_runs(self, limit: int) -> list[str]:
        """Give runs that did not say that they ended, newest first."""
        query = select(RunRow.run_id).where(RunRow.ended.is_(False)).order_by(RunRow.started_us.desc()).limit(limit)
        async with self.database.reading() as session:
            return list((await session.scalars(query)).all())

    async def keep_anomaly(self, anomaly: Anomaly) -> bool:
        """Keep an anomaly as it is now; true when it was not known. Who acknowledged it stays."""
        async with self.database.session() as session:
            row = await session.get(AnomalyRow, anomaly.anomaly_id)
            fresh = row is None
            if row is None:
                row = AnomalyRow(
                    anomaly_id=anomaly.anomaly_id,
                    run_id=anomaly.run_id,
                    first_seen_us=_microseconds(anomaly.first_seen_at),
                    announced=False,
                    acknowledged_by="",
                )
                session.add(row)
            row.resolved = anomaly.resolved
            row.payload = serialize(anomaly)
        return fresh

    async def anomalies(
        self, *, run_id: str | None = None, open_only: bool = False, limit: int | None = None
    ) -> list[Anomaly]:
        """Give anomalies, newest first, of one run or of all."""
        query = select(AnomalyRow).order_by(AnomalyRow.first_seen_us.desc(), AnomalyRow.anomaly_id)
        if run_id is not None:
            query = query.where(AnomalyRow.run_id == run_id)
        if open_only:
            query = query.where(AnomalyRow.resolved.is_(False))
        if limit is not None:
            query = query.limit(limit)
        async with self.database.reading() as session:
            return [_anomaly(row) for row in (await session.scalars(query)).all()]

    async def unannounced(self) -> list[Anomaly]:
        """Give anomalies that the bus was not told of yet, oldest first."""
        query = select(AnomalyRow).where(AnomalyRow.announced.is_(False)).order_by(AnomalyRow.first_seen_us).limit(100)
        async with self.database.reading() as session:
            return [_anomaly(row) for row in (await session.scalars(query)).all()]

    async def mark_announced(self, anomaly_id: str) -> None:
        """Note that the bus was told."""
        async with self.database.session() as session:
            await session.execute(update(AnomalyRow).where(AnomalyRow.anomaly_id == anomaly_id).values(announced=True))

    async def acknowledge(self, anomaly_id: str, actor: str) -> Anomaly:
        """Note who has seen an anomaly; the first stays.

        Raises:
            NotFoundError: There is no such anomaly.
        """
        async with self.database.session() as session:
            row = await session.get(AnomalyRow, anomaly_id)
            if row is None:
                raise NotFoundError(f"anomaly must be known, got {anomaly_id!r}", parameter="anomaly_id")
            row.acknowledged_by = row.acknowledged_by or actor
            return _anomaly(row)


def _link(event: NewEvent, head: tuple[int, bytes]) -> dict[str, Any]:
    """Give the columns of an event that follows a head (position, hash)."""
    body: dict[str, Any] = {
        "run_id": event.run_id,
        "position": head[0] + 1,
        "kind": event.kind,
        "key": event.key,
        "recorded_us": _microseconds(event.recorded_at),
        "payload": event.payload,
    }
    return {**body, "previous": head[1], "digest": seal(head[1], **body)}


def _event(row: EventRow) -> ChainedEvent:
    return ChainedEvent(
        run_id=row.run_id,
        position=row.position,
        kind=row.kind,
        key=row.key,
        recorded_us=row.recorded_us,
        payload=row.payload,
        previous=row.previous,
        digest=row.digest,
    )


def _anomaly(row: AnomalyRow) -> Anomaly:
    return replace(parse(row.payload, Anomaly), acknowledged_by=row.acknowledged_by)


def moment_of(microseconds: int) -> datetime:
    """Give the moment of microseconds since 1970, in UTC."""
    return datetime.fromtimestamp(microseconds / 1_000_000, UTC)


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)
