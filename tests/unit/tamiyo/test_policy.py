"""The policy: what it decides for each shape of run, within which bounds, and that it decides the same again."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from esper.blueprints.cost import cost
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.decision import (
    BUDGET_TOO_SMALL,
    AdaptationPlan,
    AdaptationType,
    CurveState,
    ParameterChange,
    PlanStatus,
)
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, BudgetStatus, Contribution, RunPhase, SeedStatus
from esper.services.tamiyo.calibration import Asked
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.policy import Policy, adaptation_id
from esper.services.tamiyo.posterior import family_of, observation_of


@pytest.fixture
def candidates(make_candidates):
    return make_candidates()


def decide(policy, packet, candidates):
    """Give the decision on a packet, the first of its race."""
    return policy.analyze(packet, candidates)[0]


def feed(policy, packets, candidates):
    return [decide(policy, packet, candidates) for packet in packets]


def first_growth(decisions):
    return next(one for one in decisions if one.actionable)


def seed_of(index, state, adaptation="", step=0):
    return SeedStatus(seed_index=index, state=state, adaptation_id=adaptation, last_transition_step=step)


def after(packets, sequence, **changes):
    """Give the packet that follows, equal to the last but for what changes."""
    last = packets[-1]
    return replace(last, sequence=sequence, epoch=sequence, step=32 * sequence, **changes)


def test_a_flattening_run_is_grown_a_few_epochs_in(flattening, candidates):
    decisions = feed(Policy(TamiyoConfig(first_race_epochs=99)), flattening, candidates)
    grown = first_growth(decisions)
    assert grown.adaptation_type.grows
    assert grown.curve_state is CurveState.PLATEAU
    assert 6 <= grown.epoch <= 10
    assert grown.layer in ("hidden", "head")
    assert grown.seed_index in range(4)
    assert grown.blueprint is not None
    assert grown.blueprint.id == grown.blueprint_id
    assert Asked.of(grown).raw >= 0.7
    assert 0.9 < grown.confidence < 0.99, "a first race mostly keeps something"
    assert grown.urgency >= 0.6
    assert grown.expected_reward is not None
    assert grown.exploration_bonus is not None
    assert {"cusum", "improvement_per_epoch", "probability_of_reward"} <= {one.name for one in grown.evidence}


def test_a_skip_candidate_is_decided_on_with_its_source(flattening, make_candidates):
    site = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(10,))
    one = next(one for one in make_candidates(["head"]) if one.blueprint.name == "glu")
    skip = replace(one, site=site, cost=cost(one.blueprint.ir, site), source="hidden")
    grown = first_growth(feed(Policy(), flattening, [skip]))
    assert (grown.layer, grown.source, grown.site) == ("head", "hidden", site)
    assert "germinate glu at head on the input of hidden" in grown.explanation


def test_what_skip_seeds_taught_is_kept_apart_from_a_layers_own_place(make_report):
    own, skip = (observation_of(make_report(source=source)) for source in ("", "stem"))
    assert (own.features.reach, skip.features.reach) == ("own", "skip")
    assert own.features.layer != skip.features.layer


def test_an_improving_run_holds_one_race_early_and_is_left_alone(make_packet, candidates):
    packets = [make_packet(place, 2.0 * 0.8**place) for place in range(1, 13)]
    policy = Policy(TamiyoConfig(pending_epochs=1, layer_cooldown_epochs=0))
    rows = [policy.analyze(packet, candidates) for packet in packets]
    (race,) = [row for row in rows if row[0].actionable]
    assert race[0].epoch == 3
    assert len(race) > 1
    assert "still improves: seeds may learn beside it" in race[0].explanation
    assert all(row[0].parameter_change is None for row in rows if row is not race)


def test_an_improving_run_that_grew_elsewhere_is_left_alone(make_packet, make_layer, candidates):
    fossil = seed_of(0, SeedLifecycleState.FOSSILIZED, "a1", 10)
    free = seed_of(1, SeedLifecycleState.DORMANT)
    layers = (make_layer("hidden", seeds=(fossil, free)), make_layer("head"))
    packets = [make_packet(place, 2.0 * 0.8**place, layers=layers) for place in range(1, 10)]
    assert not any(one.actionable for one in feed(Policy(), packets, candidates))


def test_a_first_race_waits_for_its_epochs(make_packet, candidates):
    packets = [make_packet(place, 2.0 * 0.8**place) for place in range(1, 10)]
    grown = first_growth(feed(Policy(TamiyoConfig(first_race_epochs=6)), packets, candidates))
    assert grown.epoch == 6


@pytest.mark.parametrize(("kept", "later"), [((True,), True), ((True, False), False), ((False,), False)])
def test_a_run_that_improves_races_again_after_a_success(make_packet, make_report, candidates, kept, later):
    """What was kept, in turn, before packets that fall as ever; growth rests after what came to nothing."""
    policy = Policy(TamiyoConfig(rest_epochs=0))
    packets = [make_packet(place, 2.0 * 0.9**place) for place in range(1, 9)]
    first = first_growth(feed(policy, packets[:3], candidates))
    for place, is_kept in enumerate(kept):
        outcome = AdaptationOutcome.KEPT if is_kept else AdaptationOutcome.CULLED
        identity = first.adaptation_id if place == 0 else f"a{place:032x}"
        policy.learn(make_report(f"r{place}", adaptation_id=identity, outcome=outcome, race_id=f"race{place}"))
    decisions = feed(policy, packets[3:], candidates)
    assert any(one.actionable and one.adaptation_type.grows for one in decisions) is later
    if later:
        assert "The last race found a seed that pays" in first_growth(decisions).explanation


@pytest.mark.parametrize(("used", "grows"), [(7_900, True), (8_100, False)])
def test_nothing_grows_where_next_to_nothing_is_left_of_the_budget(flattening, make_candidates, used, grows):
    budget = BudgetStatus(max_added_parameters=10_000, added_parameters=used)
    packets = [replace(one, budget=budget) for one in flattening]
    decisions = feed(Policy(), packets, make_candidates())
    assert any(one.actionable for one in decisions) is grows
    if not grows:
        assert "less than 20% of the budget is left (8100 of 10000 parameters are used)" in decisions[-1].explanation


def test_the_share_of_the_budget_that_must_be_left_is_a_share():
    with pytest.raises(InvalidInputError, match=r"min_budget_share must be within \[0, 1\], got 1.5"):
        TamiyoConfig(min_budget_share=1.5)


@pytest.mark.parametrize(("used", "rivals"), [(0, 8), (4_600, 5), (9_400, 1)])
def test_a_race_is_as_large_as_what_is_left_of_the_budget(flattening, make_candidates, used, rivals):
    budget = BudgetStatus(max_added_parameters=10_000, added_parameters=used)
    packets = [replace(one, budget=budget) for one in flattening]
    policy = Policy(TamiyoConfig(race_size=8, min_budget_share=0.0))
    sizes = [len(policy.analyze(packet, make_candidates())) for packet in packets]
    assert 1 <= max(sizes) <= rivals
    if rivals == 1:
        assert max(sizes) == 1


def test_equal_packets_give_equal_decisions_bit_for_bit(flattening, candidates):
    assert feed(Policy(), flattening, candidates) == feed(Policy(), flattening, candidates)


def test_candidates_in_another_order_change_nothing(flattening, candidates):
    assert feed(Policy(), flattening, candidates) == feed(Policy(), flattening, candidates[::-1])


def test_another_seed_of_the_run_gives_another_draw(flattening, candidates):
    drawn = {
        first_growth(feed(Policy(), [replace(one, random_seed=seed) for one in flattening], candidates)).blueprint_id
        for seed in range(20)
    }
    assert len(drawn) > 3


def test_a_packet_seen_again_gives_the_decision_taken(flattening, candidates):
    policy = Policy()
    decisions = feed(policy, flattening, candidates)
    assert decide(policy, flattening[7], []) is decisions[7]


def test_a_stale_packet_that_was_never_decided_on_is_refused(make_packet):
    policy = Policy()
    decide(policy, make_packet(5, 1.0), [])
    with pytest.raises(
        InvalidStateError, match=r"state\.sequence must be above 5, the newest seen of run run-1, got 4"
    ):
        decide(policy, make_packet(4, 1.0), [])


def test_ids_are_derived_from_run_and_sequence():
    assert adaptation_id("run-1", 3) == adaptation_id("run-1", 3)
    assert len({adaptation_id(run, place) for run in ("a", "b") for place in range(5)}) == 10
    assert adaptation_id("a", 1)[0] == "a"
    assert len(adaptation_id("a", 1)) == 33


def test_no_more_adaptations_are_opened_than_allowed(flattening, candidates):
    config = TamiyoConfig(max_open_adaptations=1, pending_epochs=50)
    decisions = feed(Policy(config), flattening, candidates)
    assert sum(one.actionable for one in decisions) == 1
    assert "as many adaptations as allowed" in decisions[-1].explanation


def test_two_open_adaptations_never_share_a_layer(flattening, candidates):
    policy = Policy(TamiyoConfig(max_open_adaptations=2, pending_epochs=50, race_size=1))
    grown = [one for one in feed(policy, flattening, candidates) if one.actionable]
    assert len(grown) == 2
    assert grown[0].layer != grown[1].layer


def test_seeds_under_way_count_as_open(make_packet, make_layer, flattening, candidates):
    busy = make_layer(
        "hidden", seeds=[seed_of(0, SeedLifecycleState.EVALUATING, "a1"), seed_of(1, SeedLifecycleState.DORMANT)]
    )
    packets = [replace(one, layers=(busy, make_layer("head"))) for one in flattening]
    config = TamiyoConfig(max_open_adaptations=2, pending_epochs=50)
    grown = [one for one in feed(Policy(config), packets, candidates) if one.actionable]
    assert [one.layer for one in grown] == ["head"]
    assert not any(one.actionable for one in feed(Policy(TamiyoConfig(pending_epochs=50)), packets, candidates))


def test_a_refused_plan_frees_its_place(flattening, candidates):
    policy = Policy(TamiyoConfig(max_open_adaptations=1, pending_epochs=50, layer_cooldown_epochs=0, race_size=1))
    grown = first_growth(feed(policy, flattening, candidates))
    plan = AdaptationPlan(
        adaptation_id=grown.adaptation_id,
        run_id="run-1",
        status=PlanStatus.REJECTED,
        created_at=flattening[0].created_at,
    )
    policy.note_plan(plan)
    assert decide(policy, after(flattening, 13), candidates).actionable


def test_a_decision_nobody_took_up_lapses(flattening, candidates):
    policy = Policy(
        TamiyoConfig(max_open_adaptations=1, pending_epochs=2, layer_cooldown_epochs=0, first_race_epochs=99)
    )
    epochs = [one.epoch for one in feed(policy, flattening, candidates) if one.actionable]
    assert len(epochs) >= 2
    assert all(later - earlier == 2 for earlier, later in pairwise(epochs))


def test_a_layer_rests_after_a_decision(flattening, make_candidates):
    policy = Policy(TamiyoConfig(pending_epochs=1, layer_cooldown_epochs=3))
    epochs = [one.epoch for one in feed(policy, flattening, make_candidates(["hidden"])) if one.actionable]
    assert all(later - earlier >= 3 for earlier, later in pairwise(epochs))


def test_only_what_the_budget_can_pay_is_proposed(flattening, candidates, bounded_budget):
    packets = [replace(one, budget=bounded_budget) for one in flattening]
    costs = {one.blueprint.id: one.cost.parameters for one in candidates}
    grown = [one for one in feed(Policy(TamiyoConfig(race_size=1)), packets, candidates) if one.actionable]
    assert grown
    assert sum(costs[one.blueprint_id] for one in grown[:2]) <= 150


def test_an_exhausted_budget_is_named(flattening, candidates):
    packets = [replace(one, budget=BudgetStatus(max_adaptations=3, adaptations=3)) for one in flattening]
    decision = feed(Policy(), packets, candidates)[-1]
    assert not decision.actionable
    assert "3 of 3 adaptations" in decision.explanation


@pytest.mark.parametrize(("left", "is_said"), [(0, True), (150, False)])
def test_a_budget_too_small_for_any_candidate_is_evidence(flattening, candidates, left, is_said):
    smallest = min(one.cost.parameters for one in candidates)
    budget = BudgetStatus(max_added_parameters=smallest - 1 + left)
    decisions = feed(Policy(), [replace(one, budget=budget) for one in flattening], candidates)
    said = [it for one in decisions for it in one.evidence if it.name == BUDGET_TOO_SMALL]
    assert bool(said) is is_said
    assert all(it.value == smallest for it in said)


def test_a_budget_that_is_booked_for_what_is_under_way_is_not_too_small(flattening, candidates, make_layer):
    grafted = (seed_of(0, SeedLifecycleState.EVALUATING, "a1"),)
    budget = BudgetStatus(max_added_parameters=150, added_parameters=150, adaptations=1)
    busy = [
        replace(one, layers=(make_layer("hidden", seeds=grafted), one.layers[1]), budget=budget) for one in flattening
    ]
    decisions = feed(Policy(TamiyoConfig(max_open_adaptations=2)), busy, candidates)
    assert not any(one.actionable for one in decisions)
    assert any("of the budget is left" in one.explanation for one in decisions)
    assert not any(it.name == BUDGET_TOO_SMALL for one in decisions for it in one.evidence)


def test_without_candidates_nothing_is_grown(flattening):
    decision = feed(Policy(), flattening, [])[-1]
    assert not decision.actionable
    assert "no blueprint fits" in decision.explanation


def test_a_blueprint_that_failed_at_a_layer_is_embargoed_there(flattening, candidates, make_report):
    policy = Policy(TamiyoConfig(layer_cooldown_epochs=0))
    one = [each for each in candidates if each.layer == "hidden"][:1]
    policy.learn(
        make_report(blueprint_id=one[0].blueprint.id, outcome=AdaptationOutcome.FAILED, reward=None, begun_epoch=9)
    )
    decisions = feed(policy, flattening, one)
    assert not any(each.actionable for each in decisions)
    assert any("free of an embargo" in each.explanation for each in decisions)
    assert not any(it.name == BUDGET_TOO_SMALL for each in decisions for it in each.evidence)


def test_growth_is_not_urgent_once_nothing_can_be_trained_any_more(flattening, candidates):
    packets = [replace(one, planned_epochs=13) for one in flattening]
    late = [one for one in feed(Policy(), packets, candidates) if one.adaptation_type is AdaptationType.ADD_SEED]
    assert late
    assert late[-1].urgency < 0.6
    assert not late[-1].actionable


def test_candidates_known_to_harm_are_not_acted_on(flattening, make_candidates, make_report):
    one = make_candidates(["hidden"])[:1]
    policy = Policy()
    for place in range(12):
        report = make_report(f"r{place}", reward=-0.2, blueprint_id=one[0].blueprint.id, run_id="run-0")
        policy.learn(report)
    decisions = feed(policy, flattening, one)
    assert not any(each.actionable for each in decisions)
    assert min(Asked.of(each).raw for each in decisions if each.blueprint_id) < 0.5


def test_what_paid_before_is_drawn_more_often(flattening, make_candidates, make_report):
    offered = make_candidates(["hidden"])
    best = offered[3].blueprint.id
    drawn = []
    for seed in range(10):
        policy = Policy()
        for place, one in enumerate(offered * 6):
            known = one.blueprint.id
            reward = 0.3 if known == best else 0.0
            policy.learn(
                make_report(f"r{place}", reward=reward, blueprint_id=known, run_id="run-0"),
                family=family_of(one.blueprint.ir),
            )
        packets = [replace(one, random_seed=seed) for one in flattening]
        drawn.append(first_growth(feed(policy, packets, offered)).blueprint_id)
    assert drawn.count(best) >= 8


def test_a_diverged_run_learns_slower(make_packet, candidates):
    policy = Policy()
    feed(policy, [make_packet(place, 1.0 / place) for place in range(1, 6)], candidates)
    decision = decide(policy, make_packet(6, math.nan), candidates)
    assert decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS
    assert decision.curve_state is CurveState.UNSTABLE
    assert decision.parameter_change is not None
    assert decision.parameter_change.learning_rate_factor == 0.5
    assert decision.actionable
    assert decision.urgency == 1.0


def unstable_twice(make_packet, candidates, policy, *, between=None):
    """Give the two decisions of a run that diverges after epoch 6 and again after epoch 13."""
    feed(policy, [make_packet(place, 1.0 / place) for place in range(1, 6)], candidates)
    first = decide(policy, make_packet(6, math.nan), candidates)
    if between is not None:
        between(first)
    feed(policy, [make_packet(place, 1.0 / place) for place in range(7, 13)], candidates)
    return first, decide(policy, make_packet(13, math.nan), candidates)


def judged(make_report, outcome):
    """Report how the trial of a change of settings ended."""
    return lambda policy: (
        lambda decision: policy.learn(
            make_report(
                adaptation_id=decision.adaptation_id,
                adaptation_type="optimize_parameters",
                outcome=outcome,
                begun_epoch=decision.epoch,
            ),
            begun=decision,
        )
    )


@pytest.mark.parametrize("outcome", [AdaptationOutcome.KEPT, AdaptationOutcome.CULLED])
def test_a_run_that_is_unstable_again_begins_the_optimizers_state_anew(make_packet, make_report, candidates, outcome):
    policy = Policy()
    between = judged(make_report, outcome)(policy)
    first, second = unstable_twice(make_packet, candidates, policy, between=between)
    assert not first.parameter_change.resets_state
    assert second.curve_state is CurveState.UNSTABLE
    assert second.actionable
    assert second.parameter_change == ParameterChange(learning_rate_factor=0.5, group=None, resets_state=True)
    assert "unstable again" in second.explanation
    assert "lowered after epoch 6: begin the optimizer's state anew" in second.explanation
    assert next(one.value for one in second.evidence if one.name == "calmed_epoch") == 6.0


@pytest.mark.parametrize("outcome", [None, AdaptationOutcome.ROLLED_BACK, AdaptationOutcome.FAILED])
def test_a_rate_that_was_not_lowered_in_fact_is_lowered_first(make_packet, make_report, candidates, outcome):
    policy = Policy()
    between = None if outcome is None else judged(make_report, outcome)(policy)
    _, second = unstable_twice(make_packet, candidates, policy, between=between)
    assert second.parameter_change == ParameterChange(learning_rate_factor=0.5)
    assert "again" not in second.explanation


def test_a_rate_lowered_against_overfitting_does_not_count(make_packet, make_report, candidates):
    control = [1.0, 0.7, 0.5, 0.45, 0.44, 0.46, 0.49, 0.53, 0.57, 0.61]
    train = [1.0, 0.7, 0.45, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.08]
    policy = Policy(TamiyoConfig(first_race_epochs=99, parameter_cooldown_epochs=0))
    pairs = enumerate(zip(control, train, strict=True), start=1)
    for decision in feed(policy, [make_packet(e, c, train_loss=t) for e, (c, t) in pairs], candidates):
        if decision.actionable:
            judged(make_report, AdaptationOutcome.KEPT)(policy)(decision)
    decision = decide(policy, make_packet(11, math.nan), candidates)
    assert decision.parameter_change == ParameterChange(learning_rate_factor=0.5)


def test_a_run_that_was_taken_back_behind_its_lower_rate_begins_with_that(make_packet, make_report, candidates):
    policy = Policy()
    unstable_twice(make_packet, candidates, policy, between=judged(make_report, AdaptationOutcome.KEPT)(policy))
    returned = [replace(make_packet(place, 0.4), epoch=place - 10, step=32 * (place - 10)) for place in (14, 15, 16)]
    feed(policy, returned, candidates)
    decision = decide(policy, replace(make_packet(26, math.nan), epoch=25, step=800), candidates)
    assert decision.parameter_change == ParameterChange(learning_rate_factor=0.5)


def test_a_restored_policy_knows_that_the_rate_was_lowered(make_packet, make_report, candidates):
    first, second = Policy(), Policy()
    seen = []
    between = judged(make_report, AdaptationOutcome.KEPT)
    packets = [make_packet(place, math.nan if place == 6 else 1.0 / place) for place in range(1, 13)]
    for packet in packets:
        seen.append(first.analyze(packet, candidates))
        if packet.sequence == 6:
            between(first)(seen[-1][0])
    for packet, decisions in zip(packets, seen, strict=True):
        second.restore(packet, decisions)
        if packet.sequence == 6:
            between(second)(decisions[0])
    last = make_packet(13, math.nan)
    assert second.analyze(last, candidates) == first.analyze(last, candidates)
    assert second.decided("run-1", 13)[0].parameter_change.resets_state


def test_an_overfitting_run_is_regularised_once_per_cooldown(make_packet, candidates):
    control = [1.0, 0.7, 0.5, 0.45, 0.44, 0.46, 0.49, 0.53, 0.57, 0.61]
    train = [1.0, 0.7, 0.45, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.08]
    packets = [make_packet(e, c, train_loss=t) for e, (c, t) in enumerate(zip(control, train, strict=True), start=1)]
    acted = [one for one in feed(Policy(TamiyoConfig(first_race_epochs=99)), packets, candidates) if one.actionable]
    assert len(acted) == 1
    assert acted[0].curve_state is CurveState.OVERFITTING
    assert acted[0].parameter_change.weight_decay_factor == 2.0


def test_a_plateau_for_want_of_generalisation_is_not_grown(make_packet, candidates):
    control = [1.0, 0.7, 0.5] + [0.45] * 8
    train = [1.0, 0.6, 0.4, 0.33, 0.27, 0.22, 0.17, 0.13, 0.09, 0.05, 0.01]
    packets = [make_packet(e, c, train_loss=t) for e, (c, t) in enumerate(zip(control, train, strict=True), start=1)]
    decision = feed(Policy(), packets, candidates)[-1]
    assert not decision.actionable
    assert "capacity is not what lacks" in decision.explanation


def test_a_failing_layer_loses_its_newest_fossil(make_packet, make_layer, candidates):
    fossils = [seed_of(0, SeedLifecycleState.FOSSILIZED, "a1", 10), seed_of(1, SeedLifecycleState.FOSSILIZED, "a2", 90)]
    policy = Policy()
    decide(policy, make_packet(1, 1.0, layers=(make_layer("hidden", seeds=fossils, errors=1),)), candidates)
    decision = decide(policy, make_packet(2, 0.9, layers=(make_layer("hidden", seeds=fossils, errors=6),)), candidates)
    assert decision.adaptation_type is AdaptationType.REMOVE_SEED
    assert (decision.layer, decision.seed_index) == ("hidden", 1)
    assert decision.confidence == pytest.approx(6 / 7)
    assert decision.actionable


def test_a_fossil_measured_to_do_harm_is_removed(make_packet, make_layer, make_report, candidates):
    fossil = [seed_of(2, SeedLifecycleState.FOSSILIZED, "a9")]
    policy = Policy()
    harm = Contribution(estimate=-0.05, low=-0.08, high=-0.02, num_examples=400)
    policy.learn(make_report("again", adaptation_id="a9", contribution=harm))
    decision = decide(policy, make_packet(3, 0.9, layers=(make_layer("hidden", seeds=fossil),)), candidates)
    assert decision.adaptation_type is AdaptationType.REMOVE_SEED
    assert decision.seed_index == 2
    assert decision.confidence > 0.95


def test_a_fossil_that_still_pays_stays(make_packet, make_layer, make_report, candidates):
    fossil = [seed_of(2, SeedLifecycleState.FOSSILIZED, "a9")]
    policy = Policy()
    policy.learn(make_report("again", adaptation_id="a9", reward=0.05))
    decision = decide(policy, make_packet(3, 0.9, layers=(make_layer("hidden", seeds=fossil),)), candidates)
    assert decision.adaptation_type is AdaptationType.OPTIMIZE_PARAMETERS


@pytest.mark.parametrize("phase", [RunPhase.PAUSED, RunPhase.FINISHED])
def test_nothing_is_decided_for_a_run_that_does_not_train(flattening, candidates, phase):
    policy = Policy()
    feed(policy, flattening[:-1], candidates)
    decision = decide(policy, replace(flattening[-1], phase=phase), candidates)
    assert not decision.actionable
    assert phase.name.lower() in decision.explanation


def test_reports_are_learned_once_and_confidence_is_scored(make_report):
    policy = Policy()
    assert policy.reliability() is None
    assert policy.learn(make_report("r1", adaptation_id="a1"))
    assert not policy.learn(make_report("r1", adaptation_id="a1"))
    policy.learn(make_report("r2", reward=-0.1, outcome=AdaptationOutcome.CULLED, adaptation_id="a2"))
    score, count = policy.reliability()
    assert count == 2
    assert score == pytest.approx((0.2**2 + 0.8**2) / 2)


def test_a_restored_policy_goes_on_as_the_first_would_have(flattening, candidates):
    first, second = Policy(), Policy()
    decisions = [first.analyze(packet, candidates) for packet in flattening]
    for packet, decision in zip(flattening[:9], decisions[:9], strict=True):
        second.restore(packet, decision)
    assert [second.analyze(packet, candidates) for packet in flattening[9:]] == decisions[9:]


def test_candidates_are_wanted_only_where_a_run_will_grow(flattening, candidates):
    policy = Policy()
    wanted = []
    for packet in flattening:
        wanted.append(policy.begin(packet))
        decide(policy, packet, candidates)
    assert wanted[:2] == [frozenset()] * 2
    assert wanted[2] == frozenset({"hidden", "head"})
    assert policy.begin(flattening[-1]) == frozenset()


def test_a_packet_begun_is_decided_once(flattening, candidates):
    begun, plain = Policy(), Policy()
    for packet in flattening:
        begun.begin(packet)
        begun.begin(packet)
        assert decide(begun, packet, candidates) == decide(plain, packet, candidates)
    with pytest.raises(InvalidStateError, match=r"state\.sequence must be above 12"):
        begun.begin(replace(flattening[0], sequence=0))


def test_explanations_and_evidence_fit_the_wire(flattening, candidates):
    for decision in feed(Policy(), flattening, candidates):
        assert 0 < len(decision.explanation) <= 500
        assert all(len(one.detail) <= 300 for one in decision.evidence)
        assert 0.0 <= decision.confidence <= 1.0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("confidence_threshold", 1.5, r"confidence_threshold must be within \[0, 1\], got 1.5"),
        ("max_open_adaptations", 0, "max_open_adaptations must be >= 1, got 0"),
        ("layer_cooldown_epochs", -1, "layer_cooldown_epochs must be >= 0 epochs, got -1"),
        ("training_epochs", 0.0, "training_epochs must be finite and > 0, got 0"),
        ("learning_rate_factor", 1.0, r"learning_rate_factor must be within \(0, 1\), got 1"),
    ],
)
def test_settings_that_break_their_rule_are_refused(setting, value, message):
    with pytest.raises(InvalidInputError, match=message):
        TamiyoConfig(**{setting: value})
