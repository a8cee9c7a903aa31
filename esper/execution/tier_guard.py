"""One slower tier with its breaker, its time limit and its counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from esper.contracts.errors import CapacityExceededError, CorruptDataError, EsperError, NotFoundError, UnavailableError
from esper.contracts.run import CacheTierStatus, TierBreaker
from esper.execution.tier_port import BreakerState, CircuitBreaker, KernelReader

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class TierCounts:
    """Counts of one tier since it was made."""

    hits: int = 0
    """Lookups that found a kernel that verified."""
    misses: int = 0
    """Lookups that found nothing."""
    corrupt: int = 0
    """Entries that did not verify."""
    errors: int = 0
    """Calls that failed or were held off by the breaker."""
    lookup_s: float = 0.0
    """Time of the lookups to which the tier gave an answer, in seconds, all together."""
    warmed: int = 0
    """Kernels that it gave before anybody asked for them; no part of the lookups."""

    def status(self, tier: str, bytes_held: int | None, breaker: BreakerState | None = None) -> CacheTierStatus:
        """Give the counts as a value."""
        return CacheTierStatus(
            tier=tier,
            hits=self.hits,
            misses=self.misses,
            corrupt=self.corrupt,
            errors=self.errors,
            bytes_held=bytes_held,
            lookup_s=self.lookup_s,
            breaker=None if breaker is None else TierBreaker[breaker.name],
            warmed=self.warmed,
        )


class GuardedTier:
    """Calls one tier within its time, and not at all while it is known to be away."""

    def __init__(self, name: str, reader: KernelReader, timeout_s: float, breaker: CircuitBreaker) -> None:
        self.name = name
        self.reader = reader
        self.breaker = breaker
        self.counts = TierCounts()
        self._timeout_s = timeout_s

    async def read(self, artifact_id: str, *, wanted: bool = True) -> bytes:
        """Give an entry's bytes; with ``wanted`` false it is no lookup of anybody's, and not counted as one.

        Raises:
            NotFoundError: The tier has no such entry.
            CorruptDataError: It arrived damaged.
            UnavailableError: The tier failed, took too long, or is held off by its breaker.
        """
        if not self.breaker.allow():
            self.counts.errors += 1
            raise UnavailableError(f"cache tier {self.name} is held off after failures")
        begun_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await self.reader.read(artifact_id)
        except (NotFoundError, CorruptDataError) as error:
            self.counts.misses += wanted and isinstance(error, NotFoundError)
            self._answered(begun_s, wanted=wanted)
            raise
        except (EsperError, TimeoutError) as error:
            self._failed("read", artifact_id, error)
            raise UnavailableError(f"cache tier {self.name} failed: {str(error) or 'timed out'}") from error
        except BaseException:
            self.breaker.abandoned()
            raise
        self._answered(begun_s, wanted=wanted)
        return data

    async def attempt(self, work: Coroutine[Any, Any, None], action: str, artifact_id: str) -> bool:
        """Run a write or removal whose failure only costs speed; say whether it was done."""
        if not self.breaker.allow():
            work.close()
            self.counts.errors += 1
            return False
        try:
            async with asyncio.timeout(self._timeout_s):
                await work
        except CapacityExceededError as error:
            self.counts.errors += 1
            self.breaker.succeeded()
            extra = {"tier": self.name, "artifact_id": artifact_id, "error": str(error)}
            log.warning("cache_tier_full", extra=extra)
            return False
        except (EsperError, TimeoutError) as error:
            self._failed(action, artifact_id, error)
            return False
        except BaseException:
            self.breaker.abandoned()
            raise
        self.breaker.succeeded()
        return True

    def status(self) -> CacheTierStatus:
        """Give what is known of the tier."""
        return self.counts.status(self.name, self.reader.bytes_held, self.breaker.state)

    def _answered(self, begun_s: float, *, wanted: bool) -> None:
        if wanted:
            self.counts.lookup_s += time.perf_counter() - begun_s
        self.breaker.succeeded()

    def _failed(self, action: str, artifact_id: str, error: BaseException) -> None:
        self.counts.errors += 1
        opened = self.breaker.failed()
        log.warning(
            "cache_tier_failed",
            extra={
                "tier": self.name,
                "action": action,
                "artifact_id": artifact_id,
                "error": str(error) or "timed out",
                "breaker_opened": opened,
            },
        )
