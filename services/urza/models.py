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
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from esper.services.urza.byte_text import ByteText

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
    set_aside_at_us: Mapped[int | None] = mapped_column(BigInteger)
    """When it was found to have rotted; no listing holds it from then on. Absent for a sound one."""


class RottenBlueprintRow(Base):
    """What a blueprint's row held when it was found to have rotted: for people to look into, never served."""

    __tablename__ = "urza_rotten_blueprints"

    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)
    found_at_us: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    found: Mapped[str] = mapped_column(Text)
    """What did not hold, in words."""
    name: Mapped[str] = mapped_column(byte_ordered(128))
    version: Mapped[int] = mapped_column(Integer)
    state: Mapped[int] = mapped_column(Integer)
    ir: Mapped[bytes] = mapped_column(LargeBinary)
    blueprint_metadata: Mapped[bytes] = mapped_column("metadata", LargeBinary)
    lineage: Mapped[bytes] = mapped_column(LargeBinary)
    created_at_us: Mapped[int] = mapped_column(BigInteger)


class TagRow(Base):
    """One tag of one blueprint."""

    __tablename__ = "urza_blueprint_tags"
    __table_args__ = (Index(None, "tag", "blueprint_id"),)

    blueprint_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    tag: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)


class CostRow(Base):
    """Cost of one blueprint at the reference site of one kind; there is none where it is not legal or not meant."""

    __tablename__ = "urza_blueprint_costs"
    __table_args__ = (Index(None, "parameters", "blueprint_id"), Index(None, "flops", "blueprint_id"))

    blueprint_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    site_kind: Mapped[int] = mapped_column(Integer, primary_key=True)
    parameters: Mapped[int] = mapped_column(BigInteger)
    flops: Mapped[int] = mapped_column(BigInteger)


class TotalRow(Base):
    """How many of something there are, counted as they come; counting them anew would take longer with each."""

    __tablename__ = "urza_totals"

    name: Mapped[str] = mapped_column(byte_ordered(32), primary_key=True)
    total: Mapped[int] = mapped_column(BigInteger)


BLUEPRINTS = "blueprints"
"""Name of the total of blueprints, all versions counted."""
RELEASES = "template_releases"
"""Name of the total of releases that have seeded the library; its row lock puts them in line."""


class TemplateReleaseRow(Base):
    """One release whose templates were put into the library."""

    __tablename__ = "urza_template_releases"

    digest: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)
    """Digest over the release and its templates."""
    sequence: Mapped[int] = mapped_column(BigInteger)
    """Which one it was, from 1, by when it came first."""


class LineageRow(Base):
    """One edge of the genealogy."""

    __tablename__ = "urza_blueprint_parents"
    __table_args__ = (Index(None, "parent_id"),)

    child_id: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_blueprints.id", ondelete="CASCADE"), primary_key=True
    )
    parent_id: Mapped[str] = mapped_column(byte_ordered(64), ForeignKey("urza_blueprints.id"), primary_key=True)


REGISTRY = "registry"
"""Who stores the templates that ship with Esper."""
_OF_REGISTRY = text(f"sequence = 1 AND actor = '{REGISTRY}'")


class StateChangeRow(Base):
    """One step of a blueprint's life cycle."""

    __tablename__ = "urza_state_changes"
    __table_args__ = (
        Index(
            "ix_urza_state_changes_of_registry",
            "blueprint_id",
            sqlite_where=_OF_REGISTRY,
            postgresql_where=_OF_REGISTRY,
        ),
    )

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
    """One stored kernel; its bytes are in `KernelChunkRow`, or outside under its `copy_id`.

    Every column is under `row_sha256`, and text is read as bytes: rot in any of them is found by whoever reads it.
    """

    __tablename__ = "urza_kernels"
    __table_args__ = (
        UniqueConstraint("content_key"),
        Index(None, "blueprint_id"),
        Index(None, "use_key"),
        Index(None, "sha256"),
        Index("ix_urza_kernels_newest", "stored_at_us", "artifact_id"),
    )

    artifact_id: Mapped[str] = mapped_column(ByteText(33), primary_key=True)
    content_key: Mapped[str] = mapped_column(ByteText(64))
    blueprint_id: Mapped[str] = mapped_column(ByteText(64))
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    """Serialised manifest, as signed."""
    key_id: Mapped[str] = mapped_column(ByteText(16))
    """Id of the signing key."""
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[bytes] = mapped_column(LargeBinary)
    """Digest of the serialised artefact."""
    stored_at_us: Mapped[int] = mapped_column(BigInteger)
    copy_id: Mapped[str] = mapped_column(ByteText(32), server_default="")
    """Which copy of the bytes: new for every time that a kernel is stored, even one of the same id."""
    outside: Mapped[int] = mapped_column(Integer, server_default="0")
    """Whether the bytes rest outside the database: 0 or 1."""
    piece_crcs: Mapped[bytes] = mapped_column(LargeBinary, server_default="")
    """CRC-32 of every piece of bytes that rest outside, 4 bytes each, big-endian; else empty."""
    use_key: Mapped[str] = mapped_column(ByteText(64), server_default="")
    """What it is for: equal for kernels of one blueprint, site, target and device, of any toolchain."""
    row_sha256: Mapped[bytes] = mapped_column(LargeBinary, server_default="")
    """Digest of all other columns (`kernel_rows.row_digest`)."""


