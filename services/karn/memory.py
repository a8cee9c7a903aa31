"""What Karn holds of the newest reports: the archive, and a surrogate for every kind of site.

A report that teaches something is a lesson. The newest lessons count, by when their reports came, and what is older is
forgotten as if it had never come: memory, and the time that a report or a request takes, do not grow with the age of a
store. A set of reports makes one memory, in whatever order they are taken in.
"""

from __future__ import annotations

import logging
from bisect import insort
from statistics import NormalDist
from typing import Final

from esper.blueprints import BlueprintRegistry
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError
from esper.contracts.run import AdaptationOutcome, FieldReport
from esper.services.karn.archive import Archive, Look
from esper.services.karn.design import DesignView, view
from esper.services.karn.store import ReportKey
from esper.services.karn.surrogate import Sample, Surrogate, SurrogateConfig

log = logging.getLogger(__name__)

MAX_LESSONS: Final = 1_000
"""Newest lessons that count, over all kinds of site."""

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


class Memory:
    """Archive and surrogates, made from templates and lessons. Not thread-safe."""

    def __init__(
        self, registry: BlueprintRegistry, surrogate: SurrogateConfig | None = None, max_lessons: int = MAX_LESSONS
    ) -> None:
        """Make a memory that holds templates alone.

        Args:
            registry: Templates; each stands in the archive of the kinds of site where it is legal.
            surrogate: Prior of the expected reward.
            max_lessons: Newest lessons that count. At least 1.

        Raises:
            InvalidInputError: ``max_lessons`` is below 1.
        """
        if max_lessons < 1:
            raise InvalidInputError.of("max_lessons", "be >= 1", max_lessons)
        self.archive = Archive()
        self._max_lessons = max_lessons
        self._surrogate_config = surrogate
        self._surrogates: dict[SiteKind, Surrogate] = {}
        self._lessons: list[tuple[ReportKey, SiteKind, str]] = []
        for site in REFERENCE_SITES:
            for template in registry.for_site(site):
                seen = view(template.ir, site)
                self.archive.add(site.kind, template, Look(seen.cell, seen.figures))

    @property
    def num_lessons(self) -> int:
        """Lessons that count."""
        return len(self._lessons)

    @property
    def is_full(self) -> bool:
        """Whether a lesson more makes the oldest be forgotten."""
        return len(self._lessons) >= self._max_lessons

    def surrogate(self, kind: SiteKind) -> Surrogate:
        """Give the surrogate of a kind of site."""
        return self._surrogates.setdefault(kind, Surrogate(self._surrogate_config))

    def learn(self, key: ReportKey, report: FieldReport, design: Blueprint) -> bool:
        """Learn a report of a design; false when it teaches nothing, counts already or is too old to count."""
        sample = sample_of(report, design)
        if sample is None:
            log.info("report_without_lesson", extra={"report_id": report.report_id})
            return False
        seen, learned = sample
        kind = seen.layout.site.kind
        if not self.surrogate(kind).learn(learned):
            return False
        self.archive.learn(kind, design, report.report_id, learned.reward, Look(seen.cell, seen.figures))
        lesson = (key, kind, design.id)
        insort(self._lessons, lesson)
        return not (len(self._lessons) > self._max_lessons and self._forget_oldest() == lesson)

    def _forget_oldest(self) -> tuple[ReportKey, SiteKind, str]:
        lesson = self._lessons.pop(0)
        (_, report_id), kind, blueprint_id = lesson
        self.surrogate(kind).forget(report_id)
        self.archive.forget(kind, blueprint_id, report_id)
        return lesson


def teaches(report: FieldReport) -> bool:
    """Say whether a report has something to teach of its design, whichever that is."""
    return bool(report.blueprint_id) and report.site is not None and _reward(report) is not None


def sample_of(report: FieldReport, design: Blueprint) -> tuple[DesignView, Sample] | None:
    """Give what a report teaches of a design and how the design looked there; ``None`` when it teaches nothing.

    The interval of a contribution is read by its own coverage, which is higher where a seed is looked at several times.
    A trial that the governor took back unmeasured counts as a reward of -0.05, as uncertain as it is large.
    """
    measured = _reward(report)
    if report.site is None or measured is None:
        return None
    try:
        seen = view(design.ir, report.site)
    except InvalidBlueprintError as error:
        log.warning("report_of_illegal_design", extra={"report_id": report.report_id, "error": str(error)})
        return None
    reward, variance = measured
    return seen, Sample(report_id=report.report_id, figures=seen.figures, reward=reward, variance=variance)


def _reward(report: FieldReport) -> tuple[float, float] | None:
    """Give reward and variance of a trial; ``None`` where there was none, or nobody measured it."""
    if not report.grew:
        return None
    reward, measured = report.reward, report.contribution
    if reward is not None and measured is not None:
        quantile = _NORMAL.inv_cdf(0.5 + measured.confidence_level / 2.0)
        return reward, ((measured.high - measured.low) / (2.0 * quantile)) ** 2
    return (-0.05, 0.05**2) if report.outcome is AdaptationOutcome.ROLLED_BACK else None
