"""Kernels that fail in every way at hand, in every state: the host's step is the host's to the bit, the seed goes."""

from __future__ import annotations

import copy
import gc
import random
import re
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.errors import InvalidInputError, KernelExecutionError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution.bulkhead import LEAK_LIMIT
from esper.execution.circuit_breaker import FAILURE_LIMIT, CircuitBreaker
from esper.execution.incubation import trial_backward
from esper.execution.overrides import SeedRef
from esper.execution.pass_watch import WATCH_INTERVAL_PASSES


class Bad(nn.Module):
    """A sound kernel until ``fault`` is set; then it does that to the delta it would have given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fault: Callable[[Bad, Tensor, Tensor], Any] | None = None
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return h * self.weight if self.fault is None else self.fault(self, x, h)


class _Backward(torch.autograd.Function):
    """Identity whose backward is another's."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.then = then
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.then(grad), None


def raising(error: BaseException) -> Callable[..., Any]:
    def fault(kernel: Bad, x: Tensor, h: Tensor) -> Any:
        raise error

    return fault


def backward(then: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda kernel, _x, h: _Backward.apply(h * kernel.weight, then)


def explode(grad: Tensor) -> Tensor:
    raise OSError("lost in backward")


def spoil(value: float) -> Callable[..., Any]:
    def fault(kernel: Bad, x: Tensor, h: Tensor) -> Tensor:
        delta = h * kernel.weight
        return delta.masked_fill(torch.arange(delta.numel()).reshape(delta.shape) == 3, value)

    return fault


def same_graph_again(kernel: Bad, x: Tensor, h: Tensor) -> Tensor:
    delta = h * kernel.weight
    kernel.kept.append(delta)
    return sum(kernel.kept[-2:], torch.zeros(()))  # type: ignore[return-value]


def write_then_raise(kernel: Bad, x: Tensor, h: Tensor) -> Tensor:
    h.mul_(3.0)
    x.zero_()
    raise RuntimeError("after it wrote")


def draw_then_raise(kernel: Bad, x: Tensor, h: Tensor) -> Tensor:
    torch.rand(7)
    raise RuntimeError("after it drew")


FORWARD: dict[str, tuple[Callable[..., Any], str]] = {
    "runtime_error": (raising(RuntimeError("no")), "raised: RuntimeError: no"),
    "key_error": (raising(KeyError("no")), "raised: KeyError"),
    "memory_error": (raising(MemoryError()), "raised: MemoryError"),
    "recursion": (lambda kernel, x, h: kernel(x, h), "raised: RecursionError"),
    "stop_iteration": (raising(StopIteration()), "raised: StopIteration"),
    "assertion": (raising(AssertionError("no")), "raised: AssertionError"),
    "nan": (spoil(torch.nan), "non_finite"),
    "inf": (spoil(torch.inf), "non_finite"),
    "minus_inf": (spoil(-torch.inf), "non_finite"),
    "overflow_in_the_cast": (lambda k, _x, h: h.double() * k.weight * 1e300, "non_finite"),
    "narrow": (lambda k, _x, h: (h * k.weight)[..., :-1], "wrong_shape"),
    "broadcast": (lambda k, _x, h: (h * k.weight).sum(), "wrong_shape: delta must be"),
    "batch_lost": (lambda k, _x, h: (h * k.weight)[:1], "wrong_shape"),
    "none": (lambda _k, _x, _h: None, "wrong_shape: .* got NoneType"),
    "tuple": (lambda _k, _x, h: (h, h), "wrong_shape: .* got tuple"),
    "integers": (lambda _k, _x, h: torch.ones_like(h, dtype=torch.int64), "wrong_type: .* got torch.int64"),
    "complex": (lambda k, _x, h: h * k.weight * 1j, "wrong_type: .* got torch.complex64"),
    "meta": (lambda _k, _x, h: torch.empty_like(h, device="meta"), "wrong_type: .* got torch.float32 on meta"),
    "sparse": (lambda k, _x, h: (h * k.weight).detach().to_sparse(), "wrong_type: .* torch.sparse_coo"),
    "write_then_raise": (write_then_raise, "raised: RuntimeError: after it wrote"),
    "draw_then_raise": (draw_then_raise, "raised: RuntimeError: after it drew"),
}
BACKWARD: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (backward(explode), "raised: in backward: OSError: lost in backward"),
    "nan": (backward(lambda grad: grad * torch.nan), "non_finite: gradient"),
    "inf": (backward(lambda grad: grad + torch.inf), "non_finite: gradient"),
    "wrong_shape": (backward(lambda grad: grad[..., :-1]), "raised: in backward: RuntimeError"),
    "not_a_tensor": (backward(lambda _: "no"), "raised: in backward: "),  # type: ignore[arg-type, return-value]
    "only_its_weight": (
        lambda k, _x, h: h.detach() * _Backward.apply(k.weight, lambda grad: grad * torch.nan),
        "non_finite: gradient",
    ),
}
LIVE = [State.EVALUATING, State.FOSSILIZED]


