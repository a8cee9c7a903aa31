from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.telemetry.streams import COMPILE, EVENTS, STREAMS, Retention, StreamSpec, WhenFull, streams_with_replicas
from esper.telemetry.subjects import Kind, build_subject, compile_job_subject, dead_subject, matches


def keepers(subject: str) -> list[str]:
    return [spec.name for spec in STREAMS if any(matches(pattern, subject) for pattern in spec.subjects)]


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("layer", [None, "block.0.conv"])
def test_every_durable_kind_is_kept_by_exactly_one_stream(kind: Kind, layer: str | None) -> None:
    expected = ["EVENTS"] if kind.durable else []
    assert keepers(build_subject("run-1", kind, layer)) == expected


def test_jobs_and_dead_letters_have_their_own_streams() -> None:
    assert keepers(compile_job_subject("cpu")) == ["COMPILE"]
    assert [keepers(dead_subject(spec.name)) for spec in (EVENTS, COMPILE)] == [["DEAD"], ["DEAD"]]


def test_the_queue_refuses_when_full_and_events_drop_their_oldest() -> None:
    assert (COMPILE.retention, COMPILE.when_full) == (Retention.WORK_QUEUE, WhenFull.REFUSE)
    assert (EVENTS.retention, EVENTS.when_full) == (Retention.LIMITS, WhenFull.DROP_OLDEST)


def test_replicas_are_set_on_all() -> None:
    assert {spec.replicas for spec in streams_with_replicas(3)} == {3}


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"name": "a b"}, r"stream name must match \[A-Za-z0-9_-\]\{1,64\}, got 'a b'"),
        ({"subjects": ()}, "subjects must name at least one pattern"),
        ({"subjects": ("a.>.b",)}, "subject pattern must be tokens"),
        ({"max_bytes": 0}, "max_bytes must be > 0, got 0"),
        ({"duplicate_window_s": 1e9}, "duplicate_window_s must be > 0 and at most max_age_s"),
        ({"replicas": 2}, "replicas must be 1, 3 or 5, got 2"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_refused(bad: dict[str, object], rule: str) -> None:
    values: dict[str, object] = {"name": "X", "subjects": ("esper.x",), **bad}
    with pytest.raises(InvalidInputError, match=rule):
        StreamSpec(**values)  # type: ignore[arg-type]
