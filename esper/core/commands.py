"""The desk where operators' commands are carried out, each once, each with an answer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Final

from esper.contracts.decision import (
    AdaptationDecision,
    AdaptationType,
    ControlAction,
    ControlCommand,
    ControlResult,
    CurveState,
)
from esper.contracts.errors import EsperError, InvalidInputError, InvalidStateError, UnavailableError
from esper.core.context import RunContext
from esper.core.memory import RunMemory
from esper.core.orchestrator import SeedOrchestrator
from esper.telemetry.subjects import Kind

log = logging.getLogger(__name__)

_ANSWERS_KEPT: Final = 1024


class CommandDesk:
    """Carries out commands in the training thread and answers on the bus."""

    def __init__(self, context: RunContext, orchestrator: SeedOrchestrator, memory: RunMemory) -> None:
        self._context = context
        self._orchestrator = orchestrator
        self._memory = memory
        self._answers: dict[str, ControlResult] = {}
        self.paused = False
        self.stop_asked = False
        self._actions: Mapping[ControlAction, Callable[[ControlCommand], tuple[str, str]]] = {
            ControlAction.PAUSE: self._pause,
            ControlAction.RESUME: self._resume,
            ControlAction.STOP: self._stop,
            ControlAction.CHECKPOINT: self._checkpoint,
            ControlAction.ROLLBACK: self._roll_back,
            ControlAction.GERMINATE: self._germinate,
            ControlAction.CULL: self._cull,
        }

    def carry_out(self, command: ControlCommand) -> ControlResult:
        """Do what is asked and answer; a repeated request gets the first answer again. Gives the answer."""
        answer = self._answers.get(command.request_id)
        if answer is None:
            answer = self._do(command)
            self._answers[command.request_id] = answer
            while len(self._answers) > _ANSWERS_KEPT:
                del self._answers[next(iter(self._answers))]
        self._context.link.send(Kind.CONTROL, answer)
        return answer

    def _do(self, command: ControlCommand) -> ControlResult:
        try:
            detail, checkpoint_id = self._actions[command.action](command)
        except EsperError as error:
            return self._answer(command, accepted=False, detail=str(error), error_reason=error.reason)
        except OSError as error:  # of the checkpoints' disk; training goes on
            return self._answer(command, accepted=False, detail=str(error), error_reason=UnavailableError.reason)
        log.info("command_done", extra={"action": command.action.name, "actor": command.actor, "detail": detail})
        return self._answer(command, accepted=True, detail=detail, checkpoint_id=checkpoint_id)

    def _answer(
        self,
        command: ControlCommand,
        *,
        accepted: bool,
        detail: str,
        checkpoint_id: str = "",
        error_reason: str = "",
    ) -> ControlResult:
        return ControlResult(
            request_id=command.request_id,
            run_id=self._context.run_id,
            accepted=accepted,
            detail=detail[:500],
            checkpoint_id=checkpoint_id,
            step=self._context.clock.step,
            error_reason=error_reason,
        )

    def _pause(self, command: ControlCommand) -> tuple[str, str]:
        del command
        self.paused = True
        return "held before the next step", ""

    def _resume(self, command: ControlCommand) -> tuple[str, str]:
        del command
        self.paused = False
        return "going on", ""

    def _stop(self, command: ControlCommand) -> tuple[str, str]:
        del command
        self.stop_asked = True
        self.paused = False
        return "ends after this step", ""

    def _checkpoint(self, command: ControlCommand) -> tuple[str, str]:
        del command
        checkpoint_id = self._memory.save()
        return f"wrote {checkpoint_id}", checkpoint_id

    def _roll_back(self, command: ControlCommand) -> tuple[str, str]:
        if command.checkpoint_id:
            self._memory.load(command.checkpoint_id)
            return f"returned to {command.checkpoint_id}", command.checkpoint_id
        self._memory.roll_back(f"asked by {command.actor or 'an operator'}")
        return "returned to the last good snapshot", ""

    def _germinate(self, command: ControlCommand) -> tuple[str, str]:
        if command.blueprint is None:
            raise InvalidInputError.of("command.blueprint", "be given to germinate", None)
        adaptation_id = adaptation_id_of(command.request_id)
        if adaptation_id in self._orchestrator.adaptations:
            raise InvalidStateError(f"request_id must be new, got that of {adaptation_id}", parameter="request_id")
        layer = self._orchestrator.layers.get(command.layer)
        decision = AdaptationDecision(
            adaptation_id=adaptation_id,
            run_id=self._context.run_id,
            state_sequence=0,
            epoch=self._context.clock.epoch,
            adaptation_type=AdaptationType.ADD_SEED,
            layer=command.layer,
            seed_index=command.seed_index,
            blueprint_id=command.blueprint.id,
            confidence=1.0,
            urgency=1.0,
            curve_state=CurveState.WARMING_UP,
            actionable=True,
            explanation=f"asked by {command.actor or 'an operator'}",
            created_at=command.created_at,
            blueprint=command.blueprint,
            site=layer.site if layer is not None else None,
        )
        failed = [check for check in self._orchestrator.decide(decision) if not check.passed]
        if failed:
            raise InvalidStateError("; ".join(f"{check.name}: {check.detail}" for check in failed), parameter="command")
        self._orchestrator.germinate_in_place(decision.adaptation_id)
        return f"germinated {command.blueprint.name} as {decision.adaptation_id}", ""

    def _cull(self, command: ControlCommand) -> tuple[str, str]:
        if command.layer not in self._orchestrator.layers:
            raise InvalidInputError.of("command.layer", "name a layer with seeds", command.layer)
        if command.seed_index is None:
            raise InvalidInputError.of("command.seed_index", "be given to cull", None)
        reason = f"culled by {command.actor or 'an operator'}"
        self._orchestrator.remove_seed(command.layer, command.seed_index, reason)
        return f"culled seed {command.seed_index} of {command.layer}", ""


def adaptation_id_of(request_id: str) -> str:
    """Give the adaptation id of a command by hand: the same request is the same adaptation."""
    return "a" + hashlib.sha256(f"command {request_id}".encode()).hexdigest()[:32]
