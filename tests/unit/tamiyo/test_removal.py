"""Which fossil is to go: one measured to bring less than its price, by the newest figures, one at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from esper.contracts.decision import AdaptationType
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import RECHECK, Contribution, SeedStatus
from esper.services.tamiyo.policy import Policy
from tests.unit.tamiyo.conftest import MOMENT


def at(minutes):
    return MOMENT + timedelta(minutes=minutes)


def effect(estimate, half=0.0196):
    """Give an effect whose standard error is a hundredth where ``half`` is left as it is."""
    return Contribution(estimate=estimate, low=estimate - half, high=estimate + half, num_examples=400)


@pytest.fixture
def fossils(make_layer):
    seeds = [
        SeedStatus(seed_index=index, state=SeedLifecycleState.FOSSILIZED, adaptation_id=f"a{index}", alpha=1.0)
        for index in (0, 1)
    ]
    return (make_layer("hidden", seeds=seeds),)


@pytest.fixture
def recheck(make_report):
    def make(name, adaptation, estimate, price, minutes=0):
        return make_report(
            name,
            adaptation_id=adaptation,
            contribution=effect(estimate),
            price=price,
            adaptation_type=RECHECK,
            blueprint_id="",
            created_at=at(minutes),
        )

    return make


def test_one_that_brings_less_than_its_price_goes_though_it_helps(make_packet, fossils, recheck):
    policy = Policy()
    policy.learn(recheck("r1", "a1", 0.02, 0.04))
    (decision,) = policy.analyze(make_packet(3, 0.9, layers=fossils), [])
    assert (decision.adaptation_type, decision.seed_index) == (AdaptationType.REMOVE_SEED, 1)
    assert decision.actionable
    assert decision.confidence == pytest.approx(0.97725, abs=2e-4), "two standard errors below"
    assert {one.name: one.value for one in decision.evidence if one.name in ("contribution", "price")} == {
        "contribution": 0.02,
        "price": 0.04,
    }
    assert "brings +0.0200, less than its price of 0.0400" in decision.explanation


def test_one_that_pays_or_may_pay_stays(make_packet, fossils, recheck):
    policy = Policy()
    policy.learn(recheck("r0", "a0", 0.05, 0.04))
    policy.learn(recheck("r1", "a1", 0.038, 0.04))
    (decision,) = policy.analyze(make_packet(3, 0.9, layers=fossils), [])
    assert not decision.actionable, "0.2 standard errors below are no ground"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_newer_of_two_measurements_counts_in_whatever_order_they_come(make_packet, fossils, recheck, order):
    reports = [recheck("old", "a1", -0.1, 0.04, minutes=1), recheck("new", "a1", 0.2, 0.04, minutes=2)]
    policy = Policy()
    for place in order:
        policy.learn(reports[place])
    (decision,) = policy.analyze(make_packet(3, 0.9, layers=fossils), [])
    assert decision.adaptation_type is not AdaptationType.REMOVE_SEED


def test_after_a_removal_the_others_wait_for_new_figures(make_packet, fossils, recheck):
    policy = Policy()
    policy.learn(recheck("r0", "a0", 0.03, 0.04, minutes=1))
    policy.learn(recheck("r1", "a1", -0.10, 0.04, minutes=1))
    (first,) = policy.analyze(make_packet(3, 0.9, layers=fossils, created_at=at(2)), [])
    assert first.seed_index == 1, "the surest first"
    left = (replace(fossils[0], seeds=fossils[0].seeds[:1]),)
    (second,) = policy.analyze(make_packet(4, 0.9, layers=left, created_at=at(3)), [])
    assert not second.actionable, "it was measured beside the one that went, and may be needed now"
    policy.learn(recheck("r2", "a0", 0.03, 0.04, minutes=4))
    (third,) = policy.analyze(make_packet(5, 0.9, layers=left, created_at=at(5)), [])
    assert (third.adaptation_type, third.seed_index) == (AdaptationType.REMOVE_SEED, 0)


def test_a_second_measurement_is_no_second_trial(make_packet, fossils, recheck, make_report):
    policy = Policy()
    policy.learn(make_report("r0", adaptation_id="a0", created_at=at(0)))
    trials = policy.posterior.num_observations
    assert not policy.learn(recheck("r1", "a0", -0.1, 0.04, minutes=1))
    assert policy.posterior.num_observations == trials
    memory = policy._memory("run-1")
    assert memory.pays, "what came to nothing later speaks against no race"


def test_a_fossil_in_doubt_holds_up_nothing_else(flattening, make_layer, make_candidates, recheck):
    seeds = [SeedStatus(seed_index=index, state=SeedLifecycleState.DORMANT) for index in (1, 2, 3)]
    kept = SeedStatus(seed_index=0, state=SeedLifecycleState.FOSSILIZED, adaptation_id="a1", alpha=1.0)
    layers = (make_layer("hidden", seeds=(kept, *seeds)), make_layer("head"))
    packets = [replace(one, layers=layers) for one in flattening]
    doubting, sure = Policy(), Policy()
    doubting.learn(recheck("r1", "a1", 0.038, 0.04))
    decided = [doubting.analyze(packet, make_candidates()) for packet in packets]
    assert any(row[0].actionable for row in decided)
    assert decided == [sure.analyze(packet, make_candidates()) for packet in packets]
