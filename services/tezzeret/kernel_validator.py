"""What a kernel must show before it is signed, as rows of figure and limit.

    contract      the blueprint contract test (``esper.blueprints.check_blueprint``): identity at birth, learning,
                  gradient flow, shapes, positions, parameters and FLOPs as declared, determinism of builds, finite
                  results on random, zero and large inputs in float32 and bfloat16
    compiled_*    the compiled form against the module: shapes for several batches, equal results, equal gradients,
                  equal bits over repeated runs, finite on extreme inputs in both kinds
    processes     a second process builds and computes the same bits (only where the worker may fork)
    latency       best forward pass of one example, in milliseconds
    memory        bytes of parameters and of one example's activations

The compiled form is compared on weights away from birth, where every delta is 0 and any form would pass.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from esper.blueprints.build import to_module
from esper.blueprints.check import check_blueprint
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.kernel import CompileSpec, CompileTarget, ValidationCheck
from esper.contracts.memory import raise_if_out_of_memory
from esper.services.tezzeret.compiler import CompiledForm, Forward, example_inputs, load_binary
from esper.services.tezzeret.config import CompilerConfig

BATCHES: Final = (1, 2, 5)
"""Batch sizes that a compiled form must take."""

_ROW_NAMES: Final = {"identity": "identity_at_birth", "gradients": "gradient_flow"}
_RUNS: Final = 5
_EXTREME: Final = 1e4
_FORK_DEADLINE_S: Final = 20.0
_STIR: Final = 0.05
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A compiled form under validation, with the module it came from."""

    spec: CompileSpec
    """What was asked for."""
    module: nn.Module
    """The eager module at birth."""
    form: CompiledForm
    """The compiled form."""
    cost: BlueprintCost
    """Declared cost."""


def contract_rows(spec: CompileSpec) -> list[ValidationCheck]:
    """Give the rows of the blueprint contract test, under the names that kernels carry."""
    rows = check_blueprint(spec.ir, spec.site, seed=spec.random_seed).checks
    return [replace(row, name=_ROW_NAMES.get(row.name, row.name)) for row in rows]


def figure_rows(candidate: Candidate, config: CompilerConfig) -> list[ValidationCheck]:
    """Give the rows about a whole kernel: a second process where one may be forked, latency, memory."""
    rows = [_processes(candidate.spec)] if config.check_processes else []
    return [*rows, latency_row(candidate, config.max_latency_ms), _memory(candidate.cost, config.max_memory_bytes)]


def compiled_rows(candidate: Candidate, config: CompilerConfig) -> list[ValidationCheck]:
    """Give the rows that hold the compiled form against the module."""
    eager, compiled, stirred = _stirred_pair(candidate)
    limit = config.equality_limit if stirred else config.inference_equality_limit
    target = candidate.form.target
    rows: list[Callable[[], ValidationCheck]] = [
        lambda: _shapes(compiled, candidate),
        lambda: _repeats(compiled, candidate),
        lambda: _finite(compiled, candidate, torch.float32),
        lambda: _finite(compiled, candidate, torch.bfloat16),
    ]
    if target is not CompileTarget.EAGER:  # the eager form is the module: to compare it with itself would say nothing
        rows.append(lambda: equality_row("compiled_equality", eager, compiled, candidate.spec, limit))
    if target in (CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM):
        rows.append(lambda: _gradients(eager, compiled, candidate, config.equality_limit))
    return [_guarded(row) for row in rows]


def equality_row(
    name: str, eager: Forward, compiled: Forward, spec: CompileSpec, limit: float, *, note: str = ""
) -> ValidationCheck:
    """Give the largest difference of two forms over several batches, relative to the largest eager element."""
    worst, scale = 0.0, 0.0
    for batch in BATCHES:
        x, h = example_inputs(spec.site, batch, seed=batch)
        with torch.no_grad():
            wanted, got = eager(x, h), compiled(x, h)
        worst = max(worst, float((wanted - got).abs().max()))
        scale = max(scale, float(wanted.abs().max()))
    figure = worst / scale if scale > 0 else worst
    passed = figure <= limit  # false for NaN
    detail = note or f"largest difference over batches {BATCHES}, relative to {scale:.3g}"
    return ValidationCheck(name=name, figure=figure, limit=limit, passed=passed, detail=detail[:500])


