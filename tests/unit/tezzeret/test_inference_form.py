"""What Tezzeret compiles, as the executor runs it without gradients: equal to the eager form, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from esper.blueprints import canonical_bytes, default_registry, to_module
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import ShapeMismatchError
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind
from esper.execution.artifact import KernelContent, VerifiedKernel, artifact_bytes, pack, verify
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.services.tezzeret.compiler import compile_module
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.kernel_validator import stir
from esper.services.tezzeret.worker import TezzeretWorker

KEY = SigningKey.generate()
WORKER = TezzeretWorker(signer=KEY)
VECTOR = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))
IMAGE = Site(kind=SiteKind.CONV2D, input_shape=(4, 8, 8), output_shape=(4, 8, 8))
PLACES = [(VECTOR, "gated_mlp"), (VECTOR, "bottleneck_adapter"), (IMAGE, "conv3x3"), (IMAGE, "squeeze_excite")]
COMPILED = [CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM]


def at(dtype: torch.dtype) -> Placement:
    return Placement(device=torch.device("cpu"), dtype=dtype)


@lru_cache
def compiled(site: Site, name: str, target: CompileTarget, device: DeviceKind = DeviceKind.CPU) -> VerifiedKernel:
    """Give a kernel as Tezzeret makes it, at birth: its delta is zero."""
    ir = default_registry().create_blueprint(name).ir
    kernel = WORKER.compile_spec(CompileSpec(ir=ir, site=site, target=target, device=device))
    return verify(artifact_bytes(kernel.artifact), KEY.ring())


@lru_cache
def moved(site: Site, name: str, target: CompileTarget) -> VerifiedKernel:
    """Give a kernel whose binary Tezzeret's compiler made of weights away from birth, so that its delta shows."""
    ir = default_registry().create_blueprint(name).ir
    module = stir(to_module(ir, site, seed=3), 4)
    form = compile_module(module, site, [target], CompilerConfig())
    born = compiled(site, name, target).manifest
    content = KernelContent(
        content_key=born.content_key,
        site=site,
        target=form.target,
        device=born.device,
        ir=canonical_bytes(ir),
        weights=module.state_dict(),
        binary=form.binary,
        cost=born.cost,
        checks=born.checks,
        compilation_time=born.compilation_time,
    )
    return verify(artifact_bytes(pack(content, KEY)), KEY.ring())


def inputs(site: Site, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x, h = (torch.randn(batch, *shape, generator=generator) for shape in (site.input_shape, site.output_shape))
    return x.to(dtype), h.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize(("site", "name"), PLACES)
def test_a_compiled_form_equals_the_trainable_one(
    site: Site, name: str, target: CompileTarget, dtype: torch.dtype
) -> None:
    kernel = moved(site, name, target)
    assert kernel.manifest.target is target
    form = KernelExecutor().inference_form(kernel, site, at(dtype))
    eager = KernelExecutor().prepare(kernel, site, at(dtype)).eval()
    for batch in (1, 5):
        x, h = inputs(site, batch, dtype)
        with torch.no_grad():
            delta = form(x, h)
            assert delta.dtype is dtype
            assert delta.abs().max() > 0
            torch.testing.assert_close(delta, eager(x, h))


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize(("site", "name"), PLACES)
def test_a_kernel_as_it_is_born_has_a_form_that_adds_nothing(site: Site, name: str, target: CompileTarget) -> None:
    form = KernelExecutor().inference_form(compiled(site, name, target), site, at(torch.float32))
    assert form(*inputs(site, 4, torch.float32)).abs().max() == 0


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize(
    "change", [{"input_shape": (9,)}, {"output_shape": (7,)}, {"input_shape": (9,), "output_shape": (7,)}]
)
def test_a_form_for_other_shapes_is_refused(target: CompileTarget, change: dict[str, tuple[int, ...]]) -> None:
    site = replace(VECTOR, **change)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatchError, match=r"kernel must (run at input|give a delta of shape)"):
        KernelExecutor().inference_form(compiled(VECTOR, "gated_mlp", target), site, at(torch.float32))


@pytest.mark.parametrize("device", [DeviceKind.CUDA, DeviceKind.MOBILE])
def test_what_was_frozen_runs_in_its_own_dtype_alone(device: DeviceKind) -> None:
    kernel = compiled(VECTOR, "gated_mlp", CompileTarget.TORCHSCRIPT, device)
    form = KernelExecutor().inference_form(kernel, VECTOR, at(torch.float32))
    assert form(*inputs(VECTOR, 3, torch.float32)).shape == (3, 6)
    with pytest.raises(ShapeMismatchError, match=r"kernel must run at input \(8,\), output \(6,\) and torch.bfloat16"):
        KernelExecutor().inference_form(kernel, VECTOR, at(torch.bfloat16))
