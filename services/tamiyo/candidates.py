"""Where a run could grow and with what: blueprints of the library and of Karn that are legal at its layers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from esper.blueprints import allowed_mixing, content_id, plan
from esper.blueprints.cost import plan_cost
from esper.contracts.blueprint import Blueprint, BlueprintCost, BlueprintState, Site, SiteKind
from esper.contracts.errors import (
    DeadlineExceededError,
    EsperError,
    InvalidBlueprintError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)
from esper.contracts.run import BudgetStatus, SystemStatePacket
from esper.contracts.wire import from_wire, to_wire
from esper.v1 import blueprint_pb2, karn_service_pb2, urza_service_pb2

log = logging.getLogger(__name__)

_PAGE_SIZE: Final = 200
_MAX_BLUEPRINTS: Final = 2_000
_MAX_COSTS: Final = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A blueprint that could stand at a layer."""

    layer: str
    """Dotted module name."""
    site: Site
    """Kind and dims of the layer."""
    blueprint: Blueprint
    """The blueprint."""
    cost: BlueprintCost
    """Exact cost at the site, for one example."""
    source: str = ""
    """Layer whose input it would read; empty for its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateConfig:
    """How fresh the candidates are."""

    refresh_s: float = 20.0
    """Age at which the library is asked again, in seconds. >= 0."""
    proposals: int = 4
    """Designs asked of Karn per site, 0 to 32; 0 asks for none."""
    call_timeout_s: float = 8.0
    """Seconds one call may take. > 0."""

    def __post_init__(self) -> None:
        if not self.refresh_s >= 0:
            raise InvalidInputError.of("refresh_s", "be >= 0 seconds", self.refresh_s)
        if not 0 <= self.proposals <= 32:
            raise InvalidInputError.of("proposals", "be within [0, 32]", self.proposals)
        if not self.call_timeout_s > 0:
            raise InvalidInputError.of("call_timeout_s", "be > 0 seconds", self.call_timeout_s)


class CandidateSource:
    """Asks Urza and Karn, keeps their answers for a while, and tells what fits where. Belongs to one event loop.

    With a service away its last answers stand, and it is not asked again for ``refresh_s``; every failure is logged and
    shows in ``failures``.
    """

    def __init__(
        self,
        urza: Any | None,
        karn: Any | None = None,
        config: CandidateConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a source over stubs; ``None`` leaves that service out.

        Args:
            urza: ``UrzaServiceStub``.
            karn: ``KarnServiceStub``.
            config: How fresh the answers are.
            clock: Seconds that only go forward.
        """
        self._urza = urza
        self._karn = karn
        self._config = config or CandidateConfig()
        self._clock = clock
        self._library: dict[SiteKind, _Answer] = {}
        self._designs: OrderedDict[Site, _Answer] = OrderedDict()
        self._costs: OrderedDict[tuple[str, Site], BlueprintCost | None] = OrderedDict()
        self._gate = asyncio.Lock()
        self._names: dict[str, str] = {}
        self._away_until_s: dict[str, float] = {}
        self.failures: dict[str, int] = {"urza": 0, "karn": 0}

    async def candidates(self, packet: SystemStatePacket, layers: AbstractSet[str] | None = None) -> list[Candidate]:
        """Give every legal (layer, source, blueprint) of a packet, by layer in the model's order, then blueprint.

        Skip seeds are taken from the library alone: Karn designs for a layer's own site. ``layers`` names the layers of
        interest; ``None`` takes all.
        """
        found: list[Candidate] = []
        async with self._gate:
            for layer in packet.layers:
                if layer.site is None or (layers is not None and layer.layer not in layers):
                    continue
                designs = await self._blueprints(layer.site, packet.random_seed, packet.budget)
                found += self._priced(layer.layer, layer.site, designs)
                for skip in layer.skip_sites:
                    found += self._priced(layer.layer, skip.site, self._library_at(skip.site), skip.source)
        return found

    def _library_at(self, site: Site) -> Sequence[Blueprint]:
        """Give the library's blueprints for a kind of site, as they were answered last."""
        held = self._library.get(site.kind)
        return sorted(held.blueprints, key=lambda one: one.id) if held else ()

    def _priced(self, layer: str, site: Site, designs: Sequence[Blueprint], source: str = "") -> list[Candidate]:
        priced = ((one, self._cost(one, site)) for one in designs)
        return [
            Candidate(layer=layer, site=site, blueprint=one, cost=cost, source=source)
            for one, cost in priced
            if cost is not None
        ]

    def name_of(self, blueprint_id: str) -> str:
        """Give the name of a blueprint that was offered before; empty for any other."""
        return self._names.get(blueprint_id, "")

    async def blueprints(self, site: Site) -> list[Blueprint]:
        """Give the blueprints that are legal at one site."""
        async with self._gate:
            found = await self._blueprints(site, 0, BudgetStatus())
        return [one for one in found if self._cost(one, site) is not None]

    def note_report(self, site: Site) -> None:
        """Have designs for this kind of site asked for anew: a report may have changed what Karn proposes."""
        for asked in [key for key in self._designs if key.kind is site.kind]:
            del self._designs[asked]

    async def _blueprints(self, site: Site, random_seed: int, budget: BudgetStatus) -> list[Blueprint]:
        designs = {one.id: one for one in await self._of_library(site.kind)}
        for one in await self._of_karn(site, random_seed, budget):
            designs.setdefault(one.id, one)
        self._names.update((one.id, one.name) for one in designs.values())
        return [designs[key] for key in sorted(designs)]

    async def _of_library(self, kind: SiteKind) -> Sequence[Blueprint]:
        held = self._library.get(kind)
        if self._urza is None or self._away("urza") or self._fresh(held):
            return held.blueprints if held else ()
        try:
            found: Sequence[Blueprint] = await self._search(kind)
        except EsperError as error:
            self._note_failure("urza", error)
            found = held.blueprints if held else ()
        self._library[kind] = _Answer(found, self._clock())
        return found

    async def _search(self, kind: SiteKind) -> tuple[Blueprint, ...]:
        assert self._urza is not None
        found: list[Blueprint] = []
        token = ""
        while len(found) < _MAX_BLUEPRINTS:
            request = urza_service_pb2.SearchBlueprintsRequest(
                states=[blueprint_pb2.BLUEPRINT_STATE_ACTIVE],
                site_kind=blueprint_pb2.SiteKind.ValueType(int(kind)),
                page_size=_PAGE_SIZE,
                page_token=token,
            )
            answer = await self._urza.SearchBlueprints(request, timeout=self._config.call_timeout_s)
            found.extend(from_wire(one, Blueprint) for one in answer.blueprints)
            token = answer.next_page_token
            if not token:
                break
        return tuple(one for one in found if one.state is BlueprintState.ACTIVE)

    async def _of_karn(self, site: Site, random_seed: int, budget: BudgetStatus) -> Sequence[Blueprint]:
        bounds = _bounds(budget)
        held = self._designs.get(site)
        held = held if held is not None and held.bounds == bounds else None
        wanted = self._karn is not None and self._config.proposals > 0
        if not wanted or self._away("karn") or self._fresh(held):
            return held.blueprints if held else ()
        assert self._karn is not None
        request = karn_service_pb2.ProposeBlueprintsRequest(count=self._config.proposals, random_seed=random_seed)
        request.site.CopyFrom(to_wire(site))  # type: ignore[arg-type]
        limits = karn_service_pb2.ProposalConstraints(max_parameters=bounds[0], max_flops=bounds[1])
        request.constraints.CopyFrom(limits)
        found: Sequence[Blueprint]
        try:
            answer = await self._karn.ProposeBlueprints(request, timeout=self._config.call_timeout_s)
            found = tuple(from_wire(one.blueprint, Blueprint) for one in answer.proposals)
        except InvalidStateError as error:
            log.info("no_designs", extra={"site_kind": site.kind.name, "bounds": bounds, "reason": str(error)})
            found = ()
        except EsperError as error:
            self._note_failure("karn", error)
            found = held.blueprints if held else ()
        self._designs[site] = _Answer(found, self._clock(), bounds)
        while len(self._designs) > 256:
            self._designs.popitem(last=False)
        return found

    def _cost(self, blueprint: Blueprint, site: Site) -> BlueprintCost | None:
        """Give the cost from `legal_cost`, worked out once."""
        key = (blueprint.id, site)
        if key not in self._costs:
            self._costs[key] = legal_cost(blueprint, site)
            while len(self._costs) > _MAX_COSTS:
                self._costs.popitem(last=False)
        return self._costs[key]

    def _away(self, service: str) -> bool:
        return self._clock() < self._away_until_s.get(service, -math.inf)

    def _fresh(self, held: _Answer | None) -> bool:
        return held is not None and self._clock() - held.asked_at_s < self._config.refresh_s

    def _note_failure(self, service: str, error: EsperError) -> None:
        if isinstance(error, UnavailableError | DeadlineExceededError):
            self._away_until_s[service] = self._clock() + self._config.refresh_s
        self.failures[service] += 1
        log.warning("candidates_stale", extra={"service": service, "reason": error.reason, "error": str(error)})


