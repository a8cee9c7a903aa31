"""One trace from caller to servicer, however the call ends."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from esper.contracts.errors import DeadlineExceededError, EsperError, InternalError
from esper.mesh import free_ports, open_channel


async def both(spans: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
    """Give the client's and the server's span once both have ended."""
    async with asyncio.timeout(5):
        while len(spans.get_finished_spans()) < 2:  # noqa: ASYNC110 -- an exporter sets no event
            await asyncio.sleep(0.005)
    by_kind = {span.kind: span for span in spans.get_finished_spans()}
    assert len(by_kind) == len(spans.get_finished_spans()) == 2
    return by_kind[SpanKind.CLIENT], by_kind[SpanKind.SERVER]


def joined(client: ReadableSpan, server: ReadableSpan) -> bool:
    assert server.parent is not None
    return (client.context.trace_id, client.context.span_id) == (server.context.trace_id, server.parent.span_id)


def facts(span: ReadableSpan) -> tuple[Any, ...]:
    attributes = span.attributes or {}
    return attributes["rpc.grpc.status_code"], attributes.get("error.type"), span.status.status_code


async def test_call_is_one_trace(mesh: Any, text: Any, echo: Any, spans: InMemorySpanExporter) -> None:
    await mesh.stub.Say(text(value="hi"), timeout=5)
    client, server = await both(spans)
    assert joined(client, server)
    assert client.name == server.name == f"{echo.service}/Say"
    assert facts(client) == facts(server) == (0, None, StatusCode.UNSET)
    expected = {"rpc.system": "grpc", "rpc.service": echo.service, "rpc.method": "Say"}
    assert expected.items() <= dict(server.attributes or {}).items()


async def test_call_hangs_below_the_current_span(
    mesh: Any, text: Any, spans: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    with tracer_provider.get_tracer("test").start_as_current_span("decision") as decision:
        await mesh.stub.Say(text(value="hi"), timeout=5)
    client, _ = (span for span in spans.get_finished_spans() if span.name.endswith("/Say"))
    assert {span.context.trace_id for span in spans.get_finished_spans()} == {decision.get_span_context().trace_id}
    assert client.parent is not None


async def test_streams_are_one_trace(mesh: Any, text: Any, spans: InMemorySpanExporter) -> None:
    replies = [reply.value async for reply in mesh.stub.Chat(iter([text(value="a"), text(value="b")]))]
    client, server = await both(spans)
    assert replies == ["<a>", "<b>"]
    assert joined(client, server)
    assert facts(client) == facts(server) == (0, None, StatusCode.UNSET)


async def test_callers_mistake_fails_the_client_span_only(mesh: Any, text: Any, spans: InMemorySpanExporter) -> None:
    with pytest.raises(EsperError, match="NOT_FOUND"):
        await mesh.stub.Fail(text(value="NOT_FOUND"), timeout=5)
    client, server = await both(spans)
    assert facts(client) == (5, "NOT_FOUND", StatusCode.ERROR)
    assert facts(server) == (5, "NOT_FOUND", StatusCode.UNSET)


async def test_panic_fails_both_spans_without_its_text(
    mesh: Any, text: Any, echo: Any, spans: InMemorySpanExporter
) -> None:
    with pytest.raises(InternalError, match="incident"):
        await mesh.stub.Fail(text(value="panic"), timeout=5)
    client, server = await both(spans)
    assert facts(client) == facts(server) == (13, "INTERNAL", StatusCode.ERROR)
    assert echo.secret not in server.to_json()


async def test_deadline_ends_both_spans(mesh: Any, text: Any, spans: InMemorySpanExporter) -> None:
    with pytest.raises(DeadlineExceededError, match=r"(?i)deadline"):
        await mesh.stub.Hold(text(), timeout=0.1)
    client, server = await both(spans)
    assert joined(client, server)
    assert (facts(client)[0], facts(server)[0]) == (4, 4)


async def test_cancel_ends_both_spans(mesh: Any, text: Any, spans: InMemorySpanExporter) -> None:
    call = mesh.stub.Hold(text(), timeout=30)
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    call.cancel()
    client, server = await both(spans)
    assert joined(client, server)
    assert (facts(client)[0], facts(server)[0]) == (1, 1)


async def test_stream_left_early_ends_both_spans(mesh: Any, text: Any, spans: InMemorySpanExporter) -> None:
    async def read_one() -> None:
        async for _ in mesh.stub.HoldStream(text()):
            break

    await read_one()
    gc.collect()
    client, server = await both(spans)
    assert joined(client, server)
    assert (facts(client)[0], facts(server)[0]) == (1, 1)


async def test_call_made_while_serving_joins_the_trace(
    serve: Callable[..., Any], text: Any, echo: Any, spans: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    inner, outer = await serve(), await serve()

    async def ask_inner(request: Any, context: Any) -> Any:
        async with open_channel(inner.server.address, tracer_provider=tracer_provider) as channel:
            return await echo.stub(channel).Say(request)

    outer.servicer.say = ask_inner
    assert (await outer.stub.Say(text(value="hi"), timeout=5)).value == "hi"
    finished = spans.get_finished_spans()
    assert len(finished) == 4
    assert len({span.context.trace_id for span in finished}) == 1


def rotel() -> str | None:
    found = importlib.util.find_spec("rotel")
    if found is None or found.origin is None:
        return None
    binary = Path(found.origin).parent / "rotel-agent"
    return str(binary) if binary.exists() else None


TRACED = """
import sys
from esper.telemetry.tracing import adaptation_span, configure_tracing
tracing = configure_tracing("urza", sys.argv[1])
with adaptation_span("compile", "adaptation-17", device="cpu"):
    pass
print(tracing.shutdown(float(sys.argv[2])))
"""


@pytest.mark.skipif(rotel() is None, reason="the rotel collector is not installed")
async def test_spans_reach_a_real_collector(tmp_path: Path) -> None:
    binary = rotel()
    assert binary is not None
    grpc_port, http_port = free_ports(2)
    debug = ("--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed")
    ports = ("--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}", "--otlp-http-endpoint", f"127.0.0.1:{http_port}")
    collector = await asyncio.create_subprocess_exec(
        *(binary, "start", *debug, *ports),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"HOME": str(tmp_path)},
    )
    try:
        async with asyncio.timeout(30):
            while not await _listens(grpc_port):  # noqa: ASYNC110 -- another process sets no event
                await asyncio.sleep(0.02)
            traced = await asyncio.create_subprocess_exec(
                sys.executable, "-c", TRACED, f"http://127.0.0.1:{grpc_port}", "10", stdout=asyncio.subprocess.PIPE
            )
            output, _ = await traced.communicate()
            assert output == b"True\n"
            assert collector.stdout is not None
            seen = b""
            while not all(word in seen for word in (b"esper.adaptation.compile", b"adaptation-17", b"urza")):
                seen += await collector.stdout.readline()
    finally:
        collector.terminate()
        await collector.wait()


def test_dead_collector_holds_nobody_up() -> None:
    (port,) = free_ports(1)
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    script = TRACED.replace("sys.argv[1]", "None").replace("sys.argv[2]", "0.3")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=15, env=environment, check=True
    )
    assert done.stdout == "False\n"


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    return True
