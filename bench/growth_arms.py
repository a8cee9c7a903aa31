"""The arms of the growth measure on digits: what is trained, for how long, and what it came to on the sealed test.

Every arm starts from weights that its seed alone decides, sees the same batches in the same order, and uses the same
optimizer. FLOPs are counted by torch's own formulas while an arm trains: forward, backward, seeds that learn alone,
evaluation on the control split; a multiply-add counts 2, elementwise work counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import nn

import esper
from esper.blueprints.flops import ThreadFlops, count_flops
from esper.cli import digits
from esper.core.report import RunReport
from esper.core.session import MeshPort

BUDGET_SHARE: Final = 2.0
"""Parameters that growth may add, as a share of the host's."""
DECISION_WAIT_S: Final = 60.0
"""Longest wait for an epoch's decision; runs with equal seeds see the same decisions however busy the machine is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one arm came to."""

    accuracy: float
    """Sealed-test accuracy, 0 to 1."""
    loss: float
    """Sealed-test cross-entropy."""
    parameters: int
    """Parameters at the end."""
    flops: int
    """FLOPs of the whole training."""


def grow(
    mesh: MeshPort, splits: digits.DigitsSplits, *, epochs: int, seed: int, wait_s: float = DECISION_WAIT_S
) -> tuple[Outcome, RunReport]:
    """Grow the host through a mesh; gives the outcome and the run's report.

    ``wait_s`` is the longest wait for each epoch's decision; 0 suits a mesh that answers at once or not at all.
    """
    model = esper.wrap(digits.make_host(seed))
    # The policy's draws depend on the run's name, so equal seeds need equal names.
    session = esper.SessionConfig(run_id=f"bench-growth-{seed}", decision_wait_s=wait_s)
    trainer = esper.Trainer(
        model,
        digits.make_optimizer(model),
        nn.CrossEntropyLoss(),
        mesh=mesh,
        budget=esper.Budget(added_params=BUDGET_SHARE),
        seed=seed,
        config=esper.TrainerConfig(show_progress=False, session=session),
    )
    counter = ThreadFlops()
    with counter:
        report = trainer.fit(splits.train_loader(seed), splits.control_loader(), epochs)
    return _outcome(model, splits, counter.total), report


def train_fixed(splits: digits.DigitsSplits, *, hidden: int, epochs: int, seed: int) -> Outcome:
    """Train a network whose shape is known from the start."""
    model = digits.make_host(seed, hidden)
    digits.train_plain(model, splits, epochs=epochs, seed=seed)
    return _outcome(model, splits, epochs * epoch_flops(splits, hidden))


def epochs_for(flops: int, splits: digits.DigitsSplits, *, hidden: int) -> int:
    """Give the epochs after which a network of fixed shape has spent at least so many FLOPs."""
    return max(1, -(-flops // epoch_flops(splits, hidden)))


@cache
def epoch_flops(splits: digits.DigitsSplits, hidden: int) -> int:
    """Give the FLOPs of one epoch of a network of fixed shape."""
    return count_flops(lambda: digits.train_plain(digits.make_host(0, hidden), splits, epochs=1, seed=0))


def _outcome(model: nn.Module, splits: digits.DigitsSplits, flops: int) -> Outcome:
    """Look at the sealed test, for the first and only time."""
    inputs, targets = splits.sealed.tensors
    accuracy = digits.accuracy(model, splits.sealed)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs), targets))
    return Outcome(accuracy=accuracy, loss=loss, parameters=digits.count_parameters(model), flops=flops)
