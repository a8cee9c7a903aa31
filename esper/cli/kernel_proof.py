"""Proving a kernel step by step, with each step told; ``esper.execution.artifact`` has the last word."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from esper.cli.kernel_tables import CHECK_COLUMNS, check_rows
from esper.contracts.errors import (
    CapacityExceededError,
    CompilationError,
    ConfigError,
    CorruptDataError,
    EsperError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from esper.contracts.kernel import KernelArtifact, KernelManifest, ValidationCheck
from esper.contracts.wire import parse
from esper.execution.artifact import MAX_ARTIFACT_BYTES, PART_NAMES, SIGNED_PREFIX, read_artifact
from esper.execution.artifact import verify as verify_artifact
from esper.execution.keys import KeyRing

_MAX_KEY_BYTES = 64 * 1024


@dataclass(kw_only=True, slots=True)
class Proof:
    """What was looked at, and how it came out."""

    artifact_id: str = ""
    """Kernel that the manifest names; empty where the signature does not hold, for then it says nothing."""
    steps: list[tuple[str, bool, str]] = field(default_factory=list)
    """Steps in order: name, whether it holds, what was seen. Nothing is looked at after one that does not."""
    checks: tuple[ValidationCheck, ...] = ()
    """Validation rows of the manifest; none where the signature does not hold."""
    error: EsperError | None = None
    """What does not hold; ``None`` when everything does."""

    def to_plain(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "artifact_id": self.artifact_id,
            "verified": self.error is None,
            "error": None if self.error is None else {"reason": self.error.reason, "message": str(self.error)},
            "steps": [dict(zip(("step", "holds", "detail"), step, strict=True)) for step in self.steps],
            "checks": [dict(zip(CHECK_COLUMNS, row, strict=True)) for row in check_rows(self.checks)],
        }


def prove(data: bytes, ring: KeyRing, *, artifact_id: str | None = None) -> Proof:
    """Look at a serialised kernel: form, signature, digests, contents, validation.

    Args:
        data: Serialised ``KernelArtifact``.
        ring: Keys that are trusted.
        artifact_id: Kernel that is expected; ``None`` takes any.
    """
    proof = Proof()
    step = "form"
    try:
        artifact = read_artifact(data)
        proof.steps.append((step, True, f"{len(data)} bytes in the one serialised form"))
        step = "signature"
        ring.verify(artifact.key_id, artifact.signature, SIGNED_PREFIX + artifact.manifest)
        proof.steps.append((step, True, f"Ed25519, by trusted key {artifact.key_id}"))
        step = "manifest"
        manifest = parse(artifact.manifest, KernelManifest)
        proof.artifact_id, proof.checks = manifest.artifact_id, manifest.checks
        proof.steps.append((step, True, f"of kernel {manifest.artifact_id}"))
        for part in manifest.parts:
            step = f"digest of {part.name}"
            proof.steps.append((step, True, _digest_of(artifact, part.name, part.sha256)))
        step = "contents"
        verify_artifact(data, ring, artifact_id=artifact_id)
        proof.steps.append((step, True, "ids, sizes, graph and weights are what the manifest says"))
        step = "validation"
        proof.steps.append((step, True, _validation(manifest)))
    except (CorruptDataError, CapacityExceededError, CompilationError, InvalidInputError) as error:
        proof.steps.append((step, False, str(error)))
        proof.error = error if not isinstance(error, InvalidInputError) else CorruptDataError(str(error))
    return proof


def read_file(path: Path) -> bytes:
    """Give the bytes of a file that may be a kernel.

    Raises:
        UnavailableError: It cannot be read.
        CapacityExceededError: It is larger than a kernel may be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ARTIFACT_BYTES + 1)
    except OSError as error:
        raise UnavailableError(f"file must be readable, got {path}: {error.strerror}", parameter="kernel") from error
    if len(data) > MAX_ARTIFACT_BYTES:
        raise CapacityExceededError(f"file must be at most {MAX_ARTIFACT_BYTES} bytes, got more", parameter="kernel")
    return data


def trusted_keys(paths: Sequence[Path]) -> KeyRing:
    """Give the ring of the keys at all paths: directories of ``*.pub``, PEM files, or JSON of ``KeyRing.to_json``.

    Raises:
        NotFoundError: There is nothing at a path.
        ConfigError: What is there is no Ed25519 public key.
        UnavailableError: It cannot be read.
    """
    ring = KeyRing()
    for path in paths:
        ring = ring.merged(_keys_at(path))
    return ring


def _keys_at(path: Path) -> KeyRing:
    if path.is_dir():
        return KeyRing.from_dir(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_BYTES)
    except FileNotFoundError as error:
        message = f"trusted keys must be at {path} (--key names another place), got nothing there"
        raise NotFoundError(message, parameter="key") from error
    except OSError as error:
        raise UnavailableError(f"key must be readable, got {path}: {error.strerror}", parameter="key") from error
    if data.lstrip().startswith(b"{"):
        return KeyRing.from_json(data.decode(errors="replace"))
    try:
        public = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"key must be a public key in PEM, got {path}, which is none", parameter="key") from error
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError(f"key must be Ed25519, got {type(public).__name__} at {path}", parameter="key")
    return KeyRing([public.public_bytes_raw()])


def _digest_of(artifact: KernelArtifact, name: str, sha256: bytes) -> str:
    if name not in PART_NAMES:
        raise CorruptDataError(f"manifest must list the parts {', '.join(PART_NAMES)}, got {name!r}")
    data: bytes = getattr(artifact, name)
    if hashlib.sha256(data).digest() != sha256:
        raise CorruptDataError(f"part {name} must match its digest in the manifest, it does not")
    return f"sha256 {sha256.hex()}, {len(data)} bytes"


def _validation(manifest: KernelManifest) -> str:
    failed = [check.name for check in manifest.checks if not check.passed]
    if failed or not manifest.checks:
        what = f"failed {', '.join(failed)}" if failed else "got none"
        raise CompilationError(f"kernel must have passed every check, {what}")
    return f"all {len(manifest.checks)} checks passed"
