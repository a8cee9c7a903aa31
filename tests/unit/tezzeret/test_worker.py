"""From blueprint to kernel: every target, fall-backs that are recorded, and checks that can fail."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.blueprints import BlueprintRegistry, CheckReport, check_blueprint, cost, to_module
from esper.contracts.blueprint import Blueprint, BlueprintIR, BlueprintMetadata, IRNode, Site, SiteKind
from esper.contracts.errors import CapacityExceededError, CompilationError, InvalidBlueprintError, InvalidInputError
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, JobPhase, ValidationCheck
from esper.execution.artifact import artifact_bytes, verify
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.services.tezzeret import compiler, kernel_validator
from esper.services.tezzeret.compiler import load_binary
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.default_sites import DEFAULT_SITES, default_site
from esper.services.tezzeret.kernel_optimizer import NO_CUDA, KernelOptimizer
from esper.services.tezzeret.kernel_validator import Candidate, contract_rows, required_rows
from esper.services.tezzeret.worker import TezzeretWorker

WORKER = TezzeretWorker()
IMAGE = Site(kind=SiteKind.CONV2D, input_shape=(8, 8, 8), output_shape=(8, 8, 8))
SMALL = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))
REQUIRED = {
    "identity_at_birth", "learning", "gradient_flow", "batch", "parameters", "flops", "determinism", "finite_float32",
    "finite_bfloat16", "compiled_shapes", "compiled_determinism", "compiled_finite_float32",
    "compiled_finite_bfloat16", "compiled_equality", "compiled_gradients", "latency", "memory",
}  # fmt: skip


def test_a_blueprint_becomes_a_checked_kernel(blueprint: Blueprint) -> None:
    kernel = WORKER.compile_blueprint(blueprint)
    assert kernel.binary_data
    assert 0 < kernel.metadata.compilation_time < 5.0
    assert kernel.metadata.validated
    assert kernel.metadata.target is CompileTarget.TORCHSCRIPT
    assert {check.name for check in kernel.metadata.checks} >= REQUIRED
    assert required_rows(CompileTarget.TORCHSCRIPT, DeviceKind.CPU, processes=False) == REQUIRED | {"positions"}
    assert all(check.passed for check in kernel.metadata.checks)
    assert kernel.manifest.blueprint_id == blueprint.id
    assert kernel.artifact.signature == b""


def test_a_worker_with_a_key_signs(blueprint: Blueprint) -> None:
    key = SigningKey.generate()
    kernel = TezzeretWorker(signer=key).compile_blueprint(blueprint, random_seed=3)
    verified = verify(artifact_bytes(kernel.artifact), key.ring(), artifact_id=kernel.artifact_id)
    rebuilt = to_module(verified.ir, verified.manifest.site, seed=3)
    assert all(torch.equal(verified.weights[name], tensor) for name, tensor in rebuilt.state_dict().items())


@pytest.mark.parametrize("target", [CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM])
def test_compiled_bytes_compute_what_the_module_does(blueprint: Blueprint, target: CompileTarget) -> None:
    kernel = WORKER.compile_blueprint(blueprint, target=target)
    assert kernel.metadata.target is target
    compiled = load_binary(kernel.binary_data, target)
    assert isinstance(compiled, torch.nn.Module)
    eager = to_module(kernel.spec.ir, kernel.spec.site, seed=0)
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter)
    compiled.load_state_dict(eager.state_dict())
    x, h = torch.randn(7, 64), torch.randn(7, 64)
    torch.testing.assert_close(compiled(x, h), eager(x, h))


def test_eager_has_no_bytes_and_no_row_that_compares_it_with_itself(blueprint: Blueprint) -> None:
    kernel = WORKER.compile_blueprint(blueprint, target=CompileTarget.EAGER)
    assert kernel.binary_data == b""
    names = {check.name for check in kernel.metadata.checks}
    assert "compiled_shapes" in names
    assert not names & {"compiled_equality", "compiled_gradients"}


def test_aot_inductor_falls_back_and_says_why(blueprint: Blueprint) -> None:
    kernel = WORKER.compile_blueprint(blueprint, target=CompileTarget.AOT_INDUCTOR)
    assert kernel.metadata.target is CompileTarget.EXPORTED_PROGRAM
    [given_up] = kernel.manifest.fallbacks
    assert given_up.target is CompileTarget.AOT_INDUCTOR
    assert "tens of seconds" in given_up.reason


def test_aot_inductor_without_a_compiler_falls_back_and_says_why(
    spec: CompileSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    worker = TezzeretWorker(CompilerConfig(aot_inductor=True))
    kernel = worker.compile_spec(replace(spec, target=CompileTarget.AOT_INDUCTOR))
    assert kernel.metadata.target is CompileTarget.EXPORTED_PROGRAM
    [given_up] = kernel.manifest.fallbacks
    assert given_up.target is CompileTarget.AOT_INDUCTOR
    assert given_up.reason == "AOTInductor needs a C++ compiler, and this machine has none"


def test_a_target_that_breaks_falls_back_down_to_eager(blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("compiler\nfell over")

    monkeypatch.setattr(compiler, "script_of", broken)
    monkeypatch.setattr(compiler, "_export", broken)
    kernel = WORKER.compile_blueprint(blueprint)
    assert kernel.metadata.target is CompileTarget.EAGER
    assert [(row.target, row.reason) for row in kernel.metadata.fallbacks] == [
        (CompileTarget.TORCHSCRIPT, "compiler fell over"),
        (CompileTarget.EXPORTED_PROGRAM, "compiler fell over"),
    ]


def test_a_target_that_computes_something_else_is_given_up(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong only away from birth, where every delta is zero."""
    honest = compiler.load_torchscript

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
            return self.inner.load_state_dict(state)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = 2 * self.inner(x, h)
            return doubled

    monkeypatch.setattr(compiler, "load_torchscript", lambda binary: Doubled(honest(binary)))
    kernel = WORKER.compile_blueprint(blueprint)
    assert kernel.metadata.target is CompileTarget.EXPORTED_PROGRAM
    [given_up] = kernel.metadata.fallbacks
    assert "compiled_equality" in given_up.reason
    assert "compiled_gradients" in given_up.reason


