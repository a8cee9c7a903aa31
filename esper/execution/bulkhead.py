"""Running a kernel so that nothing it does reaches the host: neither what it raises, nor what it writes or keeps.

A kernel built from a blueprint is made of a closed set of operators: it can't write to its inputs, keep them, or raise
in backward. It gets the host's tensors themselves, with a gate on each: a gradient that is not finite goes no further.

Any other module (``attach_module``, or a seed whose kernel was changed) runs behind a bulkhead. It is given copies of x
and h that lead to a graph of its own; the host's graph holds one node, the bridge, whose backward runs the kernel's.

    forward    writes and references stay with the copies; random streams are put back where the pass failed
    backward   what the kernel raises, and any gradient that is not finite, is dropped as a whole and counted; the
               gradient at h is then to the bit the host's own
    memory     activations of passes that are over and still alive are counted; above ``LEAK_LIMIT`` it is a failure
    time       a pass, forward or backward, that takes longer than the breaker's limit is a failure

The price is one copy of x and h a pass, and in every sixteenth a look at all that the kernel computes. Off the CPU
nothing here waits: gradients are zeroed on the device instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from esper.execution.circuit_breaker import FailureKind, KernelFaultError, fault_of, is_finite
from esper.execution.gradient_gate import GradientGate, note_backward, readable, zeroed
from esper.execution.pass_watch import WATCH_INTERVAL_PASSES, Deadline, MemoryWatch, storages_of

if TYPE_CHECKING:
    from torch.multiprocessing.reductions import StorageWeakRef

    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

LEAK_LIMIT: Final = 16
"""Activations of earlier passes that a kernel may keep; some keep the last one for a purpose."""


def run_kernel(layer: SeedHolder, seed: Seed, x: Tensor, h: Tensor, gate: GradientGate | None) -> Tensor:
    """Give the kernel's delta, checked; its backward pass can't harm the host's, given a gate where there is one.

    Raises:
        KernelFaultError: The delta can't be added to h, or the kernel leaks or takes too long.
        Exception: Whatever the kernel raises.
    """
    if is_closed(seed):
        return _run_gated(seed, gate, x, h)
    state = torch.get_rng_state()
    try:
        return _run_apart(layer, seed, x, h)
    except Exception:
        torch.set_rng_state(state)
        raise


def is_closed(seed: Seed) -> bool:
    """Whether the seed's kernel is a blueprint's own module as it was built, without hooks."""
    kernel = seed.kernel
    if seed.ir is None or not isinstance(kernel, GraphModule):
        return False
    return not (kernel._forward_hooks or kernel._forward_pre_hooks or kernel._backward_hooks)


# --- closed kernels ---


def _run_gated(seed: Seed, gate: GradientGate | None, x: Tensor, h: Tensor) -> Tensor:
    delta = _call(seed, *((x, h) if gate is None else gate.inputs(seed, x, h)))
    _require_sound(delta, h)
    return delta


def _call(seed: Seed, x: Tensor, h: Tensor) -> Tensor:
    """Run a closed kernel; what fx puts around a graph's call explains errors in code, which the breaker need not."""
    delta: Tensor = nn.Module.__call__(seed.kernel, x, h)
    return delta


# --- any other module ---


def _run_apart(layer: SeedHolder, seed: Seed, x: Tensor, h: Tensor) -> Tensor:
    _require_no_leak(seed)
    if not torch.is_grad_enabled():
        given = (x.clone(), h.clone())
        delta, storages = _call_apart(seed, given, h)
        seed.breaker.over.extend(storages)
        return delta.clone()
    leaves = tuple(readable(value).detach().requires_grad_(value.requires_grad) for value in (x, h))
    given = (leaves[0].clone(), leaves[1].clone())
    delta, storages = _call_apart(seed, given, h)
    parameters = tuple(value for value in seed.kernel.parameters() if value.requires_grad)
    own = _OwnGraph(layer, seed, delta, (*leaves, *parameters), storages)
    if not delta.requires_grad:
        own.end()
        return delta.clone()
    bridged: Tensor = _Bridge.apply(own, delta.detach(), x, h, *parameters)  # type: ignore[no-untyped-call]
    return bridged