class KernelChunkRow(Base):
    """One piece of a kernel's serialised artefact; all but the last have the same size."""

    __tablename__ = "urza_kernel_chunks"

    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), primary_key=True)
    index: Mapped[int] = mapped_column("chunk_index", Integer, primary_key=True)
    """Number of the piece, from 0."""
    data: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (ForeignKeyConstraint(["artifact_id"], ["urza_kernels.artifact_id"], ondelete="CASCADE"),)


class KernelPinRow(Base):
    """A kernel that no sweep may take; outlives the kernel, so that one built again is pinned again."""

    __tablename__ = "urza_kernel_pins"

    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), primary_key=True)
    actor: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    pinned_at_us: Mapped[int] = mapped_column(BigInteger)


class LooseBlobRow(Base):
    """Bytes outside the database that no kernel row speaks of: not yet, because a write is under way, or no longer."""

    __tablename__ = "urza_loose_blobs"

    copy_id: Mapped[str] = mapped_column(byte_ordered(32), primary_key=True)
    loose_since_us: Mapped[int] = mapped_column(BigInteger)


class UploadRow(Base):
    """One upload that is not complete; its bytes so far are in `UploadPieceRow`."""

    __tablename__ = "urza_uploads"

    sha256: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)
    """Digest of the whole as the sender announced it, in hex."""
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    """Size of the whole as the sender announced it."""
    held_bytes: Mapped[int] = mapped_column(BigInteger)
    """Bytes kept, from the start without a gap."""
    touched_at_us: Mapped[int] = mapped_column(BigInteger)
    """When the last piece came."""


class UploadPieceRow(Base):
    """One kept piece of an upload; all have the same size."""

    __tablename__ = "urza_upload_pieces"

    sha256: Mapped[str] = mapped_column(
        byte_ordered(64), ForeignKey("urza_uploads.sha256", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column("piece_index", Integer, primary_key=True)
    """Number of the piece, from 0."""
    data: Mapped[bytes] = mapped_column(LargeBinary)
    crc32: Mapped[int] = mapped_column(BigInteger)


class FieldReportRow(Base):
    """One field report, as it came; what a pruned one said is gone, its id stays so that it still counts once."""

    __tablename__ = "urza_field_reports"
    __table_args__ = (Index(None, "blueprint_id"), Index(None, "artifact_id"), Index(None, "recorded_at_us"))

    report_id: Mapped[str] = mapped_column(byte_ordered(128), primary_key=True)
    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64))
    """Empty where no blueprint was used."""
    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), server_default="")
    """Kernel it speaks of; empty where none was loaded."""
    outcome: Mapped[int] = mapped_column(Integer)
    contribution: Mapped[float | None] = mapped_column(Double)
    report: Mapped[bytes] = mapped_column(LargeBinary)
    """Wire bytes of the report; empty once it was pruned."""
    recorded_at_us: Mapped[int] = mapped_column(BigInteger)


class _Counts:
    """What reports add up to; a sum and a count of those who had the figure make a mean."""

    trials: Mapped[int] = mapped_column(BigInteger)
    kept: Mapped[int] = mapped_column(BigInteger)
    contribution_sum: Mapped[float] = mapped_column(Double)
    contribution_count: Mapped[int] = mapped_column(BigInteger)
    latency_ms_sum: Mapped[float] = mapped_column(Double, server_default="0")
    latency_count: Mapped[int] = mapped_column(BigInteger, server_default="0")


class StatisticsRow(_Counts, Base):
    """What the reports of one blueprint add up to; kept for blueprints that are not (or not yet) stored, too."""

    __tablename__ = "urza_statistics"

    blueprint_id: Mapped[str] = mapped_column(byte_ordered(64), primary_key=True)


class KernelStatisticsRow(_Counts, Base):
    """What the reports of one kernel add up to; kept for kernels that are not, or no longer, stored, too."""

    __tablename__ = "urza_kernel_statistics"

    artifact_id: Mapped[str] = mapped_column(byte_ordered(33), primary_key=True)
