"""Proof of an uploaded kernel: its form, the digests of its parts, and the signature where keys are known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from esper.contracts.errors import CorruptDataError
from esper.contracts.kernel import KernelManifest
from esper.execution.artifact import SIGNED_PREFIX, check_parts, view_artifact
from esper.execution.envelope import Envelope
from esper.execution.keys import KeyRing

_KEY_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvenKernel:
    """An artefact that was proven, with its manifest."""

    artifact: Envelope
    """The artefact, a view of the bytes that were proven."""
    manifest: KernelManifest
    """Its manifest, parsed."""


def prove_kernel(payload: bytes, key_ring: KeyRing | None) -> ProvenKernel:
    """Give the artefact of serialised bytes once it is proven; the signature is checked where a key ring is given.

    The weights are not looked into: whoever loads a kernel verifies it again.

    Raises:
        CorruptDataError: The bytes are no artefact, or a part does not match the manifest.
        SignatureError: The signature is absent, unknown or false.
        CapacityExceededError: The artefact is larger than any may be.
    """
    artifact = view_artifact(payload)
    if not _KEY_ID.fullmatch(artifact.key_id):
        raise CorruptDataError("key_id must be 16 lower-case hex digits, it is not", parameter="key_id")
    if key_ring is not None:
        key_ring.verify(artifact.key_id, artifact.signature, SIGNED_PREFIX + artifact.manifest)
    return ProvenKernel(artifact=artifact, manifest=check_parts(artifact))
