"""The form in which the first cache tier keeps kernels: bytes, proven again and unpacked afresh for each caller.

Tensors that callers share can be changed under the cache by any of them; bytes cannot. A hit costs one digest and one
copy: 0.4 ms for a kernel of 50 KB, 1 ms for each MB beyond, once for each germination and never in a training step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from esper.blueprints.ir import ir_from_bytes
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.kernel import KernelArtifact, KernelManifest
from esper.contracts.wire import parse
from esper.execution.artifact import VerifiedKernel, load_weights, verify
from esper.execution.keys import KeyRing


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldKernel:
    """A kernel that was proven, as immutable bytes. Thread-safe."""

    manifest: KernelManifest
    """What the signature covers; its digests are what the parts are held against."""
    ir: bytes
    """Canonical bytes of the graph."""
    weights: bytes
    """Weights in safetensors format."""
    binary: bytes
    """Compiled bytes; empty for EAGER."""
    size_bytes: int
    """Size of the artefact, in bytes."""

    @classmethod
    def proven(cls, data: bytes, ring: KeyRing, *, artifact_id: str | None = None) -> HeldKernel:
        """Hold the kernel of serialised bytes, once all of it is proven; blocks for about 4 ms for each MB.

        Raises:
            CorruptDataError: As ``esper.execution.artifact.verify``.
            CapacityExceededError: As there.
        """
        kernel = verify(data, ring, artifact_id=artifact_id)
        parts = parse(data, KernelArtifact)
        return cls(
            manifest=kernel.manifest,
            ir=parts.ir,
            weights=parts.weights,
            binary=parts.binary,
            size_bytes=kernel.size_bytes,
        )

    def take(self) -> VerifiedKernel:
        """Give the kernel with a graph and weights of the caller's own.

        Raises:
            CorruptDataError: The bytes have changed since they were proven.
        """
        for part in self.manifest.parts:
            if hashlib.sha256(getattr(self, part.name)).digest() != part.sha256:
                raise CorruptDataError(
                    f"part {part.name} of {self.manifest.artifact_id} must be what was proven, it has changed in memory"
                )
        try:
            ir = ir_from_bytes(self.ir)
        except InvalidInputError as error:
            raise CorruptDataError(f"ir part of {self.manifest.artifact_id} is not legal: {error}") from error
        return VerifiedKernel(
            manifest=self.manifest,
            ir=ir,
            ir_bytes=self.ir,
            weights=load_weights(self.weights),
            binary=self.binary,
            size_bytes=self.size_bytes,
        )
