"""Growing rests when it came to nothing, longer each time, until something is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.run_memory import RunMemory

CULLED, KEPT, FAILED = AdaptationOutcome.CULLED, AdaptationOutcome.KEPT, AdaptationOutcome.FAILED


@pytest.fixture
def ended(make_report, make_packet):
    """Let an adaptation end in a run that is at an epoch; gives how many epochs growing rests from there."""

    def end(memory, epoch, outcome, *, group, seed=0):
        memory.observe(replace(make_packet(epoch, 1.0), sequence=memory.last_sequence + 1))
        name = f"{group}-{seed}"
        memory.note_report(make_report(name, adaptation_id=name, race_id=group, outcome=outcome, begun_epoch=epoch))
        rested = 0
        while memory.rests(3):
            rested += 1
            memory.observe(replace(make_packet(epoch + rested, 1.0), sequence=memory.last_sequence + 1))
        return rested

    return end


def test_growing_rests_twice_as_long_after_every_race_that_came_to_nothing(ended):
    memory = RunMemory()
    assert [ended(memory, epoch, CULLED, group=f"a{epoch}") for epoch in (10, 20, 40, 70)] == [3, 6, 12, 24]


def test_what_is_kept_ends_the_rest(ended):
    memory = RunMemory()
    assert [ended(memory, epoch, CULLED, group=f"a{epoch}") for epoch in (10, 20)] == [3, 6]
    assert ended(memory, 40, KEPT, group="a40") == 0
    assert ended(memory, 50, CULLED, group="a50") == 3


def test_a_race_is_one_adaptation_however_many_seeds_it_had(ended):
    memory = RunMemory()
    assert [ended(memory, epoch, CULLED, group="a1", seed=epoch) for epoch in (10, 20, 30)] == [3, 3, 3]


def test_losers_of_a_race_that_was_won_call_for_no_rest(ended):
    memory = RunMemory()
    assert ended(memory, 10, KEPT, group="a1", seed=0) == 0
    assert ended(memory, 10, CULLED, group="a1", seed=1) == 0


def test_what_failed_for_want_of_a_kernel_calls_for_no_rest(ended):
    assert ended(RunMemory(), 10, FAILED, group="a1") == 0


def test_a_policy_at_rest_asks_for_no_candidates_and_says_why(flattening, make_candidates, make_report):
    policy = Policy(TamiyoConfig(rest_epochs=100))
    *earlier, last = flattening
    for packet in earlier:
        policy.analyze(packet, ())
    begun_epoch = earlier[-1].epoch
    policy.learn(make_report("r1", run_id=last.run_id, adaptation_id="a1", outcome=CULLED, begun_epoch=begun_epoch))
    assert policy.begin(last) == frozenset()
    (decision,) = policy.analyze(last, make_candidates())
    assert not decision.actionable
    assert "growing rests" in decision.explanation


def test_rest_is_a_number_of_epochs():
    with pytest.raises(InvalidInputError, match="rest_epochs must be >= 0 epochs, got -1"):
        TamiyoConfig(rest_epochs=-1)


def test_the_curve_begins_anew_with_every_seed_that_is_kept(ended):
    memory = RunMemory()
    for epoch in range(1, 6):
        ended(memory, epoch, CULLED, group=f"a{epoch}")
    assert [point.epoch for point in memory.curve][:5] == [1, 2, 3, 4, 5]
    now = memory.points[-1].epoch + 1
    ended(memory, now, KEPT, group="a9")
    assert memory.curve == [], "nothing is known yet of the network that it is now"
    ended(memory, now + 1, CULLED, group="a9", seed=1)
    assert [point.epoch for point in memory.curve] == [now + 1]
    assert memory.points[0].epoch == 1, "what was seen before is kept"


def test_a_run_that_was_taken_back_has_its_curve_again(ended, make_packet):
    memory = RunMemory()
    for epoch in range(1, 6):
        ended(memory, epoch, CULLED, group=f"a{epoch}")
    kept_at = memory.points[-1].epoch + 1
    ended(memory, kept_at, KEPT, group="a9")
    assert memory.curve == []
    memory.observe(replace(make_packet(kept_at - 2, 1.0), sequence=memory.last_sequence + 1))
    assert [point.epoch for point in memory.curve] == [kept_at - 1, kept_at]
