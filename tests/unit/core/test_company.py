"""Where nobody of a race visibly helps alone, its rivals take turns in company: one in a layer, within the budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import esper
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.errors import BudgetExceededError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, Contribution
from esper.core import race
from esper.core.adaptation import Adaptation
from esper.core.budget import Budget, BudgetLedger
from esper.core.evaluation import is_hopeless, is_last_look, is_trifle
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.overrides import SeedRef
from tests.unit.core.test_session import train

RACE = "a" + "f" * 32
DEAF = esper.GrowthConfig(
    incubation_epochs=2, race_rounds=1, graft_epochs=1, incubation_learning_rate=1e-9, cull_epochs=0
)
"""Seeds learn next to nothing alone, so no race of theirs tells anything."""
FIELD = (("lora", "0", 0, 0.01), ("gated_mlp", "0", 1, 0.05), ("norm_shift", "2", 0, 0.02))
"""Template, layer, seed, and what the policy expects of it."""


@pytest.fixture
def race_of(large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any) -> Any:
    """Hold a race that tells nothing up to its last round; gives the session and its adaptations by blueprint."""

    def hold(field: Any = FIELD, epochs: int = 2, **changes: Any) -> tuple[Any, dict[str, Adaptation]]:
        model = esper.wrap(large_task.host())
        session = open_session(model, control=large_task.control, **({"growth": DEAF} | changes))
        decisions = [
            decide(model, layer, name, seed_index=seed, race_id=RACE, race_size=len(field), expected_reward=expected)
            for name, layer, seed, expected in field
        ]
        line.incoming += decisions
        line.incoming += [kernel_for(decision) for decision in decisions]
        train(session, large_task, epochs)
        known = session.orchestrator.adaptations
        return session, {name: known[one.adaptation_id] for (name, *_), one in zip(field, decisions, strict=True)}

    return hold


def states(rivals: dict[str, Adaptation]) -> dict[str, State | None]:
    return {name: one.state for name, one in rivals.items()}


def test_what_promises_most_is_blended_in_together_one_in_a_layer_and_the_rest_waits(
    race_of: Any, large_task: Any
) -> None:
    session, rivals = race_of()
    expected = {"lora": State.ACTIVE, "gated_mlp": State.EVALUATING, "norm_shift": State.EVALUATING}
    assert states(rivals) == expected
    learnt = rivals["lora"].isolated_steps
    train(session, large_task, 1)
    assert rivals["lora"].isolated_steps == learnt, "who waits learns nothing"
    assert rivals["gated_mlp"].graft_steps == rivals["norm_shift"].graft_steps > 0


def test_who_waits_has_its_turn_when_the_others_have_had_theirs(race_of: Any, large_task: Any) -> None:
    session, rivals = race_of()
    rivals["gated_mlp"].price, rivals["norm_shift"].price = -1e6, 1e6
    train(session, large_task, 1)
    assert rivals["gated_mlp"].outcome is AdaptationOutcome.KEPT
    assert rivals["norm_shift"].outcome is AdaptationOutcome.CULLED
    assert rivals["lora"].state is State.EVALUATING, "beside the one that was kept, without another round"


def test_one_that_is_kept_leaves_the_others_of_its_company_blended_in(race_of: Any, large_task: Any) -> None:
    session, rivals = race_of()
    rivals["gated_mlp"].price = -1e6
    rivals["norm_shift"].price = 1e-9
    train(session, large_task, 1)
    assert rivals["gated_mlp"].outcome is AdaptationOutcome.KEPT
    assert rivals["norm_shift"].graft_steps > 0
    assert rivals["norm_shift"].state in (State.EVALUATING, State.FOSSILIZED, State.EMBARGOED)
    assert "lost its race" not in rivals["norm_shift"].reason


def test_those_of_a_company_are_measured_in_the_same_passes(
    race_of: Any, large_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, rivals = race_of(growth=replace(DEAF, max_looks=9))
    looks: list[list[dict[SeedRef, float]]] = []
    effects: dict[SeedRef, float] = {}

    def noting(model: Any, batches: Any, loss: Any, configurations: Any) -> Any:
        found = evaluate_configurations(model, batches, loss, configurations)
        looks.append([dict(one) for one in configurations])
        for number, ref in enumerate(configurations[0], start=1):
            alone = evaluate_configurations(model, batches, loss, [configurations[number], configurations[0]])
            effects[ref] = float((alone[0] - alone[1]).mean())
        return found

    monkeypatch.setattr("esper.core.looks.evaluate_configurations", noting)
    train(session, large_task, 1)
    one, two = SeedRef("0", 1), SeedRef("2", 0)
    assert looks == [[{one: 1.0, two: 1.0}, {one: 0.0, two: 1.0}, {one: 1.0, two: 0.0}]], "three passes, not four"
    for name, ref in (("gated_mlp", one), ("norm_shift", two)):
        assert rivals[name].looks == 1
        assert rivals[name].contribution.estimate == pytest.approx(effects[ref], abs=1e-9)
    session.finish()
    assert len(looks) == 1, "what was looked at as the epoch ended is not measured again"


@pytest.mark.parametrize("asked_first", ["the failing", "the sound"])
def test_when_a_kernel_fails_while_it_is_measured_the_others_are_measured_without_it(
    race_of: Any, large_task: Any, monkeypatch: pytest.MonkeyPatch, asked_first: str
) -> None:
    session, rivals = race_of(growth=replace(DEAF, max_looks=9))
    train(session, large_task, 1)
    sound, failing = rivals["gated_mlp"], rivals["norm_shift"]
    kernel = session._context.model.kasmina_layers["2"].find_seed(0).kernel
    whole, calls = kernel.forward, iter((True,))
    monkeypatch.setattr(kernel, "forward", lambda *given: whole(*given) if next(calls, False) else 1 / 0)
    looks = session.orchestrator._looks
    if asked_first == "the failing":
        looks.effect(failing, [sound], level=0.95)
    effect = looks.effect(sound, [failing] if asked_first == "the sound" else [], level=0.95)
    assert failing.state is State.ERROR
    ref, context = SeedRef("0", 1), session._context
    with session.orchestrator._mean.applied():
        on, off = evaluate_configurations(
            context.model, context.control.batches, context.loss_rows, [{ref: 1.0}, {ref: 0.0}]
        )
    assert effect.estimate == pytest.approx(float((off - on).mean()), abs=1e-12)


def test_no_more_are_blended_in_at_once_than_the_budget_holds(race_of: Any) -> None:
    session, rivals = race_of(budget=esper.Budget(added_params=88))
    assert [one.cost.parameters for one in rivals.values()] == [72, 86, 4]
    blended = [one for one in rivals.values() if one.state is State.EVALUATING]
    assert [one.label for one in blended] == ["gated_mlp at 0"]
    assert session._context.ledger.status().added_parameters == 86


def test_a_turn_that_could_not_be_judged_any_more_is_not_taken(race_of: Any) -> None:
    _, rivals = race_of(planned_epochs=3)
    assert {one.outcome for one in rivals.values()} == {AdaptationOutcome.CULLED}
    assert "1 epochs before the run ends" in rivals["lora"].reason


def test_whose_turn_comes_is_remembered_in_a_snapshot(race_of: Any, large_task: Any) -> None:
    session, rivals = race_of()
    waiting = session.orchestrator.adaptations[rivals["lora"].id]
    assert waiting.awaits_turn
    again = Adaptation.from_plain(waiting.to_plain(), 0.0)
    assert again.awaits_turn
    older = {name: value for name, value in waiting.to_plain().items() if name != "awaits_turn"}
    assert not Adaptation.from_plain(older, 0.0).awaits_turn
    booked = session._context.ledger.status()
    session._memory.roll_back("a test")
    assert session._context.ledger.status() == booked


def test_a_race_that_tells_nothing_yet_learns_on_alone_till_its_last_round(race_of: Any) -> None:
    growth = replace(DEAF, incubation_epochs=4, race_rounds=2)
    _, patient = race_of(growth=growth)
    assert set(states(patient).values()) == {State.ACTIVE}, "who does neither good nor harm learns on"


@pytest.mark.parametrize("do_harm", [True, False])
def test_where_most_do_harm_after_an_epoch_all_take_turns_at_once(
    race_of: Any, monkeypatch: pytest.MonkeyPatch, do_harm: bool
) -> None:
    monkeypatch.setattr(race, "mostly_harm", lambda _: do_harm)
    growth = replace(DEAF, incubation_epochs=6, race_rounds=2)
    _, rivals = race_of(growth=growth, epochs=1)
    blended = {name for name, one in rivals.items() if one.state is State.EVALUATING}
    assert blended == ({"gated_mlp", "norm_shift"} if do_harm else set())


def test_nobody_goes_after_one_epoch_of_a_longer_race(race_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    helps = Contribution(estimate=1.0, low=0.5, high=1.5, num_examples=9)
    idle = Contribution(estimate=0.0, low=-0.5, high=0.5, num_examples=9)

    def telling(rivals: Any, *_: Any, **__: Any) -> list[race.Standing]:
        first, *rest = sorted(rivals, key=lambda one: -one.cost.parameters)
        beaten = [race.Standing(adaptation=one, effect=idle, price=0.0, behind=helps) for one in rest]
        return [race.Standing(adaptation=first, effect=helps, price=0.0, behind=None), *beaten]

    monkeypatch.setattr(race, "standings", telling)
    growth = replace(DEAF, incubation_epochs=4, race_rounds=2)
    _, rivals = race_of(growth=growth, epochs=1)
    assert set(states(rivals).values()) == {State.ACTIVE}
    _, halved = race_of(growth=growth, epochs=2)
    assert AdaptationOutcome.CULLED in {one.outcome for one in halved.values()}


def test_most_rivals_do_harm_where_more_than_half_do_beyond_doubt(decide: Any, large_task: Any) -> None:
    one = Adaptation(decision=decide(esper.wrap(large_task.host())))

    def harm(*highs: float) -> bool:
        effects = [Contribution(estimate=high - 1, low=high - 2, high=high, num_examples=9) for high in highs]
        return race.mostly_harm([race.Standing(adaptation=one, effect=two, price=0.0, behind=None) for two in effects])

    assert harm(-0.1, -0.1, 0.1)
    assert not harm(-0.1, 0.1), "no more than half"


def test_three_of_a_race_have_a_turn_in_a_layer(race_of: Any, large_task: Any) -> None:
    names = ("lora", "gated_mlp", "glu", "norm_shift")
    session, rivals = race_of(tuple((name, "0", place, 0.04 - 0.01 * place) for place, name in enumerate(names)))
    for one in rivals.values():
        one.price = 1e6
    train(session, large_task, 3)
    assert all(rivals[name].graft_steps > 0 for name in names[:3])
    assert rivals["norm_shift"].graft_steps == 0
    assert rivals["norm_shift"].reason == "3 of its race have had their turn where it stands"


@pytest.mark.parametrize(
    ("estimate", "low", "looks", "last"),
    [(0.2, 0.1, 5, False), (0.2, 0.1, 10, True), (0.2, -0.1, 5, True), (0.05, 0.01, 5, True), (0.2, 0.1, 4, False)],
)
def test_one_that_promises_to_pay_is_looked_at_twice_as_often(
    estimate: float, low: float, looks: int, last: bool
) -> None:
    effect = Contribution(estimate=estimate, low=low, high=1.0, num_examples=9)
    assert is_last_look(effect, 0.1, looks, max_looks=5) is last


def test_a_trifle_is_told_by_its_upper_end() -> None:
    def effect(high: float) -> Contribution:
        return Contribution(estimate=0.001, low=-0.1, high=high, num_examples=9)

    assert is_trifle(effect(0.009), control_loss=2.0)
    assert not is_trifle(effect(0.011), control_loss=2.0)


def test_a_race_tells_something_where_one_helps_by_more_than_a_trifle(decide: Any, large_task: Any) -> None:
    model = esper.wrap(large_task.host())
    one = Adaptation(decision=decide(model))

    def tells(estimate: float, low: float) -> bool:
        effect = Contribution(estimate=estimate, low=low, high=2 * estimate, num_examples=9)
        found = [race.Standing(adaptation=one, effect=effect, price=0.0, behind=None)]
        return race.helps_by(0.1, found)

    assert tells(0.11, 0.05)
    assert not tells(0.09, 0.05), "no more than a trifle"
    assert not tells(0.11, -0.01), "not beyond doubt"


def test_the_ledger_adds_up_what_is_blended_in_at_once() -> None:
    cost = {size: BlueprintCost(parameters=size, flops=size, activation_bytes=0) for size in (30, 40, 60)}
    ledger = BudgetLedger(Budget(added_params=100), host_parameters=100, host_flops=None)
    for name, size in (("a", 60), ("b", 30), ("c", 40)):
        ledger.book(name, cost[size], "race")
    assert ledger.status().added_parameters == 60
    assert ledger.fit_together("ab")
    ledger.blend("ab")
    assert not ledger.fit_together("c"), "60 + 30 leave no room for 40"
    with pytest.raises(BudgetExceededError, match="budget must hold 1 rivals at once"):
        ledger.blend("c")
    assert ledger.status().added_parameters == 90
    again = BudgetLedger(Budget(added_params=100), host_parameters=100, host_flops=None)
    again.load_state_dict(ledger.state_dict(), dict.fromkeys("abc", "race"))
    assert again.status() == ledger.status()
    assert ledger.keep("b") == {}, "c fits beside b once a has gone"
    assert ledger.status().added_parameters == 90
    ledger.release("a")
    assert ledger.status().added_parameters == 70
    assert ledger.keep("c") == {}


@pytest.mark.parametrize(
    ("estimate", "high", "looks_left", "hopeless"),
    [(0.01, 0.03, 2, True), (0.01, 0.04, 2, False), (0.01, 0.04, 1, True), (-0.01, 0.5, 2, True)],
)
def test_an_effect_that_cannot_reach_its_price_is_hopeless(
    estimate: float, high: float, looks_left: int, hopeless: bool
) -> None:
    effect = Contribution(estimate=estimate, low=estimate - 0.1, high=high, num_examples=9)
    assert is_hopeless(effect, 0.1, looks_left) is hopeless


def test_the_company_is_that_from_which_most_is_expected_together(decide: Any, large_task: Any) -> None:
    model = esper.wrap(large_task.host())

    def made(layer: str, expected: float, effect: float) -> Adaptation:
        one = Adaptation(decision=replace(decide(model, layer), expected_reward=expected))
        one.contribution = Contribution(estimate=effect, low=effect - 1, high=effect + 1, num_examples=9)
        return one

    def fits_all(some: Any) -> bool:
        return bool(some)

    poor, better, best = made("0", 0.1, 0.0), made("0", 0.1, -0.5), made("2", 0.2, 0.1)
    assert race.company([poor, better, best], [], fits_all) == [best, better]
    assert race.company([poor, better, best], [], lambda some: better not in some) == [best, poor]
    assert race.company([poor, better, best], [best], fits_all) == [better]
    large = made("2", 0.25, 0.0)
    assert race.company([large, poor, best], [], lambda some: large not in some or len(some) == 1) == [best, poor]
    assert race.company([large], [], fits_all) == [large]
    assert race.company([large], [], lambda some: not some) == []


def test_of_those_that_are_level_the_largest_is_grafted(decide: Any, large_task: Any) -> None:
    model = esper.wrap(large_task.host())

    def stands(size: int, *, low: float = 0.1, price: float = 0.0, behind: float | None = -0.1) -> race.Standing:
        one = Adaptation(decision=decide(model), cost=BlueprintCost(parameters=size, flops=1, activation_bytes=0))
        effect = Contribution(estimate=0.2, low=low, high=0.3, num_examples=9)
        last = None if behind is None else Contribution(estimate=0.1, low=behind, high=0.3, num_examples=9)
        return race.Standing(adaptation=one, effect=effect, price=price, behind=last)

    best, larger = stands(10, behind=None), stands(20)
    assert race.winner([best, larger]) is larger
    assert race.winner([best, stands(20, behind=0.01)]) is best, "beaten beyond doubt"
    assert race.winner([best, stands(20, price=0.25)]) is best, "not worth its price"
    assert race.winner([best, stands(20, low=-0.1)]) is best, "may do harm"
    assert race.winner([stands(10, low=-0.1, behind=None)]).size == 10


def test_an_early_round_culls_none_that_is_larger_than_the_leader(decide: Any, large_task: Any) -> None:
    model = esper.wrap(large_task.host())

    def stands(size: int, estimate: float) -> race.Standing:
        one = Adaptation(decision=decide(model), cost=BlueprintCost(parameters=size, flops=1, activation_bytes=0))
        effect = Contribution(estimate=estimate, low=estimate - 0.2, high=estimate + 0.2, num_examples=9)
        return race.Standing(adaptation=one, effect=effect, price=0.0, behind=None)

    leader, second, small, large = stands(10, 0.3), stands(9, 0.1), stands(8, 0.0), stands(20, -0.1)
    assert race.losers([leader, second, small, large], last=False) == [small]
