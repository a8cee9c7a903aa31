"""Kernels on their way in over REST: one body from the start, or from where the last one broke.

What holds over gRPC holds here: the digest in the path says what is uploaded, pieces of one that broke are kept, and
nothing is stored before the whole has been proven. The bytes of uploads under way count together with those of gRPC.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from esper.contracts.chunks import MAX_CHUNK_BYTES, Chunk
from esper.contracts.errors import CorruptDataError, InvalidInputError, UnavailableError
from esper.services.urza.kernel_upload import KernelUpload, UploadBudget, progress_of
from esper.services.urza.rest_errors import refused_upload
from esper.services.urza.rest_models import UploadAnswer, UploadedKernel
from esper.services.urza.store import UrzaStore

UPLOADS: Final = "/v1/kernels/uploads"
"""Where uploads go; their bodies have bounds of their own."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RANGE: Final = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", re.ASCII)
_LENGTH: Final = re.compile(r"\d{1,15}", re.ASCII)
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def upload_routes(store: UrzaStore, budget: UploadBudget, writer: Callable[..., Awaitable[None]]) -> APIRouter:
    """Give the routes over a store; ``writer`` is the check that a caller may change something."""
    router = APIRouter(prefix=UPLOADS, tags=["kernels"])

    @router.get("/{sha256}")
    async def get_upload(
        sha256: str, total_bytes: Annotated[int, Query(description="Size of the kernel, in bytes; > 0")]
    ) -> UploadAnswer:
        """Say how far the upload of the kernel with this SHA-256 got. Changes nothing."""
        offset, artifact_id = await progress_of(store, _digest(sha256), total_bytes)
        return UploadAnswer(offset=offset, artifact_id=artifact_id or None)

    @router.put(
        "/{sha256}",
        status_code=201,
        response_model=UploadedKernel,
        dependencies=[Depends(writer)],
        openapi_extra=_BODY,
    )
    async def upload_kernel(
        sha256: str, request: Request, response: Response, content_range: Annotated[str, Header()] = ""
    ) -> UploadedKernel | JSONResponse:
        """Store a signed kernel (201), or say that it was there (200); 422 where the bytes are not what they should be.

        With ``Content-Range: bytes FIRST-LAST/TOTAL`` the body goes on where an upload broke: from the offset that GET
        gives to the end.
        """
        digest = _digest(sha256)
        offset, total_bytes = _place_of(content_range, request.headers.get("content-length", ""))
        upload = KernelUpload(store, budget)
        try:
            async for chunk in _chunks(request, digest, offset, total_bytes):
                await upload.add(chunk)
            record, created = await upload.finish()
        except CorruptDataError as error:
            return refused_upload(error)
        except ClientDisconnect as error:
            raise UnavailableError("the upload broke; what came of it is kept where it may be") from error
        finally:
            upload.close()
        response.status_code = 201 if created else 200
        response.headers["Location"] = f"/v1/kernels/{record.artifact_id}"
        return UploadedKernel(artifact_id=record.artifact_id, created=created)

    return router


def _digest(sha256: str) -> bytes:
    if not _SHA256.fullmatch(sha256):
        raise InvalidInputError.of("sha256", "be 64 lower-case hex digits", sha256)
    return bytes.fromhex(sha256)


def _place_of(content_range: str, content_length: str) -> tuple[int, int]:
    """Give where a body begins, and the size of the whole."""
    if not content_range:
        if not _LENGTH.fullmatch(content_length):
            raise InvalidInputError.of("content-length", "be given where there is no content-range", content_length)
        return 0, int(content_length)
    found = _RANGE.fullmatch(content_range)
    first, last, total = (int(number) for number in found.groups()) if found else (1, 0, 0)
    if not first <= last == total - 1:
        rule = "be 'bytes FIRST-LAST/TOTAL' and go to the last byte of the whole"
        raise InvalidInputError.of("content-range", rule, content_range)
    return first, total


async def _chunks(request: Request, digest: bytes, offset: int, total_bytes: int) -> AsyncIterator[Chunk]:
    """Give a body as chunks; an empty one first, so that size and digest are judged before a byte is awaited."""
    async for arrived in _first_nothing(request.stream()):
        for start in range(0, len(arrived) or 1, MAX_CHUNK_BYTES):
            data = arrived[start : start + MAX_CHUNK_BYTES]
            yield Chunk(total_bytes=total_bytes, sha256=digest, offset=offset, data=data, crc32=zlib.crc32(data))
            offset += len(data)


async def _first_nothing(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b""
    async for arrived in stream:
        yield arrived