@dataclass(frozen=True, slots=True)
class _Answer:
    """Blueprints as they were answered, and when."""

    blueprints: Sequence[Blueprint]
    asked_at_s: float
    bounds: tuple[int | None, int | None] = (None, None)


def _bounds(budget: BudgetStatus) -> tuple[int | None, int | None]:
    """Give the parameters and FLOPs that one seed may still add, rounded down: small changes ask nothing anew."""

    def left(bound: int | None, used: int) -> int | None:
        return None if bound is None else _rounded(max(0, bound - used))

    return (
        left(budget.max_added_parameters, budget.added_parameters),
        left(budget.max_added_flops, budget.added_flops),
    )


def _rounded(count: int) -> int:
    """Give the count with all but its three leading binary digits set to 0."""
    shift = max(0, count.bit_length() - 3)
    return count >> shift << shift


def legal_cost(blueprint: Blueprint, site: Site) -> BlueprintCost | None:
    """Give the exact cost of a blueprint; ``None`` where it is not legal, looks ahead, or is not what its id says."""
    kinds = blueprint.metadata.site_kinds
    if kinds and site.kind not in kinds:
        return None
    try:
        layout = plan(blueprint.ir, site)
    except InvalidBlueprintError:
        return None
    if layout.mixing > allowed_mixing(site):
        return None
    if content_id(blueprint.ir) != blueprint.id:
        log.warning("blueprint_id_false", extra={"blueprint_id": blueprint.id, "blueprint_name": blueprint.name})
        return None
    return plan_cost(layout)
