"""Kernels from the nearest cache tier that has them, verified on the way, and kept nearer for the next time.

    l1   native cache of proven kernels in this process, as bytes (see ``tier_memory``)
    l2   directory or Redis of signed artefact bytes
    l3   the library (Urza)

What comes from a tier is proven before anyone sees it, and every caller gets a copy of its own. What does not verify is
counted, dropped where this process may (the first two tiers; the library's copy is the library's) and fetched anew.
Trouble with a tier is held off by a breaker and makes a fetch slower, and nothing here runs in a training step.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from esper.contracts.kernel import CompileSpec, KernelManifest
from esper.contracts.run import CacheTierStatus
from esper.execution._native import KernelCache
from esper.execution.answers import KernelAnswers
from esper.execution.artifact import ARTIFACT_ID, VerifiedKernel, require_artifact_id
from esper.execution.keys import KeyRing
from esper.execution.tier_guard import GuardedTier, TierCounts
from esper.execution.tier_memory import HeldKernel
from esper.execution.tier_port import BreakerState, CircuitBreaker, KernelReader, KernelTier

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
_AT_ONCE_S: Final = 1e-9
_SMALL_BYTES: Final = 512 * 1024
"""Largest kernel that is proven on an event loop and not in a thread, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """Bounds of a tiered source."""

    l2_timeout_s: float = 2.0
    """Longest wait for the second tier, in seconds."""
    l3_timeout_s: float = 60.0
    """Longest wait for the third tier, in seconds."""
    failures_to_open: int = 3
    """Failures in a row that open a tier's breaker."""
    open_s: float = 1.0
    """First time that a breaker stays open, in seconds; doubles while the tier stays away."""
    max_open_s: float = 30.0
    """Longest time that a breaker stays open, in seconds."""
    negative_ttl_s: float = 2.0
    """How long a kernel that no tier has is not asked for again, in seconds; an announcement ends it."""
    warm_concurrency: int = 4
    """Kernels fetched at once while warming."""
    warm_bytes: int = 64 * 1024 * 1024
    """Bytes of kernels that one forecast may bring near; what is beyond them is fetched when it is wanted."""

    def __post_init__(self) -> None:
        for name in ("l2_timeout_s", "l3_timeout_s", "open_s", "max_open_s", "negative_ttl_s"):
            if not getattr(self, name) > 0:
                raise InvalidInputError.of(name, "be > 0 seconds", getattr(self, name))
        for name in ("failures_to_open", "warm_concurrency", "warm_bytes"):
            if getattr(self, name) < 1:
                raise InvalidInputError.of(name, "be >= 1", getattr(self, name))


