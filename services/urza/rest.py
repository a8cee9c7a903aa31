"""The REST face of the library: the same store, rules and errors as over gRPC, described at ``/docs``.

``/openapi.json`` is complete by itself; the page at ``/docs`` loads its viewer from a public network.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from esper.contracts import wire
from esper.contracts.blueprint import BlueprintState
from esper.contracts.chunks import Chunk
from esper.contracts.errors import PermissionDeniedError
from esper.contracts.kernel import KernelManifest
from esper.services.urza.genealogy import LineageDirection
from esper.services.urza.kernel_rows import KernelRecord
from esper.services.urza.kernel_upload import UploadBudget
from esper.services.urza.rest_body_limit import BodyLimit
from esper.services.urza.rest_errors import PROBLEM_RESPONSES, install_error_handlers
from esper.services.urza.rest_models import (
    BlueprintBody,
    BlueprintPage,
    BlueprintWithHistory,
    CreateBlueprintBody,
    CreatedBlueprint,
    HealthAnswer,
    KernelBody,
    KernelPage,
    KernelStatisticsAnswer,
    LineageAnswer,
    PinBody,
    PinnedAnswer,
    RelativeBody,
    SearchParameters,
    SetStateBody,
    StateChangeBody,
    StatisticsBody,
    SweepBody,
    SweptAnswer,
)
from esper.services.urza.rest_reports import report_routes
from esper.services.urza.rest_uploads import UPLOADS, upload_routes
from esper.services.urza.rules import PageRequest, person
from esper.services.urza.store import UrzaStore

MAX_BODY_BYTES = 256 * 1024
"""Largest body of a request, in bytes."""

_UPLOAD_BYTES = 512 * 1024 * 1024
_RANGE = re.compile(r"bytes=(\d{1,15})-", re.ASCII)
_PageSize = Annotated[int, Query(description="Entries a page, 1 to 500; 0 means 50")]
_PageToken = Annotated[str, Query(description="Token of the page before; empty for the first")]


def build_app(
    store: UrzaStore,
    *,
    write_token: str | None = None,
    allowed_hosts: tuple[str, ...] = ("*",),
    uploads: UploadBudget | None = None,
) -> FastAPI:
    """Give the application over a store.

    Args:
        store: Where everything rests.
        write_token: Bearer token that every call needs that changes something; ``None`` asks for none.
        allowed_hosts: Host names under which it answers; keeps web pages elsewhere from reaching a loopback port.
        uploads: Bytes that uploads under way may hold; ``None`` lets those of this face hold 512 MiB.
    """
    app = FastAPI(
        title="Urza",
        summary="The library of blueprints and kernels",
        version="1",
        responses=PROBLEM_RESPONSES,
        license_info={"name": "MIT"},
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES, bounded_elsewhere=f"{UPLOADS}/")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    app.include_router(_health_routes(store))
    app.include_router(_reading_routes(store))
    app.include_router(_writing_routes(store), dependencies=[Depends(_writer(write_token))])
    app.include_router(_kernel_routes(store))
    app.include_router(upload_routes(store, uploads or UploadBudget(_UPLOAD_BYTES), _writer(write_token)))
    app.include_router(report_routes(store), dependencies=[Depends(_writer(write_token))])
    app.include_router(_care_routes(store), dependencies=[Depends(_writer(write_token))])
    return app


def _writer(write_token: str | None) -> Callable[..., Awaitable[None]]:
    """Give the check that a caller may change something."""

    async def check(authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, given = authorization.partition(" ")
        if write_token is None:
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), write_token.encode()):
            raise PermissionDeniedError(
                "authorization must be a bearer token that may change the library, it is not", parameter="authorization"
            )

    return check


def _health_routes(store: UrzaStore) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def is_alive() -> HealthAnswer:
        """Tell that the process answers."""
        return HealthAnswer(status="ok")

    @router.get("/readyz")
    async def is_ready() -> HealthAnswer:
        """Tell that the store answers, too."""
        await store.ping()
        return HealthAnswer(status="ok")

    return router


def _reading_routes(store: UrzaStore) -> APIRouter:
    router = APIRouter(prefix="/v1/blueprints", tags=["blueprints"])

    @router.get("")
    async def search_blueprints(asked: Annotated[SearchParameters, Query()]) -> BlueprintPage:
        """Give one page of the blueprints that meet every condition, by name and version."""
        request = PageRequest(size=asked.page_size, token=asked.page_token)
        page = await store.blueprints.search(asked.to_query(), request)
        return BlueprintPage(
            blueprints=[BlueprintBody.of(item) for item in page.items], next_page_token=page.next_token
        )

    @router.get("/{reference}")
    async def get_blueprint(reference: str) -> BlueprintWithHistory:
        """Give a blueprint by content id, ``name@version``, or ``name`` for its newest version."""
        blueprint = await store.blueprints.get(reference)
        history = await store.blueprints.history(blueprint.id)
        return BlueprintWithHistory(
            blueprint=BlueprintBody.of(blueprint), history=[StateChangeBody.of(change) for change in history]
        )

    @router.get("/{reference}/lineage")
    async def get_lineage(
        reference: str,
        direction: Literal["ancestors", "descendants"] = "ancestors",
        max_depth: int = 0,
        page_size: Annotated[int, Query(description="Entries a page, 1 to 500; 0 means all at once, or 50")] = 0,
        page_token: _PageToken = "",
    ) -> LineageAnswer:
        """Give the relatives within ``max_depth`` steps (0 means 100), by depth, then name, then version."""
        blueprint = await store.blueprints.get(reference)
        way = LineageDirection[direction.upper()]
        page = PageRequest(size=page_size, token=page_token) if page_size or page_token else None
        found = await store.blueprints.lineage(blueprint.id, way, max_depth=max_depth, page=page)
        return LineageAnswer(
            entries=[RelativeBody(blueprint=BlueprintBody.of(one.blueprint), depth=one.depth) for one in found.items],
            next_page_token=found.next_token,
        )

    return router


def _writing_routes(store: UrzaStore) -> APIRouter:
    router = APIRouter(prefix="/v1/blueprints", tags=["blueprints"])

    @router.post("", status_code=201)
    async def create_blueprint(body: CreateBlueprintBody, response: Response) -> CreatedBlueprint:
        """Store a new version of a name (201), or give the version that holds this graph already (200)."""
        blueprint, created = await store.blueprints.create(body.to_draft())
        response.status_code = 201 if created else 200
        response.headers["Location"] = f"/v1/blueprints/{blueprint.id}"
        return CreatedBlueprint(blueprint=BlueprintBody.of(blueprint), created=created)

    @router.post("/{reference}/state")
    async def set_state(reference: str, body: SetStateBody) -> BlueprintBody:
        """Take the next step of the life cycle, or the one from DEPRECATED back to ACTIVE."""
        blueprint = await store.blueprints.get(reference)
        state = BlueprintState[body.state.value]
        changed = await store.blueprints.set_state(blueprint.id, state, actor=person(body.actor), reason=body.reason)
        return BlueprintBody.of(changed)

    return router


def _kernel_routes(store: UrzaStore) -> APIRouter:
    router = APIRouter(prefix="/v1/kernels", tags=["kernels"])

    @router.get("")
    async def list_kernels(
        blueprint_id: Annotated[str, Query(description="Only kernels of this blueprint; empty means all")] = "",
        page_size: _PageSize = 0,
        page_token: _PageToken = "",
    ) -> KernelPage:
        """Give one page of kernels, newest first."""
        page = await store.kernels.list(PageRequest(size=page_size, token=page_token), blueprint_id=blueprint_id)
        return KernelPage(kernels=[_kernel_body(record) for record in page.items], next_page_token=page.next_token)

    @router.get("/{artifact_id}")
    async def get_kernel(artifact_id: str) -> KernelBody:
        """Give what is said of a kernel."""
        return _kernel_body(await store.kernels.get(artifact_id=artifact_id))

    @router.get("/by-content-key/{content_key}")
    async def get_kernel_by_content_key(content_key: str) -> KernelBody:
        """Give what is said of the kernel that answers a compile request."""
        return _kernel_body(await store.kernels.get(content_key=content_key))

    @router.get("/{artifact_id}/statistics")
    async def get_kernel_statistics(artifact_id: str) -> KernelStatisticsAnswer:
        """Give what field reports say of a kernel; it may be gone by now."""
        counted = await store.reports.kernel_statistics(artifact_id)
        if counted is None:
            await store.kernels.get(artifact_id=artifact_id)  # nobody reported it: it is known, or it is an error
        return KernelStatisticsAnswer(statistics=None if counted is None else StatisticsBody.of(counted))

    @router.get("/{artifact_id}/content", response_class=Response)
    async def get_kernel_content(artifact_id: str, request: Request) -> Response:
        """Give a kernel's signed bytes; ``Range: bytes=N-`` goes on with a broken transfer."""
        match = _RANGE.fullmatch(request.headers.get("range", ""))
        offset = int(match[1]) if match else 0
        if match and offset >= (size := (await store.kernels.get(artifact_id=artifact_id)).size_bytes):
            detail = f"range must begin before the end at {size} bytes, got {offset}"
            raise HTTPException(416, detail, headers={"Content-Range": f"bytes */{size}"})
        record, chunks = await store.kernels.open(artifact_id, offset=offset)
        first = await anext(chunks)
        headers = {
            "Content-Length": str(record.size_bytes - offset),
            "Accept-Ranges": "bytes",
            "ETag": f'"{record.sha256.hex()}"',
            "Repr-Digest": f"sha-256=:{base64.b64encode(record.sha256).decode()}:",
        }
        if match:
            headers["Content-Range"] = f"bytes {offset}-{record.size_bytes - 1}/{record.size_bytes}"
        return StreamingResponse(
            _stream(first, chunks),
            status_code=206 if match else 200,
            media_type="application/octet-stream",
            headers=headers,
        )

    return router


