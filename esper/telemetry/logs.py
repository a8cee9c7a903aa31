"""Logs of a service: whatever the library logs through ``logging``, rendered by structlog as JSON or for a terminal.

Only entry points call `configure_service_logs`; the library itself never touches handlers. ``run_id`` and other facts
of the work at hand join every line by `log_context`, the trace and span by the current OpenTelemetry span.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Final, TextIO

import structlog
from opentelemetry import trace

from esper.contracts.errors import InvalidInputError

_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_NOISY: Final = ("grpc", "asyncio", "nats", "sqlalchemy.engine")

_Event = MutableMapping[str, Any]


def configure_service_logs(
    service: str, json: bool | None = None, *, level: str = "INFO", stream: TextIO | None = None
) -> None:
    """Render every log record of this process, in the place of the handlers the root logger had.

    Args:
        service: Name that stands in every line.
        json: One JSON object per line; ``None`` takes JSON unless ``stream`` is a terminal.
        level: Lowest level of Esper's own records; noisy libraries stay at WARNING.
        stream: Where lines go; standard error by default.

    Raises:
        InvalidInputError: the service name is empty or the level is unknown.
    """
    if not service:
        raise InvalidInputError.of("service", "not be empty", service)
    if level.upper() not in _LEVELS:
        raise InvalidInputError.of("level", f"be one of {', '.join(_LEVELS)}", level)
    out = sys.stderr if stream is None else stream
    as_json = not out.isatty() if json is None else json
    handler = logging.StreamHandler(out)
    handler.setFormatter(_formatter(service, as_json, colors=out.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


@contextmanager
def log_context(**facts: str | int | float | bool) -> Iterator[None]:
    """Add facts (``run_id="r1"``) to every record logged inside, in this task and the tasks it starts."""
    with structlog.contextvars.bound_contextvars(**facts):
        yield


def _formatter(service: str, as_json: bool, *, colors: bool) -> logging.Formatter:
    def name_service(_: Any, __: str, event: _Event) -> _Event:
        event["service"] = service
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        name_service,
        _add_trace,
    ]
    if as_json:
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=colors)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )


def _add_trace(_: Any, __: str, event: _Event) -> Mapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format(context.trace_id, "032x")
        event["span_id"] = format(context.span_id, "016x")
    return event
