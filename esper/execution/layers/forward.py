"""The forward pass of a layer that has something to do besides its parent's: blend live seeds, measure a sample."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from esper.contracts.blueprint import Site
from esper.execution.bulkhead import run_kernel
from esper.execution.circuit_breaker import FailureKind, KernelFaultError, is_finite
from esper.execution.device_guard import guarded
from esper.execution.device_probe import PendingFigures, Stopwatch
from esper.execution.dispatch import run_side_by_side
from esper.execution.gradient_gate import GradientGate, note_backward
from esper.execution.health import can_probe, is_real_tensor, probe_tensor
from esper.execution.layers.ranks import is_averaged, require_synchronised
from esper.execution.layers.recompute import checkpointed_part, is_recomputing
from esper.execution.layers.record import LayerRecord, PendingSignal
from esper.execution.seed import Seed
from esper.execution.shares import Share, checked_sum
from esper.execution.spread import with_absent

if TYPE_CHECKING:
    from esper.execution.layers.base import KasminaLayer

_SMALL_NUMEL: Final = 1 << 16
"""Values of a layer's output up to which contributions are kept and looked at together: 256 KiB of float32 each."""


def kasmina_forward(layer: KasminaLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Give the layer's output: its parent's, plus what its live seeds add; measure the pass where it is due."""
    record = layer._kasmina
    if record.is_read:
        record.skips.keep(layer.layer_name, layer.to_site(layer.seed_input(args, kwargs)))
    recomputing = bool(record.terms) and is_recomputing()
    if record.waiting_since is not None and record.is_wait_over(recomputing=recomputing):
        layer.cut_off_waiting()
    if recomputing or record.is_paused or not record.is_armed:
        out = _run_host(layer, args, kwargs)
        return _blend(layer, args, kwargs, out, recomputing=recomputing) if record.terms else out
    x = layer.seed_input(args, kwargs)
    watch = Stopwatch(x.device) if is_real_tensor(x) else None
    out = _run_host(layer, args, kwargs)
    if record.terms:
        out = _blend(layer, args, kwargs, out, sampled=True)
    if watch is not None:
        watch.stop()
        result = layer.seed_output(out)
        if is_real_tensor(result):
            _observe(layer, x, result, watch)
    return out


def _run_host(layer: KasminaLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    displaced = layer._kasmina.displaced
    if displaced is not None:
        return displaced(*args, **kwargs)
    return type(layer).host_class.forward(layer, *args, **kwargs)


def _blend(
    layer: KasminaLayer,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    *,
    sampled: bool = False,
    recomputing: bool = False,
) -> Any:
    require_synchronised(layer, layer._kasmina.terms)
    h = layer.seed_output(out)
    x_site, h_site, lanes = layer.to_site(layer.seed_input(args, kwargs)), layer.to_site(h), layer._kasmina.lanes
    if lanes is not None:
        total = lanes.blend(x_site, h_site, partial(_sum, layer))
    else:
        total = _sum(layer, x_site, h_site, sampled=sampled, recomputing=recomputing)
    return out if total is h_site else layer.with_output(out, layer.from_site(total, like=h))


def _sum(layer: KasminaLayer, x: Tensor, h: Tensor, *, sampled: bool = False, recomputing: bool = False) -> Tensor:
    if h.device.type == "cpu":
        return _sum_on_cpu(layer, x, h, sampled=sampled, recomputing=recomputing)
    return _sum_on_device(layer, x, h, recomputing=recomputing)


def _sum_on_cpu(layer: KasminaLayer, x: Tensor, h: Tensor, *, sampled: bool, recomputing: bool) -> Tensor:
    """Add up the contributions that are finite; a recomputation counts nothing.

    Small ones are looked at together: their sum is finite only where all of them are. Large ones are looked at one by
    one, so that none is kept for longer than it takes to add it.
    """
    total, is_small = h, h.numel() <= _SMALL_NUMEL
    small: list[Share] = []
    absent: list[Seed] = []
    shared = _new_gate(layer, h)
    for seed in layer._kasmina.terms:
        start_ns = time.perf_counter_ns() if sampled else 0
        delta = None if seed.is_silent else _delta(layer, seed, x, h, shared, recomputing=recomputing)
        if delta is None:
            absent.append(seed)
            continue
        if sampled:
            _measure_seed(layer, seed, delta, (time.perf_counter_ns() - start_ns) / 1e6)
        if is_small:
            small.append((seed, delta))
            continue
        contribution = seed.scaled(delta, h)
        if _passes(layer, seed, contribution, recomputing=recomputing):
            total = total + contribution
        else:
            absent.append(seed)
    if small:
        total = _sum_of_small(layer, h, small, absent, recomputing=recomputing)
    if shared is not None:
        shared.close(None if total is h else total)
    return _answer_for(total, absent) if absent else total


def _answer_for(total: Tensor, absent: Sequence[Seed]) -> Tensor:
    """Give the output so that other ranks do not wait for gradients of seeds that take no part in it here."""
    awaited = [seed for seed in absent if seed.breaker.ranks is not None]
    return with_absent(total, awaited) if awaited else total


def _sum_of_small(
    layer: KasminaLayer, h: Tensor, shares: Sequence[Share], absent: list[Seed], *, recomputing: bool
) -> Tensor:
    total = checked_sum(h, shares)
    if total is not None:
        if not recomputing:
            _note_passes(layer, [seed for seed, _ in shares])
        return total
    total = h
    for seed, delta in shares:
        contribution = seed.scaled(delta, h)
        if _passes(layer, seed, contribution, recomputing=recomputing):
            total = total + contribution
        else:
            absent.append(seed)
    return total


def _new_gate(layer: KasminaLayer, h: Tensor) -> GradientGate | None:
    """Give the gate that the layer's kernels share; ``None`` where each has its own, or gradients are not wanted."""
    is_wanted = torch.is_grad_enabled() and not layer._kasmina.has_separate_gates
    return GradientGate(layer, h, is_averaged=is_averaged()) if is_wanted else None


def _passes(layer: KasminaLayer, seed: Seed, contribution: Tensor, *, recomputing: bool) -> bool:
    """Note whether the contribution is finite: a good pass of the seed, or a failure."""
    if not is_finite(contribution):
        _note_failure(layer, seed, FailureKind.NON_FINITE, "delta holds NaN or infinity", recomputing=recomputing)
        return False
    if not recomputing:
        _note_passes(layer, (seed,))
    return True


def _note_passes(layer: KasminaLayer, seeds: Iterable[Seed]) -> None:
    place = layer._kasmina.state_layout
    for seed in seeds:
        place.states.layout.count_forward(place.first + seed.index)
        seed.breaker.note_success()


def _note_failure(layer: KasminaLayer, seed: Seed, kind: FailureKind, detail: str, *, recomputing: bool) -> None:
    if not recomputing:  # the pass that is repeated has counted it
        layer.note_failure(seed, kind, detail)


def _delta(
    layer: KasminaLayer, seed: Seed, x: Tensor, h: Tensor, shared: GradientGate | None, *, recomputing: bool
) -> Tensor | None:
    """Run one kernel under its circuit breaker; ``None`` where its contribution is dropped.

    Without a shared gate it has its own.
    """
    if seed.breaker.is_open and not recomputing and layer._kasmina.waiting_since is None:
        # It failed in a backward pass, where nothing may be moved; ranks that train it together settle it together.
        if seed.breaker.ranks is None:
            layer.cut_off(seed)
        return None
    try:
        x = _input_for(layer, seed, x)
        if shared is not None:
            return run_kernel(layer, seed, x, h, shared)
        return _run_behind_own_gate(layer, seed, x, h)
    except KernelFaultError as fault:
        if fault.kind is FailureKind.NO_INPUT and recomputing and checkpointed_part() is None:
            # Reentrant checkpointing: its first pass had the input, so nothing has counted this yet.
            note_backward(layer, seed, fault.kind, fault.detail)
        _note_failure(layer, seed, fault.kind, fault.detail, recomputing=recomputing)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the host's result is kept
        _note_failure(layer, seed, FailureKind.RAISED, f"{type(error).__name__}: {error}", recomputing=recomputing)
    return None


def _input_for(layer: KasminaLayer, seed: Seed, x: Tensor) -> Tensor:
    """Give what a kernel reads as x: the layer's own input, or that of the seed's source.

    Raises:
        KernelFaultError: The source's input can't be had in this pass.
    """
    if not seed.source:
        return x
    found, lanes = layer._kasmina.skips.input_of(seed.source), layer._kasmina.lanes
    return found if lanes is None else lanes.source_rows(found)


def _run_behind_own_gate(layer: KasminaLayer, seed: Seed, x: Tensor, h: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return run_kernel(layer, seed, x, h, None)
    gate, delta = GradientGate(layer, h, is_averaged=is_averaged()), None
    try:
        delta = run_kernel(layer, seed, x, h, gate)
    finally:
        gate.close(delta)
    return delta


def _sum_on_device(layer: KasminaLayer, x: Tensor, h: Tensor, *, recomputing: bool) -> Tensor:
    """Run the seeds side by side; whether a delta is finite is left to the device."""
    total, live = h, [seed for seed in layer._kasmina.terms if not seed.is_silent]
    absent = [seed for seed in layer._kasmina.terms if seed.is_silent]
    pieces = [partial(_guarded_contribution, layer, seed, x, h, recomputing=recomputing) for seed in live]
    found = run_side_by_side(pieces, (x, h, *layer._kasmina.skips.on(h.device)))
    for seed, contribution in zip(live, found, strict=True):
        if contribution is not None:
            total = total + contribution
        else:
            absent.append(seed)
    return _answer_for(total, absent) if absent else total


def _guarded_contribution(layer: KasminaLayer, seed: Seed, x: Tensor, h: Tensor, *, recomputing: bool) -> Tensor | None:
    delta = _delta(layer, seed, x, h, None, recomputing=recomputing)
    if delta is None:
        return None
    if not recomputing:
        layout = layer._kasmina.state_layout
        layout.states.layout.count_forward(layout.first + seed.index)
        seed.breaker.note_success()  # of what the host sees; the device keeps a row of its own for deltas
    return guarded(seed, delta, h, counted=not recomputing)


def _measure_seed(layer: KasminaLayer, seed: Seed, delta: Tensor, latency_ms: float) -> None:
    if can_probe(delta):
        layout, found = layer._kasmina.state_layout, probe_tensor(delta.detach())
        layout.states.layout.record_health(
            layout.first + seed.index, found.mean, found.variance, found.entropy, None, latency_ms
        )


def _observe(layer: KasminaLayer, x: Tensor, out: Tensor, watch: Stopwatch) -> None:
    record = layer._kasmina
    if not record.is_site_settled or record.order == 0:  # a rebuilt layer knows its site, but not its place
        _learn_site(layer, x, out)
    record.end_sample()
    layer.refresh_forward()
    if not record.telemetry_enabled:
        return
    record.settle()
    pending = record.pending = PendingSignal(record.state_layout.states.step, watch)
    if can_probe(out):
        record.note_figures(pending, probe_tensor(out.detach()))
    elif device_of(out).type != "cpu" and out.is_floating_point():
        pending.on_device = PendingFigures(out)
    if out.requires_grad:
        out.register_hook(_GradientHook(record, pending))  # type: ignore[no-untyped-call]
    elif pending.on_device is None:
        record.publish(pending, gradient_variance=None)


def device_of(value: Tensor) -> torch.device:
    """Give the device whose memory holds the value."""
    return value.device


def _learn_site(layer: KasminaLayer, x: Tensor, out: Tensor) -> None:
    """Note the layer's shapes without the batch dimension; a layer of another rank has no site."""
    record = layer._kasmina
    x, out = layer.to_site(x), layer.to_site(out)
    if 0 in x.shape or 0 in out.shape:
        return
    record.is_site_settled = True
    if 2 <= x.dim() <= 5 and 2 <= out.dim() <= 5:
        record.site = Site(
            kind=type(layer).site_kind, input_shape=tuple(x.shape[1:]), output_shape=tuple(out.shape[1:])
        )
        record.batch_size = x.shape[0]
        record.order = record.skips.next_number()


class _GradientHook:
    """Measures the variance of the gradient at the layer's output, once, and sends the signal off."""

    __slots__ = ("pending", "record")

    def __init__(self, record: LayerRecord, pending: PendingSignal) -> None:
        self.record = record
        self.pending = pending

    def __call__(self, grad: Tensor) -> None:
        if self.record.pending is not self.pending or not is_real_tensor(grad):
            return
        if can_probe(grad):
            self.record.publish(self.pending, gradient_variance=probe_tensor(grad.detach()).variance)
        elif device_of(grad).type != "cpu" and grad.is_floating_point():
            self.pending.gradient_on_device = PendingFigures(grad)
