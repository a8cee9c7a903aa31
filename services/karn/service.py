"""Karn as a whole: proposes, keeps what it proposed, learns from reports, and picks up where it stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Final

from esper.blueprints import BlueprintRegistry, default_registry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError, NotFoundError
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.mesh.validation import require_id, require_range
from esper.services.karn.archive import Archive, Entry
from esper.services.karn.design import DesignView, view
from esper.services.karn.library import Library
from esper.services.karn.proposer import Constraints, Proposal, Proposer
from esper.services.karn.store import KarnStore
from esper.services.karn.surrogate import Sample, Surrogate, SurrogateConfig
from esper.telemetry.subjects import check_run_id

log = logging.getLogger(__name__)

REFERENCE_SITES: Final = (
    Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.CONV1D, input_shape=(16, 32), output_shape=(16, 32)),
    Site(kind=SiteKind.CONV2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
    Site(kind=SiteKind.ATTENTION, input_shape=(16, 64), output_shape=(16, 64)),
    Site(kind=SiteKind.LAYER_NORM, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.BATCH_NORM1D, input_shape=(64,), output_shape=(64,)),
    Site(kind=SiteKind.BATCH_NORM2D, input_shape=(16, 16, 16), output_shape=(16, 16, 16)),
)
"""Where templates are measured for the archive before a report says where they stand."""

_NORMAL: Final = NormalDist()


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
    ) -> None:
        """Make a designer over an open store.

        Args:
            store: Where designs and reports are kept.
            library: Where proposals are stored before they are given; ``None`` stores them here alone.
            registry: Templates that designs begin from; ``None`` takes those that ship with Esper.
            surrogate: Prior of the expected reward.
        """
        self.store = store
        self._library = library
        self._registry = registry or default_registry()
        self._surrogate_config = surrogate
        self._surrogates: dict[SiteKind, Surrogate] = {}
        self._archive = Archive()
        self._designs: dict[str, Blueprint] = {}
        self._gate = asyncio.Lock()
        for name in self._registry.names():
            template = self._registry.create_blueprint(name)
            self._designs[template.id] = template
        for site in REFERENCE_SITES:
            for template in self._registry.for_site(site):
                seen = view(template.ir, site)
                self._archive.add(site.kind, template, seen.cell, seen.figures)

    async def start(self) -> None:
        """Take in every design and report that is kept.

        Raises:
            UnavailableError: The store cannot be reached.
        """
        self._designs.update(await self.store.designs())
        reports = await self.store.reports()
        for report in reports:
            try:
                check_report(report)
            except InvalidInputError as error:  # kept by a version that had fewer rules
                log.warning("stored_report_refused", extra={"report_id": report.report_id, "error": str(error)})
            else:
                self._learn(report)
        log.info("archive_loaded", extra={"designs": len(self._designs), "reports": len(reports)})

    async def propose(self, site: Site, count: int, constraints: Constraints, random_seed: int) -> list[Proposal]:
        """Give up to ``count`` proposals, most promising first, each stored before it is given.

        Raises:
            InvalidInputError: The count, a bound or the site is not legal.
            InvalidStateError: No design keeps the constraints and passes its test.
            UnavailableError: The library or the store cannot be reached.
        """
        async with self._gate:
            proposer = Proposer(self._registry, self._archive, self._surrogate(site.kind))
            found = await asyncio.to_thread(proposer.propose, site, count, constraints, random_seed)
            if self._library is not None:
                found = [
                    replace(one, blueprint=await self._library.store(one.blueprint, self._designs)) for one in found
                ]
            await self.store.add_designs([one.blueprint for one in found])
            self._designs.update((one.blueprint.id, one.blueprint) for one in found)
        return found

    async def learn(self, report: FieldReport) -> bool:
        """Keep a report and learn from it, once; false when it was kept before.

        Raises:
            InvalidInputError: The report breaks a rule.
            UnavailableError: The store cannot be reached, or the library for a design made elsewhere.
        """
        check_report(report)
        async with self._gate:
            if await self.store.has_report(report.report_id):
                return False
            await self._look_up(report.blueprint_id)
            added = await self.store.add_report(report)
            if added:
                self._learn(report)
        return added

    def elites(self, kind: SiteKind) -> Sequence[Entry]:
        """Give the best design of every occupied cell, by the cell's name."""
        return self._archive.elites(kind)

    async def _look_up(self, blueprint_id: str) -> None:
        """Fetch a design that somebody else made, so that its figures can be learned from."""
        if not blueprint_id or blueprint_id in self._designs or self._library is None:
            return
        try:
            design = await self._library.get(blueprint_id)
        except NotFoundError:
            log.warning("design_unknown", extra={"blueprint_id": blueprint_id})
            return
        await self.store.add_designs([design])
        self._designs[design.id] = design

    def _learn(self, report: FieldReport) -> None:
        design = self._designs.get(report.blueprint_id)
        sample = None if design is None else sample_of(report, design)
        if design is None or sample is None:
            log.info("report_without_lesson", extra={"report_id": report.report_id, "known": design is not None})
            return
        seen, learned = sample
        kind = seen.layout.site.kind
        self._surrogate(kind).learn(learned)
        entry = self._archive.add(kind, design, seen.cell, seen.figures)
        entry.learn(report.report_id, learned.reward, cell=seen.cell, figures=seen.figures)

    def _surrogate(self, kind: SiteKind) -> Surrogate:
        return self._surrogates.setdefault(kind, Surrogate(self._surrogate_config))


def sample_of(report: FieldReport, design: Blueprint) -> tuple[DesignView, Sample] | None:
    """Give what a report teaches of a design and how the design looked there; ``None`` when it teaches nothing.

    The interval of a contribution is read by its own coverage, which is higher where a seed is looked at several times.
    A trial that the governor took back unmeasured counts as a reward of -0.05, as uncertain as it is large.
    """
    if report.site is None or not report.grew:
        return None
    reward, measured = report.reward, report.contribution
    if reward is not None and measured is not None:
        quantile = _NORMAL.inv_cdf(0.5 + measured.confidence_level / 2.0)
        variance = ((measured.high - measured.low) / (2.0 * quantile)) ** 2
    elif report.outcome is AdaptationOutcome.ROLLED_BACK:
        reward, variance = -0.05, 0.05**2
    else:
        return None
    try:
        seen = view(design.ir, report.site)
    except InvalidBlueprintError as error:
        log.warning("report_of_illegal_design", extra={"report_id": report.report_id, "error": str(error)})
        return None
    return seen, Sample(report_id=report.report_id, figures=seen.figures, reward=reward, variance=variance)


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
