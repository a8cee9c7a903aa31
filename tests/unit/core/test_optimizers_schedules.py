"""What users put around an optimizer goes on over joined and left seeds: schedulers, clipping, scalers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs

import esper
from esper.blueprints.registry import default_registry
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core import optimizers
from esper.core.capture import capture_optimizer, cloned, restore_optimizer
from esper.core.morphable import MorphableModel
from esper.recovery import CheckpointManager
from tests.nested_states import differences

STEPS = 12
PATHS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS: dict[str, Any] = {
    f"{kind}-{path}": partial(make, **settings)
    for kind, make in {"sgd": partial(SGD, momentum=0.9), "adamw": AdamW}.items()
    for path, settings in PATHS.items()
}
INSIDE = {"_single_tensor": "loop", "_multi_tensor": "foreach", "_fused": "fused"}
"""How torch names the functions of each path; on the CPU it takes the loop unless told otherwise."""


def sequential(optimizer: Optimizer) -> lrs.LRScheduler:
    first, second = lrs.LinearLR(optimizer, 0.1, total_iters=3), lrs.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    return lrs.SequentialLR(optimizer, [first, second], milestones=[4])


def warm_up(optimizer: Optimizer) -> lrs.LRScheduler:
    linear, cosine = lrs.LinearLR(optimizer, 0.1, total_iters=4), lrs.CosineAnnealingLR(optimizer, 12)
    return lrs.ChainedScheduler([linear, cosine])


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda one: lrs.ConstantLR(one, factor=0.5, total_iters=5),
    "linear": lambda one: lrs.LinearLR(one, 0.1, total_iters=6),
    "exponential": lambda one: lrs.ExponentialLR(one, gamma=0.9),
    "step": lambda one: lrs.StepLR(one, step_size=3, gamma=0.5),
    "multi_step": lambda one: lrs.MultiStepLR(one, [2, 5, 5], gamma=0.5),
    "cosine": lambda one: lrs.CosineAnnealingLR(one, T_max=STEPS),
    "restarts": lambda one: lrs.CosineAnnealingWarmRestarts(one, T_0=4),
    "one_cycle": lambda one: lrs.OneCycleLR(one, max_lr=[0.1, 0.2], total_steps=STEPS + 2),
    "cyclic": lambda one: lrs.CyclicLR(one, [0.01, 0.02], [0.1, 0.2], step_size_up=3, cycle_momentum=False),
    "lambda": lambda one: lrs.LambdaLR(one, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "multiplicative": lambda one: lrs.MultiplicativeLR(one, [lambda n: 1 - 0.01 * n, lambda n: 0.9 - 0.01 * n]),
    "polynomial": lambda one: lrs.PolynomialLR(one, total_iters=STEPS),
    "sequential": sequential,
    "warm_up": warm_up,
    "plateau": lambda one: lrs.ReduceLROnPlateau(one, patience=1, min_lr=[1e-3, 1e-4]),
    "plateau_one_floor": lambda one: lrs.ReduceLROnPlateau(one, patience=0, min_lr=1e-3),
    "swa": lambda one: torch.optim.swa_utils.SWALR(one, swa_lr=[0.01, 0.02], anneal_epochs=5),
}


@pytest.fixture(autouse=True)
def _no_advice() -> Iterator[None]:
    with warnings.catch_warnings():  # SequentialLR itself steps by number
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
        yield


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The paths that steps have truly taken, counted."""
    taken: Counter[str] = Counter()

    def counted(path: str, function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            taken[path] += 1
            function(*args, **kwargs)

        return run

    for module, kind in ((sys.modules[SGD.__module__], "sgd"), (sys.modules[Adam.__module__], "adam")):
        for inside, path in INSIDE.items():
            name = f"{inside}_{kind}"
            monkeypatch.setattr(module, name, counted(path, getattr(module, name)))
    return taken


class Rig:
    """A wrapped host with two groups, an optimizer and what stands around it."""

    def __init__(self, schedule: str = "step", make: Any = OPTIMIZERS["sgd-loop"]) -> None:
        torch.manual_seed(0)
        self.model: MorphableModel = esper.wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.model(torch.zeros(1, 3))
        groups = [{"params": list(self.model[index].parameters()), "lr": lr} for index, lr in ((2, 0.1), (0, 0.2))]
        self.optimizer: Optimizer = make(groups)
        self.scheduler = SCHEDULES[schedule](self.optimizer)

    def step(self, number: int, clip: Callable[[Rig], object] = lambda _: None) -> None:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        loss = self.model(x).square().mean()
        loss.backward()
        clip(self)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metric = (1.0,) if isinstance(self.scheduler, lrs.ReduceLROnPlateau) else ()
        self.scheduler.step(*metric)

    def grow(self, *states: State, layer: str = "0", index: int = 0) -> list[nn.Parameter]:
        blueprint, found = default_registry().create_blueprint("bottleneck_adapter"), self.model.kasmina_layers[layer]
        found.germinate(index, blueprint.ir, blueprint_id=blueprint.id, random_seed=index)
        for state in states:
            found.transition(index, state)
        if State.EVALUATING in states:
            found.set_alpha(index, 0.5)
            optimizers.join(self.optimizer, found, found.seed_parameters(index), layer)
        return found.seed_parameters(index)

    def drop(self, parameters: list[nn.Parameter], layer: str = "0", index: int = 0) -> None:
        optimizers.leave(self.optimizer, parameters)
        self.model.kasmina_layers[layer].clear_seed(index)

    def host(self) -> dict[str, Any]:
        """Give the host's parameters, their state in the optimizer and the groups' settings."""
        parameters = {name: value for name, value in self.model.named_parameters() if "seeds" not in name}
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = {name: dict(self.optimizer.state[value]) for name, value in parameters.items()}
        return {"parameters": parameters, "state": state, "settings": settings}

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def lists(self) -> dict[str, int]:
        inner = [self.scheduler, *getattr(self.scheduler, "_schedulers", [])]
        names = ("base_lrs", "min_lrs", "lr_lambdas", "_last_lr", "max_lrs")
        return {f"{n}.{name}": len(getattr(s, name)) for n, s in enumerate(inner) for name in names if hasattr(s, name)}


def test_no_schedule_of_torch_is_left_out() -> None:
    made: set[type] = set()
    for schedule in SCHEDULES:
        outer = Rig(schedule).scheduler
        made |= {type(one) for one in (outer, *getattr(outer, "_schedulers", []))}
    assert made >= {getattr(lrs, name) for name in lrs.__all__} - {lrs.LRScheduler}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_the_same_over_coming_and_going(schedule: str, kind: str, paths: Counter[str]) -> None:
    alone, grown = Rig(schedule, OPTIMIZERS[kind]), Rig(schedule, OPTIMIZERS[kind])
    guests: list[nn.Parameter] = []
    for number in range(STEPS):
        if number == 4:
            guests = grown.grow(State.EVALUATING)
        if number == 8:
            grown.drop(guests)
        alone.step(number)
        before = [guest.detach().clone() for guest in guests]
        grown.step(number)
        assert grown.rates() == alone.rates()
        assert grown.lists() == alone.lists()
        assert set(grown.lists().values()) <= {2}
        if 4 <= number < 8 and grown.rates()[1] > 0:
            moved = [not torch.equal(guest, value) for guest, value in zip(guests, before, strict=True)]
            assert any(moved), "the seed takes the steps of its layer's group"
    assert paths == {kind.split("-")[1]: 2 * 2 * STEPS}, "every group of both took this path at every step"


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_under_a_schedule_a_guest_leaves_the_hosts_state_alone(schedule: str, kind: str) -> None:
    alone, grown = Rig(schedule, OPTIMIZERS[kind]), Rig(schedule, OPTIMIZERS[kind])
    guests: list[nn.Parameter] = []

    def teach(one: Rig) -> None:  # what the seed learns behind the host's back; its alpha is 0
        for guest in guests:
            guest.grad = torch.ones_like(guest)

    for number in range(STEPS):
        if number == 4:
            guests = grown.grow(State.EVALUATING)
            grown.model.kasmina_layers["0"].set_alpha(0, 0.0)
        if number == 8:
            grown.drop(guests)
            guests = []
        before = [guest.detach().clone() for guest in guests]
        alone.step(number)
        rate = grown.rates()[1]
        grown.step(number, teach)
        assert differences(alone.host(), grown.host()) == []
        moved = [not torch.equal(guest, value) for guest, value in zip(guests, before, strict=True)]
        assert all(moved) or rate == 0
    assert len(alone.optimizer.state) == len(grown.optimizer.state) == 4


def test_a_seed_is_stepped_at_its_layers_rate() -> None:
    one = Rig("one_cycle")
    one.optimizer.param_groups[1]["momentum"] = 0.0
    for number in range(3):
        one.step(number)
    guests = one.grow(State.EVALUATING)
    before, rate = [guest.detach().clone() for guest in guests], one.rates()[1]
    momentum = one.optimizer.param_groups[1]["momentum"]
    for guest in guests:
        guest.grad = torch.ones_like(guest)
    one.optimizer.step()
    assert momentum > 0, "a cycle moves the momentum too"
    for guest, value in zip(guests, before, strict=True):
        assert torch.equal(guest, value - rate * torch.ones_like(value))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_over_a_grown_optimizer_goes_through_a_checkpoint(schedule: str, tmp_path: Path) -> None:
    first, second = Rig(schedule), Rig(schedule)
    for number in range(6):
        if number == 3:
            first.grow(State.EVALUATING)
        first.step(number)
    store = CheckpointManager(tmp_path)
    checkpoint_id = store.save_state(
        {
            "kasmina": {"model": dict(first.model.state_dict())},
            "tolaria": {
                "optimizer": capture_optimizer(first.optimizer, first.model),
                "scheduler": first.scheduler.state_dict(),
            },
        }
    )
    saved = store.load_state(checkpoint_id)
    second.model.load_state_dict(saved["kasmina"]["model"])
    restore_optimizer(second.optimizer, second.model, saved["tolaria"]["optimizer"])
    second.scheduler.load_state_dict(cloned(saved["tolaria"]["scheduler"]))
    for number in range(6, STEPS):
        first.step(number)
        second.step(number)
        assert first.rates() == second.rates()
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "clip",
    [
        lambda one: clip_grad_norm_(one.model.parameters(), 0.01),
        lambda one: [clip_grad_norm_(group["params"], 0.01) for group in one.optimizer.param_groups],
    ],
    ids=["all", "by group"],
)
@pytest.mark.parametrize("learns", ["trial", "site"])
def test_seeds_that_learn_alone_do_not_change_the_hosts_clipping(
    clip: Callable[[Rig], object], learns: str, task: Any, open_session: Any, decide: Any, kernel_for: Any, line: Any
) -> None:
    loss_fn = nn.CrossEntropyLoss() if learns == "trial" else nn.functional.cross_entropy
    found = []
    for grows in (False, True):
        one = Rig()
        one.model = esper.wrap(task.host())
        one.optimizer = AdamW(one.model.parameters(), lr=1e-2)
        growth = esper.GrowthConfig(incubation_epochs=9)
        session = open_session(one.model, one.optimizer, growth=growth, loss_fn=loss_fn)
        if grows:
            decision = decide(one.model)
            line.incoming += [decision, kernel_for(decision)]
        norms = []
        for x, y in [*task.train] * 3:
            loss = loss_fn(one.model(x), y)
            loss.backward()
            norms.append(clip(one))
            session.step(loss)
        found.append((norms, {key: value for key, value in one.model.state_dict().items() if "seeds" not in key}))
        if grows:
            seed = one.model.kasmina_layers["0"].find_seed(0)
            assert session.orchestrator.adaptations[decision.adaptation_id].isolated_steps > 6
            assert all(parameter.grad is None for parameter in seed.parameters())
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_clipping_by_group_takes_a_grafted_seed_with_its_layer() -> None:
    one = Rig()
    guests = one.grow(State.EVALUATING)
    for parameter in one.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sizes = [sum(value.numel() for value in group["params"]) for group in one.optimizer.param_groups]
    norms = [float(clip_grad_norm_(group["params"], 1.0)) for group in one.optimizer.param_groups]
    assert norms == pytest.approx([size**0.5 for size in sizes])
    (first, second) = (group["params"][0].grad for group in one.optimizer.param_groups)
    assert all(torch.allclose(guest.grad, second.flatten()[0]) for guest in guests)
    assert not torch.allclose(first.flatten()[0], second.flatten()[0]), "the other layer's group is as it was"


