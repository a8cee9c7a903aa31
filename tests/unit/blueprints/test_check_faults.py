"""Each check of the contract test fails for the blueprint that breaks it, and says which node is at fault."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from esper.blueprints import check_blueprint, parse_text
from esper.blueprints.operator_base import Call, Emitter, Operator, Work
from esper.blueprints.operators import OPERATORS
from esper.blueprints.types import TensorType
from esper.contracts.blueprint import BlueprintIR, Site, SiteKind
from esper.contracts.errors import CapacityExceededError, InvalidBlueprintError, InvalidInputError


class _Same(Operator):
    """Gives its input's type, and costs nothing."""

    def infer(self, call: Call) -> TensorType:
        return call.inputs[0]

    def work(self, call: Call, output: TensorType) -> Work:
        return Work()


class _Function(_Same):
    """Calls one function."""

    function: ClassVar[Any]

    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        return emitter.function(type(self).function, args[0])


def fixed_batch(value: Tensor) -> Tensor:
    return value.reshape(4, *value.shape[1:])


def fixed_positions(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], 8, 8, 8)


def sharp(value: Tensor) -> Tensor:
    """Finite at zero, with a slope of infinity there."""
    return torch.sqrt(torch.abs(value))


def noisy(value: Tensor) -> Tensor:
    return value * torch.rand_like(value)


def endless(value: Tensor) -> Tensor:
    """More memory than there is."""
    return value + torch.empty(2**60)


def cut(value: Tensor) -> Tensor:
    return value.detach() + 0.0 * value.detach()


def single(value: Tensor) -> Tensor:
    if value.dtype is not torch.float32:
        raise TypeError("only float32 here")
    return value


def _calling(function: Callable[[Tensor], Tensor]) -> Operator:
    """Give the operator that calls a function and has its name."""
    members = {"name": function.__name__, "function": staticmethod(function)}
    return type(function.__name__, (_Function,), members)()


class Undeclared(_Same):
    """A map whose weights and work are not declared."""

    name: ClassVar = "undeclared"

    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        module = nn.Linear(output.features, output.features, bias=False)
        nn.init.constant_(module.weight, 0.1)
        return emitter.module(call.node, module, args[0])


class Unseeded(_Same):
    """A scale that is drawn from torch's own random stream."""

    name: ClassVar = "unseeded"

    def work(self, call: Call, output: TensorType) -> Work:
        return Work(parameters=1)

    def emit(self, emitter: Emitter, args: Sequence[fx.Node], call: Call, output: TensorType) -> fx.Node:
        return emitter.function(torch.mul, args[0], emitter.parameter(call.node, 1.0 + torch.rand(1)))


BROKEN: dict[str, Operator] = {
    one.name: one
    for one in (
        *map(_calling, (fixed_batch, fixed_positions, sharp, noisy, cut, single, endless)),
        Undeclared(),
        Unseeded(),
    )
}


LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(16,), output_shape=(12,))
IMAGE = Site(kind=SiteKind.CONV2D, input_shape=(3, 8, 8), output_shape=(8, 8, 8))


def graph(text: str) -> BlueprintIR:
    return parse_text("blueprint 1\n" + "\n".join(part.strip() for part in text.split(";")))


