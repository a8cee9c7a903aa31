"""What a kernel must show before it is signed, as rows of figure and limit.

    contract      the blueprint contract test (``esper.blueprints.check_blueprint``): identity at birth, learning,
                  gradient flow, shapes, positions, parameters and FLOPs as declared, determinism of builds, finite
                  results on random, zero and large inputs in float32 and bfloat16
    compiled_*    the compiled form against the module: shapes for several batches, equal results, equal gradients,
                  equal bits over repeated runs, finite on extreme inputs in both kinds
    processes     a second process builds, loads the compiled form, and computes the same bits with either (of worker
                  processes alone, and of each of them: a thread must not fork)
    latency       best forward pass of one example, in milliseconds
    memory        bytes of parameters, and of what autograd keeps of one example, measured on the trainable form

The compiled form is compared on weights away from birth, where every delta is 0 and any form would pass; rows of
equality fail where nothing but zeros was compared.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from torch import nn

from esper.blueprints.build import to_module
from esper.blueprints.check import check_blueprint
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, ValidationCheck
from esper.contracts.memory import raise_if_out_of_memory
from esper.contracts.wire import parse, serialize
from esper.services.tezzeret.compiler import CompiledForm, Forward, example_inputs, load_binary, set_aot_weights
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.second_process import SecondProcess

BATCHES: Final = (1, 2, 5)
"""Batch sizes that a compiled form must take."""

_TRAINABLE: Final = (CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM)
_CONTRACT_ROWS: Final = frozenset(
    {
        "identity_at_birth", "learning", "gradient_flow", "batch", "positions", "parameters", "flops", "determinism",
        "finite_float32", "finite_bfloat16", "latency", "memory",
    }
)  # fmt: skip
_COMPILED_ROWS: Final = frozenset(
    {"compiled_shapes", "compiled_determinism", "compiled_finite_float32", "compiled_finite_bfloat16"}
)
_FORM_ROWS: Final = frozenset({"compiled_equality"})
_TRAINED_ROWS: Final = frozenset({"compiled_gradients"})
_OPTIMIZED_ROWS: Final = frozenset({"optimized_equality", "optimized_latency"})
_PROCESS_ROWS: Final = frozenset({"determinism_processes"})
_ROW_NAMES: Final = {"identity": "identity_at_birth", "gradients": "gradient_flow"}
_RUNS: Final = 5
_EXTREME: Final = 1e4
_STIR: Final = 0.05
_FLOAT_BYTES: Final = 4
_REQUEST: Final = struct.Struct(">BI")
"""Target and length of the spec; spec and compiled bytes follow."""


@dataclass(frozen=True, kw_only=True)
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

    @cached_property
    def pair(self) -> tuple[nn.Module, nn.Module | Forward]:
        """The module and the compiled form with equal weights, away from birth."""
        spec = self.spec
        module = to_module(spec.ir, spec.site, seed=spec.random_seed)
        return _stirred_pair(module, spec, self.form.target, self.form.binary)


def required_rows(target: CompileTarget, device: DeviceKind, *, processes: bool) -> frozenset[str]:
    """Give the names of the rows that a kernel must carry.

    Args:
        target: Target that it reached.
        device: Device that it is for.
        processes: Whether a worker process made it, and so had a second one to compare itself with.
    """
    rows = _CONTRACT_ROWS | _COMPILED_ROWS
    rows |= _FORM_ROWS if target is not CompileTarget.EAGER else frozenset()
    rows |= _TRAINED_ROWS if target in _TRAINABLE else frozenset()
    rows |= _PROCESS_ROWS if processes else frozenset()
    return rows | (frozenset() if device is DeviceKind.CPU else _OPTIMIZED_ROWS)


def contract_rows(spec: CompileSpec) -> list[ValidationCheck]:
    """Give the rows of the blueprint contract test, under the names that kernels carry."""
    rows = check_blueprint(spec.ir, spec.site, seed=spec.random_seed).checks
    return [replace(row, name=_ROW_NAMES.get(row.name, row.name)) for row in rows]


def figure_rows(candidate: Candidate, config: CompilerConfig) -> list[ValidationCheck]:
    """Give the rows about a whole kernel: latency, memory."""
    return [latency_row(candidate, config.max_latency_ms), _memory(candidate, config.max_memory_bytes)]


def compiled_rows(candidate: Candidate, config: CompilerConfig) -> list[ValidationCheck]:
    """Give the rows that hold the compiled form against the module."""
    try:
        eager, compiled = candidate.pair
    except Exception as error:  # noqa: BLE001 - a form that cannot be loaded once more, or takes no weights
        return [_broken(error)]
    target = candidate.form.target
    limit = config.inference_equality_limit if target is CompileTarget.AOT_INDUCTOR else config.equality_limit
    rows: list[Callable[[], ValidationCheck]] = [
        lambda: _shapes(compiled, candidate),
        lambda: _repeats(compiled, candidate),
        lambda: _finite(compiled, candidate, torch.float32),
        lambda: _finite(compiled, candidate, torch.bfloat16),
    ]
    if target is not CompileTarget.EAGER:  # the eager form is the module: to compare it with itself would say nothing
        rows.append(lambda: equality_row("compiled_equality", eager, compiled, candidate.spec, limit))
    if target in _TRAINABLE:
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
    passed = scale > 0 and figure <= limit  # false for NaN
    said = f"largest difference over batches {BATCHES}, relative to {scale:.3g}" if scale > 0 else "only zeros compared"
    detail = f"{said}; {note}" if note else said
    return ValidationCheck(name=name, figure=figure, limit=limit, passed=passed, detail=detail[:500])


def stir(module: nn.Module, seed: int) -> nn.Module:
    """Move every weight of a module a little away from birth, the same way for equal seeds; give the module back."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_STIR)
    return module


