"""What a layer holds as ``layer.oona_client``: the run's name, its signal ring and its publisher, in one object."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Self

from google.protobuf.message import Message

from esper.contracts.errors import InvalidStateError
from esper.telemetry.publisher import Connect, OonaPublisher, PublisherConfig, PublisherStats, SignalSource
from esper.telemetry.subjects import Kind, build_subject, check_run_id, encode_layer


class OonaClient:
    """The training side's end of Oona; made when a model is wrapped, connected when a session begins.

    Before ``connect`` nothing leaves the process: signals stay in the ring and events in a bounded queue, both drop
    their oldest and count, and what is still there goes out once connected. Every method but ``connect`` and ``close``
    returns at once. A deep copy of a model shares its client.
    """

    def __init__(
        self, run_id: str | None = None, ring: SignalSource | None = None, *, config: PublisherConfig | None = None
    ) -> None:
        self.ring = ring
        self._layers: dict[str, int] = {}
        self._publisher = OonaPublisher(run_id or f"run-{uuid.uuid4().hex[:12]}", source=ring, config=config)
        self._connected = False
        self._emitted = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __copy__(self) -> Self:
        return self

    @property
    def run_id(self) -> str:
        """The run it speaks for."""
        return self._publisher.run_id

    @property
    def publisher(self) -> OonaPublisher:
        """The thread behind it, for mailboxes and coroutines on its loop."""
        return self._publisher

    @property
    def connected(self) -> bool:
        """Whether it has a bus, which may be away at the moment."""
        return self._connected

    @property
    def layers(self) -> Mapping[str, int]:
        """Number of every registered layer, as it stands in the signals."""
        return dict(self._layers)

    def register_layer(self, layer: str) -> int:
        """Give the number that stands for a layer in this run's signals; the same name keeps its number.

        Raises:
            InvalidInputError: The name is too long for a subject.
        """
        if layer not in self._layers:
            encode_layer(layer)
            self._layers[layer] = len(self._layers)
            self._publisher.name_layers({number: name for name, number in self._layers.items()})
        return self._layers[layer]

    def emit(self, kind: Kind | str, message: Message, *, layer: str | None = None, msg_id: str | None = None) -> None:
        """Hand an event of this run over; returns at once and never fails for want of a bus.

        Raises:
            InvalidInputError: ``kind`` or ``layer`` does not make a subject.
        """
        subject = build_subject(self.run_id, kind, layer)
        self._emitted = True
        self._publisher.offer(subject, message, durable=Kind(kind).durable, msg_id=msg_id)

    def assume_run(self, run_id: str) -> None:
        """Speak for this run from now on; a session calls it before anything was emitted.

        Raises:
            InvalidInputError: The id is illegal.
            InvalidStateError: It is connected, or has emitted under its old name.
        """
        check_run_id(run_id)
        if run_id == self.run_id:
            return
        if self._connected or self._emitted:
            raise InvalidStateError(f"the Oona client must keep the run it has spoken for, {self.run_id}, got {run_id}")
        self._publisher.run_id = run_id

    def connect(self, connect: Connect, *, timeout_s: float = 15.0) -> None:
        """Open the bus with ``connect`` and start the publisher thread; blocks until it is open.

        Raises:
            InvalidStateError: It is connected already.
            UnavailableError: The bus cannot be reached.
        """
        if self._connected:
            raise InvalidStateError(f"the Oona client of run {self.run_id} is connected already")
        self._publisher.start(connect, timeout_s=timeout_s)
        self._connected = True

    def stats(self) -> PublisherStats:
        """Give what was published, dropped and is waiting."""
        return self._publisher.stats()

    def close(self, deadline_s: float = 5.0) -> None:
        """Send what waits within ``deadline_s`` seconds, then end the thread; idempotent."""
        self._publisher.close(deadline_s)
