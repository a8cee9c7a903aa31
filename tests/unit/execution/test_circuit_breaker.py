"""A kernel that fails costs its own contribution and nothing else; three in a row cost it its place."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution.circuit_breaker import FAILURE_LIMIT, CircuitBreaker, FailureKind, is_finite
from esper.execution.device_guard import gated, guarded, read_failures
from esper.execution.layers.forward import kasmina_forward


class Moody(nn.Module):
    """Gives ``h`` until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.mood = "good"

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        match self.mood:
            case "raises":
                raise RuntimeError("out of sorts")
            case "nan":
                return h * self.weight * torch.nan
            case "inf":
                return h.abs() * self.weight * torch.inf
            case "minus inf":
                return h.abs() * self.weight * -torch.inf
            case "narrow":
                return h[..., :-1]
            case "elsewhere":
                return h.to("meta")
            case "no tensor":
                return None  # type: ignore[return-value]
            case _:
                return h * self.weight


class Constant(nn.Module):
    """Gives one value everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.value.expand_as(h)


BAD = ["raises", "nan", "inf", "narrow", "elsewhere", "no tensor"]


def plant(pair: Any, name: str = "layer1") -> tuple[Any, Moody]:
    layer, kernel = getattr(pair.model, name), Moody()
    layer.attach_module(0, kernel)
    layer.transition(0, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    return layer, kernel


@pytest.mark.parametrize("mood", BAD)
@pytest.mark.parametrize("name", ["layer1", "conv"])
def test_a_failure_leaves_the_hosts_result_and_gradients(warm: Any, name: str, mood: str) -> None:
    layer, kernel = plant(warm, name)
    kernel.mood = mood
    warm.backward()
    assert warm.same_gradients()
    assert layer.state_layout.errors[0] == 1
    assert layer.state_layout.fallbacks[0] == 1
    assert layer.state_layout.state(0) is State.EVALUATING


@pytest.mark.parametrize("mood", BAD)
def test_three_in_a_row_send_the_seed_to_error(warm: Any, mood: str) -> None:
    layer, kernel = plant(warm)
    kernel.mood = mood
    for _ in range(FAILURE_LIMIT + 2):
        warm.backward()
    assert layer.state_layout.state(0) is State.ERROR
    assert layer.state_layout.alpha_blend[0] == 0.0
    assert layer.state_layout.errors[0] == FAILURE_LIMIT
    assert layer.get_layer_stats()["fallbacks"] == FAILURE_LIMIT
    layer.transition(0, State.CULLED)
    assert layer.find_seed(0) is None


def test_a_good_pass_ends_the_row(warm: Any) -> None:
    layer, kernel = plant(warm)
    for mood in ("nan", "raises", "good", "nan", "raises"):
        kernel.mood = mood
        warm.model(warm.x)
    assert layer.state_layout.state(0) is State.EVALUATING
    assert layer.state_layout.errors[0] == 4
    assert layer.state_layout.forwards[0] == 1


def test_a_failing_seed_leaves_its_neighbours_alone(warm: Any, scale: Any) -> None:
    layer, kernel = plant(warm)
    x = torch.randn(4, 128)
    layer.attach_module(1, scale(1.0))
    layer.transition(1, State.EVALUATING)
    layer.transition(1, State.FOSSILIZED)
    kernel.mood = "raises"
    host = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), host * 2.0)


@pytest.mark.parametrize("batch", [4, 4096])  # looked at together, and one by one
@pytest.mark.parametrize("moods", [("nan", "good"), ("good", "nan"), ("inf", "minus inf"), ("nan", "raises")])
def test_of_two_seeds_only_those_that_fail_are_dropped(warm: Any, moods: tuple[str, str], batch: int) -> None:
    layer, first = plant(warm)
    second, x = Moody(), torch.randn(batch, 128)
    layer.attach_module(1, second)
    layer.transition(1, State.EVALUATING)
    layer.set_alpha(1, 0.25)
    first.mood, second.mood = moods
    host = nn.functional.linear(x, layer.weight, layer.bias)
    expected = host
    for mood, alpha in zip(moods, (0.5, 0.25), strict=True):
        expected = expected + host * alpha if mood == "good" else expected
    assert torch.equal(layer(x), expected)
    assert layer.state_layout.errors[:2].tolist() == [int(mood != "good") for mood in moods]
    assert layer.state_layout.forwards[:2].tolist() == [int(mood == "good") for mood in moods]


def test_a_host_that_is_not_finite_is_no_fault_of_the_seed(warm: Any) -> None:
    layer, _ = plant(warm)
    layer.attach_module(1, Constant(2.0))
    layer.transition(1, State.EVALUATING)
    layer.transition(1, State.FOSSILIZED)
    layer.set_alpha(0, 0.0)
    out = layer(torch.full((4, 128), torch.nan))
    assert out.isnan().all()
    assert not layer.state_layout.errors.any()


def test_a_sum_that_overflows_is_no_failure(warm: Any) -> None:
    layer, _ = plant(warm)
    layer.set_alpha(0, 0.0)
    layer.attach_module(1, Constant(3e38))
    layer.transition(1, State.EVALUATING)
    layer.transition(1, State.FOSSILIZED)
    out = layer(torch.randn(4, 128))
    assert torch.equal(out, torch.full_like(out, 3e38))
    assert not layer.state_layout.errors.any()


def test_a_failing_fossil_goes_to_error(warm: Any) -> None:
    layer, kernel = plant(warm)
    layer.transition(0, State.FOSSILIZED)
    kernel.mood = "nan"
    for _ in range(FAILURE_LIMIT):
        warm.model(warm.x)
    assert layer.state_layout.state(0) is State.ERROR
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))


def test_a_seed_that_fails_while_it_is_ramped_out_is_freed(warm: Any) -> None:
    layer, kernel = plant(warm)
    layer.transition(0, State.CULLED)
    kernel.mood = "nan"
    for _ in range(FAILURE_LIMIT):
        warm.model(warm.x)
    assert layer.state_layout.state(0) is State.CULLED
    assert layer.find_seed(0) is None


def test_a_failure_is_logged_with_its_reason(warm: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, kernel = plant(warm)
    kernel.mood = "raises"
    with caplog.at_level(logging.WARNING):
        warm.model(warm.x)
    (record,) = [record for record in caplog.records if record.message == "seed_failed"]
    assert (record.layer, record.seed_index, record.kind) == ("layer1", 0, "raised")
    assert "out of sorts" in record.detail


def test_an_interrupt_is_not_swallowed(warm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, kernel = plant(warm)

    def interrupt(x: Tensor, h: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        warm.model(warm.x)


def test_the_breaker_opens_at_its_limit() -> None:
    breaker = CircuitBreaker(limit=2)
    assert not breaker.note_failure(FailureKind.RAISED, "a", in_row=1)
    assert breaker.note_failure(FailureKind.NON_FINITE, "b", in_row=2)
    assert breaker.last_failure == "non_finite: b"
    breaker.note_success()
    assert not breaker.is_open


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_finiteness_is_exact_even_where_the_sum_overflows(dtype: torch.dtype) -> None:
    huge = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(huge)
    assert is_finite(torch.zeros(0, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        huge[3] = bad
        assert not is_finite(huge)


class TestDeviceGuard:
    """The breaker where nobody may wait, run on the CPU."""

    def test_a_finite_delta_passes_with_its_gradients(self, warm: Any) -> None:
        layer, _ = plant(warm)
        seed, h = layer.find_seed(0), torch.randn(4, 32, requires_grad=True)
        out = guarded(seed, seed.kernel(h, gated(h)), h)
        torch.testing.assert_close(out, h * 0.5)
        out.sum().backward()
        torch.testing.assert_close(h.grad, torch.full_like(h, 0.5))
        assert read_failures(seed) == (0, 0)

    @pytest.mark.parametrize("mood", ["nan", "inf"])
    def test_a_bad_delta_is_zero_and_its_gradient_never_reaches_the_host(self, warm: Any, mood: str) -> None:
        layer, kernel = plant(warm)
        kernel.mood = mood
        seed, h = layer.find_seed(0), torch.randn(4, 32, requires_grad=True)
        (h + guarded(seed, kernel(h, gated(h)), h)).sum().backward()
        assert torch.equal(h.grad, torch.ones_like(h))
        assert read_failures(seed) == (1, 1)
        assert read_failures(seed) == (0, 1)

    def test_failures_counted_on_the_device_reach_the_breaker_at_a_step_boundary(self, warm: Any) -> None:
        layer, kernel = plant(warm)
        seed, h = layer.find_seed(0), torch.randn(4, 32)
        for mood in ("nan", "good", "nan", "inf", "nan"):
            kernel.mood = mood
            guarded(seed, kernel(h, h), h)
        assert layer.state_layout.errors[0] == 0
        assert warm.model.settle_failures() == 4
        assert layer.state_layout.errors[0] == 4
        assert layer.state_layout.state(0) is State.ERROR

    def test_scattered_failures_do_not_open_it(self, warm: Any) -> None:
        layer, kernel = plant(warm)
        seed, h = layer.find_seed(0), torch.randn(4, 32)
        for mood in ("nan", "good", "nan", "good", "nan", "good"):
            kernel.mood = mood
            guarded(seed, kernel(h, h), h)
        assert layer.settle_failures() == 3
        assert layer.state_layout.state(0) is State.EVALUATING
        assert layer.settle_failures() == 0


def test_the_checked_path_equals_plain_arithmetic(warm: Any) -> None:
    layer, _ = plant(warm)
    x = torch.randn(4, 128)
    host = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(kasmina_forward(layer, (x,), {}), host + host * layer.find_seed(0).kernel.weight * 0.5)