def stir(module: nn.Module, seed: int) -> nn.Module:
    """Move every weight of a module a little away from birth, the same way for equal seeds; give the module back."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_STIR)
    return module


def _stirred_pair(candidate: Candidate) -> tuple[nn.Module | Forward, nn.Module | Forward, bool]:
    """Give eager and compiled form with equal weights, stirred where the form lets its weights be set."""
    spec, form = candidate.spec, candidate.form
    if form.target is CompileTarget.AOT_INDUCTOR:
        return candidate.module, form.forward, False
    eager = stir(to_module(spec.ir, spec.site, seed=spec.random_seed), spec.random_seed + 1)
    if form.target is CompileTarget.EAGER:
        return eager, eager, True
    compiled = load_binary(form.binary, form.target)
    assert isinstance(compiled, nn.Module)
    compiled.load_state_dict(eager.state_dict())
    return eager, compiled, True


def _guarded(row: Callable[[], ValidationCheck]) -> ValidationCheck:
    """Run one row; whatever a compiled form raises fails it."""
    try:
        return row()
    except Exception as error:  # noqa: BLE001 - compiled code may raise anything; the row says what
        raise_if_out_of_memory(error)
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ValidationCheck(name="compiled_runs", passed=False, detail=detail[:500])


def _shapes(compiled: Forward, candidate: Candidate) -> ValidationCheck:
    wrong: list[str] = []
    for batch in BATCHES:
        x, h = example_inputs(candidate.spec.site, batch)
        with torch.no_grad():
            got = tuple(compiled(x, h).shape)
        if got != tuple(h.shape):
            wrong.append(f"batch {batch}: {got} for {tuple(h.shape)}")
    detail = "; ".join(wrong) or f"delta has the shape of h for batches {BATCHES}"
    return ValidationCheck(name="compiled_shapes", figure=float(len(wrong)), limit=0.0, passed=not wrong, detail=detail)


def _repeats(compiled: Forward, candidate: Candidate) -> ValidationCheck:
    x, h = example_inputs(candidate.spec.site, 2)
    with torch.no_grad():
        first = compiled(x, h)
        same = sum(torch.equal(first, compiled(x, h)) for _ in range(_RUNS))
    return ValidationCheck(
        name="compiled_determinism",
        figure=float(same),
        limit=float(_RUNS),
        passed=same == _RUNS,
        detail=f"{same} of {_RUNS} further runs gave the same bits",
    )


def _gradients(
    eager: nn.Module | Forward, compiled: nn.Module | Forward, candidate: Candidate, limit: float
) -> ValidationCheck:
    assert isinstance(eager, nn.Module)
    assert isinstance(compiled, nn.Module)
    x, h = example_inputs(candidate.spec.site, 3)
    wanted, got = (_gradient_of(module, x, h) for module in (eager, compiled))
    missing = [name for name in wanted if name not in got]
    scale = max((float(gradient.abs().max()) for gradient in wanted.values()), default=0.0) or 1.0
    worst = max((float((wanted[name] - got[name]).abs().max()) for name in wanted if name in got), default=0.0)
    figure = worst / scale
    detail = f"no gradient for {', '.join(missing)}" if missing else f"{len(wanted)} parameters have the eager gradient"
    # Summation order may differ between forms, and gradients sum over more elements than outputs do.
    bound = 10 * limit
    return ValidationCheck(
        name="compiled_gradients",
        figure=figure,
        limit=bound,
        passed=not missing and figure <= bound,
        detail=detail[:500],
    )


def _gradient_of(module: nn.Module, x: torch.Tensor, h: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    if not named:
        return {}
    found = torch.autograd.grad(module(x, h).square().mean(), list(named.values()), allow_unused=True)
    return {name: found[index] for index, name in enumerate(named) if torch.is_tensor(found[index])}


def _finite(compiled: Forward, candidate: Candidate, dtype: torch.dtype) -> ValidationCheck:
    x, h = example_inputs(candidate.spec.site, 3)
    factors = torch.tensor([1.0, 0.0, _EXTREME])
    x, h = (tensor * factors.view(-1, *(1,) * (tensor.dim() - 1)) for tensor in (x, h))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        delta = compiled(x, h)
    parts = zip(("random", "zero", "extreme"), delta, strict=True)
    wrong = [name for name, part in parts if not bool(torch.isfinite(part).all())]
    detail = f"not finite on {', '.join(wrong)} inputs" if wrong else f"random, zero and inputs times {_EXTREME:g}"
    name = f"compiled_finite_{str(dtype).removeprefix('torch.')}"
    return ValidationCheck(name=name, figure=float(len(wrong)), limit=0.0, passed=not wrong, detail=detail)


def output_digest(spec: CompileSpec) -> bytes:
    """Give the SHA-256 of a freshly built module's weights and of what it computes once stirred."""
    module = to_module(spec.ir, spec.site, seed=spec.random_seed)
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    stir(module, spec.random_seed + 1)
    x, h = example_inputs(spec.site, 2)
    with torch.no_grad():
        digest.update(module(x, h).contiguous().numpy().tobytes())
    return digest.digest()