def _stirred_pair(
    module: nn.Module, spec: CompileSpec, target: CompileTarget, binary: bytes
) -> tuple[nn.Module, nn.Module | Forward]:
    """Stir a freshly built module, and give it with the compiled form, loaded once more, under the same weights."""
    eager = stir(module, spec.random_seed + 1)
    if target is CompileTarget.EAGER:
        return eager, eager
    compiled = load_binary(binary, target)
    if isinstance(compiled, nn.Module):
        compiled.load_state_dict(eager.state_dict())
    else:
        set_aot_weights(compiled, eager.state_dict())
    return eager, compiled


def _guarded(row: Callable[[], ValidationCheck]) -> ValidationCheck:
    """Run one row; whatever a compiled form raises fails it."""
    try:
        return row()
    except Exception as error:  # noqa: BLE001 - compiled code may raise anything; the row says what
        return _broken(error)


def _broken(error: Exception) -> ValidationCheck:
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


def output_digest(spec: CompileSpec, pair: tuple[nn.Module, nn.Module | Forward], birth: nn.Module) -> bytes:
    """Give the SHA-256 of a module's weights at birth, and of what it and its compiled form compute once stirred."""
    digest = hashlib.sha256()
    for name, tensor in sorted(birth.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    x, h = example_inputs(spec.site, 2)
    with torch.no_grad():
        for form in pair:
            digest.update(form(x, h).contiguous().numpy().tobytes())
    return digest.digest()


def second_process() -> SecondProcess:
    """Give the process that `ask_second` asks; it must be first asked where there are no other threads."""
    return SecondProcess(_digest_anew)


def ask_second(second: SecondProcess, candidate: Candidate) -> None:
    """Have a second process build and load everything anew and compute the digest, while this one goes on."""
    form, spec = candidate.form, serialize(candidate.spec)
    second.ask(_REQUEST.pack(int(form.target), len(spec)) + spec + form.binary)


def processes_row(second: SecondProcess, candidate: Candidate) -> ValidationCheck:
    """Compute the digest here too, and hold it against what the second process answers; see `ask_second`."""
    wanted = output_digest(candidate.spec, candidate.pair, candidate.module)
    got = second.answer()
    passed = got == wanted
    if not passed:
        second.end()
    same = "a second process gave the same bits, built and compiled"
    detail = same if passed else f"a second process gave {got.hex() or 'nothing'}"
    return ValidationCheck(name="determinism_processes", passed=passed, detail=detail)


def _digest_anew(request: bytes) -> bytes:
    """Run in the second process."""
    target, size = _REQUEST.unpack_from(request)
    end = _REQUEST.size + size
    spec = parse(request[_REQUEST.size : end], CompileSpec)
    birth, twin = (to_module(spec.ir, spec.site, seed=spec.random_seed) for _ in range(2))
    return output_digest(spec, _stirred_pair(twin, spec, CompileTarget(target), request[end:]), birth)


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


def _memory(candidate: Candidate, limit_bytes: int) -> ValidationCheck:
    """Measure what the trainable form holds: its parameters, and what autograd keeps of one example."""
    eager, declared = candidate.pair[0], candidate.cost
    held = sum(value.numel() * value.element_size() for value in eager.parameters())
    kept = _kept_bytes(eager, candidate.spec)
    detail = (
        f"measured: {held} bytes of parameters and {kept} bytes of activations for one example; "
        f"declared: {declared.parameters * _FLOAT_BYTES} and {declared.activation_bytes}"
    )
    return ValidationCheck(
        name="memory",
        figure=float(held + kept),
        limit=float(limit_bytes),
        unit="bytes",
        passed=held + kept <= limit_bytes,
        detail=detail,
    )


def _kept_bytes(module: nn.Module, spec: CompileSpec) -> int:
    """Run one example and give the bytes of the distinct tensors that backward would need, without what was given."""
    x, h = (value.requires_grad_() for value in example_inputs(spec.site, 1))
    given = {value.untyped_storage().data_ptr() for value in (x, h, *module.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        delta = module(x, h)
    found = sum(storage.nbytes() for storage in kept.values())
    del delta
    return found


def failed_rows(rows: Sequence[ValidationCheck]) -> str:
    """Give the rows that did not pass, in words; empty when all did."""
    return "; ".join(f"{row.name}: {row.detail}" for row in rows if not row.passed)
