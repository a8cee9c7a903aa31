"""A race: seeds learn alone side by side, the better ones go on, one is grafted, and no budget is exceeded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.errors import BudgetExceededError, InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome
from esper.core import race
from esper.core.adaptation import Adaptation
from esper.core.budget import Budget, BudgetLedger
from esper.telemetry.subjects import Kind
from tests.unit.core.test_session import state_of, train

GROWTH = esper.GrowthConfig(
    incubation_epochs=4, race_rounds=2, graft_epochs=1, incubation_learning_rate=1e-2, recheck_epochs=0, cull_epochs=0
)
RACE = "a" + "f" * 32


@pytest.fixture
def enter(line: Any, decide: Any, kernel_for: Any) -> Any:
    """Send rivals of one race, (template, layer, seed) each, with their kernels; give their decisions."""

    def send(model: Any, *rivals: tuple[str, str, int]) -> list[Any]:
        decisions = [
            decide(model, layer, template, seed_index=seed, race_id=RACE, race_size=len(rivals))
            for template, layer, seed in rivals
        ]
        line.incoming += decisions
        line.incoming += [kernel_for(decision) for decision in decisions]
        return decisions

    return send


def rival(model: Any, decide: Any, name: str) -> Adaptation:
    return Adaptation(decision=decide(model, adaptation_id=name))


def under_way(session: Any) -> list[str]:
    return [item.label for item in session.orchestrator.ongoing()]


FIELD = (("norm_shift", "0", 0), ("gated_mlp", "0", 1), ("lora", "0", 2), ("norm_shift", "2", 0))


def test_the_better_half_goes_on_and_the_best_is_grafted(
    large_task: Any, line: Any, open_session: Any, enter: Any
) -> None:
    model = esper.wrap(large_task.host())
    session = open_session(model, control=large_task.control, growth=GROWTH)
    decisions = enter(model, *FIELD)
    session.step(_loss(model, large_task))
    assert len(under_way(session)) == 4
    assert {state_of(session, layer, seed) for _, layer, seed in FIELD} == {State.ACTIVE}
    train(session, large_task, 1)
    assert len(under_way(session)) == 4, "no round has ended yet"
    train(session, large_task, 1)
    still = session.orchestrator.ongoing()
    assert all(item.contribution is not None for item in still)
    assert len([item for item in still if item.contribution.low <= 0.0]) <= 2
    assert len(still) < 4
    train(session, large_task, 2)
    winner, *waiting = sorted(session.orchestrator.ongoing(), key=lambda item: item.state is not State.EVALUATING)
    assert winner.state is State.EVALUATING
    assert all(item.state is State.ACTIVE and item.contribution.estimate > item.price for item in waiting)
    reports = line.values(Kind.FIELD_REPORT)
    assert len(reports) == 3 - len(waiting)
    for report in reports:
        assert report.race_id == RACE
        assert report.outcome is AdaptationOutcome.CULLED
        assert report.contribution is not None, "what was learnt of a loser is told"
        assert report.graft_steps == 0
        assert report.reason.startswith("lost its race: brings ")
    gone = {report.adaptation_id for report in reports}
    assert gone == {one.adaptation_id for one in decisions} - {winner.id, *(item.id for item in waiting)}


@pytest.fixture
def one_waits(large_task: Any, open_session: Any, enter: Any) -> Any:
    """A race of two that both help: the better one is blended in, the other waits; gives session and both."""
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    growth = replace(GROWTH, price_per_host_share=0.0, incubation_way="local")
    session = open_session(model, control=large_task.control, growth=growth)
    enter(model, ("bottleneck_adapter", "0", 0), ("gated_mlp", "0", 1))
    train(session, large_task, 4)
    found = {item.state: item for item in session.orchestrator.ongoing()}
    return session, found[State.EVALUATING], found[State.ACTIVE]


def test_one_that_helps_waits_without_learning_on_while_a_better_one_is_blended_in(
    large_task: Any, one_waits: Any
) -> None:
    session, _, waiting = one_waits
    learnt = waiting.isolated_steps
    layer = session._context.model.kasmina_layers[waiting.layer]
    before = [one.detach().clone() for one in layer.seed_parameters(waiting.seed_index)]
    session.step(_loss(session._context.model, large_task))
    assert waiting.isolated_steps == learnt
    after = layer.seed_parameters(waiting.seed_index)
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


def test_the_runner_up_is_grafted_where_the_winner_is_not_kept(large_task: Any, one_waits: Any) -> None:
    session, winner, waiting = one_waits
    winner.price = 1e6
    train(session, large_task, 1 + session._context.growth.max_looks)
    assert winner.outcome is AdaptationOutcome.CULLED
    train(session, large_task, 2)
    assert waiting.graft_steps > 0
    assert waiting.outcome is AdaptationOutcome.KEPT


def test_the_runner_up_goes_where_the_winner_is_kept_and_it_adds_nothing(
    large_task: Any, line: Any, one_waits: Any
) -> None:
    session, winner, waiting = one_waits
    winner.price, waiting.price = -1e6, 1e6
    train(session, large_task, 2)
    assert winner.outcome is AdaptationOutcome.KEPT
    assert waiting.outcome is AdaptationOutcome.CULLED
    assert waiting.graft_steps == 0
    assert waiting.reason.startswith("beside the one that was kept it brings -")
    assert session.orchestrator.ongoing() == []
    assert [one.adaptation_id for one in line.values(Kind.FIELD_REPORT)] == [winner.id, waiting.id]


def test_the_runner_up_is_grafted_beside_the_winner_where_it_still_helps(large_task: Any, one_waits: Any) -> None:
    session, winner, waiting = one_waits
    winner.price, waiting.price = -1e6, -1e6
    train(session, large_task, 1)
    assert winner.outcome is AdaptationOutcome.KEPT
    assert waiting.state is State.EVALUATING
    train(session, large_task, 2)
    assert waiting.outcome is AdaptationOutcome.KEPT
    ledger = session._context.ledger
    both = winner.cost.parameters + waiting.cost.parameters
    assert ledger.status().added_parameters == both
    state = session.orchestrator.state_dict()
    session.orchestrator.forget()
    session.orchestrator.load_state_dict(state)
    assert ledger.status().added_parameters == both, "a checkpoint books them apart as well"


def test_what_the_budget_has_no_room_for_beside_the_winner_goes(large_task: Any, open_session: Any, enter: Any) -> None:
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    growth = replace(GROWTH, price_per_host_share=0.0)
    session = open_session(model, control=large_task.control, growth=growth, budget=esper.Budget(added_params=100))
    enter(model, ("bottleneck_adapter", "0", 0), ("gated_mlp", "0", 1))
    train(session, large_task, 4)
    found = {item.state: item for item in session.orchestrator.ongoing()}
    winner, waiting = found[State.EVALUATING], found[State.ACTIVE]
    assert winner.cost.parameters + waiting.cost.parameters > 100
    winner.price = -1e6
    train(session, large_task, 2)
    assert winner.outcome is AdaptationOutcome.KEPT
    assert waiting.outcome is AdaptationOutcome.CULLED
    assert "lost its race to" in waiting.reason
    assert (
        f"{waiting.cost.parameters} parameters do not fit: {winner.cost.parameters} of 100 are used" in waiting.reason
    )
    assert session._context.ledger.status().added_parameters == winner.cost.parameters


def test_a_run_that_ends_while_one_waits_ends_both_once(line: Any, one_waits: Any) -> None:
    session, winner, waiting = one_waits
    session.finish()
    assert not winner.open
    assert waiting.outcome is AdaptationOutcome.CULLED
    ended = [one.adaptation_id for one in line.values(Kind.FIELD_REPORT)]
    assert sorted(ended) == sorted([winner.id, waiting.id])


def test_the_best_by_effect_and_price_wins(large_task: Any, line: Any, open_session: Any, enter: Any) -> None:
    """On a task of absolute values a seed with a nonlinearity beats scales and shifts."""
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    session = open_session(model, control=large_task.control, growth=GROWTH)
    enter(model, ("norm_shift", "0", 0), ("gated_mlp", "0", 1))
    train(session, large_task, 4)
    (winner,) = session.orchestrator.ongoing()
    assert winner.label == "gated_mlp at 0"


def test_while_they_race_the_host_is_untouched_to_the_bit(task: Any, line: Any, open_session: Any, enter: Any) -> None:
    alone, grown = esper.wrap(task.host()), esper.wrap(task.host())
    stream = torch.get_rng_state()
    train(open_session(alone), task, 3)
    torch.set_rng_state(stream)
    session = open_session(grown, growth=replace(GROWTH, incubation_epochs=6))
    enter(grown, *FIELD)
    train(session, task, 3)
    host = {key: value for key, value in grown.state_dict().items() if "seeds" not in key}
    assert all(torch.equal(value, host[key]) for key, value in alone.state_dict().items())


def test_a_race_takes_what_its_largest_rival_costs(task: Any, line: Any, open_session: Any, enter: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=GROWTH)
    enter(model, ("gated_mlp", "0", 0), ("gated_mlp", "0", 1), ("norm_shift", "2", 0))
    train(session, task, 1)
    costs = [item.cost.parameters for item in session.orchestrator.ongoing()]
    assert len(costs) == 3
    assert session._context.ledger.status().added_parameters == max(costs)


def test_a_second_race_keeps_out_of_the_first_ones_layers(
    task: Any, line: Any, open_session: Any, enter: Any, decide: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=GROWTH)
    enter(model, ("lora", "0", 0), ("norm_shift", "0", 1))
    stranger = decide(model, "0", "lora", seed_index=3)
    line.incoming.append(stranger)
    session.step(_loss(model, task))
    assert len(under_way(session)) == 2
    assert "has an adaptation under way" in line.values(Kind.PLAN)[-1].reason


def test_rivals_without_a_kernel_leave_the_race_and_the_rest_goes_on(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=GROWTH)
    race_of = {"race_id": RACE, "race_size": 2}
    lost, stays = decide(model, "0", "lora", **race_of), decide(model, "2", "lora", **race_of)
    arrival = kernel_for(lost)
    line.incoming += [lost, stays, replace(arrival, kernel=None, error="no compiler"), kernel_for(stays)]
    train(session, task, 5)
    assert session.orchestrator.adaptations[lost.adaptation_id].outcome is AdaptationOutcome.FAILED
    assert session.orchestrator.adaptations[stays.adaptation_id].contribution is not None


def test_a_race_goes_on_from_its_snapshot(large_task: Any, line: Any, open_session: Any, enter: Any) -> None:
    model = esper.wrap(large_task.host())
    session = open_session(model, control=large_task.control, growth=replace(GROWTH, incubation_epochs=8))
    enter(model, *FIELD)
    train(session, large_task, 2)
    booked = session._context.ledger.status()
    session._memory.roll_back("a test")
    assert session._context.ledger.status() == booked
    assert len(under_way(session)) == 4
    train(session, large_task, 3)
    assert len(under_way(session)) <= 2


def test_a_price_counts_in_the_last_round_alone(large_task: Any, line: Any, open_session: Any, enter: Any) -> None:
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    session = open_session(model, control=large_task.control, growth=GROWTH)
    cheap, best = enter(model, ("norm_shift", "0", 0), ("gated_mlp", "0", 1))
    session.step(_loss(model, large_task))
    train(session, large_task, 1)
    session.orchestrator.adaptations[best.adaptation_id].price = 1e6
    rivals = session.orchestrator.ongoing()
    early = race.run_round(session._context, rivals, last=False)
    assert early.stay[0].id == best.adaptation_id, "what it costs does not end it while it learns"
    late = race.run_round(session._context, rivals, last=True)
    [(lost, check)] = late.gone
    assert ([one.id for one in late.stay], lost.id) == ([cheap.adaptation_id], best.adaptation_id)
    assert "prices of 1000000.0000" in check.detail


def test_a_packet_is_answered_once_the_whole_race_is_there(task: Any, open_session: Any, decide: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model)
    rivals = [decide(model, state_sequence=7, race_id=RACE, race_size=3) for _ in range(3)]
    for one in (rivals[0], rivals[0], rivals[1]):
        session._note_answer(one)
    assert session._answered == 0, "one that comes twice counts once"
    session._note_answer(rivals[2])
    assert session._answered == 7
    session._note_answer(decide(model, state_sequence=8))
    assert session._answered == 8, "one that stands alone answers at once"


def test_standings_are_paired_and_prices_count_where_they_are_given(task: Any, decide: Any) -> None:
    model = esper.wrap(task.host())
    rivals = [rival(model, decide, name) for name in ("a1", "a2", "a3")]
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    effects = torch.stack([noise + 0.30, noise + 0.60, noise + 0.29 + 0.001 * noise])
    early = race.standings(rivals, effects, [0.0, 0.0, 0.0], level=0.95, rounds=2)
    assert [one.adaptation.id for one in early] == ["a2", "a1", "a3"]
    found = race.standings(rivals, effects, [0.0, 0.5, 0.0], level=0.95, rounds=2)
    assert [one.adaptation.id for one in found] == ["a1", "a3", "a2"]
    assert found[0].behind is None
    assert found[0].net == pytest.approx(float(effects[0].mean()))
    assert found[1].is_beaten, "noise common to both is taken out"
    assert found[2].is_beaten
    assert found[2].behind is not None
    assert found[2].behind.confidence_level == pytest.approx(1 - 0.05 / 4)
    assert race.losers(found, last=False) == [], "all of them help, so all go on"
    assert race.losers(found, last=True) == [], "those that help by more than their price wait"
    dear = race.standings(rivals, effects, [0.0, 0.7, 0.0], level=0.95, rounds=2)
    assert [one.adaptation.id for one in race.losers(dear, last=True)] == ["a2"]
    idle = race.standings(rivals, effects - 0.45, [0.0, 0.0, 0.0], level=0.95, rounds=2)
    assert race.losers(idle, last=False) == idle[1:], "beaten, and of no help"


def test_rivals_that_cannot_be_told_apart_are_halved_and_then_one_is_left(task: Any, decide: Any) -> None:
    model = esper.wrap(task.host())
    rivals = [rival(model, decide, f"a{place}") for place in range(4)]
    effects = torch.randn(4, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = race.standings(rivals, effects, [0.0] * 4, level=0.95, rounds=2)
    assert race.losers(found, last=False) == found[2:]
    useless = race.standings(rivals, effects - 1.0, [0.0] * 4, level=0.95, rounds=2)
    assert race.losers(useless, last=True) == useless[1:]


@pytest.mark.parametrize(
    ("epochs", "rounds", "ends"), [(2, 2, (1, 2)), (5, 2, (3, 5)), (1, 3, (1,)), (6, 3, (2, 4, 6)), (3, 1, (3,))]
)
def test_rounds_end_evenly_and_never_twice(epochs: int, rounds: int, ends: tuple[int, ...]) -> None:
    assert race.round_ends(epochs, rounds) == ends


def test_a_race_needs_a_round() -> None:
    with pytest.raises(InvalidInputError, match=r"growth\.race_rounds must be at least 1, got 0"):
        esper.GrowthConfig(race_rounds=0)


def test_the_ledger_books_a_group_at_its_largest(decide: Any) -> None:
    cost = {name: esper_cost(name) for name in (30, 50, 60)}
    ledger = BudgetLedger(Budget(added_params=100), host_parameters=100, host_flops=None)
    ledger.book("a1", cost[30], "race")
    ledger.book("a2", cost[50], "race")
    assert ledger.status().added_parameters == 50
    with pytest.raises(BudgetExceededError, match="60 parameters do not fit: 50 of 100 are used"):
        ledger.book("a3", cost[60])
    ledger.book("a3", cost[60], "race")
    ledger.release("a3")
    ledger.release("a2")
    assert ledger.status().added_parameters == 30
    assert ledger.status().adaptations == 3


def esper_cost(parameters: int) -> BlueprintCost:
    return BlueprintCost(parameters=parameters, flops=parameters, activation_bytes=0)


def _loss(model: Any, task: Any) -> torch.Tensor:
    x, y = next(iter(task.train))
    loss = nn.CrossEntropyLoss()(model(x), y)
    loss.backward()
    return loss


def test_whoever_comes_when_the_race_has_its_winner_comes_too_late(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    session = open_session(model, control=large_task.control, growth=GROWTH)
    race_of = {"race_id": RACE, "race_size": 3}
    first = decide(model, "0", "gated_mlp", seed_index=0, **race_of)
    line.incoming += [first, kernel_for(first)]
    train(session, large_task, GROWTH.incubation_epochs)
    winner = session.orchestrator.adaptations[first.adaptation_id]
    assert winner.state is State.EVALUATING
    late = decide(model, "0", "lora", seed_index=1, **race_of)
    line.incoming += [kernel_for(late), late]
    session.step(_loss(model, large_task))
    assert late.adaptation_id not in session.orchestrator.adaptations
    assert "its race has gone on without it" in line.values(Kind.PLAN)[-1].reason
    assert not session.orchestrator._shelf.early, "the kernel of a refused one is let go"
    line.incoming.append(kernel_for(late))
    session.step(_loss(model, large_task))
    assert not session.orchestrator._shelf.early
    winner.price = -1e6
    train(session, large_task, 2)
    assert winner.outcome is AdaptationOutcome.KEPT
    later = decide(model, "2" if "2" in model.kasmina_layers else "1", "lora", **race_of)
    line.incoming.append(later)
    session.step(_loss(model, large_task))
    assert later.adaptation_id not in session.orchestrator.adaptations


def test_a_rival_whose_kernel_never_came_goes_where_the_winner_is_kept(
    large_task: Any, line: Any, open_session: Any, decide: Any, one_waits: Any
) -> None:
    session, winner, waiting = one_waits
    model = session._context.model
    layer = model.kasmina_layers[waiting.layer]
    assert winner.state is State.EVALUATING
    # As it stands where the decision came in just before the winner's turn: it still waits for its kernel.
    loading = decide(model, "1", "lora", seed_index=2, race_id=RACE, race_size=3)
    winner.state = State.ACTIVE
    session.orchestrator.decide(loading)
    winner.state = State.EVALUATING
    assert session.orchestrator.adaptations[loading.adaptation_id].state is State.LOADING
    winner.price = -1e6
    train(session, large_task, 2)
    assert winner.outcome is AdaptationOutcome.KEPT
    assert session.orchestrator.adaptations[loading.adaptation_id].outcome is AdaptationOutcome.CULLED
    assert layer.state_layout.state(waiting.seed_index) is State.EVALUATING, "the other one goes on"


def test_the_one_that_waits_learns_nothing_wherever_it_stands_in_line(large_task: Any, one_waits: Any) -> None:
    session, winner, waiting = one_waits
    orchestrator = session.orchestrator
    orchestrator.adaptations = {waiting.id: waiting, winner.id: winner}
    winner.price, learnt = 1e6, waiting.isolated_steps
    for _ in range(2 + session._context.growth.max_looks):
        train(session, large_task, 1)
        if not winner.open:
            break
    assert winner.outcome is AdaptationOutcome.CULLED
    assert waiting.state is State.EVALUATING, "its turn comes in the same breath"
    assert waiting.isolated_steps == learnt
