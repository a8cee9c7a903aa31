"""Every template at every kind of site that it is meant for, optimised for every device, as the executor runs it.

A form for CUDA is made and run without a device: it is device-neutral then. Weights are away from birth, where every
delta is 0 and any form would pass.
"""

from __future__ import annotations

import pytest
import torch

from esper.blueprints import BlueprintRegistry, cost, default_registry, to_module
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind
from esper.execution.artifact import VerifiedKernel, artifact_bytes, verify
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.services.tezzeret import int8
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.kernel_optimizer import KernelOptimizer
from esper.services.tezzeret.kernel_validator import equality_row, stir
from esper.services.tezzeret.packaging import CompiledKernel, Ingredients, KernelMetadata, package

KEY = SigningKey.generate()
CONFIG = CompilerConfig()
PLACEMENT = Placement(device=torch.device("cpu"), dtype=torch.float32)
SHAPES: dict[SiteKind, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    SiteKind.LINEAR: (((7, 5), (7, 11)), ((144,), (33,))),
    SiteKind.CONV1D: (((3, 21), (7, 11)),),
    SiteKind.CONV2D: (((4, 16, 12), (8, 8, 6)),),
    SiteKind.ATTENTION: (((7, 5), (7, 5)),),
    SiteKind.LAYER_NORM: (((3, 4, 6), (3, 4, 6)), ((16,), (16,))),
    SiteKind.BATCH_NORM1D: (((7, 9), (7, 9)), ((16,), (16,))),
    SiteKind.BATCH_NORM2D: (((7, 5, 9), (7, 5, 9)),),
}
"""Shapes of a layer's input and output by kind; together they offer everything that is meant for the kind."""


def places(registry: BlueprintRegistry, kind: SiteKind) -> list[tuple[Blueprint, Site]]:
    """Give every template that is offered at a kind of site, each at the first site that offers it."""
    found: dict[str, tuple[Blueprint, Site]] = {}
    for x, h in SHAPES[kind]:
        site = Site(kind=kind, input_shape=x, output_shape=h)
        for blueprint in registry.for_site(site):
            found.setdefault(blueprint.name, (blueprint, site))
    return list(found.values())


def stirred(blueprint: Blueprint, site: Site) -> CompiledKernel:
    """Give a kernel of a template without a compiled form, with weights away from birth."""
    spec = CompileSpec(ir=blueprint.ir, site=site, target=CompileTarget.EAGER, device=DeviceKind.CPU)
    module = stir(to_module(blueprint.ir, site, seed=0), 4)
    said = KernelMetadata(compilation_time=0.0, validated=True, target=CompileTarget.EAGER, target_device="cpu")
    made = Ingredients(spec=spec, weights=module.state_dict(), binary=b"", cost=cost(blueprint.ir, site), metadata=said)
    return package(made, None)


def limit_of(kernel: VerifiedKernel) -> float:
    """Give the largest difference that the product promises of a form."""
    is_int8 = {int8.LINEAR, int8.CONVOLUTION} & set(kernel.manifest.optimizations)
    promised = CONFIG.int8_equality_limit if is_int8 else CONFIG.inference_equality_limit
    [row] = [row for row in kernel.manifest.checks if row.name == "optimized_equality"]
    assert row.limit == promised
    return promised


def test_the_sites_offer_every_template_at_every_kind_that_it_is_meant_for() -> None:
    registry = default_registry()
    meant = {
        (kind, name)
        for name in registry.names()
        for kind in registry.create_blueprint(name).metadata.site_kinds or tuple(SiteKind)
    }
    assert {(kind, blueprint.name) for kind in SiteKind for blueprint, _ in places(registry, kind)} == meant


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", DeviceKind, ids=lambda device: device.name)
@pytest.mark.parametrize("kind", SiteKind, ids=lambda kind: kind.name)
def test_an_optimised_form_of_every_template_runs_as_the_eager_one_does(kind: SiteKind, device: DeviceKind) -> None:
    optimizer, executor, differing = KernelOptimizer(CONFIG, KEY), KernelExecutor(), []
    for blueprint, site in places(default_registry(), kind):
        optimized = optimizer.optimize(stirred(blueprint, site), device)
        kernel = verify(artifact_bytes(optimized.artifact), KEY.ring())
        assert (kernel.manifest.device, kernel.manifest.target) == (device, CompileTarget.TORCHSCRIPT)
        eager = executor.prepare(kernel, site, PLACEMENT).eval()
        form = executor.inference_form(kernel, site, PLACEMENT)
        row = equality_row("executed", eager, form, optimized.spec, limit_of(kernel))
        if not row.passed:
            differing.append((blueprint.name, row))
    assert differing == []