def _processes(spec: CompileSpec) -> ValidationCheck:
    """Compute the digest here and in a fork of this process, which must have no other threads."""
    wanted = output_digest(spec)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer_and_exit(writer, spec)
    os.close(writer)
    got = _read_all(reader, 32)
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    passed = got == wanted
    detail = "a second process gave the same bits" if passed else f"a second process gave {got.hex() or 'nothing'}"
    return ValidationCheck(name="determinism_processes", passed=passed, detail=detail)


def _answer_and_exit(writer: int, spec: CompileSpec) -> None:
    """Run in the fork: send the digest and end without any of the parent's clean-up."""
    try:
        os.write(writer, output_digest(spec))
    finally:
        os.close(writer)
        signal.pause()  # until the parent ends it: a forked torch must not run its exit handlers


def _read_all(reader: int, size: int) -> bytes:
    deadline = time.monotonic() + _FORK_DEADLINE_S
    data = b""
    while len(data) < size:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(reader, size - len(data)) if ready else b""
        if not piece:
            break
        data += piece
    return data


def latency_row(candidate: Candidate, limit_ms: float) -> ValidationCheck:
    """Give the best time of one example through the compiled form."""
    x, h = example_inputs(candidate.spec.site, 1)
    best = float("inf")
    with torch.no_grad():
        candidate.form.forward(x, h)
        for _ in range(_RUNS):
            begun = time.perf_counter()
            candidate.form.forward(x, h)
            best = min(best, (time.perf_counter() - begun) * 1e3)
    detail = f"best of {_RUNS} forward passes of one example"
    return ValidationCheck(
        name="latency", figure=best, limit=limit_ms, unit="ms", passed=best <= limit_ms, detail=detail
    )


def _memory(cost: BlueprintCost, limit_bytes: int) -> ValidationCheck:
    held = cost.parameters * _FLOAT_BYTES + cost.activation_bytes
    return ValidationCheck(
        name="memory",
        figure=float(held),
        limit=float(limit_bytes),
        unit="bytes",
        passed=held <= limit_bytes,
        detail=f"{cost.parameters} parameters and {cost.activation_bytes} bytes of activations for one example",
    )


def failed_rows(rows: Sequence[ValidationCheck]) -> str:
    """Give the rows that did not pass, in words; empty when all did."""
    return "; ".join(f"{row.name}: {row.detail}" for row in rows if not row.passed)
