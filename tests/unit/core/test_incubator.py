"""A seed's own optimizer beside the run's: the host sees nothing of it, whatever the way, the precision, the steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import esper
from esper.blueprints import cost
from esper.blueprints.flops import count_flops
from esper.blueprints.registry import default_registry
from esper.contracts.errors import InvalidInputError
from esper.core.flops import forward_flops
from esper.core.incubator import (
    MIN_TRIAL_EXAMPLES,
    Incubator,
    LearningWay,
    affordable_way,
    choose_way,
    way_cost,
)

WAYS = {
    "trial": LearningWay(kind="trial"),
    "trial on a quarter": LearningWay(kind="trial", share=0.25),
    "trial, norms by batch": LearningWay(kind="trial", norms="batch"),
    "damped": LearningWay(kind="damped"),
    "damped, on a quarter": LearningWay(kind="damped", share=0.25),
    "local": LearningWay(kind="local"),
    "local, measured": LearningWay(kind="local", reach_interval=3),
}
SITES = {"0": "conv3x3", "1": "squeeze_excite", "7": "gated_mlp"}
STEPS = 12


class Wobble(nn.Module):
    """Draws from every random stream there is, and counts its passes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            value = value * (1.0 + 0.01 * random.random() + 0.01 * float(np.random.rand()))  # noqa: NPY002
        return value


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.3)),
        *(Wobble(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 12), nn.BatchNorm1d(12), nn.Dropout(0.3)),
        nn.Linear(12, 3),
    )


BATCHES = [
    (torch.randn(32, 1, 6, 6, generator=draw), torch.randint(0, 3, (32,), generator=draw))
    for draw in [torch.Generator().manual_seed(5)]
    for _ in range(STEPS)
]


