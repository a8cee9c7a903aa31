"""What a training run says of itself: state packets, seed events, field reports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Final

from esper.contracts.blueprint import BlueprintCost, Site
from esper.contracts.kernel import CompileFallback
from esper.contracts.lifecycle import SeedLifecycleState


class RunPhase(IntEnum):
    """Where a run stands."""

    STARTED = 1
    TRAINING = 2
    PAUSED = 3
    FINISHED = 4
    STOPPED = 5
    FAILED = 6


class GrowthPhase(IntEnum):
    """What growth's own work in the training thread is booked under."""

    BIRTH = 1
    """Decisions are taken up, seeds germinate, their weights are fitted to a batch."""
    ISOLATION = 2
    """Seeds learn alone."""
    RACE = 3
    """Seeds that learn alone are held against each other."""
    EVALUATION = 4
    """Seeds that are blended in or kept, and settings on trial, are measured; where nothing is, the gates are asked."""
    CONTROL = 5
    """The model as it stands is looked at on the control split, at the end of each epoch."""


GROWING_TYPES = frozenset({"add_seed", "modify_architecture"})
"""Types of adaptation that germinate a seed."""
RECHECK: Final = "recheck"
"""Type of a field report that tells what a kept seed was measured to bring later on; nothing was begun with it."""

ENDED_RUN_PHASES = frozenset({RunPhase.FINISHED, RunPhase.STOPPED, RunPhase.FAILED})
"""Phases after which a run takes no command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthSummary:
    """Rolling statistics of a layer or seed; a figure nobody measured is ``None``."""

    count: int = 0
    """Signals behind the figures."""
    activation_mean: float | None = None
    """Running mean of the activations' mean."""
    activation_variance: float | None = None
    """Running mean of the activations' variance."""
    activation_entropy: float | None = None
    """Running mean of the activation entropy, in nats."""
    gradient_variance: float | None = None
    """Running mean of the gradient variance."""
    latency_ms: float | None = None
    """Running mean of the forward latency, in milliseconds."""
    dead_share: float | None = None
    """Share of exact zeros in the last signal, 0 to 1."""
    errors: int = 0
    """Failures counted since the run began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedStatus:
    """One seed as a state packet shows it."""

    seed_index: int
    """Seed within its layer, from 0."""
    state: SeedLifecycleState
    """Life-cycle state."""
    alpha: float = 0.0
    """Blend factor, 0 to 1."""
    blueprint_id: str = ""
    """Blueprint that stands there; empty while DORMANT."""
    adaptation_id: str = ""
    """Adaptation it belongs to; empty while DORMANT."""
    parameters: int = 0
    """Trainable parameters it adds."""
    last_transition_step: int = 0
    """Step of its last transition."""
    source: str = ""
    """Layer whose input it reads; empty for its own, and while DORMANT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipSite:
    """A place for a skip seed: it stands at its layer, and reads the input of another that runs before."""

    source: str
    """Layer whose input it reads."""
    site: Site
    """Kind of its own layer, shape of the source's input, shape of its own layer's output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatus:
    """One layer as a state packet shows it."""

    layer: str
    """Dotted module name."""
    site: Site | None = None
    """Kind and dims; ``None`` until a forward pass has shown the shapes."""
    health: HealthSummary = HealthSummary()
    """Rolling statistics."""
    seeds: tuple[SeedStatus, ...] = ()
    """Its seeds, in order."""
    skip_sites: tuple[SkipSite, ...] = ()
    """Where skip seeds may stand at it; a few, the nearest sources and the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetStatus:
    """What growth may still cost; a bound of ``None`` does not bind."""

    max_added_parameters: int | None = None
    """Parameters that may be added over the whole run."""
    added_parameters: int = 0
    """Parameters added so far, live seeds included."""
    max_added_flops: int | None = None
    """FLOPs per example that may be added."""
    added_flops: int = 0
    """FLOPs per example added so far."""
    max_adaptations: int | None = None
    """Adaptations that may be begun."""
    adaptations: int = 0
    """Adaptations begun so far."""