def plant(pair: Any, name: str = "layer1", state: State = State.EVALUATING) -> tuple[Any, Bad]:
    layer, kernel = getattr(pair.model, name), Bad()
    layer.attach_module(0, kernel)
    if state is not State.ACTIVE:
        layer.transition(0, State.EVALUATING)
        layer.set_alpha(0, 0.5)
    if state is State.FOSSILIZED:
        layer.transition(0, State.FOSSILIZED)
    return layer, kernel


def step(pair: Any) -> None:
    """One backward pass of host and twin; the host's outputs and gradients are the twin's to the bit."""
    for side in (pair.model, pair.twin):
        side.zero_grad()
    pair.backward()
    assert pair.same_gradients()


@pytest.mark.parametrize("state", LIVE, ids=str)
@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("site", ["layer1", "conv"])
def test_a_fault_in_forward_leaves_the_step_to_the_host(warm: Any, site: str, name: str, state: State) -> None:
    layer, kernel = plant(warm, site, state)
    kernel.fault, reason = FORWARD[name]
    streams = torch.get_rng_state()
    for failures in range(1, FAILURE_LIMIT + 1):
        assert layer.state_layout.state(0) is state
        step(warm)
        assert layer.get_layer_stats()["errors"] == layer.get_layer_stats()["fallbacks"] == failures
    assert layer.state_layout.state(0) is State.ERROR
    assert torch.equal(torch.get_rng_state(), streams)
    assert re.search(reason, layer.find_seed(0).breaker.last_failure)
    step(warm)
    assert layer.state_layout.errors[0] == FAILURE_LIMIT
    layer.transition(0, State.CULLED)
    assert layer.find_seed(0) is None
    step(warm)


def gradients(pair: Any) -> dict[str, Tensor]:
    pair.model.zero_grad()
    F.cross_entropy(pair.model(pair.x), pair.y).backward()
    return {name: pair.model.get_parameter(name).grad.clone() for name, _ in pair.twin.named_parameters()}


@pytest.mark.parametrize("state", LIVE, ids=str)
@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("site", ["layer1", "conv"])
def test_a_fault_in_backward_leaves_the_gradients_to_the_host(warm: Any, site: str, name: str, state: State) -> None:
    """The share stays in the output; the host's gradients are those beside a share that is a constant."""
    layer, kernel = plant(warm, site, state)
    kernel.fault = lambda k, _x, h: (h * k.weight).detach()
    wanted = gradients(warm)
    kernel.fault, reason = BACKWARD[name]
    for failures in range(1, FAILURE_LIMIT + 1):
        assert layer.state_layout.state(0) is state
        found = gradients(warm)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert not kernel.weight.grad
        assert layer.state_layout.errors[0] == failures
    assert re.search(reason, layer.find_seed(0).breaker.last_failure)
    step(warm)  # nothing moves inside a backward pass; the next forward cuts the seed off
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("name", BACKWARD)
def test_an_open_breaker_is_also_read_at_the_step_boundary(warm: Any, name: str) -> None:
    layer, kernel = plant(warm)
    kernel.fault, _ = BACKWARD[name]
    for _ in range(FAILURE_LIMIT):
        gradients(warm)
    assert layer.settle_failures() == 0
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("name", ["nan", "raises"])
def test_a_backward_that_fails_now_and_then_never_opens_the_breaker(warm: Any, name: str) -> None:
    layer, kernel = plant(warm)
    for turn in range(3 * FAILURE_LIMIT):
        kernel.fault = BACKWARD[name][0] if turn % 2 else None
        gradients(warm)
    assert layer.state_layout.errors[0] == 3 * FAILURE_LIMIT // 2
    assert layer.state_layout.state(0) is State.EVALUATING


