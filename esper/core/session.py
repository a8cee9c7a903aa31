"""The training side of a run, for anybody's own loop: one call a step, one an epoch.

The loop stays the user's. A session looks into its mailbox at step boundaries, moves alphas, lets seeds learn, watches
for harm, and at the end of an epoch evaluates on the control split and tells the mesh. It never waits for the mesh
(unless ``SessionConfig.decision_wait_s`` asks for it, to make decisions reproducible).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.optim import Optimizer

from esper.contracts.decision import BUDGET_TOO_SMALL, AdaptationDecision, ControlAction, ControlCommand
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.run import GrowthCost, GrowthPhase, RunPhase
from esper.core.batches import Batch, BatchWatcher
from esper.core.budget import Budget, BudgetLedger
from esper.core.capture import Stateful
from esper.core.clock import RunClock
from esper.core.commands import CommandDesk
from esper.core.context import RunContext
from esper.core.control import ControlSplit
from esper.core.costs import CostMeter
from esper.core.flops import forward_flops
from esper.core.governor import Governor, Verdict
from esper.core.leftovers import clear_leftovers
from esper.core.link import KernelArrival, RunLink
from esper.core.losses import LossFunction, per_example
from esper.core.memory import RunMemory
from esper.core.morphable import MorphableModel
from esper.core.optimizers import require_supported
from esper.core.orchestrator import SeedOrchestrator
from esper.core.overlap import OverlapWatch
from esper.core.packets import EpochMeter, PacketBuilder
from esper.core.report import EpochRecord, PhaseCost, RunReport
from esper.core.settings import SessionConfig
from esper.core.size import output_parameters
from esper.execution.layers.ranks import world_size
from esper.telemetry.subjects import Kind

log = logging.getLogger(__name__)


class MeshPort(Protocol):
    """What a session asks of a mesh: a line for its run."""

    def open_link(self, run_id: str, model: MorphableModel) -> RunLink:
        """Give the run's line; a service that is configured but unreachable is an error here."""


