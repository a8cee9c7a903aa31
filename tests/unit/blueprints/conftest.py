"""Sites and graphs that several test files share."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from esper.blueprints import BlueprintRegistry, default_registry
from esper.contracts.blueprint import Site, SiteKind

SITES = {
    "linear": Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(12,)),
    "linear_tokens": Site(kind=SiteKind.LINEAR, input_shape=(7, 16), output_shape=(7, 12)),
    "linear_map": Site(kind=SiteKind.LINEAR, input_shape=(3, 4, 16), output_shape=(3, 4, 12)),
    "conv1d": Site(kind=SiteKind.CONV1D, input_shape=(3, 20), output_shape=(8, 10)),
    "conv2d": Site(kind=SiteKind.CONV2D, input_shape=(3, 9, 9), output_shape=(8, 9, 9)),
    "conv2d_strided": Site(kind=SiteKind.CONV2D, input_shape=(3, 16, 12), output_shape=(8, 8, 6)),
    "conv2d_unpadded": Site(kind=SiteKind.CONV2D, input_shape=(3, 12, 12), output_shape=(8, 10, 10)),
    "attention": Site(kind=SiteKind.ATTENTION, input_shape=(6, 16), output_shape=(6, 16)),
    "layer_norm": Site(kind=SiteKind.LAYER_NORM, input_shape=(5, 16), output_shape=(5, 16)),
    "batch_norm1d": Site(kind=SiteKind.BATCH_NORM1D, input_shape=(16,), output_shape=(16,)),
    "batch_norm1d_signal": Site(kind=SiteKind.BATCH_NORM1D, input_shape=(8, 9), output_shape=(8, 9)),
    "batch_norm2d": Site(kind=SiteKind.BATCH_NORM2D, input_shape=(8, 6, 6), output_shape=(8, 6, 6)),
}


@pytest.fixture(params=SITES.values(), ids=list(SITES))
def site(request: pytest.FixtureRequest) -> Site:
    """One site of every kind and layout."""
    found = request.param
    assert isinstance(found, Site)
    return found


@pytest.fixture
def linear() -> Site:
    return SITES["linear"]


@pytest.fixture
def conv2d() -> Site:
    return SITES["conv2d"]


@pytest.fixture
def tokens() -> Site:
    return SITES["linear_tokens"]


@pytest.fixture
def script() -> Callable[[nn.Module], torch.jit.ScriptModule]:
    """Gives the TorchScript form of a module; torch warns of an annotation in fx's own constructor."""

    def run(module: nn.Module) -> torch.jit.ScriptModule:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The TorchScript type system doesn't support instance-level")
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
            scripted = torch.jit.script(module)
        assert isinstance(scripted, torch.jit.ScriptModule)
        return scripted

    return run


@pytest.fixture(scope="session")
def registry() -> BlueprintRegistry:
    return default_registry()