@pytest.mark.parametrize("name", [*FORWARD])
def test_a_fault_in_a_trial_touches_nothing_of_the_host(warm: Any, name: str) -> None:
    """ACTIVE: the host's step, its gradients and every random stream are untouched; the seed is cut off."""
    layer, kernel = plant(warm, state=State.ACTIVE)
    kernel.fault, _ = FORWARD[name]
    for _ in range(FAILURE_LIMIT):
        step(warm)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        trial_backward(warm.model, [SeedRef("layer1", 0)], lambda: F.cross_entropy(warm.model(warm.x), warm.y))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        assert warm.same_gradients()
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("name", [*BACKWARD])
def test_a_backward_fault_in_a_trial_touches_nothing_of_the_host(warm: Any, name: str) -> None:
    layer, kernel = plant(warm, state=State.ACTIVE)
    kernel.fault, _ = BACKWARD[name]
    for _ in range(FAILURE_LIMIT):
        step(warm)
        trial_backward(warm.model, [SeedRef("layer1", 0)], lambda: F.cross_entropy(warm.model(warm.x), warm.y))
        assert warm.same_gradients()
        assert not kernel.weight.grad
    assert layer.state_layout.errors[0] == FAILURE_LIMIT
    layer.settle_failures()
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("grad", [True, False])
def test_a_kernel_that_writes_to_its_inputs_writes_to_copies(warm: Any, grad: bool) -> None:
    layer, kernel = plant(warm)

    def fault(k: Bad, x: Tensor, h: Tensor) -> Tensor:
        x.data.zero_()
        x.zero_()
        h.detach().fill_(5.0)
        return h.mul_(0.0) * k.weight

    kernel.fault = fault
    image = warm.x.clone()
    with torch.set_grad_enabled(grad):
        assert torch.equal(warm.model(warm.x), warm.twin(warm.x))
    assert torch.equal(warm.x, image)
    if grad:
        step(warm)
    assert layer.state_layout.errors[0] == 0


def test_a_graph_kept_for_the_next_pass_is_the_kernels_own_trouble(warm: Any) -> None:
    """A second backward through a freed graph raises in the kernel's graph, and stays there."""
    layer, kernel = plant(warm)
    kernel.fault = same_graph_again
    gradients(warm)
    assert layer.state_layout.errors[0] == 0
    for _ in range(FAILURE_LIMIT):
        found = gradients(warm)
        assert all(torch.isfinite(value).all() for value in found.values())
    assert "in backward: RuntimeError: Trying to backward through the graph a second" in kernel_failure(layer)


def kernel_failure(layer: Any) -> str:
    said: str = layer.find_seed(0).breaker.last_failure
    return said


