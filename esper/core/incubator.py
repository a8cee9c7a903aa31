"""One seed learning behind the host's back, with an optimizer of its own, a step of it per training step.

The seed's loss contains its own effect: the run's loss on a trial branch, there with the host damped, or the local
regression of the gradient at the site. All are explained in ``esper.execution.incubation``, and compared in decision
0007 and experiment 0008; ``choose_way`` is what came of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch.optim import AdamW

from esper.contracts.errors import EsperError, InvalidInputError
from esper.contracts.run import GrowthPhase
from esper.core.batches import Batch
from esper.core.capture import cloned
from esper.core.costs import CostMeter
from esper.core.growth import GrowthConfig, IncubationChoice
from esper.core.losses import LossFunction, grows_in_proportion
from esper.core.morphable import MorphableModel
from esper.execution.birth import fit_to_site, seen_at_site
from esper.execution.bulkhead import has_finite_gradients
from esper.execution.circuit_breaker import FailureKind, KernelFaultError
from esper.execution.incubation import (
    Norms,
    SiteCapture,
    local_regression_loss,
    measure_reach,
    output_without,
    trial_backward,
)
from esper.execution.layers import KasminaLayer
from esper.execution.overrides import SeedRef
from esper.execution.random_streams import frozen_streams

log = logging.getLogger(__name__)

WayKind = Literal["damped", "local", "trial"]

SHARES: Final = (1.0, 0.5, 0.25)
"""Shares of a batch that a trial may be given, the most exact first."""
MIN_TRIAL_EXAMPLES: Final = 8
"""Fewest examples of a trial on a part of the batch: fewer make batch statistics and gradients too noisy."""
_REACH_BOUNDS: Final = (0.01, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningWay:
    """How a seed learns alone.

    Raises:
        InvalidInputError: A value breaks its rule; the message names it.
    """

    kind: WayKind
    """Trial branch, one with the host damped, or local regression."""
    share: float = 1.0
    """Share of the batch that a trial is given, in (0, 1]; parts take turns."""
    host_share: float = 0.5
    """Share of the model's own output that a damped trial keeps, in [0, 1]. Where the loss takes no damping
    (``esper.core.losses.grows_in_proportion``) the seed learns locally."""
    norms: Norms = "running"
    """What batch norms normalise by in a trial."""
    reach: float = 1.0
    """Size of the step that a regression asks for, relative to the host's output, > 0."""
    reach_interval: int = 0
    """Steps between two measurements of the reach, where the batch is known; 0 keeps ``reach`` as it is."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(WayKind):
            raise InvalidInputError.of("kind", f"be one of {', '.join(get_args(WayKind))}", self.kind)
        if not 0.0 <= self.host_share <= 1.0:
            raise InvalidInputError.of("host_share", "lie in [0, 1]", self.host_share)
        if not 0.0 < self.share <= 1.0:
            raise InvalidInputError.of("share", "lie in (0, 1]", self.share)
        if not self.reach > 0.0:
            raise InvalidInputError.of("reach", "be > 0", self.reach)
        if self.reach_interval < 0:
            raise InvalidInputError.of("reach_interval", "be >= 0 steps", self.reach_interval)


_BY_QUALITY: Final = (
    *(LearningWay(kind="damped", share=share) for share in SHARES),
    LearningWay(kind="local"),
    *(LearningWay(kind="trial", share=share) for share in SHARES),
)
"""Ways in the order in which they are preferred; decision 0007 says why."""


def way_cost(way: LearningWay, *, kernel_flops: int, host_flops: int) -> float:
    """Give what a way adds to a training step at most, as a share of the step's FLOPs.

    A step is three forward passes (backward counts two). A trial runs one forward pass, a damped one two, and, since
    the host is frozen, at most one backward, on its share of the batch; the kernel costs its own three wherever it is
    evaluated.
    """
    kernel = kernel_flops / host_flops
    passes = {"damped": 1.0, "trial": 2.0 / 3.0}.get(way.kind)
    return kernel if passes is None else way.share * (passes + kernel)


def choose_way(choice: IncubationChoice, limit: float, *, kernel_flops: int, host_flops: int) -> LearningWay:
    """Give the best way that the limit has room for at a site; the cheapest where it has room for none.

    Args:
        choice: Kind of way to stay with, or ``auto``.
        limit: Most that a step may be lengthened by, as a share of its FLOPs.
        kernel_flops: FLOPs of the seed's forward pass, one example.
        host_flops: FLOPs of the host's, one example; where they are unknown (0) the limit has room for nothing.
    """
    ways = [way for way in _BY_QUALITY if choice in ("auto", way.kind)]
    costs = [way_cost(way, kernel_flops=kernel_flops, host_flops=max(1, host_flops)) for way in ways]
    fitting = (way for way, cost in zip(ways, costs, strict=True) if cost <= limit)
    return next(fitting, ways[costs.index(min(costs))])


def affordable_way(growth: GrowthConfig, *, kernel_flops: int, host_flops: int) -> LearningWay:
    """Give the way for a seed of a run: at most ``growth.incubation_cost`` of what a step costs once it is grafted."""
    grafted = 1.0 + kernel_flops / max(1, host_flops)
    return choose_way(
        growth.incubation_way, growth.incubation_cost * grafted, kernel_flops=kernel_flops, host_flops=host_flops
    )


class Turn(NamedTuple):
    """Which of the equal parts of a batch is learnt from."""

    place: int
    num_parts: int

    def part(self, value: torch.Tensor) -> torch.Tensor:
        """Give that part of a batch's tensor."""
        return torch.tensor_split(value, self.num_parts)[self.place]


