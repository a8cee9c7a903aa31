"""A kernel goes bad in a real run, over a real mesh: training goes on, the seed goes, the field report says why."""

from __future__ import annotations

import contextlib
import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.client._async.tolaria import AdaptationInfo
from esper.contracts.errors import NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, Contribution, GateCheck
from esper.core.wrap import LayerTelemetry
from esper.execution.layers import forward as layer_forward
from tests.decisions import add_seed

SOUND = GateCheck(name="test", passed=True, detail="")
GROWTH = esper.GrowthConfig(incubation_epochs=9, graft_epochs=9, embargo_epochs=9, incubation_way="trial")
LOCALLY = replace(GROWTH, incubation_way="local")


def data(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=24)


class Trial:
    """A run with one seed, beside a twin of its host that has none; both take the same steps."""

    def __init__(self, mesh: esper.Mesh, growth: esper.GrowthConfig = GROWTH) -> None:
        torch.manual_seed(1)
        host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.twin = copy.deepcopy(host)
        self.twin_optimizer = torch.optim.AdamW(self.twin.parameters(), lr=1e-2)
        self.model = esper.wrap(host, telemetry=LayerTelemetry(interval_steps=1))
        self.mesh = mesh
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.loss_fn = nn.CrossEntropyLoss()
        self.session = esper.Session(
            self.model,
            self.optimizer,
            loss_fn=self.loss_fn,
            control_loader=data(seed=1),
            mesh=mesh,
            config=esper.SessionConfig(growth=growth),
        )
        self.layer = self.model.kasmina_layers["0"]

    def germinate(self, state: State, fault: Callable[..., Any]) -> None:
        """Bring a blueprint's kernel to a state, sound until then; from now on it does what ``fault`` does."""
        decision = add_seed(self.model, "0", "bottleneck_adapter", run_id=self.session.run_id)
        orchestrator = self.session.orchestrator
        assert all(check.passed for check in orchestrator.decide(decision))
        orchestrator.germinate_in_place(decision.adaptation_id)
        adaptation = orchestrator.adaptations[decision.adaptation_id]
        if state is not State.ACTIVE:
            orchestrator._graft(adaptation, SOUND)
        if state is State.FOSSILIZED:
            adaptation.contribution = Contribution(estimate=1.0, low=0.9, high=1.1, num_examples=9)
            orchestrator._fossilize(adaptation, SOUND)
        self.layer.require_seed(0).kernel.register_forward_hook(lambda _module, _args, delta: fault(delta))

    def train(self, epochs: int = 1) -> None:
        """Train both; every loss and every weight of the host is the twin's to the bit."""
        for epoch in range(epochs):
            torch.manual_seed(epoch)
            for x, y in data():
                streams = torch.get_rng_state()
                wanted = self.loss_fn(self.twin(x), y)
                wanted.backward()
                self.twin_optimizer.step()
                self.twin_optimizer.zero_grad()
                torch.set_rng_state(streams)
                loss = self.loss_fn(self.model(x), y)
                assert torch.equal(loss, wanted)
                loss.backward()
                self.session.step(loss, batch=(x, y))
            self.session.end_epoch()
        for name, value in self.twin.named_parameters():
            assert torch.equal(self.model.get_parameter(name), value)

    def told(self) -> AdaptationInfo:
        """What the mesh knows of the adaptation once its news has arrived."""
        deadline_s = time.monotonic() + 15.0
        with self.mesh.client() as client:
            while True:
                with contextlib.suppress(NotFoundError):  # the run's first news may not have arrived yet
                    _, found = client.tolaria.get_run(self.session.run_id)
                    if found and found[0].report is not None:
                        return found[0]
                assert time.monotonic() < deadline_s, "the report did not arrive in time"


@pytest.fixture(scope="module")
def mesh() -> Iterator[esper.Mesh]:
    with esper.Mesh.embedded() as one:
        yield one


@pytest.fixture
def trial(mesh: esper.Mesh) -> Iterator[Trial]:
    one = Trial(mesh)
    with one.session:
        yield one


def raise_error(_delta: Tensor) -> Tensor:
    raise LookupError("the kernel has lost its way")


def draw_and_raise(_delta: Tensor) -> Tensor:
    torch.rand(3)
    raise RuntimeError("after it drew")


FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "raises": (raise_error, "last raised: LookupError: the kernel has lost its way"),
    "nan": (lambda delta: delta * torch.nan, "last non_finite: delta holds NaN or infinity"),
    "inf": (lambda delta: delta + torch.inf, "last non_finite: delta holds NaN or infinity"),
    "shape": (lambda delta: delta[:, 1:], r"last wrong_shape: delta must be \(\d+, 8\), got \(\d+, 7\)"),
    "type": (lambda delta: delta.detach().long(), "last wrong_type: delta must be of floating type on cpu"),
    "nothing": (lambda _delta: 7, "last wrong_shape: .* got int"),
    "draws": (draw_and_raise, "last raised: RuntimeError: after it drew"),
}


