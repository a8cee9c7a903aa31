"""The arms of the growth measure: what each is, what it may choose on the control split, and how it is run.

    arm                              what it is
    grown                            the host, grown through an embedded mesh of its own
    random growth                    the same life cycle, sites and blueprints at random
    host                             the host alone
    static-final, torch init         the grown topology from the start, seeds as torch initialises such modules
    static-final, born               the same, seeds as seeds are born: the network starts as the host
    static-wide                      an ordinary network of the whole budget, the best of three as deep as the host
    static-deep                      the same, one or two layers deeper
    Net2Wider                        the host, widened to the whole budget at half time, its function preserved
    gromo                            the host, grown by gromo to the hidden units of the whole budget
    ..., same compute                trained on until it has spent all FLOPs that growing spent; stops early if better
    ..., train+control               learns from both splits, as one would who need not decide anything

All others learn from the train split alone. Every control takes the best of three learning rates on the control split,
each constant or with the fall at the end that grafted seeds have; what grows under Esper (and by chance) has the rate
that the goals fix, or else the one that the host chose, with its fall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from torch import nn

import esper
from bench.growth_gromo import SCHEDULES, growth_plan, make_gromo, reason_not_measured
from bench.growth_grown import grow_arm, rebuild, topology_from
from bench.growth_hosts import Cell, Shape, deep_shapes, inner_shape, make_net, wide_shapes
from bench.growth_net2wider import widen
from bench.growth_tasks import load
from bench.growth_training import (
    RATE_FACTORS,
    TAILS,
    Outcome,
    Recipe,
    Trained,
    at_rate,
    outcome_of,
    score,
    train,
    train_shape,
)
from bench.random_growth import RandomMesh
from esper.cli import digits
from esper.core.report import RunReport
from esper.core.session import MeshPort

GROWN: Final = "grown"
SAME_COMPUTE: Final = ", same compute"
ALL_DATA: Final = ", train+control"
FINAL: Final = "static-final, torch init"
CONTROLS: Final = (
    "host",
    "host" + SAME_COMPUTE,
    "host" + ALL_DATA,
    FINAL,
    "static-final, born",
    "static-final" + SAME_COMPUTE,
    "static-wide",
    "static-wide" + SAME_COMPUTE,
    "static-wide" + ALL_DATA,
    "static-deep",
    "static-deep" + SAME_COMPUTE,
    "Net2Wider",
    "gromo",
    "random growth",
)
"""Every control, in the order in which they are shown; the grown arm and ``FINAL`` come before what depends on them."""
ARMS: Final = (GROWN, *CONTROLS)
PLAIN_ARMS: Final = frozenset(
    {"host", "host" + ALL_DATA, "static-wide", "static-wide" + ALL_DATA, "static-deep", "Net2Wider", "gromo"}
)
"""Controls in which nothing of Esper's grows, and that need no figure of one in which it does. So do all choices."""

