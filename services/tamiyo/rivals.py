"""Which candidates race: one joint draw from the posterior for each place at the start, spread over kinds.

Thompson sampling in batches: rival k is the best of draw k among those that are not in the race yet. A kind is a family
of operators with a reach: which kind of blueprint stands where can matter far more than its size, only what is tried is
learnt about, and every rival costs. So
- every family comes in before a second of its members does, and a kind has one rival unless the race would not be half
  full;
- where even the best of a draw promises nothing, nobody enters, unless no reward of its kind was ever learned: a prior
  is no reason to leave out the one kind that a task may want.

Source: E. Kaufmann, N. Korda, R. Munos, Thompson sampling, ALT 2012; in batches: K. Kandasamy et al., Parallelised
Bayesian optimisation via Thompson sampling, AISTATS 2018.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.normal import probability_positive
from esper.services.tamiyo.posterior import Belief, Features, RewardPosterior


@dataclass(frozen=True, slots=True)
class Rival:
    """A candidate of a race, with what is believed of it."""

    candidate: Candidate
    """The candidate."""
    belief: Belief
    """What is believed of it, and the draw that brought it in."""


@dataclass(frozen=True, slots=True)
class Field:
    """The candidates of one race."""

    rivals: tuple[Rival, ...]
    """In the order in which they were drawn; at least one."""
    helps: float
    """Probability that the likeliest of them brings more than its price, 0 to 1; a lower bound for that of any."""


def draw_rivals(
    posterior: RewardPosterior,
    candidates: Sequence[tuple[Candidate, Features]],
    *,
    size: int,
    free: Mapping[str, int],
    random: np.random.Generator,
) -> Field:
    """Draw at most ``size`` rivals from at least one candidate; equal streams give equal draws.

    ``free`` holds the dormant seeds of each layer; no more rivals than those stand at one.
    """
    asked = [features for _, features in candidates]
    drawn = posterior.draw(asked, random, count=size)
    left = Counter(free)
    chosen: dict[int, float] = {}
    for draw in drawn.draws:
        open_rows = [row for row, (one, _) in enumerate(candidates) if row not in chosen and left[one.layer] > 0]
        new = _of_new_kinds(asked, open_rows, chosen)
        if not new and (not open_rows or 2 * len(chosen) >= size):
            break
        row = max(new or open_rows, key=lambda one: (draw[one], -one))
        if chosen and draw[row] <= 0.0 and posterior.has_tried(*_kind(asked[row])):
            continue
        chosen[row] = float(draw[row])
        left[candidates[row][0].layer] -= 1
    rivals = tuple(
        Rival(candidates[row][0], Belief(mean=float(drawn.mean[row]), deviation=float(drawn.deviation[row]), draw=draw))
        for row, draw in chosen.items()
    )
    return Field(rivals, max(probability_positive(one.belief.mean, one.belief.deviation) for one in rivals))


def _of_new_kinds(features: Sequence[Features], rows: Sequence[int], chosen: Collection[int]) -> list[int]:
    """Give the rows of families that nobody chosen is of; or else of kinds that nobody chosen is of."""
    families = {features[row].family for row in chosen}
    kinds = {_kind(features[row]) for row in chosen}
    of_new_family = [row for row in rows if features[row].family not in families]
    return of_new_family or [row for row in rows if _kind(features[row]) not in kinds]


def _kind(features: Features) -> tuple[str, str]:
    return features.family, features.reach
