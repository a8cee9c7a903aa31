"""State packets: a run as the mesh sees it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from esper.contracts.run import RunPhase, SystemStatePacket
from esper.core.context import RunContext
from esper.core.control import ControlFigures
from esper.core.optimizers import groups
from esper.core.size import output_parameters


@dataclass(kw_only=True, slots=True)
class EpochMeter:
    """Sums over the steps of one epoch; belongs to the training thread."""

    loss_sum: float = 0.0
    """Sum of the steps' losses."""
    steps: int = 0
    """Steps."""
    examples: int = 0
    """Examples seen; 0 while nobody can tell."""
    gradient_norm_sum: float = 0.0
    """Sum of the sampled gradient norms."""
    gradient_norms: int = 0
    """Gradient norms sampled."""

    @property
    def train_loss(self) -> float | None:
        """Mean training loss; ``None`` before the first step."""
        return self.loss_sum / self.steps if self.steps else None

    @property
    def gradient_norm(self) -> float | None:
        """Mean gradient norm; ``None`` when none was sampled."""
        return self.gradient_norm_sum / self.gradient_norms if self.gradient_norms else None


class PacketBuilder:
    """Numbers and builds the packets of one run."""

    def __init__(self, context: RunContext, *, host_flops: int | None) -> None:
        self._context = context
        self._host_flops = host_flops

    @property
    def sequence(self) -> int:
        """Sequence of the last packet."""
        return self._context.clock.packets

    def build(
        self,
        phase: RunPhase,
        *,
        meter: EpochMeter | None = None,
        figures: ControlFigures | None = None,
        seconds: float | None = None,
        reason: str = "",
    ) -> SystemStatePacket:
        """Give the next packet; figures that were not measured stay absent."""
        context = self._context
        context.clock.packets += 1
        rate = groups(context.optimizer)[0].get("lr")
        speed = meter.examples / seconds if meter is not None and meter.examples and seconds else None
        return SystemStatePacket(
            run_id=context.run_id,
            sequence=self.sequence,
            phase=phase,
            epoch=context.clock.epoch,
            step=context.clock.step,
            train_loss=meter.train_loss if meter is not None else None,
            control_loss=figures.loss if figures is not None else None,
            control_loss_se=figures.standard_error if figures is not None else None,
            control_accuracy=figures.accuracy if figures is not None else None,
            learning_rate=None if rate is None else float(rate),
            gradient_norm=meter.gradient_norm if meter is not None else None,
            examples_per_second=speed,
            layers=tuple(layer.layer_status() for layer in context.model.kasmina_layers.values()),
            budget=context.ledger.status(),
            host_parameters=context.host_parameters,
            current_parameters=output_parameters(context.model),
            host_flops=self._host_flops,
            random_seed=context.random_seed,
            planned_epochs=context.clock.planned_epochs,
            cache_tiers=tuple(context.link.cache_tiers()),
            created_at=datetime.now(UTC),
            phase_reason=reason[:500],
            allowed_blueprints=context.growth.allowed_blueprints,
            growth_costs=context.costs.costs(),
        )
