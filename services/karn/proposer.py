"""Proposals for a site: variations of what is known, ranked by what they may earn, every one checked before it leaves.

1. The pool: templates legal at the site and the archive's best designs; those that earned rewards are offered again.
2. Variations: parents are drawn from the pool by tournament on a draw of the surrogate; each child is legal at the
   site, made smaller until it is within the constraints, and new in structure to pool and archive. Templates
   themselves are offered only where nothing else is left.
3. Ranking: one draw of the surrogate's weights for all (Thompson sampling), plus a share of the novelty; at most half
   of the answer comes from one cell of the archive while others are at hand.
4. The blueprint contract test, in order of rank, until enough have passed; where latency is bounded, only of what is
   fast enough, since a few passes take less time than the test.

Equal requests on an equal archive give equal proposals, unless latency is bounded: the random stream is drawn from the
request alone, time is not.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper.blueprints import BlueprintRegistry, allowed_mixing, check_blueprint, content_id, structure_id
from esper.blueprints.operators import OPERATORS
from esper.blueprints.tags import DESIGNED, is_allowed
from esper.contracts import wire
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintCost,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    Lineage,
    Site,
)
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError, InvalidStateError
from esper.contracts.tag_expression import TagExpression
from esper.services.karn.archive import Archive
from esper.services.karn.design import DesignView, novelty, view
from esper.services.karn.grammar import Grammar, Variation
from esper.services.karn.latency import median_latency_ms
from esper.services.karn.surrogate import Surrogate

MAX_COUNT: Final = 32
"""Proposals one request may ask for, at most."""

_NOVELTY_WEIGHT: Final = 0.02
_ATTEMPTS: Final = 96
_SHRINKS: Final = 8
_POOL_CAP: Final = 64
_TOURNAMENT: Final = 3

Check = Callable[[BlueprintIR, Site], bool]
"""Says whether a design passes the blueprint contract test at a site."""

Timer = Callable[[BlueprintIR, Site], float]
"""Gives the milliseconds that a design takes at a site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """Bounds every proposal obeys; ``None`` does not bind."""

    max_parameters: int | None = None
    """Trainable parameters at the site, at most. >= 0."""
    max_flops: int | None = None
    """FLOPs per example, at most. >= 0."""
    max_latency_ms: float | None = None
    """Milliseconds of `median_latency_ms`, at most. Finite and > 0. Measured: equal requests need not be equal."""
    allowed_ops: frozenset[str] = frozenset()
    """Operators that may be used; empty means all."""
    allowed_blueprints: TagExpression | None = None
    """Expression over tags that every proposal must keep (`esper.blueprints.tags`)."""

    def __post_init__(self) -> None:
        for name in ("max_parameters", "max_flops"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidInputError.of(f"constraints.{name}", "be >= 0", value)
        latency_ms = self.max_latency_ms
        if latency_ms is not None and not (math.isfinite(latency_ms) and latency_ms > 0):
            raise InvalidInputError.of("constraints.max_latency_ms", "be finite and > 0 ms", latency_ms)
        unknown = sorted(self.allowed_ops - set(OPERATORS))
        if unknown:
            raise InvalidInputError.of("constraints.allowed_ops", f"be among {', '.join(sorted(OPERATORS))}", unknown)

    def admit(self, design: DesignView) -> bool:
        """Say whether a design keeps the bounds on its graph; tags and latency are not asked here."""
        price = design.cost
        if self.max_parameters is not None and price.parameters > self.max_parameters:
            return False
        if self.max_flops is not None and price.flops > self.max_flops:
            return False
        used = {step.node.op for step in design.layout.steps}
        return not self.allowed_ops or used <= self.allowed_ops


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One proposal."""

    blueprint: Blueprint
    """The design."""
    cost: BlueprintCost
    """Exact cost at the site."""
    novelty: float
    """Distance to the nearest other design of the archive, 0 to 1."""
    expected_reward: float | None
    """Reward the surrogate expects, in units of loss; ``None`` until reports came."""


@dataclass(frozen=True, slots=True)
class _Design:
    """A design under consideration."""

    blueprint: Blueprint
    view: DesignView


class Proposer:
    """Proposes from an archive and a surrogate that somebody else feeds. Not thread-safe."""

    def __init__(
        self,
        registry: BlueprintRegistry,
        archive: Archive,
        surrogate: Surrogate,
        *,
        check: Check | None = None,
        timer: Timer | None = None,
    ) -> None:
        """Make a proposer.

        Args:
            registry: Templates.
            archive: Designs that reports came of.
            surrogate: What is expected of designs at the kind of site.
            check: The blueprint contract test; ``None`` takes `passes_contract`.
            timer: What a bound on latency is held against; ``None`` takes `median_latency_ms`.
        """
        self._registry = registry
        self._archive = archive
        self._surrogate = surrogate
        self._check = check or passes_contract
        self._timer = timer or median_latency_ms

    def propose(self, site: Site, count: int, constraints: Constraints, random_seed: int) -> list[Proposal]:
        """Give up to ``count`` proposals, most promising first.

        Raises:
            InvalidInputError: The count is out of range.
            InvalidStateError: No design keeps the constraints and passes its test.
            InvalidBlueprintError: The site's shapes do not fit its kind.
        """
        if not 1 <= count <= MAX_COUNT:
            raise InvalidInputError.of("count", f"be 1 to {MAX_COUNT}", count)
        random = np.random.default_rng(_stream(site, count, constraints, random_seed))
        base = self._base(site)
        allowed = [one for one in base if is_allowed(one.blueprint, constraints.allowed_blueprints)]
        known = [one for one in allowed if constraints.admit(one.view)]
        children = self._children(site, base, allowed, constraints, random, max(_ATTEMPTS, 8 * count))
        proven = [one for one in known if self._earned(one)]
        fits = partial(self._fits, site=site, max_latency_ms=constraints.max_latency_ms)
        chosen = _best(self._rank([*proven, *children], random), fits, count)
        chosen = chosen or _best(self._rank(known, random), fits, count)
        if not chosen:
            in_time = "" if constraints.max_latency_ms is None else f" within {constraints.max_latency_ms:g} ms"
            raise InvalidStateError(
                f"no design keeps the constraints at this {site.kind.name} site: {len(base)} known designs are legal, "
                f"{len(known)} keep them, {len(children)} new ones were made, none passed the contract test{in_time}"
            )
        return [self._proposal(one) for one in chosen]

    def _earned(self, design: _Design) -> bool:
        """Say whether reports speak well of a design."""
        entry = self._archive.entry(design.view.layout.site.kind, design.blueprint.id)
        return entry is not None and entry.standing > 0.0

    def _base(self, site: Site) -> list[_Design]:
        """Give the templates and the archive's elites that are legal at the site, each structure once."""
        mixing = allowed_mixing(site)
        elites = sorted(self._archive.elites(site.kind), key=lambda one: (-one.standing, one.blueprint.id))
        offered = [entry.blueprint for entry in elites[:_POOL_CAP]] + self._registry.for_site(site, mixing=mixing)
        found: dict[str, _Design] = {}
        for blueprint in offered:
            try:
                seen = view(blueprint.ir, site)
            except InvalidBlueprintError:
                continue
            if seen.layout.mixing <= mixing:
                found.setdefault(structure_id(blueprint.ir), _Design(blueprint, seen))
        return list(found.values())

    def _children(
        self,
        site: Site,
        base: Sequence[_Design],
        allowed: Sequence[_Design],
        constraints: Constraints,
        random: np.random.Generator,
        attempts: int,
    ) -> list[_Design]:
        """Give new designs within the bounds; the base itself may break them.

        Parents are of an allowed kind where there are such: the kind of a design is seldom varied away.
        """
        if not base:
            return []
        pool = allowed or base
        grammar = Grammar(site, constraints.allowed_ops)
        # What did not earn enough to stand in the pool is no news either: it must not come again as a variation.
        known = {structure_id(one.blueprint.ir) for one in base} | self._archive.structures(site.kind)
        children: list[_Design] = []
        for _ in range(attempts):
            parents = [self._parent(pool, random), self._parent(pool, random)]
            made = grammar.vary([one.blueprint.ir for one in parents], random, known)
            made = made and _within(made, site, grammar, constraints, random)
            if made is not None and made.structure not in known:
                known.add(made.structure)
                seen = view(made.ir, site)
                child = _Design(_blueprint(made, parents, site, seen.kind), seen)
                if is_allowed(child.blueprint, constraints.allowed_blueprints):
                    children.append(child)
        return children

    def _parent(self, pool: Sequence[_Design], random: np.random.Generator) -> _Design:
        """Draw a parent: the best of a few by a draw of the surrogate."""
        rows = [pool[int(place)] for place in random.integers(0, len(pool), size=_TOURNAMENT)]
        if not self._surrogate.num_samples:
            return rows[0]
        draws = self._surrogate.estimate([one.view.figures for one in rows], random).draws
        return rows[int(np.argmax(draws))]

    def _rank(self, designs: Sequence[_Design], random: np.random.Generator) -> list[_Design]:
        if not designs:
            return []
        figures = [one.view.figures for one in designs]
        scores = _NOVELTY_WEIGHT * np.array([self._novelty(one) for one in designs])
        if self._surrogate.num_samples:
            scores = scores + self._surrogate.estimate(figures, random).draws
        else:
            scores = scores + 1e-3 * random.random(len(designs))
        order = sorted(range(len(designs)), key=lambda place: (-scores[place], designs[place].blueprint.id))
        return [designs[place] for place in order]

    def _fits(self, design: _Design, *, site: Site, max_latency_ms: float | None) -> bool:
        """Say whether a design is done in time, where that is asked, and passes the contract test."""
        ir = design.blueprint.ir
        return (max_latency_ms is None or self._timer(ir, site) <= max_latency_ms) and self._check(ir, site)

    def _novelty(self, design: _Design) -> float:
        others = [
            entry.look.figures
            for entry in self._archive.entries(design.view.layout.site.kind)
            if entry.blueprint.id != design.blueprint.id
        ]
        return novelty(design.view.figures, others)

    def _proposal(self, design: _Design) -> Proposal:
        expected: float | None = None
        if self._surrogate.num_samples:
            figures: NDArray[np.float64] = design.view.figures
            expected = float(self._surrogate.estimate([figures], np.random.default_rng(0)).means[0])
        return Proposal(
            blueprint=design.blueprint,
            cost=design.view.cost,
            novelty=self._novelty(design),
            expected_reward=expected,
        )


def _best(ranked: Sequence[_Design], fits: Callable[[_Design], bool], count: int) -> list[_Design]:
    """Give the first that fit, by rank, at most half of them from one cell while there are others."""
    held: Counter[str] = Counter()
    chosen: list[_Design] = []
    waiting: list[_Design] = []
    for one in ranked:
        if len(chosen) == count:
            break
        if held[one.view.cell] >= math.ceil(count / 2):
            waiting.append(one)
        elif fits(one):
            held[one.view.cell] += 1
            chosen.append(one)
    for one in waiting:
        if len(chosen) == count:
            break
        if fits(one):
            chosen.append(one)
    place = {one.blueprint.id: rank for rank, one in enumerate(ranked)}
    return sorted(chosen, key=lambda one: place[one.blueprint.id])


def _within(
    made: Variation, site: Site, grammar: Grammar, constraints: Constraints, random: np.random.Generator
) -> Variation | None:
    """Give a variation made smaller until it keeps the bounds; ``None`` when it does not get there."""
    for _ in range(_SHRINKS):
        seen = view(made.ir, site)
        if seen.layout.mixing > allowed_mixing(site):
            return None
        if constraints.admit(seen):
            return made
        smaller = grammar.shrink(made.ir, random)
        if smaller is None:
            return None
        change = f"{made.change}; {smaller.change}"
        made = replace(made, ir=smaller.ir, change=change, structure=smaller.structure)
    return None


def passes_contract(ir: BlueprintIR, site: Site) -> bool:
    """Say whether a design passes the blueprint contract test; takes about 20 ms."""
    return check_blueprint(ir, site).passed


def _blueprint(made: Variation, parents: Sequence[_Design], site: Site, family: str) -> Blueprint:
    identity = content_id(made.ir)
    origins = [parents[place].blueprint for place in made.parents]
    kind = site.kind.name.lower()
    described = f"{made.operator.capitalize()} of {' and '.join(one.name for one in origins)}: {made.change}."
    return Blueprint(
        id=identity,
        name=f"karn-{kind.replace('_', '-')}-{identity[:16]}",
        ir=made.ir,
        metadata=BlueprintMetadata(
            tags=[*DESIGNED, family],
            description=described,
            site_kinds=(site.kind,),
        ),
        lineage=Lineage(
            parent_ids=tuple(dict.fromkeys(one.id for one in origins)), operator=made.operator, author="karn"
        ),
        state=BlueprintState.VALIDATED,
    )


def _stream(site: Site, count: int, constraints: Constraints, random_seed: int) -> NDArray[np.uint32]:
    """Give the seed of a request's random stream."""
    bounds: tuple[object, ...] = (
        constraints.max_parameters,
        constraints.max_flops,
        tuple(sorted(constraints.allowed_ops)),
    )
    if constraints.allowed_blueprints is not None:
        bounds = (*bounds, str(constraints.allowed_blueprints))
    if constraints.max_latency_ms is not None:
        bounds = (*bounds, constraints.max_latency_ms)
    text = f"karn:{wire.serialize(site).hex()}:{count}:{bounds}:{random_seed}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
