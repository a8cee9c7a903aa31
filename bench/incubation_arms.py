"""The arms of the incubation measure: ways of learning alone, a toy of known optimum, digits, what a step costs.

All arms of a run learn at once, at seeds of one layer, from one host. Since none of them touches the host, every arm
sees the same host, the same batches and the same start, so arms are paired to the bit.

    symbol   meaning                                               shape
    Phi      features that the toy's host lacks, sin(2 x)          (examples, features)
    B        what its seed learns: delta = Phi B                   (features, outputs)
    R        what is missing at the site                           (examples, outputs)
    V        map behind the site                                   (outputs, outputs)

The toy's loss is |(R - Phi B) V|^2. V is invertible, so its optimum is B* = argmin |R - Phi B|^2, whatever V is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

import esper
from bench.paired import PairedTimes, calls_lasting, time_pair
from esper.blueprints.flops import count_flops
from esper.blueprints.registry import default_registry
from esper.cli import digits
from esper.core.control import Batch
from esper.core.growth import GrowthConfig
from esper.core.incubator import Incubator, LearningWay
from esper.core.losses import LossFunction
from esper.core.morphable import MorphableModel
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.incubation import SiteSample
from esper.execution.overrides import SeedRef

WHOLE: Final = "trial, whole batch"
GENTLE: Final = "trial, a third of the rate"
HYBRID: Final = "local, then trial"
STRAIGHT_THROUGH: Final = "straight-through"
DAMPED: Final = "damped, half"
WAYS: Final[Mapping[str, LearningWay]] = {
    "damped, whole batch": LearningWay(kind="damped"),
    DAMPED: LearningWay(kind="damped", share=0.5),
    WHOLE: LearningWay(kind="trial"),
    "trial, half": LearningWay(kind="trial", share=0.5),
    "trial, quarter": LearningWay(kind="trial", share=0.25),
    "trial, norms by batch": LearningWay(kind="trial", norms="batch"),
    "local, reach 0.1": LearningWay(kind="local", reach=0.1),
    "local, reach 0.3": LearningWay(kind="local", reach=0.3),
    "local, reach 1": LearningWay(kind="local", reach=1.0),
    "local, reach measured": LearningWay(kind="local", reach=0.3, reach_interval=16),
}
"""Ways that the product has."""
ARMS: Final = (*WAYS, GENTLE, HYBRID, STRAIGHT_THROUGH)
"""Those; the first at a lower learning rate; two in turn, half of the steps each; the negative control."""
PRETRAIN_EPOCHS: Final = 20
"""Epochs a digits host trains before its seeds germinate."""
INCUBATION_EPOCHS: Final = GrowthConfig().incubation_epochs
"""Epochs a seed learns alone before its contribution is measured."""


class Student:
    """One arm: an incubator, or two in turn, or the negative control."""

    def __init__(
        self,
        arm: str,
        model: MorphableModel,
        loss_fn: LossFunction,
        ref: SeedRef,
        *,
        num_steps: int,
        learning_rate: float = GrowthConfig().incubation_learning_rate,
    ) -> None:
        def incubator(way: str) -> Incubator:
            return Incubator(
                model, loss_fn, layer=ref.layer, seed_index=ref.seed_index, learning_rate=learning_rate, way=WAYS[way]
            )

        learning_rate /= 3.0 if arm == GENTLE else 1.0
        self._switch_at = num_steps // 2 if arm == HYBRID else num_steps
        if arm == HYBRID:
            self._turns = [incubator("local, reach 0.3"), incubator(WHOLE)]
        elif arm == STRAIGHT_THROUGH:
            self._turns = [_Straight(model, loss_fn, ref, learning_rate)]
        else:
            self._turns = [incubator(WHOLE if arm == GENTLE else arm)]
        self._taken = 0

    def step(self, batch: Batch) -> None:
        """Take the step that follows a training step."""
        self._turns[min(self._taken // self._switch_at, len(self._turns) - 1)].step(batch)
        self._taken += 1

    def close(self) -> None:
        """Take all hooks away."""
        for one in self._turns:
            one.close()


class _Straight(Incubator):
    """The negative control: a straight-through estimate, whose gradient never contains the seed's own effect."""

    def __init__(self, model: MorphableModel, loss_fn: LossFunction, ref: SeedRef, learning_rate: float) -> None:
        super().__init__(
            model,
            loss_fn,
            layer=ref.layer,
            seed_index=ref.seed_index,
            learning_rate=learning_rate,
            way=LearningWay(kind="local"),
        )
        self._kernel = model.kasmina_layer(ref.layer).require_seed(ref.seed_index).kernel

    def learn_from_site(self) -> bool:
        """Take one step against the gradient at the host's output, wherever the seed already stands."""
        if self._capture.seen is not None:
            straight_through_loss(self._kernel, self._capture.seen).backward()  # type: ignore[no-untyped-call]
        self._step()
        return True


def straight_through_loss(kernel: nn.Module, sample: SiteSample) -> Tensor:
    """Give the loss whose gradient is the straight-through estimate: <g, d>, linear in d, so without an optimum."""
    loss: Tensor = (sample.g * kernel(sample.x, sample.h)).sum()
    return loss


