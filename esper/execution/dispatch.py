"""Running the seeds of one layer side by side on streams of their own; one seed, or a CPU, runs in order.

The order that makes this correct: the ambient stream is forked (every work stream waits for x and h), each seed runs
on its stream, and the ambient stream is joined to all of them before anything reads a delta. The caching allocator is
told that x and h are read on work streams, and that deltas live on the ambient one. Autograd replays each node on the
stream of its forward and orders the streams itself; what it saved of x and h may be freed while a work stream still
reads it, which is what the telling is for.

Nothing here asks the device or waits for it, so a run may be captured into a CUDA graph. A device has one set of work
streams: while one thread captures, no other may run seeds on that device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from esper.execution._native import StreamDispatcher, cuda_available

NUM_STREAMS: Final = 4
"""Work streams per device; further seeds share them."""

Value = TypeVar("Value")
Seen_contra = TypeVar("Seen_contra", contravariant=True)


class Platform(Protocol[Seen_contra]):
    """What a machine with streams must offer; a stream is its raw handle."""

    def ambient(self) -> int:
        """Give the stream that the caller's work goes to."""
        ...

    def on(self, stream: int) -> AbstractContextManager[object]:
        """Send the work done meanwhile to a stream."""
        ...

    def record(self, value: Seen_contra, stream: int) -> None:
        """Tell the allocator that a stream uses the value's memory."""
        ...


class SeedDispatcher(Generic[Value]):
    """Runs pieces of work side by side on one device. Any thread."""

    def __init__(self, dispatcher: StreamDispatcher, platform: Platform[Value]) -> None:
        self._dispatcher = dispatcher
        self._platform = platform

    def run(self, pieces: Sequence[Callable[[], Value | None]], inputs: Sequence[Value]) -> list[Value | None]:
        """Give the result of each piece, in order; what a piece raises ends the run after the streams were joined."""
        platform, ambient = self._platform, self._platform.ambient()
        streams = self._dispatcher.fork(ambient, len(pieces))
        results: list[Value | None] = []
        try:
            for piece, stream in zip(pieces, streams, strict=True):
                for value in inputs:
                    platform.record(value, stream)
                with platform.on(stream):
                    results.append(piece())
        finally:
            self._dispatcher.join(ambient, streams)
        for result in results:
            if result is not None:
                platform.record(result, ambient)
        return results


class CudaPlatform:
    """Streams of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.ExternalStream] = {}

    def ambient(self) -> int:
        """Give the device's current stream."""
        handle: int = torch.cuda.current_stream(self._device).cuda_stream
        return handle

    def on(self, stream: int) -> AbstractContextManager[object]:
        """Make a stream the current one meanwhile."""
        return torch.cuda.stream(self._stream(stream))

    def record(self, value: Tensor, stream: int) -> None:
        """Keep the value's memory from being reused before the stream has passed this point."""
        value.record_stream(self._stream(stream))

    def _stream(self, handle: int) -> torch.cuda.ExternalStream:
        """Give torch's view of a raw stream; the native core never destroys one, so the views may be kept."""
        found = self._streams.get(handle)
        if found is None:
            found = torch.cuda.ExternalStream(handle, device=self._device)  # type: ignore[no-untyped-call]
            self._streams[handle] = found
        return found


_dispatchers: dict[int, SeedDispatcher[Tensor]] = {}
_making = threading.Lock()


def run_side_by_side(pieces: Sequence[Callable[[], Tensor | None]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Give the result of each piece: on streams where there are several and the device has them, else in order.

    ``inputs`` are what the pieces read, on one device.
    """
    if len(pieces) > 1 and inputs[0].is_cuda and cuda_available():
        return _dispatcher_of(inputs[0].device).run(pieces, inputs)
    return [piece() for piece in pieces]


def _dispatcher_of(device: torch.device) -> SeedDispatcher[Tensor]:
    index = device.index  # a tensor's device always has one
    with _making:
        found = _dispatchers.get(index)
        if found is None:
            native = StreamDispatcher("cuda", num_streams=NUM_STREAMS, device=index)
            found = _dispatchers[index] = SeedDispatcher(native, CudaPlatform(torch.device("cuda", index)))
    return found
