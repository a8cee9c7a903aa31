"""Metrics and health as Nissa gives them; a figure nobody measured is ``None``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from esper.contracts.run import CacheTierStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMetrics:
    """How training goes."""

    loss: float | None = None
    """Last training loss."""
    control_loss: float | None = None
    """Last control loss."""
    accuracy: float | None = None
    """Last control accuracy, 0 to 1."""
    examples_per_second: float | None = None
    """Examples per second."""
    learning_rate: float | None = None
    """Learning rate."""
    gradient_norm: float | None = None
    """L2 norm of the gradients."""
    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps completed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MorphogeneticMetrics:
    """How growth goes."""

    seeds_by_state: Mapping[str, int] = field(default_factory=dict)
    """Seeds in each state, by lower-case name."""
    active_seeds_total: int = 0
    """Seeds that are ACTIVE, EVALUATING or FOSSILIZED."""
    adaptations_attempted: int = 0
    """Adaptations begun."""
    adaptations_kept: int = 0
    """Adaptations kept."""
    adaptations_removed: int = 0
    """Adaptations culled, failed or rolled back."""
    performance_improvement: float | None = None
    """Sum of the contributions of what was kept, in units of loss."""
    performance_improvement_low: float | None = None
    """Lower end of its interval."""
    performance_improvement_high: float | None = None
    """Upper end of its interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelMetrics:
    """How kernels are served."""

    tiers: tuple[CacheTierStatus, ...] = ()
    """Statistics by tier."""
    kernels_ready: int = 0
    """Kernels announced ready."""
    kernels_failed: int = 0
    """Kernels that failed to compile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BusMetrics:
    """How the bus does."""

    health_batches: int = 0
    """Health batches received."""
    health_signals: int = 0
    """Health signals received."""
    ring_dropped: int = 0
    """Signals the training side dropped in its ring."""
    batches_dropped: int = 0
    """Batches the publisher dropped."""
    events: int = 0
    """Events received."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMetrics:
    """How the process of Nissa does."""

    cpu_percent: float | None = None
    """CPU use, in per cent of one core."""
    resident_bytes: int | None = None
    """Resident memory, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemMetrics:
    """Everything at one moment."""

    run_id: str
    """Run."""
    training: TrainingMetrics = TrainingMetrics()
    """How training goes."""
    morphogenetic: MorphogeneticMetrics = field(default_factory=MorphogeneticMetrics)
    """How growth goes."""
    kernels: KernelMetrics = KernelMetrics()
    """How kernels are served."""
    bus: BusMetrics = BusMetrics()
    """How the bus does."""
    process: ProcessMetrics = ProcessMetrics()
    """How the process does."""
    read_at: datetime
    """When it was read."""


class SystemHealth(IntEnum):
    """Health of a component or of the whole."""

    HEALTHY = 1
    DEGRADED = 2
    UNHEALTHY = 3
    UNKNOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentHealth:
    """Health of one component."""

    component: str
    """Component."""
    health: SystemHealth
    """Its health."""
    reason: str
    """Why, in words."""
    last_heard_at: datetime | None = None
    """When it was last heard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthReport:
    """Health of the whole system."""

    overall_status: SystemHealth
    """The worst of the configured components."""
    components: tuple[ComponentHealth, ...] = ()
    """Every component, by name."""
    active_kernels: int = 0
    """Seeds that are ACTIVE, EVALUATING or FOSSILIZED, of the live runs and of the newest run, ended or not."""
