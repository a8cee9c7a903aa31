"""Compiled bytes that would do more than compute: stopped by the sandbox, never signed, and never loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.blueprints import BlueprintRegistry, parse_text, to_module
from esper.blueprints.ir import MAX_NODES
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import CompilationError, CorruptDataError
from esper.contracts.kernel import (
    CompileSpec,
    CompileTarget,
    DeviceKind,
    KernelArtifact,
    KernelManifest,
    ValidationCheck,
)
from esper.contracts.wire import parse
from esper.execution.archive_calls import MAX_EXPANDED_OPERATIONS
from esper.execution.archives import inspect_binary
from esper.execution.artifact import KernelContent, artifact_bytes, assemble, load_weights, sign, verify
from esper.execution.executor import KernelExecutor, Placement
from esper.execution.keys import SigningKey
from esper.services.tezzeret.approval import _check_weights, approve
from esper.services.tezzeret.compiler import compile_module, load_torchscript
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.default_sites import DEFAULT_SITES, default_site
from esper.services.tezzeret.kernel_optimizer import _RECIPES
from esper.services.tezzeret.kernel_validator import required_rows, stir
from esper.services.tezzeret.worker import TezzeretWorker
from tests import hostile_archives as hostile

KEY = SigningKey.generate()
PLACEMENT = Placement(device=torch.device("cpu"), dtype=torch.float32)
SCRIPT, PROGRAM = CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM
SIGNAL = Site(kind=SiteKind.CONV1D, input_shape=(4, 24), output_shape=(4, 12))
IMAGE = Site(kind=SiteKind.CONV2D, input_shape=(4, 10, 10), output_shape=(4, 8, 8))
TOKENS = Site(kind=SiteKind.ATTENTION, input_shape=(6, 16), output_shape=(6, 16))
GRAPHS = [
    (
        DEFAULT_SITES[0],
        "a = linear(h)\nb = rms_norm(a)\nc = group_norm(b, groups=2)\nd = scale(c)\ne = shift(d)\nf = multiply(e)\n"
        "g = concat(f, h)\ni = low_rank(g)\nj = mul(i, h)\nk = add(j, x)\nreturn k",
    ),
    (
        DEFAULT_SITES[0],
        "a = image_view(h)\nb = depthwise_conv(a)\nc = pool(b, kind=max)\nd = flatten(c)\ne = linear(d)\nreturn e",
    ),
    *(
        (DEFAULT_SITES[0], f"a = linear(h)\nb = activation(a, fn={fn})\nc = linear(b)\nreturn c")
        for fn in ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus")
    ),
    (
        SIGNAL,
        "n = align(x, h)\na = to_tokens(n)\nb = attention(a, a, a)\nc = like(b, h)\nd = pool(c, size=1)\nreturn d",
    ),
    (SIGNAL, "a = pool(x, size=2)\nb = conv(a, causal=true)\nc = layer_norm(b)\nreturn c"),
    (
        IMAGE,
        "n = align(x, h)\np = global_pool(n, kind=max)\nq = linear(p)\nr = mul(h, q)\ns = pool(r, size=1)\nreturn s",
    ),
    (
        IMAGE,
        "a = pool(x, kind=max)\nn = align(a, h)\nc = conv(n, groups=2)\ng = global_pool(c)\nr = add(h, g)\nreturn r",
    ),
    (
        TOKENS,
        "a = transpose(h)\nb = layer_norm(a)\nc = transpose(b)\ns = to_signal(c)\nd = depthwise_conv(s, causal=true)\n"
        "t = to_tokens(d)\nreturn t",
    ),
]
"""Every operator of the set, and every way in which one is emitted."""


@pytest.fixture(scope="module")
def kernel() -> KernelArtifact:
    return TezzeretWorker().compile_spec(hostile.SPEC).artifact


def remade(artifact: KernelArtifact, **changes: Any) -> KernelArtifact:
    """Give the artefact a liar makes: other content, with a manifest and digests that agree with it."""
    manifest = parse(artifact.manifest, KernelManifest)
    content: dict[str, Any] = {
        name: getattr(manifest, name)
        for name in ("content_key", "site", "target", "device", "cost", "checks", "compilation_time", "toolchain")
    }
    content |= {"ir": artifact.ir, "weights": load_weights(artifact.weights), "binary": artifact.binary}
    return assemble(KernelContent(**content | changes))


def not_refused(archives: Iterator[tuple[str, bytes, str]], target: CompileTarget) -> list[str]:
    """Give those that pass, and those that are refused for something else than what is wrong with them."""
    found = []
    for name, binary, said in archives:
        try:
            inspect_binary(binary, target)
        except CorruptDataError as error:
            if not re.search(said, str(error)):
                found.append(f"{name}: {error}")
        else:
            found.append(f"{name}: passes")
    return found


def test_a_script_that_does_more_than_compute_is_refused_by_name() -> None:
    assert not_refused(hostile.hostile_scripts(), SCRIPT) == []


@pytest.mark.parametrize(
    "loop",
    [
        "for i in range(64):\n      _2 = torch.add(h, 1)",
        "for i in range(torch.len(_1)):\n      _2 = _1[i]",
        "for i in range(torch.sub(torch.len(_1), 2)):\n      _2 = annotate(int, _1[torch.add(i, 2)])",
    ],
)
def test_a_loop_that_ends_soon_passes(loop: str) -> None:
    inspect_binary(hostile.with_source(hostile.with_line(f"_1 = torch.size(h)\n    {loop}")), SCRIPT)


def test_calls_that_end_soon_pass() -> None:
    inspect_binary(hostile.scripted(hostile.Calls()), SCRIPT)


RUN = """
import sys
from pathlib import Path

