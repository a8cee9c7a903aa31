"""What the orchestrator tells the mesh: every step of a seed with its reason, every plan, every outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from esper.contracts.decision import AdaptationPlan, PlanStatus
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport, GateCheck, SeedEvent
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.execution.state import SeedTransition
from esper.telemetry.subjects import Kind

_MAX_REASON = 500
_FAILURES = frozenset({SeedLifecycleState.ERROR, SeedLifecycleState.CULLED})


class Teller:
    """Builds and sends a run's plans, seed events and field reports; belongs to the training thread."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._cause: tuple[str, tuple[GateCheck, ...], bool] = ("", (), False)

    @contextmanager
    def because(self, reason: str, checks: tuple[GateCheck, ...] = (), *, hoped: bool = False) -> Iterator[None]:
        """Let transitions made inside carry this reason; with ``hoped`` those into failure do not."""
        self._cause = (reason, checks, hoped)
        try:
            yield
        finally:
            self._cause = ("", (), False)

    def seed_step(self, transition: SeedTransition, adaptation: Adaptation | None) -> None:
        """Tell a step that a seed has taken."""
        context = self._context
        reason, checks, hoped = self._cause
        if hoped and transition.to_state in _FAILURES:
            reason, checks = "", ()
        event = SeedEvent(
            run_id=context.run_id,
            adaptation_id=adaptation.id if adaptation is not None else "",
            layer=transition.layer,
            seed_index=transition.seed_index,
            from_state=transition.from_state,
            to_state=transition.to_state,
            step=context.clock.step,
            epoch=context.clock.epoch,
            alpha=transition.alpha,
            reason=reason[:_MAX_REASON],
            checks=checks,
            created_at=datetime.now(UTC),
        )
        context.link.send(Kind.SEED, event, layer=transition.layer)

    def plan(self, adaptation_id: str, status: PlanStatus, reason: str, checks: tuple[GateCheck, ...] = ()) -> None:
        """Tell what became of a decision."""
        plan = AdaptationPlan(
            adaptation_id=adaptation_id,
            run_id=self._context.run_id,
            status=status,
            checks=checks,
            step=self._context.clock.step,
            reason=reason[:_MAX_REASON],
            created_at=datetime.now(UTC),
        )
        self._context.link.send(Kind.PLAN, plan)

    def outcome(self, adaptation: Adaptation) -> None:
        """Tell how an adaptation ended: its field report, and its plan's end."""
        context = self._context
        report = _legal(adaptation.field_report(context.run_id))
        with adaptation.span("report", context.run_id):
            context.link.send(Kind.FIELD_REPORT, report, layer=adaptation.layer or None, msg_id=report.report_id)
            failed = adaptation.outcome is AdaptationOutcome.FAILED
            self.plan(adaptation.id, PlanStatus.FAILED if failed else PlanStatus.COMPLETED, adaptation.reason)

    def recheck(
        self, adaptation: Adaptation, contribution: Contribution | None, price: float | None, reason: str
    ) -> None:
        """Tell what a kept seed was measured to bring now; ``None`` where that is no number."""
        context = self._context
        # Packets are numbered on through a roll-back, and in a run that is taken up again.
        report = adaptation.recheck_report(context.run_id, context.clock.packets, contribution, price, reason)
        context.link.send(Kind.FIELD_REPORT, report, layer=adaptation.layer, msg_id=report.report_id)


def _legal(report: FieldReport) -> FieldReport:
    """Leave out a measured effect that is no number: services refuse the report, and would not learn how it ended."""
    effect = report.contribution
    if effect is None or all(map(math.isfinite, (effect.estimate, effect.low, effect.high))):
        return report
    return replace(report, contribution=None, reason=f"{report.reason}; its effect is no number"[:_MAX_REASON])
