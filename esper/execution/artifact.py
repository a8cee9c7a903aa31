"""Kernels as signed bytes: packed and signed where they are made, verified wherever they are read.

    artefact      serialised ``KernelArtifact``: manifest, signature, key id, and the parts ir, weights, binary
    signature     Ed25519 over ``SIGNED_PREFIX`` + manifest; the manifest names size and SHA-256 of every part
    artifact id   ``k`` + first 32 hex digits of SHA-256 over the content key and the part digests

``verify`` looks at nothing but the envelope before the signature holds, and at no part before its digest holds. The one
form of an artefact is its deterministic serialisation: bytes that say the same in another way are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from esper.blueprints.ir import ir_from_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, Site
from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError
from esper.contracts.kernel import (
    CompileFallback,
    CompileTarget,
    DeviceKind,
    KernelArtifact,
    KernelManifest,
    PartDigest,
    ValidationCheck,
)
from esper.contracts.wire import parse, serialize
from esper.execution.envelope import Envelope, read_envelope
from esper.execution.keys import KeyRing, SigningKey

SIGNED_PREFIX: Final = b"esper-kernel-v1\n"
"""What a signature covers before the manifest, so that it can be taken for nothing else."""
MAX_ARTIFACT_BYTES: Final = 256 * 1024 * 1024
"""Largest artefact, in bytes."""
MAX_MANIFEST_BYTES: Final = 1024 * 1024
"""Largest manifest, in bytes."""
PART_NAMES: Final = ("binary", "ir", "weights")
"""Parts of a kernel, sorted as the manifest lists them."""
ARTIFACT_ID: Final = re.compile(r"k[0-9a-f]{32}")
"""Every artefact id matches this as a whole; nothing that does can be read as a path."""

_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_WEIGHT_DTYPES: Final = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelContent:
    """What goes into a kernel, before it has digests, an id and a signature."""

    content_key: str
    """SHA-256 of the compile request, 64 hex digits."""
    site: Site
    """Site it was compiled for."""
    target: CompileTarget
    """Target that was reached."""
    device: DeviceKind
    """Device it was optimised for."""
    ir: bytes
    """Canonical bytes of the IR (``esper.blueprints.canonical_bytes``)."""
    weights: Mapping[str, torch.Tensor]
    """``state_dict`` of the module at birth."""
    binary: bytes
    """Compiled bytes; empty for EAGER."""
    cost: BlueprintCost
    """Exact cost at the site."""
    checks: tuple[ValidationCheck, ...]
    """Validation rows."""
    compilation_time: timedelta
    """Wall time of compile, validate and package."""
    fallbacks: tuple[CompileFallback, ...] = ()
    """Targets given up before."""
    optimizations: tuple[str, ...] = ()
    """Optimisations applied."""
    toolchain: Mapping[str, str] = field(default_factory=dict)
    """Versions that made it."""
    created_at: datetime | None = None
    """When it was made; ``None`` means now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedKernel:
    """A kernel whose signature and digests held; shared between readers, so treat every value as read-only."""

    manifest: KernelManifest
    """Everything that is said of it."""
    ir: BlueprintIR
    """The graph, ready for ``esper.blueprints.to_module``."""
    ir_bytes: bytes
    """Its canonical bytes, whose SHA-256 is the manifest's blueprint id."""
    weights: Mapping[str, torch.Tensor]
    """``state_dict`` at birth, on the CPU; copy before changing."""
    binary: bytes
    """Compiled bytes; empty for EAGER."""
    size_bytes: int
    """Size of the artefact, in bytes."""

    @property
    def artifact_id(self) -> str:
        """Id of the kernel."""
        return self.manifest.artifact_id


def require_artifact_id(value: str, parameter: str = "artifact_id") -> str:
    """Give an artefact id back when it is well formed.

    Raises:
        InvalidInputError: It does not match ``k[0-9a-f]{32}``.
    """
    if not ARTIFACT_ID.fullmatch(value):
        raise InvalidInputError.of(parameter, "match k[0-9a-f]{32}", value)
    return value


