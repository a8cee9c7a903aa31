"""Tamiyo: decisions, seed selection, the posterior."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from esper.client.paging import decoded
from esper.client.transport import AsyncTransport
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import AdaptationDecision
from esper.contracts.lesson import ImportedMemory, Lesson, Memory
from esper.contracts.replay import ReplayedPacket
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.contracts.wire import enum_to_wire, from_wire, to_message
from esper.v1 import blueprint_pb2, tamiyo_service_pb2, telemetry_pb2

_IMPORT_TIMEOUT_S: Final = 120.0
_MAX_LESSONS: Final = 100
_MAX_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedChoice:
    """A seed drawn from the posterior."""

    seed_index: int
    """Seed within its layer."""
    expected_reward: float
    """Mean of its posterior reward."""
    exploration_bonus: float
    """What the draw added for being uncertain."""
    explanation: str
    """Why, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """One decision with all that belongs to it."""

    decision: AdaptationDecision
    """The decision."""
    rivals: tuple[AdaptationDecision, ...]
    """The others of its race, in order."""
    reports: tuple[FieldReport, ...]
    """What became of it and its rivals, as far as it has ended."""
    lines: tuple[str, ...]
    """All of it in words."""


class AsyncTamiyoClient:
    """Calls of ``TamiyoService``."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def analyze(self, state: SystemStatePacket) -> AdaptationDecision:
        """Decide on one state packet; the same run and sequence give the same decision, the first of its race."""
        return (await self.analyze_race(state))[0]

    async def analyze_race(self, state: SystemStatePacket) -> tuple[AdaptationDecision, ...]:
        """Decide on one state packet, as :meth:`analyze`; give every decision of its race, or the one there is."""
        request = tamiyo_service_pb2.AnalyzeRequest(state=to_message(state, telemetry_pb2.SystemStatePacket))
        response = await self._transport.call("tamiyo", "Analyze", request)
        return tuple(from_wire(one, AdaptationDecision) for one in (response.decision, *response.rivals))

    async def select_seed(
        self, layer: str, rewards: Mapping[int, Sequence[float]], *, site: Site | None = None
    ) -> SeedChoice:
        """Draw one of a layer's available seeds; ``rewards`` holds what was seen at each, oldest first."""
        seeds = [
            tamiyo_service_pb2.SeedPerformance(seed_index=index, rewards=seen, available=True)
            for index, seen in rewards.items()
        ]
        request = tamiyo_service_pb2.SelectSeedRequest(layer=layer, seeds=seeds)
        if site is not None:
            request.site.CopyFrom(to_message(site, blueprint_pb2.Site))
        response = await self._transport.call("tamiyo", "SelectSeed", request)
        return SeedChoice(
            seed_index=response.seed_index,
            expected_reward=response.expected_reward,
            exploration_bonus=response.exploration_bonus,
            explanation=response.explanation,
        )

    async def submit_field_report(self, report: FieldReport) -> bool:
        """Teach an outcome; false when it had been learned before."""
        message = to_message(report, telemetry_pb2.FieldReport)
        request = tamiyo_service_pb2.SubmitFieldReportRequest(report=message)
        return bool((await self._transport.call("tamiyo", "SubmitFieldReport", request)).learned)

    async def list_decisions(self, run_id: str = "") -> AsyncIterator[AdaptationDecision]:
        """Give decisions, newest first, of one run or all."""
        request = tamiyo_service_pb2.ListDecisionsRequest(run_id=run_id)
        async for page in self._transport.pages("tamiyo", "ListDecisions", request):
            for decision in decoded(page.decisions, AdaptationDecision):
                yield decision

    async def explain(self, adaptation_id: str) -> Explanation:
        """Explain one decision in words and figures.

        Raises:
            NotFoundError: It is not one of this policy's.
        """
        request = tamiyo_service_pb2.ExplainRequest(adaptation_id=adaptation_id)
        response = await self._transport.call("tamiyo", "Explain", request)
        return Explanation(
            decision=from_wire(response.decision, AdaptationDecision),
            rivals=tuple(from_wire(one, AdaptationDecision) for one in response.rivals),
            reports=tuple(from_wire(one, FieldReport) for one in response.reports),
            lines=tuple(response.lines),
        )

    async def replay_run(self, run_id: str, *, present_settings: bool = False) -> AsyncIterator[ReplayedPacket]:
        """Take the decisions of a run again from what was recorded, packet by packet, and compare them.

        Args:
            run_id: Run.
            present_settings: Whether to decide with the settings that the service has now, in place of the recorded.

        Raises:
            NotFoundError: The run is unknown.
            InvalidStateError: Too little of it is recorded, or it was decided with what is not known any more.
            CorruptDataError: Something that is recorded no longer reads.
            CapacityExceededError: Too many replays are under way.
        """
        request = tamiyo_service_pb2.ReplayRunRequest(run_id=run_id, present_settings=present_settings)
        async for response in self._transport.stream("tamiyo", "ReplayRun", request):
            yield from_wire(response.packet, ReplayedPacket)

    async def get_posterior(self, site_kind: SiteKind | None = None) -> Sequence[tamiyo_service_pb2.PosteriorArm]:
        """Give the posterior by arm, best mean first."""
        request = tamiyo_service_pb2.GetPosteriorRequest()
        if site_kind is not None:
            number = enum_to_wire(site_kind, blueprint_pb2.SiteKind.DESCRIPTOR)
            request.site_kind = blueprint_pb2.SiteKind.ValueType(number)
        return tuple((await self._transport.call("tamiyo", "GetPosterior", request)).arms)

    async def export_memory(self, run_id: str = "") -> Memory:
        """Give all that the policy has learned, of one run or of all."""
        request = tamiyo_service_pb2.ExportMemoryRequest(run_id=run_id)
        lessons: list[Lesson] = []
        num_unreadable = model_version = calibration_version = 0
        async for page in self._transport.pages("tamiyo", "ExportMemory", request):
            lessons += decoded(page.lessons, Lesson)
            num_unreadable += page.unreadable
            model_version, calibration_version = page.model_version, page.calibration_version
        return Memory(
            lessons=tuple(lessons),
            model_version=model_version,
            calibration_version=calibration_version,
            num_unreadable=num_unreadable,
        )

    async def import_memory(self, lessons: Sequence[Lesson]) -> ImportedMemory:
        """Teach what another policy learned, in its order; what is known already is not learned again.

        Raises:
            EsperError: The service did not take a part of them; those before it are learned. Repeat it as it is.
        """
        learned = known = differing = 0
        for request in _requests(lessons):
            found = await self._transport.call("tamiyo", "ImportMemory", request, timeout_s=_IMPORT_TIMEOUT_S)
            learned, known = learned + found.learned, known + found.known
            differing += found.differing
        return ImportedMemory(learned=learned, known=known, differing=differing)


def _requests(lessons: Sequence[Lesson]) -> Iterator[tamiyo_service_pb2.ImportMemoryRequest]:
    """Give the lessons in requests that the service takes."""
    request, num_bytes = tamiyo_service_pb2.ImportMemoryRequest(), 0
    for lesson in lessons:
        message = to_message(lesson, tamiyo_service_pb2.Lesson)
        size = message.ByteSize()
        if request.lessons and (len(request.lessons) == _MAX_LESSONS or num_bytes + size > _MAX_BYTES):
            yield request
            request, num_bytes = tamiyo_service_pb2.ImportMemoryRequest(), 0
        request.lessons.append(message)
        num_bytes += size
    if request.lessons:
        yield request
