"""C4: which cache tier has the kernels that growing runs ask for, how long each takes, and what happens without L2.

    l1   memory of the process: empty when a run begins
    l2   directory that the runs of a machine share
    l3   the library, behind gRPC

Runs of one task follow each other through one local mesh, a seed and a name each, as a sweep does; every run has a
first tier of its own, as a process has. What they asked for is recorded and then asked for again: by a process that
restarts or runs beside them, for the time that each tier takes, and with a second tier that is away.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self

import grpc
from typing_extensions import override

import esper
from bench.growth_arms import grow
from bench.k3_training import RecordingMesh
from bench.loops import Loop
from bench.paired import PairedTimes, spread, time_pair
from bench.report import Figure, Goal, Result, at_least
from esper.cli import digits
from esper.contracts.decision import AdaptationDecision
from esper.contracts.errors import InvalidStateError
from esper.contracts.run import CacheTierStatus
from esper.core.link import Arrival, KernelArrival, RunLink
from esper.core.morphable import MorphableModel
from esper.execution._native import KernelCache
from esper.execution.artifact import VerifiedKernel, verify
from esper.execution.keys import KeyRing
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_port import BreakerState, KernelTier
from esper.execution.tier_redis import RedisTier
from esper.execution.tier_urza import UrzaTier
from esper.execution.tiers import TieredKernelSource
from esper.mesh import LOOPBACK, free_port, open_channel
from esper.mesh.settings import MeshSettings
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

NEAR_GOAL: Final = at_least(0.95)
ALL: Final = Goal(sign="==", limit=1)

_L1_BYTES: Final = 256 * 2**20


class Origin(Enum):
    """What a kernel was when its decision came."""

    THERE = "there already"
    """Made before: asked for by an earlier decision, or foreseen."""
    DESIGNED = "a design of Karn's, made for the decision"
    LISTED = "a blueprint of the library's, made for the decision"


class OriginMesh(RecordingMesh):
    """A recording mesh that also writes down where each kernel came from."""

    def __init__(self, mesh: esper.Mesh) -> None:
        super().__init__(mesh)
        self._decisions: dict[str, AdaptationDecision] = {}
        self._kernels: list[KernelArrival] = []

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where the kernels that came in so far came from, in turn; one may come in before its decision."""
        return tuple(
            origin_of(self._decisions[one.ready.adaptation_id], one.kernel)
            for one in self._kernels
            if one.ready.adaptation_id in self._decisions
        )

    @override
    def open_link(self, run_id: str, model: MorphableModel) -> RunLink:
        link = super().open_link(run_id, model)
        arrivals = link.arrivals

        def noted() -> Iterator[Arrival]:
            for item in arrivals():
                if isinstance(item, AdaptationDecision):
                    self._decisions[item.adaptation_id] = item
                elif isinstance(item, KernelArrival) and item.ready.artifact_id:
                    self._kernels.append(item)
                yield item

        link.arrivals = noted  # type: ignore[method-assign]
        return link


def origin_of(decision: AdaptationDecision, kernel: VerifiedKernel | None) -> Origin:
    """Say what a kernel was when its decision came."""
    if kernel is not None and kernel.manifest.created_at < decision.created_at:
        return Origin.THERE
    return Origin.DESIGNED if decision.blueprint and "karn" in decision.blueprint.metadata.tags else Origin.LISTED


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """What one run asked for, and who had it."""

    requests: tuple[str, ...]
    """Kernels, in turn."""
    tiers: tuple[CacheTierStatus, ...]
    """The counts of its tiers, nearest first."""
    origins: tuple[Origin, ...]
    """Where the requests' kernels came from, in turn."""

    def hits(self, tier: str) -> int:
        """Give the requests that one tier answered."""
        return sum(status.hits for status in self.tiers if status.tier == tier)


def measure(*, quick: bool) -> Result:
    """Record runs on a local mesh that is started for it, 6 or 2, and ask again for what they asked for."""
    num_runs, epochs, seconds = (2, 16, 0.0) if quick else (6, 30, 10.0)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory, esper.Mesh.local(directory) as mesh:
        if mesh.settings is None:
            raise InvalidStateError("a local mesh must say where it is")
        runs = record_runs(mesh.settings, num_runs, epochs)
        figures = hit_figures(runs)
        wanted = tuple(dict.fromkeys(request for run in runs for request in run.requests))
        with Replay(mesh.settings, Path(directory), wanted) as replay:
            figures += replay.again_figures([run.requests for run in runs])
            figures += replay.latency_figures(seconds)
            figures += replay.away_figures(seconds)
    return Result(name="c4_tiers", figures=tuple(figures), notes=_NOTES)


