"""Methods on the vector call: arguments by position and name, wrong ones named, errors as everywhere in the module."""

from __future__ import annotations

import gc
import inspect
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import InvalidInputError, InvalidTransitionError
from esper.execution._native import SignalRing, StateLayout

LOADING, ACTIVE = 2, 3
FIGURES: dict[str, float | None] = {
    "mean": 1.0,
    "variance": 2.0,
    "entropy": 3.0,
    "dead_share": 0.25,
    "nonfinite_share": 0.5,
    "gradient_variance": 6.0,
    "latency_ms": 7.0,
}


def test_arguments_may_come_by_name_in_any_order() -> None:
    layout, ring = StateLayout(2), SignalRing(4)
    layout.transition(step=7, to=LOADING, seed=1)
    layout.transition(1, ACTIVE, step=8)
    assert (layout.state(1), layout.read(1).last_transition_step) == (ACTIVE, 8)
    ring.push(3, step=5, seed=-1, flags=9, **FIGURES)
    ring.push(3, -1, 5, *FIGURES.values(), flags=9)
    drained = ring.drain()
    assert {name: len(set(column.tolist())) for name, column in drained.items() if name != "time_ns"} == dict.fromkeys(
        [*FIGURES, "layer_id", "seed", "step", "flags"], 1
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"transition\(\) must get seed, got 0 positional arguments without it"),
        ((0, 2), {}, r"transition\(\) must get step, got 2 positional arguments without it"),
        ((0, 2, 3, 4), {}, r"transition\(\) takes at most 3 arguments, got 4"),
        ((0, 2, 3), {"step": 3}, r"transition\(\) must get step once, got it twice"),
        ((0, 2), {"when": 3}, r"transition\(\) has no parameter 'when'"),
        ((0, 2, "soon"), {}, "step must be an integer, got str"),
        ((0.0, 2, 3), {}, "seed must be an integer, got float"),
        ((None, 2, 3), {}, "seed must be an integer, got NoneType"),
    ],
)
def test_a_wrong_call_is_a_type_error_that_names_the_parameter(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    layout = StateLayout(1)
    with pytest.raises(TypeError, match=message):
        layout.transition(*args, **kwargs)
    assert layout.state(0) == 1


def test_errors_of_the_core_are_translated_as_everywhere() -> None:
    layout = StateLayout(1)
    with pytest.raises(InvalidTransitionError, match="seed 0 cannot go from DORMANT to ACTIVE") as caught:
        layout.transition(0, ACTIVE, 1)
    assert caught.value.parameter == "to"
    with pytest.raises(InvalidInputError, match="seed must be below num_seeds = 1, got 5") as named:
        layout.record_health(5, None, None, None, None, None)
    assert named.value.parameter == "seed"


@given(st.integers(-(2**70), 2**70))
def test_whole_numbers_are_taken_exactly_or_refused(number: int) -> None:
    ring = SignalRing(1)
    if 0 <= number < 2**64:
        ring.push(0, 0, number, *FIGURES.values())
        assert int(ring.drain()["step"][0]) == number
    else:
        with pytest.raises(InvalidInputError, match=f"between 0 and {2**64 - 1}, got {number}"):
            ring.push(0, 0, number, *FIGURES.values())
    if -(2**31) <= number < 2**31:
        ring.push(0, number, 0, *FIGURES.values())
        assert int(ring.drain()["seed"][0]) == number


@pytest.mark.parametrize("number", [np.int64(5), np.uint8(5), True + 4, type("Five", (int,), {})(5)])
def test_anything_with_an_index_is_a_whole_number(number: Any) -> None:
    ring = SignalRing(1)
    ring.push(number, number, number, *FIGURES.values())
    drained = ring.drain()
    assert [int(drained[name][0]) for name in ("layer_id", "seed", "step")] == [5, 5, 5]


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_anything_with_a_float_is_a_figure(number: Any) -> None:
    ring = SignalRing(1)
    ring.push(0, 0, 0, number, number, number, number, number, number, number)
    assert ring.drain()["latency_ms"].tolist() == [0.5]


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="mean must fit a 64-bit float, got 1000"):
        StateLayout(1).record_health(0, 10**400, None, None, None, None)


def test_an_error_inside_a_conversion_reaches_the_caller() -> None:
    class Odd:
        def __index__(self) -> int:
            raise RuntimeError("no index today")

        def __float__(self) -> float:
            raise RuntimeError("no float today")

    with pytest.raises(RuntimeError, match="no index today"):
        StateLayout(1).transition(Odd(), 2, 3)
    with pytest.raises(RuntimeError, match="no float today"):
        StateLayout(1).record_health(0, Odd(), None, None, None, None)  # type: ignore[arg-type]


def test_a_python_subclass_keeps_the_methods() -> None:
    class Other:
        pass

    class Named(Other, StateLayout):
        def __init__(self) -> None:
            StateLayout.__init__(self, 1)

    layout = Named()
    layout.transition(0, LOADING, 3)
    assert layout.state(0) == LOADING


def test_a_class_over_two_native_classes_finds_the_right_part() -> None:
    class Both(SignalRing, StateLayout):
        def __init__(self) -> None:
            SignalRing.__init__(self, 4)
            StateLayout.__init__(self, 1)

    both = Both()
    both.transition(0, LOADING, 3)
    both.push(0, 0, 1, *FIGURES.values())
    assert (both.state(0), both.pushed) == (LOADING, 1)


def test_self_must_be_the_class_and_made() -> None:
    with pytest.raises(TypeError, match="StateLayout"):
        StateLayout.transition(object(), 0, 2, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"StateLayout\.__init__\(\) must be called first"):
        StateLayout.transition(StateLayout.__new__(StateLayout), 0, 2, 3)


def test_calls_leak_no_reference_whether_they_fail_or_not() -> None:
    layout, step, words = StateLayout(1), 10**12, "not a number at all"
    before = sys.getrefcount(step), sys.getrefcount(words)
    for _ in range(100):
        layout.record_health(0, step, None, None, None, latency_ms=step)
        with pytest.raises(TypeError, match="must be a real number"):
            layout.record_health(0, step, words, None, None, None)  # type: ignore[arg-type]
    gc.collect()
    assert (sys.getrefcount(step), sys.getrefcount(words)) == before


def test_python_can_read_the_signature() -> None:
    assert list(inspect.signature(StateLayout.transition).parameters) == ["self", "seed", "to", "step"]
    assert inspect.signature(SignalRing.push).parameters["flags"].default == 0
    assert "Raises:" in (StateLayout.transition.__doc__ or "")
