"""Tables of the library; `migrations` builds the same ones, and a test holds the two against each other.

Every moment is a whole number of microseconds since 1970 (UTC), and every name sorts by its bytes, so that both
databases keep and order the same values. What travels as one value rests as its wire bytes; columns beside them are
for finding it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PREFIX = "urza_"
"""What every table name begins with; several services may share one database."""


def byte_ordered(length: int) -> String:
    """Give a text type that sorts by its bytes on every database."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


class Base(DeclarativeBase):
    """Base of the library's tables."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class BlueprintNameRow(Base):
    """One name with its newest version; its row lock puts writers of one name in line."""

    __tablename__ = "urza_blueprint_names"

    name: Mapped[str] = mapped_column(byte_ordered(128), primary_key=True)
    newest_version: Mapped[int] = mapped_column(Integer)


class BlueprintRow(Base):
    """One immutable version of a blueprint; only its state changes."""

    __tablename__ = "urza_blueprints"
    __table_args__ = (
        UniqueConstraint("name", "version"),
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint("state BETWEEN 1 AND 5", name="state"),
        Index(None, "state"),
    )

    id: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)
    """Content id."""
    name: Mapped[str] = mapped_column(byte_ordered(128), ForeignKey("urza_blueprint_names.name"))
    version: Mapped[int] = mapped_column(Integer)
    state: Mapped[int] = mapped_column(Integer)
    ir: Mapped[bytes] = mapped_column(LargeBinary)
    """Canonical bytes of the graph."""
    blueprint_metadata: Mapped[bytes] = mapped_column("metadata", LargeBinary)
    """Wire bytes of the metadata."""
    lineage: Mapped[bytes] = mapped_column(LargeBinary)
    """Wire bytes of the lineage."""
    searchable: Mapped[str] = mapped_column(Text)
    """Name and description, case folded."""
    site_kinds: Mapped[int] = mapped_column(Integer)
    """One bit per kind it is meant for; 0 means every kind."""
    created_at_us: Mapped[int] = mapped_column(BigInteger)


class TagRow(Base):
    """One tag of one blueprint."""

    __tablename__ = "urza_blueprint_tags"
    __table_args__ = (Index(None, "tag"),)

    blueprint_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    tag: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)


class LineageRow(Base):
    """One edge of the genealogy."""

    __tablename__ = "urza_blueprint_parents"
    __table_args__ = (Index(None, "parent_id"),)

    child_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    parent_id: Mapped[str] = mapped_column(byte_ordered(64), ForeignKey("urza_blueprints.id"), primary_key=True)


class StateChangeRow(Base):
    """One step of a blueprint's life cycle."""

    __tablename__ = "urza_state_changes"

    blueprint_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Number of the step, from 1."""
    from_state: Mapped[int | None] = mapped_column(Integer)
    to_state: Mapped[int] = mapped_column(Integer)
    actor: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    changed_at_us: Mapped[int] = mapped_column(BigInteger)


class KernelRow(Base):
    """One stored kernel; its bytes are in `KernelChunkRow`."""

    __tablename__ = "urza_kernels"
    __table_args__ = (
        UniqueConstraint("content_key"),
        Index(None, "blueprint_id"),
        Index("ix_urza_kernels_newest", "stored_at_us", "artifact_id"),
    )

    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), primary_key=True)
    content_key: Mapped[str] = mapped_column(byte_ordered(64))
    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    """Serialised manifest, as signed."""
    key_id: Mapped[str] = mapped_column(String(16))
    """Id of the signing key."""
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[bytes] = mapped_column(LargeBinary)
    """Digest of the serialised artefact."""
    stored_at_us: Mapped[int] = mapped_column(BigInteger)


class KernelChunkRow(Base):
    """One piece of a kernel's serialised artefact; all but the last have the same size."""

    __tablename__ = "urza_kernel_chunks"

    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), primary_key=True)
    index: Mapped[int] = mapped_column("chunk_index", Integer, primary_key=True)
    """Number of the piece, from 0."""
    data: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (ForeignKeyConstraint(["artifact_id"], ["urza_kernels.artifact_id"], ondelete="CASCADE"),)


class FieldReportRow(Base):
    """One field report, as it came."""

    __tablename__ = "urza_field_reports"
    __table_args__ = (Index(None, "blueprint_id"),)

    report_id: Mapped[str] = mapped_column(byte_ordered(128), primary_key=True)
    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64))
    """Empty where no blueprint was used."""
    outcome: Mapped[int] = mapped_column(Integer)
    contribution: Mapped[float | None] = mapped_column(Double)
    report: Mapped[bytes] = mapped_column(LargeBinary)
    """Wire bytes of the report."""
    recorded_at_us: Mapped[int] = mapped_column(BigInteger)


class StatisticsRow(Base):
    """What the reports of one blueprint add up to; kept for blueprints that are not (or not yet) stored, too."""

    __tablename__ = "urza_statistics"

    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)
    trials: Mapped[int] = mapped_column(BigInteger)
    kept: Mapped[int] = mapped_column(BigInteger)
    contribution_sum: Mapped[float] = mapped_column(Double)
    contribution_count: Mapped[int] = mapped_column(BigInteger)
