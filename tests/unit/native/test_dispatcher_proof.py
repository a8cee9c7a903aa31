"""The proof of the dispatcher from Python: random programs, and a second opinion on what the machine reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dispatcher_programs import AMBIENT, KINDS, TightProgram, missed_defects, tight_programs
from esper.execution._native import Simulation, StreamDispatcher

Operation = tuple[str, int, int, int | None, int | None, bool, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One fork and join, with what happens in between."""

    pieces: tuple[Layer | None, ...]
    """Each piece of work: a layer of its own, or none."""
    failing: int
    """The piece that raises; none where there are fewer."""
    is_replayed: bool
    """Whether autograd goes through it."""
    is_captured: bool
    """Whether it is a graph, where it is not nested."""


def layers(inner: st.SearchStrategy[Layer | None]) -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer,
        pieces=st.lists(inner, min_size=1, max_size=4).map(tuple),
        failing=st.integers(0, 12),
        is_replayed=st.booleans(),
        is_captured=st.booleans(),
    )


programs = st.lists(layers(st.none() | layers(st.none())), min_size=1, max_size=3)


@dataclass(kw_only=True)
class Runner:
    """Runs programs through the real dispatcher on the simulated machine."""

    num_streams: int
    drops: Sequence[tuple[str, int]] = ()
    native: StreamDispatcher = field(init=False)
    machine: Simulation = field(init=False)

    def __post_init__(self) -> None:
        self.native = StreamDispatcher("simulated", self.num_streams)
        self.machine = self.native.simulation
        for kind, number in self.drops:
            self.machine.drop(kind, number)

    def run(self, program: Sequence[Layer]) -> Simulation:
        for layer in program:
            if layer.is_captured:
                self.machine.begin_capture(AMBIENT)
            self.layer(layer, AMBIENT)
            if layer.is_captured:
                graph = self.machine.end_capture(AMBIENT)
                self.machine.replay(graph, AMBIENT)
                self.machine.replay(graph, AMBIENT)
        return self.machine

    def layer(self, layer: Layer, ambient: int) -> None:
        x = self.written(ambient)
        streams = self.native.fork(ambient, len(layer.pieces))
        outputs, reached = [], streams[: layer.failing + 1]
        for number, (piece, stream) in enumerate(zip(layer.pieces, streams, strict=True)):
            self.machine.record_stream(x, stream)
            self.machine.read(stream, x)
            if number == layer.failing:
                break
            if piece is not None:
                self.layer(piece, stream)
            outputs.append(self.written(stream))
        self.native.join(ambient, streams)
        for y in outputs:
            self.machine.record_stream(y, ambient)
            self.machine.read(ambient, y)
            self.machine.free(y)
        if layer.is_replayed:
            self.replay(x, reached, ambient)
        else:
            self.machine.free(x)

    def replay(self, x: int, streams: Sequence[int], ambient: int) -> None:
        for stream in reversed(streams):
            self.machine.wait(stream, self.machine.record(ambient))
            self.machine.read(stream, x)
        self.machine.free(x)
        self.machine.free(self.written(ambient))
        for stream in streams:
            self.machine.wait(ambient, self.machine.record(stream))

    def written(self, stream: int) -> int:
        buffer = self.machine.alloc(stream)
        self.machine.write(stream, buffer)
        return buffer


def has_race(log: Sequence[Operation]) -> bool:
    """Say whether two accesses to one memory are unordered, by the sets of all that comes before each operation."""
    before: list[set[int]] = []
    last: dict[int, int] = {}
    users: dict[int, set[int]] = defaultdict(set)
    over: dict[int | None, set[int]] = defaultdict(set)  # by block: what was done when it was handed out again
    freed: dict[int | None, set[int]] = {}
    accesses: dict[int | None, list[int]] = defaultdict(list)
    for at, (kind, stream, buffer, block, source, dropped, captured) in enumerate(log):
        known: set[int] = set()
        before.append(known)
        if kind == "record_stream" and not dropped:
            users[buffer].add(stream)
        elif kind == "free":
            ends = [last[user] for user in users[buffer] - {stream} if user in last]
            freed[block] = {op for end in ends for op in before[end] | {end}}
        elif kind == "alloc":
            over[block] |= freed.get(block, set())
        if captured or kind in ("record_stream", "free", "alloc"):
            continue
        for earlier in (last.get(stream), None if dropped or kind != "wait" else source):
            if earlier is not None:
                known |= before[earlier] | {earlier}
        last[stream] = at
        if kind not in ("read", "write"):
            continue
        unordered = [op for op in accesses[block] if op not in known and op not in over[block]]
        if any("write" in (kind, log[op][0]) for op in unordered):
            return True
        accesses[block].append(at)
    return False


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), programs)
def test_nothing_is_reported_on_the_real_code(num_streams: int, program: list[Layer]) -> None:
    machine = Runner(num_streams=num_streams).run(program)
    assert machine.violations() == []
    assert not has_race(machine.log())


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), programs, st.data())
def test_the_machine_agrees_with_a_second_opinion(num_streams: int, program: list[Layer], data: st.DataObject) -> None:
    clean = Runner(num_streams=num_streams).run(program)
    kind = data.draw(st.sampled_from(KINDS))
    number = data.draw(st.integers(0, max(0, clean.count(kind) - 1)))
    machine = Runner(num_streams=num_streams, drops=[(kind, number)]).run(program)
    if any("capture" in violation for violation in machine.violations()):
        return  # reported: the device itself refuses such a graph
    assert bool(machine.violations()) == has_race(machine.log())


@pytest.mark.parametrize("program", tight_programs(3), ids=str)
def test_every_planted_defect_is_found_in_the_real_executor(program: TightProgram) -> None:
    assert program.run().violations() == []
    planted, missed = missed_defects(program)
    assert planted >= 10
    assert missed == []


def test_a_second_opinion_sees_a_race_of_its_own() -> None:
    machine = StreamDispatcher("simulated", 2).simulation
    buffer = machine.alloc(AMBIENT)
    machine.write(1, buffer)
    assert not has_race(machine.log())
    machine.write(2, buffer)
    assert has_race(machine.log())
