"""Karn as a whole: proposes, keeps what it proposed, learns from reports, and picks up where it stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from esper.blueprints import BlueprintRegistry, default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import (
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.run import FieldReport
from esper.mesh.validation import require_id, require_range
from esper.services.karn.archive import Entry
from esper.services.karn.library import Library
from esper.services.karn.memory import MAX_LESSONS, Memory, teaches
from esper.services.karn.proposer import Constraints, Proposal, Proposer
from esper.services.karn.store import KarnStore, ReportKey
from esper.services.karn.surrogate import SurrogateConfig
from esper.services.karn.waiting import WaitingReports
from esper.telemetry.subjects import check_run_id

log = logging.getLogger(__name__)

_BATCH: Final = 200
"""Reports read at once at the start."""


class Karn:
    """The designer with its memory on disk. Belongs to one event loop; one instance per store.

    Proposals are made in a thread, one request at a time; reports wait meanwhile.
    """

    def __init__(
        self,
        store: KarnStore,
        library: Library | None = None,
        *,
        registry: BlueprintRegistry | None = None,
        surrogate: SurrogateConfig | None = None,
        max_lessons: int = MAX_LESSONS,
    ) -> None:
        """Make a designer over an open store.

        Args:
            store: Where designs and reports are kept.
            library: Where proposals are stored before they are given; ``None`` stores them here alone.
            registry: Templates that designs begin from; ``None`` takes those that ship with Esper.
            surrogate: Prior of the expected reward.
            max_lessons: Newest reports that count, of those that teach something. At least 1.

        Raises:
            InvalidInputError: ``max_lessons`` is below 1.
        """
        self.store = store
        self._library = library
        self._registry = registry or default_registry()
        self._memory = Memory(self._registry, surrogate, max_lessons)
        self._waiting = WaitingReports(max_lessons)
        self._gate = asyncio.Lock()
        templates = [self._registry.create_blueprint(name) for name in self._registry.names()]
        self._templates = {template.id: template for template in templates}

    async def start(self) -> None:
        """Take in the newest reports that are kept, and ask the library for designs that were not known.

        Raises:
            UnavailableError: The store cannot be reached.
        """
        before: ReportKey | None = None
        num_read = 0
        while not self._memory.is_full and (batch := await self.store.reports(_BATCH, before)):
            before, num_read = batch[-1][0], num_read + len(batch)
            await self._take_in([(key, report) for key, report in batch if report is not None])
        await self._look_up_waiting()
        log.info("archive_loaded", extra={"reports": num_read, "lessons": self._memory.num_lessons})

    async def propose(self, site: Site, count: int, constraints: Constraints, random_seed: int) -> list[Proposal]:
        """Give up to ``count`` proposals, most promising first, each stored before it is given.

        Raises:
            InvalidInputError: The count, a bound or the site is not legal.
            InvalidStateError: No design keeps the constraints and passes its test.
            UnavailableError: The library or the store cannot be reached.
        """
        async with self._gate:
            await self._look_up_waiting()
            proposer = Proposer(self._registry, self._memory.archive, self._memory.surrogate(site.kind))
            found = await asyncio.to_thread(proposer.propose, site, count, constraints, random_seed)
            if self._library is not None:
                found = [replace(one, blueprint=await self._library.store(one.blueprint, self._held)) for one in found]
            designs = [one.blueprint for one in found]
            await self.store.add_designs(designs)
            for design in designs:
                self._learn_waiting(design)
        return found

    async def learn(self, report: FieldReport) -> bool:
        """Keep a report and learn from it, once; false when it was kept before.

        One of a design that nobody knows is learned when the design comes by, or at the next start.

        Raises:
            InvalidInputError: The report breaks a rule.
            UnavailableError: The store cannot be reached, or the library for a design made elsewhere.
        """
        check_report(report)
        async with self._gate:
            if await self.store.has_report(report.report_id):
                return False
            design = await self._held(report.blueprint_id)
            if design is None and (design := await self._look_up(report.blueprint_id)) is not None:
                await self.store.add_designs([design])
            key = await self.store.add_report(report)
            if key is not None:
                self._learn(key, report, design)
            if design is not None:
                self._learn_waiting(design)
        return key is not None

    def elites(self, kind: SiteKind) -> Sequence[Entry]:
        """Give the best design of every occupied cell, by the cell's name."""
        return self._memory.archive.elites(kind)

    async def _take_in(self, reports: Sequence[tuple[ReportKey, FieldReport]]) -> None:
        """Learn reports that were kept, the newest first, until no older one counts."""
        designs = await self.store.designs({report.blueprint_id for _, report in reports}) | self._templates
        for key, report in reports:
            if self._memory.is_full:
                return
            try:
                check_report(report)
            except InvalidInputError as error:  # kept by a version that had fewer rules
                log.warning("stored_report_refused", extra={"report_id": report.report_id, "error": str(error)})
            else:
                self._learn(key, report, designs.get(report.blueprint_id))

    async def _held(self, blueprint_id: str) -> Blueprint | None:
        """Give a design that is known here."""
        return self._templates.get(blueprint_id) or await self.store.design(blueprint_id)

    async def _look_up(self, blueprint_id: str) -> Blueprint | None:
        """Fetch a design that somebody else made, so that its figures can be learned from."""
        if not blueprint_id or self._library is None:
            return None
        try:
            return await self._library.get(blueprint_id)
        except NotFoundError:
            log.warning("design_unknown", extra={"blueprint_id": blueprint_id})
            self._waiting.note_asked(blueprint_id)
            return None

    async def _look_up_waiting(self) -> None:
        """Ask the library for the designs that reports wait for, each once; an outage leaves the rest for next time."""
        for blueprint_id in self._waiting.unasked():
            try:
                design = await self._look_up(blueprint_id)
            except EsperError as error:
                extra = {"blueprint_id": blueprint_id, "reason": error.reason, "error": str(error)}
                log.warning("design_not_looked_up", extra=extra)
                if isinstance(error, UnavailableError | DeadlineExceededError):
                    return
                self._waiting.note_asked(blueprint_id)
                continue
            if design is not None:
                await self.store.add_designs([design])
                self._learn_waiting(design)

    def _learn(self, key: ReportKey, report: FieldReport, design: Blueprint | None) -> None:
        if design is not None:
            self._memory.learn(key, report, design)
        elif teaches(report):
            self._waiting.add(key, report)
            log.info("report_waits_for_its_design", extra={"report_id": report.report_id})

    def _learn_waiting(self, design: Blueprint) -> None:
        for key, report in self._waiting.take(design.id):
            learned = self._memory.learn(key, report, design)
            log.info("waiting_report_taken_in", extra={"report_id": report.report_id, "learned": learned})


def check_report(report: FieldReport) -> None:
    """Refuse a report that breaks a rule of the wire.

    Raises:
        InvalidInputError: An id, the contribution or the price is not legal.
    """
    require_id("report.report_id", report.report_id)
    require_id("report.adaptation_id", report.adaptation_id)
    check_run_id(report.run_id)
    if report.price is not None:
        require_range("report.price", report.price, low=0.0)
    measured = report.contribution
    if measured is not None:
        for name in ("estimate", "low", "high"):
            require_range(f"report.contribution.{name}", getattr(measured, name))
        if not measured.low <= measured.high:
            raise InvalidInputError.of("report.contribution", "have low <= high", (measured.low, measured.high))
        if not 0.5 <= measured.confidence_level < 1.0:
            raise InvalidInputError.of(
                "report.contribution.confidence_level", "be within [0.5, 1)", measured.confidence_level
            )
