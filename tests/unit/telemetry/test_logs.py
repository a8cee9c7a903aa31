"""Service logs: one rendering for whatever the library logs."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from esper.contracts.errors import InvalidInputError
from esper.telemetry.logs import configure_service_logs, log_context

log = logging.getLogger("esper.test")


@pytest.fixture(autouse=True)
def _keep_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_line_has_event_data_and_origin() -> None:
    out = io.StringIO()
    configure_service_logs("urza", stream=out)
    log.info("kernel_stored", extra={"size_bytes": 12, "path": ["a"]})
    (line,) = lines(out)
    expected = {"event": "kernel_stored", "size_bytes": 12, "path": ["a"]}
    origin = {"service": "urza", "level": "info", "logger": "esper.test"}
    assert (expected | origin).items() <= line.items()
    assert line["timestamp"].endswith("Z")


def test_context_and_trace_join_every_line_inside() -> None:
    out = io.StringIO()
    configure_service_logs("urza", json=True, stream=out)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    with log_context(run_id="r1"), tracer.start_as_current_span("work") as span:
        log.info("inside")
    log.info("outside")
    inside, outside = lines(out)
    assert inside["run_id"] == "r1"
    assert inside["trace_id"] == format(span.get_span_context().trace_id, "032x")
    assert not {"run_id", "trace_id", "span_id"} & outside.keys()


def test_exceptions_are_rendered_within_the_line() -> None:
    out = io.StringIO()
    configure_service_logs("urza", json=True, stream=out)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("rpc_defect")
    (line,) = lines(out)
    assert "ValueError: broken" in line["exception"]


def test_terminal_form_is_for_people() -> None:
    out = io.StringIO()
    configure_service_logs("urza", json=False, stream=out)
    log.warning("seed_culled", extra={"seed": 3})
    assert "seed_culled" in out.getvalue()
    assert "seed=3" in out.getvalue()


def test_level_holds_and_noisy_libraries_stay_quiet() -> None:
    out = io.StringIO()
    configure_service_logs("urza", json=True, level="debug", stream=out)
    log.debug("fine_detail")
    logging.getLogger("asyncio").info("chatter")
    assert [line["event"] for line in lines(out)] == ["fine_detail"]


def test_second_set_up_takes_the_place_of_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_service_logs("urza", json=True, stream=first)
    configure_service_logs("urza", json=True, stream=second)
    log.info("once")
    assert (first.getvalue(), len(lines(second))) == ("", 1)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="service must not be empty"):
        configure_service_logs("")
    with pytest.raises(InvalidInputError, match=r"level must be one of DEBUG, .*, got 'LOUD'"):
        configure_service_logs("urza", level="LOUD")
