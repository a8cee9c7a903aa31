"""What a run may still afford, and what is said where it would grow and no candidate can be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esper.contracts.decision import BUDGET_TOO_SMALL, Evidence
from esper.contracts.run import BudgetStatus, SeedStatus, SystemStatePacket
from esper.services.tamiyo.candidates import Candidate
from esper.services.tamiyo.run_memory import budget_left


def too_small(budget: BudgetStatus, candidates: Sequence[Candidate]) -> tuple[Evidence, ...]:
    """Give the evidence that none of the candidates is within what is left, where that is so; else nothing.

    Ask where nothing is under way: what is booked for that comes back where it is not kept.
    """
    parameters, flops, adaptations = budget_left(budget, ())
    if not candidates or adaptations < 1:
        return ()
    if any(one.cost.parameters <= parameters and one.cost.flops <= flops for one in candidates):
        return ()
    smallest = min(one.cost.parameters for one in candidates)
    detail = f"parameters of the smallest candidate; {parameters:g} parameters and {flops:g} FLOPs are left"
    return (Evidence(name=BUDGET_TOO_SMALL, value=smallest, detail=detail),)


def is_spent(budget: BudgetStatus, parameters: float, min_share: float) -> bool:
    """Say whether the ``parameters`` left are less than the share of the whole budget that a race is worth."""
    whole = budget.max_added_parameters
    return whole is not None and parameters < min_share * whole


def why_none(
    packet: SystemStatePacket,
    seeds: Mapping[str, Sequence[SeedStatus]],
    candidates: Sequence[Candidate],
    min_share: float,
) -> str:
    """Say why none of the candidates is drawn; ``seeds`` are the dormant ones of the layers that may be grown."""
    if not candidates:
        return "no blueprint fits any layer."
    if not seeds:
        return "every layer is busy, resting or without a dormant seed."
    budget = packet.budget
    if is_spent(budget, budget_left(budget, ())[0], min_share):
        return (
            f"less than {min_share:.0%} of the budget is left ({budget.added_parameters} of "
            f"{budget.max_added_parameters} parameters are used): no further race is worth it."
        )
    return (
        f"none of {len(candidates)} candidates is within the budget ({budget.added_parameters} of "
        f"{budget.max_added_parameters} parameters, {budget.adaptations} of {budget.max_adaptations} adaptations) "
        "and free of an embargo."
    )
