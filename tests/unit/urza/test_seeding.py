"""Templates of one release after another, and blueprints that rot, on SQLite."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from esper.mesh.database import Database
from esper.testing.urza_rot_contract import RotContract
from esper.testing.urza_seeding_contract import SeedingContract, ShippedAgainContract, UnshippedContract
from esper.testing.urza_template import lay_out


@pytest.fixture
async def database() -> AsyncIterator[Database]:
    async with Database.open("sqlite://") as opened:
        await lay_out(opened)
        yield opened


class TestSeeding(SeedingContract):
    pass


class TestUnshipped(UnshippedContract):
    pass


class TestShippedAgain(ShippedAgainContract):
    pass


class TestRot(RotContract):
    pass