class Session:
    """Lets a wrapped model grow inside the caller's own training loop.

    Everything here belongs to the training thread. Use it as a context manager: leaving it tells the mesh how the run
    ended and takes every hook away.

    Raises:
        InvalidInputError: The model is not wrapped, a setting breaks its rule, or the control loader cannot serve.
        InvalidStateError: Several ranks train together.
        UnavailableError: The mesh was asked for and cannot be reached.
    """

    def __init__(  # noqa: PLR0913 - the stable face
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        *,
        loss_fn: LossFunction,
        control_loader: Iterable[Any],
        mesh: MeshPort | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        step_optimizer: bool = True,
        config: SessionConfig | None = None,
    ) -> None:
        _require_one_model(model)
        self.config = config or SessionConfig()
        self.run_id = self.config.resolve_run_id()
        require_supported(optimizer)
        clear_leftovers(model, optimizer)
        control = ControlSplit(control_loader, device=next(model.parameters()).device)
        loss_rows = per_example(loss_fn)
        first = control.evaluate(model, loss_rows)
        host_flops = forward_flops(model, control.example_inputs())
        host_parameters = sum(parameter.numel() for parameter in model.parameters())
        ledger = BudgetLedger(budget or Budget(), host_parameters=host_parameters, host_flops=host_flops)
        self._step_optimizer = step_optimizer
        self._watcher = BatchWatcher(model, loss_fn)
        self._overlap = OverlapWatch(inputs for inputs, _ in control.batches)
        self._governor, self._said_too_small = Governor(self.config.governor), False
        self._meter, self._epoch_began_s = EpochMeter(), time.monotonic()
        self._notes, self._history = list[str](), list[EpochRecord]()
        self._race_answers: dict[str, set[str]] = {}
        self._answered, self._asked, self._bad_losses, self._governor_rollbacks = 0, 0, 0, 0
        self._phase, self._closed = RunPhase.STARTED, False
        with contextlib.ExitStack() as leaving:  # a start that fails leaves nothing behind
            leaving.callback(self._watcher.close)
            self._context = RunContext(
                run_id=self.run_id,
                model=model,
                optimizer=optimizer,
                control=control,
                loss_fn=loss_fn,
                loss_rows=loss_rows,
                ledger=ledger,
                link=_open_link(leaving, mesh, self.run_id, model),
                growth=self.config.growth,
                clock=RunClock(planned_epochs=self.config.planned_epochs),
                host_parameters=host_parameters,
                host_flops=host_flops,
                random_seed=seed,
                control_loss=first.loss,
                costs=CostMeter(counts_flops=self.config.counts_flops),
            )
            self._orchestrator = SeedOrchestrator(self._context)
            leaving.callback(self._orchestrator.close)
            self._packets = PacketBuilder(self._context, host_flops=host_flops)
            self._memory = RunMemory(self._context, self._orchestrator, self.config.checkpoints)
            self._desk = CommandDesk(self._context, self._orchestrator, self._memory)
            self._memory.take_snapshot()
            self._send_packet(RunPhase.STARTED, figures=first)
            self._leaving = leaving.pop_all()

    # ------------------------------------------------------------------ the loop's calls

    def step(self, loss: torch.Tensor, *, batch: Batch | None = None) -> None:
        """Take one optimizer step after ``loss.backward()``; applies what has come in meanwhile.

        ``batch`` is (inputs, targets) of the step. Seeds need it to learn from the loss itself when the loss is a plain
        function, whose targets cannot be seen from outside.

        Raises:
            InvalidStateError: The session is closed, or the loss stays bad after every roll-back allowed.
        """
        self._require_open()
        value = float(loss.detach())
        inputs = self._watcher.inputs if batch is None else batch[0]
        num_examples = 0 if inputs is None else len(inputs)
        if inputs is not None:
            self._overlap.look(inputs)
        seen = self._watcher.take()
        verdict = self._governor.judge(value)
        if verdict is Verdict.FINE:
            self._meter.examples += num_examples
            self._advance(value, batch or seen)
        else:
            self._take_back(verdict, value)
        self._look_into_mailbox()
        self._orchestrator.bear_due()

    def end_epoch(self) -> EpochRecord:
        """Evaluate on the control split, move growth on, tell the mesh; gives the epoch's figures.

        Snapshots and checkpoints are made here: step a scheduler of epochs before, so that they hold its new state.

        Warns:
            ControlOverlapWarning: Examples of the control split were trained on; said once, after the first epoch.
        """
        self._require_open()
        if overlap := self._overlap.end_epoch():
            self._notes.append(
                f"{overlap} control examples were trained on in the first epoch: what growth was decided by is not "
                "held out"
            )
        context, clock = self._context, self._context.clock
        clock.end_epoch()
        with context.costs.phase(GrowthPhase.EVALUATION):
            self._orchestrator.end_epoch()
        with context.costs.phase(GrowthPhase.CONTROL):
            figures = context.control.evaluate(context.model, context.loss_rows)
        context.control_loss = figures.loss
        seconds = time.monotonic() - self._epoch_began_s
        record = EpochRecord(
            epoch=clock.epoch,
            step=clock.step,
            train_loss=self._meter.train_loss,
            control_loss=figures.loss,
            control_accuracy=figures.accuracy,
            parameters=output_parameters(context.model),
            seconds=seconds,
        )
        self._history.append(record)
        self._send_packet(RunPhase.TRAINING, meter=self._meter, figures=figures, seconds=seconds)
        self._asked = self._packets.sequence
        self._memory.end_epoch(healthy=math.isfinite(figures.loss) and not self._bad_losses)
        self._wait_for_decision()
        self._meter, self._epoch_began_s = EpochMeter(), time.monotonic()
        return record

    def finish(self) -> None:
        """End growth: what is still open is measured, kept if it pays, else removed; idempotent."""
        with self._context.costs.phase(GrowthPhase.EVALUATION):
            self._orchestrator.finish()

    def report(self) -> RunReport:
        """End growth (see :meth:`finish`) and give the report."""
        if not self._closed:
            self.finish()
        context = self._context
        step = context.clock.step
        return RunReport(
            run_id=self.run_id,
            phase=self._phase.name.lower(),
            host_params=context.host_parameters,
            final_params=sum(parameter.numel() for parameter in context.model.parameters()),
            adaptations=tuple(item.summary(step) for item in self._orchestrator.adaptations.values()),
            history=tuple(self._history),
            rollbacks=self._memory.rollbacks,
            notes=tuple(self._notes),
            costs=tuple(PhaseCost.of(one) for one in context.costs.costs()),
        )

    # ------------------------------------------------------------------ what else a loop may use

    @property
    def should_stop(self) -> bool:
        """Whether an operator asked the run to end."""
        return self._desk.stop_asked

    @property
    def orchestrator(self) -> SeedOrchestrator:
        """Carries the adaptations; for those who want to look."""
        return self._orchestrator

    @property
    def epoch_count(self) -> int:
        """Epochs completed."""
        return self._context.clock.epoch

    @property
    def step_count(self) -> int:
        """Optimizer steps completed."""
        return self._context.clock.step

    @property
    def growth_costs(self) -> tuple[GrowthCost, ...]:
        """What growth has cost this thread so far, by phase."""
        return self._context.costs.costs()

    def track(self, name: str, item: Stateful) -> None:
        """Let snapshots and checkpoints hold the state of a scheduler, gradient scaler, EMA ... under ``name``.

        Raises:
            InvalidInputError: The name is taken.
        """
        self._memory.track(name, item)

    def save_checkpoint(self) -> str:
        """Write a checkpoint now and give its id.

        Raises:
            InvalidStateError: The session was given no place for checkpoints.
            StorageFullError: The device is full; training can go on.
        """
        return self._memory.save()

    def load_checkpoint(self, checkpoint_id: str) -> None:
        """Take over a checkpoint of this or an earlier run of the same host: model, grown structure, all state.

        Raises:
            EsperError: It cannot be read, or does not fit; the run stands where it stood.
        """
        self._memory.load(checkpoint_id)
        self._governor.forget()
        self._send_packet(RunPhase.STARTED)

    def close(self, phase: RunPhase = RunPhase.FINISHED, reason: str = "") -> None:
        """End growth, tell the mesh how the run ended, take every hook away; idempotent."""
        if self._closed:
            return
        try:
            if phase is RunPhase.FINISHED:
                phase = RunPhase.STOPPED if self._desk.stop_asked else phase
                self.finish()
        except BaseException as error:
            phase, reason = RunPhase.FAILED, f"{type(error).__name__}: {error}"
            raise
        finally:
            self._closed = True
            with self._leaving:
                self._send_packet(phase, reason=reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.close(RunPhase.STOPPED, "interrupted")
        else:
            self.close(RunPhase.FAILED, f"{kind.__name__}: {error}")

    # ------------------------------------------------------------------ inside a step

    def _advance(self, value: float, batch: Batch | None) -> None:
        context, meter = self._context, self._meter
        self._bad_losses = 0
        meter.loss_sum += value
        meter.steps += 1
        if context.clock.step % self.config.gradient_norm_interval == 0:
            self._sample_gradient_norm()
            context.model.settle_failures()
        if self._step_optimizer:
            context.optimizer.step()
            context.optimizer.zero_grad()
        context.clock.step += 1
        context.model.seed_states.step = context.clock.step
        context.model.tick_step()
        self._orchestrator.tick(batch)

    def _sample_gradient_norm(self) -> None:
        gradients = [p.grad for p in self._context.model.parameters() if p.grad is not None]
        if gradients:
            self._meter.gradient_norm_sum += float(torch.nn.utils.get_total_norm(gradients))
            self._meter.gradient_norms += 1

    def _take_back(self, verdict: Verdict, loss: float) -> None:
        """Leave the step out; first the seeds that are blended in go, then the whole state goes back."""
        context = self._context
        context.optimizer.zero_grad()
        self._bad_losses += 1
        reason = f"loss {loss:g} at step {context.clock.step} ({verdict.value})"
        log.warning("harmful_step", extra={"run_id": self.run_id, "loss": loss, "verdict": verdict.value})
        if self._orchestrator.withdraw_grafts(reason):
            return
        if verdict is Verdict.NON_FINITE and self._bad_losses == 1:
            return  # one bad batch does no harm once its step is left out
        if self._governor_rollbacks >= self.config.governor.max_rollbacks:
            message = f"loss must recover within {self.config.governor.max_rollbacks} roll-backs, got {reason}"
            raise InvalidStateError(message, parameter="loss")
        self._governor_rollbacks += 1
        self._memory.roll_back(reason)
        self._governor.forget()

    def _look_into_mailbox(self) -> None:
        self._take_in()
        if self._desk.paused:
            self._hold()

    def _take_in(self) -> None:
        for arrival in self._context.link.arrivals():
            match arrival:
                case AdaptationDecision():
                    with self._context.costs.phase(GrowthPhase.BIRTH):
                        self._orchestrator.decide(arrival)
                    self._note_answer(arrival)
                    self._note_budget(arrival)
                case KernelArrival():
                    with self._context.costs.phase(GrowthPhase.BIRTH):
                        self._orchestrator.receive_kernel(arrival)
                case ControlCommand():
                    answer = self._desk.carry_out(arrival)
                    if answer.accepted and arrival.action is ControlAction.ROLLBACK:
                        self._governor.forget()  # an older state's losses are no spike

    def _note_answer(self, decision: AdaptationDecision) -> None:
        """A packet is answered with one decision, or with all those of a race."""
        seen = self._race_answers.setdefault(decision.group, set())
        seen.add(decision.adaptation_id)
        if len(seen) >= decision.race_size:
            del self._race_answers[decision.group]
            self._answered = max(self._answered, decision.state_sequence)

    def _note_budget(self, decision: AdaptationDecision) -> None:
        """Say once that the budget has no room for any candidate; decisions say so after every epoch."""
        small = next((one for one in decision.evidence if one.name == BUDGET_TOO_SMALL), None)
        if small is None or self._said_too_small:
            return
        self._said_too_small = True
        words = f"{small.value:.0f} {small.detail}"
        self._notes.append(f"the budget is too small to grow from epoch {self._context.clock.epoch} on: {words}")
        log.warning("budget_too_small", extra={"run_id": self.run_id, "detail": words})

    def _hold(self) -> None:
        """Stand still until an operator says go on or stop."""
        self._send_packet(RunPhase.PAUSED)
        while self._desk.paused and not self._desk.stop_asked:
            time.sleep(0.02)
            self._take_in()
        self._send_packet(RunPhase.TRAINING)

    def _wait_for_decision(self) -> None:
        """With ``decision_wait_s``, stand still until the epoch's decision and its kernel are here."""
        self._look_into_mailbox()
        deadline_s = time.monotonic() + self.config.decision_wait_s
        while time.monotonic() < deadline_s:
            if self._answered >= self._asked and not self._orchestrator.awaits_kernel:
                return
            time.sleep(0.002)
            self._look_into_mailbox()

    def _send_packet(self, phase: RunPhase, **figures: Any) -> None:
        self._phase = phase
        packet = self._packets.build(phase, **figures)
        # The life is part of the name: a run that is taken up again numbers its first packets as before.
        msg_id = f"{self.run_id}-{self._context.clock.life}-state-{packet.sequence}"
        self._context.link.send(Kind.STATE, packet, msg_id=msg_id)

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidStateError(f"session of run {self.run_id} must be open, got closed")


def _open_link(leaving: contextlib.ExitStack, mesh: MeshPort | None, run_id: str, model: MorphableModel) -> RunLink:
    """Open the run's line, over a mesh of its own when none is given; both are closed with ``leaving``."""
    if mesh is None:
        # By name through the package's lazy facade: this layer must not know the services behind it.
        own = import_module("esper").Mesh.embedded()
        leaving.callback(own.close)
        mesh = own
    link = mesh.open_link(run_id, model)
    leaving.callback(link.close)
    return link


def _require_one_model(model: object) -> None:
    if not isinstance(model, MorphableModel):
        raise InvalidInputError.of("model", "be wrapped: esper.wrap(model)", type(model).__name__)
    if (ranks := world_size()) > 1:
        raise InvalidStateError(
            f"a session must be the only rank of its training, got a process group of {ranks}: ranks do not share "
            "decisions yet, and each would grow a different model"
        )
