"""Where a run could grow and with what: blueprints of the library and of Karn that are legal at its layers.

What a run may choose from must not depend on how busy the machine is, or equal runs would grow differently. Karn is
therefore told of every report that this side has learned from before it is asked, and its answer stands until another
report comes: no clock is looked at. The library changes by somebody's hand alone, so its answers may age by the clock.

For the same reason Karn may be asked before a decision wants to know (`CandidateSource.ask_ahead`): equal questions
after equal reports have equal answers, whenever they are put.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final

from esper.blueprints import allowed_mixing, content_id, plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.ir import reads_input
from esper.blueprints.tags import is_allowed
from esper.contracts.blueprint import Blueprint, BlueprintCost, BlueprintState, Site, SiteKind
from esper.contracts.errors import (
    EsperError,
    InvalidBlueprintError,
    InvalidInputError,
    InvalidStateError,
)
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import BudgetStatus, FieldReport, SystemStatePacket
from esper.contracts.tag_expression import TagExpression, parse_tags
from esper.contracts.wire import from_wire, to_wire
from esper.v1 import blueprint_pb2, karn_service_pb2, urza_service_pb2

log = logging.getLogger(__name__)

_PAGE_SIZE: Final = 200
_MAX_BLUEPRINTS: Final = 2_000
_MAX_COSTS: Final = 50_000
_MAX_DESIGNS: Final = 256
_MAX_UNTOLD: Final = 1_000


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
    """Age at which the library is asked again, and rest of a service that failed, in seconds. >= 0."""
    proposals: int = 4
    """Designs asked of Karn per site, 0 to 32; 0 asks for none."""
    call_timeout_s: float = 30.0
    """Seconds one call may take: on a busy machine a design takes many, and an answer too late changes what is tried.
    > 0."""

    def __post_init__(self) -> None:
        if not self.refresh_s >= 0:
            raise InvalidInputError.of("refresh_s", "be >= 0 seconds", self.refresh_s)
        if not 0 <= self.proposals <= 32:
            raise InvalidInputError.of("proposals", "be within [0, 32]", self.proposals)
        if not self.call_timeout_s > 0:
            raise InvalidInputError.of("call_timeout_s", "be > 0 seconds", self.call_timeout_s)


class CandidateSource:
    """Asks Urza and Karn, keeps their answers, and tells what fits where. Belongs to one event loop.

    After a failure a service's last answers stand, and it is not asked again for ``refresh_s``; every failure is logged
    and shows in ``failures``.
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
        self._designs: OrderedDict[_Asked, _Designs] = OrderedDict()
        self._lessons: Counter[SiteKind] = Counter()
        self._untold: OrderedDict[str, FieldReport] = OrderedDict()
        self._costs: OrderedDict[tuple[str, Site], BlueprintCost | None] = OrderedDict()
        self._gate = asyncio.Lock()
        self._gate_ahead = asyncio.Lock()
        self._names: dict[str, str] = {}
        self._away_until_s: dict[str, float] = {}
        self.failures: dict[str, int] = {"urza": 0, "karn": 0}

    async def candidates(self, packet: SystemStatePacket, layers: AbstractSet[str] | None = None) -> list[Candidate]:
        """Give every legal and allowed (layer, source, blueprint) of a packet, by layer in the model's order, then id.

        Skip seeds are taken from the library alone: Karn designs for a layer's own site. ``layers`` names the layers of
        interest; ``None`` takes all.

        Raises:
            InvalidInputError: ``allowed_blueprints`` is no expression.
        """
        found: list[Candidate] = []
        rule = _rule(packet)
        async with self._gate:
            for layer in packet.layers:
                if layer.site is None or (layers is not None and layer.layer not in layers):
                    continue
                asked = _Asked(layer.site, packet.run_id, packet.random_seed, _bounds(packet.budget), rule)
                designs = await self._blueprints(asked)
                found += self._priced(layer.layer, layer.site, _allowed(designs, rule))
                for skip in layer.skip_sites:
                    library = _allowed(self._library_at(skip.site), rule)
                    found += self._priced(layer.layer, skip.site, library, skip.source)
        return found

    async def ask_ahead(self, packet: SystemStatePacket) -> bool:
        """Ask Karn for the designs of one layer that `candidates` would ask for now; say whether there was such a one.

        A decision finds the answer, or waits for it in place of asking: it is the same. A failure is of no consequence
        to it: nothing but time is lost. Of any number of callers one at a time is let at Karn, beside decisions.

        Raises:
            InvalidInputError: ``allowed_blueprints`` is no expression.
            EsperError: Karn did not answer.
        """
        if self._karn is None or self._config.proposals == 0:
            return False
        rule = _rule(packet)
        async with self._gate_ahead, self._gate:
            for layer in packet.layers:
                if layer.site is None or not any(seed.state is SeedLifecycleState.DORMANT for seed in layer.seeds):
                    continue
                asked = _Asked(layer.site, packet.run_id, packet.random_seed, _bounds(packet.budget), rule)
                if self._current(asked) is None and not self._away("karn"):
                    await self._design(asked)
                    return True
        return False

    def held(self, packet: SystemStatePacket) -> list[Candidate]:
        """Give what of `candidates` follows from answers that are there; asks nobody.

        Where Karn's answer to what would be asked now is not there, those it gave the run before stand in for it.

        Raises:
            InvalidInputError: ``allowed_blueprints`` is no expression.
        """
        found: list[Candidate] = []
        rule = _rule(packet)
        for layer in packet.layers:
            if layer.site is None:
                continue
            asked = _Asked(layer.site, packet.run_id, packet.random_seed, _bounds(packet.budget), rule)
            known = {one.id: one for one in (*self._library_at(layer.site), *self._held_designs(asked))}
            found += self._priced(layer.layer, layer.site, _allowed([known[key] for key in sorted(known)], rule))
            for skip in layer.skip_sites:
                library = _allowed(self._library_at(skip.site), rule)
                found += self._priced(layer.layer, skip.site, library, skip.source)
        return found

    def _held_designs(self, asked: _Asked) -> list[Blueprint]:
        current = self._current(asked)
        answers = (
            [designs.blueprints for one, designs in self._designs.items() if one.is_like(asked)]
            if current is None
            else [current]
        )
        return [one for answer in answers for one in answer]

    def _library_at(self, site: Site) -> Sequence[Blueprint]:
        """Give the library's blueprints for a kind of site, as they were answered last."""
        held = self._library.get(site.kind)
        return sorted(held.blueprints, key=lambda one: one.id) if held else ()

    def _priced(self, layer: str, site: Site, designs: Sequence[Blueprint], source: str = "") -> list[Candidate]:
        priced = ((one, self._cost(one, site)) for one in designs)
        return [
            Candidate(layer=layer, site=site, blueprint=one, cost=cost, source=source)
            for one, cost in priced
            if cost is not None and (not source or reads_input(one.ir))  # on h alone a source changes nothing
        ]

    def name_of(self, blueprint_id: str) -> str:
        """Give the name of a blueprint that was offered before; empty for any other."""
        return self._names.get(blueprint_id, "")

    async def blueprints(self, site: Site) -> list[Blueprint]:
        """Give the blueprints that are legal at one site."""
        async with self._gate:
            found = await self._blueprints(_Asked(site))
        return [one for one in found if self._cost(one, site) is not None]

    def note_report(self, report: FieldReport) -> None:
        """Have Karn told of a trial, and designs for its kind of site asked for anew: they may be others now."""
        if not report.grew:
            return
        if report.site is not None:
            self._lessons[report.site.kind] += 1
        if self._karn is not None:
            self._untold[report.report_id] = report
            while len(self._untold) > _MAX_UNTOLD:  # with Karn away; the bus holds them for it
                self._untold.popitem(last=False)

    async def teach(self, reports: Sequence[FieldReport]) -> None:
        """Tell Karn now of reports from elsewhere, which no bus holds for it; then as `note_report`.

        Told again, they teach it nothing twice.

        Raises:
            EsperError: Karn did not answer; it may know some of them.
        """
        for report in reports:
            await self._tell_report(report)
        self._lessons.update(report.site.kind for report in reports if report.site is not None)

    async def _blueprints(self, asked: _Asked) -> list[Blueprint]:
        designs = {one.id: one for one in await self._of_library(asked.site.kind)}
        for one in await self._of_karn(asked):
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

    async def _of_karn(self, asked: _Asked) -> Sequence[Blueprint]:
        if self._karn is None or self._config.proposals == 0:
            return ()
        current = self._current(asked)
        if current is not None:
            return current
        try:
            if not self._away("karn"):
                return await self._design(asked)
        except EsperError as error:
            self._note_failure("karn", error)
        held = self._designs.get(asked)
        return held.blueprints if held else ()

    def _current(self, asked: _Asked) -> Sequence[Blueprint] | None:
        """Give Karn's answer if no report of its kind of site has come since."""
        held = self._designs.get(asked)
        return held.blueprints if held is not None and held.lessons == self._lessons[asked.site.kind] else None

    async def _design(self, asked: _Asked) -> Sequence[Blueprint]:
        """Ask Karn, and keep its answer."""
        lessons = self._lessons[asked.site.kind]
        found = await self._propose(asked)
        self._designs[asked] = _Designs(found, lessons)
        while len(self._designs) > _MAX_DESIGNS:
            self._designs.popitem(last=False)
        return found

    async def _propose(self, asked: _Asked) -> Sequence[Blueprint]:
        """Ask for designs, once Karn knows every report that this side knows; none where nothing keeps the bounds."""
        await self._tell_reports()
        request = karn_service_pb2.ProposeBlueprintsRequest(count=self._config.proposals, random_seed=asked.random_seed)
        request.site.CopyFrom(to_wire(asked.site))  # type: ignore[arg-type]
        limits = karn_service_pb2.ProposalConstraints(
            max_parameters=asked.bounds[0],
            max_flops=asked.bounds[1],
            allowed_blueprints="" if asked.rule is None else str(asked.rule),
        )
        request.constraints.CopyFrom(limits)
        assert self._karn is not None
        try:
            answer = await self._karn.ProposeBlueprints(request, timeout=self._config.call_timeout_s)
        except InvalidStateError as error:
            extra = {"site_kind": asked.site.kind.name, "bounds": asked.bounds, "reason": str(error)}
            log.info("no_designs", extra=extra)
            return ()
        return tuple(from_wire(one.blueprint, Blueprint) for one in answer.proposals)

    async def _tell_reports(self) -> None:
        """Hand Karn the reports it may not have yet: they reach it over the bus too, but nobody knows when."""
        for report_id, report in list(self._untold.items()):
            await self._tell_report(report)
            self._untold.pop(report_id, None)

    async def _tell_report(self, report: FieldReport) -> None:
        """Hand Karn one report, where there is a Karn."""
        if self._karn is None:
            return
        request = karn_service_pb2.KarnServiceSubmitFieldReportRequest()
        request.report.CopyFrom(to_wire(report))  # type: ignore[arg-type]
        try:
            await self._karn.SubmitFieldReport(request, timeout=self._config.call_timeout_s)
        except InvalidInputError as error:
            log.warning("report_refused", extra={"report_id": report.report_id, "error": str(error)})

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
        self._away_until_s[service] = self._clock() + self._config.refresh_s
        self.failures[service] += 1
        log.warning("candidates_stale", extra={"service": service, "reason": error.reason, "error": str(error)})


@dataclass(frozen=True, slots=True)
class _Answer:
    """Blueprints as they were answered, and when."""

    blueprints: Sequence[Blueprint]
    asked_at_s: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """What Karn is asked for, and by whom."""

    site: Site
    run_id: str = ""
    random_seed: int = 0
    bounds: tuple[int | None, int | None] = (None, None)
    rule: TagExpression | None = None

    def is_like(self, other: _Asked) -> bool:
        """Say whether it is asked for the same run and site, in whatever state."""
        return (self.site, self.run_id) == (other.site, other.run_id)


@dataclass(frozen=True, slots=True)
class _Designs:
    """Karn's answer, and how many reports of its kind of site had come before."""

    blueprints: Sequence[Blueprint]
    lessons: int


def _rule(packet: SystemStatePacket) -> TagExpression | None:
    """Give what a blueprint must keep to stand in the packet's run; ``None`` lets every one stand."""
    return parse_tags(packet.allowed_blueprints, parameter="state.allowed_blueprints")


def _allowed(designs: Sequence[Blueprint], rule: TagExpression | None) -> Sequence[Blueprint]:
    return [one for one in designs if is_allowed(one, rule)]


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
