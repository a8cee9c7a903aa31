"""Which kernels a run is likely to want next: the candidates that the posterior favours, made ready before a decision.

    symbol   meaning                                                      shape, unit
    m, s     mean and deviation of what is believed of a candidate        loss
    score    m + s: what a draw may well promise                          loss

Races spread over kinds of blueprint (see ``rivals``), and so does a forecast: first the best of every kind, then the
second of every kind, and so on. What has no kernel yet is asked for as work that everything else goes before; what has
one is told to the run, which brings it near. Karn's designs are asked for as soon as they can be: after the reports
that they follow from, and before the decision that may want them. Nothing here is part of a decision: equal packets,
reports and seeds give the same decisions with forecasts and without.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from esper.contracts.blueprint import Site
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
_MAX_ANSWERS: Final = 1024
"""Kernels of one run that are remembered."""
_MAX_JUDGED: Final = 512
"""Candidates that are judged for one forecast; judging takes the cube of it (about 50 ms at this size)."""
_SHORTEST_PAUSE_S: Final = 0.01
_GATHER_S: Final = 2.0
"""How long news waits for more of it, in seconds."""

_Kernel = tuple[str, Site]
"""Blueprint and site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """How far a forecast looks, and how often there is a new one."""

    size: int = 32
    """Kernels in a forecast, 0 to ``MAX_FORECAST``; 0 makes none."""
    refresh_s: float = 0.5
    """Seconds between two forecasts for one run. >= 0."""
    patience_s: float = 10.0
    """Seconds that kernels which are being made are looked for after one packet, at most; never longer than between
    the last two packets. >= 0."""
    call_timeout_s: float = 10.0
    """Seconds one call of the compiler may take. > 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_FORECAST:
            raise InvalidInputError.of("size", f"be within [0, {MAX_FORECAST}]", self.size)
        for name in ("refresh_s", "patience_s"):
            if not getattr(self, name) >= 0:
                raise InvalidInputError.of(name, "be >= 0 seconds", getattr(self, name))
        if not self.call_timeout_s > 0:
            raise InvalidInputError.of("call_timeout_s", "be > 0 seconds", self.call_timeout_s)


@dataclass(slots=True)
class _Told:
    """What a run was told, and what is known of the kernels it may want."""

    begun_s: float = 0.0
    """When the last forecast was begun."""
    basis: tuple[int, frozenset[_Kernel]] = (0, frozenset())
    """What that one followed from."""
    answers: OrderedDict[_Kernel, str] = field(default_factory=OrderedDict)
    """Id of every kernel that is there; empty for one that cannot be made."""
    told: set[str] = field(default_factory=set)
    """Kernels the run knows of."""
    all_ready: bool = False
    """Whether every kernel that was favoured has its answer."""


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
        """Give kernels to tell a run, likeliest first; empty where there is nothing new to say.

        What is there is told at once. Where that is nothing new, Karn is asked for its next designs, what is not there
        yet is asked for, and looked for until the run's next packet may be expected. An outage makes the forecast
        shorter, and the next one goes on from there.
        """
        before = self._told.get(packet.run_id)
        now_s = self._clock()
        if not self._is_due(packet, before):
            return ()
        run = self._told[packet.run_id] = before or _Told()
        patience_s = 0.0 if before is None else min(self._config.patience_s, now_s - before.begun_s)
        run.begun_s = now_s
        self._told.move_to_end(packet.run_id)
        while len(self._told) > _MAX_RUNS:
            self._told.popitem(last=False)
        try:
            found = await self._look(packet, run) or await self._look_ahead(packet, run, patience_s)
            if not found and not self._open_candidates(packet):
                run.begun_s = now_s - self._config.refresh_s  # nothing was at hand to be foreseen: the next may follow
            return found
        except EsperError as error:
            log.info("forecast_given_up", extra={"run_id": packet.run_id, "error": str(error)})
            run.begun_s = now_s - self._config.refresh_s
            run.told.clear()  # what was found before the failure was told to nobody
            return ()

    async def _look_ahead(self, packet: SystemStatePacket, run: _Told, patience_s: float) -> tuple[str, ...]:
        """Have designed and made what a decision would have to wait for."""
        found: tuple[str, ...] = ()
        until_s = self._clock() + patience_s
        while self._open_layers(packet) and not (found and self._clock() >= until_s):
            if not await self._candidates.ask_ahead(packet):
                break
            found = await self._look(packet, run) or found
        pause_s = max(self._config.refresh_s, _SHORTEST_PAUSE_S)
        looks = int((min(patience_s, _GATHER_S) if found else patience_s) / pause_s)
        while looks > 0 and not run.all_ready:
            await asyncio.sleep(pause_s)
            news = await self._look(packet, run)
            looks = min(looks - 1, int(_GATHER_S / pause_s)) if news and not found else looks - 1
            found = news or found
        return found

    async def _look(self, packet: SystemStatePacket, run: _Told) -> tuple[str, ...]:
        """Give the favoured kernels that are there, if the run does not know one; ask for those that are not there."""
        rows = self._open_candidates(packet)
        basis = (self._posterior.num_observations, frozenset((one.blueprint.id, one.site) for one in rows))
        if not rows or (run.all_ready and run.basis == basis):
            return ()
        favoured = self._favoured(packet, rows)
        for key, spec in favoured.items():
            if key not in run.answers and (answer := await self._kernel_of(spec)) is not None:
                run.answers[key] = answer
        while len(run.answers) > _MAX_ANSWERS:
            run.answers.popitem(last=False)
        run.basis, run.all_ready = basis, run.answers.keys() >= favoured.keys()
        found = tuple(answer for key in favoured if (answer := run.answers.get(key)))
        if run.told.issuperset(found):
            return ()
        run.told = {*(run.told if len(run.told) < _MAX_ANSWERS else ()), *found}
        return found

    def likely(self, packet: SystemStatePacket) -> list[CompileSpec]:
        """Give what the posterior favours of the candidates at hand, likeliest first; each kernel once."""
        return list(self._favoured(packet, self._open_candidates(packet)).values())

    def _favoured(self, packet: SystemStatePacket, candidates: Sequence[Candidate]) -> dict[_Kernel, CompileSpec]:
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
        return dict(list(specs.items())[: self._config.size])

    def _is_due(self, packet: SystemStatePacket, before: _Told | None) -> bool:
        trains = packet.phase in (RunPhase.STARTED, RunPhase.TRAINING)
        rested = before is None or self._clock() - before.begun_s >= self._config.refresh_s
        return self._config.size > 0 and trains and rested

    def _open_candidates(self, packet: SystemStatePacket) -> Sequence[Candidate]:
        """Give the candidates at hand that have a dormant seed, and that the budget allows."""
        parameters, flops, _ = budget_left(packet.budget, ())
        layers = self._open_layers(packet)
        return [
            one
            for one in (self._candidates.held(packet) if layers else ())
            if one.layer in layers and one.cost.parameters <= parameters and one.cost.flops <= flops
        ]

    def _open_layers(self, packet: SystemStatePacket) -> frozenset[str]:
        """Give the layers that have a dormant seed, while the budget allows one more adaptation."""
        if budget_left(packet.budget, ())[2] < 1:
            return frozenset()
        dormant = SeedLifecycleState.DORMANT
        return frozenset(layer.layer for layer in packet.layers if any(seed.state is dormant for seed in layer.seeds))

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
