"""Urza: blueprints and kernels."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from esper.client.paging import decoded
from esper.client.transport import AsyncTransport
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintBounds,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    KernelStatistics,
    Lineage,
    SiteKind,
)
from esper.contracts.chunks import MAX_CHUNK_BYTES, Assembler, split
from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    DeadlineExceededError,
    EsperError,
    InvalidInputError,
    InvalidStateError,
    UnavailableError,
)
from esper.contracts.kernel import KernelManifest
from esper.contracts.run import FieldReport
from esper.contracts.wire import enum_to_wire, from_wire, to_message
from esper.v1 import blueprint_pb2, telemetry_pb2, urza_service_pb2

_MAX_KERNEL_BYTES: Final = 256 * 1024 * 1024
"""Largest artefact that there may be, in bytes."""
_SWEEP_TIMEOUT_S: Final = 300.0
_LINEAGE_PAGE: Final = 500
"""Relatives a page, the most there may be: each page walks the genealogy anew."""


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
        expression: str = "",
        states: Sequence[BlueprintState] = (),
        text: str = "",
        site_kind: SiteKind | None = None,
        bounds: BlueprintBounds | None = None,
    ) -> list[Blueprint]:
        """Give every blueprint that meets all conditions, by name and version.

        Args:
            tags: Tags that must all be there.
            any_tags: Tags of which one must be there.
            without: Tags that must not be there.
            expression: Expression over tags that must hold, e.g. ``"validated & (conv2d | linear) & !deprecated"``.
            states: States of which one must hold.
            text: Text that name or description must contain, in any case.
            site_kind: Kind of site it must be meant for.
            bounds: Bounds on figures; parameters and FLOPs at the reference site of ``site_kind``, or of any one kind.

        Raises:
            InvalidInputError: A condition breaks its rule; of an expression, the message names the position.
        """
        request = urza_service_pb2.SearchBlueprintsRequest(
            all_tags=tags,
            any_tags=any_tags,
            no_tags=without,
            tag_expression=expression,
            text=text,
            states=[_state(one) for one in states],
            site_kind=_site_kind(site_kind),
            bounds=None if bounds is None else to_message(bounds, blueprint_pb2.BlueprintBounds),
        )
        found: list[Blueprint] = []
        async for page in self._transport.pages("urza", "SearchBlueprints", request):
            found.extend(decoded(page.blueprints, Blueprint))
        return found

    async def get_lineage(
        self, blueprint_id: str, *, descendants: bool = False, max_depth: int = 0
    ) -> list[tuple[int, Blueprint]]:
        """Give ancestors (or descendants) within ``max_depth`` steps (0 means 100) with their distance, nearest first.

        However many there are: they come page by page.
        """
        towards = "LINEAGE_DIRECTION_DESCENDANTS" if descendants else "LINEAGE_DIRECTION_ANCESTORS"
        direction = urza_service_pb2.LineageDirection.Value(towards)
        request = urza_service_pb2.GetLineageRequest(
            blueprint_id=blueprint_id, direction=direction, max_depth=max_depth, page_size=_LINEAGE_PAGE
        )
        found: list[tuple[int, Blueprint]] = []
        async for page in self._transport.pages("urza", "GetLineage", request):
            found.extend((entry.depth, from_wire(entry.blueprint, Blueprint)) for entry in page.entries)
        return found

    async def set_blueprint_state(
        self, blueprint_id: str, state: BlueprintState, *, actor: str, reason: str
    ) -> Blueprint:
        """Move a blueprint through its life cycle: one state on, or from DEPRECATED back to ACTIVE."""
        request = urza_service_pb2.SetBlueprintStateRequest(
            blueprint_id=blueprint_id, state=_state(state), actor=actor, reason=reason
        )
        return from_wire((await self._transport.call("urza", "SetBlueprintState", request)).blueprint, Blueprint)

    async def get_kernel(self, artifact_id: str) -> KernelManifest:
        """Give a kernel's manifest."""
        request = urza_service_pb2.GetKernelRequest(artifact_id=artifact_id)
        return from_wire((await self._transport.call("urza", "GetKernel", request)).manifest, KernelManifest)

    async def get_kernel_statistics(self, artifact_id: str) -> KernelStatistics | None:
        """Give what field reports say of a stored kernel; ``None`` while none came."""
        request = urza_service_pb2.GetKernelRequest(artifact_id=artifact_id)
        response = await self._transport.call("urza", "GetKernel", request)
        return from_wire(response.statistics, KernelStatistics) if response.HasField("statistics") else None

    async def list_kernels(self, blueprint_id: str = "") -> AsyncIterator[KernelManifest]:
        """Give kernels, newest first, of one blueprint or all."""
        request = urza_service_pb2.ListKernelsRequest(blueprint_id=blueprint_id)
        async for page in self._transport.pages("urza", "ListKernels", request):
            for manifest in decoded(page.kernels, KernelManifest):
                yield manifest

    async def download_kernel(self, artifact_id: str) -> bytes:
        """Give a kernel's artefact bytes, checked against its digest; verify the signature before use.

        A transfer that breaks goes on where it broke, as long as every attempt brings something.

        Raises:
            CorruptDataError: What arrived does not match the digest.
            NotFoundError: The library has no such kernel.
            UnavailableError: The library cannot be reached.
        """
        assembler = Assembler(max_bytes=_MAX_KERNEL_BYTES)
        while True:
            begun_at = assembler.offset
            request = urza_service_pb2.DownloadKernelRequest(artifact_id=artifact_id, offset=begun_at)
            try:
                async for chunk in self._transport.stream("urza", "DownloadKernel", request):
                    _add(assembler, chunk, artifact_id)
                return assembler.finish()
            except (UnavailableError, DeadlineExceededError):
                if assembler.offset == begun_at:
                    raise

    async def upload_kernel(self, data: bytes) -> str:
        """Store a signed artefact; give its id.

        One of more than 1 MiB goes on where an earlier attempt broke, as long as every attempt brings something; after
        an error, call again.

        Raises:
            CorruptDataError: The library does not trust the signature, or a digest does not hold.
            UnavailableError: The library cannot be reached.
        """
        failure: EsperError | None = None
        reached = -1
        while True:
            offset, artifact_id = await self.get_kernel_upload(data) if len(data) > MAX_CHUNK_BYTES else (0, "")
            if artifact_id:
                return artifact_id
            if failure is not None and offset <= reached:
                raise failure
            reached = offset
            try:
                response = await self._transport.send("urza", "UploadKernel", _chunks(data, offset))
                return str(response.artifact_id)
            except (UnavailableError, DeadlineExceededError, InvalidStateError) as error:
                failure = error

    async def get_kernel_upload(self, data: bytes) -> tuple[int, str]:
        """Say how far the upload of an artefact got: the bytes kept, and the kernel's id once all of it is stored."""
        digest = hashlib.sha256(data).digest()
        request = urza_service_pb2.GetKernelUploadRequest(sha256=digest, total_bytes=len(data))
        response = await self._transport.call("urza", "GetKernelUpload", request)
        return int(response.offset), str(response.artifact_id)

    async def pin_kernel(self, artifact_id: str, *, actor: str, reason: str) -> bool:
        """Keep a kernel from every sweep of the library; false when it was pinned before."""
        request = urza_service_pb2.PinKernelRequest(artifact_id=artifact_id, actor=actor, reason=reason)
        return bool((await self._transport.call("urza", "PinKernel", request)).changed)

    async def unpin_kernel(self, artifact_id: str, *, actor: str, reason: str) -> bool:
        """Let sweeps judge a kernel again; false when it was not pinned."""
        request = urza_service_pb2.PinKernelRequest(artifact_id=artifact_id, unpin=True, actor=actor, reason=reason)
        return bool((await self._transport.call("urza", "PinKernel", request)).changed)

    async def sweep_library(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Let the library let go of what it need not keep; give the ids of the kernels that went, or would go."""
        request = urza_service_pb2.SweepLibraryRequest(dry_run=dry_run)
        response = await self._transport.call("urza", "SweepLibrary", request, timeout_s=_SWEEP_TIMEOUT_S)
        return tuple(response.artifact_ids)

    async def record_field_report(self, report: FieldReport) -> bool:
        """Count a report in its blueprint's statistics; false when it had been counted before."""
        message = to_message(report, telemetry_pb2.FieldReport)
        request = urza_service_pb2.RecordFieldReportRequest(report=message)
        return bool((await self._transport.call("urza", "RecordFieldReport", request)).recorded)


def _state(state: BlueprintState) -> blueprint_pb2.BlueprintState.ValueType:
    return blueprint_pb2.BlueprintState.ValueType(enum_to_wire(state, blueprint_pb2.BlueprintState.DESCRIPTOR))


def _site_kind(kind: SiteKind | None) -> blueprint_pb2.SiteKind.ValueType:
    if kind is None:
        return blueprint_pb2.SITE_KIND_UNSPECIFIED
    return blueprint_pb2.SiteKind.ValueType(enum_to_wire(kind, blueprint_pb2.SiteKind.DESCRIPTOR))


def _add(assembler: Assembler, chunk: urza_service_pb2.DownloadKernelResponse, artifact_id: str) -> None:
    try:
        assembler.add(chunk)
    except (InvalidInputError, CapacityExceededError) as error:
        raise CorruptDataError(f"kernel {artifact_id} arrived damaged: {error}") from error


def _chunks(data: bytes, offset: int) -> Iterator[urza_service_pb2.UploadKernelRequest]:
    for chunk in split(data, offset=offset):
        yield urza_service_pb2.UploadKernelRequest(
            total_bytes=chunk.total_bytes, sha256=chunk.sha256, offset=chunk.offset, data=chunk.data, crc32=chunk.crc32
        )
