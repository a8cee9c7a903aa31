"""A session grows a model inside a plain loop, leaves no trace of what fails, and takes back what does harm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.blueprints import to_module
from esper.contracts.decision import AdaptationType, PlanStatus
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.contracts.run import AdaptationOutcome, RunPhase
from esper.core.link import KernelArrival
from esper.execution.overrides import SeedRef, seeds_at
from esper.telemetry.subjects import Kind

GROWTH = esper.GrowthConfig(incubation_epochs=1, graft_epochs=1, max_looks=3, incubation_learning_rate=1e-2)


def train(session: esper.Session, task: Any, epochs: int, loss_fn: Any = None) -> None:
    model = session._context.model
    criterion = loss_fn or session._context.loss_fn
    for _ in range(epochs):
        for x, y in task.train:
            loss = criterion(model(x), y)
            loss.backward()
            session.step(loss)
        session.end_epoch()


def state_of(session: esper.Session, layer: str = "0", seed: int = 0) -> State:
    return session._context.model.kasmina_layers[layer].state_layout.state(seed)


def grow(session: esper.Session, line: Any, decide: Any, kernel_for: Any, **changes: Any) -> Any:
    decision = decide(session._context.model, **changes)
    line.incoming += [decision, kernel_for(decision)]
    return decision


def test_without_decisions_the_host_trains_as_if_alone(task: Any, open_session: Callable[..., Any]) -> None:
    plain = task.host()
    model = esper.wrap(task.host())
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    session = open_session(model)
    train(session, task, 2)
    for _ in range(2):
        for x, y in task.train:
            nn.CrossEntropyLoss()(plain(x), y).backward()
            reference.step()
            reference.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_one_adaptation_goes_through_its_whole_life(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(growth=GROWTH)
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 14)
    report = session.report()
    states = [event.to_state for event in line.values(Kind.SEED) if event.adaptation_id == decision.adaptation_id]
    assert states[:3] == [State.LOADING, State.ACTIVE, State.EVALUATING]
    assert states[3] in (State.FOSSILIZED, State.CULLED)
    (adaptation,) = report.adaptations
    assert adaptation.outcome == ("kept" if states[3] is State.FOSSILIZED else "culled")
    assert adaptation.contribution is not None
    (field_report,) = [one for one in line.values(Kind.FIELD_REPORT) if one.grew]
    assert field_report.isolated_steps == 5  # the kernel came at the end of the first of six steps
    assert field_report.graft_steps >= 6


def test_a_seed_that_helps_is_kept_and_pays_its_price(
    large_task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(nn.Sequential(large_task.host()[0], nn.Linear(6, 2)))
    growth = esper.GrowthConfig(incubation_epochs=3, incubation_learning_rate=1e-2)
    session = open_session(model, control=large_task.control, growth=growth)
    grow(session, line, decide, kernel_for, template="gated_mlp")
    train(session, large_task, 9)
    (adaptation,) = session.report().adaptations
    assert adaptation.outcome == "kept", adaptation
    assert adaptation.interval is not None
    assert adaptation.price is not None
    assert adaptation.interval[0] > adaptation.price
    assert state_of(session) is State.FOSSILIZED
    stats = model.kasmina_layers["0"].get_layer_stats()
    assert stats["successful_adaptations"] == 1
    assert stats["performance_improvement"] > 0


def test_while_a_seed_learns_alone_the_host_is_untouched_to_the_bit(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    alone = esper.wrap(task.host())
    grown = esper.wrap(task.host())
    stream = torch.get_rng_state()
    train(open_session(alone), task, 3)
    torch.set_rng_state(stream)
    session = open_session(grown, growth=esper.GrowthConfig(incubation_epochs=9))
    grow(session, line, decide, kernel_for)
    train(session, task, 3)
    assert state_of(session) is State.ACTIVE
    seed = grown.kasmina_layers["0"].find_seed(0)
    assert any(parameter.abs().sum() > 0 for name, parameter in seed.named_parameters() if "weight" in name)
    host = {key: value for key, value in grown.state_dict().items() if "seeds" not in key}
    assert all(torch.equal(value, host[key]) for key, value in alone.state_dict().items())


def test_an_epoch_counts_the_parameters_that_its_output_comes_from(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    host = sum(parameter.numel() for parameter in model.parameters())
    session = open_session(model, growth=esper.GrowthConfig(incubation_epochs=2, graft_epochs=9))
    grow(session, line, decide, kernel_for)
    train(session, task, 1)
    assert state_of(session) is State.ACTIVE
    seed = sum(parameter.numel() for parameter in model.kasmina_layers["0"].seed_parameters(0))
    train(session, task, 2)
    assert state_of(session) is State.EVALUATING
    counted = [record.parameters for record in session.report().history]
    assert seed > 0
    assert counted == [host, host, host + seed], "alone, blended in at the end of the epoch, and with a share"
    told = [packet.current_parameters for packet in line.values(Kind.STATE) if packet.epoch]
    assert told == counted, "packets count alike"


def test_a_cull_before_the_graft_leaves_no_trace(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    alone, grown = esper.wrap(task.host()), esper.wrap(task.host())
    train(open_session(alone), task, 4)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
    session = open_session(grown, optimizer, growth=esper.GrowthConfig(incubation_epochs=9, embargo_epochs=1))
    grow(session, line, decide, kernel_for)
    train(session, task, 2)
    session.orchestrator.remove_seed("0", 0, "changed my mind")
    train(session, task, 2)
    assert list(grown.state_dict()) == list(alone.state_dict())
    assert all(torch.equal(value, grown.state_dict()[key]) for key, value in alone.state_dict().items())
    assert len(optimizer.state) == len(list(grown.parameters()))
    assert state_of(session) is State.DORMANT
    assert session._context.ledger.status().added_parameters == 0


def test_with_a_plain_function_as_loss_seeds_learn_from_the_site(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(loss_fn=F.cross_entropy, growth=esper.GrowthConfig(incubation_epochs=9))
    decision = grow(session, line, decide, kernel_for)
    train(session, task, 2)
    assert session.orchestrator.adaptations[decision.adaptation_id].isolated_steps > 0


def test_a_decision_over_budget_is_refused_in_words(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(budget=esper.Budget(added_params=3))
    grow(session, line, decide, kernel_for)
    train(session, task, 1)
    (plan,) = line.values(Kind.PLAN)
    assert plan.status is PlanStatus.REJECTED
    assert "do not fit: 0 of 3 are used" in plan.reason
    assert state_of(session) is State.DORMANT


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed_index": 9}, "seed must be 0 to 3, got 9"),
        ({"layer": "2", "site": None, "blueprint": None}, "carries no blueprint"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused_in_words(
    task: Any, line: Any, open_session: Any, decide: Any, changes: dict[str, Any], reason: str
) -> None:
    session = open_session()
    line.incoming.append(decide(session._context.model, **changes))
    train(session, task, 1)
    (plan,) = line.values(Kind.PLAN)
    assert reason in plan.reason


def test_only_one_adaptation_at_a_time_in_a_layer(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session()
    grow(session, line, decide, kernel_for)
    grow(session, line, decide, kernel_for, seed_index=1)
    train(session, task, 1)
    statuses = [plan.status for plan in line.values(Kind.PLAN)]
    assert statuses == [PlanStatus.ACCEPTED, PlanStatus.REJECTED]


def test_a_kernel_that_never_compiles_fails_the_adaptation_alone(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session()
    decision = decide(session._context.model)
    arrival = kernel_for(decision)
    line.incoming += [decision, KernelArrival(ready=arrival.ready, error="compiler is away")]
    train(session, task, 4)
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.outcome is AdaptationOutcome.FAILED
    assert "compiler is away" in report.reason
    assert state_of(session) is State.DORMANT


def test_a_kernel_that_never_comes_is_given_up(task: Any, line: Any, open_session: Any, decide: Any) -> None:
    session = open_session(growth=esper.GrowthConfig(loading_timeout_s=1e-6))
    line.incoming.append(decide(session._context.model))
    train(session, task, 1)
    (report,) = line.values(Kind.FIELD_REPORT)
    assert "kernel must come within" in report.reason


def test_a_kernel_may_come_before_its_decision(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session()
    decision = decide(session._context.model)
    line.incoming += [kernel_for(decision), decision]
    train(session, task, 1)
    assert state_of(session) is State.ACTIVE


def born(session: esper.Session, task: Any, seed: int) -> dict[str, torch.Tensor]:
    """Take one step, at whose end the kernel that lies in the mailbox germinates; gives the seed's first weights."""
    x, y = next(iter(task.train))
    loss = session._context.loss_fn(session._context.model(x), y)
    loss.backward()
    session.step(loss)
    weights: dict[str, torch.Tensor] = session._context.model.kasmina_layers["0"].require_seed(seed).kernel.state_dict()
    return {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize(("run_seed", "seed", "drawn_from"), [(5, 0, 5), (5, 2, 7), (6, 0, 6), (-1, 0, 2**63 - 1)])
def test_one_kernel_begins_in_every_run_with_the_weights_that_the_runs_seed_draws(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, run_seed: int, seed: int, drawn_from: int
) -> None:
    session = open_session(seed=run_seed)
    decision = grow(session, line, decide, kernel_for, seed_index=seed)
    weights = born(session, task, seed)
    expected = to_module(decision.blueprint.ir, decision.site, seed=drawn_from).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    own = kernel_for(decision).kernel.weights
    assert any(not torch.equal(weights[name], value) for name, value in own.items())


def test_a_seed_built_in_place_begins_with_the_same_weights_as_one_from_a_kernel(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    session = open_session(seed=5)
    grow(session, line, decide, kernel_for, seed_index=1)
    from_kernel = born(session, task, 1)
    session.close()
    session = open_session(seed=5)
    in_place = decide(session._context.model, seed_index=1)
    session.orchestrator.decide(in_place)
    session.orchestrator.germinate_in_place(in_place.adaptation_id)
    built = session._context.model.kasmina_layers["0"].require_seed(1).kernel.state_dict()
    assert all(torch.equal(from_kernel[name], value) for name, value in built.items())


def test_a_bad_batch_is_left_out(task: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model)
    train(session, task, 1)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.full((4, 6), float("nan"))).sum()
    loss.backward()
    session.step(loss)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_harmful_graft_is_taken_back_first(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, growth=esper.GrowthConfig(incubation_epochs=1, graft_epochs=20))
    grow(session, line, decide, kernel_for)
    train(session, task, 3)
    if state_of(session) is not State.EVALUATING:
        pytest.fail(f"the seed must be blended in by now, got {state_of(session).name}")
    loss = model(torch.randn(4, 6)).sum() * float("nan")
    loss.backward()
    session.step(loss)
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.outcome is AdaptationOutcome.ROLLED_BACK
    assert session.report().rollbacks == 0


def test_lasting_harm_takes_the_whole_state_back(task: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model)
    train(session, task, 2)
    good = copy.deepcopy(model.state_dict())
    step = session.step_count
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        loss = model(torch.randn(4, 6)).sum()
        loss.backward()
        session.step(loss)
    assert all(torch.equal(good[key], value) for key, value in model.state_dict().items())
    assert session.step_count == step
    assert session.report().rollbacks == 1


def test_harm_without_end_is_an_error(task: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    session = open_session(model, governor=esper.GovernorConfig(max_rollbacks=1))

    def harm() -> None:
        loss = model(torch.randn(4, 6)).sum() * float("inf")
        loss.backward()
        session.step(loss)

    harm()
    harm()
    with pytest.raises(InvalidStateError, match="loss must recover within 1 roll-backs"):
        harm()


def test_packets_tell_how_the_run_goes(task: Any, line: Any, open_session: Any) -> None:
    session = open_session(planned_epochs=2)
    train(session, task, 2)
    session.close()
    packets = line.values(Kind.STATE)
    assert [packet.phase for packet in packets] == [
        RunPhase.STARTED,
        RunPhase.TRAINING,
        RunPhase.TRAINING,
        RunPhase.FINISHED,
    ]
    assert [packet.sequence for packet in packets] == [1, 2, 3, 4]
    second = packets[1]
    assert second.train_loss > 0
    assert second.control_loss > 0
    assert second.gradient_norm > 0
    assert second.examples_per_second > 0
    assert second.layers[0].site is not None
    assert second.host_flops == 2 * (6 * 6 + 6 * 2)
    assert line.closed


def test_an_error_in_the_loop_marks_the_run_as_failed(task: Any, line: Any, open_session: Any) -> None:
    with pytest.raises(ZeroDivisionError), open_session():
        1 / 0  # noqa: B018
    assert line.values(Kind.STATE)[-1].phase is RunPhase.FAILED
    assert line.values(Kind.STATE)[-1].phase_reason.startswith("ZeroDivisionError")


def test_a_model_that_is_not_wrapped_is_refused(task: Any) -> None:
    host = task.host()
    with pytest.raises(InvalidInputError, match=r"model must be wrapped: esper\.wrap\(model\), got 'Sequential'"):
        esper.Session(
            host, torch.optim.SGD(host.parameters(), lr=0.1), loss_fn=F.cross_entropy, control_loader=task.control
        )


def test_a_closed_session_takes_no_step(task: Any, open_session: Any) -> None:
    session = open_session()
    session.close()
    with pytest.raises(InvalidStateError, match="must be open, got closed"):
        session.step(torch.zeros(()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"run_id": "Not OK"}, "run_id must match"),
        ({"planned_epochs": 0}, "planned_epochs must be at least 1"),
        ({"decision_wait_s": -1}, "decision_wait_s must be >= 0"),
        ({"gradient_norm_interval": 0}, "gradient_norm_interval must be at least 1"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        esper.SessionConfig(**setting)


@pytest.mark.parametrize("name", ["incubation_epochs", "graft_epochs", "max_looks", "max_open", "settle_epochs"])
def test_bad_growth_settings_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"growth.{name} must be at least 1"):
        esper.GrowthConfig(**{name: 0})


def test_a_seed_that_no_group_takes_fails_alone_and_training_goes_on(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    model = esper.wrap(task.host())
    optimizer = torch.optim.Muon([model[0].weight, model[2].weight], lr=1e-2)
    session = open_session(model, optimizer, growth=GROWTH)
    grow(session, line, decide, kernel_for)
    train(session, task, 2)
    (adaptation,) = session.report().adaptations
    assert adaptation.outcome == "failed"
    assert "must fit a group of the optimizer (Muon takes 2-D parameters only" in adaptation.reason
    assert model.kasmina_layers["0"].find_seed(0) is None


def test_an_optimizer_that_needs_a_closure_is_refused_at_the_start(task: Any, open_session: Any) -> None:
    model = esper.wrap(task.host())
    with pytest.raises(InvalidInputError, match="optimizer must take its step without a closure"):
        open_session(model, torch.optim.LBFGS(model.parameters()))


def test_a_seed_comes_to_muon_and_adamw_in_one_wrapper_and_goes(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any
) -> None:
    class Both:
        def __init__(self, model: nn.Module) -> None:
            found = list(model.parameters())
            self.optimizers = [
                torch.optim.Muon([value for value in found if value.ndim == 2], lr=1e-3),
                torch.optim.AdamW([value for value in found if value.ndim != 2], lr=1e-2),
            ]

        def step(self) -> None:
            for inner in self.optimizers:
                inner.step()

        def zero_grad(self) -> None:
            for inner in self.optimizers:
                inner.zero_grad()

    model = esper.wrap(task.host())
    optimizer = Both(model)
    session = open_session(
        model,
        optimizer,
        growth=esper.GrowthConfig(incubation_epochs=1, graft_epochs=9, incubation_learning_rate=1e-2, cull_epochs=0),
    )
    grow(session, line, decide, kernel_for)
    train(session, task, 3)
    assert state_of(session) is State.EVALUATING
    sizes = [sum(len(group["params"]) for group in inner.param_groups) for inner in optimizer.optimizers]
    assert sizes[0] > 2
    assert sizes[1] > 2
    assert all(value.ndim == 2 for group in optimizer.optimizers[0].param_groups for value in group["params"])
    session.orchestrator.remove_seed("0", 0, "enough")
    assert [len(inner.param_groups[0]["params"]) for inner in optimizer.optimizers] == [2, 2]


@pytest.mark.parametrize("template", ["widen", "deepen"])
def test_a_change_of_the_host_keeps_its_function_until_it_has_learnt(
    task: Any, line: Any, open_session: Any, decide: Any, kernel_for: Any, template: str
) -> None:
    model = esper.wrap(task.host())
    x = torch.randn(32, 6)
    before = model(x).detach()
    session = open_session(model, growth=GROWTH)
    grow(session, line, decide, kernel_for, template=template, adaptation_type=AdaptationType.MODIFY_ARCHITECTURE)
    session._take_in()
    assert state_of(session) is State.ACTIVE
    with seeds_at(model, {SeedRef("0", 0): 1.0}), torch.no_grad():
        assert float((model(x) - before).abs().max()) <= 1e-6
    train(session, task, 6)
    (report,) = line.values(Kind.FIELD_REPORT)
    assert report.adaptation_type == "modify_architecture"
    assert report.grew
    assert report.contribution is not None
