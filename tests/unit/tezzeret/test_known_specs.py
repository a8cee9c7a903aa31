"""What follows from a spec is worked out once, for as many specs as there is room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper.blueprints.cost import cost
from esper.blueprints.ir import content_id
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError
from esper.contracts.kernel import CompileSpec
from esper.contracts.wire import serialize, to_wire
from esper.mesh import InProcessChannel
from esper.services.tezzeret import server
from esper.services.tezzeret.content_key import content_key
from esper.services.tezzeret.known_specs import KnownSpecs, check_spec
from esper.services.tezzeret.server import REGISTRAR, TezzeretServicer
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub

Mill = Any


def test_a_checked_spec_says_what_follows_from_it(spec: CompileSpec) -> None:
    checked = check_spec(spec)
    assert (checked.spec, checked.blueprint_id, checked.content_key) == (spec, content_id(spec.ir), content_key(spec))
    assert checked.parameters == cost(spec.ir, spec.site).parameters


def test_an_illegal_spec_is_refused(spec: CompileSpec) -> None:
    with pytest.raises(InvalidInputError, match=r"spec.random_seed must be within \[0, 2\*\*63\), got -1"):
        check_spec(replace(spec, random_seed=-1))
    with pytest.raises(InvalidBlueprintError, match="nodes must be 1 to 64, got 0"):
        check_spec(replace(spec, ir=replace(spec.ir, nodes=())))


def test_the_specs_used_last_are_kept_within_the_bound(spec: CompileSpec) -> None:
    seeds = [check_spec(replace(spec, random_seed=seed)) for seed in range(1, 4)]
    said = [serialize(checked.spec) for checked in seeds]
    known = KnownSpecs(max_bytes=2 * len(said[0]))
    known.learn(said[0], seeds[0])
    known.learn(said[1], seeds[1])
    known.learn(said[1], seeds[1])  # learnt twice, counted once
    assert known.find(said[0]) is seeds[0]
    known.learn(said[2], seeds[2])
    assert [known.find(one) for one in said] == [seeds[0], None, seeds[2]]


async def test_a_spec_that_was_read_before_is_known_by_its_bytes(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[CompileSpec] = []

    def counted(one: CompileSpec) -> Any:
        checked.append(one)
        return check_spec(one)

    monkeypatch.setattr(server, "check_spec", counted)
    channel = InProcessChannel()
    channel.add_servicer(REGISTRAR, TezzeretServicer(mill.service))
    stub: Any = TezzeretServiceStub(channel)
    other = replace(spec, random_seed=7)
    for one in (spec, spec, other, spec):
        await stub.Compile(pb.CompileRequest(spec=to_wire(one), wait=True), timeout=60)  # type: ignore[arg-type]
    assert checked == [spec, other]
    broken = pb.CompileRequest(spec=to_wire(spec))  # type: ignore[arg-type]
    broken.spec.ir.ClearField("nodes")
    for _ in range(2):  # what was refused is not known, and is refused again
        with pytest.raises(InvalidBlueprintError, match="nodes must be 1 to 64, got 0"):
            await stub.Compile(broken, timeout=60)
    await channel.close()


async def test_a_known_spec_is_answered_as_its_job_stands(
    mill: Mill, spec: CompileSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = InProcessChannel()
    channel.add_servicer(REGISTRAR, TezzeretServicer(mill.service))
    stub: Any = TezzeretServiceStub(channel)
    asked = pb.CompileRequest(spec=to_wire(spec), wait=True)  # type: ignore[arg-type]
    first = await stub.Compile(asked, timeout=60)
    made: list[str] = []
    wire = server.to_wire

    def counted(job: Any) -> Any:
        made.append(job.job_id)
        return wire(job)

    monkeypatch.setattr(server, "to_wire", counted)
    second = await stub.Compile(asked, timeout=60)
    assert (second.cached, second.job) == (True, first.job)
    assert made == [], "the message of a job that has ended is made once"
    mill.library.kernels.clear()
    mill.pool.gate.clear()
    asked.wait = False
    lost = await stub.Compile(asked, timeout=60)
    assert (lost.cached, lost.job.job_id) == (False, first.job.job_id)
    assert lost.job.phase in (pb.JOB_PHASE_QUEUED, pb.JOB_PHASE_COMPILING)
    mill.pool.gate.set()
    await mill.phase(first.job.job_id, server.JobPhase.SUCCEEDED)
    again = await stub.Compile(asked, timeout=60)
    assert again.cached
    assert again.job.finished_at != first.job.finished_at
    await channel.close()
