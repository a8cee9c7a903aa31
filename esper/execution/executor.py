"""From a verified kernel to a module that can be trained at a layer: build, place, check, run once."""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper.blueprints import to_module
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import CorruptDataError, InvalidInputError, KernelExecutionError, ShapeMismatchError
from esper.contracts.kernel import CompileTarget
from esper.execution.archives import inspect_binary
from esper.execution.artifact import VerifiedKernel
from esper.execution.bounded_form import BoundedForm
from esper.execution.circuit_breaker import fault_of

_BATCH_SIZES: Final = (2, 3)
_TIMED_RUNS: Final = 3
_MAX_PASSED: Final = 1024
_passed: Final[set[tuple[Hashable, Site, torch.dtype]]] = set()
"""Structures that have passed at a site; at most ``_MAX_PASSED``, then it starts anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a kernel is to run: the layer's own device and dtype."""

    device: torch.device
    """Device of the layer."""
    dtype: torch.dtype
    """Floating type of the layer's parameters."""


def build_kernel(ir: BlueprintIR, site: Site, placement: Placement, *, random_seed: int = 0) -> nn.Module:
    """Give a fresh trainable module of a blueprint at a site, as initialised by its random seed.

    Raises:
        InvalidBlueprintError: The graph is not legal at the site.
    """
    return to_module(ir, site, seed=random_seed).to(placement.device, placement.dtype)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a kernel's weights into its module.

    Floating weights take the width of the module's; a whole number never becomes a weight, nor a weight one.

    Raises:
        ShapeMismatchError: A name or a shape differs from the module's.
        InvalidInputError: A value is of another kind of number than the module's.
    """
    require_fit_of(module, weights)
    module.load_state_dict(dict(weights), strict=True)


def require_fit_of(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are those of a module in name, shape and kind of number, and leave the module as it is.

    Raises:
        As :func:`load_weights`.
    """
    _require_kinds(module, weights)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = differing[0]
        raise ShapeMismatchError(
            f"weights must fit the module at this site, got {len(differing)} that differ: "
            f"{name!r} must be {expected.get(name, 'absent')}, got {found.get(name, 'nothing')}",
            parameter="weights",
        )


