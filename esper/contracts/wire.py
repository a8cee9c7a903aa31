"""The one codec between domain values and protobuf messages.

A domain dataclass and its message share field names, so one walk over the dataclass serves them all:

    domain                         wire
    frozen dataclass               message of the same name
    Enum member NAME               PREFIX_NAME; UNSPECIFIED and unknown numbers are refused
    T | None                       ``optional`` field or absent message
    tuple / list / Mapping         repeated / repeated / map
    datetime (UTC) / timedelta     Timestamp / Duration

Two pairs differ in shape and have their own functions: attribute values of the IR (a oneof) and the health report.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from typing import Any, Final, TypeVar, Union, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from esper.contracts import blueprint, decision, kernel, lesson, metrics, replay, run
from esper.contracts.blueprint import AttributeValue, Expression
from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.v1 import (
    blueprint_pb2,
    decision_pb2,
    kernel_pb2,
    nissa_service_pb2,
    replay_pb2,
    tamiyo_service_pb2,
    telemetry_pb2,
    tezzeret_service_pb2,
)

T = TypeVar("T")
M = TypeVar("M", bound=Message)
# The descriptor classes differ between protobuf's runtimes, and its type stubs cover only one of them.
FieldDescriptor = Any
EnumDescriptor = Any
F = TypeVar("F", bound=Callable[..., Any])

_MODULES: Final = (
    (blueprint, blueprint_pb2),
    (kernel, kernel_pb2),
    (kernel, tezzeret_service_pb2),
    (run, telemetry_pb2),
    (decision, decision_pb2),
    (lesson, tamiyo_service_pb2),
    (replay, replay_pb2),
    (metrics, nissa_service_pb2),
)
_RENAMED: Final[Mapping[type, type[Message]]] = {
    metrics.HealthReport: nissa_service_pb2.GetSystemHealthResponse,
}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800
_LAST_SECOND: Final = 253_402_300_799
_MAX_SECONDS: Final = 315_576_000_000
"""Bounds of protobuf's Timestamp and Duration."""


def message_types() -> Mapping[type, type[Message]]:
    """Give the message class of every domain dataclass that has one."""
    found: dict[type, type[Message]] = dict(_RENAMED)
    for domain_module, wire_module in _MODULES:
        for name, cls in vars(domain_module).items():
            message = getattr(wire_module, name, None)
            if dataclasses.is_dataclass(cls) and isinstance(cls, type) and isinstance(message, type):
                found[cls] = cast("type[Message]", message)
    return found


def _memo(function: F) -> F:
    """Keep the function's type: the stubs of ``functools.cache`` lose it, and refuse classes as keys."""
    return cast("F", cache(function))


_message_types = _memo(message_types)


def to_wire(value: object) -> Message:
    """Give the protobuf message of a domain value.

    Raises:
        InvalidInputError: The value's class has no message, or a field does not fit its type on the wire.
    """
    cls = type(value)
    message_cls = _message_types().get(cls)
    if message_cls is None:
        raise InvalidInputError.of("value", "be a domain value with a wire form", cls.__name__)
    message = message_cls()
    for name, fld in _wire_fields(cls, message_cls).items():
        item = getattr(value, name)
        if item is not None:
            try:
                _put(message, fld, item)
            except (TypeError, ValueError, OverflowError) as error:
                if isinstance(error, InvalidInputError):
                    raise
                raise InvalidInputError.of(f"{cls.__name__}.{name}", f"fit its wire type ({error})", item) from error
    return message


def to_message(value: object, message_type: type[M]) -> M:
    """Give the protobuf message of a domain value as the type it is known to have.

    Raises:
        InvalidInputError: The value's message is of another type, or a field does not fit.
    """
    message = to_wire(value)
    if not isinstance(message, message_type):
        raise InvalidInputError.of("value", f"have wire form {message_type.__name__}", type(value).__name__)
    return message