@pytest.mark.parametrize("kept", ["h", "detached", "delta", "graph"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_kernel_that_leaks_is_found_out_and_freed(warm: Any, kept: str, grad: bool) -> None:
    layer, kernel = plant(warm)

    def fault(k: Bad, x: Tensor, h: Tensor) -> Tensor:
        delta = h * k.weight
        k.kept.append({"h": h, "detached": h.detach(), "delta": delta, "graph": delta.sin()}[kept])
        return delta

    kernel.fault = fault
    for _ in range(LEAK_LIMIT + 2 * FAILURE_LIMIT):
        if grad:
            gradients(warm)
        else:
            with torch.no_grad():
                warm.model(warm.x)
    if kept == "graph" and not grad:  # what it computed for itself is its own, and gone with the seed
        assert layer.state_layout.state(0) is State.EVALUATING
    else:
        assert layer.state_layout.state(0) is State.ERROR
        assert f"leaked: kernel must keep at most {LEAK_LIMIT} activations of earlier passes" in kernel_failure(layer)
        assert len(kernel.kept) <= LEAK_LIMIT + 1
    gone = [weakref.ref(kernel), *(weakref.ref(value) for value in kernel.kept)]
    layer.transition(0, State.CULLED)
    layer.set_alpha(0, 0.0)
    del kernel, fault
    gc.collect()
    assert all(reference() is None for reference in gone)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_kernel_computes_for_itself_and_keeps_is_found_in_time(warm: Any, grad: bool) -> None:
    layer, kernel = plant(warm)

    def fault(k: Bad, x: Tensor, h: Tensor) -> Tensor:
        k.kept.append(h.detach().clone())
        return h * k.weight

    kernel.fault = fault
    passes = WATCH_INTERVAL_PASSES * LEAK_LIMIT
    for _ in range(passes + 1 + FAILURE_LIMIT):
        assert layer.state_layout.state(0) is State.EVALUATING
        if grad:
            gradients(warm)
        else:
            with torch.no_grad():
                warm.model(warm.x)
    assert layer.state_layout.state(0) is State.ERROR
    assert "leaked" in kernel_failure(layer)


def test_state_that_a_kernel_renews_and_a_table_it_keeps_are_no_leak(warm: Any) -> None:
    layer, kernel = plant(warm)
    kernel.register_buffer("average", torch.zeros(32))

    def fault(k: Bad, x: Tensor, h: Tensor) -> Tensor:
        k.kept = k.kept or [torch.arange(32.0).sin()]
        k.average = k.average * 0.9 + h.detach().mean(0) * 0.1
        k.average.mul_(0.5)
        return h * k.weight + k.kept[0] * 0.0

    kernel.fault = fault
    for _ in range(WATCH_INTERVAL_PASSES * (LEAK_LIMIT + 4)):
        with torch.no_grad():
            warm.model(warm.x)
    assert layer.state_layout.errors[0] == 0


def slow_forward(k: Bad, x: Tensor, h: Tensor) -> Tensor:
    time.sleep(0.02)
    return h * k.weight


def slow_backward(k: Bad, x: Tensor, h: Tensor) -> Tensor:
    delta = h * k.weight
    delta.register_hook(lambda _: time.sleep(0.02))
    return delta


@pytest.mark.parametrize("fault", [slow_forward, slow_backward])
def test_a_kernel_that_sleeps_is_cut_off(warm: Any, fault: Any) -> None:
    layer, kernel = plant(warm)
    layer.find_seed(0).breaker.pass_limit_ms = 15.0
    kernel.fault = fault
    for _ in range(FAILURE_LIMIT):
        found = gradients(warm)
        assert all(torch.isfinite(value).all() for value in found.values())
    assert "slow" in kernel_failure(layer)
    assert "must take at most 15 ms, took" in kernel_failure(layer)
    warm.model(warm.x)
    assert layer.state_layout.state(0) is State.ERROR
    assert layer.state_layout.errors[0] == FAILURE_LIMIT
    warm.model.zero_grad()
    warm.twin.zero_grad()
    step(warm)
    assert warm.same_gradients()


def test_a_kernel_that_is_slow_once_goes_on(warm: Any) -> None:
    layer, kernel = plant(warm)
    layer.find_seed(0).breaker.pass_limit_ms = 15.0
    sound = kernel.fault
    kernel.fault = slow_forward
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))
    kernel.fault = sound
    layer.find_seed(0).breaker.pass_limit_ms = 60_000.0
    gradients(warm)
    assert layer.state_layout.state(0) is State.EVALUATING
    assert layer.find_seed(0).breaker.failures_in_row == 0


def test_a_kernel_may_keep_its_last_activation(warm: Any) -> None:
    layer, kernel = plant(warm)

    def fault(k: Bad, x: Tensor, h: Tensor) -> Tensor:
        k.kept = [h]
        return h * k.weight

    kernel.fault = fault
    for _ in range(3 * LEAK_LIMIT):
        gradients(warm)
    assert layer.state_layout.errors[0] == 0


def test_many_passes_before_one_backward_are_no_leak(warm: Any) -> None:
    layer, _ = plant(warm)
    for _ in range(2):
        sum(F.cross_entropy(warm.model(warm.x), warm.y) for _ in range(2 * LEAK_LIMIT)).backward()
    assert layer.state_layout.errors[0] == 0