def two_layers(fn: str) -> BlueprintIR:
    """Equal weights and equal outputs at birth (zero) for every function."""
    return BlueprintIR(
        nodes=(
            IRNode(name="a", op="linear", inputs=("h",)),
            IRNode(name="b", op="activation", inputs=("a",), attributes={"fn": fn}),
            IRNode(name="c", op="linear", inputs=("b",), attributes={"init": "zero"}),
        ),
        output="c",
    )


def rows_of(wrong: str, target: CompileTarget, config: CompilerConfig) -> dict[str, ValidationCheck]:
    """Give the rows of a form compiled of another graph, by name."""
    spec = CompileSpec(ir=two_layers("gelu"), site=SMALL, target=target)
    module = to_module(spec.ir, SMALL, seed=0)
    form = compiler.compile_module(to_module(two_layers(wrong), SMALL, seed=0), SMALL, (target,), config)
    x, h = compiler.example_inputs(SMALL, 4)
    with torch.no_grad():
        assert torch.equal(form.forward(x, h), module(x, h)), "at birth nothing shows"
    candidate = Candidate(spec=spec, module=module, form=form, cost=cost(spec.ir, SMALL))
    return {row.name: row for row in kernel_validator.compiled_rows(candidate, config)}


@pytest.mark.parametrize("target", [CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM])
def test_a_form_of_another_graph_is_found_though_it_is_equal_at_birth(target: CompileTarget) -> None:
    assert rows_of("gelu", target, CompilerConfig())["compiled_equality"].passed
    row = rows_of("relu", target, CompilerConfig())["compiled_equality"]
    assert not row.passed
    assert row.figure is not None
    assert row.figure > 0.01


def test_equality_of_nothing_but_zeros_is_no_equality(spec: CompileSpec) -> None:
    born = to_module(spec.ir, spec.site, seed=0)
    row = kernel_validator.equality_row("compiled_equality", born, born, spec, 1.0)
    assert not row.passed
    assert row.detail == "only zeros compared"


