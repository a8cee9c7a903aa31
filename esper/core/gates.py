"""The gates a decision must pass before it is carried out: every check answers in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from esper.blueprints import cost as cost_of
from esper.blueprints.tags import is_allowed, tags_of
from esper.contracts.blueprint import BlueprintCost, Site
from esper.contracts.decision import AdaptationDecision
from esper.contracts.errors import EsperError, InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import GateCheck
from esper.core.adaptation import Adaptation
from esper.core.budget import BudgetLedger
from esper.core.growth import GrowthConfig
from esper.execution.layers.base import KasminaLayer

_REMOVABLE = frozenset({SeedLifecycleState.ACTIVE, SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED})


def check_place(decision: AdaptationDecision, layers: Mapping[str, KasminaLayer]) -> GateCheck:
    """Check that layer and seed exist."""
    layer = layers.get(decision.layer)
    if layer is None:
        return GateCheck(name="layer", passed=False, detail=f"there is no layer {decision.layer!r} with seeds")
    index = decision.seed_index
    if index is None or not 0 <= index < layer.num_seeds:
        return GateCheck(name="layer", passed=False, detail=f"seed must be 0 to {layer.num_seeds - 1}, got {index}")
    return GateCheck(name="layer", passed=True, detail=f"{decision.layer} has seed {index}")


def check_dormant(decision: AdaptationDecision, layer: KasminaLayer) -> GateCheck:
    """Check that the seed is free."""
    state = layer.state_layout.state(decision.seed_index or 0)
    passed = state is SeedLifecycleState.DORMANT
    return GateCheck(name="dormant", passed=passed, detail=f"seed {decision.seed_index} is {state.name}")


def check_removable(decision: AdaptationDecision, layer: KasminaLayer) -> GateCheck:
    """Check that there is something to remove."""
    state = layer.state_layout.state(decision.seed_index or 0)
    return GateCheck(name="live", passed=state in _REMOVABLE, detail=f"seed {decision.seed_index} is {state.name}")


def check_room(decision: AdaptationDecision, known: Iterable[Adaptation], config: GrowthConfig) -> GateCheck:
    """Check that the layer is free of other adaptations and that not too many are under way; a race counts as one.

    Who comes to a race when one of it is blended in already, or kept, comes too late. ``known`` may hold ended ones.
    """
    rivals, others = list[Adaptation](), list[Adaptation]()
    for one in known:
        (rivals if one.decision.group == decision.group else others).append(one)
    if any(one.state in (SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED) for one in rivals):
        return GateCheck(name="room", passed=False, detail="its race has gone on without it")
    others = [one for one in others if one.open]
    if any(one.layer == decision.layer for one in others):
        return GateCheck(name="room", passed=False, detail=f"{decision.layer} has an adaptation under way")
    count = len({one.decision.group for one in others})
    passed = count < config.max_open
    return GateCheck(name="room", passed=passed, detail=f"{count} of {config.max_open} adaptations are under way")


def check_site(decision: AdaptationDecision, layer: KasminaLayer) -> tuple[Site | None, GateCheck]:
    """Give the site the seed would have, and check that the decision was made for the layer as it is."""
    try:
        site = layer.skip_site(decision.source) if decision.source else layer.site
    except EsperError as error:
        return None, GateCheck(name="site", passed=False, detail=str(error)[:500])
    passed = site is not None and decision.site in (None, site)
    return site, GateCheck(name="site", passed=passed, detail=f"layer has {site}, decision names {decision.site}")


def price_blueprint(decision: AdaptationDecision, site: Site | None) -> tuple[BlueprintCost | None, GateCheck]:
    """Give the exact cost of the decision's blueprint at its site, or why there is none."""
    if decision.blueprint is None or site is None:
        return None, GateCheck(name="cost", passed=False, detail="the decision carries no blueprint")
    try:
        cost = cost_of(decision.blueprint.ir, site)
    except InvalidInputError as error:
        return None, GateCheck(name="cost", passed=False, detail=str(error)[:500])
    return cost, GateCheck(name="cost", passed=True, detail=f"{cost.parameters} parameters, {cost.flops} FLOPs")


def check_allowed(decision: AdaptationDecision, config: GrowthConfig) -> GateCheck:
    """Check that the decision's blueprint is of a kind that may stand in the run."""
    name, blueprint = "allowed_blueprints", decision.blueprint
    if blueprint is None:
        return GateCheck(name=name, passed=False, detail="the decision carries no blueprint")
    rule = config.blueprint_rule
    if is_allowed(blueprint, rule):
        detail = "every blueprint may stand in this run" if rule is None else f"{blueprint.name} keeps '{rule}'"
        return GateCheck(name=name, passed=True, detail=detail[:500])
    tags = ", ".join(sorted(tags_of(blueprint.ir, blueprint.metadata.tags)))
    return GateCheck(name=name, passed=False, detail=f"{blueprint.name} must keep '{rule}', has the tags {tags}"[:500])


def check_budget(decision: AdaptationDecision, cost: BlueprintCost, ledger: BudgetLedger) -> GateCheck:
    """Check that the cost fits in what is left."""
    refusal = ledger.refusal(cost, decision.group)
    return GateCheck(name="budget", passed=refusal is None, detail=refusal or f"{cost.parameters} parameters fit")


def check_latency(layer: KasminaLayer, seed_index: int, config: GrowthConfig) -> GateCheck:
    """Check that a kernel does not hold training up; one that nobody timed passes."""
    latency_ms, limit_ms = layer.state_layout.read(seed_index).latency_ms, config.max_kernel_latency_ms
    shown = "nobody timed it" if latency_ms is None else f"a pass takes {latency_ms:.3g} ms"
    passed = latency_ms is None or latency_ms <= limit_ms
    return GateCheck(name="latency", passed=passed, detail=f"{shown}, at most {limit_ms:g} ms")
