"""Compiled forms that do nothing but compute, and too much of it: refused before they take any memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import BlueprintRegistry, to_module
from esper.contracts.blueprint import Site
from esper.contracts.errors import CorruptDataError
from esper.contracts.kernel import CompileTarget
from esper.contracts.wire import parse
from esper.execution import bounded_form
from esper.execution.archives import inspect_binary
from esper.execution.artifact import (
    KernelArtifact,
    KernelContent,
    KernelManifest,
    VerifiedKernel,
    artifact_bytes,
    assemble,
    load_weights,
    sign,
    verify,
)
from esper.execution.bounded_form import BoundedForm
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.services.tezzeret.compiler import compile_module, load_binary
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.default_sites import default_site
from esper.services.tezzeret.kernel_optimizer import _RECIPES
from esper.services.tezzeret.worker import TezzeretWorker
from tests import hostile_archives as hostile

KEY = SigningKey.generate()
PLACEMENT = Placement(device=torch.device("cpu"), dtype=torch.float32)
SCRIPT, PROGRAM = CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM
TOO_MUCH = r"binary must make at most \d+ bytes of tensors, 4 times as many as its graph does, got 'more at aten::"


@pytest.fixture(scope="module")
def kernel() -> KernelArtifact:
    return TezzeretWorker().compile_spec(hostile.SPEC).artifact


def signed(artifact: KernelArtifact, binary: bytes, target: CompileTarget = SCRIPT) -> VerifiedKernel:
    """Give a kernel with other bytes, signed with the key that the trainer trusts."""
    manifest = parse(artifact.manifest, KernelManifest)
    content = KernelContent(
        content_key=manifest.content_key,
        site=manifest.site,
        target=target,
        device=manifest.device,
        ir=artifact.ir,
        weights=load_weights(artifact.weights),
        binary=binary,
        cost=manifest.cost,
        checks=manifest.checks,
        compilation_time=manifest.compilation_time,
        toolchain=manifest.toolchain,
    )
    return verify(artifact_bytes(sign(assemble(content), KEY)), KEY.ring())


def form_of(artifact: KernelArtifact, binary: bytes, target: CompileTarget = SCRIPT) -> nn.Module:
    return KernelExecutor().inference_form(signed(artifact, binary, target), hostile.SITE, PLACEMENT)


LOOP = "for i in range(64):\n      "
LINES = {
    "joined to itself in a loop": f"_1 = h\n    {LOOP}_1 = torch.cat([_1, _1])",
    "joined to itself line by line": "\n    ".join(["_1 = h", *["_1 = torch.cat([_1, _1])"] * 40]),
    "joined crosswise": f"_1 = h\n    _2 = h\n    {LOOP}_1 = torch.cat([_2, _1])\n      _2 = torch.cat([_1, _2])",
    "padded": "_1 = torch.pad(h, [0, 1000000000])",
    "padded step by step": f"_1 = h\n    {LOOP}_1 = torch.pad(_1, [0, 1000000])",
    "pooled up": "_1 = torch.adaptive_avg_pool1d(torch.unsqueeze(h, 0), [1000000000])",
    "multiplied out": "_3 = torch.pad(h, [0, 10000])\n    "
    "_1 = torch.mul(torch.unsqueeze(_3, 1), torch.unsqueeze(_3, 2))",
    "many of a fair size": "\n    ".join(
        ["_1 = torch.pad(h, [0, 10000])", *(f"_1 = torch.add(_1, {n})" for n in range(1000))]
    ),
    "from a constant": "_1 = (self.node_down).weight\n    " + "\n    ".join(["_1 = torch.cat([_1, _1])"] * 40),
}
USE = "\n    node_normed0 = torch.add(node_normed0, torch.mean(_1))"
"""What nobody uses, torch leaves out."""


@pytest.mark.parametrize("name", LINES)
def test_a_script_that_would_take_too_much_memory_takes_none(kernel: KernelArtifact, name: str) -> None:
    binary = hostile.with_source(hostile.with_line(LINES[name] + USE))
    inspect_binary(binary, SCRIPT)  # it does nothing but compute
    with pytest.raises(CorruptDataError, match=TOO_MUCH):
        form_of(kernel, binary)


class Joins(nn.Module):
    """Joins its output to itself again and again."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        much = h
        for _ in range(40):
            much = torch.cat([much, much], dim=1)
        return h * much.mean(dim=1, keepdim=True) + x.mean(dim=1, keepdim=True)