class TrialTerms(NamedTuple):
    """How a seed's next trial is run: seeds on equal terms can share a pass."""

    turn: Turn
    """Part of the batch."""
    host_share: float
    """Share of the host's own output that stays; 1 without damping."""
    norms: Norms
    """What batch norms normalise by."""
    autocast: torch.dtype | None
    """Precision of the host's own step, where it is lower."""


def trial_precision(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Give the autocast of the host's own step; float16 is left out, for its gradients need a scaler."""
    return nullcontext() if autocast is None else torch.autocast(device.type, autocast)


class Incubator:
    """Trains one ACTIVE seed; the host's parameters, buffers, gradients and random streams are untouched to the bit."""

    def __init__(
        self,
        model: MorphableModel,
        loss_fn: LossFunction,
        *,
        layer: str,
        seed_index: int,
        learning_rate: float,
        way: LearningWay = LearningWay(kind="trial"),
        fitting_seed: int | None = None,
        costs: CostMeter | None = None,
    ) -> None:
        """With a ``fitting_seed`` the seed's weights are fitted to the first batch that it learns from."""
        self._costs = costs or CostMeter()
        self._model = model
        self._loss_fn = loss_fn
        self._ref = SeedRef(layer, seed_index)
        self._layer = model.kasmina_layer(layer)
        self._parameters = self._layer.seed_parameters(seed_index)
        self._optimizer = AdamW(self._parameters, lr=learning_rate)
        self._way = way
        self._reach = way.reach
        self._steps = 0
        self._fitting_seed = fitting_seed
        self._takes_damping: bool | None = None
        self._is_untriable = False
        source = self._layer.require_seed(seed_index).source
        self._capture = SiteCapture(self._layer, reads_own_input=not source)
        self._autocast: torch.dtype | None = None
        self._handles = [self._layer.register_forward_hook(self._see, with_kwargs=True)]
        if source:
            reads = model.kasmina_layer(source).register_forward_hook(self._see_source, with_kwargs=True)
            self._handles.append(reads)
        self._learns_locally = way.kind == "local"

    def _tries(self, work: Callable[[Batch], bool], batch: Batch | None) -> bool:
        """Do what asks the whole host; false, and from now on always, where it cannot be asked: the run goes on."""
        if batch is None or self._is_untriable:
            return False
        try:
            return work(batch)
        except EsperError:
            raise
        except Exception as error:  # noqa: BLE001 - the host's own step has just done as much
            self._optimizer.zero_grad()
            self._is_untriable = True
            extra = {"layer": self._ref.layer, "seed_index": self._ref.seed_index, "error": str(error)}
            log.warning("trial_impossible", extra=extra)
            return False

    @property
    def ref(self) -> SeedRef:
        """The seed."""
        return self._ref

    def step(self, batch: Batch | None) -> bool:
        """Take one step by the seed's way; without the batch a trial cannot be had, and the site is learnt from.

        Gives false where nothing could be learnt.
        """
        with self._costs.phase(GrowthPhase.ISOLATION):
            return self._learn_by_its_way(batch)

    def _learn_by_its_way(self, batch: Batch | None) -> bool:
        return self._tries(self._learn_by_trial, batch) or self.learn_from_site()

    def _learn_by_trial(self, batch: Batch) -> bool:
        if self._way.kind == "trial" or self._is_damped(batch):
            self.learn(*batch)
            return True
        if self._is_reach_due():
            self._measure_reach(batch)
        return False

    def prepare(self, batch: Batch | None) -> None:
        """Do what a trial's first step does before it learns, so that the seed can begin beside others; once.

        A seed that learns from its site does this when it has seen it.
        """
        self._tries(self._prepare, batch)

    def _prepare(self, batch: Batch) -> bool:
        if self._way.kind == "trial" or self._is_damped(batch):
            self._fit_once(batch[0])
        return False

    def terms_beside_others(self, batch: Batch | None) -> TrialTerms | None:
        """Give on what terms the seed can learn in one pass with others; ``None`` where it has to learn by itself."""
        knows_its_way = self._way.kind == "trial" or self._takes_damping is True
        if batch is None or self._fitting_seed is not None or self._is_untriable or not knows_its_way:
            return None
        host_share = self._way.host_share if self._takes_damping else 1.0
        return TrialTerms(self._turn(len(batch[0])), host_share, self._way.norms, self._autocast)

    def take_shared_step(self) -> None:
        """Take the step whose gradients a pass that several share has left."""
        self._learns_locally = False
        self._step()

    def learn(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take one step down the run's own loss, on a trial branch with the seed fully blended in."""
        self._learns_locally = False
        self._fit_once(inputs)
        inputs, targets = self._part(inputs), self._part(targets)
        with self._precision(inputs.device):
            off = (1.0 - self._way.host_share) * self._host_output(inputs) if self._takes_damping else None
            trial_backward(
                self._model,
                [self._ref],
                lambda: self._loss_fn(self._model(inputs) if off is None else self._model(inputs) - off, targets),
                norms=self._way.norms,
            )
        self._step()

    def _is_damped(self, batch: Batch) -> bool:
        """Whether the seed learns beside a damped host; if its loss takes that is asked once, of the first batch."""
        if self._way.kind == "damped" and self._takes_damping is None:
            inputs, targets = (self._part(value) for value in batch)
            with self._precision(inputs.device):
                self._takes_damping = grows_in_proportion(self._loss_fn, self._host_output(inputs), targets)
        return bool(self._takes_damping)

    def _host_output(self, inputs: torch.Tensor) -> Any:
        return output_without(self._model, [self._ref], lambda: self._model(inputs), norms=self._way.norms)

    def learn_from_site(self) -> bool:
        """Take one step towards what the training step just taken wanted at the site; false when it was not seen."""
        self._learns_locally = True
        sample, seed = self._capture.seen, self._layer.find_seed(self._ref.seed_index)
        if sample is None or seed is None:
            return False  # the first step after germination: the hook was not there yet
        if self._fitting_seed is not None:
            with self._costs.phase(GrowthPhase.BIRTH):
                self._fit_to((sample.x, sample.h))
        try:
            with frozen_streams():
                loss = local_regression_loss(seed.kernel, sample, reach=self._reach)
                loss.backward()  # type: ignore[no-untyped-call]
        except KernelFaultError as error:
            self._drop(error.kind, f"while it learnt: {error}")
            return False
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the run goes on
            self._drop(FailureKind.RAISED, f"while it learnt: {type(error).__name__}: {error}")
            return False
        self._step()
        return True

    def close(self) -> None:
        """Stop watching the layers; idempotent."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Give the optimizer's state, and what steers the next step."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "learns_locally": self._learns_locally,
            "takes_damping": self._takes_damping,
            "reach": self._reach,
            "steps": self._steps,
            "awaits_fitting": self._fitting_seed is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        self._optimizer.load_state_dict(cloned(state["optimizer"]))
        self._learns_locally = bool(state["learns_locally"])
        self._takes_damping = state.get("takes_damping")
        self._reach, self._steps = float(state["reach"]), int(state["steps"])
        if not state.get("awaits_fitting", False):  # states of earlier versions do not say: theirs were never fitted
            self._fitting_seed = None

    def _fit_once(self, inputs: torch.Tensor) -> None:
        if self._fitting_seed is not None:
            with self._costs.phase(GrowthPhase.BIRTH):
                self._fit_to(self._seen_with(inputs))

    def _seen_with(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Give what the kernel reads of a whole batch, a forward pass of which is the price."""
        with self._precision(inputs.device):
            return seen_at_site(self._model, self._ref, lambda: self._model(inputs), norms=self._way.norms)

    def _fit_to(self, seen: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Fit the seed's weights to the x and h of a batch, once; where it did not come by they stay as drawn."""
        fitting_seed, self._fitting_seed = self._fitting_seed, None
        if seen is None or fitting_seed is None:
            return
        try:
            with frozen_streams():
                fit_to_site(self._layer.require_seed(self._ref.seed_index), *seen, random_seed=fitting_seed)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the run goes on
            self._drop(FailureKind.RAISED, f"while it was fitted to data: {type(error).__name__}: {error}")

    def _part(self, value: torch.Tensor) -> torch.Tensor:
        """Give the part of a batch whose turn it is: taking turns, no place in the batch is never seen."""
        return self._turn(len(value)).part(value)

    def _turn(self, num_examples: int) -> Turn:
        num_parts = max(1, min(round(1.0 / self._way.share), num_examples // MIN_TRIAL_EXAMPLES))
        return Turn(self._steps % num_parts, num_parts)

    def _step(self) -> None:
        self._steps += 1
        if not has_finite_gradients(self._parameters):
            self._drop(FailureKind.NON_FINITE, "gradient holds NaN or infinity while it learnt")
            return
        seed = self._layer.find_seed(self._ref.seed_index)
        if self._learns_locally and seed is not None:
            seed.breaker.note_success()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _is_reach_due(self) -> bool:
        interval = self._way.reach_interval
        return interval > 0 and self._steps % interval == interval - 1

    def _measure_reach(self, batch: Batch) -> None:
        inputs, targets = batch
        with self._precision(inputs.device):
            found = measure_reach(self._model, self._ref, lambda: self._loss_fn(self._model(inputs), targets))
        if found is not None:
            low, high = _REACH_BOUNDS
            self._reach = min(high, max(low, (self._reach * found) ** 0.5))

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return trial_precision(self._autocast, device)

    def _drop(self, kind: FailureKind, detail: str) -> None:
        """Leave the step out, and count it as the kernel's failure."""
        self._optimizer.zero_grad()
        seed = self._layer.find_seed(self._ref.seed_index)
        if seed is not None:
            seed.breaker.has_failed_backward = not self._learns_locally
            self._layer.note_failure(seed, kind, detail)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not self._is_own_step(module):
            return
        device = self._layer.seed_output(out).device.type
        short = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
        self._autocast = torch.bfloat16 if short else None
        # Copies are made only where they are needed: with the batch at hand the site is not looked at.
        if self._learns_locally:
            self._capture.see(module, args, kwargs, out)

    def _see_source(self, module: KasminaLayer, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        del out
        if self._learns_locally and self._is_own_step(module):
            self._capture.see_input(module, args, kwargs)

    def _is_own_step(self, module: torch.nn.Module) -> bool:
        """Whether this is the host's own training step, which is what counts: no evaluation, no trial."""
        return module.training and torch.is_grad_enabled() and not self._layer._kasmina.is_paused
