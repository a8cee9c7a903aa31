"""The one configuration of every service and client: file < environment < flag; unknown keys are refused.

A file is TOML. Environment variables are ``ESPER_`` and the name of the setting in capitals. ``resolve`` says where
each value came from.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from esper.contracts.errors import ConfigError
from esper.contracts.kernel import MAX_FORECAST
from esper.mesh.channel import ChannelConfig
from esper.mesh.ports import LOOPBACK, is_loopback
from esper.mesh.server import ServerConfig
from esper.mesh.tls import TlsConfig

PREFIX: Final = "ESPER_"
CONFIG_FILE_VARIABLE: Final = "ESPER_CONFIG"
SERVICES: Final = ("tolaria", "tamiyo", "karn", "urza", "tezzeret", "nissa")
"""The six services, in the order of their default ports."""
DEFAULT_PORTS: Final[Mapping[str, int]] = {name: 50051 + index for index, name in enumerate(SERVICES)}


def default_state_dir() -> Path:
    """Give ``$XDG_STATE_HOME/esper``, by default ``~/.local/state/esper``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "esper"


class MeshSettings(BaseSettings):
    """Settings shared by services, command line and clients."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    state_dir: Path = Field(
        default_factory=default_state_dir, description="Where databases, keys, queues and logs rest."
    )
    host: str = Field("", description="Address a service listens on; empty: the host of its own address.")
    health_port: int | None = Field(
        None, ge=0, le=65535, description="Port of health checks alone, in plain text, for probes; none: no such port."
    )
    tls_ca: Path | None = Field(None, description="Authorities of the mesh, PEM; the three TLS files are set together.")
    tls_cert: Path | None = Field(None, description="Own certificate chain, PEM.")
    tls_key: Path | None = Field(None, description="Own private key, PEM.")
    allow_plaintext: bool = Field(False, description="Whether calls may leave this machine without TLS.")
    nats_url: str = Field("nats://127.0.0.1:4222", description="Message bus; tls:// takes the three TLS files.")
    nats_replicas: int = Field(1, description="Copies of every stream on different NATS servers: 1, 3 or 5.")
    database_url: str = Field("", description="PostgreSQL for all stores; empty: SQLite files in state_dir.")
    redis_url: str = Field("", description="Redis for the second cache tier; empty: a directory in state_dir.")
    trusted_keys_dir: Path | None = Field(
        None, description="Public keys of trusted compilers; default: state_dir/keys."
    )
    signing_key_dir: Path | None = Field(None, description="Signing key of the compiler; default: state_dir/keys.")
    otlp_endpoint: str = Field("", description="OpenTelemetry collector, e.g. http://127.0.0.1:4317; empty: no traces.")
    log_json: bool | None = Field(None, description="Logs as JSON; default: JSON unless on a terminal.")
    drain_deadline_s: float = Field(10.0, gt=0, le=600, description="Time a stopping service gives running calls.")
    tamiyo_forecast: int = Field(
        32, ge=0, le=MAX_FORECAST, description="Kernels that Tamiyo has made ready for a run before it asks; 0: none."
    )
    tezzeret_workers: int = Field(1, ge=1, le=64, description="Compile worker processes.")
    tezzeret_aot_inductor: bool = Field(
        False, description="Whether AOT_INDUCTOR is compiled where asked for: tens of seconds of C++ a kernel."
    )
    tezzeret_cuda: bool = Field(False, description="Whether compile workers may use this machine's CUDA devices.")
    tolaria_address: str = Field("127.0.0.1:50051", description="Where Tolaria listens.")
    tamiyo_address: str = Field("127.0.0.1:50052", description="Where Tamiyo listens.")
    karn_address: str = Field("127.0.0.1:50053", description="Where Karn listens.")
    urza_address: str = Field("127.0.0.1:50054", description="Where Urza listens.")
    tezzeret_address: str = Field("127.0.0.1:50055", description="Where Tezzeret listens.")
    nissa_address: str = Field("127.0.0.1:50056", description="Where Nissa listens.")
    nissa_http_port: int = Field(8080, ge=0, le=65535, description="Port of Nissa's /metrics and health; 0 picks one.")
    urza_rest_port: int = Field(8081, ge=0, le=65535, description="Port of Urza's REST face; 0 picks one.")
    urza_rest_host: str = Field(
        LOOPBACK,
        description="Address Urza's REST face listens on; beyond loopback it needs the TLS files and a token file.",
    )
    urza_rest_names: str = Field(
        "localhost,127.0.0.1,::1", description="Host names under which Urza's REST face answers, with commas; *: any."
    )
    urza_rest_token_file: Path | None = Field(
        None, description="File with the bearer token that REST calls need to change the library; none: no token."
    )
    urza_blobs_url: str = Field(
        "", description="Where kernels' bytes rest, as a URL of fsspec (file:///dir, s3://bucket); empty: its database."
    )
    urza_kernel_days: float = Field(90.0, ge=0, description="Age at which kernels go that nobody refers to; 0: never.")
    urza_kernel_bytes: int = Field(
        0, ge=0, description="Bytes of kernels above which those nobody refers to go, oldest first; 0: no bound."
    )
    urza_report_days: float = Field(
        365.0, ge=0, description="Age at which details of field reports go, counted as they stay; 0: never."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        files = (self.tls_ca, self.tls_cert, self.tls_key)
        if any(files) and not all(files):
            raise ValueError("tls_ca, tls_cert and tls_key must be set together")
        if self.nats_url.startswith("tls://") and not all(files):
            raise ValueError("nats_url with tls:// needs tls_ca, tls_cert and tls_key")
        if not is_loopback(self.urza_rest_host):
            if self.urza_rest_token_file is None:
                raise ValueError("urza_rest_host beyond loopback needs urza_rest_token_file")
            if not all(files) and not self.allow_plaintext:
                raise ValueError("urza_rest_host beyond loopback needs tls_ca, tls_cert and tls_key")
        if self.nats_replicas not in (1, 3, 5):
            raise ValueError("nats_replicas must be 1, 3 or 5")
        return self

    def address_of(self, service: str) -> str:
        """Give the address of a service as ``host:port``."""
        found: str = getattr(self, f"{service}_address")
        return found

    def tls_config(self) -> TlsConfig | None:
        """Give the TLS files, or ``None`` where there are none.

        Raises:
            ConfigError: One of them does not exist.
        """
        if self.tls_ca is None or self.tls_cert is None or self.tls_key is None:
            return None
        return TlsConfig(ca_path=self.tls_ca, cert_path=self.tls_cert, key_path=self.tls_key)

    def channel_config(self) -> ChannelConfig:
        """Give how services and clients call a service."""
        return ChannelConfig(tls=self.tls_config(), allow_plaintext=self.allow_plaintext)

    def server_config(self, service: str) -> ServerConfig:
        """Give where a service listens: on ``host`` if that is set, else on the host of its own address.

        Raises:
            ConfigError: That is beyond loopback, with neither TLS nor ``allow_plaintext``.
        """
        host, _, port = self.address_of(service).rpartition(":")
        return ServerConfig(
            host=self.host or host or LOOPBACK,
            port=int(port),
            health_port=self.health_port,
            drain_deadline_s=self.drain_deadline_s,
            tls=self.tls_config(),
            allow_plaintext=self.allow_plaintext,
        )

    def rest_token(self) -> str | None:
        """Give the bearer token of Urza's REST face, ``None`` where there is none.

        Raises:
            ConfigError: Its file cannot be read.
        """
        path = self.urza_rest_token_file
        if path is None:
            return None
        try:
            return path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"urza_rest_token_file must name a file of ASCII text, got {str(path)!r}: {type(error).__name__}",
                parameter="urza_rest_token_file",
            ) from error

    def database_of(self, service: str) -> str:
        """Give the database URL of a service's store."""
        return self.database_url or f"sqlite:///{self.state_dir / 'stores' / f'{service}.db'}"

    @property
    def keys_dir(self) -> Path:
        """Where the compiler's key pair rests."""
        return self.signing_key_dir or self.state_dir / "keys"

    @property
    def trusted_dir(self) -> Path:
        """Where the public keys of trusted compilers rest."""
        return self.trusted_keys_dir or self.keys_dir


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Settings with the source of each value."""

    settings: MeshSettings
    """The settings."""
    sources: Mapping[str, str]
    """Setting to ``default``, ``file PATH``, ``environment`` or ``flag``."""


def resolve(flags: Mapping[str, Any] | None = None, *, config_file: Path | None = None) -> Resolved:
    """Read file, environment and flags; flags that are ``None`` were not given.

    Raises:
        ConfigError: A key is unknown, a value breaks its rule, or the file cannot be read.
    """
    named = os.environ.get(CONFIG_FILE_VARIABLE)
    path = config_file or (Path(named) if named else None)
    from_file = _read_file(path) if path is not None else {}
    _refuse_unknown_variables()
    from_flags = {key: value for key, value in (flags or {}).items() if value is not None}
    given = {key.upper() for key in os.environ}  # a variable's name may be written in any case
    environment = {key for key in MeshSettings.model_fields if f"{PREFIX}{key.upper()}" in given}
    file_only = {key: value for key, value in from_file.items() if key not in environment}
    try:
        settings = MeshSettings(**{**file_only, **from_flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        received = (
            f", got {first.get('input')!r}" if first["loc"] else ""
        )  # a rule of several: their values stay private
        message = f"{name} must be valid: {first['msg']}{received}"
        raise ConfigError(message, parameter=name) from error
    sources = dict.fromkeys(MeshSettings.model_fields, "default")
    sources |= dict.fromkeys(file_only, f"file {path}")
    sources |= dict.fromkeys(environment, "environment")
    sources |= dict.fromkeys(from_flags, "flag")
    return Resolved(settings=settings, sources=sources)


def environment_of(settings: MeshSettings) -> dict[str, str]:
    """Give the settings as environment variables for a child process."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    return {f"{PREFIX}{key.upper()}": str(value) for key, value in plain.items()}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file must be readable, got {path}: {error.strerror}", parameter="config") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file must be TOML, got {path}: {error}", parameter="config") from error


def _refuse_unknown_variables() -> None:
    known = {f"{PREFIX}{key.upper()}" for key in MeshSettings.model_fields} | {CONFIG_FILE_VARIABLE}
    unknown = sorted(key for key in os.environ if key.upper().startswith(PREFIX) and key.upper() not in known)
    if unknown:
        raise ConfigError(f"environment must name known settings, got {unknown[0]}", parameter=unknown[0])
