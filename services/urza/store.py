"""The store behind both faces of the library: one database, three parts."""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts.errors import ConfigError
from esper.execution.artifact import MAX_ARTIFACT_BYTES
from esper.execution.keys import KeyRing
from esper.mesh.database import Database
from esper.services.urza.blueprint_store import BlueprintStore
from esper.services.urza.kernel_store import KernelStore
from esper.services.urza.migrate import migrate
from esper.services.urza.report_store import ReportStore

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """How much the library may hold."""

    max_blueprints: int = 100_000
    """Most blueprints, all versions counted."""
    max_kernel_bytes: int = MAX_ARTIFACT_BYTES
    """Largest serialised kernel, in bytes."""
    max_stored_bytes: int = 64 * 1024 * _MIB
    """Most bytes of kernels altogether."""

    def __post_init__(self) -> None:
        for name in ("max_blueprints", "max_kernel_bytes", "max_stored_bytes"):
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
    ) -> None:
        """Build the store over an open database.

        Args:
            database: Where everything rests; the caller closes it.
            key_ring: Whose signatures kernels must carry; ``None`` checks digests alone.
            limits: How much the store may hold.
            token_key: Secret that signs page tokens, at most 64 bytes; equal in all replicas.
        """
        limits = limits or StoreLimits()
        self._database = database
        self.blueprints = BlueprintStore(database, max_blueprints=limits.max_blueprints, token_key=token_key)
        """Blueprints: versions, tags, genealogy, life cycle."""
        self.kernels = KernelStore(
            database,
            key_ring=key_ring,
            max_kernel_bytes=limits.max_kernel_bytes,
            max_stored_bytes=limits.max_stored_bytes,
            token_key=token_key,
        )
        """Kernels: manifests and bytes."""
        self.reports = ReportStore(database)
        """Field reports and what they add up to."""

    async def migrate(self) -> None:
        """Bring the tables to this build's form.

        Raises:
            InvalidStateError: A newer build has written them.
            UnavailableError: The database cannot be reached.
        """
        await migrate(self._database)

    async def ping(self) -> None:
        """Return when the database answers.

        Raises:
            UnavailableError: It does not.
        """
        await self._database.ping()