def _require_kinds(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        given = weights.get(name)
        if given is None or given.dtype == value.dtype:
            continue
        if not (given.is_floating_point() and value.is_floating_point()):
            raise InvalidInputError(
                f"weights must be of the module's kind of number, {name!r} must be {value.dtype}, got {given.dtype}",
                parameter="weights",
            )


def check_shapes(module: nn.Module, site: Site, placement: Placement, *, structure: Hashable | None = None) -> None:
    """Run the module on meta tensors of the layer's real shapes: costs no memory and no arithmetic.

    Args:
        module: What is to stand at the layer.
        site: The layer's real shapes.
        placement: The layer's device and dtype.
        structure: What the module's shapes follow from, where something does (a blueprint): modules of a structure
            that has passed at this site and dtype are not run again. What has failed is never remembered.

    Raises:
        ShapeMismatchError: The delta has another shape than the layer's output, or the module does not run.
        InvalidInputError: The delta is of another dtype than the layer's.
    """
    key = (structure, site, placement.dtype)
    if key in _passed:
        return
    _run_on_meta(module, site, placement)
    if structure is not None:
        if len(_passed) >= _MAX_PASSED:
            _passed.clear()
        _passed.add(key)


def forget_passed() -> None:
    """Check every structure anew from now on."""
    _passed.clear()


def _run_on_meta(module: nn.Module, site: Site, placement: Placement) -> None:
    state = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
    on_meta = Placement(device=torch.device("meta"), dtype=placement.dtype)
    _require_fit(lambda x, h: functional_call(module, state, (x, h)), site, on_meta)


def _require_fit(forward: Callable[[Tensor, Tensor], object], site: Site, placement: Placement) -> None:
    """Run ``delta(x, h)`` on zeros of several batch sizes, and hold what it gives against the layer's output."""
    for batch in _BATCH_SIZES:
        x = torch.zeros((batch, *site.input_shape), device=placement.device, dtype=placement.dtype)
        h = torch.zeros((batch, *site.output_shape), device=placement.device, dtype=placement.dtype)
        try:
            with torch.no_grad():
                delta = forward(x, h)
        except CorruptDataError:
            raise
        except Exception as error:
            raise ShapeMismatchError(
                f"kernel must run at input {site.input_shape}, output {site.output_shape} and {placement.dtype}, "
                f"got {_last_line(error)}",
                parameter="kernel",
            ) from error
        if not isinstance(delta, Tensor) or delta.shape != h.shape:
            shown = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
            raise ShapeMismatchError(
                f"kernel must give a delta of shape {tuple(h.shape)}, got {shown}", parameter="kernel"
            )
        if delta.dtype != h.dtype:
            raise InvalidInputError(
                f"kernel must give a delta of the layer's {h.dtype}, got {delta.dtype}", parameter="kernel"
            )


def _last_line(error: Exception) -> str:
    """Give what an error comes to; TorchScript puts a listing of the code before it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def first_run(module: nn.Module, site: Site, placement: Placement, *, batch_size: int) -> float:
    """Run the module on fixed noise of the layer's shapes, without gradients; gives its median latency in ms.

    The random streams and the module's buffers are left as they were. Waits for the device.

    Raises:
        KernelExecutionError: It raised, or its delta is not finite.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn((batch_size, *shape), generator=generator).to(placement.device, placement.dtype)

    x, h = noise(site.input_shape), noise(site.output_shape)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()
            delta = module(x, h)
            fault = fault_of(delta, h)
            # Waits, so that the clock starts on an idle device.
            is_finite = fault is None and bool(torch.isfinite(delta.to(h.dtype)).all())
            elapsed_ms = statistics.median(_timed_ms(module, x, h) for _ in range(_TIMED_RUNS))
    except Exception as error:
        raise KernelExecutionError(f"kernel must run on finite inputs, got {type(error).__name__}: {error}") from error
    finally:
        module.train(was_training)
    if fault is not None:
        raise KernelExecutionError(f"kernel must give a delta that can be added, got {fault.kind}: {fault.detail}")
    if not is_finite:
        raise KernelExecutionError("kernel must give a finite delta on finite inputs, got NaN or infinity")
    return elapsed_ms


def _timed_ms(module: nn.Module, x: Tensor, h: Tensor) -> float:
    start_ns = time.perf_counter_ns()
    module(x, h).sum().item()
    return (time.perf_counter_ns() - start_ns) / 1e6


class KernelExecutor:
    """Turns kernels into modules that stand at a layer."""

    def prepare(
        self, kernel: VerifiedKernel, site: Site, placement: Placement, *, random_seed: int | None = None
    ) -> nn.Module:
        """Rebuild the trainable form of a kernel from its graph and weights, and check it at the layer's shapes.

        With a ``random_seed`` the first weights are drawn anew from it, as ``to_module(ir, site, seed=random_seed)``
        draws them: runs share a kernel and not its draw. The kernel's own must fit all the same.

        Raises:
            InvalidBlueprintError: The graph is not legal at the site.
            ShapeMismatchError: The weights or the delta do not fit the layer.
            InvalidInputError: The weights or the delta are of another kind of number than the layer's.
        """
        if random_seed is None:
            module = build_kernel(kernel.ir, site, placement)
            load_weights(module, kernel.weights)
        else:
            module = build_kernel(kernel.ir, site, placement, random_seed=random_seed)
            require_fit_of(module, kernel.weights)
        check_shapes(module, site, placement, structure=kernel.manifest.blueprint_id)
        return module

    def inference_form(self, kernel: VerifiedKernel, site: Site, placement: Placement) -> nn.Module:
        """Give the compiled form of a kernel, for running without gradients; the eager form where it has no binary.

        The bytes are read from memory, and only here, after ``verify`` has held signature and digests against them and
        ``inspect_binary`` has found nothing in them but arithmetic: a signature says who made a kernel, not what it
        does. Then the form is run once at the layer's shapes. It runs where it takes little more memory than its graph
        has use for (:class:`BoundedForm`), there and later. What was frozen into it keeps the dtype it was compiled in.

        Raises:
            InvalidInputError: The target has no form that is read from memory (AOT_INDUCTOR is a shared library), or
                the delta is of another dtype than the layer's.
            CorruptDataError: The bytes are not what the manifest says, hold what a kernel does not need, or would take
                more memory than one needs.
            ShapeMismatchError: The form does not run at the layer's shapes and dtype, or its delta has another shape.
            InvalidBlueprintError: As :meth:`prepare`, for the eager form.
        """
        target = kernel.manifest.target
        if target is CompileTarget.EAGER:
            return self.prepare(kernel, site, placement).eval()
        if target is CompileTarget.AOT_INDUCTOR:
            raise InvalidInputError.of("kernel", "be TORCHSCRIPT, EXPORTED_PROGRAM or EAGER", target.name)
        inspect_binary(kernel.binary, target)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch says so of TorchScript at every load
                form = _read_binary(kernel.binary, target, placement)
                twin = _read_binary(kernel.binary, target, replace(placement, device=torch.device("cpu")))
        except Exception as error:
            raise CorruptDataError(
                f"binary of {kernel.artifact_id} must be a {target.name} archive: {error}"
            ) from error
        bounded = BoundedForm(form, twin, build_kernel(kernel.ir, site, placement).eval())
        _require_fit(bounded, site, placement)
        return bounded


def _read_binary(binary: bytes, target: CompileTarget, placement: Placement) -> nn.Module:
    if target is CompileTarget.TORCHSCRIPT:
        script: nn.Module = torch.jit.load(io.BytesIO(binary), map_location=placement.device)  # type: ignore[no-untyped-call]
        return script.to(placement.dtype).eval()
    return torch.export.load(io.BytesIO(binary)).module().to(placement.device, placement.dtype)
