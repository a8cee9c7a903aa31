"""Stage 5: Tezzeret turns a blueprint into a validated, optimised, signed kernel."""

from __future__ import annotations

import pytest

from esper.blueprints.registry import default_registry
from esper.client import EsperClient
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.kernel import CompileSpec, JobPhase
from esper.execution.artifact import verify
from esper.execution.keys import KeyRing
from esper.mesh.settings import MeshSettings
from esper.services.tezzeret.kernel_optimizer import KernelOptimizer
from esper.services.tezzeret.worker import CompiledKernel, TezzeretWorker

LINEAR = Site(kind=SiteKind.LINEAR, input_shape=(64,), output_shape=(16,))
CHECKS = {"identity_at_birth", "gradient_flow", "determinism"}


@pytest.fixture(scope="module")
def kernel() -> CompiledKernel:
    blueprint = default_registry().create_blueprint("gated_mlp")
    return TezzeretWorker().compile_blueprint(blueprint)


def test_a_blueprint_compiles_to_a_validated_kernel(kernel: CompiledKernel) -> None:
    assert kernel.binary_data
    assert kernel.metadata.compilation_time < 5.0
    assert kernel.metadata.validated


def test_a_kernel_is_optimised_for_a_device(kernel: CompiledKernel) -> None:
    optimized = KernelOptimizer().optimize(kernel, device="cuda")
    assert optimized.metadata.optimization_applied
    assert optimized.metadata.target_device == "cuda"


def test_the_service_compiles_once_and_signs(client: EsperClient, mesh) -> None:  # type: ignore[no-untyped-def]
    spec = CompileSpec(ir=default_registry().create_blueprint("glu").ir, site=LINEAR)
    first, second = client.tezzeret.compile(spec), client.tezzeret.compile(spec)
    assert first.phase is JobPhase.SUCCEEDED
    assert first.job_id == second.job_id
    assert first.artifact_id == second.artifact_id
    settings: MeshSettings = mesh.settings
    data = client.urza.download_kernel(first.artifact_id)
    manifest = verify(data, KeyRing.from_dir(settings.trusted_dir)).manifest
    assert manifest.validated
    assert {check.name for check in manifest.checks} >= CHECKS