def record_runs(settings: MeshSettings, num_runs: int, epochs: int) -> list[RecordedRun]:
    """Grow the digits host, once a seed; gives what each run asked for.

    Raises:
        InvalidStateError: No run asked for a kernel.
    """
    splits = digits.load_digits()
    runs: list[RecordedRun] = []
    for seed in range(num_runs):
        with esper.Mesh.connect(settings) as mesh:
            recording = OriginMesh(mesh)
            grow(recording, splits, epochs=epochs, seed=seed)
            tiers = tuple(mesh.kernel_source.stats())
            runs.append(RecordedRun(requests=tuple(recording.requests), tiers=tiers, origins=recording.origins))
    if not any(run.requests for run in runs):
        raise InvalidStateError(f"{num_runs} runs of {epochs} epochs must ask for a kernel, none did")
    return runs


def hit_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Give the share of the runs' requests that each tier answered, and what the second tier had for later runs."""
    later = runs[1:]
    near = _share(sum(run.hits("l1") + run.hits("l2") for run in later), later)
    names = {"l1": "L1, memory", "l2": "L2, directory", "l3": "L3, library"}
    return [
        Figure(name=f"requests of {len(runs)} runs", value=sum(len(run.requests) for run in runs), unit="count"),
        *(
            Figure(name=f"answered by {what}", value=_share(sum(run.hits(tier) for run in runs), runs), unit="share")
            for tier, what in names.items()
        ),
        Figure(
            name="brought into L1 before anybody asked",
            value=sum(status.warmed for run in runs for status in run.tiers),
            unit="count",
        ),
        Figure(name="from the second run on, answered by L1 or L2", value=near, unit="share", goal=NEAR_GOAL),
        *miss_figures(later),
    ]


def miss_figures(runs: Sequence[RecordedRun]) -> list[Figure]:
    """Give how many requests neither L1 nor L2 answered, by what their kernels were when the decision came."""
    origins = Counter(origin for run in runs for origin in run.origins)
    missed = sum(len(run.requests) - run.hits("l1") - run.hits("l2") for run in runs)
    causes = {origin: origins[origin] for origin in (Origin.DESIGNED, Origin.LISTED)}
    causes[Origin.THERE] = missed - sum(causes.values())
    return [
        Figure(name="from the second run on, answered by neither", value=missed, unit="count"),
        *(Figure(name=f"of these, {origin.value}", value=count, unit="count") for origin, count in causes.items()),
    ]


def known_share(traces: Sequence[Sequence[Hashable]]) -> float | None:
    """Give the share of what later traces ask for that one before asked for; ``None`` where they ask for nothing."""
    known = asked = 0
    earlier = set(traces[0])
    for trace in traces[1:]:
        known += sum(request in earlier for request in trace)
        asked += len(trace)
        earlier |= set(trace)
    return known / asked if asked else None


def _share(count: int, runs: Sequence[RecordedRun]) -> float | None:
    asked = sum(len(run.requests) for run in runs)
    return count / asked if asked else None


