"""StreamDispatcher from Python: falling through on the CPU, proven on the simulated machine."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import InvalidInputError, InvalidStateError, UnavailableError
from esper.execution._native import Simulation, StreamDispatcher, cuda_available, cuda_built, probe

AMBIENT = 0


def test_cpu_calls_run_in_order_on_the_calling_thread() -> None:
    trace: list[tuple[int, int]] = []

    def note(i: int) -> int:
        trace.append((i, threading.get_ident()))
        return i

    with StreamDispatcher("cpu", 2) as dispatcher:
        assert dispatcher.dispatch([partial(note, i) for i in range(5)]) == [(True, i) for i in range(5)]
    assert trace == [(i, threading.get_ident()) for i in range(5)]


def test_one_failure_loses_no_other_result() -> None:
    outcomes = StreamDispatcher("cpu").dispatch([lambda: 1, lambda: {1: 2}[0], lambda: 3])
    assert outcomes[0] == (True, 1)
    assert outcomes[1][0] is False
    assert isinstance(outcomes[1][1], KeyError)
    assert outcomes[2] == (True, 3)


def test_an_interrupt_ends_everything() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StreamDispatcher("cpu").dispatch([interrupt, lambda: 1])


def test_close_is_final_and_may_be_repeated() -> None:
    dispatcher = StreamDispatcher("simulated", 2)
    dispatcher.close()
    dispatcher.close()
    assert dispatcher.closed
    with pytest.raises(InvalidStateError, match="must be open, got a closed one"):
        dispatcher.dispatch([lambda: 1])
    with pytest.raises(InvalidStateError, match="must be open, got a closed one"):
        dispatcher.fork(AMBIENT, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StreamDispatcher("gpu"), InvalidInputError, "backend must be one of 'cpu', 'cuda', 'simulated'"),
        (lambda: StreamDispatcher("cpu", 0), InvalidInputError, "num_streams must be between 1 and 256, got 0"),
        (lambda: StreamDispatcher("cpu").fork(0, 1), InvalidStateError, "streams of its own .* got 'cpu'"),
        (lambda: StreamDispatcher("cpu").simulation, InvalidStateError, "got 'cpu'"),
        (lambda: StreamDispatcher("simulated").fork(0, 0), InvalidInputError, "count must be at least 1"),
        (lambda: StreamDispatcher("simulated").simulation.free(3), InvalidInputError, "one that alloc gave, got 3"),
        (lambda: StreamDispatcher("simulated").simulation.drop("join", 0), InvalidInputError, "kind must name an op"),
        (lambda: StreamDispatcher("simulated").simulation.drop("read", 0), InvalidInputError, "'record', 'wait' or"),
        (lambda: StreamDispatcher("simulated").simulation.wait(0, 99), InvalidInputError, "event must be one that"),
        (lambda: StreamDispatcher("simulated").simulation.replay(0, 0), InvalidInputError, "graph must be one that"),
        (lambda: StreamDispatcher("simulated").simulation.end_capture(0), InvalidStateError, "a capture began on"),
        (lambda: StreamDispatcher("simulated").probe_all([]), InvalidStateError, "backend must be 'cpu' for probe_all"),
        (lambda: StreamDispatcher("cpu").probe_all([(0, 1, "float32")]), InvalidInputError, "data_ptr must"),
        (lambda: StreamDispatcher("cpu").probe_all([(0, 0, "int8")]), InvalidInputError, "dtype must"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_native_probes_run_side_by_side_and_keep_their_order() -> None:
    tensors = [torch.arange(count, dtype=torch.float32) for count in (1, 10, 5000, 3, 70_000)]
    operands = [(tensor.data_ptr(), tensor.numel(), "float32") for tensor in tensors]
    with StreamDispatcher("cpu", 3) as dispatcher:
        for _ in range(20):
            assert dispatcher.probe_all(operands) == [probe(*operand) for operand in operands]
        assert dispatcher.probe_all([]) == []
    with pytest.raises(InvalidStateError, match="must be open, got a closed one"):
        dispatcher.probe_all(operands)


@pytest.mark.skipif(cuda_available(), reason="a CUDA device is there")
def test_without_a_device_cuda_says_so() -> None:
    expected = "cudaGetDeviceCount" if cuda_built() else "a build without a CUDA compiler"
    with pytest.raises(UnavailableError, match=expected):
        StreamDispatcher("cuda")


def _layer(dispatcher: StreamDispatcher, num_seeds: int, *, records: bool = True) -> None:
    """Read one input side by side, add the outputs up on the ambient stream, free everything."""
    machine = dispatcher.simulation
    x = machine.alloc(AMBIENT)
    machine.write(AMBIENT, x)
    streams = dispatcher.fork(AMBIENT, num_seeds)
    outputs = []
    for stream in streams:
        if records:
            machine.record_stream(x, stream)
        machine.read(stream, x)
        outputs.append(machine.alloc(stream))
        machine.write(stream, outputs[-1])
    dispatcher.join(AMBIENT, streams)
    for y in outputs:
        if records:
            machine.record_stream(y, AMBIENT)
        machine.read(AMBIENT, y)
        machine.free(y)
    machine.free(x)


@settings(max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_sequence_of_layers_is_clean(num_streams: int, layers: list[int]) -> None:
    dispatcher = StreamDispatcher("simulated", num_streams)
    for num_seeds in layers:
        _layer(dispatcher, num_seeds)
    assert dispatcher.simulation.violations() == []


@pytest.mark.parametrize("dropped", range(8))
def test_every_planted_missing_wait_is_caught(dropped: int) -> None:
    dispatcher = StreamDispatcher("simulated", 2)
    dispatcher.simulation.drop("wait", dropped)
    for _ in range(2):
        _layer(dispatcher, 2)
    assert dispatcher.simulation.count("wait") == 8
    assert dispatcher.simulation.violations()


def test_a_violation_names_both_operations() -> None:
    machine = StreamDispatcher("simulated", 2).simulation
    buffer = machine.alloc(AMBIENT)
    machine.write(1, buffer)
    machine.write(2, buffer)
    assert machine.violations() == [
        "race: operation 1 (write on stream 1 of buffer 1) and operation 2 (write on stream 2 of buffer 1)"
    ]
    assert machine.operations()[0] == "alloc on stream 0 of buffer 1"


def test_memory_reused_under_a_running_stream_is_caught() -> None:
    dispatcher = StreamDispatcher("simulated", 1)
    machine = dispatcher.simulation
    saved = machine.alloc(AMBIENT)
    machine.write(AMBIENT, saved)
    (stream,) = dispatcher.fork(AMBIENT, 1)
    machine.read(stream, saved)
    machine.free(saved)
    machine.write(AMBIENT, machine.alloc(AMBIENT))
    (violation,) = machine.violations()
    assert violation.startswith("use after reuse")


def test_the_simulation_keeps_its_dispatcher_alive() -> None:
    machine = StreamDispatcher("simulated", 1).simulation
    assert isinstance(machine, Simulation)
    assert machine.alloc(AMBIENT) == 1
