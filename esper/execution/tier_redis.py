"""The second cache tier as a Redis server that the machines of a mesh share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from esper.contracts.errors import ConfigError, InvalidInputError, NotFoundError, StorageFullError, UnavailableError
from esper.execution.artifact import require_artifact_id

KEY_PREFIX: Final = "esper:kernel:v1:"
"""What every key begins with; the artefact id follows."""


class RedisTier:
    """Artefacts in Redis; belongs to the event loop that first calls it."""

    bytes_held: Final[int | None] = None

    def __init__(self, url: str, *, ttl_s: int | None = None, timeout_s: float = 2.0) -> None:
        """Prepare a tier; connects on the first call.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            ttl_s: Life of an entry, in seconds; ``None`` leaves it to the server's own eviction.
            timeout_s: Longest wait for the server, in seconds.

        Raises:
            ConfigError: The URL is of another kind.
            InvalidInputError: A number is not above 0.
        """
        if ttl_s is not None and ttl_s < 1:
            raise InvalidInputError.of("ttl_s", "be >= 1 second", ttl_s)
        if not timeout_s > 0:
            raise InvalidInputError.of("timeout_s", "be > 0 seconds", timeout_s)
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ConfigError(f"redis url must begin with redis://, rediss:// or unix://, got {parts.scheme!r}")
        self._shown = f"redis at {parts.hostname}:{parts.port or 6379}" if parts.hostname else f"redis at {parts.path}"
        self._ttl_s = ttl_s
        self._redis: Redis[bytes] = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # a pooled connection may have died with the server's last restart
        )

    async def read(self, artifact_id: str) -> bytes:
        """Give an entry's bytes.

        Raises:
            NotFoundError: There is no such entry.
            UnavailableError: Redis cannot be reached.
        """
        async with self._translated():
            data: bytes | None = await self._redis.get(_key(artifact_id))
        if data is None:
            raise NotFoundError(f"{self._shown} has no {artifact_id}")
        return data

    async def write(self, artifact_id: str, data: bytes) -> None:
        """Keep an entry.

        Raises:
            StorageFullError: Redis is at its memory limit and evicts nothing.
            UnavailableError: Redis cannot be reached.
        """
        async with self._translated():
            await self._redis.set(_key(artifact_id), data, ex=self._ttl_s)

    async def erase(self, artifact_id: str) -> None:
        """Drop an entry; no error when there is none.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        async with self._translated():
            await self._redis.delete(_key(artifact_id))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()  # type: ignore[attr-defined]  # the stubs know an older client

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except ResponseError as error:
            if type(error).__name__ == "OutOfMemoryError":  # by name: the type stubs know an older client
                raise StorageFullError(f"{self._shown} has no room left: {error}") from error
            raise UnavailableError(f"{self._shown} refused: {error}") from error
        except (RedisError, OSError) as error:
            raise UnavailableError(f"{self._shown} cannot be reached: {error}") from error


def _key(artifact_id: str) -> str:
    return KEY_PREFIX + require_artifact_id(artifact_id)
