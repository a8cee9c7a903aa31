"""First weights of a run's seeds: fitted once to the first batch they learn from, where the run wants it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.blueprints import default_registry, to_module
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core import incubator as incubator_module
from esper.core.capture import cloned
from esper.core.incubator import Incubator, LearningWay
from esper.execution.birth import fit_to_site, seen_at_site
from esper.execution.layers.base import KasminaLayer
from esper.execution.overrides import SeedRef
from esper.recovery import CheckpointManager
from tests.nested_states import differences

STILL = 1e-30
"""A learning rate that moves no weight that was drawn, and those at zero by no more than itself."""
WAYS = ("damped", "trial", "local")


def growth(**settings: Any) -> esper.GrowthConfig:
    return esper.GrowthConfig(**({"incubation_epochs": 50, "incubation_cost": 10.0} | settings))


def still(**settings: Any) -> esper.GrowthConfig:
    return growth(incubation_learning_rate=STILL, **settings)


class Run:
    """A session on far-off inputs, stepped by hand."""

    def __init__(self, task: Any, open_session: Any, *, config: esper.GrowthConfig, **settings: Any) -> None:
        torch.manual_seed(3)
        self.model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2)))
        self.criterion = settings.setdefault("loss_fn", nn.CrossEntropyLoss())
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.session = open_session(self.model, optimizer, growth=config, **settings)
        self.batches = [((x + 10.0) * 100.0, y) for x, y in task.train] * 3
        self.next = 0

    def grow(self, line: Any, decide: Any, kernel_for: Any, **changes: Any) -> Any:
        if self.model.kasmina_layers["0"].site is None:
            self.steps(1)
        decision = decide(self.model, **changes)
        line.incoming += [decision, kernel_for(decision)]
        self.session._look_into_mailbox()
        assert self.layer.state_layout.state(0) is State.ACTIVE
        return decision

    def steps(self, count: int) -> None:
        for x, y in self.batches[self.next : self.next + count]:
            loss = self.criterion(self.model(x), y)
            loss.backward()
            self.session.step(loss)
        self.next += count

    @property
    def layer(self) -> KasminaLayer:
        return self.model.kasmina_layers["0"]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.layer.require_seed(0).kernel.named_parameters()}

    def everything(self) -> dict[str, Any]:
        state: dict[str, Any] = cloned(self.session._memory.capture())
        for key in ("life", "packets", "control_loss"):
            state["tolaria"].pop(key)
        for item in state["orchestrator"]["adaptations"].values():
            item.pop("trace_id")
        state["kasmina"].pop("seed_states")  # holds the latency of the kernel's first run
        return state


@pytest.fixture
def start(task: Any, open_session: Any) -> Callable[..., Run]:
    return lambda config, **settings: Run(task, open_session, config=config, **settings)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Random seeds that weights have been fitted by."""
    found: list[int] = []

    def noted(*args: Any, random_seed: int) -> Any:
        found.append(random_seed)
        return fit_to_site(*args, random_seed=random_seed)

    monkeypatch.setattr(incubator_module, "fit_to_site", noted)
    return found


def drawn(run: Run, decision: Any) -> dict[str, Tensor]:
    seed = run.session._context.birth_seed(0)
    return dict(to_module(decision.blueprint.ir, decision.site, seed=seed).named_parameters())


def is_drawn(run: Run, decision: Any) -> bool:
    """Whether weights are those of the draw; those that began at zero may have begun to learn."""
    pairs = [(value, run.weights[name]) for name, value in drawn(run, decision).items()]
    return all(torch.equal(born, now) or not bool(born.any()) for born, now in pairs)


def variance_at(run: Run, node: str, x: Tensor) -> float:
    seen = seen_at_site(run.model, SeedRef("0", 0), lambda: run.model(x))
    assert seen is not None
    kernel, found = run.layer.require_seed(0).kernel, list[Tensor]()
    handle = kernel.get_submodule(f"node_{node}").register_forward_hook(lambda _module, _args, out: found.append(out))
    with torch.no_grad():
        kernel(*seen)
    handle.remove()
    return float(found[0].var(0, correction=0).mean())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["batch seen", "batch not seen"])
def test_a_seeds_first_step_finds_its_weights_fitted_to_the_batch(
    start: Any, line: Any, decide: Any, kernel_for: Any, fits: list[int], way: Any, loss_fn: Any
) -> None:
    run = start(still(incubation_way=way), loss_fn=loss_fn)
    decision = run.grow(line, decide, kernel_for, template="gated_mlp")
    assert is_drawn(run, decision)
    x, _ = run.batches[run.next]
    before = variance_at(run, "gate", x)
    run.steps(6)
    assert not is_drawn(run, decision)
    assert not 0.5 <= before <= 2.0
    assert variance_at(run, "gate", x) == pytest.approx(1.0, rel=0.5)
    assert fits == [run.session._context.birth_seed(0)], "once"
    assert run.layer.state_layout.errors[0] == 0


