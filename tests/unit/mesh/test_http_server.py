"""The HTTP server that services share: port 0, a port that is taken, an address that is not ours, a quiet end."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from esper.contracts.errors import ConfigError, InvalidStateError, PortInUseError
from esper.mesh import LOOPBACK
from esper.mesh.http_server import HttpServer


def app() -> FastAPI:
    made = FastAPI()

    @made.get("/")
    async def root() -> str:
        return "here"

    return made


async def test_it_serves_on_a_free_port_until_it_is_closed() -> None:
    server = HttpServer(app(), name="test", host=LOOPBACK, port=0)
    url = await server.start()
    async with httpx.AsyncClient() as http:
        assert (await http.get(url)).json() == "here"
        await server.close()
        await server.close()
        with pytest.raises(httpx.ConnectError):
            await http.get(url)


async def test_a_port_that_is_taken_is_named() -> None:
    first = HttpServer(app(), name="test", host=LOOPBACK, port=0)
    port = int((await first.start()).rpartition(":")[2])
    with pytest.raises(PortInUseError, match=f"{LOOPBACK}:{port} is in use by another process"):
        await HttpServer(app(), name="test", host=LOOPBACK, port=port).start()
    await first.close()


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"test must be given an address this process may listen on, got 192\.0\.2\.1:0"
    ):
        await HttpServer(app(), name="test", host="192.0.2.1", port=0).start()


def test_it_has_no_address_before_it_was_started() -> None:
    with pytest.raises(InvalidStateError, match="the HTTP server must be started to have an address"):
        _ = HttpServer(app(), name="test", host=LOOPBACK, port=0).url
