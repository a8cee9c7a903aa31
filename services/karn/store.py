"""What Karn keeps: the designs it proposed and every field report as it came; archive and surrogate are made from them.

Payloads are wire bytes with a CRC-32 beside them. A row that no longer reads is left where it is, counted and reported;
a SQLite file that is damaged is set aside under another name.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import BigInteger, Index, LargeBinary, MetaData, String, func, select, text, tuple_
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from esper.contracts import wire
from esper.contracts.blueprint import Blueprint
from esper.contracts.errors import CorruptDataError
from esper.contracts.run import FieldReport
from esper.mesh.database import Database
from esper.mesh.wire_store import WireStore, open_or_set_aside

SCHEMA_VERSION: Final = 1
"""Version of the tables."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

ReportKey = tuple[int, str]
"""Where a report stands among all: when it came, in microseconds, and its id."""


class Base(DeclarativeBase):
    """Base of Karn's tables."""

    metadata = MetaData()


class SchemaRow(Base):
    """The version of the tables; one row."""

    __tablename__ = "karn_schema"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()


class DesignRow(Base):
    """One design that was proposed, or that a report spoke of."""

    __tablename__ = "karn_designs"

    blueprint_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class ReportRow(Base):
    """One field report, as it came."""

    __tablename__ = "karn_reports"
    __table_args__ = (Index("ix_karn_reports_order", "received_us", "report_id"),)

    report_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    received_us: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class KarnStore(WireStore):
    """Karn's tables. Safe for many tasks of one event loop."""

    owner = "Karn"
    metadata = Base.metadata
    schema_row = SchemaRow
    schema_version = SCHEMA_VERSION

    async def add_designs(self, designs: Sequence[Blueprint]) -> None:
        """Keep designs; those that are there stay as they are."""
        async with self._database.session() as session:
            for design in designs:
                payload = wire.serialize(design)
                row = self._database.insert(DesignRow).values(
                    blueprint_id=design.id, payload=payload, crc32=zlib.crc32(payload)
                )
                await session.execute(row.on_conflict_do_nothing())

    async def design(self, blueprint_id: str) -> Blueprint | None:
        """Give one design; ``None`` when it is not kept."""
        async with self._database.reading() as session:
            row = await session.get(DesignRow, blueprint_id)
        return None if row is None else self.read(row.payload, row.crc32, Blueprint, blueprint_id)

    async def designs(self, blueprint_ids: Collection[str]) -> dict[str, Blueprint]:
        """Give those of some designs that are kept and read, by content id."""
        query = select(DesignRow).where(DesignRow.blueprint_id.in_(blueprint_ids))
        async with self._database.reading() as session:
            rows = (await session.scalars(query)).all()
        found = {row.blueprint_id: self.read(row.payload, row.crc32, Blueprint, row.blueprint_id) for row in rows}
        return {name: design for name, design in found.items() if design is not None}

    async def add_report(self, report: FieldReport) -> ReportKey | None:
        """Keep a report behind all others and give where it stands; ``None`` when one with its id is there already."""
        payload = wire.serialize(report)
        async with self._database.session() as session:
            newest_us = await session.scalar(select(func.max(ReportRow.received_us))) or 0
            # Clocks are set back, and two reports come in one microsecond: the order must be that of their coming.
            received_us = max(newest_us + 1, round((datetime.now(UTC) - _EPOCH).total_seconds() * 1e6))
            row = self._database.insert(ReportRow).values(
                report_id=report.report_id, received_us=received_us, payload=payload, crc32=zlib.crc32(payload)
            )
            added = await session.scalar(row.on_conflict_do_nothing().returning(ReportRow.report_id))
        return None if added is None else (received_us, report.report_id)

    async def has_report(self, report_id: str) -> bool:
        """Say whether a report is kept."""
        async with self._database.reading() as session:
            return await session.get(ReportRow, report_id) is not None

    async def reports(self, limit: int, before: ReportKey | None) -> list[tuple[ReportKey, FieldReport | None]]:
        """Give the newest reports first, those that came before another only; ``None`` for one that does not read."""
        query = select(ReportRow).order_by(ReportRow.received_us.desc(), ReportRow.report_id.desc()).limit(limit)
        if before is not None:
            query = query.where(tuple_(ReportRow.received_us, ReportRow.report_id) < before)
        async with self._database.reading() as session:
            rows = (await session.scalars(query)).all()
        return [
            ((row.received_us, row.report_id), self.read(row.payload, row.crc32, FieldReport, row.report_id))
            for row in rows
        ]

    async def num_reports(self) -> int:
        """Give how many reports are kept."""
        async with self._database.reading() as session:
            return int(await session.scalar(select(func.count()).select_from(ReportRow)) or 0)

    async def verify(self) -> None:
        """Look through the whole of a SQLite file: a page nobody reads today is one that a report needs tomorrow.

        Raises:
            CorruptDataError: The file is damaged.
        """
        if self._database.dialect != "sqlite":
            return
        async with self._database.reading() as session:
            found = await session.scalar(text("PRAGMA quick_check(1)"))
            for names in (ReportRow.report_id, DesignRow.blueprint_id):  # SQLite does not look whether text is text
                (await session.scalars(select(names))).all()
        if found != "ok":
            raise CorruptDataError(f"store {self._database.url} is damaged: {found}")


async def open_store(url: str) -> KarnStore:
    """Open the store at a database URL; a damaged SQLite file is set aside and a new one begun.

    Raises:
        CorruptDataError: A store other than a SQLite file is damaged.
        InvalidStateError: The tables are those of another version.
        UnavailableError: The store cannot be reached.
    """
    return await open_or_set_aside(url, _prepared)


async def _prepared(url: str) -> KarnStore:
    store = KarnStore(Database.open(url))
    try:
        await store.prepare()
        await store.verify()
    except BaseException:
        await store.database.close()
        raise
    return store
