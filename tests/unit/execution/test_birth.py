"""First weights fitted to what a site carries: no unit dead, features of unit variance, and a delta that stays 0."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from esper.blueprints import default_registry, ir_from_bytes, parse_text, plan
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.wrap import wrap
from esper.execution import birth
from esper.execution.birth import fit_to_site, seen_at_site
from esper.execution.overrides import SeedRef

FITTED = {
    "bottleneck_adapter": ("down",),
    "gated_mlp": ("gate",),
    "glu": ("gate",),
    "widen": ("units",),
    "conv1x1": ("units",),
    "conv3x3": ("units",),
    "depthwise_separable_conv": ("depth",),
    "dilated_conv": ("wide",),
    "widen_conv": ("units",),
    "squeeze_excite": ("down",),
    "signal_conv": ("first", "second", "third"),
    "image_conv": ("first", "second"),
    "causal_token_conv": ("mixed",),
    "token_channel_mixer": ("across", "down"),
    # Nothing drawn in them feeds an activation: it begins at zero, or leads to attention or straight to the delta.
    **dict.fromkeys(("norm_shift", "lora", "deepen", "deepen_conv", "low_rank_attention", "causal_attention"), ()),
}
"""Nodes of each template that are to be fitted, in order."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(9, 16), (9,)),
    "linear on an image": (lambda: nn.Linear(64, 16), (64,)),
    "linear on tokens": (lambda: nn.Linear(8, 12), (6, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3), (3, 20)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 8, 8)),
    "conv2d, strided": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 8, 8)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (6, 16)),
    "layer norm": (lambda: nn.LayerNorm(64), (64,)),
    "layer norm on tokens": (lambda: nn.LayerNorm(16), (6, 16)),
    "batch norm": (lambda: nn.BatchNorm1d(16), (16,)),
    "batch norm on signals": (lambda: nn.BatchNorm1d(6), (6, 12)),
    "batch norm on images": (lambda: nn.BatchNorm2d(8), (8, 6, 6)),
}
ACTIVATIONS = (F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus)
ROWS = 48


class Alone(nn.Module):
    """One layer; attention attends to itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)


class Seen(TorchFunctionMode):
    """Keeps what activations give, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in ACTIVATIONS:
            self.found.append(value)
        return value


