"""Settings are checked where they are made."""

from __future__ import annotations

import pytest

from esper.contracts.errors import InvalidInputError
from esper.services.tezzeret.config import CompilerConfig, TezzeretConfig, WorkerLimits, WorkerPoolConfig


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (CompilerConfig, {"max_parameters": 0}, "max_parameters must be > 0, got 0"),
        (CompilerConfig, {"equality_limit": 0.0}, "equality_limit must be > 0"),
        (WorkerLimits, {"job_timeout_s": -1}, "job_timeout_s must be > 0, got -1"),
        (WorkerLimits, {"open_files": 0}, "open_files must be > 0"),
        (WorkerPoolConfig, {"num_workers": 0}, "num_workers must be > 0"),
        (WorkerPoolConfig, {"mode": "thread"}, "mode must be process or inline, got 'thread'"),
        (TezzeretConfig, {"max_deliver": 0}, "max_deliver must be > 0"),
        (TezzeretConfig, {"durable_name": ""}, "durable_name must not be empty"),
    ],
)
def test_bad_settings_are_refused(cls: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        cls(**settings)
