"""What growth may cost, and the ledger that never lets it cost more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esper.contracts.blueprint import BlueprintCost
from esper.contracts.errors import BudgetExceededError, CorruptDataError, InvalidInputError
from esper.contracts.run import BudgetStatus
from esper.contracts.wire import parse, serialize


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bounds on growth: an ``int`` is absolute, a ``float`` a share of the host, ``None`` no bound.

    Raises:
        InvalidInputError: A bound is negative, not finite, or a share where only a count makes sense.
    """

    added_params: int | float | None = None
    """Parameters that may be added over the run: of what was kept, and of seeds on trial; of those of one race the
    largest counts, or all together that are blended in at once."""
    added_flops: int | float | None = None
    """Forward FLOPs per example that may be added."""
    max_adaptations: int | None = None
    """Adaptations that may be begun."""

    def __post_init__(self) -> None:
        for name in ("added_params", "added_flops"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 0 <= value < float("inf")):
                raise InvalidInputError.of(f"budget.{name}", "be a finite count or share >= 0", value)
        count: object = self.max_adaptations
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise InvalidInputError.of("budget.max_adaptations", "be a whole number >= 0", count)


@dataclass(frozen=True, slots=True)
class Booking:
    """What one adaptation has reserved."""

    cost: BlueprintCost
    """Its cost."""
    group: str
    """Race it belongs to, or one of its own (``_alone``)."""
    is_blended: bool = False
    """Whether it is blended in beside others of its race."""


