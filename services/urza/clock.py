"""Moments as the tables keep them: whole microseconds since 1970, UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def now_us() -> int:
    """Give the present, in microseconds since 1970."""
    return (datetime.now(UTC) - _EPOCH) // _MICROSECOND


def moment_of(microseconds: int) -> datetime:
    """Give the aware moment of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)
