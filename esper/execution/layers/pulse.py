"""Which passes of a model its layers measure: decided once a pass for all of them, so that a layer need not ask.

A layer that is to measure its next forward pass is *armed*: it is in its busy form (``forms``), with ``busy_forward``
before its parent's ``forward``, until that pass has come by. All others run their parent's ``forward`` itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

if TYPE_CHECKING:
    from esper.execution.layers.base import KasminaLayer


class Pulse:
    """Counts the passes of one model. Training thread only.

    A pass is a call of the wrapped model. Where the training loop goes around that call (a method of the host, say),
    the steps of the session count instead.
    """

    __slots__ = ("_has_passed", "countdown", "interval_steps", "is_on", "is_paused", "num_due")

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps
        self.countdown = 1
        self.num_due = 0
        self.is_on = False
        self.is_paused = False
        self._has_passed = False

    @property
    def num_passes(self) -> int:
        """Passes counted while telemetry was on and not paused."""
        if self.num_due == 0:
            return 0
        return (self.num_due - 1) * self.interval_steps + 1 + (self.interval_steps - self.countdown)

    def tick(self) -> bool:
        """Count one pass; true where it is to be measured.

        REQUIRES: ``is_on``.
        """
        if self.is_paused:
            return False
        self._has_passed = True
        self.countdown -= 1
        if self.countdown > 0:
            return False
        self.num_due += 1
        self.countdown = self.interval_steps
        return True

    def tick_step(self) -> bool:
        """Count a training step in which the model itself was not called; true where its pass is to be measured."""
        has_passed, self._has_passed = self._has_passed, False
        if has_passed or not self.is_on:
            return False
        is_due = self.tick()
        self._has_passed = False
        return is_due


def arm(host: nn.Module, layers: Iterable[KasminaLayer]) -> None:
    """Let these layers measure their next forward pass.

    Those inside a compiled part of the host are left out: there nothing is measured, and the change would recompile.
    """
    compiled = {id(inside) for module in host.modules() if is_compiled(module) for inside in module.modules()}
    for layer in layers:
        if layer.telemetry_enabled and id(layer) not in compiled:
            layer.arm()


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs what ``torch.compile`` made of it."""
    return module._compiled_call_impl is not None or isinstance(module, OptimizedModule)