@pytest.fixture
def broken_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator set with the broken ones in it, everywhere it is looked at."""
    both = {**OPERATORS, **BROKEN}
    for name in ("esper.blueprints.ir", "esper.blueprints.plan"):
        monkeypatch.setattr(sys.modules[name], "OPERATORS", both)


def failures(ir: BlueprintIR, site: Site, **settings: object) -> dict[str, str]:
    report = check_blueprint(ir, site, **settings)  # type: ignore[arg-type]
    assert report.passed == all(row.passed for row in report.checks)
    return {row.name: row.detail for row in report.checks if not row.passed}


SOUND = "a = linear(x); b = activation(a, fn=gelu); c = linear(b, init=zero); return c"


def test_the_sound_graph_that_the_broken_ones_differ_from_passes() -> None:
    everything = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    assert failures(graph(SOUND), LINEAR, dtypes=everything, parameter_dtypes=everything) == {}


def test_a_dead_convolution_names_the_node_that_lets_no_gradient_through() -> None:
    dead = graph("c = conv(x, init=zero); n = group_norm(c); a = activation(n, fn=relu); return a")
    found = failures(dead, IMAGE)
    assert set(found) == {"learning", "gradients"}
    assert all("node 'a' passes no gradient to 'n'" in detail for detail in found.values())


def test_a_delta_at_birth_names_the_output() -> None:
    found = failures(graph("a = linear(x); return a"), LINEAR)
    assert set(found) == {"identity"}
    assert "largest delta at birth over h, at node 'a'" in found["identity"]


@pytest.mark.usefixtures("broken_operators")
class TestBrokenOperators:
    def test_a_parameter_that_nothing_reaches(self) -> None:
        cut = graph("a = linear(x); k = cut(a); c = linear(k, init=zero); return c")
        found = failures(cut, LINEAR)
        assert "weakest parameter node_a" in found["gradients"]
        assert "node 'c' passes no gradient to 'k'" not in found["gradients"]
        assert "learning" not in found

    def test_a_wrong_declared_cost(self) -> None:
        found = failures(graph("u = undeclared(h); c = linear(u, init=zero); return c"), LINEAR)
        assert set(found) == {"parameters", "flops"}
        assert "node 'u' has 144 and declares 0" in found["parameters"]
        assert "node 'u' has 288 and declares 0" in found["flops"]

    def test_a_fixed_batch(self) -> None:
        found = failures(graph("a = linear(x); f = fixed_batch(a); c = linear(f, init=zero); return c"), LINEAR)
        assert "batch" in found
        for part in ("batch 1: RuntimeError: shape '[4, 12]' is invalid", "batch 5: ", "at node 'f'"):
            assert part in found["batch"]

    def test_fixed_positions(self) -> None:
        found = failures(graph("f = fixed_positions(h); c = conv(f, init=zero); return c"), IMAGE)
        assert set(found) == {"positions"}
        assert "batch 2: RuntimeError: shape '[2, 8, 8, 8]' is invalid" in found["positions"]
        assert "at node 'f'" in found["positions"]

    def test_a_gradient_that_is_not_finite(self) -> None:
        found = failures(
            graph("a = linear(h); z = multiply(a, value=0.0); s = sharp(z); c = linear(s, init=zero); return c"), LINEAR
        )
        assert "not finite" in found["gradients"]
        assert "gradient of node_a" in found["finite_float32"]

    def test_a_run_that_draws_random_numbers(self) -> None:
        found = failures(graph("a = linear(x); r = noisy(a); c = linear(r, init=zero); return c"), LINEAR)
        assert found["determinism"] == "two runs differ"

    def test_weights_that_the_seed_does_not_set(self) -> None:
        found = failures(graph("u = unseeded(h); c = linear(u, init=zero); return c"), LINEAR)
        assert found == {"determinism": "two builds differ"}

    def test_memory_that_runs_out_is_no_fault_of_the_graph(self) -> None:
        with pytest.raises(CapacityExceededError, match="memory must suffice, it ran out"):
            check_blueprint(graph("a = linear(x); e = endless(a); c = linear(e, init=zero); return c"), LINEAR)

    def test_a_type_that_an_operator_refuses(self) -> None:
        found = failures(graph("s = single(h); c = linear(s, init=zero); return c"), LINEAR)
        assert "TypeError: only float32 here" in found["learning"]
        assert "finite_float32" in found  # measured against float64, which it refuses too

    def test_a_gradient_far_from_that_of_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wild(value: torch.Tensor) -> torch.Tensor:
            if value.dtype is torch.float64:
                return value
            return value + 1e20 * (value - value.detach())

        monkeypatch.setattr(type(BROKEN["single"]), "function", staticmethod(wild))
        found = failures(graph("a = linear(h); s = single(a); c = linear(s, init=zero); return c"), LINEAR)
        assert set(found) == {"finite_float32", "finite_bfloat16"}
        assert "gradient of node_a.weight is off by" in found["finite_float32"]


def test_an_overflow_names_the_node_in_the_dtype_where_it_happens() -> None:
    text = "v = linear(x, features=8); m = mul(v, v); c = linear(m, init=zero); return c"
    found = failures(graph(text), LINEAR, dtypes=(torch.float32, torch.float16), parameter_dtypes=(torch.float16,))
    assert set(found) == {"finite_float16", "finite_float16_parameters"}
    assert all("not finite: delta on large inputs, at node 'm'" in detail for detail in found.values())


def test_an_overflow_of_bfloat16_is_named_too() -> None:
    lines = "; ".join(f"s{i} = multiply(s{i - 1}, value=1000.0)" for i in range(1, 12))
    text = f"s0 = linear(h, features=4); {lines}; t = mul(s11, s0); c = linear(t, init=zero); return c"
    found = failures(graph(text), LINEAR, dtypes=(torch.bfloat16,))
    assert "at node 't'" in found["finite_bfloat16"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for setting in ("dtypes", "parameter_dtypes"):
        with pytest.raises(InvalidInputError, match=f"be float32, float64, bfloat16 or float16, got '?{name}"):
            check_blueprint(graph(SOUND), LINEAR, **{setting: (dtype,)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("n = layer_norm(h); c = linear(n, init=zero); return c", (1,), "node 'n' norm must be over at least 2 values"),
        ("n = rms_norm(h); c = linear(n, init=zero); return c", (1,), "node 'n' norm must be over at least 2 values"),
        ("m = attention(h, h, h); c = linear(m, init=zero); return c", (1, 8), "must be over at least 2 tokens, got 1"),
    ],
)
def test_what_is_constant_on_a_single_value_is_not_legal(text: str, shape: tuple[int, ...], reason: str) -> None:
    site = Site(kind=SiteKind.LAYER_NORM, input_shape=shape, output_shape=shape)
    with pytest.raises(InvalidBlueprintError, match=reason):
        check_blueprint(graph(text), site)


def test_a_stride_over_a_single_position_is_not_legal() -> None:
    site = Site(kind=SiteKind.LINEAR, input_shape=(1,), output_shape=(4,))
    text = "s = signal_view(x); v = conv(s, features=4, stride=2); f = flatten(v); c = linear(f, init=zero); return c"
    with pytest.raises(InvalidBlueprintError, match="node 'v' stride must be over at least 2 positions, got 1"):
        check_blueprint(graph(text), site)
