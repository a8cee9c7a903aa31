"""Every kind of layer under ``torch.compile``: the host's graph while dormant, one more per growth, none per alpha."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap

# Dynamo itself makes an instance of every autograd function that it traces.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def counters() -> tuple[CompileCounterWithBackend, CompileCounterWithBackend]:
    return CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")


def test_dormant_it_is_the_hosts_one_graph(kind: Any, telemetry: Any, weigh: Any) -> None:
    model, twin = kind.wrapped(telemetry=telemetry)
    mine, theirs = counters()
    ours = torch.compile(model, backend=mine, fullgraph=True)
    host = torch.compile(twin, backend=theirs, fullgraph=True)
    for seed in range(3):
        a, b = ours(kind.batch(seed)), host(kind.batch(seed))
        assert torch.equal(a, b)
        weigh(a).backward()
        weigh(b).backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    assert mine.frame_count == theirs.frame_count == 1
    assert mine.op_count == theirs.op_count


def test_eager_passes_in_between_recompile_nothing(kind: Any, telemetry: Any) -> None:
    model, _ = kind.wrapped(telemetry=telemetry)
    mine, _ = counters()
    compiled = torch.compile(model, backend=mine, fullgraph=True)
    for seed in range(3):
        model(kind.batch(seed))  # counts a pass, learns the site, measures
        compiled(kind.batch(seed))
    # The site is learnt in the first eager pass, before the first compiled one.
    assert mine.frame_count == 1


def test_growth_recompiles_once_and_alpha_never(kind: Any, plant: Any, delta: Any) -> None:
    model, _ = kind.wrapped()
    model.eval()(kind.batch())
    mine, _ = counters()
    compiled = torch.compile(model, backend=mine, fullgraph=True)
    before = compiled(kind.batch())
    assert torch.equal(before, model(kind.batch()))
    model.layer.attach_module(0, delta())
    assert torch.equal(compiled(kind.batch()), before)
    assert mine.frame_count == 1, "an ACTIVE seed is behind the host's back"
    model.layer.transition(0, State.EVALUATING)
    for alpha in (0.0, 0.1, 0.5, 1.0, 0.3):
        model.layer.set_alpha(0, alpha)
        torch.testing.assert_close(compiled(kind.batch()), model(kind.batch()))
    assert not torch.allclose(compiled(kind.batch()), before)
    assert mine.frame_count == 2
    model.layer.clear_seed(0)
    assert torch.equal(compiled(kind.batch()), before)
    assert mine.frame_count == 2, "the dormant graph is still there"


def test_gradients_of_a_grown_model_are_the_eager_ones(kind: Any, weigh: Any) -> None:
    model, written = kind.grown()
    for net in (torch.compile(model, backend="aot_eager", fullgraph=True), written):
        weigh(net(kind.batch())).backward()
    for parameter, other in zip(model.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_trains_a_grown_model(kinds: Any, weigh: Any) -> None:
    model, written = kinds["linear"].grown()
    for net in (torch.compile(model, fullgraph=True), written):
        weigh(net(kinds["linear"].batch())).backward()
    for parameter, other in zip(model.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    middle = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2)]
    return nn.Sequential(*middle, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("make", "shape"), [(mlp, (5, 6)), (convolutional, (4, 3, 6, 6))], ids=["mlp", "conv"])
def test_inductor_gives_a_dormant_model_the_hosts_own_bits(
    make: Any, shape: tuple[int, ...], telemetry: Any, train: Any, same: Any
) -> None:
    torch.manual_seed(0)
    host = make()
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=telemetry)
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found, counted = [], []
    for net in (model, twin):
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(net, backend=counter, fullgraph=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        found.append([*train(compiled, batches, optimizer), *(parameter.grad for parameter in net.parameters())])
        counted.append((counter.frame_count, counter.op_count))
    assert same(*found)
    assert counted[0] == counted[1]
    assert counted[0][0] == 1
