"""Which candidates race: one joint draw from the posterior for each place at the start, spread over kinds.

Thompson sampling in batches: draw k brings in the candidate that is best in it. A kind is a family of operators with a
reach, and widening and deepening the host are families of their own: which kind of blueprint stands where can matter
far more than its size, and only what is tried is learnt about. So kinds of which no reward was ever learned come first,
one rival each and every family before a second kind of one: a prior is no reason to leave out the one kind that a task
may want. What places they leave free go to widening and deepening where neither was drawn yet, for plain capacity
lacks in one layer and not in another (experiment 0013). Beyond them every rival costs: where they fill a quarter of
the race nobody else enters; else what promises most on average does, and against it the winners of draws (top-two
sampling), where they promise anything. The more is known, the smaller a race.

Source: E. Kaufmann, N. Korda, R. Munos, Thompson sampling, ALT 2012; in batches: K. Kandasamy et al., Parallelised
Bayesian optimisation via Thompson sampling, AISTATS 2018; top two: D. Russo, Simple Bayesian algorithms for best arm
identification, COLT 2016.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.normal import probability_positive
from esper.services.tamiyo.posterior import Belief, Features, RewardPosterior

Kind = tuple[str, str]
"""What counts as one kind of blueprint: a family, and a reach."""

_HOST_CHANGES: Final = frozenset({"widening", "deepening"})
_KNOWN_SHARE: Final = 0.25
"""Share of a race that kinds of which something is known may fill."""


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
    drawn = posterior.draw([features for _, features in candidates], random, count=size)
    gaps = _Gaps(candidates, posterior)
    left = Counter(free)
    chosen: dict[int, float] = {}
    for draw in drawn.draws:
        open_rows = [row for row, (one, _) in enumerate(candidates) if row not in chosen and left[one.layer] > 0]
        unknown = gaps.of(open_rows, chosen)
        if not open_rows or (not unknown and len(chosen) >= _KNOWN_SHARE * size):
            break
        promised = draw if unknown or chosen else drawn.mean
        row = max(unknown or [*open_rows, *chosen], key=lambda one: (promised[one], -one))
        if row in chosen or (chosen and not unknown and draw[row] <= 0.0):
            continue
        chosen[row] = float(draw[row])
        left[candidates[row][0].layer] -= 1
    rivals = tuple(
        Rival(candidates[row][0], Belief(mean=float(drawn.mean[row]), deviation=float(drawn.deviation[row]), draw=draw))
        for row, draw in chosen.items()
    )
    return Field(rivals, max(probability_positive(one.belief.mean, one.belief.deviation) for one in rivals))


class _Gaps:
    """Which candidates nothing is known of; those are told by their row."""

    def __init__(self, candidates: Sequence[tuple[Candidate, Features]], posterior: RewardPosterior) -> None:
        self._kinds = [_kind(*one) for one in candidates]
        rows = [(family, features) for (family, _), (_, features) in zip(self._kinds, candidates, strict=True)]
        families = {features.blueprint_id: family for family, features in rows}
        past = [(families.get(name, family), reach, place) for name, family, reach, place in posterior.tried()]
        self._tried = {(family, reach) for family, reach, _ in past}
        settled = {(family, place) for family, _, place in past}
        at_places = [(family, features.layer) for family, features in rows]
        self._changes = [one if one[0] in _HOST_CHANGES and one not in settled else None for one in at_places]

    def of(self, rows: Sequence[int], chosen: Collection[int]) -> list[int]:
        """Give those of some rows that come first: of new families, else of new kinds, else what was drawn elsewhere.

        The last are changes of the host where none of their kind was tried, beside what is new itself.
        """
        taken = {self._kinds[row] for row in chosen}
        families = {family for family, _ in taken}
        unknown = [row for row in rows if self._kinds[row] not in taken and self._kinds[row] not in self._tried]
        if unknown or taken <= self._tried:
            return [row for row in unknown if self._kinds[row][0] not in families] or unknown
        made = {self._changes[row] for row in chosen}
        return [row for row in rows if self._changes[row] is not None and self._changes[row] not in made]


def _kind(candidate: Candidate, features: Features) -> Kind:
    """Give the family and the reach; to widen or to deepen the host is a family of its own."""
    own = _HOST_CHANGES.intersection(candidate.blueprint.metadata.tags)
    return (min(own) if own else features.family), features.reach
