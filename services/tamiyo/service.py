"""Tamiyo as a whole: decides on packets, keeps what it decided, learns from reports, and picks up where it stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

import numpy as np

from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import AdaptationDecision, AdaptationPlan
from esper.contracts.errors import CapacityExceededError, InvalidInputError, NotFoundError
from esper.contracts.lesson import ImportedMemory, Lesson
from esper.contracts.replay import ReplayedPacket
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.contracts.tag_expression import parse_tags
from esper.mesh.validation import TAG_PATTERN, require_id, require_name, require_range
from esper.services.tamiyo.calibration import MAX_CASES, check_evidence
from esper.services.tamiyo.candidates import CandidateSource
from esper.services.tamiyo.choices import CandidatePacker, Choice, part_of, settings_of
from esper.services.tamiyo.explanation import Explanation, explain
from esper.services.tamiyo.past import restore_run
from esper.services.tamiyo.performance_tracker import PerformanceTracker
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.posterior import Arm, family_of, features_of
from esper.services.tamiyo.replay import replay_run
from esper.services.tamiyo.seed_selection import SeedHistory, SeedSelection, SeedSelector
from esper.services.tamiyo.store import LessonKey, TamiyoStore
from esper.telemetry.subjects import check_run_id

log = logging.getLogger(__name__)

_MAX_FAMILY: Final = 32
_MAX_REPLAYS: Final = 2
"""Replays at once: each takes about the time that its decisions took."""


class Tamiyo:
    """The policy with its memory on disk. Belongs to one event loop; one instance per store.

    Work on one run is done in line: a decision is taken and stored before the run's next packet is looked at.
    """

    def __init__(
        self, store: TamiyoStore, policy: Policy, candidates: CandidateSource, *, random_seed: int = 0
    ) -> None:
        """Make a service over an open store.

        Args:
            store: Where packets, decisions and reports are kept.
            policy: Decides; owned by this service from now on.
            candidates: Tells where a run could grow and with what.
            random_seed: Seed of the draws of `select_seed`; decisions draw from the seeds of their runs.
        """
        self.store = store
        self.policy = policy
        self.tracker = PerformanceTracker()
        self.candidates = candidates
        self._gate = asyncio.Lock()
        self._random = np.random.default_rng(random_seed)
        self._packer = CandidatePacker()
        self._settings = part_of(settings_of(policy.config))
        self._num_lessons = 0
        self._num_replays = 0

    async def start(self) -> None:
        """Learn from every report that is kept, from here or from elsewhere.

        Raises:
            UnavailableError: The store cannot be reached.
        """
        reports = await self.store.reports()
        recent = reports[-MAX_CASES * self.policy.config.race_size :]  # older ones the calibrator would let go again
        begun = await self.store.decisions_of([stored.report.adaptation_id for stored in recent if stored.is_own])
        for stored in reports:
            decision = begun.get(stored.report.adaptation_id) if stored.is_own else stored.begun
            self.policy.recall(stored.report, family=stored.family, begun=decision)
        self._num_lessons = len(reports)
        log.info(
            "posterior_loaded",
            extra={"rewards": self.policy.posterior.num_observations, "unreadable": self.store.num_unreadable},
        )

    async def analyze(self, packet: SystemStatePacket) -> tuple[AdaptationDecision, ...]:
        """Decide on a packet, once: one decision, or those of a race; the same packet gives those taken before.

        Raises:
            InvalidInputError: The packet breaks a rule.
            InvalidStateError: The packet is stale: a newer one was seen, and this one was never decided on.
            UnavailableError: The store cannot be reached.
        """
        check_packet(packet)
        async with self._gate:
            await self._restore(packet.run_id)
            known = self.policy.decided(packet.run_id, packet.sequence)
            known = known or await self.store.decisions(packet.run_id, packet.sequence)
            if known:
                return known
            decisions = await self._decide(packet)
        self.tracker.observe_packet(packet)
        return decisions

    async def learn(self, report: FieldReport) -> bool:
        """Keep a report and learn from it, once; false when it was kept before.

        Raises:
            InvalidInputError: The report breaks a rule.
            UnavailableError: The store cannot be reached.
        """
        check_report(report)
        async with self._gate:
            begun = await self.store.decision_of(report.adaptation_id)
            family = family_of(begun.blueprint.ir) if begun is not None and begun.blueprint is not None else ""
            await self._restore(report.run_id)
            if not await self.store.add_report(report, family):
                return False
            self.policy.learn(report, family=family, begun=begun)
            self._num_lessons += 1
        self.tracker.observe_report(report)
        self.candidates.note_report(report)
        log.info(
            "report_learned",
            extra={
                "run_id": report.run_id,
                "adaptation_id": report.adaptation_id,
                "outcome": report.outcome.name,
                "reward": report.reward,
            },
        )
        return True

    async def lessons(
        self, run_id: str, limit: int, after: LessonKey | None
    ) -> Sequence[tuple[LessonKey, Lesson | None]]:
        """Give what was learned, in that order, with its sort keys; an empty run means all.

        ``None`` stands for one that no longer reads.
        """
        return await self.store.lessons(run_id, limit, after)

    async def import_lessons(self, lessons: Sequence[Lesson]) -> ImportedMemory:
        """Keep what another policy learned and learn it, once and in order: all of it, or nothing.

        It teaches what is worth what and how far confidence holds. No run here has lived it: rests, embargoes and
        decisions of runs are left alone, whatever their names.

        Raises:
            InvalidInputError: A lesson breaks a rule.
            UnavailableError: The store cannot be reached, or Karn, which is told first.
        """
        for lesson in lessons:
            check_lesson(lesson)
        await self.candidates.teach([lesson.report for lesson in lessons])
        async with self._gate:
            added, num_differing = await self.store.add_lessons(lessons)
            for lesson in added:
                self.policy.recall(lesson.report, family=lesson.family, begun=lesson.decision)
            self._num_lessons += len(added)
        known = len(lessons) - len(added) - num_differing
        log.info("lessons_imported", extra={"learned": len(added), "known": known, "differing": num_differing})
        return ImportedMemory(learned=len(added), known=known, differing=num_differing)

    async def note_plan(self, plan: AdaptationPlan) -> None:
        """Take in what a run made of a decision, and keep what gives one up.

        Raises:
            InvalidInputError: The run id is not legal.
            UnavailableError: The store cannot be reached.
        """
        check_run_id(plan.run_id)
        async with self._gate:
            await self._restore(plan.run_id)
            if not self.policy.note_plan(plan):
                return
            try:
                await self.store.add_plan(plan)
            except BaseException:
                self.policy.forget(plan.run_id)
                raise

    async def select_seed(self, layer: str, seeds: Sequence[SeedHistory], site: Site | None) -> SeedSelection:
        """Draw a seed of a layer; with a site, the best blueprint known for it is the prior of seeds never tried.

        Raises:
            InvalidInputError: The layer or the seeds break a rule.
            InvalidStateError: No seed is available.
        """
        config = self.policy.config.selection
        if site is not None:
            blueprints = await self.candidates.blueprints(site)
            asked = [
                features_of(site, one.id, parameters=None, progress=None, family=family_of(one.ir))
                for one in blueprints
            ]
            beliefs = self.policy.posterior.believe(asked, self._random)
            if beliefs:
                config = replace(config, prior_mean=max(belief.mean for belief in beliefs))
        selector = SeedSelector(self._random.integers(0, 2**63, size=4).tolist(), config)
        return selector.select_seed_for_adaptation(layer, seeds)

    async def decisions(
        self, run_id: str, limit: int, after: tuple[int, str] | None
    ) -> Sequence[tuple[tuple[int, str], AdaptationDecision]]:
        """Give decisions newest first with their sort keys; an empty run means all."""
        return await self.store.list_decisions(run_id, limit, after)

    async def explain(self, adaptation_id: str) -> Explanation:
        """Give a decision with its race and what became of them.

        Raises:
            InvalidInputError: The id breaks a rule.
            NotFoundError: The decision is not ours.
            UnavailableError: The store cannot be reached.
        """
        require_id("adaptation_id", adaptation_id)
        decision = await self.store.decision_of(adaptation_id)
        if decision is None:
            raise NotFoundError(f"adaptation_id must name a decision of this policy, got {adaptation_id}")
        together = await self.store.decisions(decision.run_id, decision.state_sequence)
        reports = await self.store.reports_of(decision.run_id)
        return explain(decision, together, [one.report for one in reports])

    async def replay(self, run_id: str, *, present_settings: bool = False) -> AsyncGenerator[ReplayedPacket, None]:
        """Take the decisions of a run again, packet by packet, beside the work at hand; see `replay.replay_run`.

        Raises:
            CapacityExceededError: Too many replays are under way.
        """
        check_run_id(run_id)
        if self._num_replays >= _MAX_REPLAYS:
            raise CapacityExceededError(f"replays under way must be at most {_MAX_REPLAYS}, got one more")
        self._num_replays += 1
        try:
            async with aclosing(
                replay_run(self.store, run_id, self.policy.config, present_settings=present_settings)
            ) as replayed:
                async for packet in replayed:
                    yield packet
        finally:
            self._num_replays -= 1

    def posterior(self, site_kind: SiteKind | None) -> list[tuple[Arm, str]]:
        """Give every arm with the name of its blueprint (empty where it is not known), best mean first."""
        return [(arm, self.candidates.name_of(arm.blueprint_id)) for arm in self.policy.posterior.arms(site_kind)]

    async def _decide(self, packet: SystemStatePacket) -> tuple[AdaptationDecision, ...]:
        """Decide and store; when that fails the run is forgotten, so that it is read back before the next try."""
        previous_sequence = self.policy.last_sequence(packet.run_id)
        wanted = self.policy.begin(packet)
        try:
            candidates = await self.candidates.candidates(packet, wanted) if wanted else []
            decisions = self.policy.analyze(packet, candidates)
            listed, parts = self._packer.pack(candidates, wanted) if wanted else ("", {})
            settings, payload = self._settings
            choice = Choice(
                previous_sequence=previous_sequence,
                moment_us=self.store.moment_us,
                num_lessons=self._num_lessons,
                candidates=listed,
                settings=settings,
            )
            await self.store.keep(packet, decisions, choice, {settings: payload, **parts})
        except BaseException:
            self.policy.forget(packet.run_id)
            raise
        return decisions

    async def _restore(self, run_id: str) -> None:
        """Read a run back that is in the store and not in memory."""
        if not self.policy.remembers(run_id):
            await restore_run(self.store, self.policy, run_id)


def check_packet(packet: SystemStatePacket) -> None:
    """Refuse a packet that breaks a rule of the wire.

    Raises:
        InvalidInputError: The run id, the sequence, a layer, a budget or ``allowed_blueprints`` is not legal.
    """
    check_run_id(packet.run_id)
    parse_tags(packet.allowed_blueprints, parameter="state.allowed_blueprints")
    require_range("state.sequence", packet.sequence, low=1)
    names = [layer.layer for layer in packet.layers]
    if len(set(names)) != len(names):
        raise InvalidInputError.of("state.layers", "name every layer once", names)
    for layer in packet.layers:
        indices = [seed.seed_index for seed in layer.seeds]
        if len(set(indices)) != len(indices):
            raise InvalidInputError.of(f"state.layers[{layer.layer}].seeds", "name every seed once", indices)


def check_report(report: FieldReport) -> None:
    """Refuse a report that breaks a rule of the wire.

    Raises:
        InvalidInputError: An id, the contribution, the price or the confidence is not legal.
    """
    require_id("report.report_id", report.report_id)
    require_id("report.adaptation_id", report.adaptation_id)
    check_run_id(report.run_id)
    require_range("report.decision_confidence", report.decision_confidence, low=0.0, high=1.0)
    if report.price is not None:
        require_range("report.price", report.price, low=0.0)
    if report.run_progress is not None:
        require_range("report.run_progress", report.run_progress, low=0.0, high=1.0)
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


def check_lesson(lesson: Lesson) -> None:
    """Refuse a lesson that breaks a rule of the wire, or that nothing can be learned from.

    Raises:
        InvalidInputError: The report, the family or the decision is not legal, or the decision is another's.
    """
    check_report(lesson.report)
    if lesson.family:
        require_name("lesson.family", lesson.family, max_len=_MAX_FAMILY, pattern=TAG_PATTERN)
    if lesson.decision is None:
        return
    if lesson.decision.adaptation_id != lesson.report.adaptation_id:
        raise InvalidInputError.of(
            "lesson.decision.adaptation_id",
            f"be that of its report, {lesson.report.adaptation_id}",
            lesson.decision.adaptation_id,
        )
    check_evidence(lesson.decision)
