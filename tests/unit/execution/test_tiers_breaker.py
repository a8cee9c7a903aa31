"""The circuit breaker: closed, open, half-open, and back."""

from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.execution.tier_port import BreakerState, CircuitBreaker


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(failures_to_open=2, open_s=1.0, max_open_s=3.0, clock=clock)


def fail(breaker: CircuitBreaker) -> bool:
    assert breaker.allow()
    return breaker.failed()


def test_it_opens_after_failures_in_a_row(breaker: CircuitBreaker) -> None:
    assert not fail(breaker)
    breaker.succeeded()
    assert not fail(breaker)
    assert fail(breaker)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_one_trial_at_a_time_goes_through_when_its_time_is_over(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    fail(breaker)
    clock.now_s = 1.0
    assert breaker.state is BreakerState.HALF_OPEN
    assert (breaker.allow(), breaker.allow()) == (True, False)
    breaker.succeeded()
    assert breaker.allow()
    assert breaker.allow()


def test_it_stays_open_for_longer_each_time_up_to_a_bound(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    fail(breaker)
    for wait_s in (1.0, 2.0, 3.0, 3.0):
        clock.now_s += wait_s - 0.01
        assert breaker.state is BreakerState.OPEN
        clock.now_s += 0.01
        assert not fail(breaker)
    assert breaker.state is BreakerState.OPEN


def test_a_trial_that_was_given_up_leaves_room_for_another(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    fail(breaker)
    clock.now_s = 1.0
    assert breaker.allow()
    breaker.abandoned()
    assert breaker.allow()


def test_a_late_failure_of_an_earlier_call_does_not_open_it_for_longer(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    fail(breaker)
    clock.now_s = 0.5
    breaker.failed()
    clock.now_s = 1.0
    assert breaker.state is BreakerState.HALF_OPEN


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="failures_to_open must be >= 1, got 0"):
        CircuitBreaker(failures_to_open=0)
    with pytest.raises(InvalidInputError, match="open_s must be > 0 seconds and at most max_open_s, got 9"):
        CircuitBreaker(open_s=9.0, max_open_s=3.0)
