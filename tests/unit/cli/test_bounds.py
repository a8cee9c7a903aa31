"""Bounds as the command line takes them, and how it says no."""

from __future__ import annotations

import pytest
import typer

from esper.cli.bounds import bounds_of
from esper.v1 import blueprint_pb2


def test_conditions_become_bounds() -> None:
    found = bounds_of(["parameters<=5000", " flops >= 10 ", "latency_ms<=2.5", "success_rate>=0"])
    assert found == blueprint_pb2.BlueprintBounds(
        max_parameters=5000, min_flops=10, max_latency_ms=2.5, min_success_rate=0.0
    )
    assert found.HasField("min_success_rate")
    assert bounds_of([]) == blueprint_pb2.BlueprintBounds()


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["parameters<5"], "must be FIGURE<=NUMBER or FIGURE>=NUMBER with one of parameters, flops, latency_ms"),
        (["size<=5"], "got 'size<=5'"),
        (["parameters<="], "must be FIGURE<=NUMBER"),
        (["parameters<=2.5"], "must compare with a whole number, got 'parameters<=2.5'"),
        (["latency_ms<=fast"], "must compare with a number, got 'latency_ms<=fast'"),
        ([f"flops<={2**63}"], "must compare with less than"),
        (["flops<=1", "flops<=2"], "must bound max_flops once, got 'flops<=2' as well"),
    ],
)
def test_a_condition_of_another_form_is_bad_use(conditions: list[str], message: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        bounds_of(conditions)
    assert message in str(caught.value)
