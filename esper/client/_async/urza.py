"""Urza: blueprints and kernels."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence

from esper.client.paging import decoded
from esper.client.transport import AsyncTransport
from esper.contracts.blueprint import Blueprint, BlueprintIR, BlueprintMetadata, BlueprintState, Lineage
from esper.contracts.errors import CorruptDataError
from esper.contracts.kernel import KernelManifest
from esper.contracts.run import FieldReport
from esper.contracts.wire import enum_to_wire, from_wire, to_message
from esper.v1 import blueprint_pb2, telemetry_pb2, urza_service_pb2

_CHUNK_BYTES = 256 * 1024


class AsyncUrzaClient:
    """Calls of ``UrzaService``."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create_blueprint(
        self,
        name: str,
        ir: BlueprintIR,
        *,
        metadata: BlueprintMetadata | None = None,
        lineage: Lineage | None = None,
        state: BlueprintState = BlueprintState.DRAFT,
    ) -> Blueprint:
        """Store a blueprint as a new version of its name; the same graph under the same name is stored once."""
        request = urza_service_pb2.CreateBlueprintRequest(
            name=name,
            ir=to_message(ir, blueprint_pb2.BlueprintIR),
            metadata=to_message(metadata or BlueprintMetadata(), blueprint_pb2.BlueprintMetadata),
            lineage=to_message(lineage or Lineage(), blueprint_pb2.Lineage),
            state=_state(state),
        )
        response = await self._transport.call("urza", "CreateBlueprint", request)
        return from_wire(response.blueprint, Blueprint)

    async def get_blueprint(self, reference: str) -> Blueprint:
        """Give one blueprint by content id, ``name@version`` or ``name``."""
        request = urza_service_pb2.GetBlueprintRequest(reference=reference)
        return from_wire((await self._transport.call("urza", "GetBlueprint", request)).blueprint, Blueprint)

    async def search_blueprints(
        self,
        tags: Sequence[str] = (),
        *,
        any_tags: Sequence[str] = (),
        without: Sequence[str] = (),
        states: Sequence[BlueprintState] = (),
        text: str = "",
    ) -> list[Blueprint]:
        """Give every blueprint that has all ``tags``, one of ``any_tags``, none of ``without``, by name and version."""
        request = urza_service_pb2.SearchBlueprintsRequest(
            all_tags=tags, any_tags=any_tags, no_tags=without, text=text, states=[_state(one) for one in states]
        )
        found: list[Blueprint] = []
        async for page in self._transport.pages("urza", "SearchBlueprints", request):
            found.extend(decoded(page.blueprints, Blueprint))
        return found

    async def get_lineage(self, blueprint_id: str, *, descendants: bool = False) -> list[tuple[int, Blueprint]]:
        """Give ancestors (or descendants) with their distance, nearest first."""
        towards = "LINEAGE_DIRECTION_DESCENDANTS" if descendants else "LINEAGE_DIRECTION_ANCESTORS"
        direction = urza_service_pb2.LineageDirection.Value(towards)
        request = urza_service_pb2.GetLineageRequest(blueprint_id=blueprint_id, direction=direction)
        entries = (await self._transport.call("urza", "GetLineage", request)).entries
        return [(entry.depth, from_wire(entry.blueprint, Blueprint)) for entry in entries]

    async def set_blueprint_state(
        self, blueprint_id: str, state: BlueprintState, *, actor: str, reason: str
    ) -> Blueprint:
        """Move a blueprint through its life cycle."""
        request = urza_service_pb2.SetBlueprintStateRequest(
            blueprint_id=blueprint_id, state=_state(state), actor=actor, reason=reason
        )
        return from_wire((await self._transport.call("urza", "SetBlueprintState", request)).blueprint, Blueprint)

    async def get_kernel(self, artifact_id: str) -> KernelManifest:
        """Give a kernel's manifest."""
        request = urza_service_pb2.GetKernelRequest(artifact_id=artifact_id)
        return from_wire((await self._transport.call("urza", "GetKernel", request)).manifest, KernelManifest)

    async def list_kernels(self, blueprint_id: str = "") -> AsyncIterator[KernelManifest]:
        """Give kernels, newest first, of one blueprint or all."""
        request = urza_service_pb2.ListKernelsRequest(blueprint_id=blueprint_id)
        async for page in self._transport.pages("urza", "ListKernels", request):
            for manifest in decoded(page.kernels, KernelManifest):
                yield manifest

    async def download_kernel(self, artifact_id: str) -> bytes:
        """Give a kernel's artefact bytes, checked against its digest; verify the signature before use.

        Raises:
            CorruptDataError: What arrived does not match the digest.
        """
        request = urza_service_pb2.DownloadKernelRequest(artifact_id=artifact_id)
        received, digest = bytearray(), b""
        async for chunk in self._transport.stream("urza", "DownloadKernel", request):
            if chunk.offset != len(received) or zlib.crc32(chunk.data) != chunk.crc32:
                raise CorruptDataError(f"chunk of kernel {artifact_id} at byte {chunk.offset} must match its checksum")
            received += chunk.data
            digest = chunk.sha256
        if hashlib.sha256(received).digest() != digest:
            raise CorruptDataError(f"kernel {artifact_id} must match its digest")
        return bytes(received)

    async def upload_kernel(self, data: bytes) -> str:
        """Store a signed artefact; give its id."""
        response = await self._transport.send("urza", "UploadKernel", _chunks(data))
        return str(response.artifact_id)

    async def record_field_report(self, report: FieldReport) -> bool:
        """Count a report in its blueprint's statistics; false when it had been counted before."""
        message = to_message(report, telemetry_pb2.FieldReport)
        request = urza_service_pb2.RecordFieldReportRequest(report=message)
        return bool((await self._transport.call("urza", "RecordFieldReport", request)).recorded)


def _state(state: BlueprintState) -> blueprint_pb2.BlueprintState.ValueType:
    return blueprint_pb2.BlueprintState.ValueType(enum_to_wire(state, blueprint_pb2.BlueprintState.DESCRIPTOR))


def _chunks(data: bytes) -> Iterator[urza_service_pb2.UploadKernelRequest]:
    digest = hashlib.sha256(data).digest()
    for offset in range(0, max(1, len(data)), _CHUNK_BYTES):
        part = data[offset : offset + _CHUNK_BYTES]
        yield urza_service_pb2.UploadKernelRequest(
            total_bytes=len(data), sha256=digest, offset=offset, data=part, crc32=zlib.crc32(part)
        )
