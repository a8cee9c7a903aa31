"""Searches as a user types them: the command line as a process of its own, against the library on a real port."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from esper.contracts.blueprint import BlueprintMetadata, BlueprintState, SiteKind
from esper.execution.keys import SigningKey
from esper.mesh import MeshServer
from esper.services.urza.rules import BlueprintDraft
from esper.services.urza.server import UrzaConfig, UrzaService
from esper.testing.urza_samples import field_report, graph

Esper = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def esper(tmp_path: Path) -> AsyncIterator[Esper]:
    """Run a command line against a library of three blueprints; gives exit code, output and errors."""
    config = UrzaConfig(database_url=f"sqlite:///{tmp_path}/urza.db", seed_templates=False)
    async with UrzaService(config, key_ring=SigningKey.generate().ring()) as service:
        for number, (tags, kind, state) in enumerate(
            (
                (["validated", "conv2d"], SiteKind.CONV2D, BlueprintState.ACTIVE),
                (["validated", "conv2d", "deprecated"], SiteKind.CONV2D, BlueprintState.DRAFT),
                (["validated"], SiteKind.LINEAR, BlueprintState.ACTIVE),
            )
        ):
            metadata = BlueprintMetadata(tags=tags, site_kinds=(kind,))
            draft = BlueprintDraft(name=f"b{number}", ir=graph(number), metadata=metadata, state=state)
            blueprint, _ = await service.store.blueprints.create(draft)
            await service.store.reports.record(field_report(f"r{number}", blueprint_id=blueprint.id))
        server = MeshServer()
        service.add_to(server)
        async with server:
            kept = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
            environment = kept | {"ESPER_URZA_ADDRESS": server.address, "XDG_STATE_HOME": str(tmp_path)}

            async def run(*words: str) -> tuple[int, str, str]:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "esper.cli.main", *words),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    env=environment,
                )
                out, err = await asyncio.wait_for(process.communicate(), 60)
                return process.returncode or 0, out.decode(), err.decode()

            yield run


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--tags", "validated & conv2d & !deprecated"), ["b0@1"]),
        (("--tags", "deprecated | !conv2d"), ["b1@1", "b2@1"]),
        (("--state", "active", "--kind", "conv2d"), ["b0@1"]),
        (("--state", "draft", "--state", "retired"), ["b1@1"]),
        (("--where", "parameters<=16", "--where", "success_rate >= 0.5"), ["b0@1", "b1@1"]),
        (("--where", "parameters>=17", "--tags", "validated"), ["b2@1"]),
        (("--where", "latency_ms<=1e9"), []),
    ],
)
async def test_a_search_finds_what_was_asked_for(esper: Esper, words: tuple[str, ...], wanted: list[str]) -> None:
    code, out, err = await esper("blueprints", "search", "--json", *words)
    assert (code, err) == (0, "")
    assert [row["name"] for row in json.loads(out)] == wanted


async def test_a_mistake_in_an_expression_is_one_line_with_its_place(esper: Esper) -> None:
    code, out, err = await esper("blueprints", "search", "--tags", "validated & (conv2d")
    assert (code, out) == (2, "")
    assert err == "esper: INVALID_INPUT: tag_expression must have '&', '|' or ')' at character 20, got its end\n"
