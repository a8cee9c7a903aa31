"""Seeds that learn alone: those on equal terms share a pass where the host allows it, and rivals begin together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from esper.contracts.errors import EsperError
from esper.contracts.run import GrowthPhase
from esper.core import optimizers
from esper.core.adaptation import Adaptation
from esper.core.batches import Batch
from esper.core.context import RunContext
from esper.core.incubator import Incubator, TrialTerms, affordable_way, trial_precision
from esper.execution.joint_trials import JointTrials

log = logging.getLogger(__name__)


class Nursery:
    """Lets the seeds that it has taken in take a step each. Training thread only."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._incubators: dict[str, Incubator] = {}
        self._trials: dict[tuple[Incubator, ...], JointTrials | None] = {}
        """By company; ``None`` where it could not share a pass."""

    @property
    def is_empty(self) -> bool:
        """Whether no seed learns alone."""
        return not self._incubators

    @property
    def adaptation_ids(self) -> list[str]:
        """Adaptations whose seed learns alone, oldest first."""
        return list(self._incubators)

    def take_in(self, adaptation: Adaptation) -> None:
        """Let the seed of an adaptation, which has a kernel, learn alone from now on.

        Raises:
            EsperError: The run's optimizer has no room for it.
        """
        context, cost = self._context, adaptation.cost
        layer, growth = context.model.kasmina_layer(adaptation.layer), context.growth
        optimizers.check_fit(
            context.optimizer, layer, layer.seed_parameters(adaptation.seed_index), layer_name=adaptation.layer
        )
        self._incubators[adaptation.id] = Incubator(
            context.model,
            context.loss_fn,
            layer=adaptation.layer,
            seed_index=adaptation.seed_index,
            learning_rate=growth.incubation_learning_rate,
            way=affordable_way(growth, kernel_flops=0 if cost is None else cost.flops, host_flops=context.host_flops),
            fitting_seed=context.fitting_seed(adaptation.seed_index),
            costs=context.costs,
        )

    def release(self, adaptation_id: str) -> None:
        """Let a seed learn alone no more; idempotent."""
        incubator = self._incubators.pop(adaptation_id, None)
        if incubator is not None:
            incubator.close()
            self._trials.clear()  # they hold on to the seeds that shared a pass with it

    def release_all(self) -> None:
        """Let none learn alone any more; idempotent."""
        for adaptation_id in self.adaptation_ids:
            self.release(adaptation_id)

    def state_dict(self) -> dict[str, Any]:
        """Give the state of every seed's learning, by adaptation."""
        return {key: item.state_dict() for key, item in self._incubators.items()}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]], adaptations: Mapping[str, Adaptation]) -> None:
        """Take in the seeds whose states these are, each going on where it stood."""
        for key, state in states.items():
            self.take_in(adaptations[key])
            self._incubators[key].load_state_dict(state)

    def step(self, learning: Sequence[Adaptation], waiting: Iterable[Adaptation], batch: Batch | None) -> None:
        """Let seeds take a step; those that wait for rivals to be born get ready for their first."""
        for adaptation in waiting:
            self._incubators[adaptation.id].prepare(batch)
        shared = self._take_shared_steps([self._incubators[item.id] for item in learning], batch)
        for adaptation in learning:
            incubator = self._incubators[adaptation.id]
            adaptation.isolated_steps += incubator in shared or incubator.step(batch)

    def _take_shared_steps(self, incubators: Sequence[Incubator], batch: Batch | None) -> set[Incubator]:
        together: dict[TrialTerms, list[Incubator]] = {}
        for incubator in incubators:
            terms = incubator.terms_beside_others(batch)
            if terms is not None:
                together.setdefault(terms, []).append(incubator)
        companies = {terms: tuple(company) for terms, company in together.items() if len(company) > 1}
        # A company that has changed is checked anew; what was known of the old one is let go.
        self._trials = {one: trials for one, trials in self._trials.items() if one in companies.values()}
        shared: set[Incubator] = set()
        for terms, company in companies.items():
            assert batch is not None
            with self._context.costs.phase(GrowthPhase.ISOLATION):
                if self._has_learnt(company, terms, batch):
                    shared.update(company)
        return shared

    def _has_learnt(self, company: tuple[Incubator, ...], terms: TrialTerms, batch: Batch) -> bool:
        """Let a company take a step in one pass; false where each has to learn by itself."""
        if company not in self._trials:
            refs = [one.ref for one in company]
            self._trials[company] = JointTrials(self._context.model, refs, norms=terms.norms)
        trials = self._trials[company]
        try:
            if trials is None or not self._run(trials, terms, batch):
                return False
        except EsperError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever cannot learn by itself either finds that out alone
            self._trials[company] = None
            log.info("shared_pass_impossible", extra={"seeds": len(company), "error": str(error)})
            return False
        for incubator in company:
            incubator.take_shared_step()
        return True

    def _run(self, trials: JointTrials, terms: TrialTerms, batch: Batch) -> bool:
        inputs, targets = (terms.turn.part(value) for value in batch)
        damping, loss_fn = 1.0 - terms.host_share, self._context.loss_fn

        def loss(output: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
            return loss_fn(output - damping * host if damping else output, targets)

        with trial_precision(terms.autocast, inputs.device):
            return trials.backward(inputs, loss)