def test_memory_is_measured_on_the_module_and_shown_beside_what_was_declared(registry: BlueprintRegistry) -> None:
    spec = CompileSpec(ir=registry.create_blueprint("conv3x3").ir, site=IMAGE)
    declared = cost(spec.ir, IMAGE)
    row = next(row for row in WORKER.compile_spec(spec).metadata.checks if row.name == "memory")
    assert row.figure == 4 * declared.parameters + declared.activation_bytes
    assert row.detail.startswith(f"measured: {4 * declared.parameters} bytes of parameters")
    lying = Candidate(
        spec=spec,
        module=to_module(spec.ir, IMAGE, seed=0),
        form=compiler.compile_module(torch.nn.Identity(), IMAGE, (CompileTarget.EAGER,), CompilerConfig()),
        cost=replace(declared, activation_bytes=1),
    )
    assert kernel_validator._memory(lying, 1 << 30).figure == row.figure


def test_a_blueprint_that_cannot_learn_fails_and_names_the_check() -> None:
    dead = BlueprintIR(
        nodes=(
            IRNode(name="a", op="linear", inputs=("h",), attributes={"init": "zero"}),
            IRNode(name="b", op="activation", inputs=("a",), attributes={"fn": "relu"}),
            IRNode(name="c", op="linear", inputs=("b",), attributes={"init": "zero"}),
        ),
        output="c",
    )
    with pytest.raises(CompilationError, match=r"failed gradient_flow: .* node .c. passes no gradient to .b."):
        WORKER.compile_spec(CompileSpec(ir=dead, site=DEFAULT_SITES[0]))


def test_the_contract_is_checked_by_the_blueprints_own_test(spec: CompileSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code path with Karn: what ``check_blueprint`` says is what the kernel carries, or why there is none."""
    own = check_blueprint(spec.ir, spec.site, seed=spec.random_seed)
    shown = {row.name: (row.figure, row.detail) for row in contract_rows(spec)}
    renamed = {"identity": "identity_at_birth", "gradients": "gradient_flow"}
    assert shown == {renamed.get(row.name, row.name): (row.figure, row.detail) for row in own.checks}
    broken = CheckReport(checks=(*own.checks, ValidationCheck(name="new_row", passed=False, detail="said so")))
    monkeypatch.setattr(kernel_validator, "check_blueprint", lambda *_, **__: broken)
    with pytest.raises(CompilationError, match="failed new_row: said so"):
        WORKER.compile_spec(spec)


def test_a_kernel_too_slow_or_too_large_fails(spec: CompileSpec) -> None:
    with pytest.raises(CompilationError, match="failed latency: best of 5"):
        TezzeretWorker(CompilerConfig(max_latency_ms=1e-6)).compile_spec(spec)
    with pytest.raises(CompilationError, match="failed memory: measured: 280 bytes of parameters"):
        TezzeretWorker(CompilerConfig(max_memory_bytes=1)).compile_spec(spec)
    with pytest.raises(CapacityExceededError, match="at most 1 parameters"):
        TezzeretWorker(CompilerConfig(max_parameters=1)).compile_spec(spec)


def test_phases_are_told_in_order(spec: CompileSpec) -> None:
    phases: list[JobPhase] = []
    WORKER.compile_spec(spec, phases.append)
    assert phases == [JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.PACKAGING]


def test_equal_requests_give_equal_kernels(spec: CompileSpec) -> None:
    """Weights and IR to the bit; the TorchScript archive carries no time or name of its own either."""
    first, second = (WORKER.compile_spec(spec) for _ in range(2))
    assert first.artifact.weights == second.artifact.weights
    assert first.artifact.ir == second.artifact.ir
    assert first.manifest.content_key == second.manifest.content_key == content_key(spec)


def test_torch_random_state_is_left_alone(spec: CompileSpec) -> None:
    before = torch.get_rng_state()
    WORKER.compile_spec(spec)
    assert torch.equal(before, torch.get_rng_state())


FORKING = """
import os

import torch

from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import CompilationError
from esper.contracts.kernel import CompileSpec
from esper.services.tezzeret import kernel_validator
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.kernel_validator import Candidate, contract_rows, required_rows
from esper.services.tezzeret.worker import TezzeretWorker

torch.set_num_threads(1)
site = Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(8,))
spec = CompileSpec(ir=default_registry().create_blueprint("lora").ir, site=site)
def detail_of(worker):
    return {check.name: check for check in worker.compile_spec(spec).metadata.checks}["determinism_processes"].detail

