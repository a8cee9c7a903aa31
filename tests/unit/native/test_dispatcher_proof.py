"""The proof of the dispatcher from Python: random programs, and a second opinion on what the machine reports."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dispatcher_programs import (
    AMBIENT,
    KINDS,
    SimulatedPlatform,
    TightProgram,
    missed_defects,
    tight_programs,
)
from esper.execution._native import Simulation, StreamDispatcher
from esper.execution.dispatch import SeedDispatcher

Operation = tuple[str, int, int, int | None, int | None, bool, bool]
Drops = tuple[tuple[str, int], ...]


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


class BrokenError(Exception):
    """What a piece of work raises."""


Ending = Literal["gives", "gives nothing", "raises"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A layer in which nothing may be missing, with layers inside its pieces."""

    inside: tuple[Tree | None, ...]
    """What each piece of work holds, at most as many pieces as its own number, so that no stream waits for itself."""
    ending: Ending = "gives"
    """How the last piece ends."""

    def __str__(self) -> str:
        return f"({' '.join(str(one or '.') for one in self.inside)} {self.ending})"


def trees(most_pieces: int, endings: Sequence[Ending]) -> list[Tree]:
    """Give every tree of at most so many pieces, all of whose layers end alike."""
    smaller = [[None], *([None, *trees(number, endings)] for number in range(1, most_pieces))]
    return [
        Tree(inside=inside, ending=ending)
        for pieces in range(1, most_pieces + 1)
        for inside in itertools.product(*smaller[:pieces])
        for ending in endings
        if all(one is None or one.ending == ending for one in inside)
    ]


@st.composite
def mixed_trees(draw: st.DrawFn, most_pieces: int = 4) -> Tree:
    """Any tree; each of its layers ends in a way of its own."""
    num_pieces = draw(st.integers(1, most_pieces))
    inside = [draw(st.none() | mixed_trees(number)) if number else None for number in range(num_pieces)]
    return Tree(inside=tuple(inside), ending=draw(st.sampled_from(ENDINGS)))


class Spied:
    """The native dispatcher; notes which records and waits are whose."""

    def __init__(self, native: StreamDispatcher) -> None:
        self.native = native
        self.calls: list[tuple[str, Drops]] = []

    def fork(self, ambient: int, count: int) -> list[int]:
        with self._noted("fork"):
            return self.native.fork(ambient, count)

    def join(self, ambient: int, streams: list[int]) -> None:
        with self._noted("join"):
            self.native.join(ambient, streams)

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        machine = self.native.simulation
        before = {kind: machine.count(kind) for kind in ("record", "wait")}
        yield
        done = tuple((kind, at) for kind, first in before.items() for at in range(first, machine.count(kind)))
        self.calls.append((name, done))


