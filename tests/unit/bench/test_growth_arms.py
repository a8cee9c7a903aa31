"""The arms of the growth measure on few epochs: what they start from, spend and rebuild, and what repeats."""

from __future__ import annotations

import base64
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn

import esper
from bench.growth_arms import (
    ARMS,
    FINAL,
    FIRST_TUNING_SEED,
    GROWN,
    KINDS,
    SAME_COMPUTE,
    Kind,
    Option,
    _at,
    choose,
    options,
    run_arm,
)
from bench.growth_gromo import make_gromo, reason_not_measured
from bench.growth_grown import _growth, grow_arm, grow_once, rebuild, topology_from
from bench.growth_hosts import Cell, make_cell, make_net, num_parameters
from bench.growth_tasks import load
from bench.growth_training import Outcome, Point, Recipe, _taken, evaluate, outcome_of, train, train_shape
from bench.random_growth import FIRST_EPOCH, RandomMesh
from esper.blueprints.flops import count_flops
from esper.blueprints.registry import default_registry
from esper.contracts.errors import UnavailableError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.growth import GrowthConfig
from esper.execution.grown import GrownSeed


def small(cell: Cell, epochs: int = 2) -> Cell:
    return replace(cell, settings=replace(cell.settings, epochs=epochs))


DIGITS = small(make_cell("digits", "mlp"))


@cache  # every one is found by building networks until one is too large
def first_options(cell: Cell) -> dict[Kind, Option]:
    return {kind: options(cell, kind)[0] for kind in KINDS if options(cell, kind)}


def a_topology(cell: Cell) -> list[GrownSeed]:
    """Two fossils: a bottleneck at the first layer, and a skip seed from its input to the last."""
    model = esper.wrap(make_net(cell, cell.host, 0))
    with torch.no_grad():
        model(load(cell.task).train.inputs[:2])
    registry = default_registry()
    for layer, name, source in (("0", "bottleneck_adapter", ""), ("2", "widen", "0")):
        model.kasmina_layer(layer).germinate(0, registry.create_blueprint(name).ir, source=source)
    fossil = SeedLifecycleState.FOSSILIZED
    return [replace(seed, state=fossil, alpha=1.0) for seed in model.grown_structure()]


def grown_outcome(cell: Cell, *, flops: int) -> Outcome:
    """What a grown arm of that topology would have written down."""
    trained = train_shape(cell, cell.host, Recipe(settings=cell.settings), seed=0)
    encoded = tuple(base64.b64encode(seed.to_bytes()).decode() for seed in a_topology(cell))
    return replace(outcome_of(load(cell.task), trained, rate=1e-2), flops=flops, topology=encoded)


def test_arms_of_a_seed_start_from_equal_weights() -> None:
    host = make_net(DIGITS, DIGITS.host, 7).state_dict()
    again = make_net(DIGITS, DIGITS.host, 7).state_dict()
    other = make_net(DIGITS, DIGITS.host, 8).state_dict()
    final = rebuild(DIGITS, a_topology(DIGITS), seed=7, as_born=False).state_dict()
    assert all(torch.equal(host[key], again[key]) and torch.equal(host[key], final[key]) for key in host)
    assert not torch.equal(host["0.weight"], other["0.weight"])


def test_gromo_starts_from_the_weights_of_the_host() -> None:
    pytest.importorskip("gromo")
    inputs = load("digits").train.inputs[:50]
    with torch.no_grad():
        assert torch.equal(make_gromo(DIGITS, seed=7)(inputs), make_net(DIGITS, DIGITS.host, 7)(inputs))


def test_what_gromo_cannot_grow_is_said_and_never_a_number() -> None:
    cell = make_cell("digits", "transformer")
    assert "perceptrons" in reason_not_measured(cell)
    assert options(cell, "gromo") == []
    assert choose(cell, "gromo", num_seeds=1) is None
    with pytest.raises(UnavailableError, match="perceptrons"):
        make_gromo(cell, seed=0)


def test_an_arm_is_the_same_in_every_run_of_its_seed() -> None:
    recipe = Recipe(settings=DIGITS.settings)
    first, again, other = (train_shape(DIGITS, DIGITS.host, recipe, seed=seed) for seed in (0, 0, 1))
    ways = [[(point.accuracy, point.loss, point.flops) for point in one.curve] for one in (first, again, other)]
    assert ways[0] == ways[1]
    assert ways[0] != ways[2]