@pytest.mark.parametrize("way", WAYS)
def test_without_it_they_stay_as_they_were_drawn(
    start: Any, line: Any, decide: Any, kernel_for: Any, fits: list[int], way: Any
) -> None:
    run = start(still(incubation_way=way, data_dependent_birth=False))
    decision = run.grow(line, decide, kernel_for, template="gated_mlp")
    run.steps(6)
    assert is_drawn(run, decision)
    assert fits == []


def test_a_deepening_whose_one_map_begins_at_zero_stays_as_it_was_drawn(
    start: Any, line: Any, decide: Any, kernel_for: Any
) -> None:
    run = start(still())
    decision = run.grow(line, decide, kernel_for, template="deepen")
    run.steps(6)
    assert is_drawn(run, decision)


def test_the_units_of_a_widening_are_fitted_and_the_function_is_kept_to_the_bit(
    start: Any, line: Any, decide: Any, kernel_for: Any, fits: list[int]
) -> None:
    run = start(still())
    decision = run.grow(line, decide, kernel_for, template="widen")
    run.steps(6)
    assert not is_drawn(run, decision)
    assert len(fits) == 1
    x, _ = run.batches[0]
    run.model.eval()
    with torch.no_grad():
        apart = run.model(x)
        run.layer.transition(0, State.EVALUATING)
        run.layer.set_alpha(0, 1.0)
        assert torch.equal(run.model(x), apart)


def test_a_seed_planted_by_hand_is_fitted_too(start: Any, line: Any, decide: Any, fits: list[int]) -> None:
    run = start(still())
    run.steps(1)
    decision = decide(run.model, template="gated_mlp")
    line.incoming.append(decision)
    run.session._look_into_mailbox()
    run.session.orchestrator.germinate_in_place(decision.adaptation_id)
    run.steps(2)
    assert fits == [run.session._context.birth_seed(0)]
    assert not is_drawn(run, decision)


def test_equal_runs_are_equal_to_the_bit(start: Any, line: Any, decide: Any, kernel_for: Any) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        run = start(growth())
        run.grow(line, decide, kernel_for, template="gated_mlp", adaptation_id=f"a{7:032x}")
        run.steps(6)
        runs.append(run)
    assert all(torch.equal(value, runs[1].weights[name]) for name, value in runs[0].weights.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_run_that_is_taken_up_again_goes_on_to_the_bit_and_fits_no_seed_twice(
    start: Any,
    line: Any,
    decide: Any,
    kernel_for: Any,
    fits: list[int],
    tmp_path: Path,
    steps_before: int,
    way: Any,
) -> None:
    store = CheckpointManager(tmp_path / "checkpoints")
    first = start(growth(incubation_way=way), checkpoints=store)
    first.grow(line, decide, kernel_for, template="gated_mlp")
    first.steps(steps_before)
    num_before = len(fits)
    assert num_before == min(1, steps_before)
    checkpoint_id = first.session.save_checkpoint()
    first.steps(4)
    second = start(growth(incubation_way=way), checkpoints=store)
    second.session.load_checkpoint(checkpoint_id)
    second.next = first.next - 4
    second.steps(4)
    assert len(fits) == 1 + (1 - num_before)
    assert differences(first.everything(), second.everything()) == []


def test_a_roll_back_to_a_state_before_it_fits_it_again_to_the_same(
    start: Any, line: Any, decide: Any, kernel_for: Any, fits: list[int]
) -> None:
    run = start(growth())
    run.grow(line, decide, kernel_for, template="gated_mlp")
    run.session._memory.take_snapshot()
    place = run.next
    run.steps(2)
    found = run.weights
    run.session._memory.roll_back("test")
    run.next = place
    run.steps(2)
    assert len(fits) == 2
    assert all(torch.equal(value, run.weights[name]) for name, value in found.items())


def planted(fitting_seed: int | None) -> tuple[Any, Incubator]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 3)))
    model(torch.randn(2, 4))
    model.kasmina_layer("0").germinate(0, default_registry().create_blueprint("gated_mlp").ir)
    made = Incubator(
        model,
        nn.MSELoss(),
        layer="0",
        seed_index=0,
        learning_rate=STILL,
        way=LearningWay(kind="trial"),
        fitting_seed=fitting_seed,
    )
    return model, made


def test_a_state_of_an_earlier_version_is_never_fitted(fits: list[int]) -> None:
    _, incubator = planted(3)
    state = copy.deepcopy(incubator.state_dict())
    assert state.pop("awaits_fitting") is True
    incubator.load_state_dict(state)
    incubator.step((torch.randn(8, 4), torch.randn(8, 3)))
    assert fits == []


def test_a_kernel_that_fails_meanwhile_is_counted_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    model, incubator = planted(3)
    monkeypatch.setattr(incubator_module, "fit_to_site", fail)
    layer = model.kasmina_layer("0")
    incubator.step((torch.randn(8, 4), torch.randn(8, 3)))
    assert layer.state_layout.errors[0] == 1
    assert "while it was fitted to data: RuntimeError: out of memory" in layer.require_seed(0).breaker.last_failure
    incubator.step((torch.randn(8, 4), torch.randn(8, 3)))
    assert layer.state_layout.errors[0] == 1
