"""Every kind of layer with a live seed: ``h + alpha * delta(x, h)`` to the bit, in whatever the host is put into."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State

HALVES = (torch.bfloat16, torch.float16)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Give an optimizer whose state differs between parameters, so that order cannot hide."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def gradients(model: nn.Module) -> list[Any]:
    return [parameter.grad for parameter in model.parameters()]


def test_three_steps_equal_the_maths_written_by_hand(kind: Any, telemetry: Any, train: Any, same: Any) -> None:
    model, written = kind.grown(telemetry=telemetry)
    batches = [kind.batch(seed) for seed in range(3)]
    ours, theirs = train(model, batches, sgd(model)), train(written, batches, sgd(written))
    assert same(ours[: 2 * len(batches)], theirs[: 2 * len(batches)])
    assert same(list(model.parameters()), list(written.parameters()))
    assert model.layer.state_layout.errors[0] == 0


def test_the_seed_takes_part(kind: Any) -> None:
    model, written = kind.grown()
    with torch.no_grad():
        assert not torch.allclose(model.eval()(kind.batch()), written.eval().net(kind.batch()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(kind: Any, telemetry: Any, dtype: torch.dtype, weigh: Any, same: Any) -> None:
    found = []
    model, written = kind.grown(telemetry=telemetry)
    for net in (model, written):
        x = kind.batch().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = net(x)
        weigh(out.float()).backward()
        found.append([out.detach(), x.grad, *gradients(net)])
    assert found[0][0].dtype == found[1][0].dtype == kind.out_dtype(dtype)
    assert same(*found)
    assert model.layer.state_layout.errors[0] == 0


def test_a_gradient_scaler_over_autocast(kind: Any, telemetry: Any, train_scaled: Any, same: Any) -> None:
    model, written = kind.grown(telemetry=telemetry)
    batches = [kind.batch(seed) for seed in range(4)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16, backoff_factor=2.0**-6) for _ in range(2)]
    ours = train_scaled(model, batches, sgd(model), scalers[0])
    theirs = train_scaled(written, batches, sgd(written), scalers[1])
    assert same(ours[: 3 * len(batches)], theirs[: 3 * len(batches)])
    assert same(list(model.parameters()), list(written.parameters()))
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert scalers[0].get_scale() == 2.0 ** (10 if kind.is_halved else 16), "float16 overflows, once"
    assert model.layer.state_layout.errors[0] == 0, "which is no failure of the seed"


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(kind: Any, telemetry: Any, reentrant: bool, weigh: Any, same: Any) -> None:
    found = []
    model, written = kind.grown(telemetry=telemetry)
    forwards = int(model.layer.state_layout.forwards[0])
    for net in (model, written):
        x = kind.batch().requires_grad_()
        out = checkpoint(net, x, use_reentrant=reentrant)
        weigh(out).backward()
        found.append([out.detach(), x.grad, *gradients(net)])
    assert same(*found)
    assert model.layer.state_layout.forwards[0] == forwards + 1, "a recomputation is no forward pass of its own"


class Broken(nn.Module):
    """A delta that is not finite from the first step on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h) * self.weight + (self.weight / 0 if self.training else 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_seed_that_fails_under_checkpointing_costs_its_contribution_only(
    kind: Any, reentrant: bool, plant: Any, weigh: Any, same: Any
) -> None:
    model, twin = kind.wrapped()
    model.eval()(kind.batch())
    plant(model.layer, Broken(), 0.5)
    model.train()
    for step in range(1, 5):
        found = []
        for net in (model, twin):
            net.zero_grad()
            x = kind.batch(step).requires_grad_()
            weigh(checkpoint(net, x, use_reentrant=reentrant)).backward()
            found.append([x.grad, *(net.get_parameter(name).grad for name, _ in twin.named_parameters())])
        assert same(*found)
        assert model.layer.state_layout.errors[0] == min(step, 3)
    assert model.layer.state_layout.state(0) is State.ERROR


@pytest.mark.parametrize("name", ["conv2d", "batch_norm2d"])
def test_channels_last_is_kept(name: str, kinds: Any, telemetry: Any, weigh: Any, same: Any) -> None:
    found = []
    for net in kinds[name].grown(telemetry=telemetry):
        net.to(memory_format=torch.channels_last)
        x = kinds[name].batch().contiguous(memory_format=torch.channels_last).requires_grad_()
        out = net(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        weigh(out).backward()
        found.append([out.detach(), x.grad, *gradients(net)])
    assert same(*found)


def test_a_delta_in_another_memory_format_does_not_change_the_hosts(kinds: Any, plant: Any) -> None:
    class Packed(nn.Module):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return h.contiguous()

    model, _ = kinds["conv2d"].wrapped()
    model.to(memory_format=torch.channels_last)
    x = kinds["conv2d"].batch().contiguous(memory_format=torch.channels_last)
    model(x)
    plant(model.layer, Packed(), 0.5)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


LEARNS_ALONE = """
import sys
import torch
from torch import nn
from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.wrap import wrap
from esper.execution.incubation import captured, local_regression_loss, trial_backward
from esper.execution.overrides import SeedRef

torch.manual_seed(0)
model = wrap(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)))
model.to(memory_format=torch.channels_last)
x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
with captured(model[0]) as capture:
    model(x).square().sum().backward()
seed = model[0].germinate(0, default_registry().create_blueprint(sys.argv[2]).ir)
if sys.argv[1] == "frozen":
    for parameter in (*model[0].parameters(False), *model[2].parameters(False)):
        parameter.requires_grad_(False)
    model[0].transition(0, SeedLifecycleState.EVALUATING)
    model[0].set_alpha(0, 0.5)
    for forward in (model, torch.compile(model, backend="aot_eager")):
        forward(x).square().sum().backward()
elif sys.argv[1] == "trial":
    trial_backward(model, [SeedRef("0", 0)], lambda: model(x).square().sum())
else:
    local_regression_loss(seed.kernel, capture.sample).backward()
assert any(parameter.grad is not None and parameter.grad.any() for parameter in seed.parameters())
"""


@pytest.mark.parametrize(
    ("way", "template"),
    [("trial", "bottleneck_adapter"), ("local", "depthwise_separable_conv"), ("frozen", "bottleneck_adapter")],
)
def test_a_seed_with_a_norm_learns_alone_behind_a_channels_last_host(way: str, template: str) -> None:
    """In a process of its own, which a crash ends."""
    command = [sys.executable, "-c", LEARNS_ALONE, way, template]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch_save"])
def test_a_copy_is_whole_and_its_own(kind: Any, way: str, train: Any, same: Any) -> None:
    model, written = kind.grown()
    if way == "torch_save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        double = torch.load(buffer, weights_only=False)
    else:
        double = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    double.layer.set_alpha(0, 0.25)
    assert model.layer.find_seed(0).alpha == 0.5
    double.layer.set_alpha(0, 0.5)
    batches = [kind.batch(seed) for seed in range(2)]
    theirs = train(written, batches, sgd(written))
    for net in (double, model):
        found = train(net, batches, sgd(net))
        assert same(found[:4], theirs[:4])


@pytest.fixture
def built(kind: Any) -> Any:
    """A net with a blended seed of each of two blueprints, its weights moved away from zero."""
    model, _ = kind.wrapped()
    model.eval()(kind.batch())
    for index, blueprint in enumerate(default_registry().for_site(model.layer.site)[:2]):
        model.layer.germinate(index, blueprint.ir, blueprint_id=blueprint.id)
        model.layer.transition(index, State.EVALUATING)
        model.layer.set_alpha(index, 0.25 + 0.5 * index)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    return model


def test_a_grown_state_dict_rebuilds_the_structure_in_a_fresh_host(kind: Any, built: Any) -> None:
    x = kind.batch()
    with torch.no_grad():
        fresh, twin = kind.wrapped()
        assert not torch.equal(fresh.eval()(x), built(x))
        fresh.load_state_dict(built.state_dict())
        assert torch.equal(fresh(x), built(x))
        assert fresh.grown_structure() == built.grown_structure()
        built.load_state_dict(twin.state_dict())
        assert not built.grown_structure()
        assert torch.equal(built(x), twin.eval()(x))


def test_a_module_used_thrice_adds_its_seed_each_time(kind: Any, weigh: Any, same: Any) -> None:
    found = []
    for net in kind.grown():
        x = kind.batch().requires_grad_()
        weigh(net(x) + net(x * 0.5) + net(x * 2.0)).backward()
        found.append([x.grad, *gradients(net)])
    assert same(*found)


def test_hooks_see_the_blended_output(kind: Any) -> None:
    model, written = kind.grown()
    seen: list[torch.Tensor] = []
    model.layer.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if type(out) is tuple else out))
    out = model(kind.batch())
    assert torch.equal(torch.sigmoid(seen[0]), out)
    assert torch.equal(out, written(kind.batch()))


def test_inference_mode(kind: Any) -> None:
    model, written = kind.grown()
    with torch.inference_mode():
        assert torch.equal(model.eval()(kind.batch()), written.eval()(kind.batch()))
