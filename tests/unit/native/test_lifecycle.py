"""The states and the table are the same in the core, in Python and on the wire."""

from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution._native import state_name, transition_table


def test_names_and_numbers_agree_with_the_contracts() -> None:
    assert {state.value: state.name for state in State} == {n: state_name(n) for n in range(1, 9)}
    assert state_name(0) == "UNSPECIFIED"


def test_names_and_numbers_agree_with_the_wire() -> None:
    from esper.v1 import lifecycle_pb2

    wire = {name.rsplit("_", 1)[-1]: number for name, number in lifecycle_pb2.SeedLifecycleState.items()}
    assert wire == {state_name(n): n for n in range(9)}


def test_an_unknown_number_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"state must be the number of a seed state \(0 to 8\), got 9"):
        state_name(9)


def test_the_table_is_the_drawn_one() -> None:
    drawn = {
        State.DORMANT: {State.LOADING},
        State.LOADING: {State.ACTIVE, State.ERROR},
        State.ACTIVE: {State.EVALUATING, State.CULLED, State.ERROR},
        State.EVALUATING: {State.FOSSILIZED, State.CULLED, State.ERROR},
        State.FOSSILIZED: {State.CULLED, State.ERROR},
        State.ERROR: {State.CULLED},
        State.CULLED: {State.EMBARGOED},
        State.EMBARGOED: {State.DORMANT},
    }
    assert sorted(transition_table()) == sorted((a.value, b.value) for a, targets in drawn.items() for b in targets)