def artifact_id_of(content_key: str, parts: tuple[PartDigest, ...]) -> str:
    """Give the id of a kernel from its content key and part digests."""
    digest = hashlib.sha256(f"esper-artifact-v1\n{content_key}\n".encode())
    for part in sorted(parts, key=lambda part: part.name):
        digest.update(f"{part.name} {part.size_bytes} {part.sha256.hex()}\n".encode())
    return f"k{digest.hexdigest()[:32]}"


def pack(content: KernelContent, key: SigningKey) -> KernelArtifact:
    """Give the signed kernel of some content.

    Raises:
        InvalidInputError: The content key or the weights are not legal.
        CapacityExceededError: The kernel would be larger than ``MAX_ARTIFACT_BYTES``.
    """
    return sign(assemble(content), key)


def assemble(content: KernelContent) -> KernelArtifact:
    """Give the kernel without a signature, for a process that holds no key; see `sign`.

    Raises:
        InvalidInputError: The content key or the weights are not legal.
        CapacityExceededError: The kernel would be larger than ``MAX_ARTIFACT_BYTES``.
    """
    if not _HEX_64.fullmatch(content.content_key):
        raise InvalidInputError.of("content_key", "be 64 lower-case hex digits", content.content_key)
    data = {"binary": content.binary, "ir": content.ir, "weights": dump_weights(content.weights)}
    parts = tuple(_digest(name, data[name]) for name in PART_NAMES)
    size_bytes = sum(part.size_bytes for part in parts)
    if size_bytes > MAX_ARTIFACT_BYTES:
        raise CapacityExceededError(f"artefact must be at most {MAX_ARTIFACT_BYTES} bytes, got {size_bytes} bytes")
    manifest = KernelManifest(
        artifact_id=artifact_id_of(content.content_key, parts),
        content_key=content.content_key,
        blueprint_id=hashlib.sha256(content.ir).hexdigest(),
        site=content.site,
        target=content.target,
        fallbacks=content.fallbacks,
        device=content.device,
        optimizations=content.optimizations,
        parts=parts,
        checks=content.checks,
        cost=content.cost,
        compilation_time=content.compilation_time,
        toolchain=dict(content.toolchain),
        created_at=content.created_at or datetime.now(UTC),
    )
    return KernelArtifact(manifest=serialize(manifest), signature=b"", key_id="", **data)


def sign(artifact: KernelArtifact, key: SigningKey) -> KernelArtifact:
    """Give the kernel with a signature, once its manifest and parts agree.

    Raises:
        CorruptDataError: Manifest and parts do not agree.
        CapacityExceededError: The kernel is larger than ``MAX_ARTIFACT_BYTES``.
    """
    check_parts(artifact)
    signed = replace(artifact, signature=key.sign(SIGNED_PREFIX + artifact.manifest), key_id=key.key_id)
    size_bytes = len(artifact_bytes(signed))
    if size_bytes > MAX_ARTIFACT_BYTES:
        raise CapacityExceededError(f"artefact must be at most {MAX_ARTIFACT_BYTES} bytes, got {size_bytes} bytes")
    return signed


def artifact_bytes(artifact: KernelArtifact) -> bytes:
    """Give the one serialised form of a kernel."""
    return serialize(artifact)


def read_artifact(data: bytes) -> KernelArtifact:
    """Give the envelope of serialised bytes, with nothing inside it parsed or proven.

    Raises:
        CapacityExceededError: The data is larger than ``MAX_ARTIFACT_BYTES``.
        CorruptDataError: The data is no artefact, or not in its one form.
    """
    read = view_artifact(data)
    return KernelArtifact(
        manifest=read.manifest,
        signature=read.signature,
        key_id=read.key_id,
        ir=read.ir,
        weights=bytes(read.weights),
        binary=bytes(read.binary),
    )


def view_artifact(data: bytes) -> Envelope:
    """Give what `read_artifact` gives with the large parts left where they lie, for who only proves them.

    Raises:
        CapacityExceededError: The data is larger than ``MAX_ARTIFACT_BYTES``.
        CorruptDataError: The data is no artefact, or not in its one form.
    """
    if len(data) > MAX_ARTIFACT_BYTES:
        raise CapacityExceededError(f"artefact must be at most {MAX_ARTIFACT_BYTES} bytes, got {len(data)} bytes")
    return read_envelope(data)


