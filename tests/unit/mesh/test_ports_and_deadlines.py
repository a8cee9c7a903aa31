"""Ports of this machine, and the budget that is handed on."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

import pytest

from esper.contracts.errors import InvalidInputError, PortInUseError
from esper.mesh import deadline_scope, free_port, free_ports, host_port, is_loopback, remaining_s, require_free
from esper.mesh.deadline import effective_timeout_s

OUTGOING_PORTS: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        require_free("127.0.0.1", port)


@pytest.mark.skipif(not OUTGOING_PORTS.exists(), reason="this system does not say which ports outgoing connections get")
def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    first = int(OUTGOING_PORTS.read_text().split()[0])
    if first < 12_000:
        pytest.skip(f"outgoing connections get ports from {first} on: there is no room below")
    assert all(port < first for port in free_ports(50))


def test_a_port_somebody_listens_on_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.SystemRandom.sample", lambda _self, _ports, count: [port] * count)
        assert free_port() != port


def test_count_of_ports_is_checked() -> None:
    with pytest.raises(InvalidInputError, match="count must be at least 1, got 0"):
        free_ports(0)


def test_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"^127\.0\.0\.1:{port} is in use by another process"):
            require_free("127.0.0.1", port)


def test_port_zero_is_always_free() -> None:
    require_free("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("192.0.2.1", 0, "host and port must name an address this process may listen on, got 192.0.2.1:0"),
        ("no-such-host.invalid", 0, "host and port must name an address"),
        ("127.0.0.1", 70000, r"port must be within \[0, 65535\], got 70000"),
    ],
)
def test_impossible_addresses_are_refused(host: str, port: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        require_free(host, port)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")),
        *((host, False) for host in ("0.0.0.0", "10.0.0.1", "urza", "::")),
    ],
)
def test_loopback_is_told_apart(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_ipv6_hosts_get_brackets() -> None:
    assert (host_port("::1", 5), host_port("[::1]", 5), host_port("h", 5)) == ("[::1]:5", "[::1]:5", "h:5")


def test_free_port_gives_one() -> None:
    assert 0 < free_port() < 65536


def test_no_scope_means_no_deadline() -> None:
    assert remaining_s() is None
    assert effective_timeout_s(None, None) is None
    assert effective_timeout_s(None, 10.0) == 10.0
    assert effective_timeout_s(3.0, 10.0) == 3.0


def test_scope_bounds_what_is_asked() -> None:
    with deadline_scope(2.0):
        for asked, default in ((60.0, 10.0), (None, 10.0), (None, None)):
            left_s = effective_timeout_s(asked, default)
            assert left_s is not None
            assert 1.5 < left_s <= 2.0
        assert effective_timeout_s(0.5, 10.0) == 0.5
    assert remaining_s() is None


def test_inner_scope_cannot_outlast_the_outer_one() -> None:
    with deadline_scope(1.0), deadline_scope(60.0):
        left_s = remaining_s()
        assert left_s is not None
        assert left_s <= 1.0


def test_spent_scope_leaves_nothing() -> None:
    with deadline_scope(-1.0):
        assert remaining_s() == 0.0
        assert effective_timeout_s(5.0, None) == 0.0


async def test_tasks_inherit_the_scope() -> None:
    async def left() -> float | None:
        return remaining_s()

    with deadline_scope(5.0):
        inherited = await asyncio.create_task(left())
    assert inherited is not None
    assert inherited <= 5.0
