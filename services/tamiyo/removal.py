"""Which kept seed is to go: one that has begun to fail, or one that was measured again and no longer pays.

    figure    formula
    belief    n new errors: (n + 1) / (n + 2).   effect d, standard error s, price p: P(d < p) = Phi((p - d) / s)
    urgency   0.9 on errors, else 0.7

What each fossil brings was measured with the others in place: of two that do the same, each looks dispensable. So a
removal outdates every measurement before it (`RunMemory.measured`), and the next one waits for new figures.

A removal in doubt, which would not be acted on, is no decision: what else there is to do for the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts.decision import Evidence
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import LayerStatus, SeedStatus, SystemStatePacket
from esper.services.tamiyo.normal import normal_cdf
from esper.services.tamiyo.run_memory import RunMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """A fossil that is to go."""

    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within the layer."""
    belief: float
    """Probability that the run is better off without it."""
    urgency: float
    """How fast the opportunity passes, 0 to 1."""
    evidence: tuple[Evidence, ...]
    """The figures behind it."""
    explanation: str
    """Why, in words."""


def find_removal(packet: SystemStatePacket, memory: RunMemory) -> Removal | None:
    """Give the removal of a fossil that fails or that no longer pays, the surest first; ``None`` where all may stay."""
    found = [
        removal
        for layer in packet.layers
        for seed in layer.seeds
        if seed.state is SeedLifecycleState.FOSSILIZED
        for removal in (_failing(layer, seed, memory), _unprofitable(layer, seed, memory))
        if removal is not None
    ]
    return max(found, key=lambda one: (one.belief, one.urgency), default=None)


def _failing(layer: LayerStatus, seed: SeedStatus, memory: RunMemory) -> Removal | None:
    """Give the removal of the newest fossil of a layer that has begun to fail."""
    errors = memory.new_errors.get(layer.layer, 0)
    fossils = [one for one in layer.seeds if one.state is SeedLifecycleState.FOSSILIZED]
    newest = max(fossils, key=lambda one: (one.last_transition_step, one.seed_index))
    if not errors or seed is not newest:
        return None
    return Removal(
        belief=(errors + 1) / (errors + 2),
        urgency=0.9,
        layer=layer.layer,
        seed_index=seed.seed_index,
        evidence=(Evidence(name="new_errors", value=errors, detail="failures of the layer since the last packet"),),
        explanation=f"{layer.layer} failed {errors} times since the last packet: remove its newest fossil.",
    )


def _unprofitable(layer: LayerStatus, seed: SeedStatus, memory: RunMemory) -> Removal | None:
    """Give the removal of a fossil whose newest measurement is below its price."""
    measured = memory.measured(seed.adaptation_id)
    if measured is None or measured.effect >= measured.price:
        return None
    return Removal(
        belief=normal_cdf((measured.price - measured.effect) / max(measured.error, 1e-9)),
        urgency=0.7,
        layer=layer.layer,
        seed_index=seed.seed_index,
        evidence=(
            Evidence(name="contribution", value=measured.effect, detail="as measured last"),
            Evidence(name="price", value=measured.price, detail="what it must bring"),
        ),
        explanation=(
            f"Seed {seed.seed_index} of {layer.layer} was measured again: it brings {measured.effect:+.4f}, less than "
            f"its price of {measured.price:.4f}. Remove it."
        ),
    )
