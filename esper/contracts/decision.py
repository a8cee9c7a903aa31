"""What the control plane tells a run, and what the run answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Final

from esper.contracts.blueprint import Blueprint, Site
from esper.contracts.run import GROWING_TYPES, GateCheck


class AdaptationType(StrEnum):
    """What a decision asks for; members equal their lower-case names."""

    ADD_SEED = "add_seed"
    REMOVE_SEED = "remove_seed"
    MODIFY_ARCHITECTURE = "modify_architecture"
    OPTIMIZE_PARAMETERS = "optimize_parameters"

    @property
    def grows(self) -> bool:
        """Whether it asks for a seed to germinate."""
        return self.value in GROWING_TYPES


class CurveState(StrEnum):
    """What the learning curve looks like."""

    IMPROVING = "improving"
    PLATEAU = "plateau"
    OVERFITTING = "overfitting"
    UNSTABLE = "unstable"
    WARMING_UP = "warming_up"


BUDGET_TOO_SMALL: Final = "budget_too_small"
"""Evidence that no candidate is within what is left of the budget, nor will be; its value is the smallest's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One figure behind a decision."""

    name: str
    """Name."""
    value: float
    """The figure."""
    detail: str = ""
    """What it means, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterChange:
    """Change of the optimizer's settings, or of its state; ``None`` leaves a setting."""

    learning_rate_factor: float | None = None
    """Factor on the learning rate. Finite and > 0."""
    weight_decay_factor: float | None = None
    """Factor on the weight decay. Finite and > 0."""
    group: int | None = None
    """Parameter group that is changed, from 0, in the optimizer's order, and in order through the optimizers that a
    wrapper holds; ``None`` for all."""
    resets_state: bool = False
    """Whether what the optimizer keeps of each parameter (moments, counts of steps) begins anew."""

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return self.learning_rate_factor is None and self.weight_decay_factor is None and not self.resets_state


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureChange:
    """Change of a host layer, function-preserving; neither figure is set for a further layer after it (Net2Deeper)."""

    added_units: int | None = None
    """Units to add to the layer's output (Net2Wider)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationDecision:
    """One decision of the policy."""

    adaptation_id: str
    """``a`` and 32 hex digits."""
    run_id: str
    """Run it is for."""
    state_sequence: int
    """Sequence of the state packet it answers."""
    epoch: int
    """Epoch of that packet."""
    adaptation_type: AdaptationType
    """What it asks for."""
    layer: str = ""
    """Dotted module name; empty when no layer is meant."""
    seed_index: int | None = None
    """Seed within the layer."""
    blueprint_id: str = ""
    """Blueprint to germinate; empty unless ADD_SEED or MODIFY_ARCHITECTURE."""
    confidence: float
    """Probability that the action helps, 0 to 1."""
    urgency: float
    """How fast the opportunity passes, 0 to 1."""
    expected_reward: float | None = None
    """Mean of the posterior reward of the candidate."""
    exploration_bonus: float | None = None
    """What the draw added for being uncertain."""
    curve_state: CurveState
    """What the curve looks like."""
    evidence: tuple[Evidence, ...] = ()
    """Figures behind it."""
    actionable: bool = False
    """Whether the thresholds are reached."""
    parameter_change: ParameterChange | None = None
    """For OPTIMIZE_PARAMETERS: what to change; ``None`` means nothing."""
    architecture_change: ArchitectureChange | None = None
    """For MODIFY_ARCHITECTURE: what to change."""
    explanation: str = ""
    """In one or two sentences, for people."""
    created_at: datetime
    """When."""
    blueprint: Blueprint | None = None
    """The blueprint itself."""
    site: Site | None = None
    """Site at which it is to stand."""
    source: str = ""
    """Layer whose input the seed is to read; empty for its own."""
    race_id: str = ""
    """Race it belongs to: the id of its first decision. Empty where it stands alone."""
    race_size: int = 0
    """Decisions of that race; 0 where it stands alone."""

    @property
    def group(self) -> str:
        """What it shares one place in the budget and one outcome with: its race, or itself."""
        return self.race_id or self.adaptation_id


class PlanStatus(IntEnum):
    """What the orchestrator made of a decision."""

    ACCEPTED = 1
    REJECTED = 2
    COMPLETED = 3
    FAILED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationPlan:
    """A plan, with the gates it met."""

    adaptation_id: str
    """Adaptation."""
    run_id: str
    """Run."""
    status: PlanStatus
    """Where it stands."""
    checks: tuple[GateCheck, ...] = ()
    """Gates, in the order they were asked."""
    step: int = 0
    """Optimizer step at which the status was reached."""
    reason: str = ""
    """Why, in words."""
    created_at: datetime
    """When."""


class ControlAction(IntEnum):
    """What an operator may ask of a run."""

    PAUSE = 1
    RESUME = 2
    STOP = 3
    CHECKPOINT = 4
    ROLLBACK = 5
    GERMINATE = 6
    CULL = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlCommand:
    """One command to one run."""

    request_id: str
    """Chosen by the caller; the same id is carried out once."""
    run_id: str
    """Run."""
    action: ControlAction
    """What to do."""
    actor: str = ""
    """Who asked."""
    layer: str = ""
    """Dotted module name, for GERMINATE and CULL."""
    seed_index: int | None = None
    """Seed within the layer, for GERMINATE and CULL."""
    blueprint: Blueprint | None = None
    """Blueprint, for GERMINATE."""
    checkpoint_id: str = ""
    """Checkpoint to return to, for ROLLBACK; empty means the last good snapshot."""
    created_at: datetime
    """When."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlResult:
    """What became of a command."""

    request_id: str
    """Command it answers."""
    run_id: str
    """Run."""
    accepted: bool
    """Whether it was carried out."""
    detail: str = ""
    """What happened, in words."""
    checkpoint_id: str = ""
    """Checkpoint written, for CHECKPOINT."""
    step: int = 0
    """Optimizer step at which it happened."""
    error_reason: str = ""
    """Stable reason of the refusal; empty when accepted."""


class AnomalySeverity(IntEnum):
    """How bad an anomaly is."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Anomaly:
    """Something a detector saw."""

    anomaly_id: str
    """Stable while the same condition lasts."""
    run_id: str = ""
    """Run; empty when it concerns a service."""
    detector: str
    """Detector."""
    subject: str
    """Layer, service or figure concerned."""
    severity: AnomalySeverity
    """How bad."""
    evidence: tuple[Evidence, ...] = ()
    """Figures behind it."""
    first_seen_at: datetime
    """First time it was seen."""
    last_seen_at: datetime
    """Last time it was seen."""
    resolved: bool = False
    """Whether the condition has passed."""
    acknowledged_by: str = ""
    """Who acknowledged it."""