def _care_routes(store: UrzaStore) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["kernels"])

    @router.post("/kernels/{artifact_id}/pin")
    async def pin_kernel(artifact_id: str, body: PinBody) -> PinnedAnswer:
        """Keep a kernel from every sweep."""
        changed = await store.kernels.pin(artifact_id, actor=body.actor, reason=body.reason)
        return PinnedAnswer(pinned=True, changed=changed)

    @router.post("/kernels/{artifact_id}/unpin")
    async def unpin_kernel(artifact_id: str, body: PinBody) -> PinnedAnswer:
        """Let sweeps judge a kernel again; one that is not there was not pinned."""
        changed = await store.kernels.unpin(artifact_id, actor=body.actor, reason=body.reason)
        return PinnedAnswer(pinned=False, changed=changed)

    @router.post("/sweep")
    async def sweep_library(body: SweepBody) -> SweptAnswer:
        """Let go of what the library need not keep, or say what would go."""
        swept = await (store.retention.preview() if body.dry_run else store.retention.sweep())
        return SweptAnswer(
            artifact_ids=list(swept.kernel_ids),
            kernel_bytes=swept.kernel_bytes,
            held_bytes=swept.held_bytes,
            reports=swept.reports,
            uploads=swept.uploads,
        )

    return router


async def _stream(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
    yield first.data
    async for chunk in rest:
        yield chunk.data


def _kernel_body(record: KernelRecord) -> KernelBody:
    return KernelBody.of(record, wire.parse(record.manifest, KernelManifest))