def place(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Give a layer of a kind that has seen a batch."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wrap(Alone(make())).to(dtype)
        model(torch.randn(4, *shape, dtype=dtype))
    return model.kasmina_layer("layer")


def batch(site: Any, *, shift: float = 10.0, scale: float = 100.0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Give x and h of a site."""
    draw = torch.Generator().manual_seed(5)
    x, h = (torch.randn(rows, *shape, generator=draw) for shape in (site.input_shape, site.output_shape))
    return (x + shift) * scale, (h + shift) * scale


def designed(layer: Any, text: str, *, random_seed: int = 3) -> Any:
    return layer.germinate(0, parse_text(f"blueprint 1\n{text}"), random_seed=random_seed)


def weights(seed: Any) -> list[Tensor]:
    return [value.detach().clone() for value in seed.kernel.parameters()]


def same(before: list[Tensor], seed: Any) -> bool:
    return all(torch.equal(mine, born) for mine, born in zip(weights(seed), before, strict=True))


def share_of_dead(seed: Any, x: Tensor, h: Tensor) -> list[float]:
    """Give the share of units that are 0 on the whole batch, for each activation of the kernel."""
    with Seen() as seen, torch.no_grad():
        seed.kernel(x, h)
    steps = [step for step in plan(ir_from_bytes(seed.ir), seed.site).steps if step.node.op == "activation"]
    pairs = zip(steps, seen.found, strict=True)
    return [float((v == 0).movedim(step.output.channel_dim, 0).flatten(1).all(1).float().mean()) for step, v in pairs]


def variance_at(seed: Any, name: str, x: Tensor, h: Tensor) -> tuple[float, float]:
    """Give the mean variance of a map's units, and their largest mean."""
    module, found = seed.kernel.get_submodule(f"node_{name}"), list[Tensor]()
    handle = module.register_forward_hook(lambda _module, _args, out: found.append(out))
    with torch.no_grad():
        seed.kernel(x, h)
    handle.remove()
    units = found[0].double().movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
    return float(units.var(1, correction=0).mean()), float(units.mean(1).abs().max())


def cases() -> Iterator[Any]:
    for name in LAYERS:
        for blueprint in default_registry().for_site(place(name).site):
            yield pytest.param(name, blueprint.name, id=f"{name}: {blueprint.name}")


def test_every_template_is_spoken_of() -> None:
    assert set(FITTED) == set(default_registry().names())


@pytest.mark.parametrize(("name", "template"), list(cases()))
def test_every_template_of_every_kind_of_site_is_alive_on_shifted_and_scaled_inputs(name: str, template: str) -> None:
    layer = place(name)
    seed = layer.germinate(0, default_registry().create_blueprint(template).ir, random_seed=3)
    x, h = batch(layer.site)
    before = weights(seed)
    assert fit_to_site(seed, x, h, random_seed=3) == FITTED[template]
    for node in FITTED[template]:
        variance, mean = variance_at(seed, node, x, h)
        assert 0.5 <= variance <= 2.0
        assert mean < 0.05
    # Behind them there may be a gate that begins closed.
    assert share_of_dead(seed, x, h)[: len(FITTED[template])] == [0.0] * len(FITTED[template])
    assert same(before, seed) == (not FITTED[template])
    with torch.no_grad():
        assert torch.equal(seed.kernel(x, h), torch.zeros_like(h))


@pytest.mark.parametrize(
    ("name", "template"),
    [("conv2d", "widen_conv"), ("linear on an image", "image_conv"), ("layer norm", "signal_conv")],
)
def test_as_they_are_drawn_units_are_dead_there(name: str, template: str) -> None:
    layer = place(name)
    seed = layer.germinate(0, default_registry().create_blueprint(template).ir, random_seed=3)
    assert max(share_of_dead(seed, *batch(layer.site))) > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_fitted_in_their_own(dtype: torch.dtype) -> None:
    layer = place("conv2d", dtype)
    seed = layer.germinate(0, default_registry().create_blueprint("conv3x3").ir, random_seed=3)
    x, h = batch(layer.site, shift=2.0)  # in float32, as autocast or a caller may hand them over
    assert fit_to_site(seed, x, h, random_seed=3) == ("units",)
    assert {value.dtype for value in seed.kernel.parameters()} == {dtype}
    assert 0.5 <= variance_at(seed, "units", x.to(dtype), h.to(dtype))[0] <= 2.0


NO_BIAS = """
    units = linear(x, features=64, bias=false)
    act = activation(units, fn=relu)
    out = linear(act, init=zero)
    return out
"""


def test_dead_units_alone_are_drawn_anew_as_they_were_drawn() -> None:
    layer = place("linear")
    seed = designed(layer, NO_BIAS)
    x, h = batch(layer.site)
    born = seed.kernel.node_units.weight.detach().clone()
    (dead,) = share_of_dead(seed, x, h)
    assert dead > 0.2
    assert fit_to_site(seed, x, h, random_seed=3) == ("units",)
    assert share_of_dead(seed, x, h) == [0.0]
    assert 0.5 <= variance_at(seed, "units", x, h)[0] <= 2.0
    found = seed.kernel.node_units.weight.detach()
    kept = F.cosine_similarity(found, born) > 0.9999
    assert float((~kept).float().mean()) == pytest.approx(dead)
    sizes = found.norm(dim=1)
    assert float(sizes[~kept].mean() / sizes[kept].mean()) == pytest.approx(1.0, abs=0.25)


def test_draws_follow_from_the_random_seed_and_are_not_those_of_the_first_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(birth, "MAX_DRAWS", 1)
    found = []
    for random_seed in (3, 3, 4):
        layer = place("linear")
        seed = designed(layer, NO_BIAS, random_seed=random_seed)
        x, h = batch(layer.site)
        (dead,) = share_of_dead(seed, x, h)
        born = seed.kernel.node_units.weight.detach().clone()
        fit_to_site(seed, x, h, random_seed=random_seed)
        found.append(seed.kernel.node_units.weight.detach())
        moved = F.cosine_similarity(found[-1], born) < 0.9999
        assert float(moved.float().mean()) == pytest.approx(dead)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_units_that_no_draw_brings_to_life_do_not_hold_it_up() -> None:
    layer = place("linear")
    text = NO_BIAS.replace("bias=false)", "bias=false)\n    sunk = layer_norm(units)")
    seed = designed(layer, text.replace("activation(units", "activation(sunk"))
    with torch.no_grad():
        seed.kernel.node_sunk.bias.fill_(-1e3)
    before = weights(seed)
    assert fit_to_site(seed, *batch(layer.site), random_seed=3) == ("units",)
    assert not same(before, seed)
    assert all(torch.isfinite(value).all() for value in weights(seed))


def test_a_unit_that_does_not_vary_keeps_its_mean_or_is_drawn_anew() -> None:
    layer = place("conv2d")
    seed = designed(
        layer,
        "depth = depthwise_conv(h, kernel=1)\n act = activation(depth, fn=relu)\n"
        "out = conv(act, kernel=1, init=zero)\n return out",
    )
    x, h = batch(layer.site)
    h[:, :4] = 0.0
    with torch.no_grad():
        seed.kernel.node_depth.bias[:4] = torch.tensor([0.3, 0.3, -0.3, -0.3])
    assert fit_to_site(seed, x, h, random_seed=3) == ("depth",)
    assert share_of_dead(seed, x, h) == [0.0], "the two that were below 0 have been drawn anew"
    assert bool((seed.kernel.node_depth.bias[:4] > 0).all())


@pytest.mark.parametrize("template", ["widen", "gated_mlp", "signal_conv"])
@pytest.mark.parametrize("what", ["one example", "constant", "rounding", "NaN", "infinity", "too large"])
def test_where_nothing_can_be_told_weights_stay_as_they_were_drawn(what: str, template: str) -> None:
    layer = place("linear on an image")
    seed = layer.germinate(0, default_registry().create_blueprint(template).ir, random_seed=3)
    x, h = batch(layer.site, rows=1 if what == "one example" else ROWS)
    if what in ("constant", "rounding"):
        noise = 1e-7 * torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(1)) * (what == "rounding")
        x, h = x[:1] * (1.0 + noise), h[:1] * (1.0 + noise)
    elif what != "one example":
        value = {"NaN": torch.nan, "infinity": torch.inf, "too large": 3e38}[what]
        x[1], h[1] = value, value
    before = weights(seed)
    found = fit_to_site(seed, x, h, random_seed=3)
    if template == "signal_conv" and what in (
        "one example",
        "constant",
        "rounding",
    ):  # its signal varies along its positions
        assert found == FITTED[template]
    else:
        assert found == ()
        assert same(before, seed)
    assert all(torch.isfinite(value).all() for value in weights(seed))


def test_a_seed_whose_delta_would_change_is_left_to_the_bit() -> None:
    layer = place("linear")
    seed = layer.germinate(0, default_registry().create_blueprint("widen").ir, random_seed=3)
    with torch.no_grad():
        seed.kernel.node_out.weight.fill_(0.1)  # it has learnt
    before = weights(seed)
    assert fit_to_site(seed, *batch(layer.site), random_seed=3) == ()
    assert same(before, seed)


def test_what_is_no_blueprints_own_module_is_left_alone(scale: Any) -> None:
    layer = place("linear")
    seed = layer.attach_module(0, scale())
    assert fit_to_site(seed, *batch(layer.site), random_seed=3) == ()
    other = layer.germinate(1, default_registry().create_blueprint("widen").ir)
    before = weights(other)
    other.kernel.register_forward_hook(lambda _module, _args, out: out)
    assert fit_to_site(other, *batch(layer.site), random_seed=3) == ()
    assert same(before, other)


def test_where_it_fails_half_way_the_weights_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no draw")

    layer = place("linear")
    seed = designed(layer, NO_BIAS)
    before = weights(seed)
    monkeypatch.setattr(birth, "initialise", fail)
    with pytest.raises(RuntimeError, match="no draw"):
        fit_to_site(seed, *batch(layer.site), random_seed=3)
    assert same(before, seed)


def test_a_sum_or_attention_behind_a_map_leaves_it_alone() -> None:
    layer = place("linear on tokens")
    seed = designed(
        layer,
        """
        a = linear(h)
        b = linear(h)
        both = add(a, b)
        act = activation(both, fn=relu)
        mixed = attention(act, a, b)
        out = linear(mixed, init=zero)
        return out
        """,
    )
    before = weights(seed)
    assert fit_to_site(seed, *batch(layer.site), random_seed=3) == ()
    assert same(before, seed)


@contextmanager
def streams_untouched() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_global_random_streams_are_untouched_to_the_bit() -> None:
    layer = place("linear")
    seed = designed(layer, NO_BIAS.replace("bias=false", "bias=false, init=orthogonal"))
    with streams_untouched():
        assert fit_to_site(seed, *batch(layer.site), random_seed=3) == ("units",)


# --- what the kernel reads ---


class Host(nn.Module):
    """Norms, dropout, a layer with several seeds and one whose input a skip seed reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(F.relu(self.norm(self.first(x)), inplace=True)))


@pytest.fixture
def host() -> Any:
    torch.manual_seed(0)
    model = wrap(Host())
    model.eval()(torch.randn(6, 5))
    return model.train()


X = torch.randn(32, 5, generator=torch.Generator().manual_seed(2))


def test_what_a_kernel_reads_is_the_hosts_alone_and_nothing_is_left_behind(host: Any) -> None:
    ir = default_registry().create_blueprint("widen").ir
    for index in (0, 1):
        seed = host.last.germinate(index, ir, random_seed=index)
    with torch.no_grad():
        for value in host.last.find_seed(0).kernel.parameters():
            value.fill_(0.3)
    host.last.transition(0, State.EVALUATING)
    host.last.set_alpha(0, 0.7)
    state, hooks = {key: value.clone() for key, value in host.state_dict().items()}, dict(host.last._forward_hooks)
    with streams_untouched():
        seen = seen_at_site(host, SeedRef("last", 1), lambda: host(X))
    assert seen is not None
    x, h = seen
    torch.testing.assert_close(h, F.linear(x, host.last.weight, host.last.bias))
    assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())
    assert dict(host.last._forward_hooks) == hooks
    assert host.training
    assert host.last.state_layout.alpha_blend[0] == pytest.approx(0.7)
    assert seed.is_silent


def test_a_skip_seed_reads_the_input_of_its_source(host: Any) -> None:
    ir = default_registry().create_blueprint("widen").ir
    host.last.germinate(2, ir, source="first")
    seen = seen_at_site(host, SeedRef("last", 2), lambda: host(X))
    assert seen is not None
    assert torch.equal(seen[0], X)
    assert seen[1].shape == (32, 4)


def test_a_run_that_does_not_come_by_shows_nothing(host: Any) -> None:
    host.last.germinate(0, default_registry().create_blueprint("widen").ir)
    assert seen_at_site(host, SeedRef("last", 0), lambda: host.first(X)) is None


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_in_place_is_not_compiled_for_it(host: Any) -> None:
    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    host.compile(backend=counting)
    host(X)
    host.last.germinate(0, default_registry().create_blueprint("widen").ir)
    num_graphs = len(graphs)
    assert num_graphs > 0
    assert seen_at_site(host, SeedRef("last", 0), lambda: host(X)) is not None
    host(X)
    assert len(graphs) == num_graphs, "and what was compiled still stands"