def check_parts(artifact: KernelArtifact | Envelope) -> KernelManifest:
    """Give the manifest once id, blueprint id, sizes and digests agree with the parts; says nothing of the signature.

    Raises:
        CorruptDataError: Something does not agree; the message names it.
    """
    if len(artifact.manifest) > MAX_MANIFEST_BYTES:
        raise CorruptDataError(f"manifest must be at most {MAX_MANIFEST_BYTES} bytes, got {len(artifact.manifest)}")
    try:
        manifest = parse(artifact.manifest, KernelManifest)
    except InvalidInputError as error:
        raise CorruptDataError(f"manifest is not legal: {error}") from error
    if tuple(part.name for part in manifest.parts) != PART_NAMES:
        raise CorruptDataError(f"manifest must list the parts {', '.join(PART_NAMES)}")
    for part in manifest.parts:
        if _digest(part.name, getattr(artifact, part.name)) != part:
            raise CorruptDataError(f"part {part.name} must match its digest in the manifest, it does not")
    if not ARTIFACT_ID.fullmatch(manifest.artifact_id) or not _HEX_64.fullmatch(manifest.content_key):
        raise CorruptDataError("manifest must hold a well-formed artefact id and content key, it does not")
    if manifest.artifact_id != artifact_id_of(manifest.content_key, manifest.parts):
        raise CorruptDataError("artefact id must follow from content key and parts, it does not")
    if manifest.blueprint_id != hashlib.sha256(artifact.ir).hexdigest():
        raise CorruptDataError("blueprint id must be the SHA-256 of the ir part, it is not")
    if (manifest.target is CompileTarget.EAGER) != (not artifact.binary):
        raise CorruptDataError("binary must be empty for EAGER and for nothing else")
    return manifest


def verify(data: bytes, ring: KeyRing, *, artifact_id: str | None = None) -> VerifiedKernel:
    """Give the kernel of serialised bytes, once all of it is proven.

    Args:
        data: Serialised ``KernelArtifact``.
        ring: Keys that are trusted.
        artifact_id: Kernel that is expected; ``None`` takes any.

    Raises:
        SignatureError: The signature is absent, made by an unknown key, or false.
        CorruptDataError: Anything else does not hold; nothing of the data was used.
        CapacityExceededError: The data is larger than ``MAX_ARTIFACT_BYTES``.
    """
    artifact = read_artifact(data)
    ring.verify(artifact.key_id, artifact.signature, SIGNED_PREFIX + artifact.manifest)
    manifest = check_parts(artifact)
    if artifact_id is not None and manifest.artifact_id != artifact_id:
        raise CorruptDataError(f"artefact must be {artifact_id}, got {manifest.artifact_id}")
    try:
        ir = ir_from_bytes(artifact.ir)
    except InvalidInputError as error:
        raise CorruptDataError(f"ir part is not legal: {error}") from error
    return VerifiedKernel(
        manifest=manifest,
        ir=ir,
        ir_bytes=artifact.ir,
        weights=load_weights(artifact.weights),
        binary=artifact.binary,
        size_bytes=len(data),
    )


def dump_weights(weights: Mapping[str, torch.Tensor]) -> bytes:
    """Give a ``state_dict`` in safetensors format; empty bytes for an empty one.

    Raises:
        InvalidInputError: A value is no dense tensor of a numeric kind that safetensors carries.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in _WEIGHT_DTYPES or tensor.layout is not torch.strided:
            raise InvalidInputError.of(f"weights[{name}]", "be a dense tensor of a numeric kind", tensor.dtype)
    if not weights:
        return b""
    plain = {name: weights[name].detach().cpu().contiguous().clone() for name in sorted(weights)}
    dumped: bytes = safetensors_torch.save(plain)
    return dumped


def load_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Give the ``state_dict`` of safetensors bytes.

    Raises:
        CorruptDataError: The bytes are not in that format.
    """
    if not data:
        return {}
    try:
        weights: dict[str, torch.Tensor] = safetensors_torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptDataError(f"weights part must be in safetensors format: {error}") from error
    if not all(tensor.dtype in _WEIGHT_DTYPES for tensor in weights.values()):
        raise CorruptDataError("weights part must hold numeric tensors alone, it does not")
    return weights


def _digest(name: str, data: bytes | memoryview) -> PartDigest:
    return PartDigest(name=name, sha256=hashlib.sha256(data).digest(), size_bytes=len(data))
