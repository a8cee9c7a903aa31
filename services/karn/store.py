"""What Karn keeps: the designs it proposed and every field report as it came; archive and surrogate are made from them.

Payloads are wire bytes with a CRC-32 beside them. A row that no longer reads is left where it is, counted and reported.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import BigInteger, Index, LargeBinary, MetaData, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from esper.contracts import wire
from esper.contracts.blueprint import Blueprint
from esper.contracts.run import FieldReport
from esper.mesh.database import Database
from esper.mesh.wire_store import WireStore

SCHEMA_VERSION: Final = 1
"""Version of the tables."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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

    async def designs(self) -> dict[str, Blueprint]:
        """Give every design that reads, by content id."""
        async with self._database.reading() as session:
            rows = (await session.scalars(select(DesignRow))).all()
        found = {row.blueprint_id: self.read(row.payload, row.crc32, Blueprint, row.blueprint_id) for row in rows}
        return {name: design for name, design in found.items() if design is not None}

    async def add_report(self, report: FieldReport) -> bool:
        """Keep a report; false when one with its id is there already."""
        payload = wire.serialize(report)
        row = self._database.insert(ReportRow).values(
            report_id=report.report_id,
            received_us=round((datetime.now(UTC) - _EPOCH).total_seconds() * 1e6),
            payload=payload,
            crc32=zlib.crc32(payload),
        )
        async with self._database.session() as session:
            added = await session.scalar(row.on_conflict_do_nothing().returning(ReportRow.report_id))
        return added is not None

    async def has_report(self, report_id: str) -> bool:
        """Say whether a report is kept."""
        async with self._database.reading() as session:
            return await session.get(ReportRow, report_id) is not None

    async def reports(self) -> list[FieldReport]:
        """Give every report that reads, in the order in which they came."""
        async with self._database.reading() as session:
            rows = (await session.scalars(select(ReportRow).order_by(ReportRow.received_us, ReportRow.report_id))).all()
        read = [self.read(row.payload, row.crc32, FieldReport, row.report_id) for row in rows]
        return [report for report in read if report is not None]

    async def num_reports(self) -> int:
        """Give how many reports are kept."""
        async with self._database.reading() as session:
            return int(await session.scalar(select(func.count()).select_from(ReportRow)) or 0)


async def open_store(url: str) -> KarnStore:
    """Open the store at a database URL.

    Raises:
        CorruptDataError: The store is damaged.
        InvalidStateError: The tables are those of another version.
        UnavailableError: The store cannot be reached.
    """
    store = KarnStore(Database.open(url))
    try:
        await store.prepare()
    except BaseException:
        await store.database.close()
        raise
    return store