checked = TezzeretWorker(CompilerConfig(check_processes=True))
print(detail_of(checked))
pid = checked._second.pid
print(detail_of(checked), checked._second.pid == pid)
misled = TezzeretWorker(CompilerConfig(check_processes=True))
mine, honest = os.getpid(), kernel_validator.output_digest
kernel_validator.output_digest = lambda *given: honest(*given) if os.getpid() == mine else bytes(32)
try:
    misled.compile_spec(spec)
except CompilationError as error:
    print(error)
kernel_validator.output_digest = honest
print(detail_of(misled))
open_fds = len(os.listdir("/proc/self/fd"))
pids = [worker._second.pid for worker in (checked, misled)]
for worker in (checked, checked, misled):
    worker.close()
print(open_fds - len(os.listdir("/proc/self/fd")), [os.path.exists(f"/proc/{pid}") for pid in pids])
"""


def test_a_second_process_gives_the_same_bits() -> None:
    # A fork needs a process without other threads, which a test runner is not.
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ)
    )
    first, again, different, replaced, closed = done.stdout.strip().split("\n")
    same = "a second process gave the same bits, built and compiled"
    assert (first, again) == (same, f"{same} True")
    assert "determinism_processes: a second process gave 0000" in different
    assert replaced == same, "a process that gave other bits is not asked again"
    assert closed == "4 [False, False]", "a closed worker leaves neither descriptors nor a process"


def test_the_graph_of_a_module_is_no_part_of_what_is_scripted(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would try the class of the graph, fail and leave it out: without the attempt the archive is the same."""
    tried: list[type] = []
    honest = torch.jit._script._recursive_compile_class

    def noted(cls: type, loc: Any) -> Any:
        tried.append(cls)
        return honest(cls, loc)

    monkeypatch.setattr(torch.jit._script, "_recursive_compile_class", noted)
    site = DEFAULT_SITES[0]
    mine = compiler.save_torchscript(compiler.script_of(to_module(blueprint.ir, site, seed=0)))
    assert tried == []
    with compiler.quiet():
        plain = compiler.save_torchscript(torch.jit.script(to_module(blueprint.ir, site, seed=0)))
    assert tried, "torch no longer tries, so the list of what is left out can go"
    assert _content(mine) == _content(plain)


