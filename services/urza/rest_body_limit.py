"""Refuses bodies beyond a bound before they fill the memory, whether or not the caller said how long they are."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware that answers 413 to a body of more than ``max_bytes`` bytes.

    What is PUT under ``bounded_elsewhere`` passes: whoever takes it there judges its size.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, bounded_elsewhere: str) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._bounded_elsewhere = bounded_elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, counting the bytes of its body as they come."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, f"the body must be at most {self._max_bytes} bytes, got more")
            return message

        passes = scope["type"] != "http" or (
            scope["method"] == "PUT" and scope["path"].startswith(self._bounded_elsewhere)
        )
        await self._app(scope, receive if passes else counted, send)
