"""The budget is never exceeded, and what leaves gives back."""

from __future__ import annotations

import pytest

from esper.contracts.blueprint import BlueprintCost
from esper.contracts.errors import BudgetExceededError, InvalidInputError
from esper.core.budget import Budget, BudgetLedger


def cost(parameters: int, flops: int = 0) -> BlueprintCost:
    return BlueprintCost(parameters=parameters, flops=flops, activation_bytes=0)


def ledger(budget: Budget, host_flops: int | None = 1000) -> BudgetLedger:
    return BudgetLedger(budget, host_parameters=100, host_flops=host_flops)


def test_a_float_is_a_share_of_the_host_and_an_int_a_count() -> None:
    status = ledger(Budget(added_params=0.5, added_flops=7)).status()
    assert (status.max_added_parameters, status.max_added_flops) == (50, 7)


def test_what_does_not_fit_is_refused_and_not_booked() -> None:
    books = ledger(Budget(added_params=50))
    books.book("a", cost(40))
    with pytest.raises(BudgetExceededError, match="20 parameters do not fit: 40 of 50 are used"):
        books.book("b", cost(20))
    assert books.status().added_parameters == 40
    assert books.status().adaptations == 1


def test_release_gives_parameters_back_but_not_the_attempt() -> None:
    books = ledger(Budget(added_params=50, max_adaptations=1))
    books.book("a", cost(40))
    books.release("a")
    assert books.status().added_parameters == 0
    assert books.refusal(cost(1)) == "1 of 1 adaptations are used"


def test_flops_are_bounded_too() -> None:
    assert ledger(Budget(added_flops=0.1)).refusal(cost(0, 101)) == "101 FLOPs do not fit: 0 of 100 are used"


def test_a_share_of_unknown_flops_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"budget\.added_flops must be a count"):
        ledger(Budget(added_flops=0.1), host_flops=None)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"added_params": -1}, r"budget\.added_params must be a finite count or share >= 0, got -1"),
        ({"added_params": float("nan")}, r"budget\.added_params"),
        ({"added_flops": True}, r"budget\.added_flops"),
        ({"max_adaptations": 1.5}, r"budget\.max_adaptations must be a whole number >= 0, got 1\.5"),
    ],
)
def test_bad_bounds_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Budget(**bounds)  # type: ignore[arg-type]


def raced() -> BudgetLedger:
    """A race that was won, with one rival left that fits beside the winner."""
    books = ledger(Budget(added_params=100))
    for name, parameters in (("winner", 60), ("small", 30), ("large", 50)):
        books.book(name, cost(parameters), "race")
    assert books.status().added_parameters == 60
    assert books.keep("winner") == {"large": "50 parameters do not fit: 60 of 100 are used"}
    books.release("large")
    return books


def test_a_rival_that_is_kept_is_booked_by_itself_and_what_fits_no_more_is_named() -> None:
    assert raced().status().added_parameters == 90


def test_a_checkpoint_knows_who_is_still_in_a_race() -> None:
    first, second = raced(), ledger(Budget(added_params=100))
    second.load_state_dict(first.state_dict(), {"winner": "winner", "small": "race"})
    assert second.status() == first.status()
    second.book("another", cost(35), "race")
    assert second.status().added_parameters == 95, "the one still in the race shares with who joins it"
    second.clear()
    assert (second.status().added_parameters, second.status().adaptations) == (0, 0)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_rival_whose_name_the_race_has_is_booked_by_itself_too(resumed: bool) -> None:
    books = ledger(Budget(added_params=50))
    for name, parameters in (("a", 30), ("b", 25), ("c", 10)):
        books.book(name, cost(parameters), "a")
    books.blend(["a", "c"])
    assert set(books.keep("a")) == {"b"}, "beside what is kept, there are 20 left"
    if resumed:
        books.load_state_dict(books.state_dict(), {"b": "a", "c": "a"})
    books.release("b")
    books.keep("c")
    assert books.status().added_parameters == 40
