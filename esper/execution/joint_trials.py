"""Several seeds that learn alone, in one pass: each as if it were alone, what lies before them computed once.

    lane     takes part                     what its output is for
    k        seed k, with all its share     the loss of seed k
    last     none                           the host's own output, by which a trial is damped

The sum of the seeds' losses is differentiated at once. A seed is in the loss of its own lane and in no other, so the
gradient that it gets is that of its loss alone. Alone they cost a pass each, and a damped trial two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from esper.execution.fused import FusedPasses
from esper.execution.incubation import Norms, add_gradients, learning_alone
from esper.execution.overrides import GrowingModel, SeedRef, find_seed

TrialLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes the model's output with a seed and without any, and gives the loss as a scalar."""


class JointTrials:
    """Trials of the same seeds, step by step. Training thread only."""

    def __init__(self, model: GrowingModel, seeds: Sequence[SeedRef], *, norms: Norms = "running") -> None:
        self._model = model
        self._seeds = tuple(seeds)
        self._norms: Norms = norms
        self._is_sound = False
        self._passes = FusedPasses(model, [*({seed: 1.0} for seed in self._seeds), {}])

    def backward(self, inputs: Tensor, loss: TrialLoss) -> bool:
        """Add to each seed's ``.grad`` the gradient of its own loss, as ``trial_backward`` does.

        Gives false where this batch is to be tried seed by seed: the host's examples know of each other, it draws
        random numbers, or a pass does not pay. Nothing has changed then.

        Raises:
            As :func:`esper.execution.incubation.trial_forward`.
        """
        with learning_alone(self._model, self._seeds, norms=self._norms) as parameters, torch.enable_grad():
            with self._failures_of_its_own():
                outputs = self._passes.outputs(inputs)
                self._is_sound = outputs is not None
            if outputs is None:
                return False
            *with_seed, without = outputs.unbind()
            host = without.detach()
            add_gradients(torch.stack([loss(output, host) for output in with_seed]).sum(), parameters)
        return True

    @contextmanager
    def _failures_of_its_own(self) -> Iterator[None]:
        """Until a pass has been sound, take back what failures it counted, if it is given up: each seed tries again."""
        if self._is_sound:
            yield
            return
        seeds = [find_seed(self._model, ref) for ref in self._seeds]
        before = [(seed.breaker.failures_in_row, seed.breaker.last_failure, seed.failures.clone()) for seed in seeds]
        try:
            yield
        finally:
            if not self._is_sound:
                for seed, (in_row, last, counted) in zip(seeds, before, strict=True):
                    seed.breaker.failures_in_row, seed.breaker.last_failure = in_row, last
                    seed.failures.copy_(counted)
