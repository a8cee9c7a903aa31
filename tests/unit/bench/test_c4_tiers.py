"""C4 in its smallest form: shares from given runs, and real tiers before a real library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from torch import nn

import esper
from bench.c4_tiers import Origin, RecordedRun, Replay, hit_figures, known_share, origin_of
from esper.blueprints import default_registry
from esper.contracts.decision import AdaptationDecision
from esper.contracts.run import CacheTierStatus
from esper.execution.artifact import VerifiedKernel, verify
from esper.execution.keys import SigningKey
from esper.execution.tier_directory import DirectoryTier
from esper.execution.tier_urza import upload_kernel
from esper.mesh import MeshServer, open_channel
from esper.mesh.loop_thread import LoopThread
from esper.mesh.settings import MeshSettings
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.testing.urza_samples import kernel_bytes
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub
from tests.decisions import add_seed

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def decided(*tags: str) -> AdaptationDecision:
    """Give a decision of that moment for a blueprint with some tags."""
    blueprint = default_registry().create_blueprint("lora")
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)))
    decision = add_seed(model, "", "lora", created_at=MOMENT)
    return replace(decision, blueprint=replace(blueprint, metadata=replace(blueprint.metadata, tags=tags)))


def kernel_made(moment: datetime) -> VerifiedKernel:
    """Give a kernel that was made at a moment."""
    key = SigningKey.generate()
    kernel = verify(kernel_bytes(key), key.ring())
    return replace(kernel, manifest=replace(kernel.manifest, created_at=moment))


def run(requests: str, *, l1: int = 0, l2: int = 0, l3: int = 0, warmed: int = 0, origins: str = "") -> RecordedRun:
    counts = {"l1": l1, "l2": l2, "l3": l3}
    return RecordedRun(
        requests=tuple(requests),
        origins=tuple({"t": Origin.THERE, "d": Origin.DESIGNED, "l": Origin.LISTED}[one] for one in origins),
        tiers=tuple(
            CacheTierStatus(tier=tier, hits=hits, warmed=warmed if tier == "l3" else 0) for tier, hits in counts.items()
        ),
    )


def test_shares_are_of_requests_and_only_later_runs_are_held_against_the_goal() -> None:
    figures = {
        figure.name: figure for figure in hit_figures([run("abcd", l3=4), run("abce", l2=2, l1=1, l3=1, warmed=7)])
    }
    assert figures["requests of 2 runs"].value == 8
    assert figures["answered by L3, library"].value == 5 / 8
    later = figures["from the second run on, answered by L1 or L2"]
    assert (later.value, later.holds) == (0.75, False)
    assert figures["brought into L1 before anybody asked"].value == 7


def test_one_run_alone_claims_nothing_about_later_ones() -> None:
    figures = {figure.name: figure for figure in hit_figures([run("ab", l3=2, origins="dl")])}
    later = figures["from the second run on, answered by L1 or L2"]
    assert (later.value, later.holds) == (None, None)
    assert figures["of these, a design of Karn's, made for the decision"].value == 0


def test_misses_are_told_apart_by_what_the_kernel_was_when_its_decision_came() -> None:
    later = run("abcdef", l1=1, l2=1, l3=4, origins="tttdld")
    figures = {figure.name: figure.value for figure in hit_figures([run("x", l3=1, origins="d"), later])}
    assert figures["from the second run on, answered by neither"] == 4
    assert figures["of these, a design of Karn's, made for the decision"] == 2
    assert figures["of these, a blueprint of the library's, made for the decision"] == 1
    assert figures["of these, there already"] == 1


def test_a_kernel_is_there_if_it_was_made_before_its_decision() -> None:
    before, after = MOMENT - timedelta(seconds=1), MOMENT + timedelta(seconds=1)
    assert origin_of(decided(), kernel_made(before)) is Origin.THERE
    assert origin_of(decided(), kernel_made(after)) is Origin.LISTED
    assert origin_of(decided("karn", "generated"), kernel_made(after)) is Origin.DESIGNED
    assert origin_of(decided("karn"), None) is Origin.DESIGNED


def test_known_is_what_any_earlier_run_asked_for() -> None:
    assert known_share(["ab", "bc", "ac"]) == 3 / 4
    assert known_share(["ab", "cd"]) == 0
    assert known_share(["ab", ""]) is None


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[tuple[MeshSettings, tuple[str, ...]]]:
    """A library with four kernels, of which the directory has two."""
    key = SigningKey.generate()
    home = LoopThread("test-library")
    service = UrzaService(
        UrzaConfig(database_url=f"sqlite:///{tmp_path}/u.db", seed_templates=False), key_ring=key.ring()
    )
    payloads = [kernel_bytes(key, number) for number in range(4)]
    directory = DirectoryTier(tmp_path / "kernels")

    async def start() -> tuple[MeshServer, tuple[str, ...]]:
        await service.start()
        server = MeshServer()
        service.add_to(server)
        await server.start()
        async with open_channel(server.address) as channel:
            stub = UrzaServiceStub(channel)
            ids = [(await upload_kernel(stub, payload))[0] for payload in payloads]
        for artifact_id, payload in list(zip(ids, payloads, strict=True))[:2]:
            await directory.write(artifact_id, payload)
        return server, tuple(ids)

    async def stop() -> None:
        await server.drain()
        await service.close()

    server, ids = home.run(start(), 60.0)
    settings = MeshSettings(state_dir=tmp_path, urza_address=server.address)
    settings.trusted_dir.mkdir(parents=True, exist_ok=True)
    key.write_public(settings.trusted_dir)
    yield settings, ids
    home.run(stop(), 60.0)
    home.close()


def test_a_run_asked_for_again_finds_what_the_directory_has(
    settings: tuple[MeshSettings, tuple[str, ...]], tmp_path: Path
) -> None:
    where, ids = settings
    with Replay(where, tmp_path, ids) as replay:
        known, again = replay.again_figures([ids[:2], ids[2:]])
        assert known.value == 0
        assert (again.value, again.holds) == (0.5, False)
        assert replay.again_figures([ids])[-1].value == 1


def test_every_tier_is_timed_and_every_kernel_comes_without_the_second(
    settings: tuple[MeshSettings, tuple[str, ...]], tmp_path: Path
) -> None:
    where, ids = settings
    with Replay(where, tmp_path, ids) as replay:
        replay.again_figures([ids])
        latencies = replay.latency_figures(0.0)
        away = {figure.name: figure for figure in replay.away_figures(0.0)}
    assert [figure.name for figure in latencies[::2]] == [f"fetch from L{tier}" for tier in (1, 2, 3)]
    assert all(figure.value is not None and figure.value > 0 for figure in latencies)
    assert {name.partition(", ")[2] for name in away} >= {"answered", "over no L2", "breaker open after 4 kernels"}
    for way in ("Redis refuses", "directory is gone"):
        assert away[f"L2 away ({way}), answered"].value == 1
        assert away[f"L2 away ({way}), calls that failed or were held off"].value == 8
        assert away[f"L2 away ({way}), breaker open after 4 kernels"].value == 1
