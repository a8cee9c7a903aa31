"""Nested state comes apart and together again, to the bit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from esper.contracts.errors import CorruptDataError, InvalidInputError
from esper.core.flatten import flatten, unflatten
from esper.core.randomness import capture_random_state, restore_random_state, untouched_randomness


def test_an_optimizer_state_survives_json() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.99))
    parameter.grad = torch.randn(3)
    optimizer.step()
    tree, tensors = flatten(optimizer.state_dict())
    back = unflatten(json.loads(json.dumps(tree)), tensors)
    assert back["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(back["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_random_streams_survive_json() -> None:
    tree, tensors = flatten(capture_random_state())
    drawn = (random.random(), float(np.random.rand()), torch.rand(3))  # noqa: NPY002
    restore_random_state(unflatten(json.loads(json.dumps(tree)), tensors))
    again = (random.random(), float(np.random.rand()), torch.rand(3))  # noqa: NPY002
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_guarded_code_leaves_the_streams_alone() -> None:
    torch.manual_seed(3)
    with untouched_randomness():
        torch.rand(10)
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))


def test_reserved_and_numeric_keys_survive() -> None:
    value = {"$tensor": 1, 2: (3, [None, True, float("inf")])}
    tree, tensors = flatten(value)
    assert unflatten(json.loads(json.dumps(tree)), tensors) == value


def test_a_leaf_without_plain_form_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"value\.a\.0 must be plain data or a tensor, got 'function'"):
        flatten({"a": [lambda: None]})


def test_a_missing_tensor_is_corrupt() -> None:
    tree, _ = flatten({"w": torch.ones(1)})
    with pytest.raises(CorruptDataError, match=r"tensor must be present in the data, got 'value\.w'"):
        unflatten(tree, {})


def test_paths_that_read_alike_keep_their_own_tensors() -> None:
    one, two, three, four = (torch.full((1,), float(number)) for number in range(4))
    value = {"a": {"b": one}, "a.b": two, "n": {1: three, "1": four}}
    tree, tensors = flatten(value)
    assert len(tensors) == 4
    back = unflatten(tree, tensors)
    assert [float(back["a"]["b"]), float(back["a.b"]), float(back["n"][1]), float(back["n"]["1"])] == [0, 1, 2, 3]