class Scaled(Rig):
    """A rig under a gradient scaler; the gradients of its guests, which the host does not see, are ones."""

    def __init__(self, kind: str, way: str) -> None:
        super().__init__(make=OPTIMIZERS[kind])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        self.way = way
        self.guests: list[nn.Parameter] = []

    def enter(self) -> None:
        self.guests = self.grow(State.EVALUATING)
        self.model.kasmina_layers["0"].set_alpha(0, 0.0)

    def exit(self) -> None:
        self.drop(self.guests)
        self.guests = []

    def scaled_step(self, number: int, poisoned: torch.Tensor | None) -> None:
        """Take one step, in which the gradient of one parameter may overflow."""
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        self.scaler.scale(self.model(x).square().mean()).backward()
        for guest in self.guests:
            guest.grad = torch.ones_like(guest) * self.scaler.get_scale()
        if poisoned is not None:
            poisoned.grad.view(-1)[0] = float("inf")
        if self.way == "unscaled by the user":
            self.scaler.unscale_(self.optimizer)
            assert all((guest.grad.view(-1)[1:] == 1).all() for guest in self.guests), "guests are unscaled too"
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        after = zip(self.model.parameters(), before, strict=True)
        assert all(torch.equal(a, b) is (poisoned is not None) for a, b in after), "all are stepped, or none"