class TieredKernelSource:
    """The three tiers as one. Coroutines but `near` belong to one event loop; all else to any thread."""

    def __init__(
        self,
        l1: KernelCache,
        l2: KernelTier | None,
        l3: KernelReader | None,
        ring: KeyRing,
        config: TierConfig | None = None,
    ) -> None:
        """Join the tiers.

        Args:
            l1: Cache of ``HeldKernel`` values.
            l2: Directory or Redis; ``None`` goes without.
            l3: The library; ``None`` goes without.
            ring: Keys whose kernels are trusted.
            config: Bounds.
        """
        self._config = config or TierConfig()
        self._l1 = l1
        self._ring = ring
        self._l2 = None if l2 is None else GuardedTier("l2", l2, self._config.l2_timeout_s, self._breaker())
        self._l3 = None if l3 is None else GuardedTier("l3", l3, self._config.l3_timeout_s, self._breaker())
        self._l2_writer = l2
        self._l1_counts = TierCounts()
        self._flights: dict[str, asyncio.Task[HeldKernel]] = {}
        self._wanted: set[str] = set()
        self._withdrawn: set[str] = set()
        self._names: dict[str, str] = {}
        self._answers = KernelAnswers()

    def name(self, name: str, artifact_id: str) -> None:
        """Let a kernel be fetched by a name of one's own, e.g. ``kernel_123``; a name may move.

        Raises:
            InvalidInputError: The name or the id is not well formed.
        """
        if not _NAME.fullmatch(name) or ARTIFACT_ID.fullmatch(name):
            raise InvalidInputError.of("name", "match [a-z0-9][a-z0-9_.-]{0,127} and be no artefact id", name)
        self._names[name] = require_artifact_id(artifact_id)

    def answer_to(self, spec: CompileSpec) -> str | None:
        """Give the id of the kernel that the compiler named here for an equal request and has not taken back.

        ``None`` where it named none. What is fetched by the id is proven like any other.
        """
        return self._answers.find(spec)

    def learn(self, manifest: KernelManifest) -> None:
        """Note that the compiler has named a kernel, by its proven manifest, as what answers its request now."""
        self._answers.learn(manifest)

    def refuse(self, job_id: str) -> None:
        """Note that the compiler says of a job that it has no kernel: what it named for it before answers nothing."""
        if self._answers.refuse(job_id):
            log.warning("kernel_taken_back", extra={"job_id": job_id})

    async def withdraw(self, artifact_id: str, reason: str) -> None:
        """Let go of a kernel that the library no longer offers: in the first two tiers, and as what answers a request.

        Seeds that stand with it go on, for their modules are their own; so does who waits for a fetch under way, of
        which nothing is kept. Who asks for it later is told what the library says.

        Raises:
            InvalidInputError: The id is not well formed.
        """
        require_artifact_id(artifact_id)
        was_near = artifact_id in self._l1
        if artifact_id in self._flights:
            self._withdrawn.add(artifact_id)
        self._answers.withdraw(artifact_id)
        self._l1.erase(artifact_id)
        await self._erase_l2(artifact_id)
        log.warning("kernel_withdrawn", extra={"artifact_id": artifact_id, "reason": reason, "was_near": was_near})

    def cached(self, artifact_id: str) -> VerifiedKernel | None:
        """Give a kernel that is in the first tier now, ``None`` for one that is not; takes 1 ms for each MB.

        An entry that has changed in memory is dropped and counted, and not given.

        Raises:
            InvalidInputError: The id is not well formed.
            NotFoundError: It is a name that was given to no kernel.
        """
        held = self._held(artifact_id)
        return None if held is None else self._taken(held)

    def at_hand(self, artifact_id: str) -> VerifiedKernel | None:
        """Give what `cached` gives, of a kernel that it takes no longer than 1 ms for; ``None`` for any other.

        What is not there is not counted as missed: it is then fetched, and counted by that.
        """
        held: HeldKernel | None = self._l1.get(artifact_id) if artifact_id in self._l1 else None
        return None if held is None or held.size_bytes > _SMALL_BYTES else self._taken(held)

    async def near(self, artifact_id: str) -> VerifiedKernel | None:
        """Give what `cached` gives, on any event loop, which it holds up for no longer than 1 ms."""
        held = self._held(artifact_id)
        if held is None:
            return None
        # Two hand-overs between threads take longer than proving a small kernel, above all beside a training thread.
        return self._taken(held) if held.size_bytes <= _SMALL_BYTES else await asyncio.to_thread(self._taken, held)

    def _held(self, artifact_id: str) -> HeldKernel | None:
        """Look into the first tier, and count where it has nothing."""
        begun_s = time.perf_counter()
        held: HeldKernel | None = self._l1.get(self._resolve(artifact_id))
        if held is None:
            self._l1_counts.misses += 1
            self._l1_counts.lookup_s += time.perf_counter() - begun_s
        return held

    def _taken(self, held: HeldKernel) -> VerifiedKernel | None:
        """Prove what the first tier has once more, and count."""
        begun_s = time.perf_counter()
        artifact_id = held.manifest.artifact_id
        try:
            kernel = held.take()
        except CorruptDataError as error:
            self._l1_counts.corrupt += 1
            log.warning("cache_entry_corrupt", extra={"artifact_id": artifact_id, "tier": "l1", "error": str(error)})
            self._l1.erase(artifact_id)
            return None
        finally:
            self._l1_counts.lookup_s += time.perf_counter() - begun_s
        self._l1_counts.hits += 1
        return kernel

    async def fetch(self, artifact_id: str, *, announced: bool = False) -> VerifiedKernel:
        """Give a kernel from the nearest tier that has it; callers that ask at once share one fetch.

        Args:
            artifact_id: The kernel, or a name given to it.
            announced: Whether it was just said to be in the library: then what was found missing before is asked for
                again, also where a fetch that began before the announcement still runs.

        Raises:
            InvalidInputError: The id is not well formed.
            NotFoundError: No tier has it.
            CorruptDataError: The library's own copy does not verify.
            UnavailableError: The tiers that may have it cannot be reached.
        """
        kernel = await self.near(artifact_id) or await self.fetch_beyond(artifact_id, announced=announced)
        if announced:
            self.learn(kernel.manifest)
        return kernel

    async def fetch_beyond(self, artifact_id: str, *, announced: bool = False) -> VerifiedKernel:
        """Give a kernel that the first tier was found not to have; otherwise as `fetch`."""
        artifact_id = self._resolve(artifact_id)
        if announced:
            held = await self._announced(artifact_id)
        elif self._l1.is_negative(artifact_id):
            raise NotFoundError(f"no cache tier has kernel {artifact_id}", parameter="artifact_id")
        else:
            held = await self._shared(artifact_id)
        return await asyncio.to_thread(held.take)

    async def warm(self, artifact_ids: Iterable[str]) -> tuple[str, ...]:
        """Bring kernels that the compiler named into the first tier; give the ids that are there now.

        The likeliest come first, and no more once ``warm_bytes`` were brought, so that they push out little else.
        Failures are logged, never raised. What is read for it counts as ``warmed``, unless somebody asks for the kernel
        while it is on its way.
        """
        gate = asyncio.Semaphore(self._config.warm_concurrency)
        left_bytes = self._config.warm_bytes

        async def bring(asked: str) -> str | None:
            nonlocal left_bytes
            async with gate:
                try:
                    artifact_id = self._resolve(asked)
                    if artifact_id not in self._l1:
                        if left_bytes <= 0:
                            return None
                        held = await self._flight(artifact_id)
                        left_bytes -= held.size_bytes
                        if artifact_id in self._l1:  # and was not withdrawn on its way
                            self.learn(held.manifest)
                except EsperError as error:
                    log.info("kernel_not_warmed", extra={"artifact_id": asked, "error": str(error)})
                    return None
            return artifact_id

        ready = await asyncio.gather(*(bring(artifact_id) for artifact_id in dict.fromkeys(artifact_ids)))
        return tuple(artifact_id for artifact_id in ready if artifact_id is not None)

    async def put(self, data: bytes) -> VerifiedKernel:
        """Verify an artefact and write it through to the first and second tier.

        Raises:
            CorruptDataError: It does not verify; nothing was kept.
        """
        held = await asyncio.to_thread(HeldKernel.proven, data, self._ring)
        self._keep_in_l1(held)
        await self._write_l2(held.manifest.artifact_id, data)
        return await asyncio.to_thread(held.take)

    def stats(self) -> tuple[CacheTierStatus, ...]:
        """Give counts, times and breakers of every tier there is, nearest first."""
        held = self._l1.stats()["bytes"]
        first = self._l1_counts.status("l1", held)
        return (first, *(tier.status() for tier in self._slower()))

    def breakers(self) -> Mapping[str, BreakerState]:
        """Give the breaker state of every slower tier by its name."""
        return {tier.name: tier.breaker.state for tier in self._slower()}

    async def close(self) -> None:
        """End running fetches and let go of the tiers."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        for tier in self._slower():
            await tier.reader.close()

    def _breaker(self) -> CircuitBreaker:
        config = self._config
        return CircuitBreaker(
            failures_to_open=config.failures_to_open, open_s=config.open_s, max_open_s=config.max_open_s
        )

    def _slower(self) -> tuple[GuardedTier, ...]:
        return tuple(tier for tier in (self._l2, self._l3) if tier is not None)

    def _resolve(self, artifact_id: str) -> str:
        known = self._names.get(artifact_id)
        if known is not None:
            return known
        if _NAME.fullmatch(artifact_id) and not ARTIFACT_ID.fullmatch(artifact_id):
            raise NotFoundError(f"no kernel is named {artifact_id}", parameter="artifact_id")
        return require_artifact_id(artifact_id)

    async def _announced(self, artifact_id: str) -> HeldKernel:
        """Fetch what the library has by now, whatever was found before."""
        running = self._flights.get(artifact_id)
        if running is not None:
            try:
                return await asyncio.shield(running)
            except (NotFoundError, CorruptDataError) as error:  # it may have looked before the kernel was there
                log.debug("kernel_fetched_again", extra={"artifact_id": artifact_id, "error": str(error)})
        if self._l1.is_negative(artifact_id):
            self._note_absent(artifact_id, _AT_ONCE_S)  # the cache's notes end by time alone
        return await self._shared(artifact_id)

    async def _shared(self, artifact_id: str) -> HeldKernel:
        """Join the fetch that runs for this id, or begin one, for somebody who wants the kernel."""
        self._wanted.add(artifact_id)
        return await self._flight(artifact_id)

    async def _flight(self, artifact_id: str) -> HeldKernel:
        """Join the fetch that runs for this id, or begin one; a caller that goes away does not end it."""
        flight = self._flights.get(artifact_id)
        if flight is None:
            flight = asyncio.create_task(self._load(artifact_id), name=f"kernel-fetch-{artifact_id}")
            self._flights[artifact_id] = flight
            flight.add_done_callback(lambda done: self._landed(artifact_id, done))
        return await asyncio.shield(flight)

    def _landed(self, artifact_id: str, flight: asyncio.Task[HeldKernel]) -> None:
        del self._flights[artifact_id]
        self._wanted.discard(artifact_id)
        self._withdrawn.discard(artifact_id)
        if not flight.cancelled():
            flight.exception()  # seen here, so that a fetch whose callers all left does not complain

    async def _load(self, artifact_id: str) -> HeldKernel:
        trouble: EsperError | None = None
        for tier in self._slower():
            try:
                data, held = await self._take(tier, artifact_id)
            except NotFoundError:
                trouble = None if tier is self._l3 else trouble
            except EsperError as error:
                trouble = error
            else:
                await self._promote(held, data, is_new=tier is self._l3)
                return held
        if trouble is not None:
            raise trouble
        self._note_absent(artifact_id, self._config.negative_ttl_s)
        raise NotFoundError(f"no cache tier has kernel {artifact_id}", parameter="artifact_id")

    async def _promote(self, held: HeldKernel, data: bytes, *, is_new: bool) -> None:
        """Keep what was fetched in the tiers before the one it came from, unless it was withdrawn meanwhile."""
        artifact_id = held.manifest.artifact_id
        if artifact_id in self._withdrawn:
            return
        self._keep_in_l1(held)
        if is_new:
            await self._write_l2(artifact_id, data)
            if artifact_id in self._withdrawn:
                await self._erase_l2(artifact_id)

    async def _take(self, tier: GuardedTier, artifact_id: str) -> tuple[bytes, HeldKernel]:
        """Read and verify; a damaged entry of the second tier is dropped, one of the library is read once more."""
        try:
            return await self._read_verified(tier, artifact_id)
        except CorruptDataError as error:
            extra = {"artifact_id": artifact_id, "tier": tier.name, "error": str(error)}
            log.warning("cache_entry_corrupt", extra=extra)
            if tier is self._l3:
                return await self._read_verified(tier, artifact_id)
            await self._erase_l2(artifact_id)
            raise NotFoundError(f"the entry of {artifact_id} was damaged and is gone") from error

    async def _read_verified(self, tier: GuardedTier, artifact_id: str) -> tuple[bytes, HeldKernel]:
        try:
            data = await tier.read(artifact_id, wanted=artifact_id in self._wanted)
            held = await asyncio.to_thread(HeldKernel.proven, data, self._ring, artifact_id=artifact_id)
        except (CorruptDataError, CapacityExceededError) as error:
            tier.counts.corrupt += 1
            if isinstance(error, CorruptDataError):
                raise
            raise CorruptDataError(f"kernel {artifact_id} does not verify: {error}") from error
        wanted = artifact_id in self._wanted
        tier.counts.hits += wanted
        tier.counts.warmed += not wanted
        return data, held

    def _keep_in_l1(self, held: HeldKernel) -> None:
        artifact_id = held.manifest.artifact_id
        try:
            kept = self._l1.put(artifact_id, held, held.size_bytes)
        except CapacityExceededError:
            kept = False
        if not kept:
            extra = {"artifact_id": artifact_id, "size_bytes": held.size_bytes}
            log.warning("kernel_does_not_fit_l1", extra=extra)

    def _note_absent(self, artifact_id: str, ttl_s: float) -> None:
        try:
            self._l1.put_negative(artifact_id, ttl_s)
        except InvalidStateError:
            log.debug("kernel_arrived_meanwhile", extra={"artifact_id": artifact_id})

    async def _write_l2(self, artifact_id: str, data: bytes) -> None:
        if self._l2 is not None and self._l2_writer is not None:
            await self._l2.attempt(self._l2_writer.write(artifact_id, data), "write", artifact_id)

    async def _erase_l2(self, artifact_id: str) -> None:
        if self._l2 is not None and self._l2_writer is not None:
            await self._l2.attempt(self._l2_writer.erase(artifact_id), "erase", artifact_id)