class TierBreaker(IntEnum):
    """What the circuit breaker before a cache tier lets through: every call, none, or one to see if it is back."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTierStatus:
    """Statistics of one cache tier since the run began."""

    tier: str
    """``l1``, ``l2`` or ``l3``."""
    hits: int = 0
    """Lookups that found the kernel."""
    misses: int = 0
    """Lookups that did not."""
    corrupt: int = 0
    """Entries thrown out because they did not verify."""
    errors: int = 0
    """Lookups that failed because the tier could not be reached."""
    bytes_held: int | None = None
    """Bytes held; ``None`` where the tier does not say."""
    lookup_s: float = 0.0
    """Time that the lookups took to which it gave an answer (hits, misses, corrupt), in seconds, all together."""
    breaker: TierBreaker | None = None
    """What its breaker lets through; ``None`` where the tier has none."""
    warmed: int = 0
    """Kernels that it gave before anybody asked for them; they count neither as hits nor as misses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthCost:
    """What one phase of growth has cost the training thread since the session was opened."""

    phase: GrowthPhase
    """Phase."""
    seconds: float
    """Wall time."""
    flops: int | None = None
    """FLOPs of matrix products, convolutions and attention; ``None`` where they were not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemStatePacket:
    """State of a run at the end of an epoch or on a change of phase."""

    run_id: str
    """Run."""
    sequence: int
    """Number of the packet in this run, from 1."""
    phase: RunPhase
    """Where the run stands."""
    epoch: int
    """Epochs completed."""
    step: int
    """Optimizer steps completed."""
    train_loss: float | None = None
    """Mean training loss of the epoch."""
    control_loss: float | None = None
    """Mean loss on the control split."""
    control_loss_se: float | None = None
    """Standard error of ``control_loss`` over examples."""
    control_accuracy: float | None = None
    """Accuracy on the control split, 0 to 1."""
    learning_rate: float | None = None
    """Learning rate of the first parameter group."""
    gradient_norm: float | None = None
    """L2 norm of the gradients, mean over the epoch."""
    examples_per_second: float | None = None
    """Examples per second over the epoch."""
    layers: tuple[LayerStatus, ...] = ()
    """Layers that can hold seeds, in the model's order."""
    budget: BudgetStatus = BudgetStatus()
    """What growth may still cost."""
    host_parameters: int = 0
    """Parameters of the host before any growth."""
    current_parameters: int = 0
    """Parameters that the model's output comes from now; seeds that learn alone have no part in it."""
    host_flops: int | None = None
    """Forward FLOPs of the host per example."""
    random_seed: int = 0
    """Seed of the run's random streams."""
    planned_epochs: int | None = None
    """Epochs planned."""
    cache_tiers: tuple[CacheTierStatus, ...] = ()
    """Statistics of the training side's kernel cache."""
    created_at: datetime
    """When it was made."""
    phase_reason: str = ""
    """Why a run FAILED or STOPPED."""
    allowed_blueprints: str = ""
    """Expression over tags that a blueprint must keep to stand in the run; empty lets every one stand."""
    growth_costs: tuple[GrowthCost, ...] = ()
    """What growth has cost the training thread, phase by phase; empty from a run of a version that did not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateCheck:
    """One thing a gate looked at."""

    name: str
    """Name of the check."""
    passed: bool
    """Whether it passed."""
    detail: str = ""
    """What was seen, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedEvent:
    """One life-cycle step of one seed."""

    run_id: str
    """Run."""
    adaptation_id: str = ""
    """Adaptation it belongs to."""
    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""
    from_state: SeedLifecycleState
    """State before."""
    to_state: SeedLifecycleState
    """State after."""
    step: int
    """Optimizer step."""
    epoch: int
    """Epoch, from 0."""
    alpha: float
    """Blend factor after the step, 0 to 1."""
    reason: str = ""
    """Why, in words."""
    checks: tuple[GateCheck, ...] = ()
    """What the gate looked at."""
    created_at: datetime
    """When."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """A measured effect: control loss with the seed off minus on; positive means it helps."""

    estimate: float
    """Mean over paired examples."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    confidence_level: float = 0.95
    """Coverage of the interval."""
    num_examples: int
    """Paired examples behind it."""


class AdaptationOutcome(IntEnum):
    """How an adaptation ended."""

    KEPT = 1
    CULLED = 2
    FAILED = 3
    ROLLED_BACK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldReport:
    """What became of one adaptation."""

    report_id: str
    """Id of the report; a second one with the same id is ignored."""
    adaptation_id: str
    """Adaptation it speaks of."""
    run_id: str
    """Run."""
    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""
    site: Site | None = None
    """Site it stood at."""
    blueprint_id: str = ""
    """Content id of the blueprint; empty where none was used."""
    artifact_id: str = ""
    """Kernel; empty where none was loaded."""
    outcome: AdaptationOutcome
    """How it ended."""
    contribution: Contribution | None = None
    """Measured effect; ``None`` when nothing was measured."""
    cost: BlueprintCost | None = None
    """Exact cost at the site."""
    price: float | None = None
    """Price of that cost in units of loss; what the contribution had to beat."""
    isolated_steps: int = 0
    """Steps spent learning behind the host's back."""
    graft_steps: int = 0
    """Steps spent blended in."""
    begun_epoch: int = 0
    """Epoch in which it began."""
    run_progress: float | None = None
    """Planned progress of the run when it began, 0 to 1."""
    decision_confidence: float = 0.0
    """Confidence of the decision behind it."""
    reason: str = ""
    """Why it ended so."""
    created_at: datetime
    """When."""
    adaptation_type: str = "add_seed"
    """Type of adaptation."""
    source: str = ""
    """Layer whose input the seed read; empty for its own."""
    race_id: str = ""
    """Race it belonged to; empty where it stood alone."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets that the compile of its kernel gave up, in the order they were tried."""

    @property
    def group(self) -> str:
        """What it shares one outcome with: its race, or itself."""
        return self.race_id or self.adaptation_id

    @property
    def grew(self) -> bool:
        """Whether a seed was to germinate."""
        return self.adaptation_type in GROWING_TYPES

    @property
    def reward(self) -> float | None:
        """Contribution minus price, in units of loss; ``None`` when nothing was measured."""
        if self.contribution is None:
            return None
        return self.contribution.estimate - (self.price or 0.0)
