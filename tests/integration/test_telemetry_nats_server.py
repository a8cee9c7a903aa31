from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts.errors import InvalidInputError, InvalidStateError, PortInUseError, UnavailableError
from esper.telemetry.nats_bus import NatsBus
from esper.telemetry.nats_server import NatsServer, NatsServerConfig, find_binary


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(NatsServerConfig(store_dir=tmp_path / "nats")) as server:
        yield server


def test_the_binary_comes_from_the_wheel() -> None:
    assert find_binary().name == "nats-server"
    assert os.access(find_binary(), os.X_OK)


async def test_it_answers_once_started_and_writes_every_acknowledged_message(server: NatsServer) -> None:
    async with await NatsBus.connect(server.url) as bus:
        await bus.flush()
    assert server.figures("jsz?config=true")["config"]["sync_always"] is True
    assert server.figures("varz")["host"] == "127.0.0.1"


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port must be free on 127.0.0.1, got {port} in use"):
            NatsServer(NatsServerConfig(store_dir=tmp_path, port=port)).start()


def test_one_store_serves_one_server(server: NatsServer) -> None:
    other = NatsServer(NatsServerConfig(store_dir=server.config.store_dir))
    with pytest.raises(InvalidStateError, match=rf"must belong to one NATS server, .* in use by pid {server.pid}"):
        other.start()
    assert other.pid is None


def test_a_killed_server_comes_back_where_it_was(server: NatsServer) -> None:
    url, pid = server.url, server.pid
    server.kill()
    assert server.pid is None
    server.start()
    assert server.url == url
    assert server.pid != pid


def test_it_is_started_once_and_stopped_often(server: NatsServer) -> None:
    with pytest.raises(InvalidStateError, match=f"the NATS server runs already with pid {server.pid}"):
        server.start()
    server.stop()
    server.stop()
    with pytest.raises(InvalidStateError, match="the NATS server is not running"):
        _ = server.monitor_url


def test_a_server_that_cannot_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("a file where the streams should be")
    with pytest.raises(UnavailableError, match=r"it ended while starting: .*storage directory is not a directory"):
        NatsServer(NatsServerConfig(store_dir=tmp_path)).start()


def test_the_url_is_unknown_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidStateError, match="the NATS server has no port before its first start"):
        _ = NatsServer(NatsServerConfig(store_dir=tmp_path)).url


def test_a_config_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="port must be 0 to 65535, got 70000"):
        NatsServerConfig(store_dir=tmp_path, port=70_000)
    with pytest.raises(InvalidInputError, match="max_store_bytes must be > 0, got 0"):
        NatsServerConfig(store_dir=tmp_path, max_store_bytes=0)


async def test_async_with_starts_and_stops_it(tmp_path: Path) -> None:
    async with NatsServer(NatsServerConfig(store_dir=tmp_path)) as server:
        assert server.pid is not None
    assert server.pid is None
