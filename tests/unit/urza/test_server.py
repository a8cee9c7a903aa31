"""The service as a whole: configuration, start, seeds, field reports off the bus, both faces, and its end."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from esper.blueprints.registry import BlueprintRegistry, default_registry
from esper.contracts import wire
from esper.contracts.blueprint import Blueprint, BlueprintMetadata, BlueprintState, SiteKind
from esper.contracts.errors import ConfigError, InvalidStateError, PortInUseError, UnavailableError
from esper.contracts.run import FieldReport
from esper.contracts.wire import from_wire
from esper.execution.keys import SigningKey
from esper.mesh import LOOPBACK, MeshServer, ServerConfig, open_channel
from esper.services.urza import report_consumer
from esper.services.urza.report_store import Recorded, ReportStore
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.seeding import seed_library
from esper.services.urza.server import UrzaConfig, UrzaService, register
from esper.services.urza.store import StoreLimits
from esper.telemetry.bus import Bus
from esper.telemetry.memory_bus import MemoryBroker, MemoryBus
from esper.telemetry.streams import EVENTS
from esper.telemetry.subjects import Kind, build_subject, dead_subject
from esper.testing.urza_samples import field_report, graph
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

RING = SigningKey.generate().ring()


def config(**changes: Any) -> UrzaConfig:
    settings: dict[str, Any] = {"database_url": "sqlite://", "seed_templates": False}
    return UrzaConfig(**(settings | changes))


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with MemoryBus(MemoryBroker()) as bus:
        await bus.ensure_streams()
        yield bus


async def everything(service: UrzaService) -> list[Blueprint]:
    return list((await service.store.blueprints.search(BlueprintQuery(), PageRequest(size=500))).items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rest_port": 70_000}, r"rest_port must be within \[0, 65535\], got 70000"),
        ({"rest_write_token": "short"}, "rest_write_token must have at least 16 characters, got 5"),
        ({"rest": True, "rest_host": "0.0.0.0"}, "rest_write_token must be set to serve REST beyond loopback"),
        ({"page_token_key": b"x" * 65}, "page_token_key must be at most 64 bytes, got 65"),
        ({"upload_budget_bytes": 5}, "upload_budget_bytes must be at least max_kernel_bytes"),
        ({"database_url": "mysql://x"}, "database url must be sqlite:///path"),
    ],
)
def test_settings_that_break_a_rule_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UrzaService(config(**changes), key_ring=RING)


def test_limits_that_break_a_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_blueprints must be >= 1, got 0"):
        StoreLimits(max_blueprints=0)


def test_secrets_stay_out_of_the_settings_text() -> None:
    shown = repr(config(rest_write_token="a-token-of-some-length", page_token_key=b"key-of-pages"))
    assert "a-token" not in shown
    assert "key-of-pages" not in shown


async def test_the_library_starts_with_every_template_active() -> None:
    async with UrzaService(config(seed_templates=True), key_ring=RING) as service:
        found = await everything(service)
        assert {blueprint.name for blueprint in found} == set(default_registry().names())
        assert {(blueprint.version, blueprint.state) for blueprint in found} == {(1, BlueprintState.ACTIVE)}
        for blueprint in found:
            template = default_registry().create_blueprint(blueprint.name)
            assert blueprint.metadata.tags == [*template.metadata.tags, "validated"]
            assert (blueprint.id, blueprint.ir, blueprint.lineage) == (template.id, template.ir, template.lineage)
        history = await service.store.blueprints.history(found[0].id)
        assert [(step.to_state.name, step.actor) for step in history] == [
            ("DRAFT", "registry"),
            ("VALIDATED", "registry"),
            ("ACTIVE", "registry"),
        ]


async def test_seeding_again_changes_nothing_and_respects_the_operator(tmp_path: Path) -> None:
    settings = config(database_url=f"sqlite:///{tmp_path}/urza.db", seed_templates=True)
    async with UrzaService(settings, key_ring=RING) as service:
        before = await everything(service)
        withdrawn = await service.store.blueprints.set_state(
            before[0].id, BlueprintState.DEPRECATED, actor="ann", reason="too slow here"
        )
    async with UrzaService(settings, key_ring=RING) as service:
        assert await everything(service) == [withdrawn, *before[1:]]


async def test_a_library_with_a_rotten_template_starts_and_serves_it_from_the_package(tmp_path: Path) -> None:
    settings = config(database_url=f"sqlite:///{tmp_path}/urza.db", seed_templates=True)
    async with UrzaService(settings, key_ring=RING) as service:
        before = await everything(service)
    connection = sqlite3.connect(tmp_path / "urza.db")
    with connection:
        connection.execute("UPDATE urza_blueprints SET ir = x'ff' WHERE name = 'lora'")
        connection.execute("UPDATE urza_blueprints SET metadata = x'ff', lineage = x'ff' WHERE name = 'gated_mlp'")
    connection.close()
    async with UrzaService(settings, key_ring=RING) as service:
        await service.ready()
        assert await everything(service) == before


async def test_a_start_that_was_cut_short_is_finished_by_the_next() -> None:
    async with UrzaService(config(), key_ring=RING) as service:
        template = default_registry().create_blueprint("lora")
        half_way = BlueprintDraft(name="lora", ir=template.ir, metadata=template.metadata, lineage=template.lineage)
        await service.store.blueprints.create(half_way)
        seeded = await seed_library(service.store.blueprints, default_registry())
        assert {blueprint.state for blueprint in seeded} == {BlueprintState.ACTIVE}


async def test_a_template_stored_under_another_name_does_not_stop_the_start(caplog: pytest.LogCaptureFixture) -> None:
    registry = BlueprintRegistry()
    registry.register_template("first", lambda: graph(1))
    registry.register_template("second", lambda: graph(2), site_kinds=(SiteKind.LINEAR,))
    async with UrzaService(config(), key_ring=RING) as service:
        await service.store.blueprints.create(BlueprintDraft(name="mine", ir=graph(1)))
        seeded = await seed_library(service.store.blueprints, registry)
        assert [blueprint.name for blueprint in seeded] == ["second"]
    assert "template_stored_under_another_name" in caplog.messages


async def test_field_reports_come_off_the_bus(bus: Bus) -> None:
    async with UrzaService(config(), bus=bus, key_ring=RING) as service:
        blueprint, _ = await service.store.blueprints.create(BlueprintDraft(name="b", ir=graph(1)))
        for number, layer in enumerate((None, "block.0.fc", None)):
            report = field_report(f"r{min(number, 1)}", blueprint_id=blueprint.id, estimate=0.5)
            subject = build_subject("run-1", Kind.FIELD_REPORT, layer)
            await bus.publish(subject, wire.serialize(report), msg_id=f"m{number}", durable=True)
        async with asyncio.timeout(10):
            while True:
                statistics = await service.store.reports.statistics(blueprint.id)
                if statistics is not None and statistics.trials == 2:
                    break
                await asyncio.sleep(0)
        await service.ready()


async def test_a_report_waits_for_a_store_that_is_away_longer_than_deliveries_last(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0
    record = ReportStore.record

    async def away_for_long(self: ReportStore, report: FieldReport) -> Recorded:
        nonlocal attempts
        attempts += 1
        if attempts <= 2 * report_consumer._MAX_DELIVER:
            raise UnavailableError("the store is away")
        return await record(self, report)

    monkeypatch.setattr(ReportStore, "record", away_for_long)
    monkeypatch.setattr(report_consumer, "_RETRY_DELAY_S", 0.001)
    async with UrzaService(config(), bus=bus, key_ring=RING) as service:
        said = field_report("r1", blueprint_id="ab" * 32, estimate=0.5)
        await bus.publish(build_subject("run-1", Kind.FIELD_REPORT), wire.serialize(said), durable=True)
        async with asyncio.timeout(10):
            while True:
                statistics = await service.store.reports.statistics("ab" * 32)
                if statistics is not None:
                    break
                await asyncio.sleep(0)
        assert statistics.trials == 1


async def test_a_report_that_makes_no_sense_goes_to_the_dead_letters(bus: Bus) -> None:
    async with UrzaService(config(), bus=bus, key_ring=RING) as service:
        dead = await bus.subscribe(dead_subject(EVENTS.name))
        subject = build_subject("run-1", Kind.FIELD_REPORT)
        await bus.publish(subject, b"\xff\xff", durable=True)
        async with asyncio.timeout(10):
            letter = await anext(dead)
        assert letter.headers["Esper-Dead-Reason"].startswith("CORRUPT_DATA: esper.v1.FieldReport does not parse")
        await bus.publish(subject, wire.serialize(field_report("not an id")), durable=True)
        async with asyncio.timeout(10):
            letter = await anext(dead)
        assert letter.headers["Esper-Dead-Reason"].startswith("INVALID_INPUT: report.report_id must match")
        await service.ready()


async def test_a_consumption_that_ended_is_not_ready(bus: Bus) -> None:
    async with UrzaService(config(), bus=bus, key_ring=RING) as service:
        await service.ready()
        await bus.close()

        async def ready_until_refused() -> None:
            async with asyncio.timeout(10):
                while True:
                    await service.ready()

        with pytest.raises(UnavailableError, match="no longer taken off the bus by urza-field-reports"):
            await ready_until_refused()


async def test_a_bus_without_streams_is_an_error_at_start() -> None:
    async with MemoryBus(MemoryBroker()) as bus:
        with pytest.raises(LookupError, match="EVENTS"):
            await UrzaService(config(), bus=bus, key_ring=RING).start()


async def test_an_unreachable_database_is_an_error_at_start() -> None:
    service = UrzaService(config(database_url="postgresql://ann:secret@127.0.0.1:1/x"), key_ring=RING)
    with pytest.raises(UnavailableError, match=r"postgresql://ann:\*\*\*@127.0.0.1:1/x cannot be reached"):
        await service.start()


async def test_a_second_start_is_refused() -> None:
    async with UrzaService(config(), key_ring=RING) as service:
        with pytest.raises(InvalidStateError, match="start must be called once"):
            await service.start()


async def test_missing_keys_are_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    await UrzaService(config()).close()
    assert "kernel_signatures_unchecked" in caplog.messages


async def test_both_faces_answer_over_real_sockets_from_one_store() -> None:
    settings = config(rest=True, rest_port=0, seed_templates=True)
    async with UrzaService(settings, key_ring=RING) as service:
        server = MeshServer(ServerConfig())
        register(server, service.servicer, ready=[service.ready])
        async with server:
            channel = open_channel(server.address)
            metadata = BlueprintMetadata(tags=["validated", "conv2d"])
            await service.store.blueprints.create(BlueprintDraft(name="mine", ir=graph(1), metadata=metadata))
            request = pb.SearchBlueprintsRequest(all_tags=["validated", "conv2d"])
            over_grpc = await cast("Any", UrzaServiceStub(channel)).SearchBlueprints(request)
            await channel.close()
        assert service.rest_url is not None
        async with httpx.AsyncClient(base_url=service.rest_url) as client:
            over_rest = await client.get("/v1/blueprints", params={"all_tags": ["validated", "conv2d"]})
        assert [from_wire(item, Blueprint).name for item in over_grpc.blueprints] == ["mine"]
        assert [item["name"] for item in over_rest.json()["blueprints"]] == ["mine"]


async def test_the_rest_port_is_free_again_after_close() -> None:
    service = UrzaService(config(rest=True, rest_port=0), key_ring=RING)
    await service.start()
    assert service.rest_url is not None
    port = int(service.rest_url.rpartition(":")[2])
    await service.close()
    await service.close()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))


async def test_a_rest_port_in_use_is_an_error_at_start() -> None:
    with socket.socket() as holder:
        holder.bind((LOOPBACK, 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{port} is in use by another process"):
            await UrzaService(config(rest=True, rest_port=port), key_ring=RING).start()
