"""A run's decisions, taken again from what was recorded of it, and compared.

    what a decision hangs on                    where it is taken from
    packet, with the seed of its random stream  recorded
    candidates                                  recorded, by content; site and cost follow from packet and blueprint
    settings                                    recorded; versions too, which are compared and cannot be brought back
    posterior, calibration, reliability         learned anew from the lessons known then, in the order of that time
    memory of the run                           from its earlier packets, decisions, reports and plans, in that order
    time                                        not at all: a decision's time is its packet's
    forecasts                                   not at all: they are no part of a decision

Each packet is decided on from the history that was recorded, not from what was replayed before: one difference is no
reason for another. Nothing but the store is read; the deciding is done beside the event loop. Where anything that a
decision hung on is missing, there is an error and not a guess.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from esper.contracts import wire
from esper.contracts.blueprint import Blueprint, BlueprintCost, Site
from esper.contracts.decision import AdaptationDecision, AdaptationPlan
from esper.contracts.errors import CorruptDataError, InvalidStateError, NotFoundError
from esper.contracts.replay import (
    CandidateList,
    CandidateMenu,
    PolicySettings,
    ReplayDifference,
    ReplayedPacket,
)
from esper.contracts.run import SystemStatePacket
from esper.services.tamiyo.candidates import Candidate, legal_cost
from esper.services.tamiyo.choices import Choice, changes_between, config_of, settings_of
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.differences import differences_between
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.store import PACKETS_KEPT, LessonKey, StoredPacket, StoredReport, TamiyoStore

_PACKETS_AT_ONCE: Final = 16
_LESSONS_AT_ONCE: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedPacket:
    """A packet of which everything is there that its decisions hung on."""

    packet: SystemStatePacket
    """The packet."""
    decisions: tuple[AdaptationDecision, ...]
    """What was decided on it."""
    choice: Choice
    """What that hung on besides."""


_Event = RecordedPacket | StoredReport | AdaptationPlan
_Place = tuple[str, str, tuple[Blueprint, ...]]
"""Layer, source, and what could have stood there."""


async def replay_run(
    store: TamiyoStore, run_id: str, present: TamiyoConfig, *, present_settings: bool = False
) -> AsyncGenerator[ReplayedPacket, None]:
    """Give a run's packets in order, each with its decisions as they were taken and as they are taken now.

    Ends with the newest packet there was at the beginning. With ``present_settings`` they are taken with those of
    ``present`` in place of the recorded ones.

    Raises:
        NotFoundError: Nothing is known of the run.
        InvalidStateError: Its decisions cannot be taken again: they were recorded before candidates were kept, its
            first packets are no longer kept, or it was decided with settings that this version does not know.
        CorruptDataError: Something that is recorded no longer reads.
        UnavailableError: The store cannot be reached.
    """
    newest = await store.newest_sequence(run_id)
    if newest == 0:
        raise NotFoundError(f"run_id must name a run of which packets are kept, got {run_id}", parameter="run_id")
    replay = _Replay(store, run_id, newest, present if present_settings else None)
    async with aclosing(replay.packets()) as replayed:
        async for packet in replayed:
            yield packet


class _Replay:
    """One replay under way."""

    def __init__(self, store: TamiyoStore, run_id: str, newest: int, instead: TamiyoConfig | None) -> None:
        self._store = store
        self._run_id = run_id
        self._newest = newest
        self._instead = instead
        self._pantry = _Pantry(store)

    async def packets(self) -> AsyncGenerator[ReplayedPacket, None]:
        policy: Policy | None = None
        settings = ""
        async with aclosing(self._lived()) as lived:
            async for event in lived:
                if not isinstance(event, RecordedPacket):
                    if policy is not None:
                        self._relive(policy, event)
                    continue
                changes: tuple[ReplayDifference, ...] = ()
                if policy is None or event.choice.settings != settings:
                    settings = event.choice.settings
                    policy, changes = await self._policy_at(event)
                yield await self._decided_again(policy, event, changes)

    async def _policy_at(self, packet: RecordedPacket) -> tuple[Policy, tuple[ReplayDifference, ...]]:
        """Give a policy as one of the packet's settings stood before it, and what differs from those settings now.

        That is what a service does that starts with other settings: it learns everything anew, and reads the run back.
        """
        payload = (await self._store.parts([packet.choice.settings]))[packet.choice.settings]
        recorded = wire.parse(payload, PolicySettings)
        config = self._instead or config_of(recorded)
        policy = Policy(config)
        async with aclosing(self._lived()) as lived:
            async for event in lived:
                if isinstance(event, RecordedPacket) and event.packet.sequence == packet.packet.sequence:
                    break
                await asyncio.to_thread(self._relive, policy, event)
        return policy, changes_between(recorded, settings_of(config))

    def _relive(self, policy: Policy, event: _Event) -> None:
        """Have a policy take in what happened, as the service did."""
        if isinstance(event, RecordedPacket):
            policy.restore(event.packet, event.decisions)
        elif isinstance(event, AdaptationPlan):
            policy.note_plan(event)
        elif event.is_own and event.report.run_id == self._run_id:
            policy.learn(event.report, family=event.family, begun=event.begun)
        else:
            policy.recall(event.report, family=event.family, begun=event.begun)

    async def _decided_again(
        self, policy: Policy, one: RecordedPacket, changes: tuple[ReplayDifference, ...]
    ) -> ReplayedPacket:
        offer = await self._pantry.offer(one)
        replayed, unknown = await asyncio.to_thread(_decide, policy, one, offer)
        differences = differences_between(one.decisions, replayed)
        if unknown:
            asked, now = ", ".join(sorted(offer.layers)), ", ".join(unknown)
            words = f"asked for at {now} too, of which none are recorded"
            then = f"asked for at {asked or 'no layer'}"
            differences = (ReplayDifference(field="candidates", recorded=then[:200], replayed=words[:200]),)
        return ReplayedPacket(
            sequence=one.packet.sequence,
            epoch=one.packet.epoch,
            recorded=one.decisions,
            replayed=replayed,
            differences=differences,
            num_candidates=len(offer.candidates),
            num_lessons=one.choice.num_lessons,
            changes=changes,
        )

    async def _lived(self) -> AsyncGenerator[_Event, None]:
        """Give the run's packets and plans, and everybody's lessons, in the order in which the policy met them."""
        lessons = _Lessons(self._store)
        plans = deque(await self._store.plans_of(self._run_id))
        async with aclosing(self._recorded()) as packets:
            async for packet in packets:
                until_us = packet.choice.moment_us
                async with aclosing(lessons.until(until_us)) as learned:
                    async for moment_us, lesson in learned:
                        while plans and plans[0].received_us < moment_us:
                            yield plans.popleft().plan
                        yield lesson
                while plans and plans[0].received_us <= until_us:
                    yield plans.popleft().plan
                if lessons.num_given != packet.choice.num_lessons:
                    raise CorruptDataError(
                        f"lessons known at packet {packet.packet.sequence} of run {self._run_id} must be "
                        f"{packet.choice.num_lessons}, got {lessons.num_given} that read"
                    )
                yield packet

    async def _recorded(self) -> AsyncGenerator[RecordedPacket, None]:
        """Give the run's packets in order, without a gap."""
        before = 0
        while before < self._newest:
            page = await self._store.packets(self._run_id, _PACKETS_AT_ONCE, before)
            page = [one for one in page if one.sequence <= self._newest]
            if not page:
                return
            for one in page:
                yield self._complete(one, before)
                before = one.sequence

    def _complete(self, one: StoredPacket, before: int) -> RecordedPacket:
        """Give a packet with all that belongs to it, or say what is missing."""
        if one.choice is None:
            raise InvalidStateError(
                f"run {self._run_id} must be replayable, got packet {one.sequence}, which was recorded before "
                "candidates were kept",
                parameter="run_id",
            )
        if one.choice.previous_sequence != before:
            raise InvalidStateError(
                f"run {self._run_id} must be replayable, got one whose packet {one.choice.previous_sequence} is no "
                f"longer kept; of a run its newest {PACKETS_KEPT} packets are",
                parameter="run_id",
            )
        size = max(1, one.decisions[0].race_size) if one.decisions else 1
        if one.packet is None or len(one.decisions) != size:
            raise CorruptDataError(f"packet {one.sequence} of run {self._run_id} and its decisions must read")
        return RecordedPacket(packet=one.packet, decisions=one.decisions, choice=one.choice)


