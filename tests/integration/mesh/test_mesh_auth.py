"""Who may call what, over real connections."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import ConfigError, PermissionDeniedError
from esper.mesh import (
    CertificateAuthority,
    ChannelConfig,
    InProcessChannel,
    MeshServer,
    Role,
    ServerConfig,
    TokenStore,
    open_channel,
    probe,
)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.json")


@pytest.fixture
def guarded(tmp_path: Path) -> ServerConfig:
    return ServerConfig(tokens_path=tmp_path / "tokens.json")


async def test_token_names_the_caller(serve: Any, text: Any, tokens: TokenStore, guarded: ServerConfig) -> None:
    mesh = await serve(guarded, ChannelConfig(token=tokens.issue("ada", Role.OPERATOR)))
    assert (await mesh.stub.Who(text(), timeout=5)).value == "ada OPERATOR"


async def test_role_below_what_the_method_asks_is_refused(
    serve: Any, text: Any, tokens: TokenStore, guarded: ServerConfig
) -> None:
    mesh = await serve(guarded, ChannelConfig(token=tokens.issue("eve", Role.VIEWER)))
    assert (await mesh.stub.Who(text(), timeout=5)).value == "eve VIEWER"
    with pytest.raises(PermissionDeniedError, match=r"Hold must be at least operator, got 'eve', who is viewer"):
        await mesh.stub.Hold(text(), timeout=5)
    assert mesh.servicer.calls == 0


@pytest.mark.parametrize("token", [None, "not-a-token"])
async def test_strangers_are_refused_and_probes_are_not(
    serve: Any, text: Any, guarded: ServerConfig, token: str | None
) -> None:
    mesh = await serve(guarded, ChannelConfig(token=token))
    with pytest.raises(PermissionDeniedError, match=r"the (caller|bearer token) must (show|be)"):
        await mesh.stub.Who(text(), timeout=5)
    await probe(mesh.server.address)


async def test_revoked_token_is_refused_from_the_next_call_on(
    serve: Any, text: Any, tokens: TokenStore, guarded: ServerConfig
) -> None:
    mesh = await serve(guarded, ChannelConfig(token=tokens.issue("ada", Role.OPERATOR)))
    await mesh.stub.Who(text(), timeout=5)
    tokens.revoke("ada")
    with pytest.raises(PermissionDeniedError, match="the bearer token must be one this mesh issued"):
        await mesh.stub.Who(text(), timeout=5)


async def test_certificate_names_the_service(serve: Any, text: Any, tmp_path: Path) -> None:
    authority = CertificateAuthority.open_or_create(tmp_path / "tls")
    server = ServerConfig(tls=authority.issue("urza"))
    mesh = await serve(server, ChannelConfig(tls=authority.issue("tamiyo")))
    assert (await mesh.stub.Who(text(), timeout=5)).value == "tamiyo SERVICE"


async def test_token_holds_before_the_certificate(serve: Any, text: Any, tokens: TokenStore, tmp_path: Path) -> None:
    authority = CertificateAuthority.open_or_create(tmp_path / "tls")
    server = ServerConfig(tls=authority.issue("urza"), tokens_path=tmp_path / "tokens.json")
    client = ChannelConfig(tls=authority.issue("gateway"), token=tokens.issue("eve", Role.VIEWER))
    mesh = await serve(server, client)
    assert (await mesh.stub.Who(text(), timeout=5)).value == "eve VIEWER"


async def test_loopback_without_tokens_is_open(serve: Any, text: Any) -> None:
    mesh = await serve()
    assert (await mesh.stub.Who(text(), timeout=5)).value == "local SERVICE"


async def test_within_the_process_everybody_is_local(text: Any, echo: Any) -> None:
    async with InProcessChannel() as channel:
        channel.add_servicer(echo.add, echo.servicer())
        assert (await echo.stub(channel).Who(text(), timeout=5)).value == "local SERVICE"


async def test_method_without_a_role_stops_the_server(echo: Any, guarded: ServerConfig) -> None:
    server = MeshServer(guarded)
    server.add_servicer(echo.add, echo.servicer())
    with pytest.raises(
        ConfigError, match=r"every method must declare its role, got none for /esper\.test\.EchoService"
    ):
        await server.start()


async def test_access_log_names_the_caller_and_never_the_token(
    serve: Any, text: Any, tokens: TokenStore, guarded: ServerConfig, come_true: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = tokens.issue("ada", Role.OPERATOR)
    mesh = await serve(guarded, ChannelConfig(token=token))
    await mesh.stub.Who(text(), timeout=5)
    await come_true(lambda: "rpc_finished" in caplog.messages)
    (record,) = [record for record in caplog.records if record.message == "rpc_finished"]
    assert record.caller == "ada"  # type: ignore[attr-defined]
    assert not any(token in str(record.__dict__) for record in caplog.records)


async def test_callers_do_not_mix_between_calls(
    serve: Any, text: Any, echo: Any, tokens: TokenStore, guarded: ServerConfig
) -> None:
    mesh = await serve(guarded, ChannelConfig(token=tokens.issue("ada", Role.OPERATOR)))
    config = ChannelConfig(token=tokens.issue("eve", Role.VIEWER))
    async with open_channel(mesh.server.address, config) as other:
        for _ in range(10):
            assert (await mesh.stub.Who(text(), timeout=5)).value == "ada OPERATOR"
            assert (await echo.stub(other).Who(text(), timeout=5)).value == "eve VIEWER"
