"""Nissa over HTTP: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz`` for whoever runs the process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

from fastapi import FastAPI, Header, Response
from fastapi.responses import PlainTextResponse

from esper.contracts.errors import EsperError
from esper.services.nissa.exposition import MetricsPage


def build_app(page: MetricsPage, ready: Sequence[Callable[[], Awaitable[None]]]) -> FastAPI:
    """Give the application.

    Args:
        page: Renders the metrics.
        ready: Each returns while the service can do its work, and raises an `EsperError` when it cannot.
    """
    app = FastAPI(title="Nissa", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        body, content_type = await page.render(accept)
        return Response(body, media_type=None, headers={"Content-Type": content_type})

    @app.get("/healthz")
    async def is_alive() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def is_ready() -> PlainTextResponse:
        try:
            for check in ready:
                await check()
        except EsperError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)
        return PlainTextResponse("ok\n")

    return app
