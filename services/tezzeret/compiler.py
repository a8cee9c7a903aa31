"""From a module to compiled bytes and back, one function pair per target.

    TORCHSCRIPT        ``torch.jit`` archive; trainable, any batch size
    EXPORTED_PROGRAM   ``torch.export`` archive with a dynamic batch; trainable
    AOT_INDUCTOR       AOTInductor package; inference only, for the machine kind it was made on
    EAGER              no bytes: the module is rebuilt from IR and weights

Loading compiled bytes may run code: bytes from elsewhere are for the sandbox, or for after their signature held and
``esper.execution.archives`` looked through them.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx, nn

from esper.contracts.blueprint import Site
from esper.contracts.errors import CompilationError
from esper.contracts.kernel import CompileFallback, CompileTarget
from esper.contracts.memory import raise_if_out_of_memory
from esper.services.tezzeret.config import CompilerConfig

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``delta(x, h)``."""

FALLBACKS: Final = {
    CompileTarget.TORCHSCRIPT: (CompileTarget.EXPORTED_PROGRAM, CompileTarget.EAGER),
    CompileTarget.EXPORTED_PROGRAM: (CompileTarget.TORCHSCRIPT, CompileTarget.EAGER),
    CompileTarget.AOT_INDUCTOR: (CompileTarget.EXPORTED_PROGRAM, CompileTarget.TORCHSCRIPT, CompileTarget.EAGER),
    CompileTarget.EAGER: (),
}
"""Targets tried after the wanted one, in order; EAGER cannot fail."""

MAX_BATCH: Final = 1 << 20
"""Largest batch that an exported program takes."""

_MAX_REASON_CHARS: Final = 500
_AOT_OPTIONS: Final = {"joint_graph_constant_folding": False, "always_keep_tensor_constants": True}
"""Every weight stays a weight that can be set: a kernel is born with maps of zeros, and folded into the program they
would leave one that gives 0 for ever."""
_NOT_SCRIPTED: Final = ["_graph"]
"""The graph that a graph module's code was made of: torch would try to compile its Python class, fail, and leave it
out, which takes longer than all the rest of scripting."""
_ORIGINS: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")
_quiet_lock = threading.RLock()


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledForm:
    """Compiled bytes, what they are, and what was tried before."""

    target: CompileTarget
    """Target that was reached."""
    binary: bytes
    """The bytes; empty for EAGER."""
    forward: Forward
    """The form, loaded back from its bytes (the module itself for EAGER)."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets given up before."""


def targets_of(target: CompileTarget) -> tuple[CompileTarget, ...]:
    """Give the target wanted and its fall-backs, in the order in which they are tried."""
    return (target, *FALLBACKS[target])


def compile_module(
    module: nn.Module, site: Site, targets: Sequence[CompileTarget], config: CompilerConfig
) -> CompiledForm:
    """Give the compiled form of a module for the first target that works; those given up before are recorded.

    Each form is loaded back from its own bytes and run once, so that bytes that cannot be used are found here.

    Raises:
        CompilationError: No target worked.
        CapacityExceededError: Memory ran out.
    """
    given_up: list[CompileFallback] = []
    for candidate in targets:
        try:
            binary, forward = _compile(module, site, candidate, config)
        except Exception as error:  # noqa: BLE001 - compilers raise what they like; each failure is recorded
            raise_if_out_of_memory(error)
            given_up.append(CompileFallback(target=candidate, reason=_reason(error)))
        else:
            return CompiledForm(target=candidate, binary=binary, forward=forward, fallbacks=tuple(given_up))
    raise CompilationError(f"no target worked: {'; '.join(fallback.reason for fallback in given_up)}")


def load_binary(binary: bytes, target: CompileTarget) -> nn.Module | Forward:
    """Give the callable form of compiled bytes; a module for the trainable targets.

    Raises:
        CompilationError: The target has no bytes.
    """
    if target is CompileTarget.TORCHSCRIPT:
        return load_torchscript(binary)
    if target is CompileTarget.EXPORTED_PROGRAM:
        with quiet():
            module: nn.Module = torch.export.load(io.BytesIO(binary)).module()
        return module
    if target is CompileTarget.AOT_INDUCTOR:
        return _load_aot(binary)
    raise CompilationError("EAGER has no compiled bytes to load")


