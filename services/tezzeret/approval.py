"""What Tezzeret proves before it puts its name under what a worker made.

A worker runs compilers over what came from outside, so its word counts for nothing that can be looked up here, and
nothing that it made is run here:

    identity    content key, site, device, graph, cost and toolchain are those of the request
    weights     the service builds the module of the graph and the seed itself; name, shape, kind and value of every
                tensor are equal
    binary      of a target that the request may end at, and harmless (``esper.execution.archives``): no operator, no
                pickle and no record that a kernel does not need
    checks      every row that the target must have is there and passed, that of a second process among them unless
                the worker was a thread

What stays the worker's word are the figures in the rows, and that harmless bytes compute what the graph says. Neither
reaches training: a run builds the trainable form from graph and weights, and compiled bytes run only where somebody
asks for the inference form. An AOTInductor package is machine code and cannot be looked through: it is signed only
where the request named that target, and nothing of Esper's loads it.
"""

from __future__ import annotations

from typing import Final

import torch

from esper.blueprints.build import build_plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.ir import canonical_bytes
from esper.blueprints.plan import plan
from esper.contracts.errors import CompilationError, CorruptDataError, InvalidInputError
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, KernelArtifact, KernelManifest
from esper.execution.archives import inspect_binary
from esper.execution.artifact import artifact_bytes, check_parts, dump_weights, load_weights, sign
from esper.execution.keys import SigningKey
from esper.services.tezzeret.compiler import targets_of
from esper.services.tezzeret.content_key import content_key, toolchain
from esper.services.tezzeret.kernel_validator import required_rows

_WEIGHT_TOLERANCE: Final = 1e-5
"""Largest difference of a weight drawn here and there: an orthogonal one depends on the number of threads a little."""


def approve(
    artifact: KernelArtifact, spec: CompileSpec, signer: SigningKey, *, processes: bool
) -> tuple[KernelManifest, bytes]:
    """Sign a worker's kernel once it answers the request; give manifest and serialised artefact.

    Args:
        artifact: What the worker made.
        spec: What was asked for.
        signer: Key to sign with.
        processes: Whether the worker is a process, which must have held itself against a second one.

    Raises:
        CompilationError: The kernel is not what was asked for, could do harm, or has a check that failed.
    """
    layout = plan(spec.ir, spec.site)
    try:
        manifest = check_parts(artifact)
        _check_weights(artifact.weights, build_plan(layout, seed=spec.random_seed).state_dict())
        if manifest.target is not CompileTarget.AOT_INDUCTOR:
            inspect_binary(artifact.binary, manifest.target)
    except (CorruptDataError, InvalidInputError) as error:
        raise CompilationError(f"worker must give a sound kernel, got one that is not: {error}") from error
    wanted = {
        "content_key": content_key(spec),
        "site": spec.site,
        "device": spec.device,
        "cost": plan_cost(layout),
        "toolchain": toolchain(),
    }
    wrong = [name for name, value in wanted.items() if getattr(manifest, name) != value]
    if artifact.ir != canonical_bytes(spec.ir):
        wrong.append("ir")
    if manifest.target not in _targets(spec):
        wrong.append("target")
    rows = {row.name for row in manifest.checks}
    missing = required_rows(manifest.target, spec.device, processes=processes) - rows
    if missing or not manifest.validated:
        wrong.append(f"checks ({', '.join(sorted(missing)) or 'one failed'})")
    if wrong:
        raise CompilationError(f"worker must give the kernel that was asked for, it differs in {', '.join(wrong)}")
    return manifest, artifact_bytes(sign(artifact, signer))


def _targets(spec: CompileSpec) -> tuple[CompileTarget, ...]:
    """Give the targets at which the request may end; a form made for another device is TorchScript."""
    return targets_of(spec.target) if spec.device is DeviceKind.CPU else (CompileTarget.TORCHSCRIPT,)


def _check_weights(data: bytes, wanted: dict[str, torch.Tensor]) -> None:
    """Hold the weights part against the weights that graph and seed give.

    Raises:
        CorruptDataError: A tensor is missing, too many, or differs; the message names it.
    """
    if data == dump_weights(wanted):
        return
    found = load_weights(data)
    if dump_weights(found) != data:
        raise CorruptDataError("weights part must be in its one form, got bytes that say the same in another way")
    for name in sorted(wanted.keys() | found.keys()):
        mine, given = wanted.get(name), found.get(name)
        if mine is None or given is None or (mine.shape, mine.dtype) != (given.shape, given.dtype):
            raise CorruptDataError(f"weight '{name}' must be {_shown(mine)}, got {_shown(given)}", parameter="weights")
        if not torch.allclose(mine, given, rtol=0.0, atol=_WEIGHT_TOLERANCE):
            raise CorruptDataError(f"weight '{name}' must be what graph and seed give, it is not", parameter="weights")


def _shown(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