@dataclass
class Trace:
    """Everything that a run's host is, step by step."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def note(self, out: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = [(name, value) for name, value in model.named_parameters() if "seeds" not in name]
        found: dict[str, Any] = {"out": out.detach().clone(), "torch": torch.get_rng_state()}
        found |= {f"gradient of {name}": value.grad.clone() for name, value in named if value.grad is not None}
        found |= {key: value.clone() for key, value in model.state_dict().items() if "seeds" not in key}
        for name, value in named:
            found |= {f"{key} of {name}": item.clone() for key, item in optimizer.state[value].items()}
        numpy = np.random.get_state()[1]  # noqa: NPY002
        found["numpy"], found["python"] = torch.from_numpy(np.array(numpy)), random.getstate()
        self.seen.append(found)

    def differences(self, other: Trace) -> list[str]:
        found = []
        for step, (mine, theirs) in enumerate(zip(self.seen, other.seen, strict=True)):
            assert list(mine) == list(theirs)
            for key, value in mine.items():
                same = torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
                found += [] if same else [f"step {step}: {key}"]
        return found


def run(
    way: LearningWay | None, *, site: str = "0", amp: bool = False, fitting_seed: int | None = None
) -> tuple[Trace, Any]:
    """Train the host, with a seed beside it or without; gives what the host was, and the model."""
    model = esper.wrap(host())
    model.eval()(BATCHES[0][0])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_fn, incubator = nn.CrossEntropyLoss(), None
    if way is not None:
        ir = default_registry().create_blueprint(SITES[site]).ir
        model.kasmina_layer(site).germinate(1, ir, random_seed=3)
        incubator = Incubator(
            model, loss_fn, layer=site, seed_index=1, learning_rate=1e-2, way=way, fitting_seed=fitting_seed
        )
    for stream in (random.seed, np.random.seed, torch.manual_seed):
        stream(11)
    scaler = torch.amp.GradScaler("cpu", enabled=amp, init_scale=2.0**40, growth_interval=3)
    trace = Trace()
    for inputs, targets in BATCHES:
        precision: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16) if amp else nullcontext()
        with precision:
            out = model(inputs)
            loss = loss_fn(out, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        trace.note(out, model, optimizer)
        optimizer.zero_grad()
        if incubator is not None:
            incubator.step((inputs, targets))
    return trace, model


@pytest.fixture(autouse=True)
def streams_as_before() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def learnt(model: Any, site: str) -> float:
    fresh = default_registry().create_blueprint(SITES[site]).ir
    layer = model.kasmina_layer(site)
    twin = copy.deepcopy(layer.require_seed(1).kernel)
    layer.germinate(2, fresh, random_seed=3)
    twin.load_state_dict(layer.require_seed(2).kernel.state_dict())
    pairs = zip(layer.require_seed(1).kernel.parameters(), twin.parameters(), strict=True)
    return sum(float((mine - born).detach().abs().sum()) for mine, born in pairs)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_host_is_to_the_bit_that_of_a_run_without_seed(way: LearningWay, site: str) -> None:
    alone, _ = run(None)
    beside, model = run(way, site=site)
    assert beside.differences(alone) == []
    assert learnt(model, site) > 0.01


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_so_it_is_where_first_weights_are_fitted_to_a_batch(way: LearningWay, site: str) -> None:
    alone, _ = run(None)
    beside, fitted = run(way, site=site, fitting_seed=3)
    assert beside.differences(alone) == []
    _, again = run(way, site=site, fitting_seed=3)
    _, drawn = run(way, site=site)
    found, same, other = (dict(model.kasmina_layer(site).named_parameters()) for model in (fitted, again, drawn))
    assert all(torch.equal(value, same[name]) for name, value in found.items()), "equal runs are equal"
    assert any(not torch.equal(value, other[name]) for name, value in found.items())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_so_it_is_under_autocast_with_a_scaler_that_overflows(way: LearningWay) -> None:
    alone, _ = run(None, amp=True)
    beside, model = run(way, amp=True, fitting_seed=3)
    assert beside.differences(alone) == []
    assert learnt(model, "0") > 0.01
    assert all(torch.isfinite(value).all() for value in model.kasmina_layer("0").require_seed(1).parameters())


def test_the_trace_would_see_a_difference() -> None:
    alone, _ = run(None)
    beside, _ = run(None)
    assert beside.differences(alone) == []
    beside.seen[3]["1.running_mean"] += 1e-7
    assert beside.differences(alone) == ["step 3: 1.running_mean"]


def small(way: LearningWay, loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Any, Incubator]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 3)))
    model(torch.randn(2, 4))
    model.kasmina_layer("0").germinate(0, default_registry().create_blueprint("gated_mlp").ir)
    made = Incubator(model, loss_fn or nn.MSELoss(), layer="0", seed_index=0, learning_rate=1e-2, way=way)
    return model, made


@pytest.mark.parametrize(("num_rows", "num_parts"), [(64, 4), (65, 4), (24, 3), (15, 1), (3, 1)])
def test_parts_of_the_batch_take_turns_and_none_is_too_small(num_rows: int, num_parts: int) -> None:
    seen: list[Tensor] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets[:, 0].clone())
        return outputs.square().mean()

    _, incubator = small(LearningWay(kind="trial", share=0.25), loss_fn)
    rows = torch.arange(num_rows, dtype=torch.float32).repeat(4, 1).T
    for _ in range(num_parts + 1):
        incubator.step((rows, rows))
    assert torch.equal(torch.cat(seen[:num_parts]), rows[:, 0])
    assert torch.equal(seen[0], seen[num_parts])
    assert all(len(part) >= min(MIN_TRIAL_EXAMPLES, num_rows) for part in seen)


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    def endless(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).sum() * torch.inf

    model, incubator = small(LearningWay(kind="trial"), endless)
    before = [value.clone() for value in model.kasmina_layer("0").seed_parameters(0)]
    incubator.step((torch.randn(4, 4), torch.randn(4, 3)))
    after = model.kasmina_layer("0").seed_parameters(0)
    assert all(torch.allclose(mine, born, rtol=1e-3) for mine, born in zip(after, before, strict=True))


def test_without_the_batch_a_trial_becomes_a_regression() -> None:
    model, incubator = small(LearningWay(kind="trial"))
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    nn.functional.mse_loss(model(x), y).backward()
    assert not incubator.step(None)  # the site was not looked at yet
    nn.functional.mse_loss(model(x), y).backward()
    assert incubator.step(None)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_state_taken_over_goes_on_to_the_bit(way: LearningWay) -> None:
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(32, 4, generator=draw), torch.randn(32, 3, generator=draw)) for _ in range(9)]

    def learn(model: Any, incubator: Incubator, part: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in part:
            nn.functional.mse_loss(model(x), y).backward()
            model.zero_grad()
            incubator.step((x, y))

    model, incubator = small(way)
    learn(model, incubator, batches[:4])
    other, again = small(way)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(incubator.state_dict()))
    learn(model, incubator, batches[4:])
    learn(other, again, batches[4:])
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "straight"}, "kind must be one of damped, local, trial, got 'straight'"),
        ({"kind": "trial", "share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"kind": "damped", "host_share": 1.5}, r"host_share must lie in \[0, 1\], got 1.5"),
        ({"kind": "local", "reach": -1.0}, "reach must be > 0, got -1.0"),
        ({"kind": "local", "reach_interval": -1}, "reach_interval must be >= 0 steps, got -1"),
    ],
)
def test_a_way_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LearningWay(**settings)


def chosen(choice: Any = "auto", limit: float = 0.5, *, kernel_flops: int = 0, host_flops: int = 1000) -> LearningWay:
    return choose_way(choice, limit, kernel_flops=kernel_flops, host_flops=host_flops)


def test_a_seed_learns_beside_a_damped_host_by_as_much_of_the_batch_as_the_limit_has_room_for() -> None:
    assert chosen(limit=1.0) == LearningWay(kind="damped")
    assert chosen(limit=0.5) == LearningWay(kind="damped", share=0.5)
    assert chosen(limit=0.5, kernel_flops=500) == LearningWay(kind="damped", share=0.25)
    for share in (0.0, 0.5, 20.0):
        growth = esper.GrowthConfig()
        found = affordable_way(growth, kernel_flops=int(1000 * share), host_flops=1000)
        assert found == LearningWay(kind="damped", share=0.5)


def test_a_site_is_learnt_from_where_the_limit_has_no_room_for_a_trial() -> None:
    assert chosen(limit=0.2) == LearningWay(kind="local", reach=1.0)
    assert chosen(limit=0.2, kernel_flops=200).kind == "local"


def test_a_heavy_kernel_gets_the_largest_trial_that_the_limit_has_room_for() -> None:
    assert chosen(limit=0.45, kernel_flops=900) == LearningWay(kind="trial", share=0.25)
    assert chosen("trial", 1.1, kernel_flops=1500) == LearningWay(kind="trial", share=0.5)
    assert chosen("trial", 1.0) == LearningWay(kind="trial")
    assert chosen("trial", 0.5) == LearningWay(kind="trial", share=0.5)
    assert chosen("trial", 0.2) == LearningWay(kind="trial", share=0.25)


def test_where_nothing_fits_the_cheapest_way_is_taken() -> None:
    assert chosen(limit=0.01, kernel_flops=100).kind == "local"
    assert chosen(limit=0.01, kernel_flops=5000) == LearningWay(kind="trial", share=0.25)
    assert chosen(kernel_flops=100, host_flops=0) == LearningWay(kind="trial", share=0.25)


def test_a_choice_is_kept_whatever_it_costs() -> None:
    assert chosen("local", 10.0).kind == "local"
    assert chosen("trial", 0.001) == LearningWay(kind="trial", share=0.25)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("kind", ["damped", "trial"])
def test_the_cost_of_a_way_is_a_bound_on_the_flops_counted(site: str, share: float, kind: Any) -> None:
    way = LearningWay(kind=kind, share=share)
    model = esper.wrap(host())
    x, y = BATCHES[0]
    model.eval()(x)
    model.train()
    loss_fn = nn.CrossEntropyLoss()
    host_flops = forward_flops(model, x[:1])
    blueprint = default_registry().create_blueprint(SITES[site])
    layer = model.kasmina_layer(site)
    kernel_flops = cost(blueprint.ir, layer.site).flops
    layer.germinate(1, blueprint.ir)
    incubator = Incubator(model, loss_fn, layer=site, seed_index=1, learning_rate=1e-2, way=way)
    incubator.step((x, y))
    step = 3 * host_flops * len(x)
    counted = count_flops(lambda: incubator.step((x, y))) / step
    assert 0.1 * share < counted <= way_cost(way, kernel_flops=kernel_flops, host_flops=host_flops) * 1.001


def beside_a_knowing_host(kind: Any, loss_fn: Any = nn.CrossEntropyLoss()) -> tuple[Any, Incubator, Any]:  # noqa: B008
    """A host whose training loss is next to nothing, with a seed that reads the input; gives a batch too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=draw)
    x[:, 0] = x[:, 0].sign()
    y = (x[:, 0] > 0).long() if isinstance(loss_fn, nn.CrossEntropyLoss) else x[:, :2].clone()
    model = esper.wrap(nn.Sequential(nn.Linear(4, 2)))
    with torch.no_grad():
        weight = torch.tensor([[-15.0, 0, 0, 0], [15.0, 0, 0, 0]])
        model.get_submodule("0").weight.copy_(weight if y.dtype == torch.long else torch.eye(2, 4))
        model.get_submodule("0").bias.zero_()
    model.eval()(x)
    model.train()
    model.kasmina_layer("0").germinate(0, default_registry().create_blueprint("glu").ir, random_seed=1)
    way = LearningWay(kind=kind)
    return model, Incubator(model, loss_fn, layer="0", seed_index=0, learning_rate=1e-2, way=way), (x, y)


