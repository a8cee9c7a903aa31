from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from esper.telemetry.bus import Bus
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.testing.bus_contract import BusContract, OpenBus


class TestMemoryBus(BusContract):
    @pytest.fixture
    async def open_bus(self) -> AsyncIterator[OpenBus]:
        broker = MemoryBroker()
        opened: list[Bus] = []

        async def open_one() -> Bus:
            opened.append(MemoryBus(broker))
            return opened[-1]

        yield open_one
        for bus in opened:
            await bus.close()
