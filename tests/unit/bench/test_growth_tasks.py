"""The tasks and networks of the growth measure: what is shared between splits, seeds and shapes, and what is not."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bench.growth_hosts import (
    FAMILIES,
    Block,
    FamilyName,
    Shape,
    deep_shapes,
    inner_shape,
    make_cell,
    make_net,
    num_parameters,
    size_of,
    wide_shapes,
)
from bench.growth_net2wider import widen
from bench.growth_tasks import TASKS, VOCABULARY, Batches, TaskName, load, shipped_text
from esper.contracts.errors import InvalidInputError

CELLS = [(task, family) for task in TASKS for family in FAMILIES]


@pytest.mark.parametrize("name", TASKS)
def test_no_example_stands_in_two_splits(name: TaskName) -> None:
    task = load(name)
    train, control, sealed = (set(part.digests()) for part in (task.train, task.control, task.sealed))
    assert train
    assert control
    assert sealed
    assert not train & control
    assert not train & sealed
    assert not control & sealed


@pytest.mark.parametrize(
    ("name", "sizes"), [("digits", (1037, 260, 500)), ("mnist1d", (3200, 800, 1000)), ("chars", (259_984, 2048, 4096))]
)
def test_splits_have_the_sizes_that_the_goals_were_set_for(name: TaskName, sizes: tuple[int, int, int]) -> None:
    task = load(name)
    assert (len(task.train), len(task.control), len(task.sealed)) == sizes
    assert int(task.train.targets.max()) < task.num_classes


def test_making_mnist1d_leaves_the_random_streams_of_the_process_alone() -> None:
    load.cache_clear()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global stream is the one at risk
    wanted = random.Random(5).random(), np.random.RandomState(5).rand()
    load("mnist1d")
    assert random.random() == wanted[0]
    assert np.random.rand() == wanted[1]  # noqa: NPY002


def test_the_text_is_told_apart_by_its_digest() -> None:
    assert len(shipped_text()) == 370_000
    assert "SHA-256" in load("chars").note
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_no_context_of_text_stands_anywhere_in_the_blocks_before_its_own() -> None:
    task = load("chars")
    learnt = {bytes(row) for row in task.train.inputs.byte().numpy()}
    known = {bytes(row) for row in task.control.inputs.byte().numpy()}
    assert len(task.train) == 260_000 - 16, "the train split is every place of its block"
    assert not learnt & known
    assert not (learnt | known) & {bytes(row) for row in task.sealed.inputs.byte().numpy()}


def test_no_paragraph_stands_twice_in_the_text() -> None:
    paragraphs = [" ".join(one.lower().split()) for one in shipped_text().split("\n\n")]
    assert len(paragraphs) > 1500
    assert len(set(paragraphs)) >= len(paragraphs) - 1, "only the last may be cut"


def test_an_epoch_may_take_a_part_of_the_examples_and_the_next_one_the_next_part() -> None:
    examples = load("digits").train
    batches = Batches(examples, batch_size=64, seed=3, passes_per_epoch=0.4)
    epochs = [torch.cat([x for x, _ in batches]) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [415, 415, 415]
    seen = [{row.numpy().tobytes() for row in epoch} for epoch in epochs]
    assert not seen[0] & seen[1]
    assert seen[2] & (seen[0] | seen[1]), "what is too little for an epoch is left out"


def test_an_epoch_of_text_is_as_long_as_the_docs_say() -> None:
    task = load("chars")
    assert len(task.epoch_of_train) == 12_288
    assert len(load("digits").epoch_of_train) == len(load("digits").train)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="task must be one of digits, mnist1d, chars"):
        load("cifar")


def test_batches_depend_on_the_seed_alone_and_see_every_example_once_an_epoch() -> None:
    examples = load("digits").train
    first, again, other = (Batches(examples, batch_size=64, seed=seed) for seed in (3, 3, 4))
    one, two, third = (torch.cat([y for _, y in batches]) for batches in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, third)
    assert torch.equal(one.sort().values, examples.targets.sort().values)
    assert not torch.equal(one, torch.cat([y for _, y in first])), "the next epoch has another order"


@pytest.mark.parametrize(("task", "family"), CELLS)
def test_every_static_network_keeps_to_the_budget_and_is_larger_than_the_host(
    task: TaskName, family: FamilyName
) -> None:
    cell = make_cell(task, family)
    host = size_of(cell, cell.host)
    assert host == num_parameters(make_net(cell, cell.host, 0))
    for shape in (*wide_shapes(cell), *deep_shapes(cell), inner_shape(cell)):
        assert host < size_of(cell, shape) <= cell.max_parameters
    assert all(shape.depth == cell.host.depth for shape in wide_shapes(cell))
    assert all(shape.depth > cell.host.depth for shape in deep_shapes(cell))


@pytest.mark.parametrize("task", TASKS)
def test_transformers_take_the_whole_budget_whatever_their_width(task: TaskName) -> None:
    cell = make_cell(task, "transformer")
    for shape in (*wide_shapes(cell), *deep_shapes(cell), inner_shape(cell)):
        assert size_of(cell, replace(shape, inner=shape.inner + 1)) > cell.max_parameters


def test_a_cell_of_dense_blueprints_has_its_own_name_and_the_same_host_and_budget() -> None:
    every, dense = make_cell("digits", "mlp"), make_cell("digits", "mlp", "dense")
    assert (every.name, dense.name) == ("digits/mlp", "digits/mlp/dense")
    assert replace(dense, kinds="all") == every


def test_the_budgets_of_the_goals() -> None:
    digits, mnist1d = make_cell("digits", "mlp"), make_cell("mnist1d", "mlp")
    assert (digits.max_parameters, size_of(digits, Shape(48, 1))) == (3610, 3610)
    assert (mnist1d.max_parameters, size_of(mnist1d, Shape(96, 1))) == (4906, 4906)


def test_a_transformer_of_a_width_that_its_heads_do_not_share_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"shape.width must be a multiple of 2, got 9"):
        make_net(make_cell("digits", "transformer"), Shape(9, 1, 8), 0)


@pytest.mark.parametrize(("task", "family"), CELLS)
def test_net2wider_keeps_the_function_and_parts_the_copies(task: TaskName, family: FamilyName) -> None:
    cell = make_cell(task, family)
    inputs, targets = load(task).train.inputs[:100], load(task).train.targets[:100]
    host = make_net(cell, cell.host, 1).eval()
    wider = widen(cell, host, inner_shape(cell), seed=1)
    assert num_parameters(wider) == size_of(cell, inner_shape(cell))
    with torch.no_grad():
        assert torch.allclose(wider.eval()(inputs), host(inputs), atol=1e-6)
    nn.functional.cross_entropy(wider(inputs), targets).backward()  # type: ignore[no-untyped-call]
    parts = (Block,) if family == "transformer" else (nn.Linear, nn.Conv1d, nn.Conv2d)
    first = next(module for module in wider.modules() if isinstance(module, parts))
    widened = first.up.weight if isinstance(first, Block) else first.weight
    assert widened.grad is not None
    rows = widened.grad.flatten(1)
    copies = [row for row in rows if row.abs().sum() > 0]
    assert len({tuple(row.tolist()) for row in copies}) == len(copies), "copies with equal gradients stay copies"
