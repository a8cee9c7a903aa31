"""Where Urza's REST face may be served: beyond this machine with certificates and a token alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper.contracts.errors import ConfigError
from esper.mesh.settings import MeshSettings, resolve

TLS = {"tls_ca": "ca.pem", "tls_cert": "tls.pem", "tls_key": "tls.key"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"urza_rest_host": "0.0.0.0", **TLS}, "urza_rest_host beyond loopback needs urza_rest_token_file"),
        (
            {"urza_rest_host": "0.0.0.0", "urza_rest_token_file": "token"},
            "urza_rest_host beyond loopback needs tls_ca, tls_cert and tls_key",
        ),
    ],
)
def test_what_would_leave_the_machine_unguarded_is_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(flags)


def test_guarded_or_on_loopback_it_is_taken() -> None:
    resolve({"urza_rest_host": "0.0.0.0", "urza_rest_token_file": "token", **TLS})
    resolve({"urza_rest_host": "0.0.0.0", "urza_rest_token_file": "token", "allow_plaintext": True})
    resolve({"urza_rest_host": "::1"})


def test_the_token_is_read_from_its_file_and_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert MeshSettings().rest_token() is None
    path = tmp_path / "token"
    settings = MeshSettings(urza_rest_token_file=path)
    with pytest.raises(ConfigError, match=r"urza_rest_token_file must name a file of ASCII text, got .*FileNotFound"):
        settings.rest_token()
    path.write_text("a-token-of-some-length\n")
    assert settings.rest_token() == "a-token-of-some-length"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        settings.rest_token()
