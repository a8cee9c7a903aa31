"""A finished kernel: the artefact that travels, and what is said of it in the names that callers know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost
from esper.contracts.kernel import (
    CompileFallback,
    CompileSpec,
    CompileTarget,
    KernelArtifact,
    KernelManifest,
    ValidationCheck,
)
from esper.execution.artifact import KernelContent, assemble, check_parts, sign
from esper.execution.keys import SigningKey
from esper.services.tezzeret.content_key import content_key, toolchain


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelMetadata:
    """What is said of a compiled kernel."""

    compilation_time: float
    """Wall time of compile, optimise and validate, in seconds."""
    validated: bool
    """Whether every check passed."""
    target: CompileTarget
    """Target that was reached."""
    target_device: str
    """``cpu``, ``cuda`` or ``mobile``."""
    optimization_applied: tuple[str, ...] = ()
    """Optimisations applied; empty for the trainable form."""
    device_neutral: bool = False
    """Whether the form was made without a device of the target's kind at hand, and so runs on any."""
    notes: tuple[str, ...] = ()
    """What was not done, and why, in words."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets given up before."""
    checks: tuple[ValidationCheck, ...] = ()
    """Validation rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """A kernel as the worker gives it."""

    spec: CompileSpec
    """What was asked for."""
    artifact: KernelArtifact
    """The kernel as it travels; without a signature when its maker holds no key."""
    metadata: KernelMetadata
    """What is said of it."""

    @property
    def binary_data(self) -> bytes:
        """Compiled bytes; empty for EAGER."""
        return self.artifact.binary

    @property
    def manifest(self) -> KernelManifest:
        """The manifest, checked against the parts."""
        return check_parts(self.artifact)

    @property
    def artifact_id(self) -> str:
        """Id of the kernel."""
        return self.manifest.artifact_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingredients:
    """What a kernel is packaged from."""

    spec: CompileSpec
    """What was asked for."""
    weights: Mapping[str, torch.Tensor]
    """``state_dict`` at birth."""
    binary: bytes
    """Compiled bytes."""
    cost: BlueprintCost
    """Exact cost."""
    metadata: KernelMetadata
    """What is said of it."""


def package(made: Ingredients, signer: SigningKey | None) -> CompiledKernel:
    """Give the finished kernel, signed where there is a key.

    Raises:
        CapacityExceededError: It is larger than an artefact may be.
    """
    metadata = made.metadata
    content = KernelContent(
        content_key=content_key(made.spec, optimized=bool(metadata.optimization_applied)),
        site=made.spec.site,
        target=metadata.target,
        device=made.spec.device,
        ir=canonical_bytes(made.spec.ir),
        weights=made.weights,
        binary=made.binary,
        cost=made.cost,
        checks=metadata.checks,
        compilation_time=timedelta(seconds=metadata.compilation_time),
        fallbacks=metadata.fallbacks,
        optimizations=metadata.optimization_applied,
        toolchain=toolchain(),
    )
    artifact = assemble(content)
    if signer is not None:
        artifact = sign(artifact, signer)
    return CompiledKernel(spec=made.spec, artifact=artifact, metadata=metadata)