def test_flops_counted_once_a_batch_size_are_those_of_every_step() -> None:
    task = load("digits")
    model = make_net(DIGITS, DIGITS.host, 0)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]

    parts = zip(torch.split(task.train.inputs, 32), torch.split(task.train.targets, 32), strict=True)
    wanted = sum(count_flops(partial(step, *part)) for part in parts)
    trained = train_shape(DIGITS, DIGITS.host, Recipe(settings=DIGITS.settings), seed=0)
    assert [point.flops for point in trained.curve] == [wanted, 2 * wanted]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.endswith(SAME_COMPUTE)])
def test_arms_of_the_same_compute_spend_at_least_what_growing_spent(arm: str) -> None:
    goal = 60_000_000
    done = {GROWN: grown_outcome(DIGITS, flops=goal)}
    done[FINAL] = replace(done[GROWN], rate=5e-3)
    found = run_arm(arm, DIGITS, seed=0, chosen=first_options(DIGITS), done=done)
    assert found.flops >= goal
    assert found.curve[-2].flops < goal, "and stop with the epoch in which they have"
    assert found.rate == 5e-3


def test_learning_from_both_splits_holds_nothing_out_and_takes_more_steps() -> None:
    chosen = first_options(DIGITS)
    both = run_arm("host, train+control", DIGITS, seed=0, chosen=chosen, done={})
    alone = run_arm("host", DIGITS, seed=0, chosen=chosen, done={})
    assert all(point.accuracy is None and point.loss is None for point in both.curve)
    assert both.flops / alone.flops == pytest.approx(1297 / 1037)


@pytest.mark.parametrize("as_born", [True, False])
def test_static_final_has_the_grown_size_and_no_trained_weight(as_born: bool) -> None:
    topology = a_topology(DIGITS)
    grown = esper.wrap(make_net(DIGITS, DIGITS.host, 0))
    with torch.no_grad():
        grown(load("digits").train.inputs[:2])
    grown.rebuild(topology)
    for parameter in grown.parameters():  # "trained": no weight as it was
        parameter.data.add_(1.0)
    final = rebuild(DIGITS, topology, seed=0, as_born=as_born)
    assert num_parameters(final) == num_parameters(grown) > num_parameters(make_net(DIGITS, DIGITS.host, 0))
    theirs, ours = dict(grown.named_parameters()), dict(final.named_parameters())
    assert theirs.keys() == ours.keys()
    assert not any((theirs[key] == ours[key]).any() for key in ours)
    assert not any(type(module).__module__.startswith("esper") for module in final.modules())


def test_a_topology_as_born_starts_as_the_host_and_one_of_torch_does_not() -> None:
    inputs = load("digits").train.inputs[:50]
    host = make_net(DIGITS, DIGITS.host, 0)
    born, plain = (rebuild(DIGITS, a_topology(DIGITS), seed=0, as_born=as_born) for as_born in (True, False))
    with torch.no_grad():
        assert torch.equal(born(inputs), host(inputs))
        assert not torch.allclose(plain(inputs), host(inputs), atol=1e-3)


def test_the_epoch_of_least_control_loss_is_taken_with_its_weights_where_it_does_better() -> None:
    task, settings = load("digits"), replace(DIGITS.settings, epochs=4)
    spoilt = Recipe(settings=settings, stops_early=True, changes={3: lambda _: make_net(DIGITS, DIGITS.host, 1)})
    early = train(task, make_net(DIGITS, DIGITS.host, 0), spoilt, seed=0)
    assert early.best == early.curve[2], "the last epoch began anew"
    assert evaluate(early.model, task.control) == (early.best.accuracy, early.best.loss)
    last = train(task, make_net(DIGITS, DIGITS.host, 0), replace(spoilt, stops_early=False), seed=0)
    assert last.best == last.curve[3]
    assert evaluate(last.model, task.control) == (last.best.accuracy, last.best.loss)


def test_equal_accuracy_is_no_reason_to_stop_early() -> None:
    model = make_net(DIGITS, DIGITS.host, 0)
    early, last = (Point(epoch=n, flops=n, seconds=n, accuracy=0.9, loss=n / 10) for n in (1, 2))
    assert _taken(load("digits"), model, [early, last], (0.1, model.state_dict())).best == last
    better = replace(early, accuracy=0.91)
    assert _taken(load("digits"), model, [better, last], (0.1, model.state_dict())).best == better
    assert _taken(load("chars"), model, [early, last], (0.1, model.state_dict())).best == early


def test_controls_choose_the_best_on_the_control_split() -> None:
    found = choose(DIGITS, "host", num_seeds=1)
    assert found is not None
    recipes = [Recipe(settings=replace(DIGITS.settings, learning_rate=one.rate)) for one in options(DIGITS, "host")]
    ends = [train_shape(DIGITS, DIGITS.host, recipe, seed=FIRST_TUNING_SEED).best for recipe in recipes]
    best = max(ends, key=lambda point: (point.accuracy, -(point.loss or 0.0)))
    assert found == options(DIGITS, "host")[ends.index(best)]