class Delta(nn.Module):
    """Gives a delta, and makes nothing that a kernel has no use for."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * 0.5 + x.mean(dim=1, keepdim=True)


def exported(module: nn.Module) -> bytes:
    """Give the exported form of a module, made where its tensors have no contents."""
    from torch._subclasses import FakeTensorMode

    from esper.services.tezzeret import compiler

    with FakeTensorMode():
        return compiler._export(module, hostile.SITE)


def test_an_exported_program_that_would_take_too_much_memory_takes_none(kernel: KernelArtifact) -> None:
    binary = exported(Joins())
    inspect_binary(binary, PROGRAM)
    with pytest.raises(CorruptDataError, match=TOO_MUCH):
        form_of(kernel, binary, PROGRAM)


@pytest.mark.parametrize("made", [hostile.scripted, exported])
def test_a_form_of_another_graph_runs_where_it_keeps_to_the_bound(
    kernel: KernelArtifact, made: Callable[[nn.Module], bytes]
) -> None:
    """So that what the tests above see refused is what they grew."""
    form = form_of(kernel, made(Delta()), SCRIPT if made is hostile.scripted else PROGRAM)
    x, h = torch.ones(3, 8), torch.ones(3, 6)
    torch.testing.assert_close(form(x, h), h * 0.5 + 1)


def asked(condition: str) -> bytes:
    """Give a form that takes much memory under a condition."""
    lines = f"if {condition}:\n      _1 = torch.pad(h, [0, 1000000000])\n    else:\n      _1 = h"
    return hostile.with_source(hostile.with_line(lines + USE))


def test_a_form_that_waits_for_its_shapes_is_refused_when_they_come(kernel: KernelArtifact) -> None:
    form = form_of(kernel, asked("torch.eq(torch.size(h, 0), 7)"))
    assert form(torch.zeros(5, 8), torch.zeros(5, 6)).shape == (5, 6)
    for _ in range(2):
        with pytest.raises(CorruptDataError, match=TOO_MUCH):
            form(torch.zeros(7, 8), torch.zeros(7, 6))
    assert form(torch.zeros(8, 8), torch.zeros(8, 6)).shape == (8, 6)


@pytest.mark.parametrize("condition", ["torch.gt(torch.mean(h), 3)", "torch.eq(torch.mean(h), 3)"])
def test_a_form_that_looks_into_a_tensor_is_refused(kernel: KernelArtifact, condition: str) -> None:
    binary = asked(condition)
    inspect_binary(binary, SCRIPT)
    with pytest.raises(CorruptDataError, match="do the same for all tensors of a shape, got 'aten"):
        form_of(kernel, binary)


def test_every_honest_form_makes_little_more_than_its_graph(registry: BlueprintRegistry) -> None:
    for name in registry.names():
        blueprint = registry.create_blueprint(name)
        site = default_site(blueprint)
        for form in forms_of(blueprint.ir, site):
            enough = made_at(to_module(blueprint.ir, site, seed=0).eval(), site)
            assert enough > 0
            assert made_at(form, site) <= 2 * enough, name


def forms_of(ir: object, site: Site) -> list[nn.Module]:
    """Give every compiled form of a graph."""
    fresh = lambda: to_module(ir, site, seed=0).eval()  # type: ignore[arg-type]  # noqa: E731
    binaries = [
        (compile_module(fresh(), site, (target,), CompilerConfig()).binary, target) for target in (SCRIPT, PROGRAM)
    ]
    binaries += [(recipe(fresh()).binary, SCRIPT) for recipe in _RECIPES.values()]
    return [load_binary(binary, target) for binary, target in binaries]  # type: ignore[misc]


def made_at(form: nn.Module, site: Site) -> int:
    x, h = (torch.empty(64, *shape, device="meta") for shape in (site.input_shape, site.output_shape))
    return bounded_form._made_by(form, x, h, None)


def test_shapes_that_passed_are_not_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def noted(_: object, x: Tensor, *rest: object) -> int:
        del rest
        made.append(x.shape)
        return 1

    monkeypatch.setattr(bounded_form, "_made_by", noted)
    form = BoundedForm(Delta(), Delta(), Delta())
    for batch in (2, 2, 3, 2):
        form(torch.zeros(batch, 8), torch.zeros(batch, 6))
    form(torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
    assert made == [torch.Size([batch, 8]) for batch in (2, 2, 2, 3, 3, 3, 2, 2, 2)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_form, "_MAX_PASSED", 2)
    form = BoundedForm(Delta(), Delta(), Delta())
    for batch in range(1, 6):
        form(torch.zeros(batch, 8), torch.zeros(batch, 6))
        assert len(form._passed) <= 2


def test_a_bounded_form_has_the_parameters_of_its_form_alone(kernel: KernelArtifact) -> None:
    form = form_of(kernel, hostile.sound())
    assert isinstance(form, BoundedForm)
    assert set(form.state_dict()) == {f"form.{name}" for name in load_weights(kernel.weights)}


def test_gradients_of_inputs_pass_through(kernel: KernelArtifact) -> None:
    form = form_of(kernel, hostile.scripted(Delta()))
    h = torch.ones(2, 6, requires_grad=True)
    form(torch.ones(2, 8), h).sum().backward()
    torch.testing.assert_close(h.grad, torch.full((2, 6), 0.5))


def test_a_form_of_another_dtype_is_bounded_in_its_own(kernel: KernelArtifact) -> None:
    placement = replace(PLACEMENT, dtype=torch.bfloat16)
    form = KernelExecutor().inference_form(signed(kernel, hostile.sound()), hostile.SITE, placement)
    assert form(torch.ones(2, 8).bfloat16(), torch.ones(2, 6).bfloat16()).dtype is torch.bfloat16
