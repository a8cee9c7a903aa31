"""Kernels into the library over REST, over real sockets: proven, gone on with where they broke, never by halves."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.services.urza.rules import PageRequest
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.testing.urza_samples import kernel_bytes

KEY = SigningKey.generate()
TOKEN = "a-token-of-some-length"
WRITER = {"authorization": f"Bearer {TOKEN}"}
MIB = 1024 * 1024
PAYLOAD = kernel_bytes(KEY, weight_floats=700_000)
"""Two pieces and a bit."""


def path_of(payload: bytes) -> str:
    return f"/v1/kernels/uploads/{hashlib.sha256(payload).hexdigest()}"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[UrzaService]:
    config = UrzaConfig(
        database_url=f"sqlite:///{tmp_path}/urza.db",
        seed_templates=False,
        rest=True,
        rest_port=0,
        rest_write_token=TOKEN,
    )
    async with UrzaService(config, key_ring=KEY.ring()) as service:
        yield service


@pytest.fixture
async def rest(service: UrzaService) -> AsyncIterator[httpx.AsyncClient]:
    assert service.rest_url is not None
    async with httpx.AsyncClient(base_url=service.rest_url, timeout=60, headers=WRITER) as client:
        yield client


async def progress(rest: httpx.AsyncClient) -> tuple[int, str | None]:
    answer = await rest.get(path_of(PAYLOAD), params={"total_bytes": len(PAYLOAD)})
    assert answer.status_code == 200, answer.text
    return answer.json()["offset"], answer.json()["artifact_id"]


async def test_a_kernel_is_stored_once_and_comes_back(service: UrzaService, rest: httpx.AsyncClient) -> None:
    assert await progress(rest) == (0, None)
    first = await rest.put(path_of(PAYLOAD), content=PAYLOAD)
    artifact_id = first.json()["artifact_id"]
    assert (first.status_code, first.json()["created"]) == (201, True)
    assert first.headers["location"] == f"/v1/kernels/{artifact_id}"
    assert await progress(rest) == (len(PAYLOAD), artifact_id)
    again = await rest.put(path_of(PAYLOAD), content=PAYLOAD)
    assert (again.status_code, again.json()) == (200, {"artifact_id": artifact_id, "created": False})
    content = (await rest.get(f"/v1/kernels/{artifact_id}/content")).content
    manifest = verify(content, KEY.ring(), artifact_id=artifact_id).manifest
    found = await rest.get(f"/v1/kernels/by-content-key/{manifest.content_key}")
    assert found.json()["artifact_id"] == artifact_id
    assert (await rest.get(f"/v1/kernels/by-content-key/{'0' * 64}")).status_code == 404
    assert service.servicer.upload_bytes_held == 0


async def broken_upload(service: UrzaService, sent_bytes: int) -> None:
    """Send the beginning of a kernel, and close the connection once the library has taken it in."""
    assert service.rest_url is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", int(service.rest_url.rpartition(":")[2]))
    head = (
        f"PUT {path_of(PAYLOAD)} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-length: {len(PAYLOAD)}\r\n\r\n"
    )
    writer.write(head.encode() + PAYLOAD[:sent_bytes])
    await writer.drain()
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    async with asyncio.timeout(30):
        while service.servicer.upload_bytes_held:
            await service.ready()


async def test_an_upload_that_broke_goes_on_where_it_broke(service: UrzaService, rest: httpx.AsyncClient) -> None:
    await broken_upload(service, 2 * MIB + 1000)
    assert (await service.store.kernels.list(PageRequest())).items == ()
    offset, artifact_id = await progress(rest)
    assert (offset, artifact_id) == (2 * MIB, None)
    answer = await rest.put(path_of(PAYLOAD), content=PAYLOAD[offset:], headers=span(offset, len(PAYLOAD)))
    assert (answer.status_code, answer.json()["created"]) == (201, True)
    assert await progress(rest) == (len(PAYLOAD), answer.json()["artifact_id"])


def span(first: int, total: int) -> dict[str, str]:
    return {"content-range": f"bytes {first}-{total - 1}/{total}"}


@pytest.mark.parametrize(
    ("sent", "headers", "status", "reason", "said"),
    [
        (PAYLOAD[:-1] + b"\0", {}, 422, "CORRUPT_DATA", "sha256 must match"),
        (PAYLOAD[:-1], span(0, len(PAYLOAD)), 422, "CORRUPT_DATA", "must hold"),
        (PAYLOAD, span(0, 10), 422, "CORRUPT_DATA", "got more at offset"),
        (PAYLOAD[9:], span(9, len(PAYLOAD)), 409, "INVALID_STATE", "offset"),
        (b"", {}, 400, "INVALID_INPUT", "total_bytes must be > 0"),
        (b"x", {"content-range": "bytes 0-9/*"}, 400, "INVALID_INPUT", "must be 'bytes FIRST-LAST/TOTAL'"),
        (b"x", {"content-range": "bytes 0-3/10"}, 400, "INVALID_INPUT", "go to the last byte of the whole"),
        (b"x", span(0, 10**12), 400, "INVALID_INPUT", "total_bytes must be at most"),
        (PAYLOAD, {"authorization": "Bearer no"}, 403, "PERMISSION_DENIED", "may change the library"),
    ],
)  # fmt: skip
async def test_what_is_not_what_it_says_is_refused_and_nothing_is_stored(
    service: UrzaService,
    rest: httpx.AsyncClient,
    sent: bytes,
    headers: dict[str, str],
    status: int,
    reason: str,
    said: str,
) -> None:
    answer = await rest.put(path_of(PAYLOAD), content=sent, headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
    assert said in answer.json()["detail"]
    assert (await service.store.kernels.list(PageRequest())).items == ()
    assert service.servicer.upload_bytes_held == 0


async def test_a_stranger_s_kernel_and_a_digest_that_is_none_are_refused(
    service: UrzaService, rest: httpx.AsyncClient
) -> None:
    strange = kernel_bytes(SigningKey.generate())
    answer = await rest.put(path_of(strange), content=strange)
    assert (answer.status_code, answer.json()["reason"]) == (422, "SIGNATURE")
    for digest in ("0" * 63, "G" * 64, "..%2f" + "0" * 59):
        for answer in (
            await rest.put(f"/v1/kernels/uploads/{digest}", content=b"x"),
            await rest.get(f"/v1/kernels/uploads/{digest}", params={"total_bytes": 1}),
        ):
            assert answer.status_code in (400, 404), answer.text
    assert (await rest.get(path_of(PAYLOAD), params={"total_bytes": 0})).status_code == 400
    assert (await service.store.kernels.list(PageRequest())).items == ()


async def test_uploads_of_both_faces_share_one_bound(service: UrzaService, rest: httpx.AsyncClient) -> None:
    service.servicer.uploads.take(512 * MIB - len(PAYLOAD) + 1)
    answer = await rest.put(path_of(PAYLOAD), content=PAYLOAD)
    assert (answer.status_code, answer.json()["reason"]) == (429, "CAPACITY_EXCEEDED")
    service.servicer.uploads.give_back(1)
    assert (await rest.put(path_of(PAYLOAD), content=PAYLOAD)).status_code == 201