import torch

from esper.services.tezzeret.compiler import load_torchscript

torch.set_num_threads(1)
module = load_torchscript(Path(sys.argv[1]).read_bytes())
with torch.no_grad():
    for _ in range(3):
        module(torch.zeros(1, 8), torch.zeros(1, 6))
print("ran")
"""


def test_nearly_as_many_operations_as_pass_do_run(tmp_path: Path) -> None:
    """In a process of its own, which torch would take down with it where they were too many for the stack."""
    archive = tmp_path / "archive"
    archive.write_bytes(hostile.added(MAX_EXPANDED_OPERATIONS - 20))
    inspect_binary(archive.read_bytes(), SCRIPT)
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


@pytest.mark.parametrize("operator", ["group_norm({}, groups=2)", "linear({})", "low_rank({})"])
def test_the_largest_graph_passes(operator: str) -> None:
    """As many nodes as are allowed, of the operator that calls most functions and loops, among others."""
    lines = [f"{side}0 = {operator.format(start)}" for side, start in (("a", "x"), ("b", "h"))]
    num_pairs = (MAX_NODES - 1) // 2
    for index in range(1, num_pairs):
        lines += [f"{side}{index} = {operator.format(f'{side}{index - 1}')}" for side in "ab"]
    last = num_pairs - 1
    text = "\n".join(["blueprint 1", *lines, f"c = add(a{last}, b{last})", "return c"])
    module = to_module(parse_text(text), DEFAULT_SITES[0], seed=0)
    inspect_binary(compile_module(module, DEFAULT_SITES[0], (SCRIPT,), CompilerConfig()).binary, SCRIPT)


def test_a_message_about_a_call_nested_too_deep_to_print_is_short() -> None:
    name = "self" + ".node_a" * 900
    with pytest.raises(CorruptDataError, match="stands for one alone, got 'Attribute'"):
        inspect_binary(hostile.with_source(hostile.with_line(f"_2 = ({name}).forward(h, )")), SCRIPT)


def test_an_exported_program_that_does_more_than_compute_is_refused_by_name() -> None:
    assert not_refused(hostile.hostile_programs(), PROGRAM) == []


@pytest.mark.parametrize("target", [SCRIPT, PROGRAM])
def test_an_archive_packed_by_hand_passes_where_nothing_was_changed(target: CompileTarget) -> None:
    """So that what the tests above see refused is what they changed."""
    inspect_binary(hostile.packed(hostile.unpacked(hostile.sound(target))), target)


@pytest.mark.parametrize(("site", "text"), GRAPHS)
def test_every_operator_of_the_set_passes_in_every_form(site: Site, text: str) -> None:
    ir = parse_text(f"blueprint 1\n{text}")
    for target in (SCRIPT, PROGRAM):
        form = compile_module(to_module(ir, site, seed=0), site, (target,), CompilerConfig())
        inspect_binary(form.binary, target)
    for recipe in _RECIPES.values():
        inspect_binary(recipe(stir(to_module(ir, site, seed=0), 1).eval()).binary, SCRIPT)


def test_a_circle_is_named_by_short_names() -> None:
    """torch numbers a class that it compiled before, and a message ends after 200 characters."""
    scripts = {name: (binary, said) for name, binary, said in hostile.endless_calls()}
    binary, said = scripts["methods that call each other"]
    records = {
        name.replace("modules/linear", f"modules/{'long' * 40}"): data.replace(
            b"modules.linear", b"modules." + b"long" * 40
        )
        for name, data in hostile.unpacked(binary).items()
    }
    assert not_refused(iter([("long names", hostile.packed(records), said)]), SCRIPT) == []


def test_every_template_passes(registry: BlueprintRegistry) -> None:
    for name in registry.names():
        blueprint = registry.create_blueprint(name)
        site = default_site(blueprint)
        module = to_module(blueprint.ir, site, seed=0)
        inspect_binary(compile_module(module, site, (SCRIPT,), CompilerConfig()).binary, SCRIPT)


def test_machine_code_cannot_be_looked_through_and_eager_has_no_bytes() -> None:
    with pytest.raises(CorruptDataError, match="whose bytes can be looked through, got 'AOT_INDUCTOR'"):
        inspect_binary(hostile.sound(), CompileTarget.AOT_INDUCTOR)
    with pytest.raises(CorruptDataError, match="be empty for EAGER"):
        inspect_binary(b"x", CompileTarget.EAGER)
    inspect_binary(b"", CompileTarget.EAGER)


def test_an_honest_kernel_is_approved(kernel: KernelArtifact) -> None:
    for artifact in (kernel, remade(kernel)):
        manifest, data = approve(artifact, hostile.SPEC, KEY, processes=False)
        assert verify(data, KEY.ring()).artifact_id == manifest.artifact_id


def first(weights: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {**weights, "node_down.weight": change(weights["node_down.weight"])}


LIES: dict[str, tuple[Callable[[KernelArtifact], dict[str, Any]], str]] = {
    "binary": (lambda _: {"binary": hostile.scripted(hostile.Reads("/etc/passwd"))}, "got 'keyword'"),
    "another target's binary": (lambda _: {"target": PROGRAM}, "exported program alone|hold the record"),
    "machine code": (lambda _: {"target": CompileTarget.AOT_INDUCTOR}, "differs in target"),
    "one weight": (
        lambda made: {"weights": first(load_weights(made.weights), lambda weight: weight + 0.01)},
        "weight 'node_down.weight' must be what graph and seed give",
    ),
    "not a number": (
        lambda made: {"weights": first(load_weights(made.weights), lambda weight: weight * torch.nan)},
        "weight 'node_down.weight' must be what graph and seed give",
    ),
    "shape": (
        lambda made: {"weights": first(load_weights(made.weights), lambda weight: weight.flatten())},
        r"weight 'node_down.weight' must be torch.float32 of shape \(4, 6\), got torch.float32 of shape \(24,\)",
    ),
    "kind": (
        lambda made: {"weights": first(load_weights(made.weights), lambda weight: weight.double())},
        "must be torch.float32 of shape .* got torch.float64",
    ),
    "one more": (
        lambda made: {"weights": load_weights(made.weights) | {"z": torch.zeros(1)}},
        "weight 'z' must be absent",
    ),
    "none": (lambda _: {"weights": {}}, "got absent"),
    "toolchain": (lambda _: {"toolchain": {"torch": "9"}}, "differs in toolchain"),
    "device": (lambda _: {"device": DeviceKind.CUDA}, "differs in device"),
    "checks": (lambda _: {"checks": ()}, r"differs in checks \(batch, compiled_"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_worker_that_lies_gets_no_signature(kernel: KernelArtifact, name: str) -> None:
    change, said = LIES[name]
    with pytest.raises(CompilationError, match=said):
        approve(remade(kernel, **change(kernel)), hostile.SPEC, KEY, processes=False)


def test_a_failed_or_missing_row_gets_no_signature(kernel: KernelArtifact) -> None:
    checks = parse(kernel.manifest, KernelManifest).checks
    without = tuple(row for row in checks if row.name != "compiled_equality")
    with pytest.raises(CompilationError, match=r"differs in checks \(compiled_equality\)"):
        approve(remade(kernel, checks=without), hostile.SPEC, KEY, processes=False)
    failed = tuple(replace(row, passed=row.name != "latency") for row in checks)
    with pytest.raises(CompilationError, match=r"differs in checks \(one failed\)"):
        approve(remade(kernel, checks=failed), hostile.SPEC, KEY, processes=False)


@pytest.mark.parametrize("device", DeviceKind)
@pytest.mark.parametrize("target", CompileTarget)
def test_a_worker_process_must_have_asked_a_second_one(target: CompileTarget, device: DeviceKind) -> None:
    more = required_rows(target, device, processes=True) - required_rows(target, device, processes=False)
    assert more == {"determinism_processes"}


def test_a_kernel_that_only_a_thread_may_give_gets_no_signature_from_a_process(kernel: KernelArtifact) -> None:
    with pytest.raises(CompilationError, match=r"differs in checks \(determinism_processes\)"):
        approve(kernel, hostile.SPEC, KEY, processes=True)
    row = ValidationCheck(name="determinism_processes", passed=True)
    checks = (*parse(kernel.manifest, KernelManifest).checks, row)
    manifest, _ = approve(remade(kernel, checks=checks), hostile.SPEC, KEY, processes=True)
    assert manifest.checks == checks


def test_weights_written_in_another_way_get_no_signature(kernel: KernelArtifact) -> None:
    """A longer header says the same to a reader, and leaves room for what nobody looked at."""
    size = int.from_bytes(kernel.weights[:8], "little")
    padded = (size + 8).to_bytes(8, "little") + kernel.weights[8 : 8 + size] + b" " * 8 + kernel.weights[8 + size :]
    assert load_weights(padded).keys() == load_weights(kernel.weights).keys()
    with pytest.raises(CorruptDataError, match="in its one form"):
        _check_weights(padded, to_module(hostile.SPEC.ir, hostile.SITE, seed=0).state_dict())


def test_orthogonal_weights_are_approved_from_a_process_with_other_threads() -> None:
    text = "blueprint 1\na = linear(h, init=orthogonal)\nb = linear(a, init=zero)\nreturn b"
    spec = CompileSpec(ir=parse_text(text), site=DEFAULT_SITES[0])
    artifact = TezzeretWorker().compile_spec(spec).artifact
    weights = {name: value * (1 + 1e-7) for name, value in load_weights(artifact.weights).items()}
    approve(remade(artifact, weights=weights), spec, KEY, processes=False)


def test_the_trainer_loads_no_hostile_archive_though_it_is_signed(kernel: KernelArtifact, tmp_path: Path) -> None:
    """The key itself was used on it: by a service of an earlier version, or by a thief."""
    left = tmp_path / "left"
    module = hostile.WritesWhenLoaded(str(left))
    signed = sign(remade(kernel, binary=hostile.scripted(module)), KEY)
    verified = verify(artifact_bytes(signed), KEY.ring())
    with pytest.raises(CorruptDataError, match="binary: record"):
        KernelExecutor().inference_form(verified, hostile.SITE, PLACEMENT)
    assert not left.exists()
    load_torchscript(verified.binary)
    assert left.exists(), "the archive does what it is refused for"
    trainable = KernelExecutor().prepare(verified, hostile.SITE, PLACEMENT)
    assert trainable(torch.zeros(2, 8), torch.ones(2, 6)).abs().max() == 0, "training never looks at the binary"


SANDBOXED = """
import sys
from pathlib import Path

