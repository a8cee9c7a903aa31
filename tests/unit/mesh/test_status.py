"""The table between errors and status codes, walked as a whole."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from esper.contracts.errors import (
    BudgetExceededError,
    CapacityExceededError,
    CorruptDataError,
    EsperError,
    InternalError,
    InvalidInputError,
    InvalidStateError,
    NotFoundError,
    PermissionDeniedError,
    PortInUseError,
    UnavailableError,
    all_error_types,
)
from esper.mesh import ERROR_DOMAIN, ERROR_OF, STATUS_OF, code_of, from_rpc_error, incident_id, retry_delay_s
from esper.mesh.status import rich_status, to_grpc_status, to_status

DETAILS = "grpc-status-details-bin"


def as_rpc_error(code: grpc.StatusCode, text: str, details: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*([] if details is None else [(DETAILS, details)]))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=text, debug_error_string=None)


def over_the_wire(error: EsperError, incident: str | None = None) -> grpc.aio.AioRpcError:
    status = to_grpc_status(error, incident_id=incident)
    details = dict(status.trailing_metadata)[DETAILS]
    assert isinstance(details, bytes)
    return as_rpc_error(status.code, status.details, details)


@pytest.mark.parametrize("cls", all_error_types())
def test_every_class_resolves_to_a_failure(cls: type[EsperError]) -> None:
    assert code_of(cls) is not grpc.StatusCode.OK


@pytest.mark.parametrize("cls", all_error_types())
def test_every_class_comes_back_as_itself(cls: type[EsperError]) -> None:
    back = from_rpc_error(over_the_wire(cls("alpha must be within [0, 1], got 2", parameter="alpha")))
    assert (type(back), back.message, back.parameter) == (cls, "alpha must be within [0, 1], got 2", "alpha")


def test_reasons_are_unique() -> None:
    reasons = [cls.reason for cls in all_error_types()]
    assert len(set(reasons)) == len(reasons)


def test_every_code_but_ok_falls_back_to_a_class() -> None:
    assert set(ERROR_OF) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", list(ERROR_OF))
def test_status_without_a_reason_falls_back_by_code(code: grpc.StatusCode) -> None:
    error = from_rpc_error(as_rpc_error(code, "from a proxy"), method="esper.v1.UrzaService/Get")
    assert type(error) is ERROR_OF[code]
    assert error.message == f"esper.v1.UrzaService/Get: {code.name}: from a proxy"


def test_subclass_inherits_the_code_of_its_nearest_named_ancestor() -> None:
    assert PortInUseError not in STATUS_OF
    assert code_of(PortInUseError) is grpc.StatusCode.UNAVAILABLE


def test_details_name_reason_domain_and_parameter() -> None:
    status = to_status(NotFoundError("id must exist, got 'x'", parameter="id"))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("NOT_FOUND", ERROR_DOMAIN, {"parameter": "id"})


@pytest.mark.parametrize(
    ("error", "delay_s"),
    [
        (CapacityExceededError("full"), 0.5),
        (UnavailableError("away"), 1.0),
        (BudgetExceededError("spent"), None),
        (PortInUseError("taken"), None),
        (InvalidInputError("bad"), None),
    ],
)
def test_retry_hint_only_where_waiting_helps(error: EsperError, delay_s: float | None) -> None:
    assert retry_delay_s(over_the_wire(error)) == delay_s


def test_hints_are_read_through_a_mapped_error() -> None:
    source = over_the_wire(InternalError("broken"), incident="abc123")
    mapped = from_rpc_error(source)
    mapped.__cause__ = source
    assert incident_id(mapped) == "abc123"
    assert retry_delay_s(mapped) is None
    assert incident_id(ValueError("local")) is None
    assert retry_delay_s(ValueError("local")) is None


def test_foreign_domain_is_not_ours_to_read() -> None:
    status = status_pb2.Status(code=3, message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_FOUND", domain="example.com"))
    error = from_rpc_error(as_rpc_error(grpc.StatusCode.INVALID_ARGUMENT, "m", status.SerializeToString()))
    assert type(error) is InvalidInputError


def test_unknown_reason_of_a_newer_server_falls_back_by_code() -> None:
    status = status_pb2.Status(code=9, message="newer")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain=ERROR_DOMAIN))
    error = from_rpc_error(as_rpc_error(grpc.StatusCode.FAILED_PRECONDITION, "newer", status.SerializeToString()))
    assert (type(error), error.message) == (InvalidStateError, "newer")


def test_garbled_details_leave_the_code_to_speak() -> None:
    source = as_rpc_error(grpc.StatusCode.DATA_LOSS, "cut", b"\xff\xff\xff")
    assert rich_status(source) is None
    assert type(from_rpc_error(source)) is CorruptDataError


def test_garbled_reason_leaves_the_code_to_speak() -> None:
    garbled = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    status = status_pb2.Status(code=5, message="m", details=[garbled])
    error = from_rpc_error(as_rpc_error(grpc.StatusCode.NOT_FOUND, "m", status.SerializeToString()))
    assert (type(error), error.message) == (NotFoundError, "NOT_FOUND: m")


def test_details_of_another_kind_are_skipped() -> None:
    status = status_pb2.Status(code=7, details=[any_pb2.Any(type_url="type.googleapis.com/unknown", value=b"?")])
    error = from_rpc_error(as_rpc_error(grpc.StatusCode.PERMISSION_DENIED, "", status.SerializeToString()))
    assert (type(error), error.message) == (PermissionDeniedError, "PERMISSION_DENIED: no details were given")


def test_bare_rpc_error_is_internal() -> None:
    assert type(from_rpc_error(grpc.RpcError())) is InternalError


@pytest.mark.parametrize("text", ["x" * 100_000, "ü" * 50_000, "\x00" * 10_000, "\ud800 lone surrogate"])
def test_long_or_odd_messages_fit_into_metadata(text: str) -> None:
    status = to_grpc_status(InvalidInputError(text, parameter="p" * 10_000))
    details = dict(status.trailing_metadata)[DETAILS]
    percent_encoded = 3 * len(status.details.encode())
    assert percent_encoded + len(details) * 4 / 3 < 8 * 1024
