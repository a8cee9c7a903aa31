"""The gRPC face of the library: checks the request, asks the store, answers. Errors leave by the server's one table."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from typing import Any, Final, cast

from esper.contracts.blueprint import Blueprint, BlueprintIR, BlueprintMetadata, BlueprintState, Lineage, SiteKind
from esper.contracts.chunks import Assembler
from esper.contracts.errors import CapacityExceededError, InvalidInputError
from esper.contracts.run import FieldReport
from esper.contracts.wire import enum_from_wire, from_wire, to_wire
from esper.mesh.validation import require_size
from esper.services.urza.blueprint_store import LineageDirection
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.store import UrzaStore
from esper.v1 import blueprint_pb2, kernel_pb2, urza_service_pb2, urza_service_pb2_grpc

log = logging.getLogger(__name__)

_MIB: Final = 1024 * 1024
_MAX_CREATE_BYTES: Final = 256 * 1024
_STATE: Final = blueprint_pb2.BlueprintState.DESCRIPTOR
_SITE_KIND: Final = blueprint_pb2.SiteKind.DESCRIPTOR
_DIRECTION: Final = urza_service_pb2.LineageDirection.DESCRIPTOR


class UploadBudget:
    """Bytes that uploads under way may hold together, so that many of them at once cannot fill the memory.

    Belongs to one event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes set aside now."""
        return self._held_bytes

    def take(self, num_bytes: int) -> None:
        """Set bytes aside.

        Raises:
            CapacityExceededError: Uploads under way hold too many already; try again later.
        """
        if self._held_bytes + num_bytes > self._max_bytes:
            raise CapacityExceededError(
                f"uploads under way must hold at most {self._max_bytes} bytes together, got {num_bytes} bytes beyond "
                f"{self._held_bytes}; retry after the hinted delay",
                parameter="total_bytes",
            )
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Let bytes go that were set aside."""
        self._held_bytes -= num_bytes


class UrzaServicer(urza_service_pb2_grpc.UrzaServiceServicer):
    """Answers `UrzaService` from one store. Belongs to the event loop of the store's database."""

    def __init__(self, store: UrzaStore, *, upload_budget_bytes: int = 512 * _MIB) -> None:
        self._store = store
        self._uploads = UploadBudget(upload_budget_bytes)

    @property
    def upload_bytes_held(self) -> int:
        """Bytes that uploads under way hold together."""
        return self._uploads.held_bytes

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
        blueprint = await self._store.blueprints.get(request.reference)
        history = await self._store.blueprints.history(blueprint.id)
        return urza_service_pb2.GetBlueprintResponse(
            blueprint=_wire(blueprint),
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
        )
        page = await self._store.blueprints.search(query, _page_of(request))
        return urza_service_pb2.SearchBlueprintsResponse(
            blueprints=[_wire(blueprint) for blueprint in page.items], next_page_token=page.next_token
        )

    async def GetLineage(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give ancestors or descendants."""
        direction = enum_from_wire(request.direction, LineageDirection, _DIRECTION, "direction")
        relatives = await self._store.blueprints.lineage(
            request.blueprint_id, cast("LineageDirection", direction), max_depth=request.max_depth
        )
        entries = [
            urza_service_pb2.LineageEntry(blueprint=_wire(relative.blueprint), depth=relative.depth)
            for relative in relatives
        ]
        return urza_service_pb2.GetLineageResponse(entries=entries)

    async def SetBlueprintState(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Take the next step of a blueprint's life cycle."""
        blueprint = await self._store.blueprints.set_state(
            request.blueprint_id, _state_of(request.state), actor=request.actor, reason=request.reason
        )
        return urza_service_pb2.SetBlueprintStateResponse(blueprint=_wire(blueprint))

    async def UploadKernel(self, request_iterator: AsyncIterator[Any], context: Any) -> Any:  # noqa: ARG002, N802
        """Take a kernel in chunks; nothing is stored before all of it is here and proven."""
        assembler = Assembler(max_bytes=self._store.kernels.max_kernel_bytes)
        set_aside = 0
        try:
            async for chunk in request_iterator:
                assembler.add(chunk)
                if not set_aside:
                    self._uploads.take(assembler.total_bytes or 0)
                    set_aside = assembler.total_bytes or 0
            payload = await asyncio.to_thread(assembler.finish)
            record, created = await self._store.kernels.put(payload)
        finally:
            self._uploads.give_back(set_aside)
        return urza_service_pb2.UploadKernelResponse(artifact_id=record.artifact_id, created=created)

    async def DownloadKernel(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002, N802
        """Give a kernel in checksummed chunks, from an offset on."""
        _, chunks = await self._store.kernels.open(request.artifact_id, offset=request.offset)
        async for chunk in chunks:
            fields = {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)}
            yield urza_service_pb2.DownloadKernelResponse(**fields)

    async def GetKernel(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """Give a kernel's manifest by id or content key."""
        record = await self._store.kernels.get(artifact_id=request.artifact_id, content_key=request.content_key)
        return urza_service_pb2.GetKernelResponse(manifest=_manifest(record.manifest), size_bytes=record.size_bytes)

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