class BudgetLedger:
    """Books what live seeds cost against a :class:`Budget`; belongs to the training thread.

    A race is booked at the largest cost among those still in it, or at that of all together that are blended in at
    once, whichever is more; one that is kept is booked by itself.
    """

    def __init__(self, budget: Budget, *, host_parameters: int, host_flops: int | None) -> None:
        self._max_parameters = _absolute(budget.added_params, host_parameters)
        if isinstance(budget.added_flops, float) and host_flops is None:
            raise InvalidInputError.of(
                "budget.added_flops", "be a count: the host's FLOPs are unknown", budget.added_flops
            )
        self._max_flops = _absolute(budget.added_flops, host_flops or 0)
        self._max_adaptations = budget.max_adaptations
        self._booked: dict[str, Booking] = {}
        self._adaptations = 0

    def refusal(self, cost: BlueprintCost, group: str = "") -> str | None:
        """Say why ``cost`` does not fit in what is left, or ``None`` when it does.

        What the others of its ``group`` have reserved is left to it, unless they are blended in.
        """
        status = self.status()
        if status.max_adaptations is not None and status.adaptations >= status.max_adaptations:
            return f"{status.adaptations} of {status.max_adaptations} adaptations are used"
        return self._excess(cost, group)

    def _excess(self, cost: BlueprintCost, group: str, *, later: bool = False) -> str | None:
        """Say what does not fit; ``later``: once nothing of the group is blended in any more."""
        status = self.status()
        others = _total(one for one in self._booked.values() if one.group != group or (one.is_blended and not later))
        bounds = (
            ("parameters", cost.parameters, others[0], status.max_added_parameters),
            ("FLOPs", cost.flops, others[1], status.max_added_flops),
        )
        for what, wanted, used, bound in bounds:
            if bound is not None and used + wanted > bound:
                return f"{wanted} {what} do not fit: {used} of {bound} are used"
        return None

    def book(self, adaptation_id: str, cost: BlueprintCost, group: str = "") -> None:
        """Reserve ``cost`` for an adaptation and count it as begun.

        Raises:
            BudgetExceededError: It does not fit; nothing was booked.
        """
        reason = self.refusal(cost, group)
        if reason is not None:
            raise BudgetExceededError(f"budget must not be exceeded: {reason}", parameter="budget")
        self._booked[adaptation_id] = Booking(cost, group or _alone(adaptation_id))
        self._adaptations += 1

    def fit_together(self, adaptation_ids: Sequence[str]) -> bool:
        """Say whether some rivals of a race may be blended in beside those that are."""
        found = [self._booked[key] for key in adaptation_ids]
        parameters = sum(one.cost.parameters for one in found)
        flops = sum(one.cost.flops for one in found)
        whole = BlueprintCost(parameters=parameters, flops=flops, activation_bytes=0)
        return self._excess(whole, found[0].group) is None

    def blend(self, adaptation_ids: Sequence[str]) -> None:
        """Book some rivals of a race side by side.

        Raises:
            BudgetExceededError: They do not fit; nothing was changed.
        """
        if not self.fit_together(adaptation_ids):
            raise BudgetExceededError(f"budget must hold {len(adaptation_ids)} rivals at once", parameter="budget")
        for key in adaptation_ids:
            self._booked[key] = replace(self._booked[key], is_blended=True)

    def keep(self, adaptation_id: str) -> dict[str, str]:
        """Book a rival that is kept by itself; gives those of its race that fit no more, with the reason.

        Nothing is exceeded once they are released.
        """
        kept = self._booked[adaptation_id]
        self._booked[adaptation_id] = Booking(kept.cost, _alone(adaptation_id))
        rest = ((key, one) for key, one in self._booked.items() if one.group == kept.group and not one.is_blended)
        found = {key: self._excess(one.cost, one.group, later=True) for key, one in rest}
        return {key: reason for key, reason in found.items() if reason is not None}

    def release(self, adaptation_id: str) -> None:
        """Give back what an adaptation had reserved; unknown ids are already free."""
        self._booked.pop(adaptation_id, None)

    def state_dict(self) -> dict[str, Any]:
        """Give what is reserved, and the adaptations begun, as plain data."""
        booked = {key: serialize(one.cost).hex() for key, one in self._booked.items()}
        blended = [key for key, one in self._booked.items() if one.is_blended]
        groups = {key: one.group for key, one in self._booked.items()}
        return {"booked": booked, "groups": groups, "blended": blended, "begun": self._adaptations}

    def load_state_dict(self, state: Mapping[str, Any], groups: Mapping[str, str]) -> None:
        """Take over what :meth:`state_dict` gave; adaptations once begun stay counted.

        ``groups`` says to which race each belongs that is still in one, for states of earlier versions, which do not.

        Raises:
            CorruptDataError: A group is no name.
        """
        races: Mapping[str, Any] = state.get("groups", groups)
        odd = [race for race in races.values() if not isinstance(race, str)]
        if odd:
            raise CorruptDataError(f"budget's groups must be names, got {odd[0]!r}")
        found = {key: parse(bytes.fromhex(cost), BlueprintCost) for key, cost in state["booked"].items()}
        blended = frozenset(state.get("blended", ()))
        self._booked = {key: Booking(cost, races.get(key, _alone(key)), key in blended) for key, cost in found.items()}
        self._adaptations = max(state["begun"], self._adaptations)

    def clear(self) -> None:
        """Give everything back, as in a run that begins anew."""
        self._booked, self._adaptations = {}, 0

    def status(self) -> BudgetStatus:
        """Give bounds and use as the state packet shows them."""
        parameters, flops = _total(self._booked.values())
        return BudgetStatus(
            max_added_parameters=self._max_parameters,
            added_parameters=parameters,
            max_added_flops=self._max_flops,
            added_flops=flops,
            max_adaptations=self._max_adaptations,
            adaptations=self._adaptations,
        )


def _alone(adaptation_id: str) -> str:
    """Give the name of a group of one: not the bare id, which is the name of a race for one of its rivals."""
    return f"alone:{adaptation_id}"


def _total(bookings: Iterable[Booking]) -> tuple[int, int]:
    """Give the parameters and FLOPs of every group, summed over the groups."""
    groups: dict[str, list[Booking]] = {}
    for one in bookings:
        groups.setdefault(one.group, []).append(one)
    parameters = sum(_of_group((one.cost.parameters, one.is_blended) for one in rivals) for rivals in groups.values())
    return parameters, sum(_of_group((one.cost.flops, one.is_blended) for one in rivals) for rivals in groups.values())


def _of_group(costs: Iterable[tuple[int, bool]]) -> int:
    """Give the largest of some costs, or the sum of those that are blended in, whichever is more."""
    known = list(costs)
    return max(*(cost for cost, _ in known), sum(cost for cost, is_blended in known if is_blended))


def _absolute(bound: int | float | None, host: int) -> int | None:
    if bound is None:
        return None
    return int(bound * host) if isinstance(bound, float) else bound
