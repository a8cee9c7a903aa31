"""Releases of Esper that have put their templates into the library, in the order in which they came first.

A release may withdraw what another one shipped, or offer again what another one withdrew, only while no newer one is
known: in a rolling upgrade both start again and again, and the older one does not know the newer one's templates.
"""

# ruff: noqa: S608
from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.blueprint import BlueprintState
from esper.contracts.errors import InvalidTransitionError
from esper.mesh.database import Database
from esper.mesh.driver_reads import ReadScript, Statement
from esper.services.urza.blueprint_records import FIELDS, LISTED, SOURCE, BlueprintRecord
from esper.services.urza.models import REGISTRY, RELEASES, TemplateReleaseRow, TotalRow


class TemplateReleases:
    """The order of releases, and what the registry has stored. Safe for many replicas of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, digest: str) -> None:
        """Note a release that is about to store its templates; one that came before keeps its place."""
        async with self._database.session() as session:
            newest = await _held(session)
            if await session.get(TemplateReleaseRow, digest) is None:
                session.add(TemplateReleaseRow(digest=digest, sequence=newest + 1))
                await session.execute(update(TotalRow).where(TotalRow.name == RELEASES).values(total=newest + 1))
                await session.flush()

    async def require_newest(self, session: AsyncSession, digest: str) -> None:
        """Return when no release came after one that was registered; none can until the session has ended.

        Raises:
            InvalidTransitionError: One did.
        """
        newest = await _held(session)
        row = await session.get(TemplateReleaseRow, digest)
        if row is None or row.sequence != newest:
            place = "one that was never registered" if row is None else f"number {row.sequence}"
            raise InvalidTransitionError(
                f"release must be the newest one, number {newest}, for this step, got {place}", parameter="release"
            )

    async def is_newest(self, digest: str) -> bool:
        """Tell whether no release came after one that was registered."""
        return await self._database.read(_is_newest(digest))

    async def offered(self) -> tuple[BlueprintRecord, ...]:
        """Give every ACTIVE blueprint that the registry is said to have stored, at rest, by name and version."""
        return await self._database.read(_offered())


async def _held(session: AsyncSession) -> int:
    """Give the number of the newest release; until the session has ended, no other one comes."""
    held = select(TotalRow.total).where(TotalRow.name == RELEASES).with_for_update()
    return (await session.scalars(held)).one()


def _is_newest(digest: str) -> ReadScript[bool]:
    rows = yield Statement(
        f"SELECT r.sequence, t.total FROM urza_template_releases r, urza_totals t WHERE r.digest = $1 "
        f"AND t.name = '{RELEASES}'",
        (digest,),
    )
    return bool(rows) and rows[0][0] == rows[0][1]


def _offered() -> ReadScript[tuple[BlueprintRecord, ...]]:
    # The constants are those of a partial index, which holds the registry's rows alone.
    rows = yield Statement(
        f"SELECT {FIELDS} FROM {SOURCE} JOIN urza_state_changes c ON c.blueprint_id = b.id "
        f"WHERE c.sequence = 1 AND c.actor = '{REGISTRY}' AND b.state = {int(BlueprintState.ACTIVE)} AND {LISTED} "
        "ORDER BY b.name, b.version"
    )
    return tuple(BlueprintRecord(*row) for row in rows)