OVERFLOWS = {2: "host", 4: "guest", 7: "other group", 10: "host"}
"""Whose gradient overflows in which step, while a seed is there in steps 4 to 8."""


@pytest.mark.parametrize("way", ["unscaled in the step", "unscaled by the user"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_scaler_skips_and_steps_seeds_with_their_host(kind: str, way: str, paths: Counter[str]) -> None:
    alone, grown = Scaled(kind, way), Scaled(kind, way)
    twins: list[nn.Parameter] = []
    for number in range(STEPS):
        before = grown.scaler.state_dict()
        if number == 4:
            grown.enter()
            twins = [nn.Parameter(guest.detach().clone()) for guest in grown.guests]
            by_itself = OPTIMIZERS[kind]([{"params": twins, "lr": grown.rates()[1]}])
        if number == 9:
            grown.exit()
        assert grown.scaler.state_dict() == before, "coming and going does not touch the scale"
        for one in (alone, grown):
            own = {"host": one.model[0].weight, "other group": one.model[2].bias}
            own["guest"] = one.guests[1] if one.guests else own["host"]
            one.scaled_step(number, own.get(OVERFLOWS.get(number, "")))
        assert differences(alone.scaler.state_dict(), grown.scaler.state_dict()) == []
        assert differences(alone.host(), grown.host()) == []
        if grown.guests and number not in OVERFLOWS:
            for twin in twins:
                twin.grad = torch.ones_like(twin)
            by_itself.step()
        for guest, twin in zip(grown.guests, twins, strict=False):
            assert torch.equal(guest, twin), "it steps as it would by itself, over the steps that were not skipped"
    assert grown.scaler.get_scale() == 512.0, "it rose and fell"
    assert set(paths) == {kind.split("-")[1]}
    assert len(grown.optimizer.state) == 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_seed_joins_between_unscaling_and_the_step(kind: str) -> None:
    alone, grown = Scaled(kind, ""), Scaled(kind, "")
    for number in range(6):
        for one in (alone, grown):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
            one.scaler.scale(one.model(x).square().mean()).backward()
            one.scaler.unscale_(one.optimizer)
            if one is grown and number == 2:
                one.enter()
            elif one is grown and number == 4:
                one.exit()
            one.scaler.step(one.optimizer)
            one.scaler.update()
            one.optimizer.zero_grad()
        assert differences(alone.scaler.state_dict(), grown.scaler.state_dict()) == []
        assert differences(alone.host(), grown.host()) == []


@pytest.mark.parametrize("learns", ["trial", "site"])
def test_a_step_that_overflows_does_not_poison_a_seed_that_learns_alone(
    learns: str, task: Any, open_session: Any, decide: Any, kernel_for: Any, line: Any
) -> None:
    loss_fn = nn.CrossEntropyLoss() if learns == "trial" else nn.functional.cross_entropy
    model = esper.wrap(task.host())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    growth = esper.GrowthConfig(incubation_epochs=9)
    session = open_session(model, optimizer, growth=growth, loss_fn=loss_fn, step_optimizer=False)
    session.track("scaler", scaler)
    decision = decide(model)
    line.incoming += [decision, kernel_for(decision)]
    for number, (x, y) in enumerate([*task.train] * 3):
        loss = loss_fn(model(x), y)
        overflow = float("inf") if number in (4, 9) else 1.0
        scaler.scale(loss * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        session.step(loss, batch=None if learns == "site" else (x * overflow, y))
    assert scaler.get_scale() == 64.0
    seed = model.kasmina_layers["0"].find_seed(0)
    assert seed is not None
    assert all(torch.isfinite(parameter).all() for parameter in seed.parameters())
    twin = copy.deepcopy(scaler.state_dict())
    snapshot = session._memory.capture()
    assert snapshot["tolaria"]["tracked"]["scaler"] == twin
