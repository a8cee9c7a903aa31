"""The one table between Esper's errors and gRPC status codes, with the two conversions that use it.

On the wire an error is a ``google.rpc.Status`` whose ``ErrorInfo`` carries the class's stable ``reason``; the way
back reads that reason and never the text. A status without one (made by gRPC itself or a proxy) falls back to its code.
"""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from esper.contracts.errors import (
    AlreadyExistsError,
    CapacityExceededError,
    CompilationError,
    CorruptDataError,
    DeadlineExceededError,
    EsperError,
    InternalError,
    InvalidInputError,
    InvalidStateError,
    KernelExecutionError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    all_error_types,
)

ERROR_DOMAIN: Final = "esper.dev"
"""The ``ErrorInfo.domain`` of every status that Esper makes."""

DETAILS_KEY: Final = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES: Final = 1500  # the text travels twice, percent-encoded and in the details, within 8 KiB of metadata

STATUS_OF: Final[dict[type[EsperError], grpc.StatusCode]] = {
    EsperError: grpc.StatusCode.UNKNOWN,
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidStateError: grpc.StatusCode.FAILED_PRECONDITION,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    CapacityExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CorruptDataError: grpc.StatusCode.DATA_LOSS,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    CompilationError: grpc.StatusCode.FAILED_PRECONDITION,
    KernelExecutionError: grpc.StatusCode.ABORTED,
    InternalError: grpc.StatusCode.INTERNAL,
}
"""Error class to status code; a class that is not named has the code of its nearest named ancestor."""

ERROR_OF: Final[dict[grpc.StatusCode, type[EsperError]]] = {
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityExceededError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidStateError,
    grpc.StatusCode.ABORTED: InvalidStateError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInputError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidStateError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: CorruptDataError,
}
"""Status code to error class, for a status that carries no reason of ours."""

RETRY_AFTER_S: Final[dict[type[EsperError], float]] = {CapacityExceededError: 0.5, UnavailableError: 1.0}
"""Seconds a caller is told to wait; by exact class, since a spent budget or a taken port does not pass by waiting."""


def code_of(error_type: type[EsperError]) -> grpc.StatusCode:
    """Give the status code of an error class, inherited from the nearest ancestor in the table."""
    for cls in error_type.__mro__:
        code = STATUS_OF.get(cls)
        if code is not None:
            return code
    raise AssertionError(f"{error_type} is not an EsperError")


def to_status(error: EsperError, *, incident_id: str | None = None) -> status_pb2.Status:
    """Build the ``google.rpc.Status``: code, bounded message, ``ErrorInfo`` and, where it helps, ``RetryInfo``."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    if error.parameter is not None:
        info.metadata["parameter"] = _bounded(error.parameter, 256)
    if incident_id is not None:
        info.metadata["incident_id"] = incident_id
    status = status_pb2.Status(code=code_of(type(error)).value[0], message=_bounded(error.message, _MAX_MESSAGE_BYTES))
    status.details.add().Pack(info)
    retry_after_s = RETRY_AFTER_S.get(type(error))
    if retry_after_s is not None:
        delay = duration_pb2.Duration(nanos=0)
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def to_grpc_status(error: EsperError, *, incident_id: str | None = None) -> grpc.Status:
    """Build what ``ServicerContext.abort_with_status`` takes."""
    made: grpc.Status = rpc_status.to_status(to_status(error, incident_id=incident_id))
    return made


def from_rpc_error(error: grpc.RpcError, *, method: str | None = None) -> EsperError:
    """Give the Esper error that a failed call stands for.

    Args:
        error: What the gRPC library raised; sync and aio errors alike.
        method: ``package.Service/Method``, put before the text where gRPC itself wrote it.

    Returns:
        An error of the class whose reason the status carries, or, with none, of the class its code falls back to.
    """
    code = _code(error)
    details = rich_status(error)
    info = _detail(details, error_details_pb2.ErrorInfo)
    if details is not None and info is not None and info.domain == ERROR_DOMAIN:
        cls = _by_reason().get(info.reason, ERROR_OF.get(code, EsperError))
        return cls(details.message, parameter=info.metadata.get("parameter") or None)
    text = _text(error) or "no details were given"
    prefix = f"{method}: " if method else ""
    return ERROR_OF.get(code, EsperError)(f"{prefix}{code.name}: {text}")


def rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    """Give the ``google.rpc.Status`` in the trailing metadata, or ``None`` when there is none that can be read."""
    trailing: Any = getattr(error, "trailing_metadata", tuple)()
    for key, value in trailing or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:  # a garbled detail leaves the code to speak
                return None
    return None


def retry_delay_s(error: BaseException) -> float | None:
    """Give the seconds the server asked to wait, from a gRPC error or one mapped from it; ``None`` if unsaid."""
    source = error if isinstance(error, grpc.RpcError) else error.__cause__
    if not isinstance(source, grpc.RpcError):
        return None
    info = _detail(rich_status(source), error_details_pb2.RetryInfo)
    return None if info is None else float(info.retry_delay.ToNanoseconds()) / 1e9


def incident_id(error: BaseException) -> str | None:
    """Give the incident id to look up in the service's log, or ``None`` when the status carries none."""
    source = error if isinstance(error, grpc.RpcError) else error.__cause__
    if not isinstance(source, grpc.RpcError):
        return None
    info = _detail(rich_status(source), error_details_pb2.ErrorInfo)
    return None if info is None else info.metadata.get("incident_id") or None


def _by_reason() -> dict[str, type[EsperError]]:
    return {cls.reason: cls for cls in all_error_types()}


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = getattr(error, "code", lambda: None)()
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _text(error: grpc.RpcError) -> str:
    return str(getattr(error, "details", lambda: None)() or "")


def _detail(status: status_pb2.Status | None, kind: Any) -> Any:
    """Give the first detail of ``status`` that is a ``kind``, or ``None``."""
    for detail in () if status is None else status.details:
        if detail.Is(kind.DESCRIPTOR):
            found = kind()
            try:
                detail.Unpack(found)
            except DecodeError:
                return None
            return found
    return None


def _bounded(text: str, max_bytes: int) -> str:
    """Cut ``text`` to ``max_bytes`` of UTF-8, at a character's edge, with an ellipsis; lone surrogates become ``?``."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= max_bytes:
        return raw.decode("utf-8")
    return raw[: max_bytes - 3].decode("utf-8", errors="ignore") + "..."