import torch

from esper.services.tezzeret.compiler import load_torchscript
from esper.services.tezzeret.config import WorkerLimits
from esper.services.tezzeret.sandbox import enter

torch.set_num_threads(1)
binary = Path(sys.argv[2]).read_bytes()
if sys.argv[1] == "sandboxed":
    rows = {row.name: row for row in enter(WorkerLimits(), Path(sys.argv[3]))}
    if not rows["files"].passed:
        sys.exit("no Landlock")
print(load_torchscript(binary)(torch.zeros(1, 8), torch.zeros(1, 6)).tolist())
"""


@pytest.mark.parametrize("kind", [hostile.Reads, hostile.Writes, hostile.WritesWhenLoaded])
def test_the_sandbox_stops_an_archive_that_reads_or_writes_files(kind: Any, tmp_path: Path) -> None:
    """Once without it, to see that the archive does what it is meant to, and once within."""
    scratch, archive, place = tmp_path / "scratch", tmp_path / "archive", tmp_path / "place"
    scratch.mkdir()
    if kind is hostile.Reads:
        place.write_bytes(bytes(range(11, 17)))
    archive.write_bytes(hostile.scripted(kind(str(place))))
    done = {}
    for mode in ("free", "sandboxed"):
        command = [sys.executable, "-W", "ignore", "-c", SANDBOXED, mode, str(archive), str(scratch)]
        done[mode] = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
        )
        if kind is not hostile.Reads:
            assert place.exists() == (mode == "free"), done[mode].stderr
            place.unlink(missing_ok=True)
    if "no Landlock" in done["sandboxed"].stderr:
        pytest.skip("this kernel has no Landlock")
    assert done["free"].returncode == 0, done["free"].stderr
    if kind is hostile.Reads:  # to write where it may not is an error that torch.save keeps to itself
        assert "11.0, 12.0" in done["free"].stdout
        assert done["sandboxed"].returncode != 0
        assert "ermission denied" in done["sandboxed"].stderr
        assert "11.0" not in done["sandboxed"].stdout
