"""Which kernels a run is likely to want next: the candidates that the posterior favours, made ready before a decision.

    symbol   meaning                                                      shape, unit
    m, s     mean and deviation of what is believed of a candidate        loss
    score    m + s: what a draw may well promise                          loss

Races spread over kinds of blueprint (see ``rivals``), and so does a forecast: first the best of every kind, then the
second of every kind, and so on. What has no kernel yet is asked for as work that nobody waits for; what has one is told
to the run, which brings it near. Nothing here is part of a decision: equal packets, reports and seeds give the same
decisions with forecasts and without.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from esper.contracts.errors import EsperError, InvalidInputError
from esper.contracts.kernel import MAX_FORECAST, CompileJob, CompileSpec, JobPhase
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import RunPhase, SystemStatePacket
from esper.contracts.wire import from_wire, to_message
from esper.services.tamiyo.candidates import Candidate, CandidateSource
from esper.services.tamiyo.posterior import Features, RewardPosterior, family_of, features_of, place_of, reach_of
from esper.services.tamiyo.run_memory import budget_left
from esper.v1 import tezzeret_service_pb2

log = logging.getLogger(__name__)

_MAX_RUNS: Final = 256
_MAX_JUDGED: Final = 512
"""Candidates that are judged for one forecast; judging takes the cube of it (about 50 ms at this size)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """How far a forecast looks, and how often there is a new one."""

    size: int = 32
    """Kernels in a forecast, 0 to ``MAX_FORECAST``; 0 makes none."""
    refresh_s: float = 10.0
    """Seconds between two forecasts for one run. >= 0."""
    call_timeout_s: float = 10.0
    """Seconds one call of the compiler may take. > 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_FORECAST:
            raise InvalidInputError.of("size", f"be within [0, {MAX_FORECAST}]", self.size)
        if not self.refresh_s >= 0:
            raise InvalidInputError.of("refresh_s", "be >= 0 seconds", self.refresh_s)
        if not self.call_timeout_s > 0:
            raise InvalidInputError.of("call_timeout_s", "be > 0 seconds", self.call_timeout_s)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a run was told last, and what that followed from."""

    basis: tuple[int, int]
    at_s: float
    artifact_ids: tuple[str, ...]
    all_ready: bool


class KernelForecaster:
    """Makes forecasts for any number of runs. Belongs to one event loop."""

    def __init__(
        self,
        posterior: RewardPosterior,
        candidates: CandidateSource,
        tezzeret: Any,
        config: ForecastConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a forecaster that has told nothing.

        Args:
            posterior: What is believed of candidates.
            candidates: Where candidates come from; only answers that it holds already are used.
            tezzeret: ``TezzeretServiceStub``.
            config: How far and how often.
            clock: Seconds that only go forward.
        """
        self._posterior = posterior
        self._candidates = candidates
        self._tezzeret = tezzeret
        self._config = config or ForecastConfig()
        self._clock = clock
        self._told: OrderedDict[str, _Told] = OrderedDict()

    async def foresee(self, packet: SystemStatePacket) -> tuple[str, ...]:
        """Give the kernels to tell a run, likeliest first; empty where there is nothing new to say.

        Asks for those that are not there yet, so that a later forecast has them. An outage of the compiler makes the
        forecast shorter, and the next one is made as if this one had not been.
        """
        before = self._told.get(packet.run_id)
        if not self._is_due(packet, before):
            return ()
        rows = self._open_candidates(packet)
        basis = (self._posterior.num_observations, len(rows))
        if not rows or (before is not None and before.all_ready and before.basis == basis):
            return ()
        specs, begun_s = self._favoured(packet, rows), self._clock()
        try:
            ready = [await self._kernel_of(spec) for spec in specs]
        except EsperError as error:
            log.info("forecast_given_up", extra={"run_id": packet.run_id, "error": str(error)})
            return ()
        found = tuple(one for one in ready if one)
        self._told[packet.run_id] = _Told(basis, begun_s, found, all(one is not None for one in ready))
        self._told.move_to_end(packet.run_id)
        while len(self._told) > _MAX_RUNS:
            self._told.popitem(last=False)
        return () if before is not None and found == before.artifact_ids else found

    def likely(self, packet: SystemStatePacket) -> list[CompileSpec]:
        """Give what the posterior favours of the candidates at hand, likeliest first; each kernel once."""
        return self._favoured(packet, self._open_candidates(packet))

    def _favoured(self, packet: SystemStatePacket, candidates: Sequence[Candidate]) -> list[CompileSpec]:
        rows = candidates[:_MAX_JUDGED]
        asked = [_features(packet, one) for one in rows]
        beliefs = self._posterior.believe(asked, np.random.default_rng(0))  # its draw is not looked at
        scored = sorted(
            zip(rows, asked, beliefs, strict=True),
            key=lambda row: (-row[2].mean - row[2].deviation, row[0].layer, row[0].source, row[0].blueprint.id),
        )
        seen: Counter[tuple[str, str]] = Counter()
        ranked: list[tuple[int, Candidate]] = []
        for candidate, features, _ in scored:
            kind = (features.family, features.reach)
            ranked.append((seen[kind], candidate))
            seen[kind] += 1
        ranked.sort(key=lambda row: row[0])  # stable: the best of every kind stay in the order of their scores
        specs = {(one.blueprint.id, one.site): CompileSpec(ir=one.blueprint.ir, site=one.site) for _, one in ranked}
        return list(specs.values())[: self._config.size]

    def _is_due(self, packet: SystemStatePacket, before: _Told | None) -> bool:
        trains = packet.phase in (RunPhase.STARTED, RunPhase.TRAINING)
        rested = before is None or self._clock() - before.at_s >= self._config.refresh_s
        return self._config.size > 0 and trains and rested

    def _open_candidates(self, packet: SystemStatePacket) -> Sequence[Candidate]:
        """Give the candidates at hand that have a dormant seed, and that the budget allows."""
        parameters, flops, adaptations = budget_left(packet.budget, ())
        dormant = SeedLifecycleState.DORMANT
        layers = {layer.layer for layer in packet.layers if any(seed.state is dormant for seed in layer.seeds)}
        if adaptations < 1 or not layers:
            return ()
        return [
            one
            for one in self._candidates.held(packet)
            if one.layer in layers and one.cost.parameters <= parameters and one.cost.flops <= flops
        ]

    async def _kernel_of(self, spec: CompileSpec) -> str | None:
        """Give a kernel's id, ``None`` while it is being made, and nothing where it cannot be made."""
        request = tezzeret_service_pb2.CompileRequest(
            spec=to_message(spec, tezzeret_service_pb2.CompileSpec), priority=tezzeret_service_pb2.JOB_PRIORITY_BULK
        )
        try:
            answer = await self._tezzeret.Compile(request, timeout=self._config.call_timeout_s)
            job = from_wire(answer.job, CompileJob)
        except InvalidInputError as error:  # of this one kernel; the others may be had
            log.info("kernel_not_foreseen", extra={"error": str(error)})
            return ""
        if job.phase is JobPhase.SUCCEEDED:
            return job.artifact_id
        return "" if job.phase in (JobPhase.FAILED, JobPhase.DEAD) else None


def _features(packet: SystemStatePacket, candidate: Candidate) -> Features:
    """Give what the posterior sees of a candidate; the phase is left out, it is that of all of them."""
    return features_of(
        candidate.site,
        candidate.blueprint.id,
        parameters=candidate.cost.parameters,
        progress=None,
        family=family_of(candidate.blueprint.ir),
        place=place_of(packet.run_id, candidate.layer, candidate.source),
        reach=reach_of(candidate.source),
    )
