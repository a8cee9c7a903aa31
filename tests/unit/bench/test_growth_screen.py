"""The screen: what it promises is what can be learnt, on a probe it has not seen, whatever the features' number."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench.growth_screen import Score, ScreenConfig, score_kernel, thin
from esper.blueprints import to_module
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.execution.incubation import SiteSample

UNTRAINED = ScreenConfig(steps=0)


class Features(nn.Module):
    """Given features of x, and an outgoing map of zeros."""

    def __init__(self, inner: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(x))
        return out


class Products(nn.Module):
    """The products of neighbouring inputs: just what the residual of ``probe`` is made of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.roll(1, -1)


def probe(count: int = 512, inputs: int = 8, outputs: int = 4) -> SiteSample:
    """Give a site whose host misses products of neighbouring inputs, drowned in as much noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, generator=draw)
    mixing = torch.randn(inputs, outputs, generator=draw) / inputs**0.5
    g = (x * x.roll(1, -1)) @ mixing + torch.randn(count, outputs, generator=draw)
    return SiteSample(x=x, h=torch.randn(count, outputs, generator=draw), g=g)


def noise(width: int) -> Features:
    """Give wide features that differ from example to example and say nothing of the residual."""
    torch.manual_seed(1)
    wild = nn.Linear(8, width)
    with torch.no_grad():
        wild.weight.mul_(300.0)
    return Features(nn.Sequential(wild, Sine()), width, 4)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_features_that_explain_the_residual_promise_more_than_features_that_do_not() -> None:
    useful = score_kernel(Features(Products(), 8, 4), probe(), seed=0, config=UNTRAINED)
    useless = score_kernel(Features(nn.Identity(), 8, 4), probe(), seed=0, config=UNTRAINED)
    assert useful.gain > 5.0 * useful.error
    assert abs(useless.gain) < 4.0 * useless.error


def test_many_features_do_not_win_by_fitting_noise() -> None:
    useful = score_kernel(Features(Products(), 8, 4), probe(), seed=0, config=UNTRAINED)
    wide = score_kernel(noise(400), probe(), seed=0, config=UNTRAINED)
    assert wide.fitted > useful.gain, "over what it learnt from it looks better"
    assert abs(wide.gain) < 4.0 * wide.error
    assert thin([wide, useful]) == [1]


def test_the_gain_is_that_of_the_natural_gradient() -> None:
    """Against the formula in full matrices, with so many rows that nothing is shrunk."""
    sample = probe(count=1024)
    f, g = Products()(sample.x), sample.g
    found = score_kernel(Features(Products(), 8, 4), sample, seed=0, config=UNTRAINED)
    moment = g.T @ f / len(f)
    whitened = torch.linalg.solve(g.T @ g / len(g), moment) @ torch.linalg.inv(f.T @ f / len(f))
    exact = float((whitened * moment).sum())
    assert exact > 0.5
    assert found.fitted == pytest.approx(exact, rel=0.15)
    assert found.gain == pytest.approx(exact, rel=0.15)


def test_the_scale_of_features_and_gradients_changes_nothing() -> None:
    sample, kernel = probe(), Features(Products(), 8, 4)
    larger = SiteSample(x=sample.x, h=sample.h, g=1e3 * sample.g)
    scaled = Features(nn.Sequential(Products(), Scale(1e2)), 8, 4)
    expected = score_kernel(kernel, sample, seed=0, config=UNTRAINED).gain
    assert score_kernel(kernel, larger, seed=0, config=UNTRAINED).gain == pytest.approx(expected, rel=1e-3)
    assert score_kernel(scaled, sample, seed=0, config=UNTRAINED).gain == pytest.approx(expected, rel=1e-3)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_training_the_features_finds_what_random_ones_miss() -> None:
    torch.manual_seed(0)
    kernel = Features(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 8, 4)
    before = score_kernel(kernel, probe(), seed=0, config=UNTRAINED)
    after = score_kernel(kernel, probe(), seed=0, config=ScreenConfig(steps=40, batch_size=256, learning_rate=3e-2))
    assert after.gain > before.gain + 2.0 * (before.error + after.error)


def test_kernel_modes_and_streams_stay_as_they_are() -> None:
    kernel = Features(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), 8, 4)
    before, stream = copy.deepcopy(kernel.state_dict()), torch.get_rng_state()
    score_kernel(kernel, probe(), seed=0)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in kernel.state_dict().items())
    assert all(value.grad is None for value in kernel.parameters())


def test_equal_seeds_give_equal_scores_and_the_order_is_drawn() -> None:
    kernel = Features(nn.Sequential(nn.Linear(8, 8), nn.GELU()), 8, 4)
    assert score_kernel(kernel, probe(), seed=3) == score_kernel(kernel, probe(), seed=3)
    assert score_kernel(kernel, probe(), seed=3) != score_kernel(kernel, probe(), seed=4)


@pytest.mark.parametrize(
    "site",
    [
        Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(8,)),
        Site(kind=SiteKind.LINEAR, input_shape=(6, 16), output_shape=(6, 8)),
        Site(kind=SiteKind.CONV1D, input_shape=(4, 12), output_shape=(8, 12)),
        Site(kind=SiteKind.CONV2D, input_shape=(4, 6, 6), output_shape=(8, 6, 6)),
    ],
    ids=["vector", "tokens", "signal", "image"],
)
def test_every_template_has_a_score_at_every_kind_of_site(site: Site) -> None:
    draw = torch.Generator().manual_seed(0)
    x, h, g = (
        torch.randn(24, *shape, generator=draw) for shape in (site.input_shape, site.output_shape, site.output_shape)
    )
    blueprints = default_registry().for_site(site)
    assert len(blueprints) > 5
    for blueprint in blueprints:
        kernel = to_module(blueprint.ir, site, seed=0)
        found = score_kernel(kernel, SiteSample(x=x, h=h, g=g), seed=0, config=ScreenConfig(steps=1, batch_size=8))
        assert torch.isfinite(torch.tensor([found.gain, found.error, found.fitted])).all(), blueprint.name
        assert found.fitted > 0.0, f"{blueprint.name} has an outgoing map that was not found"


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((8, 1, 1), nn.Conv2d(8, 4, 1)), ((4, 2), nn.Conv1d(4, 4, 2)), ((2, 2, 2), nn.Conv2d(2, 4, 2))],
    ids=["a point", "two points of a signal", "a patch of an image"],
)
def test_a_convolution_that_fits_once_is_a_linear_map(shape: tuple[int, ...], kernel: nn.Module) -> None:
    sample = probe()
    as_vector = Features(Products(), 8, 4)
    as_image = copy.deepcopy(as_vector)
    as_image.inner, as_image.out = (
        nn.Sequential(Products(), nn.Unflatten(1, shape)),
        nn.Sequential(kernel, nn.Flatten()),
    )
    with torch.no_grad():
        for value in kernel.parameters():
            value.zero_()
    expected = score_kernel(as_vector, sample, seed=0, config=UNTRAINED)
    found = score_kernel(as_image, sample, seed=0, config=UNTRAINED)
    assert found.gain == pytest.approx(expected.gain, rel=1e-3)
    assert found.error == pytest.approx(expected.error, rel=1e-3)


def test_a_scale_is_judged_by_its_own_gradient() -> None:
    """``norm_shift`` has no outgoing map: its scale and shift start at 0."""
    site = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(4,))
    sample = probe()
    kernel = to_module(default_registry().create_blueprint("norm_shift").ir, site, seed=0)
    missing = SiteSample(x=sample.x, h=sample.h, g=sample.g + 1.0)  # a shift of -1 is what lacks
    assert abs(score_kernel(kernel, sample, seed=0).gain) < 0.1
    assert score_kernel(kernel, missing, seed=0).gain > 0.3


def test_the_better_half_stays_best_first() -> None:
    scores = [Score(gain=gain, error=1.0, fitted=gain) for gain in (0.1, 0.4, 0.2, 0.4, -0.3)]
    assert thin(scores) == [1, 3, 2]
    assert thin(scores[:1]) == [0]


@pytest.mark.parametrize(
    ("name", "value"), [("steps", -1), ("batch_size", 7), ("learning_rate", 0.0), ("learning_rate", float("nan"))]
)
def test_settings_that_break_their_rule_are_named(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=name):
        ScreenConfig(**{name: value})  # type: ignore[arg-type]


def test_a_probe_too_small_to_halve_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 16 examples, got 15"):
        score_kernel(Features(Products(), 8, 4), probe(count=15), seed=0)
