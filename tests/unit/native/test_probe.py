"""The CPU probe against torch and NumPy on the same tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.errors import InvalidInputError
from esper.execution._native import probe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _probe(tensor: torch.Tensor, max_samples: int = 4096) -> tuple[int, float, float, float, float, float]:
    name = str(tensor.dtype).removeprefix("torch.")
    return probe(tensor.data_ptr(), tensor.numel(), name, max_samples)


def _reference_entropy(values: np.ndarray[Any, Any]) -> float:
    counts, _ = np.histogram(values, bins=32)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(shares) - 1) / (2 * counts.sum()))


@pytest.mark.parametrize("name", DTYPES)
def test_unsampled_figures_equal_the_reference(name: str) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(30, 40) * 3 + 1).relu().to(DTYPES[name])
    count, mean, variance, entropy, dead, nonfinite = _probe(tensor)
    wide = tensor.double()
    assert count == 1200
    assert mean == pytest.approx(wide.mean().item(), rel=1e-6)
    assert variance == pytest.approx(wide.var(correction=0).item(), rel=1e-6)
    assert dead == pytest.approx((wide == 0).double().mean().item())
    assert nonfinite == 0.0
    # A value on the border of two bins may fall either way.
    assert entropy == pytest.approx(_reference_entropy(wide.numpy().ravel()), abs=0.02)


@pytest.mark.parametrize("name", DTYPES)
def test_sampled_figures_stay_within_the_documented_error(name: str) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(256, 1000).to(DTYPES[name])
    count, mean, variance, entropy, _, _ = _probe(tensor)
    wide = tensor.double()
    assert count == 4096
    assert abs(mean - wide.mean().item()) < 4 / 64
    assert abs(variance - wide.var(correction=0).item()) < 4 * math.sqrt(2 / 4096)
    assert 2.0 < entropy < math.log(32)


def test_the_order_of_axes_does_not_matter_unsampled() -> None:
    torch.manual_seed(2)
    image = torch.randn(2, 3, 8, 8)
    assert _probe(image)[1:4] == pytest.approx(_probe(image.contiguous(memory_format=torch.channels_last))[1:4])


def test_the_same_tensor_gives_the_same_figures() -> None:
    tensor = torch.randn(100_000)
    assert _probe(tensor) == _probe(tensor)


def test_nonfinite_values_are_counted_and_left_out() -> None:
    tensor = torch.tensor([1.0, float("inf"), float("nan"), 3.0, -float("inf")])
    count, mean, variance, _, dead, nonfinite = _probe(tensor)
    assert (count, mean, variance, dead) == (5, 2.0, 1.0, 0.0)
    assert nonfinite == pytest.approx(0.6)
    assert all(math.isnan(figure) for figure in _probe(torch.tensor([float("nan")]))[1:4])


def test_an_empty_tensor_has_no_figures() -> None:
    count, *figures = probe(0, 0, "float32")
    assert count == 0
    assert all(math.isnan(figure) for figure in figures)


@settings(max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=300),
    st.integers(min_value=1, max_value=400),
)
def test_figures_keep_their_ranges_for_any_values(values: list[float], max_samples: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    count, mean, variance, entropy, dead, nonfinite = _probe(tensor, max_samples)
    assert count == min(len(values), max_samples)
    assert 0 <= dead <= 1
    assert 0 <= nonfinite <= 1
    if nonfinite < 1:
        assert math.isfinite(mean)
        assert variance >= 0
        assert 0 <= entropy <= math.log(32) + 1e-6
    else:
        assert math.isnan(mean)
        assert math.isnan(entropy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "float32"), "data_ptr must not be null for numel > 0"),
        ((8, 1, "int32"), "dtype must be one of 'float32', .* got 'int32'"),
        ((8, 1, "float32", 0), r"max_samples must be between 1 and 2\^20, got 0"),
        ((8, 1, "float32", 2**20 + 1), "got 1048577"),
    ],
)
def test_bad_input_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        probe(*arguments)


DISTRIBUTIONS = {
    "normal": lambda random, size: random.normal(0.5, 2.0, size),
    "uniform": lambda random, size: random.uniform(-1.0, 3.0, size),
    "relu": lambda random, size: np.maximum(random.normal(0.0, 1.0, size), 0.0),
    "laplace": lambda random, size: random.laplace(1.0, 1.0, size),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 2**32 - 1),
    st.integers(8_000, 60_000),
    st.sampled_from([256, 1024, 4096]),
)
def test_the_sampling_error_is_as_documented(kind: str, dtype: str, key: int, size: int, samples: int) -> None:
    """Six documented standard errors; the examples are fixed, as heavy tails pass any bound some day."""
    drawn = DISTRIBUTIONS[kind](np.random.default_rng(key), size)
    tensor = torch.from_numpy(drawn).to(DTYPES[dtype])
    count, mean, variance, _, dead, nonfinite = _probe(tensor, samples)
    values = tensor.double().numpy()
    shrink = math.sqrt(1 - samples / size)
    sigma, centred = values.std(), values - values.mean()
    kurtosis = float((centred**4).mean() / sigma**4)
    share = float((values == 0).mean())
    rounding = 1e-6 * (1 + abs(values.mean()) + sigma**2)
    assert (count, nonfinite) == (samples, 0.0)
    assert abs(mean - values.mean()) <= 6 * sigma / math.sqrt(samples) * shrink + rounding
    assert abs(variance - values.var()) <= 6 * sigma**2 * math.sqrt((kurtosis - 1) / samples) * shrink + 8 / samples
    assert abs(dead - share) <= 6 * math.sqrt(share * (1 - share) / samples) * shrink + 1 / samples


def test_the_error_over_many_tensors_has_the_documented_size() -> None:
    """The root mean square error over 400 tensors: not above what is documented, and not far below either."""
    random, samples, size = np.random.default_rng(5), 1024, 20_000
    errors = []
    for _ in range(400):
        tensor = torch.from_numpy(random.normal(0.0, 1.0, size).astype(np.float32))
        _, mean, variance, _, _, _ = _probe(tensor, samples)
        errors.append((mean - float(tensor.mean()), variance - float(tensor.var(correction=0))))
    found = np.sqrt((np.array(errors) ** 2).mean(axis=0))
    documented = np.sqrt(np.array([1.0, 2.0]) / samples * (1 - samples / size))
    assert (found <= 1.15 * documented).all()
    assert (found >= 0.85 * documented).all()


@pytest.mark.parametrize("samples", [256, 1024, 4096])
def test_miller_madow_takes_most_of_the_bias_away(samples: int) -> None:
    """Entropy of a uniform distribution over 32 bins: the plain estimate is (32 - 1) / 2n too low."""
    random = np.random.default_rng(6)
    found = []
    for _ in range(300):
        tensor = torch.from_numpy(random.integers(0, 32, samples).astype(np.float32))
        found.append(_probe(tensor, samples)[3])
    plain_bias = 31 / (2 * samples)
    assert abs(np.mean(found) - math.log(32)) < 0.35 * plain_bias
