"""One adaptation of a run: what was decided, how far it has come, what was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import NoneType
from typing import Any, Final

from opentelemetry.trace import Span

from esper.contracts.blueprint import BlueprintCost
from esper.contracts.decision import AdaptationDecision
from esper.contracts.errors import CorruptDataError
from esper.contracts.kernel import CompileFallback
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import RECHECK, AdaptationOutcome, Contribution, FieldReport
from esper.contracts.wire import parse, serialize
from esper.core.clock import RunClock
from esper.core.report import AdaptationSummary, place_of
from esper.telemetry.tracing import adaptation_span, current_trace_id, extract_context
from esper.telemetry.tracing_context import current_headers


@dataclass(kw_only=True, slots=True)
class Adaptation:
    """Mutable record of one adaptation; belongs to the training thread."""

    decision: AdaptationDecision
    """What was asked for; a command by hand is written down as a decision too."""
    cost: BlueprintCost | None = None
    """Exact cost at the site; ``None`` where no blueprint is used."""
    price: float | None = None
    """What the contribution must beat, in units of loss."""
    slowdown: float | None = None
    """What its seed adds to the time of the host's forward pass, as a share of it; ``None`` where no price asks."""
    state: SeedLifecycleState | None = None
    """Life-cycle state of its seed; ``None`` where no seed is meant."""
    outcome: AdaptationOutcome | None = None
    """How it ended; ``None`` while it is open."""
    contribution: Contribution | None = None
    """Last measured effect."""
    artifact_id: str = ""
    """Kernel; empty until it was loaded."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets that the compile of its kernel gave up, in the order they were tried."""
    begun_step: int = 0
    """Step at which it was accepted."""
    begun_epoch: int = 0
    """Epoch in which it was accepted."""
    begun_monotonic_s: float = 0.0
    """Monotonic time at which it was accepted; a seed may not stay LOADING for ever."""
    run_progress: float | None = None
    """Planned progress of the run when it was accepted."""
    state_since_epoch: int = 0
    """Epoch in which its present state was entered."""
    awaits_turn: bool = False
    """Whether it waits to be tried in company, since learning alone told nothing of it (``esper.core.race``)."""
    isolated_steps: int = 0
    """Steps spent learning behind the host's back."""
    graft_steps: int = 0
    """Steps spent blended in."""
    ended_step: int | None = None
    """Step at which it ended."""
    looks: int = 0
    """Times its effect was measured while blended in."""
    reason: str = ""
    """Why it ended so, in words."""
    trace_id: str = ""
    """Trace it belongs to, 32 hex digits; empty when tracing is off."""
    trace_headers: Mapping[str, str] = field(default_factory=current_headers)
    """W3C context in which it was made, so that what follows joins its trace."""

    @classmethod
    def begun(cls, decision: AdaptationDecision, clock: RunClock) -> Adaptation:
        """Give the record of an adaptation that begins now, in the present trace."""
        return cls(
            decision=decision,
            begun_step=clock.step,
            begun_epoch=clock.epoch,
            begun_monotonic_s=time.monotonic(),
            run_progress=clock.progress,
            state_since_epoch=clock.epoch,
            trace_id=current_trace_id() or "",
        )

    @property
    def id(self) -> str:
        """Adaptation id."""
        return self.decision.adaptation_id

    @property
    def layer(self) -> str:
        """Dotted name of the layer."""
        return self.decision.layer

    @property
    def seed_index(self) -> int:
        """Seed within the layer; 0 where no seed is meant."""
        return self.decision.seed_index or 0

    def unkeep(self, outcome: AdaptationOutcome, reason: str) -> None:
        """Let what was told as kept have ended otherwise; one that was not kept stays as it ended."""
        if self.outcome is AdaptationOutcome.KEPT:
            self.outcome, self.reason = outcome, reason[:500]

    @property
    def label(self) -> str:
        """What people call it: blueprint and place."""
        name = self.decision.blueprint.name if self.decision.blueprint is not None else self.id
        return f"{name} at {place_of(self.layer, self.decision.source)}"

    @property
    def open(self) -> bool:
        """Whether it has not ended yet."""
        return self.outcome is None

    def span(self, name: str, run_id: str) -> AbstractContextManager[Span]:
        """Open the span of one of its phases, in the trace of its decision."""
        return adaptation_span(name, self.id, parent=extract_context(self.trace_headers), run_id=run_id)

    def field_report(self, run_id: str) -> FieldReport:
        """Give the report of an ended adaptation."""
        assert self.outcome is not None
        return FieldReport(
            report_id=f"r{self.id[1:]}",
            adaptation_id=self.id,
            run_id=run_id,
            layer=self.layer,
            seed_index=self.seed_index,
            site=self.decision.site,
            blueprint_id=self.decision.blueprint_id,
            artifact_id=self.artifact_id,
            outcome=self.outcome,
            contribution=self.contribution,
            cost=self.cost,
            price=self.price,
            isolated_steps=self.isolated_steps,
            graft_steps=self.graft_steps,
            begun_epoch=self.begun_epoch,
            run_progress=self.run_progress,
            decision_confidence=self.decision.confidence,
            reason=self.reason,
            created_at=datetime.now(UTC),
            adaptation_type=self.decision.adaptation_type.value,
            source=self.decision.source,
            race_id=self.decision.race_id,
            fallbacks=self.fallbacks,
        )

    def recheck_report(
        self, run_id: str, number: int, contribution: Contribution | None, price: float | None, reason: str
    ) -> FieldReport:
        """Give the report of a kept seed that was measured again.

        Nothing was tried anew, so it names neither blueprint nor kernel. ``number`` tells it from the run's others on
        this seed.
        """
        return replace(
            self.field_report(run_id),
            report_id=f"r{self.id[1:]}-{number}",
            adaptation_type=RECHECK,
            blueprint_id="",
            artifact_id="",
            fallbacks=(),
            contribution=contribution,
            price=price,
            reason=reason[:500],
        )

    def summary(self, step: int) -> AdaptationSummary:
        """Give the line of the run's report; ``step`` is the run's present step."""
        blueprint = self.decision.blueprint
        state = self.state.name.lower() if self.state is not None else ""
        outcome = self.outcome.name.lower() if self.outcome is not None else "open"
        return AdaptationSummary(
            id=self.id,
            layer=self.layer,
            source=self.decision.source,
            seed_index=self.decision.seed_index,
            adaptation_type=self.decision.adaptation_type.value,
            blueprint=blueprint.name if blueprint is not None else "",
            state=state or outcome,
            outcome=outcome,
            contribution=None if self.contribution is None else self.contribution.estimate,
            interval=AdaptationSummary.interval_of(self.contribution),
            price=self.price,
            parameters=self.cost.parameters if self.cost is not None else 0,
            steps=(self.ended_step if self.ended_step is not None else step) - self.begun_step,
            begun_epoch=self.begun_epoch,
            graft_steps=self.graft_steps,
            trace_id=self.trace_id,
            reason=self.reason,
        )

    def to_plain(self) -> dict[str, Any]:
        """Give the record as plain data for a checkpoint."""
        return {
            "decision": serialize(self.decision).hex(),
            "cost": None if self.cost is None else serialize(self.cost).hex(),
            "state": None if self.state is None else int(self.state),
            "outcome": None if self.outcome is None else int(self.outcome),
            "contribution": None if self.contribution is None else serialize(self.contribution).hex(),
            "fallbacks": [serialize(fallback).hex() for fallback in self.fallbacks],
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], monotonic_s: float) -> Adaptation:
        """Give the record a checkpoint holds; its LOADING clock starts again at ``monotonic_s``.

        Raises:
            CorruptDataError: A field is of another type, or a message does not parse.
        """
        data = {**_LATER, **data}
        cost, contribution = data["cost"], data["contribution"]
        for name, kinds in _KINDS.items():
            if type(data[name]) not in kinds:
                rule = " or ".join(kind.__name__ for kind in kinds)
                raise CorruptDataError(f"adaptation.{name} must be {rule}, got {type(data[name]).__name__}")
        return cls(
            decision=parse(bytes.fromhex(data["decision"]), AdaptationDecision),
            cost=None if cost is None else parse(bytes.fromhex(cost), BlueprintCost),
            state=None if data["state"] is None else SeedLifecycleState(data["state"]),
            outcome=None if data["outcome"] is None else AdaptationOutcome(data["outcome"]),
            contribution=None if contribution is None else parse(bytes.fromhex(contribution), Contribution),
            fallbacks=tuple(parse(bytes.fromhex(fallback), CompileFallback) for fallback in data["fallbacks"]),
            begun_monotonic_s=monotonic_s,
            **{name: data[name] for name in _PLAIN},
        )


_PLAIN: Final = {
    "artifact_id": (str,),
    "begun_step": (int,),
    "begun_epoch": (int,),
    "price": (float, NoneType),
    "slowdown": (float, NoneType),
    "run_progress": (float, NoneType),
    "state_since_epoch": (int,),
    "awaits_turn": (bool,),
    "isolated_steps": (int,),
    "graft_steps": (int,),
    "ended_step": (int, NoneType),
    "looks": (int,),
    "reason": (str,),
    "trace_id": (str,),
    "trace_headers": (dict,),
}
"""Fields that a checkpoint holds as they are, with their types."""

_KINDS: Final = {**_PLAIN, "fallbacks": (list,)}

_LATER: Final[Mapping[str, Any]] = {"awaits_turn": False, "slowdown": None, "fallbacks": []}
"""Fields that older checkpoints lack, with what they stood for."""
