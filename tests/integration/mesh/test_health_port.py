"""The port of health checks alone: plain text beside a server that asks for certificates."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper.contracts.errors import InvalidInputError
from esper.mesh import CertificateAuthority, MeshServer, ServerConfig
from esper.mesh.server import LIVE
from esper.v1.urza_service_pb2_grpc import UrzaServiceServicer, add_UrzaServiceServicer_to_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _status(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
    return int(answer.status)


async def test_a_probe_without_certificate_learns_readiness_and_life(tmp_path: Path) -> None:
    tls = CertificateAuthority.open_or_create(tmp_path).issue("urza")
    server = MeshServer(ServerConfig(tls=tls, health_port=0))
    server.add_servicer(add_UrzaServiceServicer_to_server, UrzaServiceServicer(), ready=[lambda: False])
    async with server:
        assert server.health_port
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel:
            assert await _status(channel, "") == NOT_SERVING
            assert await _status(channel, LIVE) == SERVING


async def test_nothing_but_health_is_offered_there(tmp_path: Path) -> None:
    tls = CertificateAuthority.open_or_create(tmp_path).issue("urza")
    server = MeshServer(ServerConfig(tls=tls, health_port=0))
    server.add_servicer(add_UrzaServiceServicer_to_server, UrzaServiceServicer())
    async with server, grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel:
        call = channel.unary_unary("/esper.v1.UrzaService/GetBlueprint")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=5.0)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _status(channel, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_without_the_setting_there_is_no_such_port() -> None:
    async with MeshServer(ServerConfig()) as server:
        assert server.health_port is None


def test_a_health_port_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"health_port must be within \[0, 65535\], got 65536"):
        ServerConfig(health_port=65536)