# --------------------------------------------------------------------------- the toy


class Features(nn.Module):
    """The toy's seed: Phi B, with B zero at birth."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Give the delta."""
        del h
        return torch.sin(2.0 * x) @ self.b


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    """A linear host at its own optimum that lacks an additive part; see the legend."""

    model: MorphableModel
    """Linear map W, then V."""
    x: Tensor
    """Inputs."""
    y: Tensor
    """Targets."""
    wanted: Tensor
    """Phi B*."""

    @classmethod
    def make(cls, seed: int, *, stretch: float, num_arms: int, num_examples: int = 512) -> Toy:
        """Give the toy of a seed; V stretches by 1 to ``stretch``, so 1 makes the site as good as the last layer."""
        draw = torch.Generator().manual_seed(seed)
        inputs, outputs = 6, 4
        x = torch.randn(num_examples, inputs, generator=draw)
        phi = torch.sin(2.0 * x)
        linear, missing = (torch.randn(inputs, outputs, generator=draw) for _ in range(2))
        at_site = x @ linear + phi @ missing + 0.1 * torch.randn(num_examples, outputs, generator=draw)
        turn = torch.linalg.qr(torch.randn(outputs, outputs, generator=draw)).Q
        v = turn @ torch.diag(torch.logspace(0.0, 1.0, outputs, base=stretch)) @ turn.T
        model = esper.wrap(
            nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.Linear(outputs, outputs, bias=False)),
            seeds_per_layer=num_arms,
        )
        solution = torch.linalg.lstsq(x, at_site).solution
        with torch.no_grad():
            model.get_parameter("0.weight").copy_(solution.T)
            model.get_parameter("1.weight").copy_(v.T)
        best = torch.linalg.lstsq(phi, at_site - x @ solution).solution
        return cls(model=model, x=x, y=at_site @ v, wanted=phi @ best)

    def distance(self, ref: SeedRef) -> float:
        """Give how far a seed's delta is from the best one, relative to that one; 1 at birth."""
        kernel = self.model.kasmina_layer(ref.layer).require_seed(ref.seed_index).kernel
        with torch.no_grad():
            return float((kernel(self.x, self.x) - self.wanted).norm() / self.wanted.norm())


def run_toy(
    seed: int, *, stretch: float, num_steps: int, batch_size: int = 64, arms: Sequence[str] = ARMS
) -> dict[str, float]:
    """Let every arm learn the toy; gives each one's distance to the optimum."""
    toy = Toy.make(seed, stretch=stretch, num_arms=len(arms))
    toy.model(toy.x[:batch_size])
    refs = {arm: SeedRef("0", index) for index, arm in enumerate(arms)}
    for ref in refs.values():
        toy.model.kasmina_layer("0").attach_module(ref.seed_index, Features(6, 4))
    loss_fn = nn.MSELoss()
    students = [
        Student(arm, toy.model, loss_fn, ref, num_steps=num_steps, learning_rate=2e-2) for arm, ref in refs.items()
    ]
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        rows = torch.randperm(len(toy.x), generator=draw)[:batch_size]
        loss_fn(toy.model(toy.x[rows]), toy.y[rows]).backward()
        toy.model.zero_grad()  # the host stays at its optimum
        for student in students:
            student.step((toy.x[rows], toy.y[rows]))
    return {arm: toy.distance(ref) for arm, ref in refs.items()}


# --------------------------------------------------------------------------- digits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsHost:
    """A host, the sites where its seeds stand, and what stands there."""

    build: Callable[[], nn.Module]
    """Makes the network."""
    sites: Mapping[str, tuple[str, ...]]
    """Templates by dotted layer name."""


HOSTS: Final[Mapping[str, DigitsHost]] = {
    "mlp": DigitsHost(build=_mlp, sites={"0": ("gated_mlp", "widen"), "2": ("gated_mlp",)}),
    "cnn": DigitsHost(
        build=_cnn,
        sites={
            "1": ("conv3x3", "widen_conv"),
            "5": ("widen_conv", "squeeze_excite"),
            "11": ("bottleneck_adapter",),
        },
    ),
}
"""A perceptron; a small convolutional network with batch norm and dropout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteOutcome:
    """What the arms at one site came to with one template and seed."""

    host: str
    """Host."""
    layer: str
    """Site."""
    template: str
    """Template."""
    seed: int
    """Seed of weights, splits and batches."""
    control: Mapping[str, float]
    """Share of the host's control loss that a seed takes away at the end of its incubation, by arm; > 0 helps."""
    sealed: Mapping[str, float]
    """The same of the sealed test."""
    is_untouched: bool
    """Whether host and random streams are, to the bit, those of a run without seeds."""


