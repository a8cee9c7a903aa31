"""The gRPC face of the library: checks the request, asks the store, answers. Errors leave by the server's one table."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final, cast

from esper.contracts.blueprint import (
    Blueprint,
    BlueprintBounds,
    BlueprintIR,
    BlueprintMetadata,
    BlueprintState,
    Lineage,
    SiteKind,
)
from esper.contracts.chunks import SHA256_BYTES
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import FieldReport
from esper.contracts.tag_expression import parse_tags
from esper.contracts.wire import enum_from_wire, from_wire, to_message, to_wire
from esper.mesh.validation import require_size
from esper.services.urza.blueprint_records import message_of, page_message
from esper.services.urza.genealogy import LineageDirection
from esper.services.urza.kernel_upload import KernelUpload, UploadBudget, progress_of
from esper.services.urza.read_ahead import one_ahead
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest, person
from esper.services.urza.store import UrzaStore
from esper.v1 import blueprint_pb2, kernel_pb2, urza_service_pb2, urza_service_pb2_grpc

log = logging.getLogger(__name__)

_MIB: Final = 1024 * 1024
_MAX_CREATE_BYTES: Final = 256 * 1024
_STATE: Final = blueprint_pb2.BlueprintState.DESCRIPTOR
_SITE_KIND: Final = blueprint_pb2.SiteKind.DESCRIPTOR
_DIRECTION: Final = urza_service_pb2.LineageDirection.DESCRIPTOR


class UrzaServicer(urza_service_pb2_grpc.UrzaServiceServicer):
    """Answers `UrzaService` from one store. Belongs to the event loop of the store's database."""

    def __init__(self, store: UrzaStore, *, upload_budget_bytes: int = 512 * _MIB) -> None:
        self._store = store
        self.uploads = UploadBudget(upload_budget_bytes)
        """Bytes that uploads under way may hold together, over this face and any other."""

    @property
    def upload_bytes_held(self) -> int:
        """Bytes that uploads under way hold together."""
        return self.uploads.held_bytes

    async def CreateBlueprint(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Store a blueprint as a new version of its name, or give the version that exists."""
        require_size("request", request.SerializeToString(), max_bytes=_MAX_CREATE_BYTES)
        draft = BlueprintDraft(
            name=request.name,
            ir=from_wire(request.ir, BlueprintIR),
            metadata=from_wire(request.metadata, BlueprintMetadata),
            lineage=_lineage_of(request),
            state=_state_of(request.state) if request.state else BlueprintState.DRAFT,
        )
        blueprint, created = await self._store.blueprints.create(draft)
        return urza_service_pb2.CreateBlueprintResponse(blueprint=_wire(blueprint), created=created)

    async def GetBlueprint(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give one blueprint with its life cycle so far."""
        record, history = await self._store.blueprints.get_record(request.reference)
        async with self._store.blueprints.watching_rot((record,)):
            return urza_service_pb2.GetBlueprintResponse(
                blueprint=message_of(record),
                history=[cast("blueprint_pb2.BlueprintStateChange", to_wire(change)) for change in history],
            )

    async def SearchBlueprints(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give one page of the blueprints that match."""
        query = BlueprintQuery(
            all_tags=tuple(request.all_tags),
            any_tags=tuple(request.any_tags),
            no_tags=tuple(request.no_tags),
            states=tuple(_state_of(state, "states") for state in request.states),
            text=request.text,
            site_kind=_site_kind_of(request.site_kind) if request.site_kind else None,
            tags=parse_tags(request.tag_expression),
            bounds=from_wire(request.bounds, BlueprintBounds) if request.HasField("bounds") else BlueprintBounds(),
        )
        page = await self._store.blueprints.search_records(query, _page_of(request))
        async with self._store.blueprints.watching_rot(page.items):
            return page_message(page.items, page.next_token)

    async def GetLineage(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give ancestors or descendants."""
        direction = enum_from_wire(request.direction, LineageDirection, _DIRECTION, "direction")
        found = await self._store.blueprints.lineage_records(
            request.blueprint_id,
            cast("LineageDirection", direction),
            max_depth=request.max_depth,
            page=_page_of(request) if request.page_size or request.page_token else None,
        )
        async with self._store.blueprints.watching_rot([record for record, _ in found.items]):
            entries = [
                urza_service_pb2.LineageEntry(blueprint=message_of(record), depth=depth)
                for record, depth in found.items
            ]
        return urza_service_pb2.GetLineageResponse(entries=entries, next_page_token=found.next_token)

    async def SetBlueprintState(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Take the next step of a blueprint's life cycle, or the one back to the offer."""
        blueprint = await self._store.blueprints.set_state(
            request.blueprint_id, _state_of(request.state), actor=person(request.actor), reason=request.reason
        )
        return urza_service_pb2.SetBlueprintStateResponse(blueprint=_wire(blueprint))

    async def UploadKernel(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: ARG002, N802
        """Take a kernel in chunks, from where it broke if it did; nothing is stored before all is here and proven."""
        upload = KernelUpload(self._store, self.uploads)
        try:
            async with aclosing(one_ahead(aiter(request_iterator))) as chunks:
                async for chunk in chunks:
                    await upload.add(chunk)
            record, created = await upload.finish()
        finally:
            upload.close()
        return urza_service_pb2.UploadKernelResponse(artifact_id=record.artifact_id, created=created)

    async def GetKernelUpload(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Say how far an upload got."""
        offset, artifact_id = await progress_of(self._store, request.sha256, request.total_bytes)
        return urza_service_pb2.GetKernelUploadResponse(offset=offset, artifact_id=artifact_id)

    async def PinKernel(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Keep a kernel from every sweep, or no longer."""
        change = self._store.kernels.unpin if request.unpin else self._store.kernels.pin
        changed = await change(request.artifact_id, actor=request.actor, reason=request.reason)
        return urza_service_pb2.PinKernelResponse(changed=changed)

    async def SweepLibrary(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Let go of what need not be kept, or say what would go."""
        swept = await (self._store.retention.preview() if request.dry_run else self._store.retention.sweep())
        return urza_service_pb2.SweepLibraryResponse(
            artifact_ids=swept.kernel_ids,
            kernel_bytes=swept.kernel_bytes,
            held_bytes=swept.held_bytes,
            reports=swept.reports,
            uploads=swept.uploads,
        )

    async def DownloadKernel(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """Give a kernel in checksummed chunks, from an offset on."""
        _, chunks = await self._store.kernels.open(request.artifact_id, offset=request.offset)
        async for chunk in chunks:
            yield urza_service_pb2.DownloadKernelResponse(
                total_bytes=chunk.total_bytes,
                sha256=chunk.sha256,
                offset=chunk.offset,
                data=chunk.data,
                crc32=chunk.crc32,
            )

    async def GetKernel(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give a kernel's manifest by id or content key, with its reports; to who knows that, the size alone."""
        if request.manifest_sha256:
            size_bytes = await self._size_if_known(request)
            if size_bytes:
                return urza_service_pb2.GetKernelResponse(size_bytes=size_bytes)
        record, statistics = await self._store.kernels.get_counted(
            artifact_id=request.artifact_id, content_key=request.content_key
        )
        return urza_service_pb2.GetKernelResponse(
            manifest=_manifest(record.manifest),
            size_bytes=record.size_bytes,
            statistics=None if statistics is None else to_message(statistics, blueprint_pb2.KernelStatistics),
        )

    async def _size_if_known(self, request: Any) -> int:
        if len(request.manifest_sha256) != SHA256_BYTES:
            raise InvalidInputError.of("manifest_sha256", f"be {SHA256_BYTES} bytes", request.manifest_sha256)
        return await self._store.kernels.size_if_known(
            request.manifest_sha256, artifact_id=request.artifact_id, content_key=request.content_key
        )

    async def ListKernels(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give one page of kernels, newest first."""
        page = await self._store.kernels.list(_page_of(request), blueprint_id=request.blueprint_id)
        return urza_service_pb2.ListKernelsResponse(
            kernels=[_manifest(record.manifest) for record in page.items], next_page_token=page.next_token
        )

    async def RecordFieldReport(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Count a field report in the statistics of its blueprint."""
        if not request.HasField("report"):
            raise InvalidInputError.of("report", "be set", "nothing")
        result = await self._store.reports.record(from_wire(request.report, FieldReport))
        return urza_service_pb2.RecordFieldReportResponse(recorded=result.recorded)


def _wire(blueprint: Blueprint) -> blueprint_pb2.Blueprint:
    return cast("blueprint_pb2.Blueprint", to_wire(blueprint))


def _manifest(data: bytes) -> kernel_pb2.KernelManifest:
    return kernel_pb2.KernelManifest.FromString(data)


def _page_of(request: Any) -> PageRequest:
    return PageRequest(size=request.page_size, token=request.page_token)


def _state_of(number: int, parameter: str = "state") -> BlueprintState:
    return cast("BlueprintState", enum_from_wire(number, BlueprintState, _STATE, parameter))


def _site_kind_of(number: int) -> SiteKind:
    return cast("SiteKind", enum_from_wire(number, SiteKind, _SITE_KIND, "site_kind"))


def _lineage_of(request: Any) -> Lineage:
    """Give the lineage of a request; one that was left out, or names no operator, means made by hand."""
    lineage = from_wire(request.lineage, Lineage)
    return lineage if lineage.operator else dataclasses.replace(lineage, operator="manual")
