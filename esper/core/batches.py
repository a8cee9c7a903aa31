"""The batch of the present step, seen without asking the user's loop for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchWatcher:
    """Keeps references to the last inputs and targets of a training step.

    Inputs are seen by a hook on the model. Targets are seen by a hook on the loss when it is a module; with any other
    loss the loop may hand the batch to ``Session.step`` instead.
    """

    def __init__(self, model: nn.Module, loss_fn: object) -> None:
        self._inputs: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._see_inputs)]
        self.sees_targets = isinstance(loss_fn, nn.Module)
        if isinstance(loss_fn, nn.Module):
            self._handles.append(loss_fn.register_forward_pre_hook(self._see_targets))

    @property
    def inputs(self) -> torch.Tensor | None:
        """Inputs of the present step; ``None`` when none were seen."""
        return self._inputs

    def take(self) -> Batch | None:
        """Give the batch of the step and forget it; ``None`` when inputs or targets were not seen."""
        inputs, targets = self._inputs, self._targets
        self._inputs = self._targets = None
        if inputs is None or targets is None or len(inputs) != len(targets):
            return None
        return inputs, targets

    def close(self) -> None:
        """Take the hooks away; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs = self._targets = None

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled() and args and isinstance(args[0], torch.Tensor) and args[0].ndim:
            self._inputs = args[0]

    def _see_targets(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if torch.is_grad_enabled() and len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].ndim:
            self._targets = args[1]
