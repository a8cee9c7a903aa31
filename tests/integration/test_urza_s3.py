"""Bytes of kernels in S3: the library's contract over a real socket, and a place that goes away.

What they need is 132 MB and holds python-dateutil below 3 (``constraints.txt`` has 4), so it is no part of ``dev``.
They skip without it; ``pip install --target DIR s3fs "moto[s3]" flask flask-cors`` and ``PYTHONPATH=DIR`` bring it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts.errors import UnavailableError
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.mesh.ports import free_port
from esper.services.urza.blobs import Blobs
from esper.services.urza.store import UrzaStore
from esper.testing.urza_contract import content
from esper.testing.urza_kernel_contract import KEY, OutsideKernelStoreContract, RetentionContract, RotContract
from esper.testing.urza_samples import kernel_bytes
from tests import urza_on_sqlite

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask_cors")

database, path = urza_on_sqlite.database, urza_on_sqlite.path
rot, texts_may_break = urza_on_sqlite.rot, urza_on_sqlite.texts_may_break


class Server:
    """An S3 server on loopback that can be stopped and started again; it keeps what it holds in memory."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        port = self.url.rpartition(":")[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        assert any("Running on" in line for line in self._process.stderr), "the server ended"
        self._listener = threading.Thread(target=deque, args=(self._process.stderr, 0))  # or it stops at a full pipe
        self._listener.start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._listener.join(10)
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    """One server for the module; the library's own client finds it through its environment, as in production."""
    server = Server()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "at-all",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.start()
    yield server
    server.kill()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def place(s3: Server) -> str:
    del s3
    return f"s3://kernels-{uuid.uuid4().hex}/library"


class TestKernelStoreInS3(OutsideKernelStoreContract):
    pass


class TestRotInS3(RotContract):
    pass


class TestRetentionInS3(RetentionContract):
    pass


async def test_replicas_see_what_each_of_them_stored_and_removed(database: Database, place: str) -> None:
    """Each has a client of its own, which remembers nothing of the place."""
    one, other = (UrzaStore(database, key_ring=KEY.ring(), blobs=Blobs(place)) for _ in range(2))
    await one.migrate()
    await other.migrate()
    for number in range(3):
        payload = kernel_bytes(KEY, number, weight_floats=400_000)
        record, _ = await one.kernels.put(payload)
        assert await content(other, record.artifact_id) == payload
        assert await content(other, record.artifact_id, len(payload) - 7) == payload[-7:]
        assert await other.kernels.remove(record.artifact_id)
        assert (await one.kernels.put(payload))[1], "it is no longer there, and is stored anew"
        assert await content(other, record.artifact_id) == payload


async def test_pieces_beyond_the_end_and_of_nothing_are_empty(place: str) -> None:
    blobs = Blobs(place)
    await blobs.prepare()
    await blobs.write("a" * 32, b"12345")
    await blobs.write("b" * 32, b"")
    assert await blobs.read("a" * 32, 3, 100) == b"45"
    assert await blobs.read("a" * 32, 5, 100) == b""
    assert await blobs.read("a" * 32, 70, 100) == b""
    assert await blobs.read("b" * 32, 0, 100) == b""
    assert await blobs.read("c" * 32, 0, 100) is None
    await blobs.write("a" * 32, b"another")
    assert await blobs.read("a" * 32, 0, 100) == b"another"
    await blobs.delete("a" * 32)
    await blobs.delete("a" * 32)
    assert await blobs.read("a" * 32, 0, 100) is None


async def test_a_bucket_that_is_gone_is_unavailable_and_named_without_secrets(database: Database, place: str) -> None:
    import fsspec

    store = UrzaStore(database, key_ring=KEY.ring(), blobs=Blobs(place))
    await store.migrate()
    record, _ = await store.kernels.put(kernel_bytes(KEY))
    await store.ping()
    elsewhere = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    bucket = place.removeprefix("s3://").partition("/")[0]
    elsewhere.rm(bucket, recursive=True)
    with pytest.raises(UnavailableError, match=r"blobs_url s3://\.\.\. cannot be used: .* its mark esper-blobs"):
        await content(store, record.artifact_id)
    with pytest.raises(UnavailableError, match="its mark esper-blobs is not there"):
        await store.ping()
    assert (await store.kernels.get(artifact_id=record.artifact_id)).artifact_id == record.artifact_id


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing that the client looks for is there, and no client of another test is taken over."""
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("no_credentials")
async def test_credentials_that_are_missing_are_named_when_the_place_is_made_ready(place: str) -> None:
    blobs = Blobs(place)
    with pytest.raises(UnavailableError, match=r"blobs_url s3://\.\.\. cannot be used: .*credentials"):
        await blobs.prepare()
    with pytest.raises(UnavailableError, match=r"blobs_url s3://\.\.\. cannot be used: .*credentials"):
        await blobs.read("a" * 32, 0, 10)


async def test_a_server_that_is_away_is_unavailable_within_a_minute(
    database: Database, s3: Server, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = SigningKey.generate()
    store = UrzaStore(database, key_ring=key.ring(), blobs=Blobs(place))
    await store.migrate()
    s3.kill()
    try:
        with pytest.raises(UnavailableError, match=r"blobs_url s3://\.\.\. cannot be used: ") as refused:
            await store.kernels.put(kernel_bytes(key))
        assert "at-all" not in str(refused.value) + caplog.text
        with pytest.raises(UnavailableError):
            await store.ping()
    finally:
        s3.start()
    await store.migrate()  # the server remembers nothing
    assert (await store.kernels.put(kernel_bytes(key)))[1]
