"""A run's past, given back to a policy in the order in which it was lived.

Packets, reports and plans of a run shape what is remembered of it, and so does their order: rests and embargoes count
from the epoch at which a report came, and what a plan gave up holds no place from then on. The order is that of their
moments: every packet is kept with the newest moment that was known when it was decided on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from esper.contracts.decision import AdaptationPlan
from esper.contracts.run import FieldReport, SystemStatePacket
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.store import TamiyoStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Note:
    """Something that came between two packets."""

    moment_us: int
    content: FieldReport | AdaptationPlan

    @property
    def created_at(self) -> datetime:
        """When it was made, by its maker's clock."""
        return self.content.created_at

    def give_to(self, policy: Policy) -> None:
        """Have a policy take it in, as far as it is about its run."""
        if isinstance(self.content, AdaptationPlan):
            policy.note_plan(self.content)
        else:
            policy.note_report(self.content)


async def restore_run(store: TamiyoStore, policy: Policy, run_id: str) -> None:
    """Have a policy remember a run as the store has it; a run that is not there is left alone.

    Raises:
        UnavailableError: The store cannot be reached.
    """
    stored = await store.run(run_id)
    if not stored.packets:
        return
    notes = await _notes(store, run_id)
    num_notes = len(notes)
    policy.forget(run_id)
    for packet in stored.packets:
        choice = stored.choices.get(packet.sequence)
        due = _due(notes, packet, None if choice is None else choice.moment_us)
        for note in due:
            note.give_to(policy)
            notes.remove(note)
        policy.restore(packet, stored.decisions.get(packet.sequence, ()))
    for note in notes:
        note.give_to(policy)
    log.info("run_restored", extra={"run_id": run_id, "packets": len(stored.packets), "notes": num_notes})


async def _notes(store: TamiyoStore, run_id: str) -> list[_Note]:
    """Give the reports and plans of a run in the order in which they came."""
    reports = [_Note(one.key[0], one.report) for one in await store.reports_of(run_id)]
    plans = [_Note(one.received_us, one.plan) for one in await store.plans_of(run_id)]
    return sorted([*reports, *plans], key=lambda note: note.moment_us)


def _due(notes: list[_Note], packet: SystemStatePacket, moment_us: int | None) -> list[_Note]:
    """Give what had come before a packet; where that was not kept, what was made before it, in that order."""
    if moment_us is not None:
        return [note for note in notes if note.moment_us <= moment_us]
    return sorted((note for note in notes if note.created_at <= packet.created_at), key=lambda note: note.created_at)
