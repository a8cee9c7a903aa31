"""Mailboxes: messages that the publisher's loop takes off the bus and the training thread looks at when it likes.

The training side calls ``drain`` and ``settle``, which append to and pop from deques and do nothing else; the loop does
the waiting, the acknowledging and the repeating.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, Protocol, TypeVar

from google.protobuf.message import Message

from esper.contracts.errors import DeadlineExceededError, EsperError, InvalidInputError, UnavailableError
from esper.telemetry.bus import Bus, BusMessage, Delivery
from esper.telemetry.consumer import Received, messages, typed_consumer

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_REMEMBERED: Final = 4096
_FULL_S: Final = 0.02
_FORGET_AFTER_S: Final = 86_400.0
"""A reader that stays away for a day has lost its place; a run that ended leaves nothing behind."""


@dataclass(frozen=True, slots=True, eq=False)
class Mail(Generic[M]):
    """One message in a mailbox; settle a durable one exactly once, when its effect is in place."""

    message: M
    """The protobuf message."""
    raw: BusMessage
    """Subject, headers (trace context among them) and place in the stream."""
    box: Mailbox[M]
    """Where it lies."""

    def settle(self, *, give_up: str | None = None) -> None:
        """Say that it took effect, or give it up with a reason; returns at once, from any thread."""
        self.box.settled.append((self, give_up))


class Mailbox(Generic[M]):
    """Messages for one reader thread, filled by the publisher's loop."""

    def __init__(self, max_mail: int) -> None:
        if max_mail < 1:
            raise InvalidInputError.of("max_mail", "be >= 1", max_mail)
        self.max_mail = max_mail
        self.settled: deque[tuple[Mail[M], str | None]] = deque()
        self._mail: deque[Mail[M]] = deque()
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._mail)

    @property
    def dropped(self) -> int:
        """Fan-out messages thrown away, oldest first, because nobody drained them."""
        return self._dropped

    def drain(self) -> list[Mail[M]]:
        """Take everything that is there, oldest first; returns at once and never raises."""
        taken: list[Mail[M]] = []
        while self._mail:
            taken.append(self._mail.popleft())
        return taken

    def put(self, mail: Mail[M]) -> None:
        """Put a mail in; the publisher's loop alone calls this."""
        self._mail.append(mail)

    def make_room(self) -> None:
        """Drop the oldest until one more fits, and count; the publisher's loop alone calls this."""
        while len(self._mail) >= self.max_mail:
            try:
                self._mail.popleft()
            except IndexError:  # drained in between
                return
            self._dropped += 1


Watch = Callable[["Mail[M]"], None]
"""Told of each mail just before the reader can see it, on the publisher's loop; must not wait."""


class Feed(Protocol):
    """What fills a mailbox; the publisher's loop runs it."""

    async def run(self, bus: Bus, opened: Callable[[], None]) -> None:
        """Fill the mailbox until the bus is closed; call ``opened`` once live."""

    async def tend(self, elapsed_s: float) -> None:
        """Do what the reader asked for since the last call, ``elapsed_s`` seconds ago."""


class FanOutFeed(Generic[M]):
    """Fills a mailbox with fan-out messages of one pattern."""

    def __init__(self, box: Mailbox[M], pattern: str, message_type: type[M]) -> None:
        self.box = box
        self._pattern = pattern
        self._message_type = message_type

    async def run(self, bus: Bus, opened: Callable[[], None]) -> None:
        """Fill it until the bus is closed."""
        subscription = await messages(bus, self._pattern, self._message_type)
        opened()
        async for received in subscription:
            self.box.make_room()
            self.box.put(Mail(received.message, received.raw, self.box))

    async def tend(self, elapsed_s: float) -> None:
        """Forget what was settled; nobody waits for it."""
        del elapsed_s
        self.box.settled.clear()


