"""What a call does is the same over a socket and within the process."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2

from esper.contracts.errors import (
    CapacityExceededError,
    DeadlineExceededError,
    EsperError,
    InternalError,
    InvalidInputError,
    InvalidStateError,
    all_error_types,
)
from esper.mesh import END_OF_STREAM, deadline_scope, incident_id, retry_delay_s

REASONS = [cls.reason for cls in all_error_types()]
TYPES = {cls.reason: cls for cls in all_error_types()}


async def test_single_request_and_response(mesh: Any, text: Any) -> None:
    assert (await mesh.stub.Say(text(value="hi"), timeout=5)).value == "hi"


async def test_stream_of_responses(mesh: Any, text: Any) -> None:
    assert [m.value async for m in mesh.stub.Count(text(value="40"))] == [str(n) for n in range(40)]


async def test_stream_of_requests_from_a_plain_iterator(mesh: Any, text: Any) -> None:
    assert (await mesh.stub.Join(iter([text(value="a"), text(value="b")]))).value == "a+b"


async def test_stream_of_requests_from_an_async_iterator(mesh: Any, text: Any) -> None:
    async def requests() -> Any:
        for number in range(50):
            yield text(value=str(number))

    assert (await mesh.stub.Join(requests())).value == "+".join(map(str, range(50)))


async def test_stream_of_requests_written_by_hand(mesh: Any, text: Any) -> None:
    call = mesh.stub.Join()
    await call.write(text(value="a"))
    await call.write(text(value="b"))
    await call.done_writing()
    assert (await call).value == "a+b"


async def test_streams_both_ways_take_turns(mesh: Any, text: Any) -> None:
    call = mesh.stub.Chat()
    for word in ("one", "two"):
        await call.write(text(value=word))
        assert (await call.read()).value == f"<{word}>"
    await call.done_writing()
    assert await call.read() is END_OF_STREAM
    assert await call.code() is grpc.StatusCode.OK


async def test_trailing_metadata_arrives(mesh: Any, text: Any) -> None:
    call = mesh.stub.Say(text(value="hi"))
    await call
    assert dict(await call.trailing_metadata())["echo"] == "done"


async def test_request_metadata_arrives(mesh: Any, text: Any) -> None:
    await mesh.stub.Say(text(value="hi"), metadata=(("run", "r1"),))
    assert mesh.servicer.metadata["run"] == "r1"


async def test_messages_are_not_shared(mesh: Any, text: Any) -> None:
    request = text(value="before")
    response = await mesh.stub.Say(request)
    request.value = response.value = "after"
    assert mesh.servicer.last_request.value == mesh.servicer.last_response.value == "before"


@pytest.mark.parametrize("reason", REASONS)
async def test_every_error_class_arrives_as_itself(mesh: Any, text: Any, reason: str) -> None:
    with pytest.raises(EsperError, match=r"^count must be at least 1, got 0 \(.* — ü\)$") as caught:
        await mesh.stub.Fail(text(value=reason), timeout=5)
    assert type(caught.value) is TYPES[reason]
    assert caught.value.parameter == "count"


async def test_panic_becomes_internal_and_keeps_its_text(
    mesh: Any, text: Any, echo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InternalError, match=r"Fail hit a defect of the service; incident [0-9a-f]{16}$") as caught:
        await mesh.stub.Fail(text(value="panic"), timeout=5)
    assert echo.secret not in str(caught.value)
    assert echo.secret not in repr(caught.value.__cause__)
    number = incident_id(caught.value)
    logged = [record for record in caplog.records if record.message == "rpc_defect"]
    assert [getattr(record, "incident_id", None) for record in logged] == [number]
    assert logged[0].exc_info is not None
    assert echo.secret in str(logged[0].exc_info[1])


async def test_error_in_the_middle_of_a_stream(mesh: Any, text: Any) -> None:
    call = mesh.stub.Chat(iter([text(value="a"), text(value="fail"), text(value="b")]))
    assert (await call.read()).value == "<a>"
    with pytest.raises(EsperError, match="NOT_FOUND"):
        await call.read()
    assert await call.code() is grpc.StatusCode.NOT_FOUND


async def test_servicer_that_aborts_by_hand(mesh: Any, text: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"Abort: OUT_OF_RANGE: by hand"):
        await mesh.stub.Abort(text(), timeout=5)


async def test_method_the_servicer_lacks(mesh: Any, text: Any) -> None:
    with pytest.raises(InvalidStateError, match=r"UNIMPLEMENTED: .*Missing is not offered by this server"):
        await mesh.stub.Missing(text(), timeout=5)


async def test_service_nobody_offers(mesh: Any, text: Any) -> None:
    with pytest.raises(InvalidStateError, match=r"esper.test.Nowhere/Nothing: UNIMPLEMENTED"):
        await mesh.stub.Unknown(text(), timeout=5)


async def test_deadline_of_the_caller_cancels_the_servicer(mesh: Any, text: Any) -> None:
    with pytest.raises(DeadlineExceededError, match=r"(?i)deadline"):
        await mesh.stub.Hold(text(), timeout=0.1)
    assert await asyncio.wait_for(mesh.servicer.ended.get(), 5) == "cancelled"


async def test_cancel_reaches_the_servicer(mesh: Any, text: Any) -> None:
    call = mesh.stub.Hold(text(), timeout=30)
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.wait_for(mesh.servicer.ended.get(), 5) == "cancelled"
    assert call.cancelled()


async def test_cancelled_awaiting_task_cancels_the_call(mesh: Any, text: Any) -> None:
    async def wait() -> None:
        await mesh.stub.Hold(text(), timeout=30)

    task = asyncio.create_task(wait())
    await asyncio.wait_for(mesh.servicer.held.get(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(mesh.servicer.ended.get(), 5) == "cancelled"


async def test_stream_left_early_is_closed_at_the_servicer(mesh: Any, text: Any) -> None:
    async def read_one() -> None:
        async for message in mesh.stub.HoldStream(text()):
            assert message.value == "first"
            break

    await read_one()
    gc.collect()
    await asyncio.wait_for(mesh.servicer.stream_closed.wait(), 5)


async def test_budget_left_is_handed_on(mesh: Any, text: Any) -> None:
    with deadline_scope(2.0):
        left_s = float((await mesh.stub.Budget(text(), timeout=60)).value)
    assert 1.0 < left_s <= 2.0


async def test_call_without_timeout_gets_the_channels_default(mesh: Any, text: Any) -> None:
    left_s = float((await mesh.stub.Budget(text())).value)
    assert 9.0 < left_s <= 10.0


async def test_admission_refuses_one_too_many_with_a_hint(mesh: Any, text: Any) -> None:
    running = [mesh.stub.Hold(text(), timeout=30) for _ in range(8)]
    for _ in running:
        await asyncio.wait_for(mesh.servicer.held.get(), 5)
    with pytest.raises(CapacityExceededError, match="the server must run at most 8 RPCs at once") as caught:
        await mesh.stub.Say(text(value="hi"), timeout=5)
    assert retry_delay_s(caught.value) == 0.5
    mesh.servicer.release.set()
    assert [message.value for message in await asyncio.gather(*running)] == ["held"] * 8
    assert (await mesh.stub.Say(text(value="again"), timeout=5)).value == "again"


async def test_metrics_count_by_code(mesh: Any, text: Any, echo: Any, come_true: Any) -> None:
    await mesh.stub.Say(text(value="hi"))
    with pytest.raises(EsperError, match="NOT_FOUND"):
        await mesh.stub.Fail(text(value="NOT_FOUND"), timeout=5)

    def count(method: str, code: str) -> Any:
        labels = {"service": echo.service, "method": method, "code": code}
        return mesh.registry.get_sample_value("esper_rpc_requests_total", labels)

    await come_true(lambda: count("Fail", "NOT_FOUND") == 1)
    assert count("Say", "OK") == 1
    latency = {"service": echo.service, "method": "Say"}
    assert mesh.registry.get_sample_value("esper_rpc_latency_seconds_count", latency) == 1
    assert mesh.registry.get_sample_value("esper_rpc_in_flight", {"service": echo.service}) == 0


async def test_access_log_names_the_outcome(
    mesh: Any, text: Any, come_true: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="esper.mesh.interceptors")
    with pytest.raises(EsperError, match="NOT_FOUND"):
        await mesh.stub.Fail(text(value="NOT_FOUND"), timeout=5)
    await come_true(lambda: "rpc_finished" in caplog.messages)
    (record,) = [record for record in caplog.records if record.message == "rpc_finished"]
    assert (record.rpc_method, record.code, record.reason) == ("Fail", "NOT_FOUND", "NOT_FOUND")  # type: ignore[attr-defined]
    assert record.duration_ms > 0  # type: ignore[attr-defined]


async def test_cancel_before_the_call_took_its_first_step(mesh: Any, text: Any) -> None:
    call = mesh.stub.Hold(text(), timeout=30)
    assert call.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await call
    assert not call.cancel()


async def test_failure_of_the_callers_own_iterator_is_what_the_caller_sees(mesh: Any, text: Any) -> None:
    async def requests() -> Any:
        yield text(value="a")
        raise LookupError("no more data on disk")

    async with asyncio.timeout(5):
        with pytest.raises(LookupError, match="no more data on disk"):
            await mesh.stub.Join(requests(), timeout=30)
    async with asyncio.timeout(5):
        with pytest.raises(LookupError, match="no more data on disk"):
            _ = [reply async for reply in mesh.stub.Chat(requests(), timeout=30)]


async def test_servicer_that_gives_something_else_is_internal(mesh: Any, text: Any) -> None:
    async def nothing(request: Any, context: Any) -> Any:
        return None

    mesh.servicer.say = nothing
    async with asyncio.timeout(5):
        with pytest.raises(InternalError):
            await mesh.stub.Say(text(value="hi"), timeout=5)


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [("text", "str"), (None, "NoneType"), (wrappers_pb2.BytesValue(), r"google\.protobuf\.BytesValue")],
)
async def test_request_of_the_wrong_type_is_refused_at_the_caller(mesh: Any, wrong: Any, shown: str) -> None:
    message = rf"request must be a google\.protobuf\.StringValue, got a {shown}"
    with pytest.raises(InvalidInputError, match=message):
        await mesh.stub.Say(wrong, timeout=5)
    with pytest.raises(InvalidInputError, match=message):
        await mesh.stub.Join(iter([wrong]), timeout=5)
    call = mesh.stub.Join()
    with pytest.raises(InvalidInputError, match=message):
        await call.write(wrong)
    call.cancel()
    assert mesh.servicer.calls == 0


async def test_two_hundred_streams_at_once_keep_their_order(mesh: Any, text: Any) -> None:
    async def one(length: int) -> list[str]:
        return [m.value async for m in mesh.stub.Count(text(value=str(length)), timeout=20)]

    for _ in range(25):
        lengths = range(20, 28)
        assert await asyncio.gather(*map(one, lengths)) == [[str(n) for n in range(length)] for length in lengths]
