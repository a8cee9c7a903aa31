"""Small real values for tests of the library: graphs, drafts, signed kernels and field reports."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.kernel import CompileTarget, DeviceKind, ValidationCheck
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport
from esper.execution.artifact import KernelContent, artifact_bytes, pack
from esper.execution.keys import SigningKey

SITE = Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(8,))
"""Where the kernels of this module stand."""


def graph(number: int) -> BlueprintIR:
    """Give a legal graph; another one for every number."""
    node = IRNode(name="scaled", op="scale", inputs=("h",), attributes={"value": number / 1024})
    return BlueprintIR(nodes=(node,), output="scaled")


def kernel_bytes(key: SigningKey, number: int = 0, *, weight_floats: int = 8, blueprint: int = 0) -> bytes:
    """Give a signed artefact with ``weight_floats`` random weights; another content key for every number."""
    generator = torch.Generator().manual_seed(number)
    content = KernelContent(
        content_key=hashlib.sha256(f"request {number}".encode()).hexdigest(),
        site=SITE,
        target=CompileTarget.EAGER,
        device=DeviceKind.CPU,
        ir=canonical_bytes(graph(blueprint)),
        weights={"scaled.weight": torch.randn(weight_floats, generator=generator)},
        binary=b"",
        cost=BlueprintCost(parameters=weight_floats, flops=2 * weight_floats, activation_bytes=4 * weight_floats),
        checks=(ValidationCheck(name="gradient_flow", passed=True),),
        compilation_time=timedelta(milliseconds=150),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    return artifact_bytes(pack(content, key))


def field_report(
    report_id: str,
    *,
    blueprint_id: str = "",
    outcome: AdaptationOutcome = AdaptationOutcome.KEPT,
    estimate: float | None = None,
) -> FieldReport:
    """Give a field report; its contribution is measured where there is an estimate."""
    contribution = None
    if estimate is not None:
        contribution = Contribution(estimate=estimate, low=estimate - 0.1, high=estimate + 0.1, num_examples=64)
    return FieldReport(
        report_id=report_id,
        adaptation_id="a-1",
        run_id="run-1",
        layer="fc1",
        seed_index=0,
        blueprint_id=blueprint_id,
        outcome=outcome,
        contribution=contribution,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
