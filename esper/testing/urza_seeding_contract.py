# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What a library does with the templates of one release after another, as a test suite over any database.

The fixture ``database`` is that of `esper.testing.urza_contract`.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from esper.blueprints.ir import content_id
from esper.blueprints.registry import BlueprintRegistry
from esper.contracts.blueprint import Blueprint, BlueprintState, Lineage
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza.blueprint_store import BlueprintStore, LineageDirection
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.seeding import seed_library
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import field_report, graph, kernel_bytes

ACTIVE, DEPRECATED = BlueprintState.ACTIVE, BlueprintState.DEPRECATED


def release(number: int) -> BlueprintRegistry:
    """Give the templates of a release: one whose graph is another in every release, and one that stays."""
    registry = BlueprintRegistry()
    registry.register_template("moving", lambda: graph(number))
    registry.register_template("resting", lambda: graph(1000))
    return registry


async def offered(store: UrzaStore) -> list[tuple[str, int]]:
    """Give names and versions of what is offered to runs."""
    found = await store.blueprints.search(BlueprintQuery(states=(ACTIVE,)), PageRequest())
    return [(one.name, one.version) for one in found.items]


class SeedingContract:
    """A newer version of a template supersedes the older ones, and nothing is lost."""

    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store whose kernels need no signature."""
        return UrzaStore(database)

    async def test_the_newest_version_of_a_template_is_the_one_that_is_offered(self, store: UrzaStore) -> None:
        for number in (1, 2, 3):
            await seed_library(store.blueprints, release(number))
            assert await offered(store) == [("moving", number), ("resting", 1)]
        assert (await store.blueprints.get("moving")).version == 3
        for number in (1, 2):
            history = await store.blueprints.history(content_id(graph(number)))
            assert [step.to_state.name for step in history] == ["DRAFT", "VALIDATED", "ACTIVE", "DEPRECATED"]
            assert (history[-1].actor, history[-1].reason) == ("registry", f"superseded by moving@{number + 1}")

    async def test_a_version_descends_from_the_one_that_it_supersedes(self, store: UrzaStore) -> None:
        for number in (1, 2, 3):
            await seed_library(store.blueprints, release(number))
        found = await store.blueprints.lineage(content_id(graph(1)), LineageDirection.DESCENDANTS)
        assert [(one.blueprint.version, one.depth) for one in found] == [(2, 1), (3, 2)]
        lineage = (await store.blueprints.get("moving@1")).lineage
        assert lineage == Lineage(operator="template", author="registry")

    async def test_what_was_superseded_keeps_kernels_and_reports(self, store: UrzaStore) -> None:
        await seed_library(store.blueprints, release(0))
        before = await store.blueprints.get("moving")
        kernel, _ = await store.kernels.put(kernel_bytes(SigningKey.generate()))
        assert kernel.blueprint_id == before.id
        await store.reports.record(field_report("r1", blueprint_id=before.id, estimate=0.5))
        await seed_library(store.blueprints, release(1))
        after = await store.blueprints.get("moving@1")
        assert (after.id, after.ir, after.state) == (before.id, before.ir, DEPRECATED)
        assert after.statistics is not None
        assert after.statistics.trials == 1
        assert (await store.kernels.get(artifact_id=kernel.artifact_id)).content_key == kernel.content_key

    async def test_a_library_in_which_both_were_offered_is_put_right(self, store: UrzaStore) -> None:
        """As earlier releases left it."""
        made = Lineage(operator="template", author="registry")
        for number in (1, 2):
            await store.blueprints.create(BlueprintDraft(name="moving", ir=graph(number), lineage=made, state=ACTIVE))
        await seed_library(store.blueprints, release(2))
        assert await offered(store) == [("moving", 2), ("resting", 1)]

    async def test_what_others_stored_under_the_name_stays_offered(self, store: UrzaStore) -> None:
        await seed_library(store.blueprints, release(1))
        for number, lineage in enumerate((Lineage(operator="manual", author="ann"), Lineage(author="registry")), 50):
            draft = BlueprintDraft(name="moving", ir=graph(number), lineage=lineage, state=ACTIVE)
            await store.blueprints.create(draft)
        await seed_library(store.blueprints, release(2))
        assert await offered(store) == [("moving", 2), ("moving", 3), ("moving", 4), ("resting", 1)]
        assert (await store.blueprints.get("moving")).lineage.parent_ids == (content_id(graph(1)),)

    async def test_an_older_release_beside_or_after_a_newer_one_changes_nothing(
        self, store: UrzaStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        await seed_library(store.blueprints, release(1))
        await seed_library(store.blueprints, release(2))
        with caplog.at_level(logging.WARNING):
            seeded = await seed_library(store.blueprints, release(1))
        assert [(one.name, one.version, one.state) for one in seeded] == [
            ("moving", 1, DEPRECATED),
            ("resting", 1, ACTIVE),
        ]
        assert await offered(store) == [("moving", 2), ("resting", 1)]
        assert caplog.messages.count("template_not_offered") == 1

    async def test_a_template_that_was_withdrawn_by_hand_supersedes_nothing(self, store: UrzaStore) -> None:
        made = Lineage(operator="template", author="registry")
        for number in (1, 2):
            await store.blueprints.create(BlueprintDraft(name="moving", ir=graph(number), lineage=made, state=ACTIVE))
        await store.blueprints.set_state(content_id(graph(2)), DEPRECATED, actor="ann", reason="worse here")
        await seed_library(store.blueprints, release(2))
        assert await offered(store) == [("moving", 1), ("resting", 1)]

    async def test_replicas_that_start_together_agree(self, database: Database, store: UrzaStore) -> None:
        """One of them is overtaken by the others between any two of its steps."""

        class Overtaken(BlueprintStore):
            async def create(self, draft: BlueprintDraft) -> tuple[Blueprint, bool]:
                found = await super().create(draft)
                await seed_library(store.blueprints, release(2))
                return found

        await seed_library(store.blueprints, release(1))
        slow = Overtaken(database, max_blueprints=100)
        await asyncio.gather(*(seed_library(one, release(2)) for one in (slow, store.blueprints, store.blueprints)))
        assert await offered(store) == [("moving", 2), ("resting", 1)]
        history = await store.blueprints.history(content_id(graph(2)))
        assert [step.to_state.name for step in history] == ["DRAFT", "VALIDATED", "ACTIVE"]
