"""HTTPS: callers without a certificate are turned away, and a renewed certificate is shown without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from esper.contracts.errors import ConfigError
from esper.mesh import LOOPBACK
from esper.mesh.http_server import HttpServer
from esper.mesh.tls import CertificateAuthority, TlsConfig
from tests.unit.mesh.test_http_server import app


def context_of(tls: TlsConfig, *, shown: bool = True) -> ssl.SSLContext:
    """Give the context of a caller of the authority."""
    context = ssl.create_default_context(cafile=tls.ca_path)
    if shown:
        context.load_cert_chain(tls.cert_path, tls.key_path)
    return context


async def serial_of(url: str, context: ssl.SSLContext) -> int:
    """Give the number of the certificate that a new connection is shown."""
    async with httpx.AsyncClient(verify=context) as http, http.stream("GET", url) as answer:
        assert (await answer.aread()) == b'"here"'
        shown = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(shown).serial_number


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.open_or_create(tmp_path / "authority")


async def test_it_serves_those_who_show_a_certificate_of_the_authority_alone(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    caller, tls = authority.issue("caller"), authority.issue("server")
    stranger = CertificateAuthority.open_or_create(tmp_path / "other").issue("stranger")
    server = HttpServer(app(), name="test", host=LOOPBACK, port=0, tls=tls)
    url = await server.start()
    assert url.startswith("https://")
    try:
        assert await serial_of(url, context_of(caller))
        foreign = context_of(caller, shown=False)
        foreign.load_cert_chain(stranger.cert_path, stranger.key_path)
        for context in (context_of(caller, shown=False), foreign):
            async with httpx.AsyncClient(verify=context) as http:
                with pytest.raises(httpx.TransportError):
                    await http.get(url)
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url.replace("https", "http"))
    finally:
        await server.close()


async def test_a_renewed_certificate_is_shown_from_the_next_connection_on(authority: CertificateAuthority) -> None:
    caller, tls = authority.issue("caller"), authority.issue("server")
    server = HttpServer(app(), name="test", host=LOOPBACK, port=0, tls=tls)
    url = await server.start()
    try:
        first = await serial_of(url, context_of(caller))
        assert await serial_of(url, context_of(caller)) == first
        authority.issue("server")
        second = await serial_of(url, context_of(caller))
        assert second != first
        tls.key_path.write_text("half of a renewal")
        assert await serial_of(url, context_of(caller)) == second, "what was read last stays"
    finally:
        await server.close()


def test_files_that_hold_no_certificate_are_an_error_at_once(authority: CertificateAuthority) -> None:
    tls = authority.issue("server")
    tls.cert_path.write_text("nothing")
    with pytest.raises(ConfigError, match="test must be given a certificate with its key, got "):
        HttpServer(app(), name="test", host=LOOPBACK, port=0, tls=tls)
