"""The circuit breaker, with a clock that tests turn."""

from __future__ import annotations

import grpc
import pytest

from esper.contracts.errors import UnavailableError
from esper.mesh.breaker import CircuitBreaker

OK, AWAY, LATE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
MISSING, CANCELLED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("urza", failures=3, cooldown_s=1.0, clock=clock)


def fail(breaker: CircuitBreaker, *codes: grpc.StatusCode) -> None:
    for code in codes:
        breaker.admit()
        breaker.record(code)


def test_opens_after_a_row_of_failures(breaker: CircuitBreaker) -> None:
    fail(breaker, AWAY, LATE, AWAY)
    assert breaker.is_open
    with pytest.raises(
        UnavailableError, match=r"urza must answer again .* got 3 failures in a row; next try in 1.00 s"
    ):
        breaker.admit()


@pytest.mark.parametrize("answer", [OK, MISSING])
def test_any_answer_in_between_starts_the_row_anew(breaker: CircuitBreaker, answer: grpc.StatusCode) -> None:
    fail(breaker, AWAY, AWAY, answer, AWAY, AWAY)
    assert not breaker.is_open


def test_one_call_may_try_after_the_cool_down(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, AWAY, AWAY, AWAY)
    clock.now_s = 1.0
    breaker.admit()
    with pytest.raises(UnavailableError, match=r"next try in 1.00 s"):
        breaker.admit()
    breaker.record(OK)
    assert not breaker.is_open
    breaker.admit()


def test_failed_try_opens_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, AWAY, AWAY, AWAY)
    clock.now_s = 1.0
    fail(breaker, LATE)
    clock.now_s = 1.9
    assert breaker.is_open
    clock.now_s = 2.0
    assert not breaker.is_open


def test_try_without_an_answer_does_not_block_the_next(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, AWAY, AWAY, AWAY)
    clock.now_s = 1.0
    fail(breaker, CANCELLED)
    clock.now_s = 2.0
    breaker.admit()
    clock.now_s = 3.0
    breaker.admit()


def test_late_failures_of_old_calls_keep_it_open(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, AWAY, AWAY, AWAY)
    clock.now_s = 0.5
    breaker.record(AWAY)
    clock.now_s = 1.2
    assert breaker.is_open


def test_breaker_of_zero_never_opens(clock: Clock) -> None:
    breaker = CircuitBreaker("urza", failures=0, cooldown_s=1.0, clock=clock)
    fail(breaker, *[AWAY] * 50)
    assert not breaker.is_open
