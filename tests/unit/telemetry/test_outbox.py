"""What waits for the bus: in order within its class, within the bounds of its class, counted when it is lost."""

from __future__ import annotations

import pytest

from esper.telemetry.outbox import Event, Lane, Offer, Tally, is_express
from esper.telemetry.subjects import Kind, build_subject, compile_job_subject, dead_subject
from esper.v1.telemetry_pb2 import SeedEvent

SEED = build_subject("run-1", "seed", "layer1")


def event_of(number: int, size_bytes: int = 0) -> Event:
    return Event(SEED, b"x" * size_bytes, {}, f"e{number}", True, float(number))


def offer_of(number: int) -> Offer:
    return Offer(SEED, SeedEvent(step=number), True, {}, None, float(number))


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def lane(tally: Tally) -> Lane:
    return Lane(4, 1000, tally)


@pytest.mark.parametrize("kind", Kind)
def test_control_alone_goes_by_express(kind: Kind) -> None:
    for layer in (None, "block.0.conv"):
        assert is_express(build_subject("run-1", kind, layer)) == (kind is Kind.CONTROL)


@pytest.mark.parametrize(
    "subject", [compile_job_subject("control"), dead_subject("control"), build_subject("control", "seed"), "control"]
)
def test_what_merely_has_control_in_its_name_does_not(subject: str) -> None:
    assert not is_express(subject)


def test_what_is_being_sent_stays_until_it_is_done_with(lane: Lane) -> None:
    for number in range(2):
        lane.events.put(event_of(number))
    first = lane.begin()
    assert first is not None
    assert (first.msg_id, lane.begin(), len(lane)) == ("e0", first, 2)
    lane.finish()
    second = lane.begin()
    assert second is not None
    assert (second.msg_id, len(lane)) == ("e1", 1)
    lane.finish()
    assert (lane.begin(), len(lane)) == (None, 0)


def test_the_oldest_is_what_is_being_sent_then_what_is_encoded_then_what_is_offered(lane: Lane) -> None:
    assert lane.oldest_s is None
    lane.offers.put(offer_of(3))
    assert lane.oldest_s == 3.0
    lane.events.put(event_of(2))
    assert lane.oldest_s == 2.0
    lane.begin()
    assert lane.oldest_s == 2.0
    lane.finish()
    assert lane.oldest_s == 3.0


def test_a_lane_at_its_bound_of_bytes_drops_its_oldest_and_counts(lane: Lane, tally: Tally) -> None:
    for number in range(4):
        lane.events.put(event_of(number, size_bytes=300))
    assert tally.dropped == {"seed": 2}
    left = lane.begin()
    assert left is not None
    assert left.msg_id == "e2"


def test_offers_are_taken_in_order_a_part_at_a_time(lane: Lane) -> None:
    for number in range(6):
        lane.offers.put(offer_of(number))
    taken = [[offer.offered_s for offer in lane.offers.take(3)] for _ in range(3)]
    assert taken == [[2.0, 3.0, 4.0], [5.0], []]
    assert lane.offers.overflow == {"seed": 2}


def test_what_the_end_leaves_is_counted_with_what_is_being_sent(lane: Lane, tally: Tally) -> None:
    for number in range(3):
        lane.events.put(event_of(number))
    lane.begin()
    lane.drop_all()
    assert (tally.dropped, len(lane), lane.begin()) == ({"seed": 3}, 0, None)
