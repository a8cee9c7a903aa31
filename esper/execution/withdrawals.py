"""Kernels that the library no longer offers, told to every process that may hold one near.

    subject   ``esper.v1.jobs.withdrawn``: a ``KernelReady`` that names a kernel, and in ``error`` why it is none

It is fan-out and never stored: a process that begins later has nothing in its first tier, and one that was cut off from
the bus keeps what it holds until it ends. A kernel that is announced again is a kernel again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from esper.contracts.errors import CorruptDataError, EsperError
from esper.telemetry.bus import CONTENT_TYPE_HEADER, Bus, Subscription
from esper.telemetry.consumer import content_type, decode
from esper.telemetry.subjects import PREFIX
from esper.v1 import kernel_pb2

log = logging.getLogger(__name__)

SUBJECT: Final = f"{PREFIX}.jobs.withdrawn"
"""Where the library says which kernels it no longer offers; no run can be named ``jobs``."""


class KernelHolder(Protocol):
    """What keeps kernels near."""

    async def withdraw(self, artifact_id: str, reason: str) -> None:
        """Let go of a kernel that the library no longer offers."""


async def tell_withdrawn(bus: Bus, artifact_ids: Sequence[str], reason: str) -> None:
    """Say that the library no longer offers some kernels; a bus that is away is logged, and nothing else."""
    headers = {CONTENT_TYPE_HEADER: content_type(kernel_pb2.KernelReady)}
    for artifact_id in artifact_ids:
        said = kernel_pb2.KernelReady(artifact_id=artifact_id, error=reason)
        try:
            await bus.publish(SUBJECT, said.SerializeToString(), headers=headers)
        except EsperError as error:
            log.warning("withdrawal_untold", extra={"artifact_id": artifact_id, "error": str(error)})


class WithdrawalFollower:
    """Has a holder let go of what the library withdraws, from `start` to `close`; belongs to one event loop."""

    def __init__(self, bus: Bus, holder: KernelHolder) -> None:
        """Follow a bus, which is closed with the follower."""
        self._bus = bus
        self._holder = holder
        self._subscription: Subscription | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow; live once this returns.

        Raises:
            UnavailableError: The bus cannot be reached.
        """
        self._subscription = await self._bus.subscribe(SUBJECT)
        self._following = asyncio.create_task(self._follow(self._subscription), name="kernel-withdrawals")

    async def close(self) -> None:
        """Follow no more, and close the bus. Idempotent."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.close()
        await self._bus.close()

    async def _follow(self, subscription: Subscription) -> None:
        async for raw in subscription:
            try:
                said = decode(raw, kernel_pb2.KernelReady)
                await self._holder.withdraw(said.artifact_id, said.error)
            except CorruptDataError as error:
                log.warning("withdrawal_unread", extra={"error": str(error)})
            except EsperError as error:
                log.warning("withdrawal_refused", extra={"artifact_id": said.artifact_id, "error": str(error)})
