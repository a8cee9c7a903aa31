"""Workers that die while they start: the job that waits for one is listed as dead in the end, and no other is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import UnavailableError
from esper.contracts.kernel import CompileSpec
from esper.services.tezzeret import worker_process
from esper.v1 import tezzeret_service_pb2 as pb
from tests.integration.compile_mesh import CompileMesh
from tests.stillborn_worker import NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
SPEC = CompileSpec(
    ir=default_registry().create_blueprint("lora").ir,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,)),
)


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CompileMesh]:
    monkeypatch.setattr(worker_process, "_MODULE", "tests.stillborn_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    made = CompileMesh(tmp_path, max_failed_starts=2)
    try:
        yield made
    finally:
        await made.open.aclose()


async def test_a_job_of_a_service_that_never_had_a_worker_is_listed_as_dead_and_can_be_put_back(
    mesh: CompileMesh, tmp_path: Path
) -> None:
    (tmp_path / NAME).touch()
    await mesh.start()
    assert mesh.pool.pids == ()
    await dead_until_a_worker_comes_up(mesh, tmp_path)


async def test_a_job_for_which_no_worker_comes_up_is_listed_as_dead_and_can_be_put_back(
    mesh: CompileMesh, tmp_path: Path
) -> None:
    await mesh.start()
    (tmp_path / NAME).touch()
    [worker] = mesh.pool.pids
    os.kill(worker, signal.SIGKILL)
    await dead_until_a_worker_comes_up(mesh, tmp_path)


async def dead_until_a_worker_comes_up(mesh: CompileMesh, tmp_path: Path) -> None:
    """Ask for a kernel that no worker makes, then have one come up that does."""
    job = await mesh.compile(SPEC)
    assert (job.phase, job.deliveries, job.error_reason) == (pb.JOB_PHASE_DEAD, 3, "UNAVAILABLE"), job.error
    said = "a compile worker must come up within 2 starts, none did: compile worker ended with code 1: "
    assert job.error.startswith(said), job.error
    assert job.error.endswith("this machine lets no worker start")
    dead = await mesh.tezzeret.ListDeadLetters(pb.ListDeadLettersRequest(), timeout=10)
    assert [one.job_id for one in dead.jobs] == [job.job_id]
    with pytest.raises(UnavailableError, match=r"compile workers are not ready: .*lets no worker start"):
        await mesh.service.ready()

    (tmp_path / NAME).unlink()
    await mesh.tezzeret.RequeueDeadLetter(pb.RequeueDeadLetterRequest(job_id=job.job_id), timeout=10)
    assert (await mesh.compile(SPEC)).phase == pb.JOB_PHASE_SUCCEEDED
    assert await mesh.service.ready()