Kind = Literal["host", "static-wide", "static-deep", "Net2Wider", "gromo"]
KINDS: Final[tuple[Kind, ...]] = ("host", "static-wide", "static-deep", "Net2Wider", "gromo")
"""What is chosen once a cell, on the control split, with seeds of its own."""
FIRST_TUNING_SEED: Final = 9000
"""Seeds for choosing are these and the following; no arm that is reported has one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to train a control."""

    shape: Shape
    """Shape at the end."""
    rate: float
    """Learning rate."""
    tail: float = 0.0
    """Last share of the training in which the rate falls."""
    times: int = 0
    """Times that gromo grows."""

    def to_plain(self) -> dict[str, Any]:
        """Give the option as JSON has it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Option:
        """Read what :meth:`to_plain` gave."""
        return cls(shape=Shape(**data["shape"]), rate=data["rate"], tail=data["tail"], times=data["times"])

    def __str__(self) -> str:
        falling = ", falling rate" if self.tail else ""
        return f"{self.shape}{falling}" + (f", grown {self.times} times" if self.times else "")


def options(cell: Cell, kind: Kind) -> list[Option]:
    """Give what a control chooses from; nothing where it cannot be measured."""
    if kind == "gromo" and reason_not_measured(cell):
        return []
    base = cell.settings.learning_rate
    rates = [factor * base for factor in RATE_FACTORS]
    shapes: dict[Kind, Callable[[Cell], list[Shape]]] = {
        "host": lambda cell: [cell.host],
        "static-wide": wide_shapes,
        "static-deep": deep_shapes,
        "Net2Wider": lambda cell: [inner_shape(cell)],
        "gromo": lambda cell: [inner_shape(cell)],
    }
    schedules = SCHEDULES if kind == "gromo" else (0,)
    return [
        Option(shape=shape, rate=rate, tail=tail, times=times)
        for shape in shapes[kind](cell)
        for rate in rates
        for tail in TAILS
        for times in schedules
    ]


def choose(cell: Cell, kind: Kind, *, num_seeds: int) -> Option | None:
    """Give the option that does best on the control split, on average over seeds kept for choosing."""
    found = options(cell, kind)
    if not found:
        return None
    task = load(cell.task)

    def mean_score(option: Option) -> tuple[float, float]:
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + num_seeds)
        scores = [score(task, train_option(cell, kind, option, seed=seed).best) for seed in seeds]
        return sum(first for first, _ in scores) / num_seeds, sum(second for _, second in scores) / num_seeds

    return max(found, key=mean_score)


def train_option(
    cell: Cell, kind: Kind, option: Option, *, seed: int, min_flops: int = 0, learns_control: bool = False
) -> Trained:
    """Train a control in one of its ways."""
    settings = at_rate(cell.settings, option.rate, option.tail)
    task = load(cell.task)
    if kind == "gromo":
        recipe = Recipe(settings=settings, changes=growth_plan(cell, option.times))
        return train(task, make_gromo(cell, seed=seed), recipe, seed=seed)
    if kind == "Net2Wider":
        widened: Callable[[nn.Module], nn.Module] = lambda model: widen(cell, model, option.shape, seed=seed)  # noqa: E731
        recipe = Recipe(settings=settings, changes={settings.epochs // 2: widened})
        return train(task, make_net(cell, cell.host, seed), recipe, seed=seed)
    recipe = Recipe(settings=settings, min_flops=min_flops, learns_control=learns_control, stops_early=min_flops > 0)
    return train_shape(cell, option.shape, recipe, seed=seed)


def run_arm(arm: str, cell: Cell, *, seed: int, chosen: Mapping[Kind, Option], done: Mapping[str, Outcome]) -> Outcome:
    """Run one arm of one seed.

    Args:
        arm: One of ``ARMS`` that can be measured on the cell.
        cell: Task and host.
        seed: Decides weights, batches and decisions.
        chosen: What the controls chose on the control split.
        done: Arms of this seed that have been run; ``grown`` and ``FINAL`` are needed by those that follow them.
    """
    if arm == GROWN:
        return grow_arm(esper.Mesh.embedded, _at(cell, chosen), seed=seed)
    if arm == "random growth":
        return grow_arm(lambda: nullcontext(RandomMesh(seed)), _at(cell, chosen), seed=seed, wait_s=0.0)
    if arm.startswith("static-final"):
        return _run_final(arm, cell, seed=seed, done=done)
    kind = next(kind for kind in KINDS if arm.startswith(kind))
    trained = train_option(
        cell,
        kind,
        chosen[kind],
        seed=seed,
        min_flops=done[GROWN].flops if arm.endswith(SAME_COMPUTE) else 0,
        learns_control=arm.endswith(ALL_DATA),
    )
    option = chosen[kind]
    return outcome_of(load(cell.task), trained, rate=option.rate, tail=option.tail, choice=str(option))


def _at(cell: Cell, chosen: Mapping[Kind, Option]) -> Cell:
    """Give the cell at the rate of what grows: where no goal fixes it, the host's choice, its fall included."""
    if cell.rate_is_fixed:
        return cell
    return replace(cell, settings=at_rate(cell.settings, chosen["host"].rate, chosen["host"].tail))


def _run_final(arm: str, cell: Cell, *, seed: int, done: Mapping[str, Outcome]) -> Outcome:
    """Train the grown topology from scratch at each rate and fall; the best on the control split is looked at."""
    task, topology = load(cell.task), topology_from(done[GROWN].topology)
    same_compute = arm.endswith(SAME_COMPUTE)
    ways = [(factor * cell.settings.learning_rate, tail) for factor in RATE_FACTORS for tail in TAILS]
    if same_compute:
        ways = [(done[FINAL].rate, done[FINAL].tail)]

    def trained_at(rate: float, tail: float) -> Trained:
        recipe = Recipe(
            settings=at_rate(cell.settings, rate, tail),
            min_flops=done[GROWN].flops if same_compute else 0,
            stops_early=same_compute,
        )
        return train(task, rebuild(cell, topology, seed=seed, as_born=arm.endswith("born")), recipe, seed=seed)

    found = [(way, trained_at(*way)) for way in ways]
    (rate, tail), best = max(found, key=lambda one: score(task, one[1].best))
    return outcome_of(task, best, rate=rate, tail=tail, choice="falling rate" if tail else "")


def grow(mesh: MeshPort, splits: digits.DigitsSplits, *, epochs: int, seed: int, wait_s: float = 60.0) -> RunReport:
    """Grow the demo's host on digits, for measures that need a growing run and not its result.

    ``wait_s`` is the longest wait for each epoch's decision; 0 suits a mesh that answers at once or not at all.
    """
    model = esper.wrap(digits.make_host(seed))
    # The policy's draws depend on the run's name, so equal seeds need equal names.
    session = esper.SessionConfig(run_id=f"bench-growth-{seed}", decision_wait_s=wait_s)
    trainer = esper.Trainer(
        model,
        digits.make_optimizer(model),
        nn.CrossEntropyLoss(),
        mesh=mesh,
        budget=esper.Budget(added_params=2.0),
        seed=seed,
        config=esper.TrainerConfig(show_progress=False, session=session),
    )
    report: RunReport = trainer.fit(splits.train_loader(seed), splits.control_loader(), epochs)
    return report
