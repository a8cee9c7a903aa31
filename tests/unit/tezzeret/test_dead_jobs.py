"""A dead job does not bar its kernel from every run for ever: what it died of may have passed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from esper.contracts.errors import InvalidInputError, UnavailableError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase, JobPriority
from esper.services.tezzeret.config import TezzeretConfig

Mill = Any


async def dead_job(mill: Mill, spec: CompileSpec) -> CompileJob:
    mill.pool.script = [UnavailableError("compile worker was killed by SIGKILL")] * 3
    job, _ = await mill.service.compile(spec)
    died: CompileJob = await mill.phase(job.job_id, JobPhase.DEAD)
    return died


async def test_a_run_that_asks_after_the_rest_has_a_dead_job_started_anew(mill: Mill, spec: CompileSpec) -> None:
    died = await dead_job(mill, spec)
    mill.service._config = replace(mill.config, rest_dead_s=1e-6)
    job, cached = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1")
    assert (job.job_id, cached) == (died.job_id, False)
    await mill.phase(job.job_id, JobPhase.SUCCEEDED)
    (ready,) = await mill.announced("run-1")
    assert (ready.adaptation_id, ready.error) == ("a1", None)
    assert len(mill.pool.specs) == 4


async def test_a_job_begun_anew_is_as_urgent_as_who_asks_now(mill: Mill, spec: CompileSpec) -> None:
    mill.pool.script = [UnavailableError("compile worker was killed by SIGKILL")] * 3
    died, _ = await mill.service.compile(spec, priority=JobPriority.BULK)
    await mill.phase(died.job_id, JobPhase.DEAD)
    mill.service._config = replace(mill.config, rest_dead_s=1e-6)
    await asyncio.gather(
        *(mill.service.compile(spec, run_id="run-1", adaptation_id=f"a{number}") for number in range(8))
    )
    assert (await mill.phase(died.job_id, JobPhase.SUCCEEDED)).priority is JobPriority.INTERACTIVE
    told = await mill.announced("run-1", 8)
    assert {(ready.adaptation_id, ready.error) for ready in told} == {(f"a{number}", None) for number in range(8)}
    assert len(mill.pool.specs) == 4


async def test_before_the_rest_or_for_nobody_a_dead_job_stays_dead(mill: Mill, spec: CompileSpec) -> None:
    died = await dead_job(mill, spec)
    job, _ = await mill.service.compile(spec, run_id="run-1", adaptation_id="a1")
    assert job.phase is JobPhase.DEAD
    (ready,) = await mill.announced("run-1")
    assert ready.error is not None
    assert "killed by SIGKILL" in ready.error
    mill.service._config = replace(mill.config, rest_dead_s=1e-6)
    assert (await mill.service.compile(spec))[0].phase is JobPhase.DEAD
    assert [one.job_id for one in await mill.service.dead_letters(9, None)] == [died.job_id]
    assert len(mill.pool.specs) == 3


def test_a_rest_is_a_time() -> None:
    with pytest.raises(InvalidInputError, match="rest_dead_s must be > 0, got 0"):
        TezzeretConfig(rest_dead_s=0)
