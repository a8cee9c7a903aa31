"""``esper audit verify`` against a Nissa on a socket, whose store somebody edits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import text

from esper.cli.main import main
from esper.contracts.wire import to_wire
from esper.mesh import MeshServer
from esper.services.nissa.server import NissaNode
from esper.telemetry import Kind, MemoryBroker, MemoryBus, build_subject
from esper.telemetry.bus import CONTENT_TYPE_HEADER
from esper.telemetry.consumer import content_type

NUM_EVENTS = 4
Command = Callable[..., Any]


@pytest.fixture
async def node(make: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NissaNode]:
    """Serve a Nissa that has taken a few events of a run."""
    bus, server = MemoryBus(MemoryBroker()), MeshServer()
    await bus.ensure_streams()
    async with await NissaNode.open(bus=bus) as opened:
        opened.add_to(server)
        await server.start()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.setenv("ESPER_NISSA_ADDRESS", server.address)
        for sequence in range(1, NUM_EVENTS + 1):
            message = to_wire(make.packet(sequence))
            headers = {CONTENT_TYPE_HEADER: content_type(type(message))}
            subject = build_subject("run-1", Kind.STATE)
            await bus.publish(subject, message.SerializeToString(), headers=headers, durable=True)
        async with asyncio.timeout(10):
            while len(await opened.nissa.store.events("run-1")) < NUM_EVENTS:
                continue
        yield opened
        await server.drain()
    await bus.close()


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in a thread, as its own process would; gives exit code, output and errors."""

    def run(words: tuple[str, ...]) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["esper", "audit", "verify", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return lambda *words: asyncio.to_thread(run, words)


async def edit(node: NissaNode, statement: str) -> None:
    async with node.nissa.store.database.session() as session:
        await session.execute(text(statement))


async def test_an_untouched_log_is_intact_and_ends_with_its_head(node: NissaNode, verify: Command) -> None:
    head = (await node.nissa.store.events("run-1"))[-1].digest.hex()
    code, out, err = await verify("run-1", "--head", head)
    assert (code, err) == (0, "")
    assert out == f"run run-1: intact, 4 of 4 events verified\nhead {head}\n"
    code, out, _ = await verify("run-1", "--json")
    found = json.loads(out)
    assert (code, found["intact"], found["head"]) == (0, True, head)


@pytest.mark.parametrize(
    ("statement", "verified"),
    [
        ("UPDATE nissa_events SET recorded_us = 1 WHERE position = 3", "2 of 4 events verified"),
        ("DELETE FROM nissa_events WHERE position = 2", "1 of 3 events verified"),
    ],
)
async def test_an_edited_log_is_an_error(node: NissaNode, verify: Command, statement: str, verified: str) -> None:
    await edit(node, statement)
    code, out, err = await verify("run-1")
    assert (code, out) == (1, "")
    assert err.startswith("esper: CORRUPT_DATA: audit log of run run-1 must be intact, got ")
    assert err.endswith(f"; {verified}\n")
    code, out, _ = await verify("run-1", "--json")
    assert (code, json.loads(out)["intact"]) == (1, False)


async def test_a_log_cut_off_at_its_end_shows_by_its_head_alone(node: NissaNode, verify: Command) -> None:
    head = (await node.nissa.store.events("run-1"))[-1].digest.hex()
    await edit(node, f"DELETE FROM nissa_events WHERE position = {NUM_EVENTS}")
    assert (await verify("run-1"))[0] == 0
    code, _, err = await verify("run-1", "--head", head)
    assert (code, f"must end with {head}, got " in err) == (1, True)


async def test_bad_use_and_an_unknown_run_are_told_apart(node: NissaNode, verify: Command) -> None:
    code, _, err = await verify("run-1", "--head", "beef")
    assert (code, err) == (2, "esper: INVALID_INPUT: --head must be 64 lower-case hex digits, got 'beef'\n")
    code, _, err = await verify("run-9")
    assert code == 1
    assert err.startswith("esper: NOT_FOUND: ")
