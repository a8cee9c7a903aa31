"""What the settings say about listening, TLS and the bus."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.contracts.errors import ConfigError
from esper.mesh import CertificateAuthority
from esper.mesh.settings import SERVICES, MeshSettings, resolve
from esper.services.compose import connect_bus


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    tls = CertificateAuthority.open_or_create(tmp_path).issue("tamiyo")
    return {"tls_ca": str(tls.ca_path), "tls_cert": str(tls.cert_path), "tls_key": str(tls.key_path)}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_listens_where_its_address_says(service: str) -> None:
    config = MeshSettings().server_config(service)
    assert f"{config.host}:{config.port}" == MeshSettings().address_of(service)
    assert config.tls is None
    assert not config.allow_plaintext


def test_host_is_where_it_listens_while_the_address_is_where_it_is_found(files: dict[str, str]) -> None:
    settings = resolve({"host": "0.0.0.0", "tamiyo_address": "dns:///tamiyo.esper.svc:50052", **files}).settings
    config = settings.server_config("tamiyo")
    assert (config.host, config.port) == ("0.0.0.0", 50052)
    assert config.tls is not None
    assert config.tls.require_client_cert
    assert settings.channel_config().tls == config.tls


def test_plain_text_beyond_loopback_is_refused_unless_said() -> None:
    with pytest.raises(ConfigError, match=r"tls must be set to listen beyond loopback.*'0\.0\.0\.0'"):
        MeshSettings(host="0.0.0.0").server_config("karn")
    assert MeshSettings(host="0.0.0.0", allow_plaintext=True).server_config("karn").allow_plaintext


def test_a_missing_certificate_is_named(files: dict[str, str]) -> None:
    settings = resolve({**files, "tls_cert": "/nowhere/tls.crt"}).settings
    with pytest.raises(ConfigError, match=r"cert_path must name a file that exists, got '/nowhere/tls\.crt'"):
        settings.channel_config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tls_ca": "/ca.pem"}, "tls_ca, tls_cert and tls_key must be set together"),
        ({"nats_url": "tls://nats:4222"}, "nats_url with tls:// needs tls_ca, tls_cert and tls_key"),
        ({"nats_replicas": 2}, "nats_replicas must be 1, 3 or 5"),
        ({"health_port": 70000}, "health_port must be valid"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(flags)


async def test_a_plain_url_takes_no_certificate(files: dict[str, str]) -> None:
    settings = resolve({**files, "nats_url": "http://127.0.0.1:1"}).settings
    with pytest.raises(Exception, match="url must start with nats:// or tls://"):
        await connect_bus(settings)
