"""torch.compile of wrapped models: one graph while dormant, one more per growth, none per alpha."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounterWithBackend

from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import LayerTelemetry, wrap
from esper.execution.incubation import trial_backward
from esper.execution.overrides import SeedRef, seeds_at

# Dynamo itself makes an instance of every autograd function that it traces.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("eager")


class Lift(nn.Module):
    """A linear map of h with weights that show."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((features,), 0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * self.weight


def plant(pair: Any, *states: State) -> Any:
    layer = pair.model.layer1
    layer.attach_module(0, Lift(32))
    for state in states:
        layer.transition(0, state)
    return layer


@pytest.mark.parametrize("telemetry", [False, LayerTelemetry(interval_steps=2)], ids=["silent", "measured"])
def test_a_dormant_model_is_the_hosts_one_graph(make_pair: Any, counter: Any, telemetry: Any) -> None:
    pair = make_pair(telemetry=telemetry)
    theirs = CompileCounterWithBackend("eager")
    ours = torch.compile(pair.model, backend=counter, fullgraph=True)
    host = torch.compile(pair.twin, backend=theirs, fullgraph=True)
    for _ in range(5):
        a, b = ours(pair.x), host(pair.x)
        assert torch.equal(a, b)
        F.cross_entropy(a, pair.y).backward()
        F.cross_entropy(b, pair.y).backward()
        assert pair.same_gradients()
    assert counter.frame_count == theirs.frame_count == 1
    assert counter.op_count == theirs.op_count


def test_compiling_before_the_first_pass_works_and_leaves_the_site_unknown(pair: Any, counter: Any) -> None:
    torch.compile(pair.model, backend=counter, fullgraph=True)(pair.x)
    assert pair.model.layer1.site is None
    pair.model(pair.x)
    assert pair.model.layer1.site is not None


def test_an_active_seed_does_not_recompile(warm: Any, counter: Any) -> None:
    compiled = torch.compile(warm.model, backend=counter, fullgraph=True)
    before = compiled(warm.x)
    plant(warm)
    assert torch.equal(compiled(warm.x), before)
    assert counter.frame_count == 1


def test_blending_recompiles_once_and_alpha_never(warm: Any, counter: Any) -> None:
    compiled = torch.compile(warm.model, backend=counter, fullgraph=True)
    compiled(warm.x)
    layer = plant(warm, State.EVALUATING)
    for alpha in (0.0, 0.1, 0.35, 0.7, 1.0):
        layer.set_alpha(0, alpha)
        torch.testing.assert_close(compiled(warm.x), warm.model(warm.x))
        assert counter.frame_count == 2
    layer.transition(0, State.FOSSILIZED)
    for _ in range(2):
        torch.testing.assert_close(compiled(warm.x), warm.model(warm.x))
    assert counter.frame_count <= 3


