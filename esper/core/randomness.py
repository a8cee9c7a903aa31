"""The process-wide random streams: captured, restored, and kept out of growth's reach."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture_random_state() -> dict[str, Any]:
    """Give the state of Python's, NumPy's and torch's global generators as plain data and tensors."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - users' code draws from the legacy global stream
    state: dict[str, Any] = {"python": random.getstate(), "numpy": legacy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators back to a captured state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Let code draw random numbers without the training run noticing."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
