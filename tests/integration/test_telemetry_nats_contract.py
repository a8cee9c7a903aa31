from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper.telemetry.bus import Bus
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_server import NatsServer, NatsServerConfig
from esper.testing.bus_contract import BusContract, OpenBus


class TestNatsBus(BusContract):
    @pytest.fixture
    async def open_bus(self, tmp_path: Path) -> AsyncIterator[OpenBus]:
        opened: list[Bus] = []
        async with NatsServer(NatsServerConfig(store_dir=tmp_path)) as server:

            async def open_one() -> Bus:
                opened.append(await NatsBus.connect(server.url))
                return opened[-1]

            yield open_one
            for bus in opened:
                await bus.close()
