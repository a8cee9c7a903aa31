"""G4: what seeds leave behind that went before they were blended in: bits that differ from a run that never grew.

    alone   the host in a plain loop of torch's, without Esper
    asked   the same host, wrapped, in a session in which races are held; of each race some go in its rounds, the
            others are taken out while they learn alone, or as the run ends. The first is shown the batches, and learns
            from trials; the second is not, and learns from what the layers see

The loop draws noise from the global streams of torch, NumPy and Python, so that whoever else draws from one changes the
run. Compared after every epoch, and once growth has ended: weights, buffers, the optimizer's state, the three streams,
and the loss of every step. Once blended in a seed and its host learn from each other: what goes then has left a trace.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper
from bench.bits import differing_bits
from bench.growth_grown import SEEDS_PER_LAYER
from bench.growth_hosts import FAMILIES, FamilyName, make_cell, make_net
from bench.growth_tasks import Batches, Task, load
from bench.growth_training import make_optimizer
from bench.random_growth import FIRST_EPOCH, RandomMesh
from bench.report import Figure, Goal, Result, at_least
from esper.contracts.errors import InvalidStateError
from esper.core.wrap import SkippedLayersWarning

EPOCHS: Final = 12
LEARNS_EPOCHS: Final = 6
"""Epochs a seed would learn alone; none is let come so far."""
TAKEN_OUT_EPOCH: Final = FIRST_EPOCH + LEARNS_EPOCHS - 1
"""Epoch after which whatever still learns of the first race is taken out; the next is ended by the run's end."""
NO_BITS: Final = Goal(sign="==", limit=0)

Seen = dict[str, Tensor]
"""Copies of all that is compared, by name."""
MakeHost = Callable[[], nn.Module]
Step = Callable[[Tensor, Tensor, Tensor], None]
"""Takes the loss of a step, and its inputs and targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A run that was asked to grow."""

    seen: tuple[Seen, ...]
    """After every epoch, and at the end."""
    outcomes: tuple[str, ...]
    """Why each adaptation ended, oldest first."""


def measure(*, quick: bool) -> Result:
    """Run hosts of three families and one with batch norm and dropout on digits: three seeds each, or one."""
    torch.set_num_threads(1)
    task, num_seeds = load("digits"), 1 if quick else 3
    figures: list[Figure] = []
    for name, make in hosts().items():
        figures += host_figures(name, task, [make(seed) for seed in range(num_seeds)])
    notes = (
        f"{num_seeds} seeds a host; {EPOCHS} epochs, after each of which, and once growth has ended, all is compared.",
        "The last figure of a host shows that the comparison sees what it is to see: one number more is drawn.",
    )
    return Result(name="g4_without_trace", figures=tuple(figures), notes=notes)


def hosts() -> dict[str, Callable[[int], MakeHost]]:
    """Give what makes each host, by name and seed."""

    def of_family(family: FamilyName) -> Callable[[int], MakeHost]:
        cell = make_cell("digits", family)
        return lambda seed: lambda: make_net(cell, cell.host, seed)

    return {**{f"digits/{family}": of_family(family) for family in FAMILIES}, "digits/norm, dropout": _with_norm}


def host_figures(name: str, task: Task, makes: Sequence[MakeHost], *, epochs: int = EPOCHS) -> list[Figure]:
    """Give the figures of one host, one run a seed.

    Raises:
        InvalidStateError: A seed was blended in, or none was tried: then there is nothing to compare.
    """
    bits = drawn = tried = 0
    for seed, make in enumerate(makes):
        alone, asked = run_alone(task, make, seed, epochs=epochs), run_asked(task, make, seed, epochs=epochs)
        bits += sum(bits_apart(one, other) for one, other in zip(alone, asked.seen, strict=True))
        tried += len(asked.outcomes)
        if seed == 0:
            other = run_alone(task, make, seed, epochs=epochs, draws_after=FIRST_EPOCH)
            drawn = bits_apart(alone[-1], other[-1])
    return [
        Figure(name=f"{name}: bits that differ from a run that never grew", value=bits, unit="bits", goal=NO_BITS),
        Figure(name=f"{name}: seeds that had gone", value=tried, unit="seeds", goal=at_least(1)),
        Figure(name=f"{name}: bits that differ by one draw", value=drawn, unit="bits", goal=at_least(1)),
    ]