def test_an_outcome_is_read_as_it_was_written() -> None:
    outcome = grown_outcome(DIGITS, flops=5)
    assert Outcome.from_plain(outcome.to_plain()) == outcome
    assert topology_from(outcome.topology) == a_topology(DIGITS)


def test_what_grows_has_the_rate_of_the_goals_or_the_hosts_choice_with_its_fall() -> None:
    cnn = small(make_cell("digits", "cnn"))
    chosen: dict[Kind, Option] = {"host": Option(shape=cnn.host, rate=5e-3, tail=0.25)}
    settings = _at(cnn, chosen).settings
    assert (settings.learning_rate, settings.tail) == (5e-3, 0.25)
    assert _at(DIGITS, chosen) == DIGITS


def test_the_rate_of_what_grows_falls_as_a_static_networks_and_never_twice() -> None:
    cell = small(make_cell("digits", "mlp"), 6)
    cell = replace(cell, settings=replace(cell.settings, tail=1.0 / 3.0, batch_size=512))
    assert FIRST_EPOCH + GrowthConfig().incubation_epochs > cell.settings.epochs
    assert (_growth(cell).graft_tail, _growth(DIGITS).graft_tail) == (0.0, GrowthConfig().graft_tail)
    # Seeds learn alone for longer than what is left after the first race begins: the host learns as a static network.
    grown = grow_once(RandomMesh(0), cell, seed=0, wait_s=0.0)
    alone = train_shape(cell, cell.host, Recipe(settings=cell.settings), seed=0)
    assert [point.loss for point in grown.curve] == [pytest.approx(point.loss) for point in alone.curve]
    assert grown.tail == cell.settings.tail


def test_only_dense_blueprints_grow_in_a_cell_of_them() -> None:
    cell = small(make_cell("digits", "mlp", "dense"), 7)
    assert _growth(cell).allowed_blueprints == "dense"
    tried = grow_once(RandomMesh(0), cell, seed=0, wait_s=0.0).tried
    assert tried
    dense = {"bottleneck_adapter", "deepen", "gated_mlp", "glu", "lora", "norm_shift", "widen"}
    assert {item.blueprint for item in tried} <= dense


@pytest.mark.slow
def test_random_growth_is_counted_timed_and_repeats_to_the_bit() -> None:
    cell = small(make_cell("digits", "mlp"), 10)
    outcome = grow_arm(lambda: nullcontext(RandomMesh(3)), cell, seed=3, wait_s=0.0)
    assert outcome.is_repeated is True
    assert outcome.tried
    assert all(item.confidence == 1.0 and item.begun_epoch >= FIRST_EPOCH for item in outcome.tried)
    assert 0 < outcome.own_flops < outcome.flops == outcome.curve[-1].flops
    assert [point.flops for point in outcome.curve] == sorted(point.flops for point in outcome.curve)
    kept = sum(item.outcome == "kept" for item in outcome.tried)
    assert len(outcome.topology) == kept
    final = rebuild(cell, topology_from(outcome.topology), seed=3, as_born=True)
    assert num_parameters(final) == outcome.parameters <= cell.max_parameters


def test_every_control_may_have_the_fall_that_grafted_seeds_have() -> None:
    for kind in KINDS:
        found = options(DIGITS, kind)
        if not found:
            continue
        steady = {(one.shape, one.rate, one.times) for one in found if one.tail == 0.0}
        falling = {(one.shape, one.rate, one.times) for one in found if one.tail == GrowthConfig().graft_tail}
        assert steady == falling
        assert len(found) == len(steady) + len(falling)
        assert Option.from_plain(found[-1].to_plain()) == found[-1]


@pytest.mark.parametrize(("epochs", "compute"), [(6, 0), (3, 6)])
def test_the_rate_falls_over_the_last_third_also_of_more_compute(epochs: int, compute: int) -> None:
    task, settings = load(DIGITS.task), replace(DIGITS.settings, epochs=epochs)
    once = Recipe(settings=replace(settings, epochs=1))
    epoch_flops = train(task, make_net(DIGITS, DIGITS.host, 0), once, seed=0).curve[0].flops
    losses = []
    for tail in (0.0, 1.0 / 3.0):
        recipe = Recipe(settings=replace(settings, tail=tail), min_flops=compute * epoch_flops)
        curve = train(task, make_net(DIGITS, DIGITS.host, 0), recipe, seed=0).curve
        losses.append([point.loss for point in curve])
    steady, falling = losses
    assert len(steady) == len(falling) == 6
    assert steady[:4] == falling[:4], "an epoch has the rate of its beginning"
    assert steady[5] != falling[5]
