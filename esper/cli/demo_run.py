"""The demo's main job: grow a network on digits through the mesh, several seeds, each beside its controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import esper
from esper.cli import digits
from esper.contracts.run import Contribution
from esper.core.report import EpochRecord, RunReport
from esper.core.session import MeshPort, Session
from esper.execution.counterfactual import paired_interval

OnEpoch = Callable[[EpochRecord, Session], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """How the demo trains."""

    epochs: int = 30
    """Epochs of every arm, at least 1."""
    seeds: int = 3
    """Runs, each with its own weights and order of batches, at least 1."""
    added_params: float = 2.0
    """Parameters that may be added, as a share of the host's."""
    decision_wait_s: float = 10.0
    """Longest wait for a decision at the end of an epoch: epochs take a tenth of a second here, and equal seeds should
    give equal runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedResult:
    """One seed's run beside its controls."""

    seed: int
    """Seed of weights and batches."""
    report: RunReport
    """Report of the grown run."""
    grown_accuracy: float
    """Sealed-test accuracy of the grown network, 0 to 1."""
    host_accuracy: float
    """The same of the host alone, trained for the same epochs."""
    static_accuracy: float
    """The same of a static network of the grown size, trained for the same epochs."""
    static_parameters: int
    """Parameters of that network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """All runs of a demo."""

    settings: DemoSettings
    """How it was trained."""
    runs: tuple[SeedResult, ...]
    """One entry a seed."""

    def margin(self, control: str) -> Contribution | None:
        """Give grown minus control accuracy, paired by seed, with its 95 % interval; ``None`` for a single seed."""
        differences = [run.grown_accuracy - getattr(run, f"{control}_accuracy") for run in self.runs]
        return paired_interval(torch.tensor(differences)) if len(differences) > 1 else None


def run_seed(
    mesh: MeshPort, splits: digits.DigitsSplits, settings: DemoSettings, seed: int, on_epoch: OnEpoch | None = None
) -> SeedResult:
    """Grow one network and train its controls; the sealed test is read here, after everything was decided."""
    model = esper.wrap(digits.make_host(seed))
    trainer = esper.Trainer(
        model,
        digits.make_optimizer(model),
        nn.CrossEntropyLoss(),
        mesh=mesh,
        budget=esper.Budget(added_params=settings.added_params),
        seed=seed,
        config=esper.TrainerConfig(
            show_progress=False, session=esper.SessionConfig(decision_wait_s=settings.decision_wait_s)
        ),
    )
    report = trainer.fit(splits.train_loader(seed), splits.control_loader(), settings.epochs, on_epoch=on_epoch)
    host = digits.make_host(seed)
    digits.train_plain(host, splits, epochs=settings.epochs, seed=seed)
    static = digits.make_host(seed, digits.width_for(report.final_params))
    digits.train_plain(static, splits, epochs=settings.epochs, seed=seed)
    return SeedResult(
        seed=seed,
        report=report,
        grown_accuracy=digits.accuracy(model, splits.sealed),
        host_accuracy=digits.accuracy(host, splits.sealed),
        static_accuracy=digits.accuracy(static, splits.sealed),
        static_parameters=digits.count_parameters(static),
    )


def as_plain(result: DemoResult) -> dict[str, object]:
    """Give a result as plain data for JSON."""
    return dataclasses.asdict(result)