def test_a_seed_that_fails_late_in_a_step_leaves_its_earlier_passes_to_backward(warm: Any) -> None:
    layer, kernel = plant(warm)
    first = F.cross_entropy(warm.model(warm.x), warm.y)
    kernel.fault = raising(RuntimeError("no"))
    for _ in range(FAILURE_LIMIT):
        warm.model(warm.x)
    assert layer.state_layout.state(0) is State.ERROR
    first.backward()
    assert kernel.weight.grad is not None


def test_gradients_behind_the_bulkhead_are_those_of_plain_autograd(warm: Any) -> None:
    layer, kernel = plant(warm)
    x = torch.randn(4, 128, requires_grad=True)
    layer(x).square().sum().backward()
    found = [x.grad.clone(), kernel.weight.grad.clone(), layer.weight.grad.clone()]
    h = F.linear(x, layer.weight, layer.bias)
    wanted = torch.autograd.grad((h + 0.5 * (h * kernel.weight)).square().sum(), [x, kernel.weight, layer.weight])
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true)


def test_a_gradient_can_be_differentiated_again_and_backward_run_twice(warm: Any) -> None:
    layer, kernel = plant(warm)
    kernel.fault = lambda k, _x, h: h * h * k.weight
    x = torch.randn(4, 128, requires_grad=True)

    def penalty(out: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
        return slope.square().sum()

    h = F.linear(x, layer.weight, layer.bias)
    (wanted,) = torch.autograd.grad(penalty(h + 0.5 * (h * h * kernel.weight)), [kernel.weight])
    (found,) = torch.autograd.grad(penalty(layer(x)), [kernel.weight])
    torch.testing.assert_close(found, wanted)
    out = layer(x).sum()
    out.backward(retain_graph=True)
    once = kernel.weight.grad.clone()
    out.backward()
    torch.testing.assert_close(kernel.weight.grad, 2.0 * once)
    assert layer.state_layout.errors[0] == 0


@pytest.mark.parametrize("name", [*FORWARD])
def test_a_kernel_that_is_bad_from_the_start_never_stands(warm: Any, name: str) -> None:
    layer, kernel = warm.model.layer1, Bad()
    kernel.fault, _ = FORWARD[name]
    streams = torch.get_rng_state()
    with pytest.raises((InvalidInputError, KernelExecutionError), match="kernel must"):
        layer.attach_module(0, kernel)
    assert layer.state_layout.state(0) is State.CULLED
    assert torch.equal(torch.get_rng_state(), streams)
    step(warm)


def test_loading_draws_from_no_stream(warm: Any) -> None:
    kernel = Bad()
    kernel.fault = lambda _k, _x, h: h * torch.rand(()) * random.random() * np.random.rand()  # noqa: NPY002
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    warm.model.layer1.attach_module(0, kernel)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_a_copy_of_a_breaker_holds_no_references_of_the_other(warm: Any) -> None:
    layer, kernel = plant(warm)
    kernel.fault = lambda k, _x, h: h * k.weight
    gradients(warm)
    breaker: CircuitBreaker = layer.find_seed(0).breaker
    assert breaker.over
    assert copy.deepcopy(breaker).over == []


@pytest.mark.parametrize("name", ["nan", "inf", "runtime_error", "narrow"])
def test_under_autocast_too(warm: Any, name: str) -> None:
    layer, kernel = plant(warm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(warm)
        assert kernel.weight.grad.dtype is torch.float32
        kernel.fault, _ = FORWARD[name]
        for _ in range(FAILURE_LIMIT):
            step(warm)
    assert layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_faults_under_autocast_too(warm: Any, name: str) -> None:
    layer, kernel = plant(warm)
    kernel.fault, _ = BACKWARD[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(FAILURE_LIMIT):
            assert all(torch.isfinite(value).all() for value in gradients(warm).values())
        warm.model(warm.x)
    assert layer.state_layout.state(0) is State.ERROR


def test_a_loss_that_is_not_finite_is_not_the_kernels_fault(warm: Any) -> None:
    """As in the first steps of a GradScaler, whose scale is too large."""
    layer, _ = plant(warm)
    for _ in range(2 * FAILURE_LIMIT):
        (F.cross_entropy(warm.model(warm.x), warm.y) * torch.inf).backward()
    assert layer.state_layout.errors[0] == 0
