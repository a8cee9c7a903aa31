"""What the library lets go of, and when: kernels nobody refers to, reports' details, uploads that never went on.

A kernel is referred to while at least one of these holds:

    pinned     somebody said that it stays (`KernelStore.pin`)
    newest     its blueprint is ACTIVE, and it is the newest kernel for its use: blueprint, site, target, device
    reported   a field report of the last ``keep_reported_days`` names it
    young      it was stored within the last ``keep_young_days``: whoever asked for it may not have fetched it yet

Any other goes once it is older than ``keep_unreferenced_days``, or, oldest first, while all kernels together hold more
than ``max_bytes``. A kernel that went is no loss: it is compiled again when somebody asks for it. Every removal looks
at these conditions again, so that one that was pinned or reported meanwhile stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, not_, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import ConfigError
from esper.mesh.database import Database
from esper.services.urza.clock import now_us
from esper.services.urza.kernel_rows import delete_copy
from esper.services.urza.kernel_store import KernelStore
from esper.services.urza.models import (
    BlueprintRow,
    FieldReportRow,
    KernelChunkRow,
    KernelPinRow,
    KernelRow,
    LooseBlobRow,
)
from esper.services.urza.upload_store import UploadStore

log = logging.getLogger(__name__)

_DAY_US: Final = 24 * 3600 * 1_000_000
_HOUR_US: Final = 3600 * 1_000_000
_BATCH: Final = 16
"""Kernels of one transaction: a writer waits no longer than their removal takes."""
_MAX_KERNELS: Final = 2_000
_MAX_REPORTS: Final = 20_000
_MAX_BLOBS: Final = 2_000
"""Most of each kind in one sweep; the rest waits for the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionPolicy:
    """How long the library keeps what it need not keep; all times in days, as whole or broken numbers."""

    keep_unreferenced_days: float = 90.0
    """Age at which a kernel goes that nobody refers to; 0 for never."""
    max_bytes: int = 0
    """Bytes of kernels above which those that nobody refers to go, oldest first; 0 for no such bound."""
    keep_reported_days: float = 30.0
    """How long a field report keeps its kernel. At most ``keep_reports_days`` where that is set."""
    keep_young_days: float = 1.0
    """How long a new kernel is kept whatever else holds."""
    keep_reports_days: float = 365.0
    """Age at which what a field report said is dropped; its count in the statistics and its id stay. 0 for never."""
    keep_uploads_days: float = 1.0
    """How long the pieces of an upload are kept to which nothing comes. Above 0."""

    def __post_init__(self) -> None:
        for name in ("keep_unreferenced_days", "max_bytes", "keep_reported_days", "keep_young_days"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}", parameter=name)
        if not self.keep_reports_days >= 0:
            raise ConfigError(
                f"keep_reports_days must be >= 0 days, got {self.keep_reports_days}", parameter="keep_reports_days"
            )
        if not self.keep_uploads_days > 0:
            raise ConfigError(
                f"keep_uploads_days must be > 0 days, got {self.keep_uploads_days}", parameter="keep_uploads_days"
            )
        if self.keep_reports_days and self.keep_reported_days > self.keep_reports_days:
            raise ConfigError(
                f"keep_reported_days must be at most keep_reports_days ({self.keep_reports_days}), got "
                f"{self.keep_reported_days}",
                parameter="keep_reported_days",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What one sweep let go of, or would have."""

    kernel_ids: tuple[str, ...] = ()
    """Kernels, in the order they went: by age, oldest first, then for their bytes."""
    kernel_bytes: int = 0
    """Bytes that those kernels held."""
    held_bytes: int = 0
    """Bytes of kernels that the library holds after it."""
    reports: int = 0
    """Field reports whose details went."""
    uploads: int = 0
    """Uploads that were dropped."""
    blobs: int = 0
    """Copies outside the database that were deleted."""


class Retention:
    """Sweeps one library. Safe for many tasks of one event loop, and for many replicas of one database."""

    def __init__(
        self,
        database: Database,
        kernels: KernelStore,
        uploads: UploadStore,
        policy: RetentionPolicy,
        *,
        clock: Callable[[], int] = now_us,
    ) -> None:
        self._database = database
        self._kernels = kernels
        self._uploads = uploads
        self._policy = policy
        self._clock = clock

    async def sweep(self) -> Swept:
        """Let go of everything that may go, within the bounds of one sweep.

        Raises:
            UnavailableError: The database cannot be reached. What went is gone, the rest waits for the next sweep.
        """
        now = self._clock()
        kernel_ids: list[str] = []
        removed_bytes = 0
        while len(kernel_ids) < _MAX_KERNELS:
            gone = await self._remove_batch(now)
            kernel_ids += [row.artifact_id for row in gone]
            removed_bytes += sum(row.size_bytes for row in gone)
            if len(gone) < _BATCH:
                break
        await self._drop_stray_chunks()
        swept = Swept(
            kernel_ids=tuple(kernel_ids),
            kernel_bytes=removed_bytes,
            held_bytes=await self._held_bytes(),
            reports=await self._prune_reports(now),
            uploads=await self._uploads.drop_older(now - _days_us(self._policy.keep_uploads_days)),
            blobs=await self._delete_loose_blobs(now),
        )
        counts = {"kernels": len(kernel_ids), "kernel_bytes": removed_bytes, "held_bytes": swept.held_bytes}
        log.info("library_swept", extra=counts | {"reports": swept.reports, "uploads": swept.uploads})
        return swept

    async def preview(self) -> Swept:
        """Say which kernels a sweep would let go of now; nothing is changed, and the other counts are 0."""
        now = self._clock()
        async with self._database.reading() as session:
            held = int(await session.scalar(select(func.coalesce(func.sum(KernelRow.size_bytes), 0))) or 0)
            found = (await session.scalars(self._too_old(now).limit(_MAX_KERNELS))).all()
            known = {row.artifact_id for row in found}
            excess = self._excess(held - sum(row.size_bytes for row in found))
            going = list(found)
            if excess > 0:
                for row in (await session.scalars(self._candidates(now).limit(_MAX_KERNELS))).all():
                    if excess <= 0 or len(going) >= _MAX_KERNELS:
                        break
                    if row.artifact_id not in known:
                        going.append(row)
                        excess -= row.size_bytes
        kernel_bytes = sum(row.size_bytes for row in going)
        return Swept(
            kernel_ids=tuple(row.artifact_id for row in going),
            kernel_bytes=kernel_bytes,
            held_bytes=held - kernel_bytes,
        )

    async def _remove_batch(self, now: int) -> list[KernelRow]:
        """Remove up to a batch of kernels in one transaction, those too old before those beyond the bytes."""
        gone: list[KernelRow] = []
        async with self._database.session() as session:
            # Replicas pass over what another one has locked; SQLite has one writer anyway.
            old = (await session.scalars(self._too_old(now).limit(_BATCH).with_for_update(skip_locked=True))).all()
            gone += [row for row in old if await self._remove(session, row, now)]
            held = int(await session.scalar(select(func.coalesce(func.sum(KernelRow.size_bytes), 0))) or 0)
            excess = self._excess(held)
            if not gone and excess > 0:
                found = self._candidates(now).limit(_BATCH).with_for_update(skip_locked=True)
                for row in (await session.scalars(found)).all():
                    if excess > 0 and await self._remove(session, row, now):
                        gone.append(row)
                        excess -= row.size_bytes
        for row in gone:
            extra = {"artifact_id": row.artifact_id, "blueprint_id": row.blueprint_id, "size_bytes": row.size_bytes}
            log.info("kernel_swept", extra=extra)
            if row.outside:
                await self._kernels.discard(row.copy_id)
        await self._kernels.tell_withdrawn([row.artifact_id for row in gone], "swept from the library")
        return gone

    async def _remove(self, session: AsyncSession, row: KernelRow, now: int) -> bool:
        # The row is locked by now, and a pin waits for that lock: what this looks at can no longer change.
        return await delete_copy(session, row, now_us=now, provided=not_(self._referenced(now)))

    def _excess(self, held_bytes: int) -> int:
        return held_bytes - self._policy.max_bytes if self._policy.max_bytes else 0

    def _too_old(self, now: int) -> Select[KernelRow]:
        days = self._policy.keep_unreferenced_days
        before = now - _days_us(days) if days else -1
        return self._candidates(now).where(KernelRow.stored_at_us < before)

    def _candidates(self, now: int) -> Select[KernelRow]:
        """Give the kernels that nobody refers to, oldest first."""
        statement = select(KernelRow).where(not_(self._referenced(now)))
        return statement.order_by(KernelRow.stored_at_us, KernelRow.artifact_id)

    def _referenced(self, now: int) -> ColumnElement[bool]:
        newer = aliased(KernelRow)
        same_use = and_(newer.use_key == KernelRow.use_key, newer.artifact_id != KernelRow.artifact_id)
        later = tuple_(newer.stored_at_us, newer.artifact_id) > tuple_(KernelRow.stored_at_us, KernelRow.artifact_id)
        active = exists().where(
            BlueprintRow.id == KernelRow.blueprint_id, BlueprintRow.state == int(BlueprintState.ACTIVE)
        )
        reported_since = now - _days_us(self._policy.keep_reported_days)
        return or_(
            KernelRow.stored_at_us >= now - _days_us(self._policy.keep_young_days),
            exists().where(KernelPinRow.artifact_id == KernelRow.artifact_id),
            exists().where(
                FieldReportRow.artifact_id == KernelRow.artifact_id, FieldReportRow.recorded_at_us >= reported_since
            ),
            and_(active, not_(exists().where(same_use, later))),
        )

    async def _held_bytes(self) -> int:
        async with self._database.reading() as session:
            return int(await session.scalar(select(func.coalesce(func.sum(KernelRow.size_bytes), 0))) or 0)

    async def _drop_stray_chunks(self) -> None:
        """Remove pieces that no kernel row names; only rot leaves any."""
        kernels = select(KernelRow.artifact_id).where(KernelRow.artifact_id == KernelChunkRow.artifact_id)
        async with self._database.session() as session:
            stray = delete(KernelChunkRow).where(not_(kernels.exists()))
            await session.execute(stray.execution_options(synchronize_session=False))

    async def _prune_reports(self, now: int) -> int:
        """Drop what old reports said, in bounded steps; a report's id stays, so that it still counts once."""
        if not self._policy.keep_reports_days:
            return 0
        before = now - _days_us(self._policy.keep_reports_days)
        old = (
            select(FieldReportRow.report_id)
            .where(FieldReportRow.recorded_at_us < before, FieldReportRow.report != b"")
            .limit(_MAX_REPORTS)
        )
        pruned = (
            update(FieldReportRow)
            .where(FieldReportRow.report_id.in_(old))
            .values(report=b"")
            .returning(FieldReportRow.report_id)
            .execution_options(synchronize_session=False)
        )
        async with self._database.session() as session:
            return len((await session.execute(pruned)).all())

    async def _delete_loose_blobs(self, now: int) -> int:
        """Delete copies outside that no row names; a write under way has an hour to be named."""
        loose = select(LooseBlobRow.copy_id).where(LooseBlobRow.loose_since_us < now - _HOUR_US).limit(_MAX_BLOBS)
        async with self._database.reading() as session:
            copy_ids = (await session.scalars(loose)).all()
        deleted = 0
        for copy_id in copy_ids:
            if not await self._kernels.discard(copy_id):
                break
            deleted += 1
        return deleted


def _days_us(days: float) -> int:
    return int(days * _DAY_US)
