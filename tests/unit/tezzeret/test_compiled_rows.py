"""Each row that holds a compiled form against its module fails where the form is wrong in that, and names what is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import parse_text, to_module
from esper.blueprints.cost import cost
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.kernel import CompileSpec, CompileTarget, ValidationCheck
from esper.services.tezzeret import kernel_validator
from esper.services.tezzeret.compiler import CompiledForm
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.kernel_validator import Candidate, figure_rows

SITE = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,))
SPEC = CompileSpec(ir=parse_text("blueprint 1\na = linear(h)\nb = linear(a, init=zero)\nreturn b"), site=SITE)


class Form(nn.Module):
    """The module of the graph, with something done to what it gives."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = to_module(SPEC.ir, SITE, seed=0)
        self.change = change

    def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
        return self.inner.load_state_dict(state)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return self.inner.named_parameters()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.change(self.inner(x, h))


def rows_of(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], config: CompilerConfig | None = None
) -> dict[str, ValidationCheck]:
    monkeypatch.setattr(kernel_validator, "load_binary", lambda *_: Form(change))
    form = CompiledForm(target=CompileTarget.TORCHSCRIPT, binary=b"", forward=Form(change))
    candidate = Candidate(spec=SPEC, module=to_module(SPEC.ir, SITE, seed=0), form=form, cost=cost(SPEC.ir, SITE))
    config = config or CompilerConfig()
    rows = [*kernel_validator.compiled_rows(candidate, config), *figure_rows(candidate, config)]
    return {row.name: row for row in rows}


def failed(rows: dict[str, ValidationCheck]) -> dict[str, str]:
    return {name: row.detail for name, row in rows.items() if not row.passed}


def noisy(delta: Tensor) -> Tensor:
    return delta + torch.rand_like(delta) * 1e-3


def narrow(delta: Tensor) -> Tensor:
    """Overflows where inputs are large."""
    return (delta * 1e4).to(torch.float16).to(delta.dtype) / 1e4


def only_wide(delta: Tensor) -> Tensor:
    return delta * float("inf") if delta.dtype is torch.bfloat16 else delta


def cut_off(delta: Tensor) -> Tensor:
    """Equal forwards, and another gradient."""
    return (delta * 2 - delta.detach()) if delta.requires_grad else delta


def nothing_back(delta: Tensor) -> Tensor:
    return delta.detach() + sum(one.sum() * 0 for one in [torch.zeros(1, requires_grad=True)])


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, str]]] = {
    "shapes": (lambda delta: delta[:2], {"compiled_shapes": "batch 5: (2, 6) for (5, 6)"}),
    "determinism": (noisy, {"compiled_determinism": "0 of 5 further runs gave the same bits"}),
    "overflow": (narrow, {"compiled_finite_float32": "not finite on extreme inputs"}),
    "overflow in the narrow kind": (
        only_wide,
        {"compiled_finite_bfloat16": "not finite on random, zero, extreme inputs"},
    ),
    "gradients": (cut_off, {"compiled_gradients": "4 parameters have the eager gradient"}),
    "no gradients": (nothing_back, {"compiled_gradients": "no gradient for"}),
    "values": (lambda delta: delta * 1.01, {"compiled_equality": "largest difference over batches (1, 2, 5)"}),
}


def test_an_honest_form_passes_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(monkeypatch, lambda delta: delta)
    assert failed(rows) == {}
    assert len(rows) == 8


@pytest.mark.parametrize("name", WRONG)
def test_a_form_that_is_wrong_in_one_thing_fails_its_row(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, wanted = WRONG[name]
    found = failed(rows_of(monkeypatch, change))
    for row, said in wanted.items():
        assert said in found[row]


def test_a_form_that_raises_fails_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(delta: Tensor) -> Tensor:
        raise RuntimeError(f"no kernel for\n{delta.dtype}")

    form = CompiledForm(target=CompileTarget.TORCHSCRIPT, binary=b"", forward=Form(raises))
    monkeypatch.setattr(kernel_validator, "load_binary", lambda *_: Form(raises))
    candidate = Candidate(spec=SPEC, module=to_module(SPEC.ir, SITE, seed=0), form=form, cost=cost(SPEC.ir, SITE))
    rows = kernel_validator.compiled_rows(candidate, CompilerConfig())
    assert {(row.name, row.passed, row.detail) for row in rows} == {
        ("compiled_runs", False, "RuntimeError: no kernel for torch.float32"),
        ("compiled_runs", False, "RuntimeError: no kernel for torch.bfloat16"),
    }


def test_latency_and_memory_beyond_their_limits_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = CompilerConfig(max_latency_ms=1e-6, max_memory_bytes=1)
    assert failed(rows_of(monkeypatch, lambda delta: delta, strict)).keys() == {"latency", "memory"}