def _content(archive: bytes) -> dict[str, bytes]:
    """Give the code and tensors of an archive without the numbers by which torch tells its classes apart."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    return {
        re.sub(r"/___torch_mangle_\d+", "", name): re.sub(rb"\.___torch_mangle_\d+", b"", reader.get_record(name))
        for name in reader.get_all_records()
        if name.endswith(".py") or re.fullmatch(r"(data|constants)/\d+", name)
    }


@pytest.mark.parametrize("name", ["conv3x3", "low_rank_attention", "token_channel_mixer", "squeeze_excite"])
def test_templates_of_images_compile(registry: BlueprintRegistry, name: str) -> None:
    kernel = WORKER.compile_blueprint(registry.create_blueprint(name), site=IMAGE)
    assert kernel.metadata.target is CompileTarget.TORCHSCRIPT
    assert kernel.metadata.validated


def test_without_a_site_the_first_that_fits_is_taken(registry: BlueprintRegistry, blueprint: Blueprint) -> None:
    assert default_site(blueprint) == DEFAULT_SITES[0]
    image_only = replace(blueprint, metadata=BlueprintMetadata(site_kinds=(SiteKind.CONV2D,)))
    assert default_site(image_only).kind is SiteKind.CONV2D
    assert default_site(registry.create_blueprint("conv3x3")).kind is SiteKind.CONV2D


def test_a_blueprint_that_fits_no_default_site_is_named(blueprint: Blueprint) -> None:
    nowhere = BlueprintIR(nodes=(IRNode(name="a", op="linear", inputs=("h",), attributes={"features": 3}),), output="a")
    with pytest.raises(InvalidBlueprintError, match="must be legal at a default site of LINEAR"):
        default_site(replace(blueprint, ir=nowhere))


class TestOptimizer:
    """Inference forms, each within its stated tolerance of the module."""

    @pytest.fixture
    def image_kernel(self, registry: BlueprintRegistry) -> Any:
        return WORKER.compile_blueprint(registry.create_blueprint("conv3x3"), site=IMAGE)

    def test_cuda_without_a_cuda_device_is_device_neutral_and_says_so(self, image_kernel: Any) -> None:
        optimized = KernelOptimizer().optimize(image_kernel, device="cuda")
        assert optimized.metadata.optimization_applied == ("channels_last", "freeze")
        assert optimized.metadata.target_device == "cuda"
        assert optimized.manifest.device is DeviceKind.CUDA
        if not torch.cuda.is_available():
            assert optimized.metadata.device_neutral
            assert optimized.metadata.notes == (NO_CUDA,)
            row = next(check for check in optimized.metadata.checks if check.name == "optimized_equality")
            assert NO_CUDA in row.detail

    @pytest.mark.parametrize("device", ["cpu", "cuda", "mobile"])
    def test_the_form_runs_and_equals_the_module_within_its_limit(self, blueprint: Blueprint, device: str) -> None:
        kernel = WORKER.compile_blueprint(blueprint)
        optimized = KernelOptimizer().optimize(kernel, device=device)
        row = next(check for check in optimized.metadata.checks if check.name == "optimized_equality")
        assert row.figure is not None
        assert row.limit is not None
        assert row.figure <= row.limit
        form = load_binary(optimized.binary_data, CompileTarget.TORCHSCRIPT)
        x, h = torch.randn(3, 64), torch.randn(3, 64)
        assert form(x, h).abs().max() <= 1e-6, "identity at birth"
        assert optimized.manifest.content_key != kernel.manifest.content_key
        assert optimized.artifact.weights == kernel.artifact.weights

    def test_int8_is_smaller_and_within_its_own_limit(self, registry: BlueprintRegistry) -> None:
        site = Site(kind=SiteKind.LINEAR, input_shape=(256,), output_shape=(256,))
        kernel = WORKER.compile_blueprint(registry.create_blueprint("gated_mlp"), site=site)
        mobile = KernelOptimizer().optimize(kernel, device="mobile")
        assert "int8_dynamic" in mobile.metadata.optimization_applied
        assert len(mobile.binary_data) < len(kernel.binary_data) / 2

    @pytest.mark.parametrize("site", DEFAULT_SITES[1:3], ids=lambda site: site.kind.name)
    def test_every_map_of_a_mobile_form_is_int8(self, registry: BlueprintRegistry, site: Site) -> None:
        """At sites of images and signals all maps are convolutions; every template there is tried."""
        applied = {}
        for blueprint in registry.for_site(site):
            kernel = WORKER.compile_blueprint(blueprint, site=site, device=DeviceKind.MOBILE)
            applied[blueprint.name] = kernel.metadata.optimization_applied
            row = next(row for row in kernel.metadata.checks if row.name == "optimized_equality")
            assert row.limit == CompilerConfig().int8_equality_limit or blueprint.name == "norm_shift"
            form = load_binary(kernel.binary_data, CompileTarget.TORCHSCRIPT)
            assert isinstance(form, torch.jit.ScriptModule)
            weights = [one for one in _constants(form) if one.dim() > 2 and one.numel() > one.shape[0]]
            assert {one.dtype for one in weights} <= {torch.int8}, blueprint.name
        assert applied.pop("norm_shift") == ("freeze",)
        attention = {"low_rank_attention", "squeeze_excite", "token_channel_mixer"} & applied.keys()
        assert {applied.pop(name) for name in attention} == {("int8_dynamic", "freeze")}
        assert set(applied.values()) == {("int8_weights", "freeze")}

    def test_an_int8_convolution_is_smaller_and_runs_where_its_weights_outweigh_its_map(
        self, registry: BlueprintRegistry
    ) -> None:
        site = Site(kind=SiteKind.CONV2D, input_shape=(256, 2, 2), output_shape=(256, 2, 2))
        key = SigningKey.generate()
        worker = TezzeretWorker(signer=key)
        plain, mobile = (
            worker.compile_blueprint(registry.create_blueprint("conv3x3"), site=site, device=device)
            for device in (DeviceKind.CPU, DeviceKind.MOBILE)
        )
        assert len(mobile.binary_data) < len(plain.binary_data) / 3
        verified = verify(artifact_bytes(mobile.artifact), key.ring())
        placement = Placement(device=torch.device("cpu"), dtype=torch.float32)
        form = KernelExecutor().inference_form(verified, site, placement)
        x, h = (torch.randn(1, *site.input_shape) for _ in range(2))
        assert form(x, h).abs().max() <= 1e-6, "identity at birth"

    def test_a_form_beyond_its_limit_is_refused(self, blueprint: Blueprint) -> None:
        kernel = WORKER.compile_blueprint(blueprint)
        strict = KernelOptimizer(CompilerConfig(int8_equality_limit=1e-9))
        with pytest.raises(
            CompilationError, match="optimised form for mobile must equal the module, failed optimized_"
        ):
            strict.optimize(kernel, device="mobile")

    def test_an_unknown_device_is_refused(self, image_kernel: Any) -> None:
        with pytest.raises(InvalidInputError, match="device must be cpu, cuda or mobile, got 'tpu'"):
            KernelOptimizer().optimize(image_kernel, device="tpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_aot_inductor_compiles_where_it_may_take_its_time(spec: CompileSpec) -> None:
    worker = TezzeretWorker(CompilerConfig(aot_inductor=True))
    kernel = worker.compile_spec(replace(spec, target=CompileTarget.AOT_INDUCTOR))
    assert kernel.metadata.target is CompileTarget.AOT_INDUCTOR, kernel.metadata.fallbacks
    compiled = load_binary(kernel.binary_data, CompileTarget.AOT_INDUCTOR)
    eager = to_module(spec.ir, spec.site, seed=0).eval()
    x, h = torch.randn(4, 8), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, h), eager(x, h))
    row = next(row for row in kernel.metadata.checks if row.name == "compiled_equality")
    assert row.passed, "of weights away from birth: zeros alone would not pass"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_aot_package_of_another_graph_is_found_though_it_is_equal_at_birth() -> None:
    row = rows_of("relu", CompileTarget.AOT_INDUCTOR, CompilerConfig(aot_inductor=True))["compiled_equality"]
    assert not row.passed
    assert row.figure is not None
    assert row.figure > 0.01


def _constants(form: torch.jit.ScriptModule) -> list[torch.Tensor]:
    """Give the tensors that a frozen form holds."""
    nodes = form.graph.findAllNodes("prim::Constant", recurse=True)
    return [node.t("value") for node in nodes if node.hasAttribute("value") and node.kindOf("value") == "t"]


def _out_of_memory(*_: object) -> None:
    raise MemoryError


def test_memory_that_runs_out_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compile", _out_of_memory)
    with pytest.raises(CapacityExceededError, match="memory must suffice, it ran out: MemoryError"):
        compiler.compile_module(torch.nn.Identity(), DEFAULT_SITES[0], (CompileTarget.TORCHSCRIPT,), CompilerConfig())


def test_memory_that_runs_out_is_no_verdict_on_a_kernel() -> None:
    with pytest.raises(CapacityExceededError, match="memory must suffice, it ran out: MemoryError"):
        kernel_validator._guarded(_out_of_memory)  # type: ignore[arg-type]
