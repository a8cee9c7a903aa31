"""A Tezzeret of an older version as a process of its own: its kernels are made by another recipe, so have other keys.

``python -m tests.integration.older_tezzeret NATS_URL URZA_ADDRESS DATABASE_URL KEY_DIRECTORY ACK_WAIT_S``; it says
``warm`` and works until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from esper.execution.keys import SigningKey
from esper.mesh import open_channel
from esper.mesh.database import Database
from esper.services.tezzeret import content_key
from esper.services.tezzeret.config import TezzeretConfig, WorkerPoolConfig
from esper.services.tezzeret.job_store import JobStore
from esper.services.tezzeret.pool import WorkerPool
from esper.services.tezzeret.service import TezzeretService
from esper.telemetry import NatsBus
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

OLDER_RECIPE: Final = "1"
"""Recipe of its compiler."""


async def _serve(nats_url: str, urza_address: str, database_url: str, keys: str, ack_wait_s: str) -> None:
    async with AsyncExitStack() as leaving:
        bus = await leaving.enter_async_context(await NatsBus.connect(nats_url))
        urza = UrzaServiceStub(await leaving.enter_async_context(open_channel(urza_address)))
        database = await leaving.enter_async_context(Database.open(database_url))
        pool = WorkerPool(WorkerPoolConfig(mode="inline"))
        leaving.push_async_callback(pool.close)
        signer = SigningKey.load_or_create(Path(keys))
        config = TezzeretConfig(ack_wait_s=float(ack_wait_s), drain_s=0.5)
        service = TezzeretService(JobStore(database), bus, pool, urza, signer, config)
        await service.start()
        leaving.push_async_callback(service.close)
        await service.warm()
        sys.stdout.write("warm\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    """Be the older Tezzeret."""
    content_key._RECIPE = OLDER_RECIPE  # type: ignore[misc] # before anybody asks for the toolchain
    asyncio.run(_serve(*sys.argv[1:]))


if __name__ == "__main__":
    main()
