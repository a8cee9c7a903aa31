"""What a session remembers of itself: the last good snapshot in memory, and checkpoints on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from types import NoneType
from typing import Any, Final, Protocol

from torch.optim.swa_utils import AveragedModel

from esper.contracts.errors import CorruptDataError, EsperError, InvalidInputError, InvalidStateError
from esper.contracts.run import AdaptationOutcome
from esper.core.adaptation import Adaptation
from esper.core.averaging import GrowingAverage
from esper.core.capture import (
    Stateful,
    TrainingState,
    capture_model,
    capture_optimizer,
    cloned,
    fitting,
    restore_model,
    restore_optimizer,
)
from esper.core.context import RunContext
from esper.core.orchestrator import SeedOrchestrator
from esper.core.randomness import capture_random_state, restore_random_state

log = logging.getLogger(__name__)


_FORM: Final = {
    "run_id": (str,),
    "life": (str,),
    "packets": (int,),
    "epoch": (int,),
    "step": (int,),
    "epoch_began_step": (int,),
    "last_epoch_steps": (int, NoneType),
    "control_loss": (float,),
}
"""Types of the plain values of component ``tolaria``."""


class CheckpointStore(Protocol):
    """Where checkpoints go; ``esper.recovery.CheckpointManager`` is one."""

    @property
    def interval_s(self) -> float:
        """Seconds between two scheduled checkpoints."""

    def save_state(self, state: Mapping[str, Mapping[str, Any]]) -> str:
        """Write component states by name; give the id."""

    def load_state(self, checkpoint_id: str) -> dict[str, Mapping[str, Any]]:
        """Give component states by name."""


class RunMemory:
    """Snapshots and checkpoints of one run; belongs to the training thread."""

    def __init__(self, context: RunContext, orchestrator: SeedOrchestrator, store: CheckpointStore | None) -> None:
        self._context = context
        self._orchestrator = orchestrator
        self._store = store
        self._tracked: dict[str, Stateful] = {}
        self._snapshot: TrainingState | None = None
        self._last_saved_s = time.monotonic()
        self.rollbacks = 0

    def track(self, name: str, item: Stateful) -> None:
        """Let snapshots and checkpoints hold the item's state.

        Raises:
            InvalidInputError: The name is taken, or the item is an average that cannot grow.
        """
        if name in self._tracked:
            raise InvalidInputError.of("name", "be new", name)
        if isinstance(item, AveragedModel) and not isinstance(item, GrowingAverage):
            rule = (
                "be a GrowingAverage (esper.core.averaging), for an AveragedModel pairs parameters by number and mixes "
            )
            raise InvalidInputError.of(f"tracked {name!r}", f"{rule}them up when a seed comes", type(item).__name__)
        self._tracked[name] = item
        if self._snapshot is not None:  # it may be needed before the epoch is over
            self._snapshot["tolaria"]["tracked"][name] = cloned(item.state_dict())

    def capture(self) -> TrainingState:
        """Give the whole training state; the tensors are the live ones."""
        self._orchestrator.end_failed_fades()
        self._orchestrator.bear_due(every=True)
        context, clock = self._context, self._context.clock
        tolaria = {
            "run_id": context.run_id,
            "life": clock.life,
            "packets": clock.packets,
            "epoch": clock.epoch,
            "step": clock.step,
            "epoch_began_step": clock.epoch_began_step,
            "last_epoch_steps": clock.last_epoch_steps,
            "control_loss": context.control_loss,
            "optimizer": capture_optimizer(context.optimizer, context.model),
            "tracked": {name: item.state_dict() for name, item in self._tracked.items()},
            "random": capture_random_state(),
        }
        return {
            "tolaria": tolaria,
            "kasmina": capture_model(context.model),
            "orchestrator": self._orchestrator.state_dict(),
        }

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the whole training state back.

        Raises:
            EsperError: It does not fit this model, optimizer or set of tracked objects, and may be there in part.
        """
        with fitting("training state"):
            self._restore(state)

    def _restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        context, tolaria = self._context, state["tolaria"]
        _check_form(tolaria)
        if set(tolaria["tracked"]) != set(self._tracked):
            raise InvalidStateError(
                f"tracked objects must be {sorted(tolaria['tracked'])} as saved, got {sorted(self._tracked)}",
                parameter="track",
            )
        self._orchestrator.let_go()
        context.optimizer.zero_grad()
        restore_model(context.model, state["kasmina"])
        restore_optimizer(context.optimizer, context.model, tolaria["optimizer"])
        for name, item in self._tracked.items():
            item.load_state_dict(cloned(tolaria["tracked"][name]))
        clock = context.clock
        clock.epoch, clock.step = tolaria["epoch"], tolaria["step"]
        clock.epoch_began_step, clock.last_epoch_steps = tolaria["epoch_began_step"], tolaria["last_epoch_steps"]
        context.control_loss = tolaria["control_loss"]
        self._orchestrator.load_state_dict(state["orchestrator"])
        restore_random_state(tolaria["random"])

    def take_snapshot(self) -> None:
        """Remember the present state as good."""
        self._snapshot = cloned(self.capture())

    def end_epoch(self, *, healthy: bool) -> None:
        """Remember a healthy state, and write a checkpoint when its time has come.

        A failing disk does not stop training. A state that is not healthy replaces none that is.
        """
        if not healthy:
            log.warning("state_not_remembered", extra={"run_id": self._context.run_id})
            return
        self.take_snapshot()
        if self._store is None or time.monotonic() - self._last_saved_s < self._store.interval_s:
            return
        try:
            self.save()
        except (EsperError, OSError) as error:
            self._last_saved_s = time.monotonic()
            log.error("checkpoint_failed", extra={"run_id": self._context.run_id, "error": str(error)})

    def roll_back(self, reason: str) -> None:
        """Return to the last good snapshot.

        Adaptations begun since then end ROLLED_BACK; seeds removed since then stay removed, for one of them may be what
        did harm. The random streams go back too.
        """
        assert self._snapshot is not None
        self.rollbacks += 1
        log.warning("rolled_back", extra={"run_id": self._context.run_id, "reason": reason})
        known = self._snapshot["orchestrator"]
        removed = _removed_since(known, self._orchestrator.adaptations.values(), self._orchestrator.fading)
        self._orchestrator.abandon_since(known["adaptations"], reason)
        self.restore(cloned(self._snapshot))
        self._orchestrator.remove_again(removed)

    def save(self) -> str:
        """Write a checkpoint; give its id."""
        if self._store is None:
            raise InvalidStateError(
                "checkpoints must have a place: SessionConfig(checkpoints=...)", parameter="checkpoints"
            )
        checkpoint_id = self._store.save_state(self.capture())
        self._last_saved_s = time.monotonic()
        return checkpoint_id

    def load(self, checkpoint_id: str) -> None:
        """Take a checkpoint over; when it does not fit, the run goes on from where it was."""
        if self._store is None:
            raise InvalidStateError(
                "checkpoints must have a place: SessionConfig(checkpoints=...)", parameter="checkpoints"
            )
        state = self._store.load_state(checkpoint_id)
        before = cloned(self.capture())
        try:
            self.restore(state)
            with fitting("training state"):
                self._go_on_from(state["tolaria"])
        except BaseException:
            self._orchestrator.forget()
            self.restore(before)
            raise
        self._orchestrator.abandon_since(state["orchestrator"]["adaptations"], f"the run returned to {checkpoint_id}")
        self.take_snapshot()

    def _go_on_from(self, tolaria: Mapping[str, Any]) -> None:
        if tolaria["run_id"] == self._context.run_id:
            self._context.clock.go_on_from(tolaria["life"], tolaria["packets"])


def _check_form(tolaria: Mapping[str, Any]) -> None:
    """Check the plain values that are taken over as they are."""
    for name, kinds in _FORM.items():
        if type(tolaria[name]) not in kinds:
            rule = " or ".join(kind.__name__ for kind in kinds)
            raise CorruptDataError(f"{name} must be {rule}, got {type(tolaria[name]).__name__}", parameter=name)


def _removed_since(
    state: Mapping[str, Any], adaptations: Iterable[Adaptation], fading: Collection[str]
) -> list[Adaptation]:
    """Give the adaptations that stood in an orchestrator's state, or were on their way out, and are gone since.

    One that was on its way out and is so still goes on from where it was.
    """
    fossil = int(AdaptationOutcome.KEPT)
    stood = {key for key, item in state["adaptations"].items() if item["outcome"] in (None, fossil)}
    left = set(state["fades"]) - set(fading)
    gone = {AdaptationOutcome.CULLED, AdaptationOutcome.FAILED, AdaptationOutcome.ROLLED_BACK}
    return [item for item in adaptations if item.id in stood | left and item.outcome in gone]