class DurableFeed(Generic[M]):
    """Fills a mailbox with durable messages, each handed over once, and settles them as the reader says.

    A message that comes again while it lies unread, is being worked on, or was settled with an acknowledgement that
    got lost, is not handed over again. The broker hears of what was settled while ``answered`` says that nothing waits
    which its reader answered before: acknowledged earlier, a command would be lost with the answer.
    """

    ack_wait_s: ClassVar[float] = 30.0
    """Time after which what was not acknowledged comes again, to whoever reads then, in seconds."""

    def __init__(
        self,
        box: Mailbox[M],
        stream: str,
        durable_name: str,
        message_type: type[M],
        subject_filter: str | Sequence[str],
        *,
        watch: Watch[M] | None = None,
        answered: Callable[[], bool],
    ) -> None:
        self.box = box
        self._watch = watch
        self._answered = answered
        self._stream = stream
        self._durable_name = durable_name
        self._message_type = message_type
        self._subject_filter = subject_filter
        self._open: dict[int, Delivery] = {}
        self._done: dict[int, str | None] = {}
        self._since_touch_s = 0.0

    async def run(self, bus: Bus, opened: Callable[[], None]) -> None:
        """Fill it until the bus is closed."""
        raw = await bus.consume(
            self._stream,
            self._durable_name,
            self._subject_filter,
            ack_wait_s=self.ack_wait_s,
            max_deliver=1_000_000,  # redelivery after an outage is no failure of the message
            batch=min(64, self.box.max_mail),
            forget_after_s=_FORGET_AFTER_S,
        )
        consumer = typed_consumer(raw, self._message_type)
        opened()
        try:
            async for received in consumer:
                await self._take(received)
                while len(self.box) >= self.box.max_mail:  # noqa: ASYNC110 - the reader's thread sets no event
                    await asyncio.sleep(_FULL_S)
        finally:
            await self._release()

    async def tend(self, elapsed_s: float) -> None:
        """Settle what the reader settled, and keep the rest from coming again."""
        while self.box.settled and self._answered():  # in this order: what is settled by now was answered before
            mail, give_up = self.box.settled.popleft()
            sequence = int(mail.raw.sequence or 0)
            delivery = self._open.pop(sequence, None)
            self._remember(sequence, give_up)
            if delivery is not None:
                await _settle(delivery, give_up)
        self._since_touch_s += elapsed_s
        if self._since_touch_s > self.ack_wait_s / 3:
            self._since_touch_s = 0.0
            await self._touch_all()

    async def _take(self, received: Received[M]) -> None:
        delivery = received.delivery
        if delivery is None:
            return
        sequence = int(received.raw.sequence or 0)
        if sequence in self._done:
            await _settle(delivery, self._done[sequence])
            return
        known = sequence in self._open
        self._open[sequence] = delivery
        if not known:
            mail = Mail(received.message, received.raw, self.box)
            self._announce(mail)  # first, so that the reader finds done what can be done for it
            self.box.put(mail)

    def _announce(self, mail: Mail[M]) -> None:
        """Tell who watches; what goes wrong there keeps no mail from its reader."""
        if self._watch is None:
            return
        try:
            self._watch(mail)
        except Exception:
            log.exception("mail_watch_failed", extra={"subject": mail.raw.subject})

    async def _release(self) -> None:
        """Settle what was settled and give the rest back at once; on the first failure leave it to the clock."""
        await self.tend(0.0)
        try:
            for delivery in self._open.values():
                await delivery.nak(reason="the reader ended")
        except EsperError as error:
            log.warning("mail_not_released", extra={"error": str(error)})
        self._open.clear()

    async def _touch_all(self) -> None:
        """Start every clock again; on the first failure leave the rest, they come again and are known."""
        for delivery in list(self._open.values()):
            try:
                await delivery.in_progress()
            except (UnavailableError, DeadlineExceededError) as error:
                log.warning("in_progress_postponed", extra={"error": str(error)})
                return

    def _remember(self, sequence: int, give_up: str | None) -> None:
        self._done[sequence] = give_up
        while len(self._done) > _REMEMBERED:
            del self._done[next(iter(self._done))]


async def _settle(delivery: Delivery, give_up: str | None) -> None:
    try:
        if give_up is None:
            await delivery.ack()
        else:
            await delivery.term(give_up)
    except (UnavailableError, DeadlineExceededError) as error:  # it comes again, and is settled then
        log.warning("settling_postponed", extra={"subject": delivery.message.subject, "error": str(error)})
