"""Inference forms of a kernel, each held against the eager module within a stated tolerance.

    cpu      weights frozen into the graph, constants folded, ``optimize_for_inference`` where its result can be saved
    cuda     convolution weights channels-last, graph inlined, weights frozen without numeric rewriting; that form runs
             on any device, and without a CUDA device at hand it is all that can be made, which the metadata says
    mobile   linear maps and convolutions with int8 weights (see ``int8``)

Whatever a kernel was compiled to, its optimised form is TorchScript. Training goes on with IR and weights, which stay.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from esper.blueprints.build import to_module
from esper.contracts.errors import CompilationError, InvalidInputError
from esper.contracts.kernel import CompileTarget, DeviceKind, ValidationCheck
from esper.execution.artifact import load_weights
from esper.execution.keys import SigningKey
from esper.services.tezzeret import int8
from esper.services.tezzeret.compiler import (
    CompiledForm,
    Forward,
    load_torchscript,
    quiet,
    save_torchscript,
    script_of,
)
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.kernel_validator import Candidate, equality_row, failed_rows, latency_row, stir
from esper.services.tezzeret.packaging import CompiledKernel, Ingredients, package

NO_CUDA: Final = "no CUDA device on this machine: device-neutral form, neither tuned nor timed on CUDA"
"""Note of a kernel optimised for CUDA without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Optimized:
    """Bytes of an inference form and how it was made."""

    binary: bytes
    applied: tuple[str, ...]
    notes: tuple[str, ...] = ()


class KernelOptimizer:
    """Makes inference forms; holds no state, so it may be shared."""

    def __init__(self, config: CompilerConfig | None = None, signer: SigningKey | None = None) -> None:
        self._config = config or CompilerConfig()
        self._signer = signer

    def optimize(self, kernel: CompiledKernel, device: DeviceKind | str = DeviceKind.CPU) -> CompiledKernel:
        """Give the inference form of a kernel for a device: ``cpu``, ``cuda`` or ``mobile``.

        Raises:
            InvalidInputError: The device is none of these.
            CompilationError: The form differs from the eager module by more than its limit.
        """
        begun = time.perf_counter()
        kind = _device_kind(device)
        spec = replace(kernel.spec, device=kind)
        module = to_module(spec.ir, spec.site, seed=spec.random_seed)
        module.load_state_dict(load_weights(kernel.artifact.weights))
        made = _RECIPES[kind](module.eval())
        rows = self._check(kernel, kind, made)
        failed = failed_rows(rows)
        if failed:
            raise CompilationError(f"optimised form for {kind.name.lower()} must equal the module, failed {failed}")
        metadata = replace(
            kernel.metadata,
            compilation_time=kernel.metadata.compilation_time + time.perf_counter() - begun,
            target=CompileTarget.TORCHSCRIPT,
            target_device=kind.name.lower(),
            optimization_applied=made.applied,
            device_neutral=kind is DeviceKind.CUDA and not torch.cuda.is_available(),
            notes=made.notes,
            checks=(*kernel.metadata.checks, *rows),
        )
        ingredients = Ingredients(
            spec=spec,
            weights=load_weights(kernel.artifact.weights),
            binary=made.binary,
            cost=kernel.manifest.cost,
            metadata=metadata,
        )
        return package(ingredients, self._signer)

    def _check(self, kernel: CompiledKernel, kind: DeviceKind, made: _Optimized) -> list[ValidationCheck]:
        """Hold a twin with weights away from birth against its module, and time the form itself."""
        spec, config = kernel.spec, self._config
        is_int8 = int8.LINEAR in made.applied or int8.CONVOLUTION in made.applied
        limit = config.int8_equality_limit if is_int8 else config.inference_equality_limit
        eager = stir(to_module(spec.ir, spec.site, seed=spec.random_seed), spec.random_seed + 1).eval()
        twin = to_module(spec.ir, spec.site, seed=spec.random_seed)
        twin.load_state_dict(eager.state_dict())
        binary = _RECIPES[kind](twin.eval()).binary
        note = "; ".join(made.notes)
        rows = [equality_row("optimized_equality", eager, load_torchscript(binary), spec, limit, note=note)]
        if kind is DeviceKind.CUDA and torch.cuda.is_available():
            rows.append(equality_row("optimized_equality_cuda", eager, _on_cuda(binary), spec, limit))
        form = CompiledForm(target=CompileTarget.TORCHSCRIPT, binary=made.binary, forward=load_torchscript(made.binary))
        candidate = Candidate(spec=spec, module=eager, form=form, cost=kernel.manifest.cost)
        rows.append(replace(latency_row(candidate, config.max_latency_ms), name="optimized_latency"))
        return rows


def _device_kind(device: DeviceKind | str) -> DeviceKind:
    if isinstance(device, DeviceKind):
        return device
    found = next((kind for kind in DeviceKind if kind.name.lower() == device), None)
    if found is None:
        raise InvalidInputError.of("device", "be cpu, cuda or mobile", device)
    return found


def _frozen(module: nn.Module, *, numerics: bool) -> torch.jit.ScriptModule:
    with quiet():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(script_of(module), optimize_numerics=numerics)
    return frozen


def _for_cpu(module: nn.Module) -> _Optimized:
    frozen = _frozen(module, numerics=True)
    plain = save_torchscript(frozen)
    try:
        with quiet():
            tuned = save_torchscript(torch.jit.optimize_for_inference(frozen))
        load_torchscript(tuned)
    except RuntimeError as error:
        # oneDNN's packed constants have no saved form: that step must then be left to whoever loads the kernel.
        reason = " ".join(str(error).split())[:200]
        return _Optimized(
            binary=plain, applied=("freeze",), notes=(f"optimize_for_inference does not survive saving: {reason}",)
        )
    return _Optimized(binary=tuned, applied=("freeze", "optimize_for_inference"))


def _for_cuda(module: nn.Module) -> _Optimized:
    applied = ["freeze"]
    if any(parameter.dim() == 4 for parameter in module.parameters()):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        applied.insert(0, "channels_last")
    notes = () if torch.cuda.is_available() else (NO_CUDA,)
    return _Optimized(binary=save_torchscript(_frozen(module, numerics=False)), applied=tuple(applied), notes=notes)


def _for_mobile(module: nn.Module) -> _Optimized:
    quantized, done = int8.quantize(module)
    frozen = save_torchscript(_frozen(quantized, numerics=not done))
    notes = () if done else ("no map to quantise: float32 kept",)
    return _Optimized(binary=frozen, applied=(*done, "freeze"), notes=notes)


def _on_cuda(binary: bytes) -> Forward:
    """Give the form on the CUDA device, taking and giving CPU tensors."""
    with quiet():
        loaded = torch.jit.load(io.BytesIO(binary), map_location="cuda")  # type: ignore[no-untyped-call]

    def forward(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        delta: torch.Tensor = loaded(x.cuda(), h.cuda()).cpu()
        return delta

    return forward


_RECIPES: Final[dict[DeviceKind, Callable[[nn.Module], _Optimized]]] = {
    DeviceKind.CPU: _for_cpu,
    DeviceKind.CUDA: _for_cuda,
    DeviceKind.MOBILE: _for_mobile,
}