CASES = [
    *((name, State.EVALUATING) for name in ("raises", "nan", "shape", "type")),
    *((name, State.ACTIVE) for name in ("raises", "inf", "nothing", "draws")),
]
"""Every fault in one of the states; tests/unit/execution/test_faults_kernels.py has them all in each."""


@pytest.mark.parametrize(("name", "state"), CASES, ids=str)
def test_a_kernel_that_goes_bad_is_removed_and_reported(trial: Trial, name: str, state: State) -> None:
    fault, reason = FAULTS[name]
    trial.train()
    trial.germinate(state, fault)
    trial.train(2)
    assert trial.layer.state_layout.state(0) is State.EMBARGOED
    assert trial.layer.find_seed(0) is None
    assert trial.layer.get_layer_stats()["errors"] == 3
    held = [value for group in trial.optimizer.param_groups for value in group["params"]]
    assert len(held) == len(list(trial.twin.parameters()))
    found = trial.told()
    assert found.report is not None
    assert found.report.outcome is AdaptationOutcome.FAILED
    assert re.search(f"its kernel failed three times in a row, {reason}", found.report.reason)
    steps = [(event.to_state, event.reason) for event in found.events]
    assert [to for to, _ in steps][-3:] == [State.ERROR, State.CULLED, State.EMBARGOED]
    assert steps[-3][1] in found.report.reason
    assert steps[-3][1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "last raised: while it learnt: LookupError"),
        ("nan", "last non_finite: .* while it learnt"),
        ("nothing", "last wrong_shape: while it learnt: delta must be .* got int"),
        ("shape", "last wrong_shape: while it learnt: delta must be .* got"),
    ],
)
def test_a_kernel_that_goes_bad_while_it_learns_from_its_site_is_removed_and_reported(
    mesh: esper.Mesh, name: str, reason: str
) -> None:
    trial = Trial(mesh, LOCALLY)
    with trial.session:
        trial.train()
        trial.germinate(State.ACTIVE, FAULTS[name][0])
        trial.train(2)
        assert trial.layer.find_seed(0) is None
        found = trial.told()
    assert found.report is not None
    assert found.report.outcome is AdaptationOutcome.FAILED
    assert re.search(f"failed three times in a row, {reason}", found.report.reason)


@pytest.mark.parametrize("name", ["raises", "nan"])
def test_a_kept_seed_that_goes_bad_is_removed_too(trial: Trial, name: str) -> None:
    fault, reason = FAULTS[name]
    trial.germinate(State.FOSSILIZED, fault)
    trial.train(2)
    assert trial.layer.find_seed(0) is None
    (line,) = trial.session.report().adaptations
    assert line.outcome == "failed"
    assert reason in line.reason


def test_a_fault_in_backward_removes_the_seed_and_never_the_run(trial: Trial) -> None:
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004 - the signature is autograd's
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
            raise OSError("lost in backward")

    trial.germinate(State.ACTIVE, Lost.apply)
    trial.train(2)
    found = trial.told()
    assert found.report is not None
    assert "last raised: in backward: OSError: lost in backward" in found.report.reason


def test_a_slow_kernel_is_timed_and_removed_at_the_gate(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's, so that nothing has to wait: every pass of the kernel takes five seconds of it."""
    clock = SimpleNamespace(now_ns=0)

    def dawdle(delta: Tensor) -> Tensor:
        clock.now_ns += 5_000_000_000
        return delta * 0.0

    monkeypatch.setattr(layer_forward, "time", SimpleNamespace(perf_counter_ns=lambda: clock.now_ns))
    trial.germinate(State.EVALUATING, dawdle)
    trial.train(2)
    assert trial.layer.find_seed(0) is None
    found = trial.told()
    assert found.report is not None
    assert found.report.outcome is AdaptationOutcome.CULLED
    assert re.search(r"its kernel is too slow: a pass takes [\d.e+]+ ms, at most 1000 ms", found.report.reason)


def test_a_loop_with_a_loss_of_its_own_survives_too(trial: Trial) -> None:
    """Seeds then learn from the gradient at their site, outside any forward pass of the host."""
    trial.germinate(State.ACTIVE, raise_error)
    for x, y in data():
        loss = nn.functional.cross_entropy(trial.model(x), y)
        loss.backward()
        trial.session.step(loss)
    trial.session.end_epoch()
    for x, y in data():
        loss = nn.functional.cross_entropy(trial.model(x), y)
        loss.backward()
        trial.session.step(loss)
    trial.session.end_epoch()
    assert trial.layer.find_seed(0) is None
    found = trial.told()
    assert found.report is not None
    assert "while it learnt: LookupError" in found.report.reason
