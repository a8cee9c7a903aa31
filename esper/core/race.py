"""A race: seeds that learn alone side by side, held against each other in rounds until one is left to be grafted.

    symbol   meaning                                                                     shape, unit
    d_ri     loss of control example i with all rivals off minus with rival r alone on   [rivals, examples], loss
    p_r      price of rival r                                                            loss
    n_r      mean_i d_ri after a round, mean_i d_ri - p_r after the last                 loss
    b        rival of the largest n

After each round those go that are in the worse half, or for which the interval of n_b - n_r, paired over the examples,
lies above 0; but one that already helps (the interval of its own effect lies above 0) goes on learning, and so does one
larger than b: a large seed is slow to begin. In experiment 0003 the best was 0.02 behind after two epochs, and far
ahead at the end. Nobody goes where nobody visibly helps, but for those whose effect is no number, as soon as it is
seen; where the host's own losses are none, nothing is told of anybody.

After the last round b is grafted, or the largest of those that are level with it; those whose n is above 0 wait,
without learning on, for what comes of it: what a seed learns behind a host that knows its training set says little of
what it would bring. Then they are held against each other once more, beside b where it was kept and the budget has room
for both, and the next is grafted. The interval's level is split evenly over the comparisons of the whole race
(Bonferroni). Prices are left out before the last round: rivals have not learnt what they will have learnt, but a price
is due in full, and would have those stay that do nothing for nothing.

Where nobody visibly helps after the last round either, or most do harm after an early one, learning alone tells
nothing: in a host that still lacks capacity for what it knows, new units help once the host learns beside them, and not
before (experiment 0010). Most show it after an epoch, so that much is looked for then (experiment 0013). Then nobody
goes, and all take turns in company. In a turn those are blended in together that promise most, one at a site, as many
as the budget holds; each is judged by its own effect with the others in place, and when one has had its turn the next
follows, three times at a site at most.

Sources: O. Maron, A. Moore, Hoeffding races, NIPS 1993 (here with paired t-intervals); Z. Karnin, T. Koren, O. Somekh,
Almost optimal exploration in multi-armed bandits, ICML 2013 (halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esper.contracts.run import Contribution, GateCheck
from esper.core.adaptation import Adaptation
from esper.core.context import RunContext
from esper.execution.counterfactual import evaluate_configurations, paired_interval
from esper.execution.overrides import SeedRef

TURNS_PER_SITE: Final = 3
"""Rivals of one race that have a turn at one site: a new race, drawn with what was learnt of them, tells more."""
VISIBLE_SHARE: Final = 0.05
"""Share of the control loss from which an effect counts as visible."""


@dataclass(frozen=True, slots=True)
class Round:
    """What came of a round."""

    stay: list[Adaptation]
    """Those that stay, best first."""
    gone: list[tuple[Adaptation, GateCheck]]
    """Those that go, with the reason."""
    takes_turns: bool
    """Whether learning alone has told nothing, and all take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a rival stands after a round."""

    adaptation: Adaptation
    """The rival."""
    effect: Contribution
    """What it brings alone."""
    price: float
    """What is taken off its effect in this round, in units of loss."""
    behind: Contribution | None
    """What the leader brings more, prices taken off; ``None`` for the leader."""

    @property
    def size(self) -> int:
        """Its parameters."""
        cost = self.adaptation.cost
        return 0 if cost is None else cost.parameters

    @property
    def net(self) -> float:
        """What it brings, this round's price taken off, in units of loss."""
        return self.effect.estimate - self.price

    @property
    def is_measured(self) -> bool:
        """Whether its effect is a number."""
        return all(map(math.isfinite, (self.effect.estimate, self.effect.low, self.effect.high)))

    @property
    def is_beaten(self) -> bool:
        """Whether the leader is better beyond doubt."""
        return self.behind is not None and self.behind.low > 0.0