def _call_apart(seed: Seed, given: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, list[StorageWeakRef]]:
    """Run the kernel in time; gives its sound delta and the memory to watch once the pass is over."""
    breaker = seed.breaker
    watch = MemoryWatch(seed.kernel, given) if breaker.num_passes % WATCH_INTERVAL_PASSES == 0 else None
    breaker.num_passes += 1
    deadline = Deadline(breaker.pass_limit_ms)
    with watch or nullcontext():
        delta: Tensor = seed.kernel(*given)
    deadline.check()
    _require_sound(delta, h)
    made = storages_of((delta,)) if watch is None else watch.storages()
    return delta, [*storages_of(given), *made]


@dataclass(slots=True)
class _OwnGraph:
    """One pass of a kernel apart from the host's graph."""

    layer: SeedHolder
    seed: Seed
    delta: Tensor | None
    wanted: tuple[Tensor, ...]
    """x and h of its own, then the kernel's parameters."""
    storages: list[StorageWeakRef]

    def gradients(self, incoming: Tensor) -> list[Tensor | None]:
        """Give the gradient of each of ``wanted``, or of none where the kernel's backward fails."""
        keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        assert self.delta is not None
        reached = [value for value in self.wanted if value.requires_grad]
        deadline = Deadline(self.seed.breaker.pass_limit_ms)
        try:
            found: Sequence[Tensor | None] = torch.autograd.grad(
                self.delta, reached, incoming, allow_unused=True, retain_graph=keep
            )
            deadline.check()
            self._require_finite(found, incoming)
        except KernelFaultError as fault:
            return self._refuse(fault.kind, fault.detail)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the host's gradient is kept
            return self._refuse(FailureKind.RAISED, f"in backward: {type(error).__name__}: {error}")
        finally:
            if not keep:
                self.end()
        if incoming.device.type != "cpu":
            found = tuple(None if value is None else zeroed(value) for value in found)
        rest = iter(found)
        return [next(rest) if value.requires_grad else None for value in self.wanted]

    def again(self, inputs: Sequence[Tensor], incoming: Tensor) -> list[Tensor | None]:
        """Give the gradients such that they can be differentiated again: by a pass in the host's own graph."""
        # h is made of x: views keep what x does through h out of the gradient at x.
        given = [value.view_as(value) for value in inputs[:2]]
        wanted = [*given, *inputs[2:]]
        reached = [value for value in wanted if value.requires_grad]
        try:
            delta = self.seed.kernel(*given)
            found = iter(torch.autograd.grad(delta, reached, incoming, allow_unused=True, create_graph=True))
        except Exception as error:  # noqa: BLE001 - as in gradients
            return self._refuse(FailureKind.RAISED, f"in backward: {type(error).__name__}: {error}")
        return [next(found) if value.requires_grad else None for value in wanted]

    def end(self) -> None:
        """Let go of the graph; what is still alive of it from now on, the kernel keeps."""
        self.delta = None
        self.seed.breaker.over.extend(self.storages)
        self.storages = []

    def _refuse(self, kind: FailureKind, detail: str) -> list[Tensor | None]:
        note_backward(self.layer, self.seed, kind, detail)
        # Zeros for parameters: DistributedDataParallel waits for a gradient of each.
        return [None, None, *(torch.zeros_like(value) for value in self.wanted[2:])]

    def _require_finite(self, found: Sequence[Tensor | None], incoming: Tensor) -> None:
        if incoming.device.type != "cpu":
            return
        if all(value is None or is_finite(value) for value in found) or not is_finite(incoming):
            return
        raise KernelFaultError(FailureKind.NON_FINITE, "gradient holds NaN or infinity")


class _Bridge(torch.autograd.Function):
    """The one node in the host's graph that stands for a pass apart from it."""

    @staticmethod
    def forward(ctx: Any, own: _OwnGraph, delta: Tensor, *inputs: Tensor) -> Tensor:
        ctx.own = own
        ctx.save_for_backward(*inputs)
        return delta.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return (None, None, *ctx.own.again(ctx.saved_tensors, grad))
        return (None, None, *ctx.own.gradients(grad))


def _require_sound(delta: object, h: Tensor) -> None:
    fault = fault_of(delta, h)
    if fault is not None:
        raise fault


def _require_no_leak(seed: Seed) -> None:
    over = seed.breaker.over = [storage for storage in seed.breaker.over if not storage.expired()]  # type: ignore[no-untyped-call]
    if len(over) > LEAK_LIMIT:
        detail = f"kernel must keep at most {LEAK_LIMIT} activations of earlier passes, got {len(over)}"
        raise KernelFaultError(FailureKind.LEAKED, detail)


def has_finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every gradient there is is finite; waits for the device."""
    return all(value.grad is None or is_finite(value.grad) for value in parameters)