def load_torchscript(binary: bytes) -> torch.jit.ScriptModule:
    """Give the module of a TorchScript archive, on the CPU."""
    with quiet():
        loaded: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(binary), map_location="cpu")  # type: ignore[no-untyped-call]
    return loaded


def save_torchscript(script: torch.jit.ScriptModule) -> bytes:
    """Give the archive of a scripted module."""
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(script, buffer)
    return buffer.getvalue()


def set_aot_weights(forward: Forward, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a loaded AOTInductor package other weights than those it was compiled with.

    Raises:
        CompilationError: The package has other constants than these.
    """
    loaded: Any = forward
    names = set(loaded.get_constant_fqns())
    if names != set(weights):
        raise CompilationError(f"package must hold the weights {sorted(weights)}, got {sorted(names)}")
    loaded.load_constants({name: value.detach() for name, value in weights.items()}, check_full_update=True)


def script_of(module: nn.Module) -> torch.jit.ScriptModule:
    """Give the scripted form of a module."""
    if isinstance(module, fx.GraphModule):
        own: Any = type(module)  # every graph module has a class to itself
        own.__jit_ignored_attributes__ = _NOT_SCRIPTED
    with quiet():
        scripted: torch.jit.ScriptModule = torch.jit.script(module)
    return scripted


def example_inputs(site: Site, batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Give random ``x`` and ``h`` of a site, the same for equal seeds; torch's own random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (site.input_shape, site.output_shape)
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in shapes]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's notices about its own compilers out of the log: TorchScript is chosen on purpose.

    Warning filters belong to the whole process, so threads take turns.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _compile(
    module: nn.Module, site: Site, target: CompileTarget, config: CompilerConfig
) -> tuple[bytes, nn.Module | Forward]:
    if target is CompileTarget.EAGER:
        return b"", module
    if target is CompileTarget.TORCHSCRIPT:
        binary = save_torchscript(script_of(module))
    elif target is CompileTarget.EXPORTED_PROGRAM:
        binary = _export(module, site)
    else:
        binary = _compile_aot(module, site, config)
    forward = load_binary(binary, target)
    x, h = example_inputs(site, 3)
    with torch.no_grad():
        shape = tuple(forward(x, h).shape)
    if shape != tuple(h.shape):
        raise CompilationError(f"{target.name} gave shape {shape} for {tuple(h.shape)}")
    return binary, forward


def _exported(module: nn.Module, site: Site) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    inputs = tuple(example_inputs(site, 2))
    with quiet():
        return torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}))


def _export(module: nn.Module, site: Site) -> bytes:
    buffer = io.BytesIO()
    program = _exported(module, site)
    _strip(program)
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def _strip(program: torch.export.ExportedProgram) -> None:
    """Leave out what is of no use to who loads it: this machine's paths and source lines, and the example inputs."""
    program._example_inputs = None
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                for name in _ORIGINS:
                    node.meta.pop(name, None)


def _compile_aot(module: nn.Module, site: Site, config: CompilerConfig) -> bytes:
    if not config.aot_inductor:
        raise CompilationError("AOTInductor is switched off: its C++ compilation takes tens of seconds on a CPU")
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise CompilationError("AOTInductor needs a C++ compiler, and this machine has none")
    with tempfile.TemporaryDirectory(prefix="esper-aot-") as directory, torch.no_grad(), quiet():
        path = Path(directory) / "kernel.pt2"
        torch._inductor.aoti_compile_and_package(
            _exported(module.eval(), site), package_path=str(path), inductor_configs=_AOT_OPTIONS
        )
        module.train()
        return path.read_bytes()


def _load_aot(binary: bytes) -> Forward:
    """Load a package; its library is mapped when this returns, so the files may go."""
    with tempfile.TemporaryDirectory(prefix="esper-aot-") as directory, quiet():
        path = Path(directory) / "kernel.pt2"
        path.write_bytes(binary)
        forward: Forward = torch._inductor.aoti_load_package(str(path))
    return forward


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_MAX_REASON_CHARS]
