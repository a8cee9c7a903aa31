"""Seeds that read another layer's input: what they add, what is kept for them and how long, and where it is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.blueprints import default_registry, is_legal
from esper.contracts.errors import (
    CorruptDataError,
    InvalidBlueprintError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
)
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.morphable import MorphableModel
from esper.core.wrap import unwrap, wrap
from esper.execution.circuit_breaker import FAILURE_LIMIT
from esper.execution.counterfactual import measure_contribution
from esper.execution.grown import GrownSeed
from esper.execution.incubation import trial_backward
from esper.execution.overrides import SeedRef

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Host(nn.Module):
    """Three linear layers, of which the first or all but it may stand in checkpointed parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 10)
        self.last = nn.Linear(10, 5)
        self.parts: tuple[tuple[str, ...], ...] = ()
        self.use_reentrant = False
        self.between: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts or (("first", "middle", "last"),)
        for part in parts:
            run = self._runner(part)
            x = checkpoint(run, x, use_reentrant=self.use_reentrant) if self.parts else run(x)
        return x

    def _runner(self, part: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for name in part:
                x = getattr(self, name)(self.between(x))
            return x

        return run


class Skip(nn.Module):
    """A linear map of another layer's input."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs, bias=False)
        self.scale = scale

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        del h
        return self.scale * self.map(x)


@pytest.fixture
def model() -> MorphableModel:
    torch.manual_seed(0)
    model = wrap(Host(), telemetry=False)
    model(X)
    return model


def plant(model: MorphableModel, *states: State, source: str = "first", layer: str = "last", index: int = 0) -> Any:
    place = model.kasmina_layer(layer)
    site = place.skip_site(source)
    seed = place.attach_module(index, Skip(site.input_shape[-1], site.output_shape[-1]), source=source)
    for state in states:
        place.transition(index, state)
    return seed


def by_hand(model: MorphableModel, seed: Any, x: Tensor, alpha: float = 1.0) -> Tensor:
    """The three layers, and the seed's map of the first one's input on top."""
    seen = torch.tanh(x)
    h = seen
    for name in ("first", "middle", "last"):
        layer = model.kasmina_layer(name)
        h = F.linear(h if name == "first" else torch.tanh(h), layer.weight, layer.bias)
    return h + alpha * seed.kernel(seen, h)


def is_nothing_kept(model: MorphableModel) -> bool:
    return not model.kasmina_layer("last")._kasmina.skips._kept


def is_silent(model: MorphableModel) -> bool:
    """Whether no layer and no hook of the host has anything to do for a skip seed."""
    layers = model.kasmina_layers.values()
    return not model.host_module._forward_hooks and all(
        "forward" not in vars(layer) and not layer._forward_hooks for layer in layers
    )


# --- what it adds ---


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_it_adds_its_map_of_the_sources_input(model: MorphableModel, alpha: float) -> None:
    seed = plant(model, State.EVALUATING)
    model.kasmina_layer("last").set_alpha(0, alpha)
    torch.testing.assert_close(model(X), by_hand(model, seed, X, alpha))
    assert is_nothing_kept(model)


def test_gradients_reach_the_seed_and_the_host_through_the_source(model: MorphableModel) -> None:
    seed = plant(model, State.EVALUATING, State.FOSSILIZED, source="middle")
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    ours = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    first = torch.tanh(F.linear(torch.tanh(x), model.first.weight, model.first.bias))
    h = F.linear(
        torch.tanh(F.linear(first, model.middle.weight, model.middle.bias)), model.last.weight, model.last.bias
    )
    (h + seed.kernel(first, h)).square().sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(ours[name], value.grad)


def test_while_active_the_host_is_untouched_and_nothing_is_kept(model: MorphableModel) -> None:
    before = model(X)
    plant(model)
    assert torch.equal(model(X), before)
    assert is_silent(model)


def test_a_seed_on_the_layers_own_input_stands_beside_it(model: MorphableModel) -> None:
    layer = model.kasmina_layer("last")
    skip = plant(model, State.EVALUATING, State.FOSSILIZED)
    own = layer.attach_module(1, Skip(10, 5))
    layer.transition(1, State.EVALUATING)
    layer.transition(1, State.FOSSILIZED)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    torch.testing.assert_close(model(X), by_hand(model, skip, X) + own.kernel(seen[0], None))
    model(X).sum().backward()
    assert own.kernel.map.weight.grad is not None
    assert skip.kernel.map.weight.grad is not None


def test_two_readers_share_what_one_source_keeps(model: MorphableModel) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED, layer="middle")
    plant(model, State.EVALUATING, State.FOSSILIZED, layer="last")
    with_both = model(X)
    model.kasmina_layer("middle").clear_seed(0)
    assert not torch.equal(model(X), with_both)
    assert model.kasmina_layer("first")._kasmina.is_read
    model.kasmina_layer("last").clear_seed(0)
    assert is_silent(model)


# --- what is kept, and how long ---


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_is_kept_for_one_pass_only(model: MorphableModel, grad: bool) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED)
    seen: list[weakref.ref[Tensor]] = []
    model.first.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with torch.set_grad_enabled(grad):
        model(X)
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_a_pass_that_raises_keeps_nothing(model: MorphableModel) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED)

    def fail(*_: object) -> None:
        raise ValueError("the user's own")

    handle = model.middle.register_forward_hook(fail)
    with pytest.raises(ValueError, match="the user's own"):
        model(X)
    handle.remove()
    assert is_nothing_kept(model)


def test_a_culled_seed_leaves_no_trace(model: MorphableModel) -> None:
    before = model(X)
    plant(model, State.EVALUATING)
    model.kasmina_layer("last").set_alpha(0, 0.5)
    model(X)
    model.kasmina_layer("last").clear_seed(0)
    assert torch.equal(model(X), before)
    assert is_silent(model)
    unwrap(model)


def test_a_copy_and_its_original_keep_apart(model: MorphableModel) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    twin.kasmina_layer("last").clear_seed(0)
    assert is_silent(twin)
    assert model.kasmina_layer("first")._kasmina.is_read
    assert not torch.equal(twin(X), model(X))


def test_an_input_written_to_in_place_is_refused(model: MorphableModel) -> None:
    host_alone = model(X)
    seed = plant(model, State.EVALUATING, State.FOSSILIZED)

    def spoil(_: object, args: tuple[Tensor, ...], __: object) -> None:
        args[0].zero_()

    model.first.register_forward_hook(spoil)
    with torch.no_grad():
        out = model(X)
    assert "written to in place" in seed.breaker.last_failure
    assert torch.equal(out, host_alone)


def test_in_inference_mode_it_adds_the_same(model: MorphableModel) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED)
    with torch.inference_mode():
        assert torch.equal(model(X), model(X))


def test_a_reader_that_is_called_by_itself_gets_nothing_stale(model: MorphableModel) -> None:
    seed = plant(model, State.EVALUATING, State.FOSSILIZED)
    model(X)
    features = torch.randn(4, 10)
    layer = model.kasmina_layer("last")
    assert torch.equal(layer(features), F.linear(features, layer.weight, layer.bias))
    assert "got no input in this pass" in seed.breaker.last_failure


# --- activation checkpointing ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_one_checkpointed_part_it_is_recomputed(model: MorphableModel, use_reentrant: bool) -> None:
    seed = plant(model, State.EVALUATING, State.FOSSILIZED)
    x = X.clone().requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    host = model.host_module
    host.parts, host.use_reentrant = (("first", "middle", "last"),), use_reentrant
    model(x).square().sum().backward()
    for expected, found in zip(plain, [x, *model.parameters()], strict=True):
        assert torch.equal(expected, found.grad)
    assert not seed.breaker.failures_in_row
    assert is_nothing_kept(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_across_checkpointed_parts_it_is_cut_off_and_the_host_goes_on(
    model: MorphableModel, use_reentrant: bool
) -> None:
    x = X.clone().requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.host_module.parameters()])
    seed = plant(model, State.EVALUATING, State.FOSSILIZED)
    host = model.host_module
    host.parts, host.use_reentrant = (("first",), ("middle", "last")), use_reentrant
    for _ in range(FAILURE_LIMIT + 1):
        x.grad = None
        model.zero_grad()
        model(x).square().sum().backward()
    model(x)
    assert model.kasmina_layer("last").state_layout.state(0) is State.ERROR
    assert "no_input" in seed.breaker.last_failure
    own = [value for name, value in model.named_parameters() if ".seeds." not in name]
    x.grad = None
    model.zero_grad()
    model(x).square().sum().backward()
    for expected, found in zip(plain, [x, *own], strict=True):
        assert torch.equal(expected, found.grad)
    assert is_nothing_kept(model)


def test_a_source_inside_a_checkpointed_part_may_be_read_outside(model: MorphableModel) -> None:
    plant(model, State.EVALUATING, State.FOSSILIZED)
    x = X.clone().requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    model.host_module.forward = lambda x: model.last(
        torch.tanh(checkpoint(lambda x: model.middle(torch.tanh(model.first(torch.tanh(x)))), x, use_reentrant=False))
    )
    model(x).square().sum().backward()
    for expected, found in zip(plain, [x, *model.parameters()], strict=True):
        torch.testing.assert_close(expected, found.grad)


# --- learning and measuring ---


def test_it_learns_on_a_trial_branch_and_its_contribution_is_measured(model: MorphableModel) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(256, 6)
    targets = torch.tanh(inputs) @ torch.randn(6, 5)
    seed = plant(model)
    ref = SeedRef("last", 0)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.03)
    for _ in range(150):
        trial_backward(model, [ref], lambda: F.mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    assert is_silent(model)
    batches = [(inputs, targets)]
    found = measure_contribution(model, batches, lambda out, y: (out - y).square().mean(1), layer="last", seed_index=0)
    assert found.low > 0.5 * float((model(inputs).detach() - targets).square().mean())


# --- blueprints, checkpoints, refusals ---


def legal(model: MorphableModel, source: str, layer: str) -> Any:
    site = model.kasmina_layer(layer).skip_site(source)
    return [blueprint for blueprint in default_registry().for_site(site) if is_legal(blueprint.ir, site)]


def grow(model: MorphableModel, blueprint: Any, *, source: str = "first", layer: str = "last") -> None:
    place = model.kasmina_layer(layer)
    place.germinate(0, blueprint.ir, blueprint_id=blueprint.id, source=source)
    place.transition(0, State.EVALUATING)
    place.transition(0, State.FOSSILIZED)
    with torch.no_grad():
        for parameter in place.seed_parameters(0):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_every_blueprint_that_is_legal_between_the_two_grows_there(model: MorphableModel) -> None:
    found = legal(model, "first", "last")
    assert len(found) >= 3
    before = model(X)
    for blueprint in found:
        grow(model, blueprint)
        assert torch.isfinite(model(X)).all()
        assert not torch.equal(model(X), before)
        model.kasmina_layer("last").clear_seed(0)


def test_a_checkpoint_names_the_source_and_builds_it_again(model: MorphableModel) -> None:
    grow(model, legal(model, "first", "last")[0])
    assert [grown.source for grown in model.grown_structure()] == ["first"]
    fresh = wrap(Host(), telemetry=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    assert fresh.kasmina_layer("last").require_seed(0).source == "first"
    assert fresh.kasmina_layer("last").site.input_shape == (10,), "the layer's own, not the skip seed's"


def test_a_seed_with_another_source_is_built_anew(model: MorphableModel) -> None:
    grow(model, legal(model, "first", "last")[0])
    state = model.state_dict()
    other = wrap(Host(), telemetry=False)
    other(X)
    grow(other, legal(other, "middle", "last")[0], source="middle")
    other.load_state_dict(state)
    assert other.kasmina_layer("last").require_seed(0).source == "first"
    assert not other.kasmina_layer("middle")._kasmina.is_read
    assert torch.equal(other(X), model(X))


def test_bytes_of_the_first_format_are_a_seed_on_its_own_input(model: MorphableModel) -> None:
    grow(model, legal(model, "first", "last")[0])
    (grown,) = model.grown_structure()
    assert GrownSeed.from_bytes(grown.to_bytes()) == grown
    plain = replace(grown, source="")
    data = plain.to_bytes()
    first = data.replace(b"esper-seed-2\n", b"esper-seed-1\n")[:-4]
    assert GrownSeed.from_bytes(first) == plain
    with pytest.raises(CorruptDataError, match="must hold 6 parts"):
        GrownSeed.from_bytes(data[:-4])


@pytest.mark.parametrize("source", ["nowhere", "last"])
def test_a_checkpoint_whose_source_is_no_other_layer_is_refused_whole(model: MorphableModel, source: str) -> None:
    grow(model, legal(model, "first", "last")[0])
    (grown,) = model.grown_structure()
    with pytest.raises(CorruptDataError, match="must read another layer"):
        wrap(Host()).rebuild([replace(grown, source=source)])


def test_a_source_must_run_before_and_be_known(model: MorphableModel) -> None:
    first, last = model.kasmina_layer("first"), model.kasmina_layer("last")
    with pytest.raises(InvalidInputError, match="must run before the layer 'first', got 'last'"):
        first.attach_module(0, Skip(10, 8), source="last")
    with pytest.raises(InvalidInputError, match="must run before the layer 'last', got 'last'"):
        last.attach_module(0, Skip(10, 5), source="last")
    with pytest.raises(NotFoundError, match="source must be a layer of the model that can hold seeds, got 'nowhere'"):
        last.attach_module(0, Skip(10, 5), source="nowhere")
    with pytest.raises(InvalidStateError, match="must know its shapes"):
        wrap(Host()).kasmina_layer("last").skip_site("first")
    assert last.state_layout.state(0) is State.DORMANT


class Folding(nn.Module):
    """A layer that sees rows and one that sees their pairs, behind an image."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.rows = nn.Linear(8, 4)
        self.pairs = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(self.image(x).flatten(1).reshape(-1, 8))
        return self.pairs(rows.reshape(-1, 8))


def test_a_source_of_another_batch_or_rank_is_refused() -> None:
    model = wrap(Folding())
    model(torch.randn(4, 1, 4, 4))
    pairs = model.kasmina_layer("pairs")
    with pytest.raises(InvalidInputError, match="must see a batch of 8"):
        pairs.skip_site("rows")
    model = wrap(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
    model(torch.randn(4, 1, 4, 4))
    with pytest.raises(InvalidBlueprintError, match="have input and output shapes of"):
        model.kasmina_layer("2").germinate(
            0, default_registry().create_blueprint(default_registry().names()[0]).ir, source="0"
        )


# --- compiled, and fused ---


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_with_a_skip_seed_is_one_graph(model: MorphableModel) -> None:
    plant(model, State.EVALUATING)
    model.kasmina_layer("last").set_alpha(0, 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    model.kasmina_layer("last").set_alpha(0, 1.0)
    x = X.clone().requires_grad_()
    ours = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
    theirs = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert is_nothing_kept(model)


def test_a_fused_encoder_layer_does_not_go_around_a_source() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = wrap(encoder, telemetry=False).eval()
    tokens = torch.randn(3, 4, 8)
    with torch.enable_grad():
        model(tokens)
    reader = model.kasmina_layer("layers.1.linear2")
    seed = reader.attach_module(0, Skip(8, 8), source="layers.0.self_attn")
    reader.transition(0, State.EVALUATING)
    reader.transition(0, State.FOSSILIZED)
    masked = torch.zeros(3, 4, dtype=torch.bool)
    masked[:, 3] = True
    with torch.no_grad():
        fused = model(tokens, src_key_padding_mask=masked)
    assert torch.allclose(fused, model(tokens, src_key_padding_mask=masked), atol=1e-6)
    assert not seed.breaker.last_failure
