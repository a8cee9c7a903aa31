"""``grpc.health.v1`` with readiness that is measured: probes are asked at an interval, and a drain ends every watch."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper.contracts.errors import NotFoundError

log = logging.getLogger(__name__)

ReadinessProbe = Callable[[], bool | Awaitable[bool | None] | None]
"""Tells whether a service can do its work: ``False`` or an exception says no, ``True`` or ``None`` says yes."""

OVERALL: Final = ""
"""The name under which the server as a whole is asked; it serves when every service does."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers Check, List and Watch from the state of each service. Belongs to one event loop.

    A service is SERVING when it was not set aside by `set_ready` and all of its probes said yes last time.
    """

    def __init__(self, *, probe_interval_s: float, probe_deadline_s: float) -> None:
        self._probe_interval_s = probe_interval_s
        self._probe_deadline_s = probe_deadline_s
        self._probes: dict[str, tuple[ReadinessProbe, ...]] = {}
        self._by_hand: dict[str, bool] = {}
        self._reasons: dict[str, str] = {}
        self._draining = False
        self._changed = asyncio.Event()

    def add(self, service: str, probes: Sequence[ReadinessProbe]) -> None:
        """Add a service with its probes; it is NOT_SERVING until they were asked once."""
        self._probes[service] = (*self._probes.get(service, ()), *probes)
        self._by_hand[service] = True
        if self._probes[service]:
            self._reasons[service] = "its readiness probes were not asked yet"

    def set_ready(self, service: str, ready: bool) -> None:
        """Set a service aside, or let its probes decide again.

        Raises:
            NotFoundError: the server has no such service.
        """
        if service not in self._by_hand:
            known = ", ".join(self._by_hand)
            raise NotFoundError(f"service must be one of {known}, got {service!r}", parameter="service")
        self._by_hand[service] = ready
        self._announce()

    def is_serving(self, service: str) -> bool:
        """Tell whether a service, or the whole server for the empty name, takes calls now."""
        names = self._by_hand if service == OVERALL else (service,)
        return not self._draining and all(self._by_hand[name] and name not in self._reasons for name in names)

    @property
    def not_ready_reasons(self) -> dict[str, str]:
        """Why services are not ready, by name, as their probes said last; empty when all are."""
        return dict(self._reasons)

    def enter_drain(self) -> None:
        """Answer NOT_SERVING from now on, and end every watch after saying so."""
        self._draining = True
        self._announce()

    async def probe_once(self) -> None:
        """Ask every probe of every service, all at once, and take the answers over."""
        names = list(self._probes)
        answers = await asyncio.gather(*(self._ask_all(name) for name in names))
        before = dict(self._reasons)
        self._reasons = {name: reason for name, reason in zip(names, answers, strict=True) if reason is not None}
        for name in before.keys() ^ self._reasons.keys():
            reason = self._reasons.get(name)
            log.info("readiness_changed", extra={"rpc_service": name, "ready": reason is None, "reason": reason})
        if before.keys() != self._reasons.keys():
            self._announce()

    async def probe_forever(self) -> None:
        """Ask the probes at the configured interval until cancelled."""
        while True:
            await asyncio.sleep(self._probe_interval_s)
            await self.probe_once()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give the state of one service; NOT_FOUND for an unknown one."""
        if request.service != OVERALL and request.service not in self._by_hand:
            raise NotFoundError(f"service must be one this server offers, got {request.service!r}", parameter="service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give the state of every service and of the whole."""
        response = health_pb2.HealthListResponse()
        for name in (OVERALL, *self._by_hand):
            response.statuses[name].status = self._status(name)
        return response

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """Give the state now and at every change, until the caller leaves or the server drains."""
        last: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            if self._draining:
                return
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service != OVERALL and service not in self._by_hand:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return _SERVING if self.is_serving(service) else _NOT_SERVING

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _ask_all(self, service: str) -> str | None:
        """Give why the service is not ready, or ``None`` when it is."""
        reasons = await asyncio.gather(*(self._ask(probe) for probe in self._probes[service]))
        return next((reason for reason in reasons if reason is not None), None)

    async def _ask(self, probe: ReadinessProbe) -> str | None:
        try:
            async with asyncio.timeout(self._probe_deadline_s):
                answer = probe()
                if inspect.isawaitable(answer):
                    answer = await answer
        except TimeoutError:
            return f"a readiness probe gave no answer within {self._probe_deadline_s} s"
        except Exception as error:  # noqa: BLE001 -- whatever keeps a probe from answering means not ready
            return f"{type(error).__name__}: {error}"
        return "a readiness probe said no" if answer is False else None


async def check_health(channel: grpc.aio.Channel, service: str, deadline_s: float) -> bool:
    """Ask a server over an open plain channel whether ``service`` is SERVING. Raises what the call raises."""
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=deadline_s)
    return bool(response.status == _SERVING)