class _Lessons:
    """Everything that was ever learned, a page at a time, in the order in which it was."""

    def __init__(self, store: TamiyoStore) -> None:
        self._store = store
        self._page: deque[tuple[LessonKey, StoredReport | None]] = deque()
        self._after: LessonKey | None = None
        self._is_over = False
        self.num_given = 0

    async def until(self, moment_us: int) -> AsyncGenerator[tuple[int, StoredReport], None]:
        """Give what came up to a moment and was not given yet, with its own moments."""
        while await self._fill() and self._page[0][0][0] <= moment_us:
            key, lesson = self._page.popleft()
            if lesson is not None:
                self.num_given += 1
                yield key[0], lesson

    async def _fill(self) -> bool:
        """Have something at hand; false at the end."""
        if not self._page and not self._is_over:
            self._page.extend(await self._store.learned("", _LESSONS_AT_ONCE, self._after))
            self._is_over = not self._page
            self._after = self._page[-1][0] if self._page else self._after
        return bool(self._page)


@dataclass(frozen=True, slots=True)
class _Offer:
    """What decisions were drawn from, and the layers for which it was asked for."""

    candidates: Sequence[Candidate] = ()
    layers: frozenset[str] = frozenset()


class _Pantry:
    """Candidates of one replay: of what packets share, only what the last one needed is kept."""

    def __init__(self, store: TamiyoStore) -> None:
        self._store = store
        self._list = ""
        self._layers: frozenset[str] = frozenset()
        self._places: Sequence[_Place] = ()
        self._costs: dict[tuple[str, Site], BlueprintCost] = {}

    async def offer(self, one: RecordedPacket) -> _Offer:
        """Give the candidates that a packet's decisions were drawn from, in their order.

        Raises:
            CorruptDataError: A part is missing, or is not what its digest says.
            InvalidStateError: A blueprint is not legal any more where it was.
        """
        if not one.choice.candidates:
            return _Offer()
        if one.choice.candidates != self._list:
            await self._read(one.choice.candidates)
            self._list = one.choice.candidates
            self._costs.clear()
        return _Offer(await asyncio.to_thread(self._priced, one), self._layers)

    def _priced(self, one: RecordedPacket) -> list[Candidate]:
        sites = _sites_of(one.packet)
        found: list[Candidate] = []
        for layer, source, blueprints in self._places:
            site = sites.get((layer, source))
            if site is None:
                raise CorruptDataError(f"packet {one.packet.sequence} must show {layer!r} with source {source!r}")
            found += (
                Candidate(layer=layer, site=site, blueprint=blueprint, cost=self._cost(blueprint, site), source=source)
                for blueprint in blueprints
            )
        return found

    async def _read(self, digest: str) -> None:
        listed = wire.parse((await self._store.parts([digest]))[digest], CandidateList)
        payloads = await self._store.parts(place.menu for place in listed.places)
        menus = {name: wire.parse(payload, CandidateMenu).blueprints for name, payload in payloads.items()}
        payloads = await self._store.parts(name for menu in menus.values() for name in menu)
        blueprints = {name: wire.parse(payload, Blueprint) for name, payload in payloads.items()}
        self._layers = frozenset(listed.layers)
        self._places = [
            (place.layer, place.source, tuple(blueprints[name] for name in menus[place.menu]))
            for place in listed.places
        ]

    def _cost(self, blueprint: Blueprint, site: Site) -> BlueprintCost:
        key = (blueprint.id, site)
        if key not in self._costs:
            cost = legal_cost(blueprint, site)
            if cost is None:
                raise InvalidStateError(
                    f"blueprint {blueprint.id} must be legal at {site}, as it was, got one that is not"
                )
            self._costs[key] = cost
        return self._costs[key]


def _sites_of(packet: SystemStatePacket) -> dict[tuple[str, str], Site]:
    """Give the site of every place of a packet, by layer and source."""
    own = {(layer.layer, ""): layer.site for layer in packet.layers if layer.site is not None}
    skips = {(layer.layer, skip.source): skip.site for layer in packet.layers for skip in layer.skip_sites}
    return own | skips


def _decide(policy: Policy, one: RecordedPacket, offer: _Offer) -> tuple[tuple[AdaptationDecision, ...], Sequence[str]]:
    """Give what is decided now, as it would be read back; what was decided then is remembered.

    Nothing, where candidates are wanted at layers for which they were not asked for then; these are given too.
    """
    wanted = policy.begin(one.packet)
    unknown = sorted(wanted - offer.layers)
    candidates = [candidate for candidate in offer.candidates if candidate.layer in wanted]
    found = policy.reconsider(one.packet, candidates, one.decisions)
    if unknown:
        return (), unknown
    return tuple(wire.parse(wire.serialize(decision), AdaptationDecision) for decision in found), ()
