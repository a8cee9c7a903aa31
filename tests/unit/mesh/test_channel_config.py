"""What a channel's settings become, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from esper.contracts.errors import ConfigError, InvalidInputError
from esper.mesh import ChannelConfig, RpcPolicy, open_channel, service_config


def test_retries_hold_for_all_methods_by_default() -> None:
    (entry,) = service_config("127.0.0.1:1", ChannelConfig())["methodConfig"]
    assert entry["name"] == [{}]
    assert entry["retryPolicy"] == {
        "maxAttempts": 4,
        "initialBackoff": "0.050s",
        "maxBackoff": "1.000s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }


def test_retries_can_be_named_by_service_and_method() -> None:
    config = ChannelConfig(retry_methods=("esper.v1.UrzaService", "esper.v1.KarnService/Generate"))
    (entry,) = service_config("127.0.0.1:1", config)["methodConfig"]
    assert entry["name"] == [
        {"service": "esper.v1.UrzaService"},
        {"service": "esper.v1.KarnService", "method": "Generate"},
    ]


def test_retries_can_be_turned_off() -> None:
    assert service_config("127.0.0.1:1", ChannelConfig(retry_attempts=1)) == {}


def test_names_that_resolve_to_many_are_balanced_with_health_checks() -> None:
    made = service_config("dns:///urza:50054", ChannelConfig())
    assert made["loadBalancingConfig"] == [{"round_robin": {}}]
    assert made["healthCheckConfig"] == {"serviceName": ""}
    assert "loadBalancingConfig" not in service_config("xds:///urza", ChannelConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_deadline_s": 0.0}, "default_deadline_s must be above 0, got 0.0"),
        ({"default_stream_deadline_s": -1.0}, "default_stream_deadline_s must be above 0 seconds or None"),
        ({"retry_attempts": 6}, r"retry_attempts must be within \[1, 5\], got 6"),
        ({"keepalive_interval_s": float("nan")}, "keepalive_interval_s must be above 0, got nan"),
        ({"breaker_failures": -1}, "breaker_failures must be at least 0, got -1"),
        ({"breaker_cooldown_s": 0.0}, "breaker_cooldown_s must be above 0, got 0.0"),
        ({"max_message_bytes": 0}, "max_message_bytes must be above 0, got 0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ChannelConfig(**change)


@pytest.mark.parametrize("target", ["10.0.0.1:1", "dns:///urza:50054", "xds:///urza", "urza:1", "ipv4:10.0.0.1:1"])
async def test_plain_text_beyond_loopback_must_be_said(target: str) -> None:
    with pytest.raises(ConfigError, match="tls must be set to reach beyond loopback"):
        open_channel(target)
    await open_channel(target, ChannelConfig(allow_plaintext=True)).close()


@pytest.mark.parametrize(
    "target", ["127.0.0.1:1", "localhost:1", "[::1]:1", "dns:///localhost:1", "ipv4:127.0.0.1:1", "unix:/tmp/x"]
)
async def test_loopback_needs_no_tls(target: str) -> None:
    channel = open_channel(target)
    assert channel.target == target
    await channel.close()


async def test_empty_target_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="target must name a host and port, got ' '"):
        open_channel(" ")


def test_policy_is_checked() -> None:
    with pytest.raises(InvalidInputError, match="default_stream_deadline_s must be above 0 seconds, got 0"):
        RpcPolicy(default_stream_deadline_s=0)
