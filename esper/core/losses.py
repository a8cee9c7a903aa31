"""Per-example losses from whatever loss function a user trains with."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from esper.contracts.errors import InvalidInputError

log = logging.getLogger(__name__)

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes outputs and targets with the batch first and gives the mean loss, a scalar."""
PerExampleLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes outputs and targets with the batch first and gives one loss per example, shape (batch,)."""


def per_example(loss_fn: LossFunction) -> PerExampleLoss:
    """Give the per-example form of a mean loss.

    Losses with a ``reduction`` (``torch.nn`` modules and functionals) are asked for ``"none"`` and averaged over all
    dimensions but the first; any other callable is asked one example at a time.
    """
    if isinstance(loss_fn, nn.Module) and isinstance(getattr(loss_fn, "reduction", None), str):
        unreduced: Any = copy.copy(loss_fn)
        unreduced.reduction = "none"
        return lambda outputs, targets: _rows(unreduced(outputs, targets), outputs)
    if not isinstance(loss_fn, nn.Module) and _takes_reduction(loss_fn):
        return lambda outputs, targets: _rows(loss_fn(outputs, targets, reduction="none"), outputs)  # type: ignore[call-arg]
    return lambda outputs, targets: torch.stack(
        [loss_fn(outputs[i : i + 1], targets[i : i + 1]).reshape(()) for i in range(len(outputs))]
    )


def grows_in_proportion(loss_fn: LossFunction, outputs: object, targets: torch.Tensor) -> bool:
    """Say whether any outputs may be asked about, and twice these cost at most twice their loss: L(2 z) <= 2 L(z).

    For losses of classification it is so whatever z and the target y are; of cross-entropy, since the sum over j of
    exp(2 (z_j - z_y)) is at most the square of that of exp(z_j - z_y). A squared error whose outputs come near their
    targets grows without bound. A loss of probabilities is defined, or finite, on some outputs alone: -z is none of
    them. Outputs that are no floating tensor are not asked about.
    """
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        return False
    with torch.no_grad():
        try:
            here, twice, turned = (loss_fn(factor * outputs, targets) for factor in (1.0, 2.0, -1.0))
        except Exception as error:  # noqa: BLE001 - whatever a loss raises outside its domain, the run goes on
            log.debug("loss_takes_no_damping", extra={"reason": f"{type(error).__name__}: {error}"})
            return False
    return bool(twice <= 2.0 * here) and bool(torch.isfinite(turned))


def accuracy_of(outputs: torch.Tensor, targets: torch.Tensor) -> float | None:
    """Give the share of examples whose largest output is the target class; ``None`` when targets are no classes."""
    if outputs.ndim != targets.ndim + 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    dim = 1 if outputs.ndim > 1 else 0
    return float((outputs.argmax(dim) == targets).double().mean())


def _takes_reduction(loss_fn: Callable[..., object]) -> bool:
    try:
        return "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        return False


def _rows(losses: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    if losses.ndim == 0 or len(losses) != len(outputs):
        raise InvalidInputError.of("loss_fn", f"give {len(outputs)} losses for {len(outputs)} examples", losses.shape)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses
