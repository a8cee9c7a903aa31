"""One seed learning behind the host's back, with an optimizer of its own, a step of it per training step.

The seed's loss contains its own effect. Where the batch is known it is the run's loss on a trial branch; where it is
not (a loop whose loss is a plain function), it is the local regression of the gradient at the site. Both are explained
in ``esper.execution.incubation``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW

from esper.contracts.errors import InvalidStateError
from esper.core.capture import cloned
from esper.core.losses import LossFunction
from esper.core.morphable import MorphableModel
from esper.execution.bulkhead import has_finite_gradients
from esper.execution.circuit_breaker import FailureKind
from esper.execution.incubation import SiteCapture, local_regression_loss, trial_backward
from esper.execution.overrides import SeedRef, frozen_streams


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
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._ref = SeedRef(layer, seed_index)
        self._layer = model.kasmina_layer(layer)
        self._parameters = self._layer.seed_parameters(seed_index)
        self._optimizer = AdamW(self._parameters, lr=learning_rate)
        self._capture = SiteCapture(self._layer)
        self._handle = self._layer.register_forward_hook(self._see, with_kwargs=True)
        self._learns_locally = False

    def learn(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take one step down the run's own loss, on a trial branch with the seed fully blended in."""
        self._learns_locally = False
        trial_backward(self._model, [self._ref], lambda: self._loss_fn(self._model(inputs), targets))
        self._step()

    def learn_from_site(self) -> bool:
        """Take one step towards what the training step just taken wanted at the site; false when it was not seen."""
        self._learns_locally = True
        try:
            sample = self._capture.sample
        except InvalidStateError:
            return False  # the first step after germination: the hook was not there yet
        seed = self._layer.find_seed(self._ref.seed_index)
        if seed is None:
            return False
        try:
            with frozen_streams():
                loss = local_regression_loss(seed.kernel, sample)
                loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the run goes on
            self._drop(FailureKind.RAISED, f"while it learnt: {type(error).__name__}: {error}")
            return False
        self._step()
        return True

    def close(self) -> None:
        """Stop watching the layer; idempotent."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Give the optimizer's state, and whether the site is looked at."""
        return {"optimizer": self._optimizer.state_dict(), "learns_locally": self._learns_locally}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        self._optimizer.load_state_dict(cloned(state["optimizer"]))
        self._learns_locally = bool(state["learns_locally"])

    def _step(self) -> None:
        if not has_finite_gradients(self._parameters):
            self._drop(FailureKind.NON_FINITE, "gradient holds NaN or infinity while it learnt")
            return
        seed = self._layer.find_seed(self._ref.seed_index)
        if self._learns_locally and seed is not None:
            seed.breaker.note_success()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _drop(self, kind: FailureKind, detail: str) -> None:
        """Leave the step out, and count it as the kernel's failure."""
        self._optimizer.zero_grad()
        seed = self._layer.find_seed(self._ref.seed_index)
        if seed is not None:
            seed.breaker.has_failed_backward = not self._learns_locally
            self._layer.note_failure(seed, kind, detail)

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        # Copies are made only where they are needed: with the batch at hand the site is not looked at.
        if self._learns_locally and module.training and torch.is_grad_enabled():
            self._capture.see(module, args, kwargs, out)
