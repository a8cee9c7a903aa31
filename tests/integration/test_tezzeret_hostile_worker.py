"""A worker process that was taken over answers with a hostile archive: nothing of it is signed, stored or announced."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import NotFoundError
from esper.contracts.kernel import CompileSpec
from esper.services.tezzeret import worker_process
from esper.services.tezzeret.content_key import content_key
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1 import urza_service_pb2 as urza_pb
from tests.integration.compile_mesh import CompileMesh

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SPEC = CompileSpec(
    ir=default_registry().create_blueprint("bottleneck_adapter").ir,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,)),
)
OTHER = default_registry().create_blueprint("lora").ir


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CompileMesh]:
    monkeypatch.setattr(worker_process, "_MODULE", "tests.compromised_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    made = CompileMesh(tmp_path)
    try:
        await made.start()
        yield made
    finally:
        await made.open.aclose()


async def test_a_hostile_archive_of_a_compromised_worker_reaches_nobody_and_ends_the_worker(
    mesh: CompileMesh, tmp_path: Path
) -> None:
    honest = await mesh.compile(SPEC)
    assert honest.phase == pb.JOB_PHASE_SUCCEEDED, "the worker serves what it does not tamper with"
    [liar] = mesh.pool.pids
    lied_about = replace(SPEC, random_seed=1)
    job = await mesh.compile(lied_about)
    assert (job.phase, job.deliveries) == (pb.JOB_PHASE_DEAD, 3), "every worker lied about it, each but once"
    assert job.error_reason == "UNAVAILABLE", job.error
    assert job.error.startswith("compile worker was ended, since its kernel was refused: ")
    assert "must declare functions that nothing calls by itself, got '__setstate__'" in job.error
    dead = await mesh.tezzeret.ListDeadLetters(pb.ListDeadLettersRequest(), timeout=10)
    assert [one.job_id for one in dead.jobs] == [job.job_id]
    with pytest.raises(NotFoundError):
        await mesh.urza.GetKernel(urza_pb.GetKernelRequest(content_key=content_key(lied_about)), timeout=10)
    assert not (tmp_path / "written-by-a-kernel").exists()
    assert (await mesh.compile(replace(SPEC, ir=OTHER))).phase == pb.JOB_PHASE_SUCCEEDED
    assert liar not in mesh.pool.pids, "another worker serves the next job"
    with pytest.raises(ProcessLookupError):
        os.kill(liar, 0)


async def test_a_kernel_that_no_second_process_vouches_for_is_not_signed(mesh: CompileMesh) -> None:
    job = await mesh.compile(replace(SPEC, random_seed=3))
    assert (job.phase, job.deliveries) == (pb.JOB_PHASE_DEAD, 3), job.error
    assert job.error.endswith("it differs in checks (determinism_processes)")
    assert (await mesh.compile(SPEC)).phase == pb.JOB_PHASE_SUCCEEDED, "an honest worker has the row"


async def test_a_worker_that_names_no_phase_there_is_is_ended_and_its_job_dies(mesh: CompileMesh) -> None:
    job = await mesh.compile(replace(SPEC, random_seed=2))
    assert job.phase == pb.JOB_PHASE_DEAD, job.error
    assert job.error_reason == "UNAVAILABLE"
    assert "compile worker sent garbage" in job.error
    assert (await mesh.compile(SPEC)).phase == pb.JOB_PHASE_SUCCEEDED, "another worker serves the next job"