def run_alone(task: Task, make: MakeHost, seed: int, *, epochs: int, draws_after: int | None = None) -> list[Seen]:
    """Train the host in a plain loop; ``draws_after`` so many epochs one number is drawn that nobody uses."""
    model, batches = make(), _batches(task, seed)
    optimizer, names = _optimizer(model), _names(model)
    _seed_streams(seed)

    def step(*_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    seen: list[Seen] = []
    for epoch in range(1, epochs + 1):
        losses = _epoch(model, batches, step)
        if epoch == draws_after:
            torch.rand(1)
        seen.append(_all_of(model, optimizer, names, losses))
    return [*seen, seen[-1]]


def run_asked(task: Task, make: MakeHost, seed: int, *, epochs: int) -> Asked:
    """Train the host in a session that races are held in, none of whose seeds is let be blended in.

    Raises:
        InvalidStateError: One was.
    """
    names = _names(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayersWarning)
        model = esper.wrap(make(), seeds_per_layer=SEEDS_PER_LAYER)
    optimizer, batches = _optimizer(model), _batches(task, seed)
    growth = esper.GrowthConfig(incubation_epochs=LEARNS_EPOCHS, race_rounds=LEARNS_EPOCHS // 2, embargo_epochs=1)
    session = esper.Session(
        model,
        optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        control_loader=[(task.control.inputs, task.control.targets)],
        mesh=RandomMesh(seed),
        seed=seed,
        config=esper.SessionConfig(run_id=f"bench-g4-{seed}", planned_epochs=epochs, growth=growth),
    )
    _seed_streams(seed)

    def shown(loss: Tensor, inputs: Tensor, targets: Tensor) -> None:
        session.step(loss, batch=(inputs, targets))

    def hidden(loss: Tensor, *_: Tensor) -> None:
        session.step(loss)

    seen: list[Seen] = []
    with session:
        for epoch in range(1, epochs + 1):
            losses = _epoch(model, batches, shown if epoch <= TAKEN_OUT_EPOCH else hidden)
            session.end_epoch()
            if epoch == TAKEN_OUT_EPOCH:
                for one in session.orchestrator.ongoing():
                    session.orchestrator.remove_seed(one.layer, one.seed_index, "taken out while it learnt")
            seen.append(_all_of(model, optimizer, names, losses))
        report = session.report()
        seen.append(_all_of(model, optimizer, names, losses))
    blended = [item.id for item in report.adaptations if item.graft_steps or item.outcome in ("kept", "open")]
    if blended:
        raise InvalidStateError(f"no seed may be blended in where no trace is to be left, got {', '.join(blended)}")
    return Asked(seen=tuple(seen), outcomes=tuple(item.reason for item in report.adaptations))


def bits_apart(one: Seen, other: Seen) -> int:
    """Give how many bits of all that is compared differ; what one of them lacks differs in every bit."""
    shared = sum(differing_bits(value, other[name]) for name, value in one.items() if name in other)
    alone = [value for name, value in (one | other).items() if name not in one or name not in other]
    return shared + sum(8 * value.nbytes for value in alone)


def _epoch(model: nn.Module, batches: Batches, step: Step) -> list[float]:
    """Train for an epoch on noisy examples; gives the loss of every step."""
    model.train()
    losses: list[float] = []
    for inputs, targets in batches:
        noise = float(np.random.normal()) + random.random()  # noqa: NPY002 - the legacy stream is what users draw from
        noisy = inputs + 0.01 * torch.randn_like(inputs) + 0.01 * noise
        loss = cross_entropy(model(noisy), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        step(loss, noisy, targets)
        losses.append(float(loss.detach()))
    return losses


def _all_of(model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], losses: list[float]) -> Seen:
    """Copy what is compared; ``names`` are those of the host's own weights and buffers."""
    state = model.state_dict()
    found = {f"model {name}": state[name].clone() for name in names if name in state}
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {name}": torch.as_tensor(value).clone() for name, value in values.items()}
    _, numbers, *places = np.random.get_state(legacy=True)  # noqa: NPY002
    found["torch's stream"] = torch.get_rng_state()
    found["NumPy's stream"] = torch.from_numpy(np.asarray(numbers, dtype=np.int64).copy())
    found["NumPy's place"] = torch.tensor([float(place) for place in places], dtype=torch.float64)
    found["Python's stream"] = torch.tensor(random.getstate()[1])
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    return found


def _names(host: nn.Module) -> list[str]:
    return list(host.state_dict())


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, make_cell("digits", "mlp").settings)


def _batches(task: Task, seed: int) -> Batches:
    return Batches(task.train, batch_size=make_cell("digits", "mlp").settings.batch_size, seed=seed)


def _seed_streams(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def _with_norm(seed: int) -> MakeHost:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(),
                nn.Linear(16, 10),
            )  # fmt: skip

    return make
