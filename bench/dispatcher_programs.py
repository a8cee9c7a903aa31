"""Programs that prove the dispatcher on the simulated machine, and the defects planted in them.

A layer runs its seeds side by side through :class:`esper.execution.dispatch.SeedDispatcher`, as training does; then
autograd replays each on the stream of its forward. In a *tight* program everything that orders or protects is needed:
what it protects is used at once, and memory comes back as early as it may. So each record, wait or ``record_stream``
that is left out makes a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from esper.execution._native import Simulation, StreamDispatcher
from esper.execution.dispatch import SeedDispatcher

AMBIENT: Final = 0
KINDS: Final = ("record", "wait", "record_stream")
"""What can be left out."""


class SimulatedPlatform:
    """Streams of the simulated machine; a value is the number of its buffer."""

    def __init__(self, machine: Simulation) -> None:
        self.machine = machine
        self.current = AMBIENT

    def ambient(self) -> int:
        """Give the stream that the caller's work goes to."""
        return self.current

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Send the work done meanwhile to a stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, value: int, stream: int) -> None:
        """Tell the allocator that a stream uses the buffer."""
        self.machine.record_stream(value, stream)

    def written(self) -> int:
        """Give a new buffer, written on the current stream."""
        buffer = self.machine.alloc(self.current)
        self.machine.write(self.current, buffer)
        return buffer

    def scratch(self) -> None:
        """Write to memory that is free again at once."""
        self.machine.free(self.written())

    def order(self, before: int, after: int) -> None:
        """Order a stream after another as autograd does, by an event."""
        self.machine.wait(after, self.machine.record(before))


@dataclass(frozen=True, kw_only=True, slots=True)
class TightProgram:
    """Forward and backward of a layer, some rounds of it."""

    num_streams: int
    """Work streams, at least as many as seeds."""
    num_seeds: int
    """Seeds, at least 1."""
    is_captured: bool = False
    """Whether each round is a graph that is captured and replayed."""
    failing: bool = False
    """Whether the last seed gives nothing, as one whose kernel raised does."""
    num_rounds: int = 2
    """At least 2 show what events and memory hold from before."""

    def run(self, drops: tuple[tuple[str, int], ...] = ()) -> Simulation:
        """Run it with some operations (kind, number) left out; gives the machine."""
        native = StreamDispatcher("simulated", self.num_streams)
        machine = native.simulation
        for kind, number in drops:
            machine.drop(kind, number)
        platform = SimulatedPlatform(machine)
        dispatcher = SeedDispatcher(native, platform)
        for _ in range(self.num_rounds):
            if not self.is_captured:
                self._round(dispatcher, platform)
                continue
            machine.begin_capture(AMBIENT)
            self._round(dispatcher, platform)
            machine.replay(machine.end_capture(AMBIENT), AMBIENT)
        return machine

    def needed(self) -> tuple[str, ...]:
        """Give the kinds of which none may be missing; in a capture one recorded stream of a block is enough."""
        return KINDS[:2] if self.is_captured and self.num_seeds > 1 else KINDS

    def _round(self, dispatcher: SeedDispatcher[int], platform: SimulatedPlatform) -> None:
        machine = platform.machine
        x, h = platform.written(), platform.written()
        streams: list[int] = []
        pieces: list[Callable[[], int | None]] = [
            partial(_seed, platform, (x, h), streams, raises=self.failing and number == self.num_seeds - 1)
            for number in range(self.num_seeds)
        ]
        deltas = [delta for delta in dispatcher.run(pieces, (x, h)) if delta is not None]
        for buffer in (x, h, *deltas):
            machine.write(AMBIENT, buffer)  # as an operation in place does
        gradient = platform.written()
        for stream in streams:
            platform.order(AMBIENT, stream)
            for buffer in (gradient, x, h):
                machine.read(stream, buffer)
        _free_early(platform, (x, h), deltas, streams)
        for stream in streams:
            platform.order(stream, AMBIENT)
        machine.write(AMBIENT, gradient)
        machine.free(gradient)


def _seed(platform: SimulatedPlatform, inputs: tuple[int, int], streams: list[int], *, raises: bool) -> int | None:
    """Read the inputs and write a delta on the current stream, which is noted."""
    streams.append(platform.current)
    for buffer in inputs:
        platform.machine.read(platform.current, buffer)
    return None if raises else platform.written()


def _free_early(platform: SimulatedPlatform, inputs: tuple[int, int], deltas: list[int], streams: list[int]) -> None:
    """Free everything while streams are still at it, and have its memory used anew."""
    machine = platform.machine
    for delta in deltas:
        machine.write(AMBIENT, delta)
    for delta in deltas:
        machine.free(delta)
    for stream in streams[: len(deltas)]:
        with platform.on(stream):
            platform.scratch()
    for buffer in inputs:
        machine.free(buffer)
    for again in [platform.written() for _ in inputs]:
        machine.free(again)


def tight_programs(most_streams: int = 4) -> list[TightProgram]:
    """Give the programs of the mutation set: every number of streams and seeds, eager and captured, failing or not."""
    return [
        TightProgram(num_streams=streams, num_seeds=seeds, is_captured=captured, failing=failing)
        for streams in range(1, most_streams + 1)
        for seeds in range(1, streams + 1)
        for captured in (False, True)
        for failing in (False, True)
    ]


def missed_defects(program: TightProgram) -> tuple[int, list[str]]:
    """Plant each single defect in turn; gives how many there were, and those that the machine did not report."""
    clean = program.run()
    planted = [(kind, number) for kind in program.needed() for number in range(clean.count(kind))]
    missed = [f"{kind} {at} of {program}" for kind, at in planted if not program.run(((kind, at),)).violations()]
    return len(planted), missed
