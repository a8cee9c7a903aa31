"""Errors of the REST face: every one leaves as ``application/problem+json`` with the reason of the error tree."""

from __future__ import annotations

import logging
import secrets
from http import HTTPStatus
from typing import Any, Final

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from esper.contracts.errors import (
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InternalError,
    InvalidInputError,
)
from esper.mesh.status import RETRY_AFTER_S, code_of
from esper.services.urza.rest_models import Problem

log = logging.getLogger(__name__)

_MEDIA_TYPE: Final = "application/problem+json"
_STATUS_OF: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.ABORTED: HTTPStatus.CONFLICT,
}
"""gRPC code of an error to its HTTP status; what is not named is a fault of the server."""

PROBLEM_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    "default": {"model": Problem, "description": "An error, as RFC 9457 has it", "content": {_MEDIA_TYPE: {}}}
}
"""What the OpenAPI page says of errors."""


def problem_response(error: EsperError, *, incident_id: str | None = None) -> JSONResponse:
    """Give the response that stands for an error."""
    status = _STATUS_OF.get(code_of(type(error)), HTTPStatus.INTERNAL_SERVER_ERROR)
    return _response(status, error.reason, error.message, error.parameter, incident_id, RETRY_AFTER_S.get(type(error)))


def refused_upload(error: CorruptDataError) -> JSONResponse:
    """Give the response to bytes that are not what their sender, or their signature, says: no fault of the library."""
    return _response(HTTPStatus.UNPROCESSABLE_ENTITY, error.reason, error.message, error.parameter)


def install_error_handlers(app: FastAPI) -> None:
    """Have every error of an application leave as a problem."""
    app.add_exception_handler(EsperError, _on_esper_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)


async def _on_esper_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EsperError)
    status = _STATUS_OF.get(code_of(type(error)))
    if status is not None:
        return problem_response(error)
    return problem_response(error, incident_id=_report(request, error))


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "body"
    return problem_response(InvalidInputError(f"{where}: {first['msg']}", parameter=where))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    if status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return _response(status, CapacityExceededError.reason, str(error.detail))
    response = _response(status, status.name, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> JSONResponse:
    incident_id = _report(request, error)
    return problem_response(InternalError(f"the library hit a defect; incident {incident_id}"), incident_id=incident_id)


def _report(request: Request, error: Exception) -> str:
    """Log the error with its traceback under a fresh incident id, and give the id."""
    incident_id = secrets.token_hex(8)
    extra = {"method": request.method, "path": request.url.path, "incident_id": incident_id}
    log.error("rest_defect", exc_info=error, extra=extra)
    return incident_id


def _response(
    status: HTTPStatus,
    reason: str,
    detail: str,
    parameter: str | None = None,
    incident_id: str | None = None,
    retry_after_s: float | None = None,
) -> JSONResponse:
    problem = Problem(
        type=f"https://esper.dev/errors/{reason.lower().replace('_', '-')}",
        title=status.phrase,
        status=status.value,
        detail=detail,
        reason=reason,
        parameter=parameter,
        incident_id=incident_id,
    )
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
    return JSONResponse(
        problem.model_dump(exclude_none=True), status_code=status.value, media_type=_MEDIA_TYPE, headers=headers
    )
