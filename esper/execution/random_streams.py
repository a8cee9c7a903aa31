"""Leaving the process's random streams as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def frozen_streams() -> Iterator[None]:
    """Leave every random stream (Python, NumPy, torch on all devices in use) as it was."""
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002 - users' code draws from the legacy stream
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