def from_wire(message: Message, cls: type[T]) -> T:
    """Give the domain value of a message.

    Raises:
        InvalidInputError: The message is of another type, an enum is unspecified or unknown, or a rule of the
            domain class is broken; the message names the field.
    """
    expected = _message_types().get(cls)
    if expected is None or not isinstance(message, expected):
        wanted = expected.DESCRIPTOR.full_name if expected else "a message with a domain form"
        raise InvalidInputError.of("message", f"be {wanted} for {cls.__name__}", message.DESCRIPTOR.full_name)
    hints = _hints(cls)
    values = {
        name: _take(message, fld, hints[name], f"{message.DESCRIPTOR.name}.{name}")
        for name, fld in _wire_fields(cls, expected).items()
    }
    return cls(**values)


def parse(data: bytes, cls: type[T]) -> T:
    """Give the domain value of serialised bytes.

    Raises:
        CorruptDataError: The bytes are not a message of the class.
        InvalidInputError: They are, but a field breaks its rule.
    """
    message_cls = _message_types().get(cls)
    if message_cls is None:
        raise InvalidInputError.of("cls", "be a domain class with a wire form", cls.__name__)
    message = message_cls()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise CorruptDataError(f"{message.DESCRIPTOR.full_name} does not parse: {error}") from error
    return from_wire(message, cls)


def serialize(value: object) -> bytes:
    """Give the deterministic bytes of a domain value's message."""
    return to_wire(value).SerializeToString(deterministic=True)


def enum_to_wire(member: Enum, descriptor: EnumDescriptor) -> int:
    """Give the number of a domain enum member on the wire, by name."""
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return int(descriptor.values_by_name[prefix + member.name].number)


def enum_from_wire(number: int, cls: type[Enum], descriptor: EnumDescriptor, parameter: str) -> Enum:
    """Give the domain enum member of a number; refuse UNSPECIFIED and unknown numbers.

    Raises:
        InvalidInputError: The number is 0 or unknown.
    """
    found = descriptor.values_by_number.get(number)
    if number == 0 or found is None:
        names = ", ".join(member.name for member in cls)
        shown = found.name if found else number
        raise InvalidInputError.of(parameter, f"be one of {names}", shown)
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return cls[found.name.removeprefix(prefix)]


def to_timestamp(moment: datetime) -> Timestamp:
    """Give the wire form of an aware moment, to the microsecond.

    Raises:
        InvalidInputError: The moment has no time zone.
    """
    if moment.tzinfo is None:
        raise InvalidInputError.of("datetime", "carry a time zone", moment)
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC).replace(tzinfo=None))
    return stamp


def from_timestamp(stamp: Timestamp, parameter: str = "timestamp") -> datetime:
    """Give the moment of a wire timestamp, in UTC.

    Raises:
        InvalidInputError: It lies outside the years 1 to 9999, or its nanoseconds outside a second.
    """
    if not (_FIRST_SECOND <= stamp.seconds <= _LAST_SECOND and 0 <= stamp.nanos < 10**9):
        rule = "be a moment of the years 1 to 9999"
        raise InvalidInputError.of(parameter, rule, f"{stamp.seconds} s and {stamp.nanos} ns")
    return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)


def _from_duration(span: Duration, parameter: str) -> timedelta:
    if not (abs(span.seconds) <= _MAX_SECONDS and abs(span.nanos) < 10**9):
        rule = "be within 10,000 years"
        raise InvalidInputError.of(parameter, rule, f"{span.seconds} s and {span.nanos} ns")
    return timedelta(seconds=span.seconds, microseconds=int(span.nanos / 1000))


@_memo
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@_memo
def _wire_fields(cls: type, message_cls: type[Message]) -> dict[str, FieldDescriptor]:
    by_name = message_cls.DESCRIPTOR.fields_by_name
    names = [field.name for field in dataclasses.fields(cls)]
    missing = [name for name in names if name not in by_name]
    assert not missing, f"{cls.__name__} has fields its message lacks: {missing}"
    return {name: by_name[name] for name in names}