def test_gradients_of_a_compiled_grown_model_are_the_eager_ones(warm: Any, counter: Any) -> None:
    layer = plant(warm, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    found = []
    for model in (warm.model, torch.compile(warm.model, backend=counter, fullgraph=True)):
        warm.model.zero_grad()
        F.cross_entropy(model(warm.x), warm.y).backward()
        found.append({name: parameter.grad.clone() for name, parameter in warm.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_a_failing_kernel_in_a_compiled_graph_costs_its_contribution_only(warm: Any, counter: Any) -> None:
    layer = plant(warm, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    with torch.no_grad():
        layer.find_seed(0).kernel.weight.fill_(torch.nan)
    compiled = torch.compile(warm.model, backend=counter, fullgraph=True)
    for _ in range(3):
        out, theirs = compiled(warm.x), warm.twin(warm.x)
        torch.testing.assert_close(out, theirs)
        F.cross_entropy(out, warm.y).backward()
        F.cross_entropy(theirs, warm.y).backward()
    assert counter.frame_count == 1
    assert warm.same_gradients()
    assert layer.state_layout.state(0) is State.EVALUATING
    assert warm.model.settle_failures() == 3
    assert layer.state_layout.state(0) is State.ERROR
    torch.testing.assert_close(compiled(warm.x), warm.twin(warm.x))


def test_a_trial_through_a_compiled_model_teaches_the_seed(warm: Any, counter: Any) -> None:
    plant(warm)
    compiled = torch.compile(warm.model, backend=counter)
    before = compiled(warm.x)
    eager, ours = [], []
    for model, found in ((warm.model, eager), (compiled, ours)):
        warm.model.zero_grad()
        value = trial_backward(
            warm.model, [SeedRef("layer1", 0)], lambda model=model: F.cross_entropy(model(warm.x), warm.y)
        )
        found.extend([value, warm.model.layer1.seed_parameters(0)[0].grad.clone()])
    assert ours[0] == pytest.approx(eager[0], rel=1e-6)
    torch.testing.assert_close(ours[1], eager[1])
    assert torch.equal(compiled(warm.x), before)


def test_a_dynamic_batch_stays_one_graph_per_shape_class(make_pair: Any, counter: Any) -> None:
    pair = make_pair(telemetry=LayerTelemetry(interval_steps=2))
    compiled = torch.compile(pair.model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (4, 5, 9):
        x = torch.randn(batch, 3, 8, 8)
        pair.model.eval()
        pair.twin.eval()
        assert torch.equal(compiled(x), pair.twin(x))
    assert counter.frame_count == 1


def test_a_model_compiled_in_place_grows(warm: Any) -> None:
    warm.model.compile(backend="eager", fullgraph=True)
    before = warm.model(warm.x)
    layer = plant(warm, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    assert not torch.equal(warm.model(warm.x), before)


def test_a_model_compiled_in_place_is_one_graph_and_runs_eagerly_where_that_is_forced(warm: Any, counter: Any) -> None:
    warm.model.compile(backend=counter, fullgraph=True)
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))
    assert counter.frame_count == 1
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(warm.model(warm.x), warm.twin(warm.x))


def test_a_wrapped_dormant_model_goes_through_torch_export(warm: Any) -> None:
    program = torch.export.export(warm.model, (warm.x,))
    torch.testing.assert_close(program.module()(warm.x), warm.twin(warm.x))


def test_a_copy_of_a_compiled_grown_model_is_its_equal(warm: Any) -> None:
    layer = plant(warm, State.EVALUATING)
    layer.set_alpha(0, 0.5)
    twin = copy.deepcopy(warm.model)
    assert torch.equal(twin(warm.x), warm.model(warm.x))


def grow_and_check(model: Any, compiled: Any, x: Tensor, *, times: int) -> None:
    """Plant seeds one after another; after each the compiled model gives what the eager one gives, or fails."""
    layers = list(model.kasmina_layers.values())
    for number in range(times):
        layer, index = layers[number % len(layers)], number // len(layers)
        layer.germinate(index, default_registry().create_blueprint("bottleneck_adapter").ir, random_seed=number)
        layer.transition(index, State.EVALUATING)
        layer.set_alpha(index, 0.5)
        with torch.no_grad():
            for parameter in layer.seed_parameters(index):
                parameter.add_(0.1)
        torch.testing.assert_close(compiled(x), model(x))


def rows() -> Any:
    model = wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.randn(4, 8)
    model(x)
    return model, x


def test_growing_often_compiles_once_for_each_growth_and_keeps_few_old_graphs(counter: Any) -> None:
    model, x = rows()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    grow_and_check(model, compiled, x, times=10)
    assert counter.frame_count == 11
    assert len(_debug_get_cache_entry_list(type(model).__call__.__code__)) <= dynamo_config.recompile_limit // 2 + 1


def test_a_culled_seed_brings_the_graph_before_it_back(counter: Any) -> None:
    model, x = rows()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    layer = model.kasmina_layer("2")
    for number in range(2):
        layer.germinate(0, default_registry().create_blueprint("bottleneck_adapter").ir, random_seed=number)
        layer.transition(0, State.EVALUATING)
        layer.set_alpha(0, 0.5)
        compiled(x)
        layer.clear_seed(0)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1 + 2


def test_growing_often_inside_a_compiled_step_function(counter: Any) -> None:
    model, x = rows()

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return model(x) * 1.0

    grow_and_check(model, step, x, times=9)
    assert counter.frame_count == 9


def test_configurations_of_the_same_seeds_share_a_graph(counter: Any) -> None:
    model, x = rows()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    grow_and_check(model, compiled, x, times=3)
    refs = [SeedRef(name, seed.index) for name, layer in model.kasmina_layers.items() for seed in layer.live_seeds()]
    before = counter.frame_count
    for number in range(2 ** len(refs)):
        with seeds_at(model, {ref: float(number >> place & 1) for place, ref in enumerate(refs)}):
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == before + 1
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == before + 1
