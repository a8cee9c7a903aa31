"""Tamiyo's tables.

Packets and what was decided on them; reports and lessons, in the order in which they were learned; and what a decision
hung on besides: candidates, settings, and how much had been learned, so that it can be taken again (`replay.py`).

What stays small: of a run its newest `PACKETS_KEPT` packets are kept, each with one short row of `ChoiceRow`. What such
a row names is content-addressed and stored once for all packets and runs (`PartRow`): a blueprint, the blueprints of a
place, the places of a packet, settings. So parts grow with what Urza and Karn ever offered, as reports and decisions
do, and not with packets. Lists of places that no row names any more go with the packets that did.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, LargeBinary, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of Tamiyo's tables."""

    metadata = MetaData()


class SchemaRow(Base):
    """The version of the tables; one row."""

    __tablename__ = "tamiyo_schema"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()


class PacketRow(Base):
    """One state packet."""

    __tablename__ = "tamiyo_packets"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class DecisionRow(Base):
    """One decision."""

    __tablename__ = "tamiyo_decisions"
    __table_args__ = (Index("ix_tamiyo_decisions_newest", "created_us", "adaptation_id"),)

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    adaptation_id: Mapped[str] = mapped_column(String(33), unique=True)
    created_us: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class RivalRow(Base):
    """A decision of a race beyond its first."""

    __tablename__ = "tamiyo_rivals"
    __table_args__ = (
        Index("ix_tamiyo_rivals_newest", "created_us", "adaptation_id"),
        Index("ix_tamiyo_rivals_packet", "run_id", "sequence", "place"),
    )

    adaptation_id: Mapped[str] = mapped_column(String(33), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int] = mapped_column(BigInteger)
    place: Mapped[int] = mapped_column()
    created_us: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class ReportRow(Base):
    """One field report, as it came."""

    __tablename__ = "tamiyo_reports"
    __table_args__ = (Index("ix_tamiyo_reports_order", "received_us", "report_id"),)

    report_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64), index=True)
    received_us: Mapped[int] = mapped_column(BigInteger)
    family: Mapped[str] = mapped_column(String(32))
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class LessonRow(Base):
    """One adaptation that another policy learned from, as it came."""

    __tablename__ = "tamiyo_lessons"
    __table_args__ = (Index("ix_tamiyo_lessons_order", "received_us", "report_id"),)

    report_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(64), index=True)
    received_us: Mapped[int] = mapped_column(BigInteger)
    family: Mapped[str] = mapped_column(String(32))
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)
    decision: Mapped[bytes | None] = mapped_column(LargeBinary)
    decision_crc32: Mapped[int | None] = mapped_column(BigInteger)


class ChoiceRow(Base):
    """What the decision on one packet hung on besides the packet."""

    __tablename__ = "tamiyo_choices"
    __table_args__ = (Index("ix_tamiyo_choices_candidates", "candidates"),)

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    previous_sequence: Mapped[int] = mapped_column(BigInteger)
    moment_us: Mapped[int] = mapped_column(BigInteger)
    num_lessons: Mapped[int] = mapped_column(BigInteger)
    candidates: Mapped[str] = mapped_column(String(64))
    settings: Mapped[str] = mapped_column(String(64))


class PartRow(Base):
    """Something that choices name by the SHA-256 of its bytes."""

    __tablename__ = "tamiyo_parts"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    payload: Mapped[bytes] = mapped_column(LargeBinary)


class PlanRow(Base):
    """A plan with which a run gave up a decision that was pending."""

    __tablename__ = "tamiyo_plans"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    adaptation_id: Mapped[str] = mapped_column(String(33), primary_key=True)
    received_us: Mapped[int] = mapped_column(BigInteger)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)
