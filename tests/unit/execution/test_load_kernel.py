"""From a signed kernel to an active seed: what is built, what is refused, and that a seed never stays LOADING."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
import torch

from esper.blueprints import canonical_bytes, content_id, cost, default_registry, to_module
from esper.contracts.blueprint import Blueprint, Site, SiteKind
from esper.contracts.errors import (
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    InvalidTransitionError,
    KernelExecutionError,
    NotFoundError,
    ShapeMismatchError,
)
from esper.contracts.kernel import CompileTarget, DeviceKind, ValidationCheck
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.execution.artifact import KernelContent, VerifiedKernel, artifact_bytes, pack, verify
from esper.execution.bounded_form import BoundedForm
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.execution.seed import number_of
from esper.services.tezzeret.compiler import save_torchscript, script_of

KEY = SigningKey.generate()
ON_CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)


def kernel_for(
    site: Site, name: str, *, target: CompileTarget = CompileTarget.EAGER, binary: bytes = b"", **weights: torch.Tensor
) -> VerifiedKernel:
    """Give a verified kernel of a template; its weights are moved off birth, so that they show."""
    ir = blueprint_for(site, name).ir
    module = to_module(ir, site, seed=5)
    state = {key: value + 0.1 for key, value in module.state_dict().items()}
    content = KernelContent(
        content_key="0" * 64,
        site=site,
        target=target,
        device=DeviceKind.CPU,
        ir=canonical_bytes(ir),
        weights={**state, **weights},
        binary=binary,
        cost=cost(ir, site),
        checks=(ValidationCheck(name="shapes", passed=True),),
        compilation_time=timedelta(milliseconds=1),
    )
    return verify(artifact_bytes(pack(content, KEY)), KEY.ring())


def blueprint_for(site: Site, name: str) -> Blueprint:
    return next(blueprint for blueprint in default_registry().for_site(site) if blueprint.name == name)


class Source:
    """A kernel source that gives one kernel, or raises."""

    def __init__(self, answer: VerifiedKernel | BaseException) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def fetch(self, artifact_id: str) -> VerifiedKernel:
        self.asked.append(artifact_id)
        await asyncio.sleep(0)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(("name", "template"), [("layer1", "bottleneck_adapter"), ("conv", "conv3x3")])
async def test_a_kernel_becomes_an_active_seed(warm: Any, name: str, template: str) -> None:
    layer = getattr(warm.model, name)
    kernel = kernel_for(layer.site, template)
    layer.kernel_source = Source(kernel)
    assert await layer.load_kernel(seed_idx=0, artifact_id="kernel_123") is True
    assert layer.kernel_source.asked == ["kernel_123"]
    assert layer.state_layout.lifecycle_states[0] == State.ACTIVE
    assert layer.get_layer_stats()["kernel_execution_latency_ms"] > 0.0  # a bound on time belongs to bench/
    seed = layer.find_seed(0)
    assert all(torch.equal(value, kernel.weights[key]) for key, value in seed.kernel.state_dict().items())
    assert layer.state_layout.kernel_ids[0] == number_of(kernel.artifact_id) != 0
    assert layer.state_layout.blueprint_ids[0] == number_of(content_id(kernel.ir)) != 0
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))


async def test_a_shared_kernel_is_copied_not_trained(warm: Any) -> None:
    layer = warm.model.layer1
    kernel = kernel_for(layer.site, "lora")
    layer.kernel_source = Source(kernel)
    before = {key: value.clone() for key, value in kernel.weights.items()}
    for index in range(2):
        await layer.load_kernel(seed_idx=index, artifact_id=kernel.artifact_id)
    with torch.no_grad():
        for parameter in layer.seed_parameters(0):
            parameter.zero_()
    assert all(torch.equal(kernel.weights[key], value) for key, value in before.items())
    assert all(parameter.abs().sum() > 0 for parameter in layer.seed_parameters(1))


async def test_a_kernel_takes_the_layers_dtype(warm: Any) -> None:
    warm.model.double()
    layer = warm.model.layer1
    layer.kernel_source = Source(kernel_for(layer.site, "lora"))
    await layer.load_kernel(seed_idx=0, artifact_id="k")
    assert {parameter.dtype for parameter in layer.seed_parameters(0)} == {torch.float64}


@pytest.mark.parametrize(
    "error", [NotFoundError("no such kernel"), CorruptDataError("checksum"), OSError("disk"), asyncio.CancelledError()]
)
async def test_a_source_that_fails_leaves_the_seed_culled(warm: Any, error: BaseException) -> None:
    layer = warm.model.layer1
    layer.kernel_source = Source(error)
    with pytest.raises(type(error)):
        await layer.load_kernel(seed_idx=1, artifact_id="k")
    assert layer.state_layout.state(1) is State.CULLED
    assert layer.state_layout.errors[1] == 1
    assert torch.equal(warm.model(warm.x), warm.twin(warm.x))


async def test_a_kernel_for_other_shapes_is_refused(warm: Any) -> None:
    layer = warm.model.layer1
    elsewhere = Site(kind=SiteKind.LINEAR, input_shape=(7,), output_shape=(9,))
    layer.kernel_source = Source(kernel_for(elsewhere, "bottleneck_adapter"))
    with pytest.raises(ShapeMismatchError, match="weights must fit the module at this site, got"):
        await layer.load_kernel(seed_idx=0, artifact_id="k")
    assert layer.state_layout.state(0) is State.CULLED
    assert layer.find_seed(0) is None


async def test_a_kernel_that_is_not_finite_is_refused(warm: Any) -> None:
    layer = warm.model.layer1
    kernel = kernel_for(layer.site, "lora")
    bad = {key: torch.full_like(value, torch.nan) for key, value in kernel.weights.items()}
    layer.kernel_source = Source(kernel_for(layer.site, "lora", **bad))
    with pytest.raises(KernelExecutionError, match="kernel must give a finite delta on finite inputs"):
        await layer.load_kernel(seed_idx=0, artifact_id="k")
    assert layer.state_layout.state(0) is State.CULLED


async def test_a_bad_index_a_missing_source_and_a_taken_seed_are_refused(warm: Any) -> None:
    layer = warm.model.layer1
    with pytest.raises(InvalidInputError, match="seed_idx must be 0 to 3 for layer 'layer1', got 4"):
        await layer.load_kernel(seed_idx=4, artifact_id="k")
    with pytest.raises(InvalidStateError, match="layer 'layer1' must have a kernel source, got none"):
        await layer.load_kernel(seed_idx=0, artifact_id="k")
    layer.kernel_source = Source(kernel_for(layer.site, "lora"))
    await layer.load_kernel(seed_idx=0, artifact_id="k")
    with pytest.raises(InvalidTransitionError, match="ACTIVE to LOADING"):
        await layer.load_kernel(seed_idx=0, artifact_id="k")
    assert layer.state_layout.state(0) is State.ACTIVE


async def test_a_layer_that_never_ran_is_refused_before_anything_is_fetched(pair: Any) -> None:
    layer = pair.model.layer1
    layer.kernel_source = Source(NotFoundError("never asked"))
    with pytest.raises(InvalidStateError, match="'layer1' must know its shapes"):
        await layer.load_kernel(seed_idx=0, artifact_id="k")
    assert layer.kernel_source.asked == []
    assert layer.state_layout.state(0) is State.DORMANT


async def test_germination_leaves_random_streams_alone(warm: Any) -> None:
    layer = warm.model.layer1
    layer.kernel_source = Source(kernel_for(layer.site, "gated_mlp"))
    before = torch.get_rng_state()
    await layer.load_kernel(seed_idx=0, artifact_id="k")
    layer.germinate(1, blueprint_for(layer.site, "gated_mlp").ir)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_announced_kernel_is_attached_where_it_was_loading(warm: Any) -> None:
    layer = warm.model.layer1
    layer.transition(2, State.LOADING)
    layer.attach_kernel(2, kernel_for(layer.site, "lora"), adaptation_id="a7")
    assert layer.state_layout.state(2) is State.ACTIVE
    assert layer.layer_status().seeds[2].adaptation_id == "a7"


def test_with_a_random_seed_a_kernel_begins_with_the_weights_that_the_seed_draws(warm: Any) -> None:
    layer = warm.model.layer1
    kernel = kernel_for(layer.site, "gated_mlp")
    drawn = [layer.attach_kernel(index, kernel, random_seed=seed) for index, seed in enumerate((11, 11, 12))]
    built = layer.germinate(3, kernel.ir, random_seed=11)
    first, again, other, in_place = (dict(seed.kernel.state_dict()) for seed in (*drawn, built))
    assert all(torch.equal(first[key], again[key]) and torch.equal(first[key], in_place[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert not any(torch.equal(first[key], kernel.weights[key]) for key in first)


def test_a_kernel_whose_own_weights_do_not_fit_is_refused_with_a_random_seed_too(warm: Any) -> None:
    layer = warm.model.layer1
    elsewhere = Site(kind=SiteKind.LINEAR, input_shape=(7,), output_shape=(9,))
    with pytest.raises(ShapeMismatchError, match="weights must fit the module at this site, got"):
        layer.attach_kernel(0, kernel_for(elsewhere, "bottleneck_adapter"), random_seed=3)
    assert layer.state_layout.state(0) is State.CULLED


def scripted(site: Site, name: str) -> bytes:
    module = to_module(blueprint_for(site, name).ir, site, seed=5).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    return save_torchscript(script_of(module))


SITE = Site(kind=SiteKind.LINEAR, input_shape=(6,), output_shape=(4,))


def test_the_inference_form_of_a_script_equals_the_trainable_one() -> None:
    kernel = kernel_for(SITE, "gated_mlp", target=CompileTarget.TORCHSCRIPT, binary=scripted(SITE, "gated_mlp"))
    executor = KernelExecutor()
    compiled, eager = executor.inference_form(kernel, SITE, ON_CPU), executor.prepare(kernel, SITE, ON_CPU).eval()
    x, h = torch.randn(5, 6), torch.randn(5, 4)
    assert isinstance(compiled, BoundedForm)
    assert isinstance(compiled.form, torch.jit.ScriptModule)
    torch.testing.assert_close(compiled(x, h), eager(x, h))


def test_the_inference_form_of_an_eager_kernel_is_the_eager_module() -> None:
    form = KernelExecutor().inference_form(kernel_for(SITE, "lora"), SITE, ON_CPU)
    assert not form.training


def test_bytes_that_are_no_archive_are_refused() -> None:
    kernel = kernel_for(SITE, "lora", target=CompileTarget.TORCHSCRIPT, binary=b"no archive")
    with pytest.raises(CorruptDataError, match="must begin with the first record of a zip archive, got b'no archi'"):
        KernelExecutor().inference_form(kernel, SITE, ON_CPU)


def test_a_shared_library_is_not_read_from_memory() -> None:
    kernel = kernel_for(SITE, "lora", target=CompileTarget.AOT_INDUCTOR, binary=b"library")
    with pytest.raises(InvalidInputError, match=r"kernel must be TORCHSCRIPT, .*, got 'AOT_INDUCTOR'"):
        KernelExecutor().inference_form(kernel, SITE, ON_CPU)
