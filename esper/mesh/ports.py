"""Free and occupied TCP ports of this machine."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket
from contextlib import ExitStack
from pathlib import Path

from esper.contracts.errors import InvalidInputError, PortInUseError

LOOPBACK = "127.0.0.1"

_FIRST_PORT = 10_000
"""The lowest port that is given out; well-known servers lie below it."""

_DRAWS_EACH = 20
"""How many ports are tried for one that is asked for, before the system is left to choose."""


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` can be reached from this machine only."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_port(host: str, port: int) -> str:
    """Give ``host:port`` with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Give ``count`` different ports that nobody listened on a moment ago.

    They are drawn from below the range that the system gives to outgoing connections, where it leaves room there: a
    port of that range may be any client's by the time a server binds it. Another server may still take one before the
    caller does; whoever binds must expect `PortInUseError`.

    Raises:
        InvalidInputError: ``count`` is below 1.
    """
    if count < 1:
        raise InvalidInputError.of("count", "be at least 1", count)
    with ExitStack() as held:
        return [_hold_one(held, host) for _ in range(count)]


def _hold_one(held: ExitStack, host: str) -> int:
    """Bind a socket that lives as long as ``held``; give its port."""
    sock = held.enter_context(socket.socket(_family(host)))
    end = _first_outgoing_port()
    ports = range(_FIRST_PORT, max(end, _FIRST_PORT))
    draws = random.SystemRandom().sample(ports, min(_DRAWS_EACH, len(ports)))
    for port in (*draws, 0):
        try:
            sock.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            break
    return int(sock.getsockname()[1])


def _first_outgoing_port() -> int:
    """Give the lowest port that the system gives to outgoing connections; 0 where it does not say."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:  # not Linux
        return 0


def free_port(host: str = LOOPBACK) -> int:
    """Give one port that nobody listened on a moment ago."""
    return free_ports(1, host)[0]


def require_free(host: str, port: int) -> None:
    """Make sure a server could listen on ``host:port`` now; port 0 always can.

    Raises:
        PortInUseError: another process holds the port.
        InvalidInputError: the host is not an address of this machine, or the port may not be bound by this user.
    """
    if not 0 <= port <= 65535:
        raise InvalidInputError.of("port", "be within [0, 65535]", port)
    try:
        with socket.socket(_family(host)) as sock:
            # Sockets in TIME_WAIT are no obstacle to gRPC, so they must not be one here.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.strip("[]"), port))
            sock.listen(1)
    except OSError as error:
        where = host_port(host, port)
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"{where} is in use by another process; choose another port or stop it") from error
        raise InvalidInputError(
            f"host and port must name an address this process may listen on, got {where}: {error}", parameter="host"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
