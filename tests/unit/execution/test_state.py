from __future__ import annotations

import copy

import numpy as np
import pytest

from esper.contracts.errors import InvalidInputError, InvalidTransitionError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution.state import LayerStateLayout, SeedStates, SeedTransition


@pytest.fixture
def states() -> SeedStates:
    return SeedStates(6)


@pytest.fixture
def layer(states: SeedStates) -> LayerStateLayout:
    return LayerStateLayout(states, "layer1", 2, 4)


def test_all_seeds_start_dormant_and_without_share(layer: LayerStateLayout) -> None:
    assert all(state == State.DORMANT for state in layer.lifecycle_states)
    assert layer.alpha_blend.tolist() == [0.0] * 4


def test_columns_are_views_of_the_models_layout(states: SeedStates, layer: LayerStateLayout) -> None:
    layer.transition(1, State.LOADING, 7)
    assert states.layout.lifecycle_states.tolist() == [1, 1, 1, 2, 1, 1]
    assert layer.lifecycle_states[1] == State.LOADING
    assert layer.last_transition_steps[1] == 7
    assert np.shares_memory(layer.lifecycle_states, states.layout.lifecycle_states)


def test_columns_cannot_be_written(layer: LayerStateLayout) -> None:
    with pytest.raises(ValueError, match="read-only"):
        layer.alpha_blend[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        layer.lifecycle_states[0] = 3


def test_the_table_forbids_a_jump_and_names_both_states(layer: LayerStateLayout) -> None:
    with pytest.raises(InvalidTransitionError, match="DORMANT to FOSSILIZED"):
        layer.transition(0, State.FOSSILIZED, 1)
    assert layer.state(0) is State.DORMANT


@pytest.mark.parametrize("index", [-1, 4, True, 1.0])
def test_a_seed_outside_the_layer_is_refused(layer: LayerStateLayout, index: int) -> None:
    with pytest.raises(InvalidInputError, match="seed_idx must be 0 to 3 for layer 'layer1'"):
        layer.transition(index, State.LOADING, 0)


def test_alpha_outside_zero_to_one_is_refused(layer: LayerStateLayout) -> None:
    with pytest.raises(InvalidInputError, match="alpha"):
        layer.set_alpha(0, 1.5)
    assert layer.alpha_blend[0] == 0.0


def test_transitions_take_the_models_step_by_default(states: SeedStates, layer: LayerStateLayout) -> None:
    states.step = 41
    layer.transition(0, State.LOADING)
    assert layer.read(0).last_transition_step == 41


def test_listeners_hear_every_transition_until_they_leave(states: SeedStates, layer: LayerStateLayout) -> None:
    heard: list[SeedTransition] = []
    leave = states.subscribe(heard.append)
    layer.transition(3, State.LOADING, 5)
    leave()
    layer.transition(3, State.ERROR, 6)
    (only,) = heard
    assert (only.layer, only.seed_index, only.from_state, only.to_state, only.step, only.alpha) == (
        "layer1",
        3,
        State.DORMANT,
        State.LOADING,
        5,
        0.0,
    )


def test_silenced_states_tell_nobody(states: SeedStates, layer: LayerStateLayout) -> None:
    heard: list[SeedTransition] = []
    states.subscribe(heard.append)
    with states.silenced():
        layer.transition(0, State.LOADING, 5)
    layer.transition(0, State.ERROR, 5)
    assert [event.to_state for event in heard] == [State.ERROR]


def test_a_forbidden_transition_is_not_announced(states: SeedStates, layer: LayerStateLayout) -> None:
    heard: list[SeedTransition] = []
    states.subscribe(heard.append)
    with pytest.raises(InvalidTransitionError, match="seed 2"):
        layer.transition(0, State.CULLED, 5)
    assert heard == []


class _Veto:
    """An owner that allows nothing."""

    def __init__(self) -> None:
        self.told: list[State] = []

    def _before_transition(self, seed_idx: int, to: State) -> None:
        raise RuntimeError(f"no {to.name}")

    def _after_transition(self, seed_idx: int, to: State) -> None:
        self.told.append(to)


def test_an_owner_may_refuse_a_step_before_it_is_taken(layer: LayerStateLayout) -> None:
    owner = _Veto()
    layer.attach_owner(owner)
    with pytest.raises(RuntimeError, match="no LOADING"):
        layer.transition(0, State.LOADING, 1)
    assert layer.state(0) is State.DORMANT
    assert owner.told == []


def test_counts_by_state_name_every_state(states: SeedStates, layer: LayerStateLayout) -> None:
    layer.transition(0, State.LOADING, 1)
    assert states.counts_by_state()[State.DORMANT] == 5
    assert layer.counts_by_state()[State.LOADING] == 1
    assert layer.counts_by_state()[State.FOSSILIZED] == 0


def test_a_snapshot_restores_states_and_shares(states: SeedStates, layer: LayerStateLayout) -> None:
    layer.transition(0, State.LOADING, 3)
    layer.set_alpha(0, 0.25)
    kept = states.snapshot()
    layer.transition(0, State.ERROR, 4)
    states.restore(kept)
    assert layer.state(0) is State.LOADING
    assert layer.alpha_blend[0] == np.float32(0.25)


def test_a_copy_has_a_layout_of_its_own_and_no_listeners(states: SeedStates, layer: LayerStateLayout) -> None:
    heard: list[SeedTransition] = []
    states.subscribe(heard.append)
    states.step = 9
    layer.transition(0, State.LOADING)
    twin_states, twin = copy.deepcopy((states, layer))
    assert twin.states is twin_states
    assert twin_states.step == 9
    twin.transition(0, State.ERROR)
    assert twin.state(0) is State.ERROR
    assert layer.state(0) is State.LOADING
    assert len(heard) == 1