class TreeRunner(SimulatedPlatform):
    """Runs trees through the real executor, forward and backward, two rounds; may leave something out."""

    def __init__(self, num_streams: int, drops: Drops = ()) -> None:
        native = StreamDispatcher("simulated", num_streams)
        super().__init__(native.simulation)
        for kind, number in drops:
            self.machine.drop(kind, number)
        self.spied = Spied(native)
        self.told: dict[int, list[tuple[str, int]]] = defaultdict(list)
        self.dispatcher: SeedDispatcher[int] = SeedDispatcher(self.spied, self)  # type: ignore[arg-type]

    def run(self, tree: Tree, *, is_captured: bool) -> TreeRunner:
        for _ in range(2):
            if is_captured:
                self.machine.begin_capture(AMBIENT)
            with suppress(BrokenError):
                self.layer(tree)
            if is_captured:
                self.machine.replay(self.machine.end_capture(AMBIENT), AMBIENT)
        return self

    def record(self, value: int, stream: int) -> None:
        self.told[value].append(("record_stream", self.machine.count("record_stream")))
        super().record(value, stream)

    def layer(self, tree: Tree) -> None:
        x, ambient, streams, made = self.written(), self.current, list[int](), list[int]()
        pieces = [partial(self.piece, tree, number, x, streams, made) for number in range(len(tree.inside))]
        results: list[int | None] = []
        try:
            results = self.dispatcher.run(pieces, (x,))
        finally:
            deltas = [result for result in results if result is not None]
            for lost in set(made) - set(deltas):
                self.machine.free(lost)
            for buffer in (x, *deltas):
                self.machine.write(ambient, buffer)  # as an operation in place does
            self.backward(x, deltas, streams)

    def piece(self, tree: Tree, number: int, x: int, streams: list[int], made: list[int]) -> int | None:
        streams.append(self.current)
        self.machine.read(self.current, x)
        inside = tree.inside[number]
        if inside is not None:
            with suppress(BrokenError):  # as a breaker does
                self.layer(inside)
            for stream in streams:  # the layer inside has used them, and joined them
                self.machine.read(stream, x)
        if number == len(tree.inside) - 1 and tree.ending != "gives":
            if tree.ending == "raises":
                raise BrokenError
            return None
        made.append(self.written())
        return made[-1]

    def backward(self, x: int, deltas: list[int], streams: list[int]) -> None:
        """Replay as autograd does; all is freed while streams are still at it, and its memory used anew."""
        ambient, gradient = self.current, self.written()
        for stream in streams:
            self.order(ambient, stream)
            for buffer in (gradient, x):
                self.machine.read(stream, buffer)
        for delta in deltas:
            self.machine.write(ambient, delta)
        for delta in deltas:
            self.machine.free(delta)
        for stream in streams[: len(deltas)]:
            with self.on(stream):
                self.scratch()
        self.machine.free(x)
        self.scratch()
        for stream in streams:
            self.order(stream, ambient)
        self.machine.write(ambient, gradient)
        self.machine.free(gradient)

    def defects(self, *, is_captured: bool) -> list[tuple[str, Drops]]:
        """Give what may be left out of a run that is over: one of each kind, a whole fork or join, a buffer's telling.

        In a capture one recorded stream keeps a block from coming back, so only all of a buffer's are needed.
        """
        kinds = KINDS[:2] if is_captured else KINDS
        single = [(kind, ((kind, at),)) for kind in kinds for at in range(self.machine.count(kind))]
        return [*single, *self.spied.calls, *(("telling", tuple(told)) for told in self.told.values())]


def is_found(machine: Simulation) -> bool:
    """Say whether the machine reports something; by a second opinion too, where the device does not refuse it."""
    reported = machine.violations()
    return bool(reported) and (any("capture" in one for one in reported) or has_race(machine.log()))


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("tree", trees(3, ENDINGS), ids=str)
def test_whatever_is_missing_of_nested_captured_and_failing_programs_is_found(tree: Tree, is_captured: bool) -> None:
    num_streams = len(tree.inside)
    clean = TreeRunner(num_streams).run(tree, is_captured=is_captured)
    assert clean.machine.violations() == []
    assert not has_race(clean.machine.log())
    planted = clean.defects(is_captured=is_captured)
    assert {name for name, _ in planted} >= {"record", "wait", "fork", "join", "telling"}
    missed = [
        f"{name} {drops}"
        for name, drops in planted
        if not is_found(TreeRunner(num_streams, drops).run(tree, is_captured=is_captured).machine)
    ]
    assert missed == []


@settings(max_examples=500, deadline=None)
@given(mixed_trees(), st.integers(0, 2), st.booleans(), st.data())
def test_whatever_is_missing_of_any_program_is_found(
    tree: Tree, spare_streams: int, is_captured: bool, data: st.DataObject
) -> None:
    num_streams = len(tree.inside) + spare_streams
    clean = TreeRunner(num_streams).run(tree, is_captured=is_captured)
    assert clean.machine.violations() == []
    defects = clean.defects(is_captured=is_captured)
    name = data.draw(st.sampled_from(sorted({name for name, _ in defects})))
    drops = data.draw(st.sampled_from([drops for found, drops in defects if found == name]))
    assert is_found(TreeRunner(num_streams, drops).run(tree, is_captured=is_captured).machine)
