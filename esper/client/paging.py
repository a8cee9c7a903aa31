"""Pages and repeated fields as domain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

from esper.contracts.wire import from_wire

T = TypeVar("T")


def decoded(messages: Iterable[Message], cls: type[T]) -> Iterator[T]:
    """Give the domain values of messages."""
    return (from_wire(message, cls) for message in messages)
