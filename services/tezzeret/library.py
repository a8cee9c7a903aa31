"""What the library says of a kernel, believed only as far as it fits the request.

The answer carries no signature, so the proof is the id: it follows from the content key and the digests of the parts,
and the digest of the graph is known here. Whoever loads the kernel verifies the signature over all of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import grpc

from esper.blueprints.ir import content_id
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.contracts.kernel import CompileSpec, KernelManifest
from esper.contracts.wire import from_wire, serialize
from esper.execution.artifact import (
    MAX_ARTIFACT_BYTES,
    PART_NAMES,
    artifact_id_of,
    check_parts,
    read_artifact,
)
from esper.mesh.status import from_rpc_error
from esper.v1 import urza_service_pb2

_LOOKUP_TIMEOUT_S: Final = 2.0
_MAX_CHECKED: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKernel:
    """A kernel that the library has."""

    artifact_id: str
    """Its id."""
    size_bytes: int
    """Size of the artefact, in bytes."""


class KernelLookup:
    """Asks the library for kernels; an answer checked before is known by its digest. Belongs to one event loop."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._checked: OrderedDict[str, tuple[bytes, StoredKernel]] = OrderedDict()

    async def find(self, spec: CompileSpec, key: str) -> StoredKernel:
        """Ask for the kernel of a content key, as `find_kernel` does.

        The library is asked each time; of a manifest that was checked before it says only that the kernel still stands.
        """
        sha256, known = self._checked.get(key, (b"", None))
        response = await _ask(self._stub, key, sha256)
        if known is not None and not response.HasField("manifest"):
            if known.size_bytes == response.size_bytes:
                return known
            response = await _ask(self._stub, key)
        said = response.manifest.SerializeToString(deterministic=True)
        # A library of before it took digests says all of it each time.
        if known is not None and _digest(said) == sha256 and known.size_bytes == response.size_bytes:
            return known
        found = check_answer(response, spec, key)
        self._remember(key, said, found)
        return found

    def learn(self, manifest: KernelManifest, size_bytes: int, spec: CompileSpec) -> StoredKernel:
        """Check a kernel that the library took from here, as its answer would be, so that the answer is known.

        It is known by the content key of the kernel: the job's is another where the toolchain changed under the job.

        Raises:
            CorruptDataError: It does not answer the request; the message names what differs.
        """
        found = _check(manifest, size_bytes, spec, manifest.content_key)
        self._remember(manifest.content_key, serialize(manifest), found)
        return found

    def _remember(self, key: str, said: bytes, found: StoredKernel) -> None:
        self._checked[key] = (_digest(said), found)
        while len(self._checked) > _MAX_CHECKED:
            self._checked.popitem(last=False)


def _digest(said: bytes) -> bytes:
    return hashlib.sha256(said).digest()


async def find_kernel(stub: Any, spec: CompileSpec, key: str) -> StoredKernel:
    """Ask the library for the kernel of a content key.

    Raises:
        NotFoundError: It has none.
        CorruptDataError: What it says is not of a kernel that answers the request.
        UnavailableError: It cannot be reached.
        DeadlineExceededError: It did not answer within 2 s.
    """
    return check_answer(await _ask(stub, key), spec, key)


def check_answer(response: urza_service_pb2.GetKernelResponse, spec: CompileSpec, key: str) -> StoredKernel:
    """Give the kernel that an answer is about.

    Raises:
        CorruptDataError: It is not of a kernel that answers the request; the message names what differs.
    """
    try:
        manifest = from_wire(response.manifest, KernelManifest)
    except InvalidInputError as error:
        raise CorruptDataError(f"library must give a legal manifest, got one that is not: {error}") from error
    return _check(manifest, response.size_bytes, spec, key)


def _check(manifest: KernelManifest, size_bytes: int, spec: CompileSpec, key: str) -> StoredKernel:
    blueprint_id = content_id(spec.ir)
    digests = {part.name: part.sha256.hex() for part in manifest.parts}
    held_bytes = sum(part.size_bytes for part in manifest.parts)
    agrees = {
        "content_key": manifest.content_key == key,
        "parts": tuple(part.name for part in manifest.parts) == PART_NAMES and digests.get("ir") == blueprint_id,
        "artifact_id": manifest.artifact_id == artifact_id_of(key, manifest.parts),
        "blueprint_id": manifest.blueprint_id == blueprint_id,
        "site": manifest.site == spec.site,
        "device": manifest.device == spec.device,
        "checks": manifest.validated,
        "size_bytes": held_bytes < size_bytes <= MAX_ARTIFACT_BYTES,
    }
    wrong = [name for name, holds in agrees.items() if not holds]
    if wrong:
        raise CorruptDataError(f"library must name a kernel that answers the request, it differs in {', '.join(wrong)}")
    return StoredKernel(artifact_id=manifest.artifact_id, size_bytes=size_bytes)


def check_kept(data: bytes) -> KernelManifest:
    """Give the manifest of a kernel that waits for its upload; the library holds the signature against it.

    Raises:
        CorruptDataError: The bytes are no longer those of a kernel.
        CapacityExceededError: There are more of them than an artefact has.
    """
    return check_parts(read_artifact(data))


async def _ask(stub: Any, key: str, manifest_sha256: bytes = b"") -> urza_service_pb2.GetKernelResponse:
    request = urza_service_pb2.GetKernelRequest(content_key=key, manifest_sha256=manifest_sha256)
    try:
        response: urza_service_pb2.GetKernelResponse = await stub.GetKernel(request, timeout=_LOOKUP_TIMEOUT_S)
    except grpc.RpcError as error:
        raise from_rpc_error(error, method="UrzaService/GetKernel") from error
    return response
