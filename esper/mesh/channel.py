"""Channels to the services of the mesh: retries, keepalive, balancing, deadlines, traces and typed errors.

channel = open_channel("127.0.0.1:50054")
stub = UrzaServiceStub(channel)
blueprint = await stub.GetBlueprint(request, timeout=2.0)   # raises esper.contracts.errors
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from opentelemetry.trace import TracerProvider

from esper.contracts.errors import ConfigError, InvalidInputError, UnavailableError
from esper.mesh.calls import MeshChannel
from esper.mesh.health import OVERALL, check_health
from esper.mesh.ports import is_loopback
from esper.mesh.status import from_rpc_error
from esper.mesh.tls import TlsConfig, channel_credentials

log = logging.getLogger(__name__)

_LOCAL_SCHEMES: Final = ("unix:", "unix-abstract:")
_POSITIVE: Final = (
    "default_deadline_s",
    "retry_initial_backoff_s",
    "retry_max_backoff_s",
    "breaker_cooldown_s",
    "connect_timeout_s",
    "keepalive_interval_s",
    "keepalive_timeout_s",
    "max_message_bytes",
)


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """How calls over a channel behave."""

    default_deadline_s: float = 10.0
    """Seconds for a call with one response that names no timeout. Above 0."""

    default_stream_deadline_s: float | None = None
    """Seconds for a stream of responses that names no timeout; ``None`` leaves it to the server's default."""

    retry_attempts: int = 4
    """Attempts in all for a call that ends UNAVAILABLE, 1 to 5; 1 turns retries off."""

    retry_initial_backoff_s: float = 0.05
    """Mean wait before the second attempt, in seconds; doubles with each further one. Above 0."""

    retry_max_backoff_s: float = 1.0
    """Longest wait between attempts, in seconds. Above 0."""

    retry_methods: tuple[str, ...] | None = None
    """``package.Service`` or ``package.Service/Method`` that may be retried; ``None`` is all, since mutations carry a
    ``request_id`` and are idempotent."""

    breaker_failures: int = 10
    """Calls in a row that end UNAVAILABLE or past their deadline, after which calls fail at once; 0 for never."""

    breaker_cooldown_s: float = 1.0
    """Seconds they fail at once before one may try again. Above 0."""

    connect_timeout_s: float = 5.0
    """Seconds one attempt to connect may take, TLS included. Above 0."""

    keepalive_interval_s: float = 30.0
    """Seconds of silence after which the connection is pinged while calls run. Above 0."""

    keepalive_timeout_s: float = 5.0
    """Seconds the answer to a ping may take before the connection is given up. Above 0."""

    max_message_bytes: int = 16 * 1024 * 1024
    """Largest message taken or sent, in bytes. Above 0."""

    tls: TlsConfig | None = None
    """Certificate and authority; ``None`` is plain text, which is for loopback."""

    allow_plaintext: bool = False
    """Whether plain text may leave this machine."""

    token: str | None = field(default=None, repr=False)
    """Bearer token sent with every call; ``None`` sends none."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise InvalidInputError.of(name, "be above 0", getattr(self, name))
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise InvalidInputError("token must be printable ASCII and not blank, got another one", parameter="token")
        stream_s = self.default_stream_deadline_s
        if stream_s is not None and not stream_s > 0:
            raise InvalidInputError.of("default_stream_deadline_s", "be above 0 seconds or None", stream_s)
        if self.breaker_failures < 0:
            raise InvalidInputError.of("breaker_failures", "be at least 0", self.breaker_failures)
        if not 1 <= self.retry_attempts <= 5:
            raise InvalidInputError.of("retry_attempts", "be within [1, 5]", self.retry_attempts)


def open_channel(
    target: str, config: ChannelConfig | None = None, *, tracer_provider: TracerProvider | None = None
) -> MeshChannel:
    """Open a channel to ``host:port``, ``dns:///name:port`` (balanced round robin), ``unix:path`` or ``xds:///name``.

    Does not connect yet: the first call does, and fails at once with `UnavailableError` when nobody listens.
    REQUIRES: called within the event loop that will use the channel.

    Raises:
        InvalidInputError: the target is empty.
        ConfigError: it leads off this machine in plain text without ``allow_plaintext``.
    """
    chosen = config or ChannelConfig()
    if not target.strip():
        raise InvalidInputError.of("target", "name a host and port", target)
    return MeshChannel(_raw_channel(target, chosen), target, chosen, tracer_provider=tracer_provider)


async def probe(
    target: str, deadline_s: float = 2.0, *, service: str = OVERALL, config: ChannelConfig | None = None
) -> None:
    """Return when ``service`` (empty: the whole server) at ``target`` is SERVING.

    Raises:
        UnavailableError: it is not, or nobody answered within ``deadline_s`` seconds.
    """
    chosen = config or ChannelConfig()
    what = f"{service} at {target}" if service else target
    async with _raw_channel(target, chosen) as channel:
        try:
            serving = await check_health(channel, service, deadline_s)
        except grpc.RpcError as error:
            reason = from_rpc_error(error)
            raise UnavailableError(f"{what} must be SERVING, got {reason}", parameter="target") from error
    if not serving:
        raise UnavailableError(f"{what} must be SERVING, got NOT_SERVING", parameter="target")


def service_config(target: str, config: ChannelConfig) -> dict[str, Any]:
    """Build gRPC's service config: the retry policy with its throttle, and balancing for ``dns:///`` targets."""
    made: dict[str, Any] = {}
    if config.retry_attempts > 1:
        names = [_method_name(name) for name in config.retry_methods] if config.retry_methods is not None else [{}]
        policy = {
            "maxAttempts": config.retry_attempts,
            "initialBackoff": f"{config.retry_initial_backoff_s:.3f}s",
            "maxBackoff": f"{config.retry_max_backoff_s:.3f}s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        made["methodConfig"] = [{"name": names, "retryPolicy": policy, "waitForReady": False}]
        # Each failure costs one token of ten and each success gives a tenth back: a dead service is not hammered.
        made["retryThrottling"] = {"maxTokens": 10, "tokenRatio": 0.1}
    if target.startswith("dns:"):
        made["loadBalancingConfig"] = [{"round_robin": {}}]
        made["healthCheckConfig"] = {"serviceName": OVERALL}
    return made


def _method_name(name: str) -> dict[str, str]:
    service, _, method = name.partition("/")
    return {"service": service, "method": method} if method else {"service": service}


def _raw_channel(target: str, config: ChannelConfig) -> Any:
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(service_config(target, config))),
        ("grpc.enable_retries", 1 if config.retry_attempts > 1 else 0),
        ("grpc.keepalive_time_ms", int(config.keepalive_interval_s * 1e3)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1e3)),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Reconnect quickly after a restart on this machine; gRPC's own first wait is a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Not a wait, for all its name: the bound of one attempt to connect.
        ("grpc.min_reconnect_backoff_ms", int(config.connect_timeout_s * 1e3)),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if config.tls is None:
        if not config.allow_plaintext and not _stays_here(target):
            raise ConfigError(
                f"tls must be set to reach beyond loopback (or allow_plaintext said), got target {target!r}",
                parameter="tls",
            )
        return grpc.aio.insecure_channel(target, options=options)
    if config.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.tls.server_name))
    return grpc.aio.secure_channel(target, channel_credentials(config.tls), options=options)


def _stays_here(target: str) -> bool:
    if target.startswith(_LOCAL_SCHEMES):
        return True
    authority = target.rsplit("/", 1)[-1] if "://" in target else target.removeprefix("dns:").removeprefix("ipv4:")
    return is_loopback(authority.removeprefix("ipv6:").rpartition(":")[0])