def _put(message: Message, fld: FieldDescriptor, value: Any) -> None:
    target = getattr(message, fld.name)
    if _is_map(fld):
        for key, item in value.items():
            slot = fld.message_type.fields_by_name["value"]
            if slot.message_type is None:
                target[key] = item
            else:
                target[key].CopyFrom(_message_of(item))
    elif fld.is_repeated:
        target.extend(_scalar_or_message(fld, item) for item in value)
    elif fld.message_type is not None:
        target.CopyFrom(_message_of(value))
    else:
        setattr(message, fld.name, _scalar_or_message(fld, value))


def _scalar_or_message(fld: FieldDescriptor, value: Any) -> Any:
    if fld.enum_type is not None:
        return enum_to_wire(value, fld.enum_type)
    return value if fld.message_type is None else _message_of(value)


def _message_of(value: Any) -> Message:
    if isinstance(value, datetime):
        return to_timestamp(value)
    if isinstance(value, timedelta):
        duration = Duration()
        duration.FromTimedelta(value)
        return duration
    if isinstance(value, bool | int | float | str | Expression):
        return _attribute_to_wire(value)
    return to_wire(value)


def _take(message: Message, fld: FieldDescriptor, hint: Any, path: str) -> Any:
    hint, optional = _without_none(hint)
    if _is_map(fld):
        item_hint = typing.get_args(hint)[1]
        slot = fld.message_type.fields_by_name["value"]
        return {key: _convert(item, slot, item_hint, path) for key, item in getattr(message, fld.name).items()}
    value = getattr(message, fld.name)
    if fld.is_repeated:
        container: Callable[[list[Any]], Any] = list if typing.get_origin(hint) is list else tuple
        return container([_convert(item, fld, typing.get_args(hint)[0], path) for item in value])
    if fld.has_presence and not message.HasField(fld.name):
        if optional:
            return None
        if fld.message_type is not None and fld.message_type.full_name.startswith("google."):
            raise InvalidInputError.of(path, "be set", "nothing")
    if optional and fld.enum_type is not None and value == 0:
        return None
    return _convert(value, fld, hint, path)


def _convert(value: Any, fld: FieldDescriptor, hint: Any, path: str) -> Any:
    if fld.enum_type is not None:
        return enum_from_wire(value, hint, fld.enum_type, path)
    if fld.message_type is None:
        return value
    if isinstance(value, Timestamp):
        return from_timestamp(value, path)
    if isinstance(value, Duration):
        return _from_duration(value, path)
    if isinstance(value, blueprint_pb2.AttributeValue):
        return _attribute_from_wire(value, path)
    return from_wire(value, hint)


def _attribute_to_wire(value: AttributeValue) -> blueprint_pb2.AttributeValue:
    match value:
        case bool():
            return blueprint_pb2.AttributeValue(flag=value)
        case int():
            return blueprint_pb2.AttributeValue(integer=value)
        case float():
            return blueprint_pb2.AttributeValue(real=value)
        case Expression():
            return blueprint_pb2.AttributeValue(expression=value.text)
        case _:
            return blueprint_pb2.AttributeValue(word=value)


def _attribute_from_wire(value: blueprint_pb2.AttributeValue, path: str) -> AttributeValue:
    kind = value.WhichOneof("value")
    if kind is None:
        raise InvalidInputError.of(path, "hold a value in every attribute", "an empty attribute")
    found = getattr(value, kind)
    return Expression(found) if kind == "expression" else found


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        if len(rest) < len(typing.get_args(hint)):
            return (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007 - built at run time
    return hint, False


def _is_map(fld: FieldDescriptor) -> bool:
    return fld.message_type is not None and bool(fld.message_type.GetOptions().map_entry)
