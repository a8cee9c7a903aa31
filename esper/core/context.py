"""What the parts of a session share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.optim import Optimizer

from esper.core.budget import BudgetLedger
from esper.core.clock import RunClock
from esper.core.control import ControlSplit
from esper.core.costs import CostMeter
from esper.core.growth import GrowthConfig
from esper.core.link import RunLink
from esper.core.losses import LossFunction, PerExampleLoss
from esper.core.morphable import MorphableModel


@dataclass(kw_only=True, slots=True)
class RunContext:
    """What the parts of a session share; belongs to the training thread."""

    run_id: str
    """Run."""
    model: MorphableModel
    """The wrapped model."""
    optimizer: Optimizer
    """The run's optimizer."""
    control: ControlSplit
    """The control split."""
    loss_fn: LossFunction
    """Mean loss."""
    loss_rows: PerExampleLoss
    """Loss per example."""
    ledger: BudgetLedger
    """What growth may cost."""
    link: RunLink
    """Line to the mesh."""
    growth: GrowthConfig
    """Settings of growth."""
    clock: RunClock
    """Steps and epochs."""
    host_parameters: int
    """Parameters of the host."""
    host_flops: int
    """FLOPs of the host's forward pass, one example."""
    random_seed: int
    """Seed of the run."""
    control_loss: float
    """Last mean control loss."""
    costs: CostMeter = field(default_factory=CostMeter)
    """What growth has cost so far."""

    def birth_seed(self, seed_index: int) -> int:
        """Give the random seed of a seed's first weights: kernels are shared between runs, their draw is the run's."""
        return (self.random_seed + seed_index) % 2**63

    def fitting_seed(self, seed_index: int) -> int | None:
        """Give the random seed for fitting a seed's first weights to data; ``None`` where they stay as drawn."""
        return self.birth_seed(seed_index) if self.growth.data_dependent_birth else None