def delta_size(model: Any, x: Tensor) -> float:
    with torch.no_grad():
        return float(model.kasmina_layer("0").require_seed(0).kernel(x, model.eval()(x)).norm())


def test_behind_a_host_that_knows_its_training_set_a_seed_learns_by_damping_alone() -> None:
    sizes = {}
    for kind in ("damped", "trial"):
        model, incubator, batch = beside_a_knowing_host(kind)
        for _ in range(20):
            assert incubator.step(batch)
        sizes[kind] = delta_size(model, batch[0])
    assert sizes["damped"] > 5.0 * sizes["trial"]


def test_a_loss_that_takes_no_damping_is_learnt_from_the_site() -> None:
    """Beside a host at its optimum, a damped squared error would have the seed say again what was taken away."""
    model, incubator, (x, y) = beside_a_knowing_host("damped", nn.MSELoss())
    assert not incubator.step((x, y)), "the site was not seen yet"
    for _ in range(5):
        nn.MSELoss()(model(x), y).backward()
        assert incubator.step((x, y))
    assert incubator.state_dict()["takes_damping"] is False
    assert incubator.state_dict()["learns_locally"] is True


def test_whether_a_loss_takes_damping_is_asked_once_and_survives_a_checkpoint() -> None:
    asked: list[float] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        asked.append(float(outputs.detach().abs().max()))
        return nn.functional.cross_entropy(outputs, targets)

    model, incubator, batch = beside_a_knowing_host("damped")
    incubator._loss_fn = loss_fn
    incubator.step(batch)
    assert len(asked) == 4
    assert asked[1:3] == [2.0 * asked[0], asked[0]]
    assert asked[3] == pytest.approx(0.5 * asked[0])
    again = Incubator(model, loss_fn, layer="0", seed_index=0, learning_rate=1e-2, way=LearningWay(kind="damped"))
    again.load_state_dict(copy.deepcopy(incubator.state_dict()))
    again.step(batch)
    assert len(asked) == 5


@pytest.mark.parametrize(("name", "value"), [("incubation_way", "straight"), ("incubation_cost", 0.0)])
def test_settings_of_growth_that_make_no_sense_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=rf"growth.{name} must be"):
        esper.GrowthConfig(**{name: value})