class Replay:
    """Asks for recorded kernels again, through tiers of its own before the library that the runs had."""

    def __init__(self, settings: MeshSettings, directory: Path, wanted: Sequence[str]) -> None:
        self._settings = settings
        self._shared = settings.state_dir / "kernels"
        self._directory = directory
        self._wanted = wanted
        self._ring = KeyRing.from_dir(settings.trusted_dir)
        self._leaving = ExitStack()
        self._loop = Loop()
        self._stub: Any = None
        self._bare: Any = None

    def __enter__(self) -> Self:
        self._leaving.enter_context(self._loop)
        address = self._settings.address_of("urza")
        self._stub = UrzaServiceStub(self._channel(lambda: open_channel(address, self._settings.channel_config())))
        self._bare = UrzaServiceStub(self._channel(lambda: grpc.aio.insecure_channel(address)))
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.close()

    def again_figures(self, traces: Sequence[Sequence[str]]) -> list[Figure]:
        """Give what a second tier can have for later runs at most, and has for one that asks for just the same."""
        near = asked = 0
        for trace in traces:
            source = self._source(DirectoryTier(self._shared))
            for artifact_id in trace:
                self._loop.wait(source.fetch(artifact_id))
            near += sum(status.hits for status in source.stats()[:2])
            asked += len(trace)
            self._loop.wait(source.close())
        return [
            Figure(name="from the second run on, asked for by an earlier one", value=known_share(traces), unit="share"),
            Figure(name="the same run again, answered by L1 or L2", value=near / asked, unit="share", goal=NEAR_GOAL),
        ]

    def latency_figures(self, seconds: float) -> list[Figure]:
        """Give the time of a fetch by the tier that answers, over the least that such a tier must do."""
        held = {artifact_id: self._path(artifact_id).read_bytes() for artifact_id in self._wanted}
        warm = self._source(None)
        self._loop.wait(self._fetch_all(warm))
        directory = DirectoryTier(self._shared)

        async def from_memory() -> None:
            for artifact_id, data in held.items():
                verify(data, self._ring, artifact_id=artifact_id)

        async def from_file() -> None:
            for artifact_id in held:
                verify(self._path(artifact_id).read_bytes(), self._ring, artifact_id=artifact_id)

        async def from_stream() -> None:
            for artifact_id in held:
                call = self._bare.DownloadKernel(pb.DownloadKernelRequest(artifact_id=artifact_id))
                verify(b"".join([chunk.data async for chunk in call]), self._ring, artifact_id=artifact_id)

        pairs: list[tuple[str, str, Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = [
            ("L1", "proving the bytes", lambda: self._fetch_all(warm), from_memory),
            ("L2", "reading the file and proving it", lambda: self._fetch_all(self._source(directory)), from_file),
            ("L3", "a plain download and proving it", lambda: self._fetch_all(self._source(None)), from_stream),
        ]
        figures: list[Figure] = []
        for tier, what, ours, reference in pairs:
            times = time_pair(self._loop.calling(ours), self._loop.calling(reference), seconds=seconds)
            figures += self._latency(tier, what, times)
        self._loop.wait(warm.close())
        return figures

    def away_figures(self, seconds: float) -> list[Figure]:
        """Give what becomes of the requests when the second tier cannot be reached, in two ways."""
        gone = self._directory / "gone"
        ways: dict[str, Callable[[], KernelTier]] = {
            "Redis refuses": lambda: RedisTier(f"redis://{LOOPBACK}:{port}"),
            "directory is gone": lambda: directory,
        }
        port, directory = free_port(), DirectoryTier(gone)
        shutil.rmtree(gone)
        gone.write_bytes(b"")
        with _quiet(logging.getLogger("esper.execution.tier_guard")):
            return [figure for way, make in ways.items() for figure in self._away(way, make, seconds)]

    def _away(self, way: str, make: Callable[[], KernelTier], seconds: float) -> list[Figure]:
        source = self._source(make())
        answered = self._loop.wait(self._fetch_all(source))
        breaker = source.breakers()["l2"]
        errors = next(status.errors for status in source.stats() if status.tier == "l2")
        self._loop.wait(source.close())

        async def without() -> None:
            await self._fetch_all(self._source(None))

        async def away() -> None:
            fresh = self._source(make())
            await self._fetch_all(fresh)
            await fresh.close()

        times = time_pair(self._loop.calling(away), self._loop.calling(without), seconds=seconds)
        return [
            Figure(name=f"L2 away ({way}), answered", value=answered / len(self._wanted), unit="share", goal=ALL),
            Figure(name=f"L2 away ({way}), calls that failed or were held off", value=errors, unit="count"),
            Figure(
                name=f"L2 away ({way}), breaker open after {len(self._wanted)} kernels",
                value=int(breaker is BreakerState.OPEN),
                unit="count",
                goal=ALL,
            ),
            Figure(
                name=f"L2 away ({way}), over no L2",
                value=times.ratio,
                unit="ratio",
                spread=times.spread,
                certain=times.certain,
            ),
        ]

    def _latency(self, tier: str, what: str, times: PairedTimes) -> list[Figure]:
        each_ms = [took_ns / 1e6 / len(self._wanted) for took_ns in times.ours_ns]
        return [
            Figure(name=f"fetch from {tier}", value=statistics.median(each_ms), unit="ms", spread=spread(each_ms)),
            Figure(
                name=f"fetch from {tier}, over {what}",
                value=times.ratio,
                unit="ratio",
                spread=times.spread,
                certain=times.certain,
            ),
        ]

    async def _fetch_all(self, source: TieredKernelSource) -> int:
        """Fetch every recorded kernel; gives how many came."""
        return sum([(await source.fetch(artifact_id)).artifact_id == artifact_id for artifact_id in self._wanted])

    def _source(self, l2: KernelTier | None) -> TieredKernelSource:
        """Give tiers with an empty first one."""
        return TieredKernelSource(KernelCache(_L1_BYTES), l2, UrzaTier(self._stub), self._ring)

    def _path(self, artifact_id: str) -> Path:
        return DirectoryTier(self._shared).path_of(artifact_id)

    def _channel(self, make: Callable[[], Any]) -> Any:
        async def made() -> Any:
            return make()

        channel = self._loop.wait(made())
        self._leaving.callback(lambda: self._loop.wait(channel.close()))
        return channel


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keep warnings about what fails on purpose, thousands of times, out of the log."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


_NOTES: Final = (
    "A local mesh: NATS and six services as processes of this machine. A run asks for each kernel once and keeps it as "
    "a module. Runs share kernels, whatever their seeds (decision 0013). 'Asked for by an earlier one' is the most "
    "that a second tier alone can have for it; beyond that a kernel is near as Tamiyo foresaw it. What is brought near "
    "before anybody asks is no request. A kernel made for the decision is one that no cache could have.",
    "'The same run again' has an empty first tier: the run begun anew from a checkpoint, or another rank of it.",
    "Fetches are of all recorded kernels in turn, by a fresh source each time; references run beside them.",
    "Away: nobody listens on the port of Redis; a file stands where the directory was. Three failures in a row open "
    "the breaker, and then the tier is not asked.",
)
