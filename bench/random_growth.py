"""The control of choosing: growth whose life cycle is Esper's own, and whose sites and blueprints are drawn at random.

It stands in the place of a mesh. Kernels come from the same compiler, seeds are learnt, grafted, measured, kept and
culled by the same orchestrator under the same budget, and race in fields of the same size; only who decides differs:
uniform draws from every (layer, source, template) that is legal, allowed in the run and affordable, whenever there is
room, from the epoch on at which Tamiyo holds its first race.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import numpy as np

from esper.blueprints.registry import default_registry
from esper.blueprints.tags import is_allowed
from esper.contracts.blueprint import Blueprint, Site
from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.contracts.kernel import CompileSpec, KernelReady
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import BudgetStatus, CacheTierStatus, LayerStatus, RunPhase, SystemStatePacket
from esper.contracts.tag_expression import parse_tags
from esper.core.link import Arrival, KernelArrival
from esper.core.morphable import MorphableModel
from esper.execution.artifact import artifact_bytes, verify
from esper.execution.keys import SigningKey
from esper.services.tamiyo.candidates import legal_cost
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tezzeret.worker import TezzeretWorker
from esper.telemetry.subjects import Kind

FIRST_EPOCH: Final = TamiyoConfig().first_race_epochs
"""Epoch from which seeds are tried, as early as Tamiyo holds its first race."""
MAX_OPEN: Final = TamiyoConfig().max_open_adaptations
"""Races under way at once, as many as Tamiyo allows."""
RACE_SIZE: Final = TamiyoConfig().race_size
"""Seeds that race, as many as Tamiyo enters."""

_UNDER_WAY: Final = (SeedLifecycleState.LOADING, SeedLifecycleState.ACTIVE, SeedLifecycleState.EVALUATING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One candidate of a draw."""

    layer: str
    """Dotted module name."""
    seed_index: int
    """Dormant seed of the layer."""
    site: Site
    """Kind and dims of the layer."""
    blueprint: Blueprint
    """Template."""
    source: str = ""
    """Layer whose input it reads; empty for its own."""


class RandomMesh:
    """What a session takes for a mesh; every run's draws depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def open_link(self, run_id: str, model: MorphableModel) -> RandomLink:
        """Give the run's line."""
        del model
        return RandomLink(run_id, self._seed)


class RandomLink:
    """A run's line that answers each packet with a random decision and, at once, its kernel."""

    def __init__(self, run_id: str, seed: int) -> None:
        self._run_id = run_id
        self._random = np.random.default_rng(seed)
        self._arrivals: deque[Arrival] = deque()
        self._key = SigningKey.generate()
        self._worker = TezzeretWorker(signer=self._key)
        self._num_decisions = 0
        self._race_sequence, self._race_id = 0, ""

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        """Take a message; packets of a run in training are answered."""
        del kind, layer, msg_id
        if isinstance(value, SystemStatePacket) and value.phase is RunPhase.TRAINING and value.epoch >= FIRST_EPOCH:
            field = self._field(draws(value), value)
            for draw in field:
                self._decide(value, draw, len(field))

    def arrivals(self) -> Iterator[Arrival]:
        """Give what has come in."""
        while self._arrivals:
            yield self._arrivals.popleft()

    def cache_tiers(self) -> Sequence[CacheTierStatus]:
        """There is no cache."""
        return ()

    def close(self, deadline_s: float = 5.0) -> None:
        """Nothing waits to be sent."""
        del deadline_s

    def _field(self, candidates: Sequence[Draw], packet: SystemStatePacket) -> list[Draw]:
        """Give at most ``RACE_SIZE`` candidates, each equally likely, each at a dormant seed of its own."""
        free = {layer.layer: dormant_seeds(layer) for layer in packet.layers}
        field: list[Draw] = []
        for row in self._random.permutation(len(candidates)):
            seeds = free[candidates[row].layer]
            if seeds and len(field) < RACE_SIZE:
                field.append(replace(candidates[row], seed_index=seeds.pop(0)))
        return field

    def _decide(self, packet: SystemStatePacket, draw: Draw, race_size: int) -> None:
        if packet.sequence != self._race_sequence:
            self._race_sequence, self._race_id = packet.sequence, f"a{self._num_decisions + 1:032x}"
        self._num_decisions += 1
        spec = CompileSpec(
            ir=draw.blueprint.ir, site=draw.site, random_seed=(packet.random_seed + draw.seed_index) % 2**63
        )
        data = artifact_bytes(self._worker.compile_spec(spec).artifact)
        kernel = verify(data, self._key.ring())
        decision = AdaptationDecision(
            adaptation_id=f"a{self._num_decisions:032x}",
            run_id=self._run_id,
            state_sequence=packet.sequence,
            epoch=packet.epoch,
            adaptation_type=AdaptationType.ADD_SEED,
            layer=draw.layer,
            seed_index=draw.seed_index,
            blueprint_id=draw.blueprint.id,
            confidence=1.0,
            urgency=1.0,
            curve_state=CurveState.PLATEAU,
            actionable=True,
            explanation="drawn at random",
            created_at=datetime.now(UTC),
            blueprint=draw.blueprint,
            site=draw.site,
            source=draw.source,
            race_id=self._race_id if race_size > 1 else "",
            race_size=race_size if race_size > 1 else 0,
        )
        ready = KernelReady(
            adaptation_id=decision.adaptation_id,
            run_id=self._run_id,
            job_id=f"j{self._num_decisions:032x}",
            blueprint_id=draw.blueprint.id,
            site=draw.site,
            artifact_id=kernel.artifact_id,
        )
        self._arrivals += [decision, KernelArrival(ready=ready, kernel=kernel)]


def draws(packet: SystemStatePacket) -> list[Draw]:
    """Give everything that could be tried on a packet; nothing while as many races as allowed are under way."""
    busy = [layer.layer for layer in packet.layers if any(seed.state in _UNDER_WAY for seed in layer.seeds)]
    if len(busy) >= MAX_OPEN:  # a race leaves its layers to nobody else, so there are no more races than busy layers
        return []
    registry = default_registry()
    rule = parse_tags(packet.allowed_blueprints, parameter="state.allowed_blueprints")
    templates = [one for one in map(registry.create_blueprint, registry.names()) if is_allowed(one, rule)]
    found: list[Draw] = []
    for layer in packet.layers:
        seeds = dormant_seeds(layer)
        if layer.site is None or not seeds:
            continue
        for source, site in (("", layer.site), *((skip.source, skip.site) for skip in layer.skip_sites)):
            fitting = [one for one in templates if _fits(one, site, packet.budget)]
            found += [
                Draw(layer=layer.layer, seed_index=seeds[0], site=site, blueprint=one, source=source) for one in fitting
            ]
    return found


def dormant_seeds(layer: LayerStatus) -> list[int]:
    """Give the dormant seeds of a layer in which nothing is under way."""
    if any(seed.state in _UNDER_WAY for seed in layer.seeds):
        return []
    return [seed.seed_index for seed in layer.seeds if seed.state is SeedLifecycleState.DORMANT]


def _fits(blueprint: Blueprint, site: Site, budget: BudgetStatus) -> bool:
    """Say whether a blueprint is legal, by the same rule as Tamiyo's, and within what the budget leaves."""
    price = legal_cost(blueprint, site)
    bound = budget.max_added_parameters
    return price is not None and (bound is None or budget.added_parameters + price.parameters <= bound)
