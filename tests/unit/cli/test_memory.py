"""``esper memory``: from one policy to another over sockets, by way of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from esper.cli.memory_file import decode_memory, encode_memory
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.lesson import Lesson, Memory
from esper.contracts.run import AdaptationOutcome, Contribution, FieldReport
from esper.mesh import MeshServer, ServerConfig
from esper.mesh.loop_thread import LoopThread
from esper.services.tamiyo.calibration import CALIBRATION_VERSION
from esper.services.tamiyo.posterior import MODEL_VERSION
from esper.services.tamiyo.server import TamiyoNode

Esper = Callable[..., tuple[int, str, str]]

REPORT = FieldReport(
    report_id="r1",
    adaptation_id="a1",
    run_id="run-1",
    layer="head",
    seed_index=0,
    site=Site(kind=SiteKind.LINEAR, input_shape=(8,), output_shape=(4,)),
    blueprint_id="b" * 64,
    outcome=AdaptationOutcome.KEPT,
    contribution=Contribution(estimate=0.1, low=0.05, high=0.15, num_examples=9),
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)
OTHER = replace(REPORT, report_id="r2", run_id="run-2")


class Served:
    """A policy behind a socket, on a loop of its own."""

    def __init__(self) -> None:
        self.loop = LoopThread("test-tamiyo")
        self.node, self.server = self.loop.run(self._open(), 30.0)

    async def _open(self) -> tuple[TamiyoNode, MeshServer]:
        node = await TamiyoNode.open(bus=None)
        server = MeshServer(ServerConfig(drain_deadline_s=1.0))
        node.add_to(server)
        await server.start()
        return node, server

    def learn(self, *reports: FieldReport) -> None:
        for report in reports:
            assert self.loop.run(self.node.tamiyo.learn(report), 30.0)

    def arms(self) -> object:
        return self.node.tamiyo.posterior(None)

    async def _close(self) -> None:
        await self.server.drain()
        await self.node.close()

    def close(self) -> None:
        self.loop.run(self._close(), 30.0)
        self.loop.close()


@pytest.fixture
def meshes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Served]]:
    """Start a policy, and have commands talk to the one started last."""
    served: list[Served] = []

    def start() -> Served:
        served.append(Served())
        monkeypatch.setenv("ESPER_TAMIYO_ADDRESS", served[-1].server.address)
        return served[-1]

    yield start
    for one in served:
        one.close()


def test_a_memory_goes_from_one_mesh_to_another(esper: Esper, meshes: Callable[[], Served], tmp_path: Path) -> None:
    file = tmp_path / "tamiyo.memory"
    first = meshes()
    first.learn(REPORT, OTHER)
    code, out, err = esper("memory", "export", str(file))
    assert (code, out, err) == (0, f"{file}  2 lessons, {file.stat().st_size} bytes\n", "")
    second = meshes()
    assert esper("memory", "import", str(file)) == (0, "2 lessons learned, 0 were known\n", "")
    assert second.arms() == first.arms()
    figures = {"lessons": 2, "model_version": MODEL_VERSION, "calibration_version": CALIBRATION_VERSION}
    found = json.loads(esper("memory", "import", str(file), "--json")[1])
    assert found == {"file": str(file), **figures, "learned": 0, "known": 2, "differing": 0}


def test_the_memory_of_one_run_is_exported(esper: Esper, meshes: Callable[[], Served], tmp_path: Path) -> None:
    meshes().learn(REPORT, OTHER)
    file = tmp_path / "one"
    code, out, _ = esper("memory", "export", str(file), "--run", "run-2", "--json")
    assert code == 0
    assert json.loads(out) == {
        "file": str(file),
        "bytes": file.stat().st_size,
        "lessons": 1,
        "model_version": MODEL_VERSION,
        "calibration_version": CALIBRATION_VERSION,
        "unreadable": 0,
    }
    with file.open("rb") as opened:
        assert [lesson.report for lesson in decode_memory(opened).lessons] == [OTHER]


def test_a_file_that_is_there_stays_unless_it_may_go(
    esper: Esper, meshes: Callable[[], Served], tmp_path: Path
) -> None:
    meshes()
    file = tmp_path / "mine"
    file.write_text("of value")
    code, _, err = esper("memory", "export", str(file))
    assert (code, err) == (1, f"esper: ALREADY_EXISTS: file must not be there yet (or take --force), got {file}\n")
    assert file.read_text() == "of value"
    assert esper("memory", "export", str(file), "--force")[0] == 0
    assert file.read_bytes().startswith(b'{"format": "esper-memory"')
    missing = tmp_path / "no" / "where"
    code, _, err = esper("memory", "export", str(missing))
    assert code == 1
    assert err.startswith(f"esper: UNAVAILABLE: file must be writable, got {missing}: ")


def test_a_known_report_with_another_content_is_said(
    esper: Esper, meshes: Callable[[], Served], tmp_path: Path
) -> None:
    meshes().learn(REPORT)
    file = tmp_path / "memory"
    lessons = (Lesson(report=replace(REPORT, layer="body")), Lesson(report=OTHER))
    file.write_bytes(encode_memory(Memory(lessons=lessons, model_version=1, calibration_version=1)))
    code, out, _ = esper("memory", "import", str(file))
    said = "1 lessons learned, 0 were known\n1 left out: their reports are known with another content\n"
    assert (code, out) == (0, said)


def test_a_damaged_file_teaches_nothing(esper: Esper, meshes: Callable[[], Served], tmp_path: Path) -> None:
    served = meshes()
    file = tmp_path / "memory"
    data = encode_memory(Memory(lessons=(Lesson(report=REPORT),), model_version=2, calibration_version=2))
    file.write_bytes(data[:-1] + b"?")
    code, out, err = esper("memory", "import", str(file))
    assert (code, out) == (1, "")
    assert err.startswith("esper: CORRUPT_DATA: memory file must have the SHA-256 it names")
    file.write_bytes(data.replace(b'"version": 1', b'"version": 2', 1))
    code, _, err = esper("memory", "import", str(file))
    assert (code, err) == (2, "esper: INVALID_INPUT: version of the memory file must be 1, got 2\n")
    code, _, err = esper("memory", "import", str(tmp_path / "nothing"))
    assert code == 2
    assert err.startswith("esper: INVALID_INPUT: file must be one that can be read, got ")
    assert served.arms() == []
