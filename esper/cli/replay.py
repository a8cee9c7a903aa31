"""``esper runs replay``: whether a run's decisions are the same when they are taken again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from esper.cli.connection import watch
from esper.cli.output import Json, console, plain, print_json
from esper.v1 import tamiyo_service_pb2


class _Tally:
    """What became of a replay so far; of its packets, only the first that differs is kept."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.packets = self.decisions = self.acted_on = self.differing = 0
        self.changes: dict[str, Any] = {}
        self.first: Any = None

    def take(self, response: tamiyo_service_pb2.ReplayRunResponse) -> None:
        """Count one packet."""
        packet = response.packet
        self.packets += 1
        self.decisions += len(packet.recorded)
        self.acted_on += sum(one.actionable for one in packet.recorded)
        self.changes.update((one.field, one) for one in packet.changes)
        if packet.differences:
            self.differing += 1
            self.first = packet if self.first is None else self.first

    def as_data(self) -> dict[str, Any]:
        """Give it for programs."""
        first = None
        if self.first is not None:
            differences = [plain(one) for one in self.first.differences]
            first = {"sequence": self.first.sequence, "epoch": self.first.epoch, "differences": differences}
        return {
            "run": self.run_id,
            "packets": self.packets,
            "decisions": self.decisions,
            "acted_on": self.acted_on,
            "differing_packets": self.differing,
            "changes": [plain(one) for one in self.changes.values()],
            "first_difference": first,
        }

    def lines(self) -> list[str]:
        """Give it for people."""
        told = f"run {self.run_id}: {self.packets} packets, {self.decisions} decisions, {self.acted_on} acted on"
        changes = [f"{_difference(one)} (setting or version)" for one in self.changes.values()]
        if self.first is None:
            return [f"{told}: all as they were, to the bit", *changes]
        return [
            f"{told}: those on {self.differing} packets differ",
            *changes,
            f"first on packet {self.first.sequence}, epoch {self.first.epoch}:",
            *(f"  {_difference(one)}" for one in self.first.differences),
        ]


def replay(
    run_id: Annotated[str, typer.Argument(help="Run.")],
    present_settings: Annotated[
        bool,
        typer.Option("--present-settings", help="Decide with the settings of now, in place of those recorded."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a run's decisions again from what was recorded; exit code 1 where one is another, with the first of them."""
    tally = _Tally(run_id)
    request = tamiyo_service_pb2.ReplayRunRequest(run_id=run_id, present_settings=present_settings)
    watch("tamiyo", "ReplayRun", request, tally.take)
    if as_json:
        print_json(tally.as_data())
    else:
        for line in tally.lines():
            console.print(line, highlight=False, markup=False)
    if tally.first is not None:
        raise typer.Exit(1)


def _difference(one: Any) -> str:
    return f"{one.field} was {one.recorded or 'not there'}, is {one.replayed or 'not there'}"
