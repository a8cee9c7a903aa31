"""Worker processes for real: warm, sandboxed, killed, out of time, worn out, and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from esper.blueprints import default_registry
from esper.contracts.blueprint import BlueprintIR, Site, SiteKind
from esper.contracts.errors import (
    CapacityExceededError,
    CompilationError,
    DeadlineExceededError,
    InvalidBlueprintError,
    UnavailableError,
)
from esper.contracts.kernel import CompileSpec, CompileTarget, JobPhase, KernelArtifact
from esper.execution.artifact import artifact_bytes, verify
from esper.execution.keys import SigningKey
from esper.services.tezzeret import worker_process
from esper.services.tezzeret.approval import approve
from esper.services.tezzeret.config import CompilerConfig, WorkerLimits, WorkerPoolConfig
from esper.services.tezzeret.pool import WorkerPool

SPEC = CompileSpec(
    ir=default_registry().create_blueprint("lora").ir,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(6,)),
)
KEY = SigningKey.generate()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerPool]:
    """One pool for the tests whose worker survives or is replaced: a start takes seconds."""
    scratch = tmp_path_factory.mktemp("scratch")
    config = WorkerPoolConfig(scratch_dir=scratch)
    made = WorkerPool(config)
    await made.start()
    yield made
    await made.close()
    assert _left(scratch) == []
    assert made.pids == ()


async def test_a_process_compiles_without_network_or_keys(pool: WorkerPool) -> None:
    phases: list[JobPhase] = []
    artifact = await pool.compile(SPEC, phases.append)
    assert phases == [JobPhase.COMPILING, JobPhase.VALIDATING, JobPhase.PACKAGING]
    assert artifact.signature == b""
    manifest, data = approve(artifact, SPEC, KEY, processes=pool.processes)
    assert verify(data, KEY.ring()).artifact_id == manifest.artifact_id
    assert "determinism_processes" in {check.name for check in manifest.checks}
    assert pool.processes
    assert {row.name for row in pool.sandbox} == {"parent", "limits", "files", "scope", "network"}
    exported = await pool.compile(replace(SPEC, target=CompileTarget.EXPORTED_PROGRAM))
    assert exported.binary


async def test_errors_keep_their_class_and_the_worker_goes_on(pool: WorkerPool) -> None:
    pids = pool.pids
    with pytest.raises(InvalidBlueprintError, match="nodes must be 1 to 64, got 0"):
        await pool.compile(replace(SPEC, ir=BlueprintIR(nodes=(), output="x")))
    assert (await pool.compile(SPEC)).binary
    assert pool.pids == pids


async def test_a_killed_worker_costs_its_job_and_is_replaced(pool: WorkerPool) -> None:
    [pid] = pool.pids

    def kill(phase: JobPhase) -> None:
        if phase is JobPhase.VALIDATING:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(UnavailableError, match="compile worker was killed by SIGKILL"):
        await pool.compile(SPEC, kill)
    assert (await pool.compile(SPEC)).binary
    assert pool.pids != (pid,)


async def test_a_worker_whose_kernel_is_refused_is_ended_and_replaced(pool: WorkerPool) -> None:
    [pid] = pool.pids

    def refuse(_: KernelArtifact) -> None:
        raise CompilationError("worker must give what was asked for")

    said = "compile worker was ended, since its kernel was refused: worker must give what was asked for"
    with pytest.raises(UnavailableError, match=said):
        await pool.compile(SPEC, check=refuse)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    checked: list[KernelArtifact] = []
    assert [await pool.compile(SPEC, check=checked.append)] == checked
    assert pid not in pool.pids


async def test_a_worker_killed_while_idle_is_replaced(pool: WorkerPool) -> None:
    [pid] = pool.pids
    os.kill(pid, signal.SIGKILL)
    await _until(lambda: pool.pids != (pid,), 60)
    assert (await pool.compile(SPEC)).binary


@pytest.mark.slow
async def test_a_worker_beyond_its_time_is_killed(tmp_path: Path) -> None:
    """SIGSTOP stands for code that never returns."""
    limits = WorkerLimits(job_timeout_s=2.0)
    pool = WorkerPool(WorkerPoolConfig(limits=limits, scratch_dir=tmp_path))
    await pool.start()
    [pid] = pool.pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceededError, match=r"compile must end within 2.0 s, it did not"):
        await pool.compile(SPEC)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await pool.close()


@pytest.mark.slow
async def test_a_worker_beyond_its_memory_fails_its_job_alone(tmp_path: Path) -> None:
    limits = WorkerLimits(address_space_bytes=5 * 1024**3 // 4)
    pool = WorkerPool(
        WorkerPoolConfig(limits=limits, compiler=CompilerConfig(max_parameters=10**9), scratch_dir=tmp_path)
    )
    await pool.start()
    huge = Site(kind=SiteKind.LINEAR, input_shape=(4_000,), output_shape=(4_000,))
    greedy = CompileSpec(ir=default_registry().create_blueprint("widen").ir, site=huge)
    with pytest.raises(CapacityExceededError, match=f"at most {limits.address_space_bytes} bytes"):
        await pool.compile(greedy)
    assert (await pool.compile(SPEC)).binary
    await pool.close()


@pytest.mark.slow
async def test_a_worn_worker_is_replaced(tmp_path: Path) -> None:
    pool = WorkerPool(WorkerPoolConfig(limits=WorkerLimits(jobs_per_worker=1), scratch_dir=tmp_path))
    await pool.start()
    [first] = pool.pids
    await pool.compile(SPEC)
    await pool.compile(SPEC)
    assert first not in pool.pids
    await pool.close()


async def test_a_worker_that_cannot_start_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_MODULE", "esper.services.tezzeret.no_such_module")
    pool = WorkerPool(WorkerPoolConfig(scratch_dir=tmp_path))
    with pytest.raises(UnavailableError, match=r"compile worker ended with code 1: .*No module named"):
        await pool.start()
    await pool.close()
    assert _left(tmp_path) == []


@pytest.mark.slow
async def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from esper.services.tezzeret.pool import WorkerPool\n"
        "from esper.services.tezzeret.config import WorkerPoolConfig\n"
        "async def main():\n"
        "    pool = WorkerPool(WorkerPoolConfig(scratch_dir=Path(sys.argv[1])))\n"
        "    await pool.start()\n"
        "    print(pool.pids[0], flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    worker = int(await asyncio.wait_for(parent.stdout.readline(), 120))
    parent.kill()
    await parent.wait()
    await _until(lambda: not _runs(worker), 10)


async def test_inline_workers_compile_and_say_that_nothing_is_enforced() -> None:
    pool = WorkerPool(WorkerPoolConfig(mode="inline", num_workers=2))
    with pytest.raises(UnavailableError, match="must be started and open"):
        await pool.compile(SPEC)
    await pool.start()
    artifacts = await asyncio.gather(*(pool.compile(replace(SPEC, random_seed=seed)) for seed in range(3)))
    assert len({artifact_bytes(artifact) for artifact in artifacts}) == 3
    [row] = pool.sandbox
    assert row.detail.startswith("NOT ENFORCED")
    await pool.close()
    assert not pool.ready()


async def test_an_inline_job_that_is_cancelled_ends_its_thread_at_the_next_phase() -> None:
    """Every function that a thread of the pool enters is seen, so that what it no longer does is known."""
    entered: set[str] = set()
    threading.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_name) if event == "call" else None)
    pool = WorkerPool(WorkerPoolConfig(mode="inline"))
    try:
        await pool.start()
        await pool.compile(SPEC)
    finally:
        threading.setprofile(None)
    assert {"compiled_rows", "figure_rows", "package"} <= entered, "this is what a compile goes through"
    entered.clear()
    heard: list[JobPhase] = []
    began = asyncio.Event()

    def hear(phase: JobPhase) -> None:
        heard.append(phase)
        began.set()

    wide = Site(kind=SiteKind.LINEAR, input_shape=(2048,), output_shape=(2048,))
    compiling = asyncio.create_task(pool.compile(replace(SPEC, site=wide), hear))
    await began.wait()
    compiling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await compiling
    await _until(lambda: not _compiles_inline(), 60)
    assert heard == [JobPhase.COMPILING]
    assert "package" not in entered
    assert (await pool.compile(SPEC)).binary, "the thread takes the next job"
    await pool.close()


async def test_an_inline_pool_that_closes_under_a_job_says_so_and_leaves_no_thread_at_work() -> None:
    pool = WorkerPool(WorkerPoolConfig(mode="inline"))
    await pool.start()
    began = asyncio.Event()
    wide = Site(kind=SiteKind.LINEAR, input_shape=(2048,), output_shape=(2048,))
    compiling = asyncio.create_task(pool.compile(replace(SPEC, site=wide), lambda _: began.set()))
    await began.wait()
    await pool.close()
    with pytest.raises(UnavailableError, match="compile pool must stay open under a job, it was closed"):
        await compiling
    await _until(lambda: not _compiles_inline(), 60)


def _compiles_inline() -> bool:
    """Say whether a thread of this process is within a compile."""
    frames = list(sys._current_frames().values())
    return any(frame.f_code.co_name == "compile_spec" for top in frames for frame, _ in traceback.walk_stack(top))


def _left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - processes end without telling this loop
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