def run_digits(
    host: str,
    *,
    seed: int,
    arms: Sequence[str] = ARMS,
    pretrain: int = PRETRAIN_EPOCHS,
    epochs: int = INCUBATION_EPOCHS,
) -> Iterator[SiteOutcome]:
    """Let all arms learn at every site of a host with every template there; one outcome each."""
    splits, spec = digits.load_digits(split_seed=seed), HOSTS[host]
    torch.manual_seed(seed)
    first = spec.build()
    digits.train_plain(first, splits, epochs=pretrain, seed=seed)
    start, stream = {key: value.clone() for key, value in first.state_dict().items()}, torch.get_rng_state()
    digits.train_plain(first, splits, epochs=epochs, seed=seed + 1000)  # a run without seeds
    alone, stream_after = first.state_dict(), torch.get_rng_state()
    for layer, template in ((layer, template) for layer, found in spec.sites.items() for template in found):
        model = esper.wrap(spec.build(), seeds_per_layer=len(arms))
        model.load_state_dict(start)
        germinate(model, layer, template, len(arms), splits.train.tensors[0][:2], seed=seed)
        torch.set_rng_state(stream)
        refs = {arm: SeedRef(layer, index) for index, arm in enumerate(arms)}
        _incubate(model, splits, refs, epochs=epochs, seed=seed + 1000)
        own = model.state_dict()
        same = all(torch.equal(own[key], value) for key, value in alone.items())
        yield SiteOutcome(
            host=host,
            layer=layer,
            template=template,
            seed=seed,
            is_untouched=same and torch.equal(torch.get_rng_state(), stream_after),
            control=_shares(model, splits.control.tensors, refs),
            sealed=_shares(model, splits.sealed.tensors, refs),
        )


def _incubate(
    model: MorphableModel, splits: digits.DigitsSplits, refs: Mapping[str, SeedRef], *, epochs: int, seed: int
) -> None:
    """Train the host on as ``digits.train_plain`` does, all arms beside it."""
    optimizer = torch.optim.AdamW(
        [value for name, value in model.named_parameters() if "seeds" not in name],
        lr=digits.LEARNING_RATE,
        weight_decay=digits.WEIGHT_DECAY,
    )
    loss_fn, loader = nn.CrossEntropyLoss(), splits.train_loader(seed)
    num_steps = epochs * len(loader)
    students = [Student(arm, model, loss_fn, ref, num_steps=num_steps) for arm, ref in refs.items()]
    model.train()
    for _ in range(epochs):
        for batch in loader:
            plain_step(model, optimizer, loss_fn, batch)
            for student in students:
                student.step((batch[0], batch[1]))
    for student in students:
        student.close()


def germinate(model: MorphableModel, layer: str, template: str, count: int, x: Tensor, *, seed: int) -> None:
    """Bring the same kernel to so many seeds of a layer; the host's buffers stay."""
    model.eval()
    model(x)
    ir = default_registry().create_blueprint(template).ir
    for index in range(count):
        model.kasmina_layer(layer).germinate(index, ir, random_seed=seed)
    model.train()


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: LossFunction, batch: Sequence[Tensor]
) -> None:
    """Take a training step."""
    loss_fn(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def _shares(model: MorphableModel, tensors: Sequence[Tensor], refs: Mapping[str, SeedRef]) -> dict[str, float]:
    def rows(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    configurations: list[dict[SeedRef, float]] = [{}, *({ref: 1.0} for ref in refs.values())]
    losses = evaluate_configurations(model, [(tensors[0], tensors[1])], rows, configurations).mean(1)
    return {arm: float((losses[0] - one) / losses[0]) for arm, one in zip(refs, losses[1:], strict=True)}


# --------------------------------------------------------------------------- what a step costs


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a step with a seed that learns alone costs, over the step without it."""

    times: PairedTimes | None
    """Processor times of both; ``None`` where only FLOPs were counted."""
    flops_ratio: float
    """FLOPs of the first over those of the second."""


def step_cost(
    build: Callable[[], nn.Module], batch: Batch, *, layer: str, template: str, arm: str, seconds: float
) -> StepCost:
    """Time training steps of one model with a seed learning by a way against steps of its twin without one.

    ``seconds`` of 0 count FLOPs and time nothing.
    """
    loss_fn = nn.CrossEntropyLoss()

    def twin() -> tuple[MorphableModel, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = esper.wrap(build())
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    (ours, optimizer), (plain, plain_optimizer) = twin(), twin()
    germinate(ours, layer, template, 1, batch[0][:2], seed=0)
    student = Student(arm, ours, loss_fn, SeedRef(layer, 0), num_steps=10**9)

    def step_with() -> None:
        plain_step(ours, optimizer, loss_fn, batch)
        student.step(batch)

    def step_without() -> None:
        plain_step(plain, plain_optimizer, loss_fn, batch)

    for _ in range(2):
        step_with()
    repeats = max(1, WAYS[arm].reach_interval)
    flops = sum(count_flops(step_with) for _ in range(repeats)) / repeats
    times = None
    if seconds > 0.0:
        calls = calls_lasting(step_without, 0.01)
        times = time_pair(step_with, step_without, seconds=seconds, calls=calls, clock=time.thread_time_ns)
    student.close()
    return StepCost(times=times, flops_ratio=flops / count_flops(step_without))
