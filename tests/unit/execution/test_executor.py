"""What is checked of a kernel before it stands at a layer, and what is not checked twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import InvalidInputError, ShapeMismatchError
from esper.execution import executor
from esper.execution.executor import Placement, build_kernel, check_shapes, load_weights

SITE = Site(kind=SiteKind.LINEAR, input_shape=(6,), output_shape=(4,))
CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)


class Counted(nn.Module):
    """Gives a delta of as many features as it is told, and counts its runs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.runs = 0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        self.runs += 1
        return h.new_zeros((*h.shape[:-1], self.features))


@pytest.fixture(autouse=True)
def _nothing_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_passed", set())


def test_what_has_passed_is_not_run_again_at_the_same_site_and_dtype() -> None:
    module = Counted(4)
    for _ in range(3):
        check_shapes(module, SITE, CPU, structure="a")
    assert module.runs == 2  # two batch sizes, once
    check_shapes(module, SITE, CPU, structure="b")
    assert module.runs == 4
    check_shapes(module, SITE, Placement(device=CPU.device, dtype=torch.float64), structure="a")
    assert module.runs == 6


def test_another_site_is_checked_for_itself() -> None:
    wide = Site(kind=SiteKind.LINEAR, input_shape=(6,), output_shape=(8,))
    check_shapes(Counted(4), SITE, CPU, structure="a")
    with pytest.raises(ShapeMismatchError, match=r"must give a delta of shape \(2, 8\), got \(2, 4\)"):
        check_shapes(Counted(4), wide, CPU, structure="a")


@pytest.mark.parametrize("structure", ["wrong", None])
def test_what_is_wrong_is_refused_each_time(structure: str | None) -> None:
    for _ in range(3):
        with pytest.raises(ShapeMismatchError, match=r"must give a delta of shape \(2, 4\), got \(2, 3\)"):
            check_shapes(Counted(3), SITE, CPU, structure=structure)


def test_a_bare_module_is_always_checked() -> None:
    module = Counted(4)
    for _ in range(2):
        check_shapes(module, SITE, CPU)
    assert module.runs == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool])
def test_a_delta_of_another_dtype_than_the_layers_is_refused(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h.to(dtype)

    with pytest.raises(InvalidInputError, match=f"must give a delta of the layer's torch.float32, got {dtype}"):
        check_shapes(Cast(), SITE, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [blueprint.name for blueprint in default_registry().for_site(SITE)])
def test_every_template_keeps_the_layers_dtype(name: str, dtype: torch.dtype) -> None:
    placement = Placement(device=CPU.device, dtype=dtype)
    check_shapes(build_kernel(default_registry().create_blueprint(name).ir, SITE, placement), SITE, placement)


class Counting(nn.Module):
    """A weight beside a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("weight", torch.ones(2, dtype=torch.int64), "'weight' must be torch.float32, got torch.int64"),
        ("weight", torch.ones(2, dtype=torch.uint8), "'weight' must be torch.float32, got torch.uint8"),
        ("weight", torch.ones(2, dtype=torch.bool), "'weight' must be torch.float32, got torch.bool"),
        ("count", torch.tensor(1.5), "'count' must be torch.int64, got torch.float32"),
        ("count", torch.tensor(1, dtype=torch.int32), "'count' must be torch.int64, got torch.int32"),
    ],
)
def test_numbers_of_another_kind_are_no_weights(name: str, value: Tensor, rule: str) -> None:
    module = Counting()
    with pytest.raises(InvalidInputError, match=f"weights must be of the module's kind of number, {rule}"):
        load_weights(module, {**module.state_dict(), name: value})
    assert torch.equal(module.weight, torch.zeros(2))


def test_weights_take_the_width_of_the_module() -> None:
    module = Counting()
    load_weights(module, {"weight": torch.full((2,), 0.5, dtype=torch.float64), "count": torch.tensor(3)})
    assert (module.weight.dtype, module.weight.tolist()) == (torch.float32, [0.5, 0.5])


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_MAX_PASSED", 3)
    for number in range(10):
        check_shapes(Counted(4), SITE, CPU, structure=number)
        assert len(executor._passed) <= 3


def test_germinating_a_blueprint_again_runs_no_meta_pass(warm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[nn.Module] = []
    real = executor.functional_call
    monkeypatch.setattr(executor, "functional_call", lambda module, *rest: runs.append(module) or real(module, *rest))
    ir = default_registry().create_blueprint("bottleneck_adapter").ir
    for index in range(3):
        warm.model.layer1.germinate(index, ir, random_seed=index)
    assert len(runs) == 2
    warm.model.head.germinate(0, ir)
    assert len(runs) == 4
