"""Seeds of one layer side by side, proven on a machine that reports every access which nothing orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dispatcher_programs import SimulatedPlatform
from esper.execution._native import Simulation, StreamDispatcher, cuda_available
from esper.execution.dispatch import SeedDispatcher, run_side_by_side


class SilentPlatform(SimulatedPlatform):
    """Tells the allocator nothing."""

    def record(self, value: int, stream: int) -> None:
        """Leave the allocator in the dark."""


def layer(num_streams: int, num_seeds: int, *, records: bool = True, dropped: int | None = None) -> Simulation:
    """Run two passes of a layer whose seeds read x and h and write a delta; everything is freed at once."""
    native = StreamDispatcher("simulated", num_streams)
    machine = native.simulation
    if dropped is not None:
        machine.drop("wait", dropped)
    platform = SimulatedPlatform(machine) if records else SilentPlatform(machine)
    dispatcher = SeedDispatcher(native, platform)
    for _ in range(2):
        x, h = machine.alloc(0), machine.alloc(0)
        machine.write(0, x)
        machine.write(0, h)

        def piece(x: int = x, h: int = h) -> int:
            machine.read(platform.current, x)
            machine.read(platform.current, h)
            delta = machine.alloc(platform.current)
            machine.write(platform.current, delta)
            return delta

        for delta in dispatcher.run([piece] * num_seeds, (x, h)):
            assert delta is not None
            machine.read(0, delta)
            machine.free(delta)
        machine.free(x)
        machine.free(h)
    return machine


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 7))
def test_nothing_is_left_unordered(num_streams: int, num_seeds: int) -> None:
    assert layer(num_streams, num_seeds).violations() == []


@pytest.mark.parametrize("dropped", range(8))
def test_every_wait_is_needed(dropped: int) -> None:
    assert layer(2, 2, dropped=dropped).violations()


def test_the_allocator_is_told_of_inputs_on_work_streams_and_deltas_on_the_ambient_one() -> None:
    told = [line for line in layer(2, 2).operations() if line.startswith("record_stream")]
    assert len(told) == 2 * (2 * 2 + 2)
    assert sum("on stream 0 " in line for line in told) == 4
    assert not [line for line in layer(2, 2, records=False).operations() if line.startswith("record_stream")]


def test_work_goes_to_streams_of_its_own_and_results_keep_their_order() -> None:
    native = StreamDispatcher("simulated", 3)
    platform = SimulatedPlatform(native.simulation)
    seen: list[int] = []

    def piece(number: int) -> Callable[[], int]:
        def run() -> int:
            seen.append(platform.current)
            buffer = native.simulation.alloc(platform.current)
            found.append(buffer)
            return buffer

        found: list[int] = made
        del number
        return run

    made: list[int] = []
    results = SeedDispatcher(native, platform).run([piece(number) for number in range(3)], ())
    assert results == made
    assert len(set(seen)) == 3
    assert 0 not in seen
    assert platform.current == 0


def test_a_piece_that_raises_leaves_the_streams_joined() -> None:
    native = StreamDispatcher("simulated", 2)
    platform = SimulatedPlatform(native.simulation)

    def fails() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SeedDispatcher(native, platform).run([fails, fails], ())
    assert platform.current == 0
    assert native.simulation.count("wait") == 4


def test_a_dropped_contribution_is_no_buffer() -> None:
    native = StreamDispatcher("simulated", 2)
    assert SeedDispatcher(native, SimulatedPlatform(native.simulation)).run([lambda: None] * 2, ()) == [None, None]


def test_on_the_cpu_pieces_run_in_order() -> None:
    order: list[int] = []

    def piece(number: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            order.append(number)
            return torch.tensor(float(number))

        return run

    results = run_side_by_side([piece(number) for number in range(3)], (torch.zeros(1),))
    assert order == [0, 1, 2]
    assert [float(result) for result in results if result is not None] == [0.0, 1.0, 2.0]


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradients_are_those_of_seeds_in_order(device: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, device=device, requires_grad=True) for _ in range(6)]
    found: list[list[torch.Tensor]] = []
    for side_by_side in (True, False):
        x = torch.ones(16, 64, device=device, requires_grad=True)
        for _ in range(20):  # memory of a step is met again by the next
            h = x * 2
            pieces = [partial(torch.matmul, h, weight) for weight in weights]
            deltas = run_side_by_side(pieces, (h,)) if side_by_side else [piece() for piece in pieces]
            total = h + sum(delta.tanh() for delta in deltas if delta is not None)
            del h, deltas, pieces
            grads = torch.autograd.grad(total.square().mean(), [x, *weights])
        found.append([total.detach(), *grads])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)  # cuBLAS promises equal bits on one stream alone
