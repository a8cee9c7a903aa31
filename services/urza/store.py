"""The store behind both faces of the library: one database, three parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import ConfigError
from esper.execution.artifact import MAX_ARTIFACT_BYTES
from esper.execution.keys import KeyRing
from esper.mesh.database import Database
from esper.services.urza.blobs import Blobs
from esper.services.urza.blueprint_store import BlueprintStore
from esper.services.urza.clock import now_us
from esper.services.urza.kernel_store import KernelLimits, KernelStore, Withdrawn
from esper.services.urza.migrate import migrate
from esper.services.urza.report_store import ReportStore
from esper.services.urza.retention import Retention, RetentionPolicy
from esper.services.urza.upload_store import UploadStore

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """How much the library may hold."""

    max_blueprints: int = 10_000_000
    """Most blueprints, all versions counted."""
    max_kernel_bytes: int = MAX_ARTIFACT_BYTES
    """Largest serialised kernel, in bytes."""
    max_stored_bytes: int = 64 * 1024 * _MIB
    """Most bytes of kernels altogether."""
    max_upload_bytes: int = 1024 * _MIB
    """Most bytes of unfinished uploads kept; beyond them an upload that breaks begins anew."""

    def __post_init__(self) -> None:
        for name in ("max_blueprints", "max_kernel_bytes", "max_stored_bytes", "max_upload_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}", parameter=name)


class UrzaStore:
    """Blueprints, kernels and field reports of the library. Belongs to one event loop, as its database does."""

    def __init__(
        self,
        database: Database,
        *,
        key_ring: KeyRing | None = None,
        limits: StoreLimits | None = None,
        token_key: bytes = b"",
        blobs: Blobs | None = None,
        retention: RetentionPolicy | None = None,
        clock: Callable[[], int] = now_us,
        withdrawn: Withdrawn | None = None,
    ) -> None:
        """Build the store over an open database.

        Args:
            database: Where everything rests; the caller closes it.
            key_ring: Whose signatures kernels must carry; ``None`` checks digests alone.
            limits: How much the store may hold.
            token_key: Secret that signs page tokens, at most 64 bytes; equal in all replicas.
            blobs: Where the bytes of kernels rest; ``None`` is the database. Kernels stay where they were stored.
            retention: What sweeps let go of.
            clock: Gives the present, in microseconds since 1970.
            withdrawn: Told of kernels that are no longer offered: removed, replaced, or of a blueprint that is
                deprecated or retired.
        """
        limits = limits or StoreLimits()
        self._database = database
        self._blobs = blobs
        self.blueprints = BlueprintStore(database, max_blueprints=limits.max_blueprints, token_key=token_key)
        """Blueprints: versions, tags, genealogy, life cycle."""
        self.blueprints.watch_state(self._note_state)
        self.kernels = KernelStore(
            database,
            key_ring=key_ring,
            limits=KernelLimits(max_kernel_bytes=limits.max_kernel_bytes, max_stored_bytes=limits.max_stored_bytes),
            token_key=token_key,
            blobs=blobs,
            clock=clock,
            withdrawn=withdrawn,
        )
        """Kernels: manifests and bytes."""
        self.uploads = UploadStore(database, max_bytes=limits.max_upload_bytes, clock=clock)
        """Uploads that are not complete."""
        self.reports = ReportStore(database, clock=clock)
        """Field reports and what they add up to."""
        self.retention = Retention(database, self.kernels, self.uploads, retention or RetentionPolicy(), clock=clock)
        """What the library lets go of."""

    async def _note_state(self, blueprint_id: str, state: BlueprintState) -> None:
        if state in (BlueprintState.DEPRECATED, BlueprintState.RETIRED):
            await self.kernels.withdraw_of(blueprint_id, f"its blueprint is {state.name.lower()}")

    async def migrate(self) -> None:
        """Bring the tables to this build's form, and make the place for bytes outside ready.

        Raises:
            InvalidStateError: A newer build has written them.
            UnavailableError: The database, or the place for bytes outside, cannot be reached.
        """
        await migrate(self._database)
        if self._blobs is not None:
            await self._blobs.prepare()

    async def ping(self) -> None:
        """Return when the database answers, and the place for bytes outside is there.

        Raises:
            UnavailableError: It is not so.
        """
        await self._database.ping()
        if self._blobs is not None:
            await self._blobs.ping()
