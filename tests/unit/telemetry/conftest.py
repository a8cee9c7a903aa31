from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

FIGURES = ("mean", "variance", "entropy", "dead_share", "nonfinite_share", "gradient_variance", "latency_ms")


class ListSource:
    """Signals from a list, as the native ring would give them."""

    def __init__(self) -> None:
        self.steps: deque[int] = deque()
        self.dropped = 0

    def drain(self, max_records: int = 65_536) -> dict[str, Any]:
        taken = [self.steps.popleft() for _ in range(min(max_records, len(self.steps)))]
        count = len(taken)
        columns: dict[str, Any] = {name: np.full(count, 0.5, dtype=np.float32) for name in FIGURES}
        columns["layer_id"] = np.zeros(count, dtype=np.uint32)
        columns["seed"] = np.full(count, -1, dtype=np.int32)
        columns["step"] = np.array(taken, dtype=np.uint64)
        columns["time_ns"] = np.array(taken, dtype=np.uint64)
        columns["flags"] = np.zeros(count, dtype=np.uint32)
        return columns


@pytest.fixture
def source() -> ListSource:
    return ListSource()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition that another thread brings about, or fail."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 10.0
        tick = threading.Event()
        while not condition():
            assert time.monotonic() < deadline_s, "the condition did not come about in time"
            tick.wait(0.01)

    return wait
