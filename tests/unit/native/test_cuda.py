"""The CUDA dispatcher and probe on a real device, with torch's own streams and allocator."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from esper.contracts.errors import InvalidInputError
from esper.execution._native import CudaProbe, StreamDispatcher, blend, cuda_available, cuda_blend, probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_available(), reason="needs a CUDA device")]


def _stream(handle: int) -> Any:
    external: Any = torch.cuda.ExternalStream
    return external(handle)


def _collected(prober: CudaProbe, ticket: int) -> Any:
    end = time.monotonic() + 30
    while (figures := prober.collect(ticket)) is None:
        assert time.monotonic() < end, "the probe did not finish in time"
    return figures


def test_forked_work_joins_the_ambient_stream() -> None:
    with StreamDispatcher("cuda", 3) as dispatcher:
        ambient = torch.cuda.current_stream()
        for step in range(50):
            x = torch.full((1 << 20,), float(step), device="cuda")
            handles = dispatcher.fork(ambient.cuda_stream, 4)
            outputs = []
            for i, handle in enumerate(handles):
                stream = _stream(handle)
                with torch.cuda.stream(stream):
                    x.record_stream(stream)
                    outputs.append(x * (i + 1))
            dispatcher.join(ambient.cuda_stream, handles)
            total = sum(outputs[1:], outputs[0])
            for y in outputs:
                y.record_stream(ambient)
            assert (total == 10.0 * step).all().item()


def test_fork_and_join_can_be_captured_into_a_graph() -> None:
    dispatcher = StreamDispatcher("cuda", 2)
    x = torch.ones(1000, device="cuda")
    out = torch.zeros(2, 1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ambient = torch.cuda.current_stream().cuda_stream
        handles = dispatcher.fork(ambient, 2)
        for row, handle in enumerate(handles):
            with torch.cuda.stream(_stream(handle)):
                torch.mul(x, row + 2, out=out[row])
        dispatcher.join(ambient, handles)
    x.fill_(5.0)
    graph.replay()
    torch.cuda.synchronize()
    assert out[:, 0].tolist() == [10.0, 15.0]


def test_memory_told_of_a_stream_may_be_freed_after_the_dispatcher() -> None:
    dispatcher = StreamDispatcher("cuda", 1)
    ambient = torch.cuda.current_stream()
    (handle,) = dispatcher.fork(ambient.cuda_stream, 1)
    x = torch.ones(1 << 20, device="cuda")
    x.record_stream(_stream(handle))
    dispatcher.join(ambient.cuda_stream, [handle])
    dispatcher.close()
    del x  # the allocator marks the end of the stream's work now
    torch.cuda.synchronize()
    assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_blend_gives_the_bits_of_the_cpu(name: str, offset: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(4099 + offset).to(getattr(torch, name)) for _ in range(4)]
    alpha, size = torch.tensor([0.3, 0.0, 0.9]), 4099
    here = [tensor[offset:] for tensor in tensors]  # an odd offset leaves no address aligned to 16 bytes
    there = [tensor.cuda()[offset:] for tensor in tensors]
    there_alpha, stream = alpha.cuda(), torch.cuda.current_stream().cuda_stream
    for values, weights, call in ((here, alpha, blend), (there, there_alpha, partial(cuda_blend, stream=stream))):
        addresses = [tensor.data_ptr() for tensor in values]
        call(addresses[0], addresses[1:], weights.data_ptr(), addresses[0], size, name)
    assert torch.equal(there[0].cpu(), here[0])


def test_a_captured_blend_reads_alpha_anew() -> None:
    h, delta = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    alpha, out = torch.ones(1, device="cuda"), torch.empty(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        cuda_blend(h.data_ptr(), [delta.data_ptr()], alpha.data_ptr(), out.data_ptr(), 1000, "float32", stream)
    for value in (0.25, 0.75):
        alpha.fill_(value)
        graph.replay()
        assert out.tolist() == [value] * 1000


def test_unknown_devices_and_priorities_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="device must be below the number of CUDA devices"):
        StreamDispatcher("cuda", device=4096)
    with pytest.raises(InvalidInputError, match="priority must be between"):
        StreamDispatcher("cuda", priority=4096)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("numel", [1, 100, 4096, 100_003])
def test_the_kernel_and_the_cpu_agree(name: str, numel: int) -> None:
    torch.manual_seed(numel)
    values = torch.randn(numel).relu().to(getattr(torch, name))
    values[numel // 2] = float("inf")
    prober = CudaProbe(4)
    there = values.cuda()
    ticket = prober.launch(there.data_ptr(), numel, name, torch.cuda.current_stream().cuda_stream)
    assert ticket is not None
    figures = _collected(prober, ticket)
    assert figures == pytest.approx(probe(values.data_ptr(), numel, name), rel=1e-5, nan_ok=True)


def test_full_slots_refuse_and_count() -> None:
    prober, x = CudaProbe(1), torch.ones(10, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    first = prober.launch(x.data_ptr(), 10, "float32", stream)
    assert first is not None
    assert prober.launch(x.data_ptr(), 10, "float32", stream) is None
    assert prober.refused == 1
    _collected(prober, first)
    with pytest.raises(InvalidInputError, match="ticket must be one that is under way"):
        prober.collect(first)
    assert prober.launch(x.data_ptr(), 10, "float32", stream) is not None
