"""The time left for the work at hand, carried from an inbound call to the calls made on its behalf.

The server side opens a scope per call; a channel used inside it never asks for more than what is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_expires_at: ContextVar[float | None] = ContextVar("esper_deadline", default=None)


def remaining_s() -> float | None:
    """Give the seconds left in the current scope, never below 0; ``None`` outside of any scope."""
    expires_at = _expires_at.get()
    return None if expires_at is None else max(0.0, expires_at - time.monotonic())


@contextmanager
def deadline_scope(budget_s: float) -> Iterator[None]:
    """Bound everything inside by ``budget_s`` seconds from now; an outer scope that ends earlier still holds.

    Task-local: tasks started inside inherit the scope.
    """
    expires_at = time.monotonic() + budget_s
    outer = _expires_at.get()
    token = _expires_at.set(expires_at if outer is None else min(outer, expires_at))
    try:
        yield
    finally:
        _expires_at.reset(token)


def effective_timeout_s(asked_s: float | None, default_s: float | None) -> float | None:
    """Give the timeout for one outbound call: what was asked, else the default, and never more than what is left."""
    wanted = default_s if asked_s is None else asked_s
    left = remaining_s()
    if left is None:
        return wanted
    return left if wanted is None else min(wanted, left)