def round_ends(incubation_epochs: int, rounds: int) -> tuple[int, ...]:
    """Give the epochs of learning after which a round ends, each once; the last is ``incubation_epochs``."""
    ends = {-(-incubation_epochs * number // rounds) for number in range(1, rounds + 1)}
    return tuple(sorted(ends))


def run_round(
    context: RunContext, rivals: Sequence[Adaptation], *, last: bool = False, won: bool = False, glance: bool = False
) -> Round:
    """Measure the rivals on the control split, and say who goes.

    Each rival's effect is written down on it. Seeds, streams and the model stay as they are. ``won`` says that one of
    the race was kept: then even the best of the rest goes where it is not worth its price. After a ``glance`` nobody
    goes.
    """
    growth, refs = context.growth, [SeedRef(item.layer, item.seed_index) for item in rivals]
    off = dict.fromkeys(refs, 0.0)
    configurations = [off, *({**off, ref: 1.0} for ref in refs)]
    losses = evaluate_configurations(context.model, context.control.batches, context.loss_rows, configurations)
    effects = losses[0] - losses[1:]
    prices = [item.price or 0.0 if last else 0.0 for item in rivals]
    found = standings(rivals, effects, prices, level=growth.confidence_level, rounds=growth.race_rounds)
    for one in found:
        one.adaptation.contribution = one.effect
    loss = context.control_loss
    measured = [one for one in found if one.is_measured]
    is_telling = bool(measured) and (won or helps_by(VISIBLE_SHARE * loss, measured))
    gone = losers(measured, last=last, won=won) if is_telling and not glance else []
    if losses[0].isfinite().all():
        gone += [one for one in found if not one.is_measured]
    left = [one for one in found if one not in gone]
    if left and last and is_telling:
        first = winner(left)
        left = [first, *(one for one in left if one is not first)]
    stay = [one.adaptation for one in left]
    takes_turns = not is_telling and (last or mostly_harm(measured))
    return Round(stay, [(one.adaptation, _lost(one, found[0])) for one in gone], takes_turns)


def helps_by(least: float, found: Sequence[Standing]) -> bool:
    """Say whether any of them helps beyond doubt, and by more than ``least``."""
    return any(one.effect.low > 0.0 and one.effect.estimate > least for one in found)


def standings(
    rivals: Sequence[Adaptation], effects: Tensor, prices: Sequence[float], *, level: float, rounds: int
) -> list[Standing]:
    """Give the standings from effects per example [rivals, examples] and prices, in units of loss, best first.

    Equal ones stay in the order they were given; those that are no number come last. ``level`` is the coverage of the
    whole race's comparisons together.
    """
    nets = effects - torch.tensor(prices, dtype=effects.dtype)[:, None]
    means = [float(row.mean()) for row in nets]
    order = sorted(range(len(rivals)), key=lambda row: (-means[row] if math.isfinite(means[row]) else math.inf, row))
    leader = order[0]
    split = 1.0 - (1.0 - level) / max(1, rounds * (len(rivals) - 1))
    return [
        Standing(
            adaptation=rivals[row],
            effect=paired_interval(effects[row], confidence_level=level),
            price=prices[row],
            behind=None if row == leader else paired_interval(nets[leader] - nets[row], confidence_level=split),
        )
        for row in order
    ]


def losers(found: Sequence[Standing], *, last: bool, won: bool = False) -> list[Standing]:
    """Give those that go after a round; ``found`` best first."""
    if last:
        return [one for place, one in enumerate(found) if one.net <= 0.0 and (place or won)]
    half, leader = (len(found) + 1) // 2, found[0]
    behind = (one for place, one in enumerate(found) if place >= half or one.is_beaten)
    return [one for one in behind if one.effect.low <= 0.0 and one.size <= leader.size]


def winner(found: Sequence[Standing]) -> Standing:
    """Give the one to be grafted after the last round; ``found`` best first.

    Of those that help beyond doubt and by more than their price, and are not beaten beyond doubt, it is the largest: a
    large seed is slow to begin, and one grafted first leaves little to learn to one that comes later.
    """
    level = [one for one in found if one.effect.low > 0.0 and one.net > 0.0 and not one.is_beaten]
    return max(level, key=lambda one: one.size, default=found[0])


def mostly_harm(found: Sequence[Standing]) -> bool:
    """Say whether most rivals do harm beyond doubt: beside a damped host that is right they say again what it knows."""
    return sum(one.effect.high < 0.0 for one in found) * 2 > len(found)


def company(
    waiting: Sequence[Adaptation], blended: Sequence[Adaptation], fits: Callable[[Sequence[Adaptation]], bool]
) -> list[Adaptation]:
    """Give those whose turn it is: the company from which the policy expects most together.

    It is filled up from every rival as the first, in the order of what is expected, then of how much each has learnt,
    for better or worse: beside a damped host that is right, what learns well says again what it knows. Two never stand
    at one site, nor one where one of ``blended`` does; ``fits`` says whether the budget has room for some together.
    """
    taken = {site_of(one) for one in blended}
    free = [one for one in waiting if site_of(one) not in taken]
    order = sorted(free, key=lambda one: (-_expected(one), -_learnt(one)))
    found = [_filled([first, *order], fits) for first in order]
    return max(found, key=lambda some: sum(map(_expected, some)), default=[])


def _filled(order: Sequence[Adaptation], fits: Callable[[Sequence[Adaptation]], bool]) -> list[Adaptation]:
    """Give as many as have room, in order, one at a site."""
    chosen: list[Adaptation] = []
    for one in order:
        if all(site_of(one) != site_of(other) for other in chosen) and fits([*chosen, one]):
            chosen.append(one)
    return chosen


def site_of(one: Adaptation) -> tuple[str, str]:
    """Give where a rival stands: its layer, and the layer whose input it reads, empty for its own."""
    return one.layer, one.decision.source


def _expected(one: Adaptation) -> float:
    return one.decision.expected_reward or 0.0


def _learnt(one: Adaptation) -> float:
    learnt = 0.0 if one.contribution is None else abs(one.contribution.estimate)
    return learnt if math.isfinite(learnt) else 0.0


def _lost(one: Standing, leader: Standing) -> GateCheck:
    if not one.is_measured:
        return GateCheck(name="race", passed=False, detail="with it on, the loss of a control example is no number")
    if one.behind is None:
        detail = f"beside the one that was kept it brings {one.net:+.4f}, its price of {one.price:.4f} taken off"
        return GateCheck(name="race", passed=False, detail=detail)
    return GateCheck(
        name="race",
        passed=False,
        detail=f"lost its race: brings {one.net:+.4f}, the best, {leader.adaptation.label}, {leader.net:+.4f}, "
        f"prices of {one.price:.4f} and {leader.price:.4f} taken off; {one.behind.estimate:.4f} behind "
        f"({one.behind.low:+.4f} to {one.behind.high:+.4f})",
    )
