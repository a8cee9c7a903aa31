"""Measuring what a seed brings: paired on held-out examples, with an interval that allows several looks.

Legend: d_i = loss of control example i with the seed off minus on; n = examples; q = quantile of Student's t with
n - 1 degrees of freedom at 1 - (1 - level) / (2 k); k = looks planned. Interval: mean(d) +- q * sd(d) / sqrt(n).
The level is split evenly over the looks (Bonferroni), so it holds over all of them together.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from esper.contracts.run import Contribution, GateCheck
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.execution.counterfactual import measure_contribution

TRIFLE_SHARE: Final = 0.005
"""Share of the control loss below which an effect is a trifle."""


class Judgement(Enum):
    """What a measurement says of a seed."""

    PAYS = "pays"
    """The lower end of the interval is above the price."""
    DOES_NOT_PAY = "does not pay"
    """The upper end of the interval is below the price."""
    OPEN = "open"
    """The interval holds the price."""


def judge(contribution: Contribution, price: float) -> tuple[Judgement, GateCheck]:
    """Hold a measured effect against its price; gives the gate's answer as well. What is no number does not pay."""
    judgement = Judgement.OPEN
    measured = all(math.isfinite(figure) for figure in (contribution.low, contribution.high, price))
    if measured and contribution.low > price:
        judgement = Judgement.PAYS
    elif not measured or contribution.high < price:
        judgement = Judgement.DOES_NOT_PAY
    detail = f"{contribution.estimate:+.5f} ({contribution.low:+.5f} to {contribution.high:+.5f}), price {price:.5f}"
    return judgement, GateCheck(name="contribution", passed=judgement is Judgement.PAYS, detail=detail)


def is_last_look(contribution: Contribution, price: float, looks: int, max_looks: int) -> bool:
    """Say whether a seed has had its looks: twice ``max_looks`` where it helps beyond doubt and promises to pay."""
    promises = contribution.low > 0.0 and contribution.estimate > price
    return looks >= max_looks * (2 if promises else 1)


def is_hopeless(contribution: Contribution, price: float, looks_left: int) -> bool:
    """Say whether an effect that grew by what it is with every look still to come would not reach the price.

    One that is no number is hopeless.
    """
    return not contribution.estimate > 0.0 or contribution.high * (1 + looks_left) < price


def is_trifle(contribution: Contribution, control_loss: float) -> bool:
    """Say whether an effect is too small, beyond doubt, to be worth another look, whatever its price."""
    return contribution.high < TRIFLE_SHARE * control_loss


def seed_contribution(context: RunContext, adaptation: Adaptation, *, level: float) -> Contribution:
    """Give the effect of one live seed at alpha 1 against alpha 0 on the control split; model and streams untouched."""
    return measure_contribution(
        context.model,
        context.control.batches,
        context.loss_rows,
        layer=adaptation.layer,
        seed_index=adaptation.seed_index,
        confidence_level=level,
    )


def level_per_look(level: float, looks: int) -> float:
    """Give the coverage of one look so that ``looks`` of them together have coverage ``level``."""
    return 1.0 - (1.0 - level) / looks
