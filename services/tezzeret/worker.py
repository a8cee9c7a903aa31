"""One compile from blueprint to kernel: build, compile, validate, optimise, package. Blocking; no network, no queue."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

from esper.blueprints.build import build_plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.plan import plan
from esper.contracts.blueprint import Blueprint, BlueprintCost, Site
from esper.contracts.errors import CapacityExceededError, CompilationError
from esper.contracts.kernel import (
    CompileFallback,
    CompileSpec,
    CompileTarget,
    DeviceKind,
    JobPhase,
    ValidationCheck,
)
from esper.execution.keys import SigningKey
from esper.services.tezzeret.compiler import CompiledForm, compile_module, targets_of
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.default_sites import default_site
from esper.services.tezzeret.kernel_optimizer import KernelOptimizer
from esper.services.tezzeret.kernel_validator import (
    Candidate,
    ask_second,
    compiled_rows,
    contract_rows,
    failed_rows,
    figure_rows,
    processes_row,
    second_process,
)
from esper.services.tezzeret.packaging import CompiledKernel, Ingredients, KernelMetadata, package
from esper.services.tezzeret.warm_up import warm_up

__all__ = ["CompiledKernel", "KernelMetadata", "OnPhase", "TezzeretWorker"]

OnPhase = Callable[[JobPhase], None]
"""Told of each phase as it begins."""


class TezzeretWorker:
    """Compiles blueprints in this process.

    Thread-safe, as nothing is shared between compiles, unless it checks a second process too: then for one thread, the
    one of the caller that lives longest, since the second process ends with the thread that started it.
    """

    def __init__(
        self, config: CompilerConfig | None = None, signer: SigningKey | None = None, *, warm: bool = True
    ) -> None:
        """Prepare a worker.

        Args:
            config: Limits and options.
            signer: Key to sign with; ``None`` gives kernels without a signature, for another to sign.
            warm: Whether the first worker of a process compiles a template now, which takes seconds, once, so that
                no compile is charged for it.
        """
        if warm:
            warm_up(CompileTarget.TORCHSCRIPT)
        self._config = config or CompilerConfig()
        self._signer = signer
        self._second = second_process() if self._config.check_processes else None

    def close(self) -> None:
        """End the second process, if there is one; the next compile would start another. Idempotent."""
        if self._second is not None:
            self._second.end()

    def compile_blueprint(
        self,
        blueprint: Blueprint,
        *,
        site: Site | None = None,
        target: CompileTarget = CompileTarget.TORCHSCRIPT,
        device: DeviceKind = DeviceKind.CPU,
        random_seed: int = 0,
    ) -> CompiledKernel:
        """Compile a blueprint for a site; without one, for the first of ``DEFAULT_SITES`` that it is meant for.

        Raises:
            InvalidBlueprintError: The blueprint is not legal at the site.
            CapacityExceededError: It has more parameters than a kernel may.
            CompilationError: A check failed; the message names it.
        """
        chosen = default_site(blueprint) if site is None else site
        spec = CompileSpec(ir=blueprint.ir, site=chosen, target=target, device=device, random_seed=random_seed)
        return self.compile_spec(spec)

    def compile_spec(self, spec: CompileSpec, on_phase: OnPhase = lambda _: None) -> CompiledKernel:
        """Compile what a job asks for; for another device than the CPU, the form optimised for inference there.

        Raises:
            InvalidBlueprintError: The blueprint is not legal at the site.
            InvalidInputError: The seed is negative.
            CapacityExceededError: It has more parameters than a kernel may.
            CompilationError: A check failed; the message names it.
        """
        begun = time.perf_counter()
        on_phase(JobPhase.COMPILING)
        layout = plan(spec.ir, spec.site)
        cost = plan_cost(layout)
        if cost.parameters > self._config.max_parameters:
            raise CapacityExceededError(
                f"kernel must have at most {self._config.max_parameters} parameters, got {cost.parameters}"
            )
        module = build_plan(layout, seed=spec.random_seed)
        candidate, compiled, fallbacks = self._compile(spec, module, cost, on_phase)
        form = candidate.form
        rows = self._rows(candidate, compiled)
        failed = failed_rows(rows)
        if failed:
            raise CompilationError(f"kernel must pass every check, failed {failed}")
        on_phase(JobPhase.PACKAGING)
        metadata = KernelMetadata(
            compilation_time=time.perf_counter() - begun,
            validated=True,
            target=form.target,
            target_device=DeviceKind.CPU.name.lower(),
            fallbacks=fallbacks,
            checks=rows,
        )
        return self._finish(spec, module, form, cost, metadata)

    def _rows(self, candidate: Candidate, compiled: list[ValidationCheck]) -> tuple[ValidationCheck, ...]:
        """Give all rows of a form from those about the compiled form alone; a second process works meanwhile."""
        second, spec = self._second, candidate.spec
        if second is not None:
            ask_second(second, candidate)
        rows = [*contract_rows(spec), *compiled]
        if second is not None:
            rows.append(processes_row(second, candidate))
        return (*rows, *figure_rows(candidate, self._config))  # last: latency is taken while the second process rests

    def _compile(
        self, spec: CompileSpec, module: nn.Module, cost: BlueprintCost, on_phase: OnPhase
    ) -> tuple[Candidate, list[ValidationCheck], tuple[CompileFallback, ...]]:
        """Give the first form that works and passes; one that compiles and then differs is given up like the rest."""
        targets = targets_of(spec.target)
        given_up: list[CompileFallback] = []
        while True:
            form = compile_module(module, spec.site, targets, self._config)
            given_up += form.fallbacks
            on_phase(JobPhase.VALIDATING)
            candidate = Candidate(spec=spec, module=module, form=form, cost=cost)
            rows = compiled_rows(candidate, self._config)
            failed = failed_rows(rows)
            if not failed or form.target is CompileTarget.EAGER:
                return candidate, rows, tuple(given_up)
            given_up.append(CompileFallback(target=form.target, reason=failed[:500]))
            targets = targets[targets.index(form.target) + 1 :]

    def _finish(
        self, spec: CompileSpec, module: nn.Module, form: CompiledForm, cost: BlueprintCost, metadata: KernelMetadata
    ) -> CompiledKernel:
        trainable = spec.device is DeviceKind.CPU
        made = Ingredients(spec=spec, weights=module.state_dict(), binary=form.binary, cost=cost, metadata=metadata)
        kernel = package(made, self._signer if trainable else None)
        if trainable:
            return kernel
        return KernelOptimizer(self._config, self._signer).optimize(kernel, spec.device)
