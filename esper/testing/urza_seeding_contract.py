# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What a library does with the templates of one release after another, as a test suite over any database.

The fixture ``database`` is that of `esper.testing.urza_contract`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from esper import __version__
from esper.blueprints.ir import content_id
from esper.blueprints.registry import BlueprintRegistry
from esper.contracts.blueprint import Blueprint, BlueprintState, Lineage
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza.blueprint_records import BlueprintRecord
from esper.services.urza.blueprint_store import BlueprintStore
from esper.services.urza.genealogy import LineageDirection
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.seeding import seed_library
from esper.services.urza.store import UrzaStore
from esper.services.urza.template_releases import TemplateReleases
from esper.testing.urza_samples import field_report, graph, kernel_bytes

ACTIVE, DEPRECATED, RETIRED = BlueprintState.ACTIVE, BlueprintState.DEPRECATED, BlueprintState.RETIRED


def release(number: int) -> BlueprintRegistry:
    """Give the templates of a release: one whose graph is another in every release, and one that stays."""
    registry = BlueprintRegistry()
    registry.register_template("moving", lambda: graph(number))
    registry.register_template("resting", lambda: graph(1000))
    return registry


def shipping(**numbers: int) -> BlueprintRegistry:
    """Give the templates of a release by their names and the numbers of their graphs."""
    registry = BlueprintRegistry()
    for name, number in numbers.items():
        registry.register_template(name, lambda number=number: graph(number))  # type: ignore[misc]
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
        assert [(one.blueprint.version, one.depth) for one in found.items] == [(2, 1), (3, 2)]
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

    async def test_what_was_offered_again_by_hand_stays_so(self, store: UrzaStore) -> None:
        first = shipping(moving=1, gone=5)
        for registry in (first, shipping(moving=2), first):
            await seed_library(store.blueprints, registry)
        assert await offered(store) == [("moving", 2)]
        for number in (1, 5):
            await store.blueprints.set_state(content_id(graph(number)), ACTIVE, actor="ann", reason="better here")
        for number in (2, 3, 3):
            await seed_library(store.blueprints, shipping(moving=number))
        assert await offered(store) == [("gone", 1), ("moving", 1), ("moving", 3)]

    async def test_an_older_replica_that_is_overtaken_does_not_offer_its_template_again(
        self, database: Database, store: UrzaStore
    ) -> None:
        class Overtaken(BlueprintStore):
            async def set_state(self, blueprint_id: str, state: BlueprintState, **said: Any) -> Blueprint:
                if state is ACTIVE:
                    for number in (1, 2):
                        await seed_library(store.blueprints, release(number))
                return await super().set_state(blueprint_id, state, **said)

        await seed_library(Overtaken(database, max_blueprints=100), release(1))
        assert await offered(store) == [("moving", 2), ("resting", 1)]


class UnshippedContract:
    """What a release no longer ships is no longer offered, whoever starts when."""

    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store."""
        return UrzaStore(database)

    async def test_a_template_that_is_no_longer_shipped_is_no_longer_offered(
        self, store: UrzaStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        await seed_library(store.blueprints, shipping(stays=1, goes=2))
        by_hand = (Lineage(operator="manual", author="registry"), Lineage(operator="template", author="ann"))
        for number, lineage in enumerate(by_hand, 50):
            draft = BlueprintDraft(name=f"mine-{number}", ir=graph(number), lineage=lineage, state=ACTIVE)
            await store.blueprints.create(draft)
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                await seed_library(store.blueprints, shipping(stays=1))
        assert await offered(store) == [("mine-50", 1), ("mine-51", 1), ("stays", 1)]
        history = await store.blueprints.history(content_id(graph(2)))
        assert [step.to_state.name for step in history] == ["DRAFT", "VALIDATED", "ACTIVE", "DEPRECATED"]
        assert (history[-1].actor, history[-1].reason) == ("registry", f"no longer shipped with Esper {__version__}")
        assert caplog.messages.count("template_no_longer_shipped") == 1

    async def test_releases_that_start_in_turns_take_nothing_back(self, store: UrzaStore) -> None:
        older, newer = shipping(stays=1, goes=2), shipping(stays=1, comes=3)
        for registry in (older, newer):
            await seed_library(store.blueprints, registry)
        taken = [await store.blueprints.history(content_id(graph(number))) for number in (1, 2, 3)]
        for registry in (older, newer, older, older, newer):
            await seed_library(store.blueprints, registry)
            assert await offered(store) == [("comes", 1), ("stays", 1)]
        assert taken == [await store.blueprints.history(content_id(graph(number))) for number in (1, 2, 3)]
        assert [len(steps) for steps in taken] == [3, 4, 3]

    async def test_a_newer_release_that_starts_meanwhile_keeps_its_templates(
        self, database: Database, store: UrzaStore
    ) -> None:
        class Overtaken(TemplateReleases):
            async def offered(self) -> tuple[BlueprintRecord, ...]:
                await seed_library(store.blueprints, shipping(stays=1, comes=3))
                return await super().offered()

        slow = BlueprintStore(database, max_blueprints=100)
        slow.templates = Overtaken(database)
        await seed_library(slow, shipping(stays=1))
        assert await offered(store) == [("comes", 1), ("stays", 1)]

    async def test_a_template_that_was_renamed_stays_offered(self, store: UrzaStore) -> None:
        await seed_library(store.blueprints, shipping(old=1))
        await seed_library(store.blueprints, shipping(new=1))
        assert await offered(store) == [("old", 1)]

    async def test_a_library_of_a_release_that_kept_no_order_is_put_right(self, store: UrzaStore) -> None:
        made = Lineage(operator="template", author="registry")
        for number, name in enumerate(("goes", "stays"), 1):
            await store.blueprints.create(BlueprintDraft(name=name, ir=graph(number), lineage=made, state=ACTIVE))
        await seed_library(store.blueprints, shipping(stays=2))
        assert await offered(store) == [("stays", 1)]


class ShippedAgainContract:
    """What the registry took out of the offer comes back when a later release ships it again, and nothing else does."""

    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store."""
        return UrzaStore(database)

    async def test_a_template_that_is_shipped_again_is_offered_again_until_it_goes_again(
        self, store: UrzaStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            for with_it, without in ((10, 11), (12, 13)):
                await seed_library(store.blueprints, shipping(comes=2, other=with_it))
                assert ("comes", 1) in await offered(store)
                await seed_library(store.blueprints, shipping(other=without))
                assert ("comes", 1) not in await offered(store)
            for _ in range(2):
                seeded = await seed_library(store.blueprints, shipping(comes=2, other=14))
                assert [(one.name, one.version, one.state) for one in seeded] == [
                    ("comes", 1, ACTIVE),
                    ("other", 5, ACTIVE),
                ]
        history = await store.blueprints.history(content_id(graph(2)))
        assert [step.to_state for step in history[2:]] == [ACTIVE, DEPRECATED, ACTIVE, DEPRECATED, ACTIVE]
        assert (history[-1].actor, history[-1].reason) == ("registry", f"shipped again with Esper {__version__}")
        assert caplog.messages.count("template_shipped_again") == 2

    async def test_a_graph_that_is_shipped_again_supersedes_the_one_that_superseded_it(self, store: UrzaStore) -> None:
        first, second, third = shipping(moving=1), shipping(moving=2), shipping(moving=1, other=9)
        for registry in (first, second):
            await seed_library(store.blueprints, registry)
        for registry in (third, second, first, third):
            await seed_library(store.blueprints, registry)
            assert await offered(store) == [("moving", 1), ("other", 1)]
        last = (await store.blueprints.history(content_id(graph(2))))[-1]
        assert (last.to_state, last.actor, last.reason) == (DEPRECATED, "registry", "superseded by moving@1")

    @pytest.mark.parametrize("steps", [(DEPRECATED,), (DEPRECATED, RETIRED), (DEPRECATED, ACTIVE, DEPRECATED)])
    async def test_what_was_withdrawn_by_hand_stays_so(
        self, store: UrzaStore, steps: tuple[BlueprintState, ...]
    ) -> None:
        await seed_library(store.blueprints, shipping(comes=2, other=10))
        for state in steps:
            await store.blueprints.set_state(content_id(graph(2)), state, actor="ann", reason="worse here")
        for registry in (shipping(other=11), shipping(comes=2, other=12)):
            await seed_library(store.blueprints, registry)
        assert (await store.blueprints.get("comes")).state is steps[-1]
        assert (await store.blueprints.history(content_id(graph(2))))[-1].actor == "ann"

    async def test_what_was_put_back_and_withdrawn_by_hand_stays_so(self, store: UrzaStore) -> None:
        for registry in (shipping(comes=2, other=10), shipping(other=11)):
            await seed_library(store.blueprints, registry)
        for state in (ACTIVE, DEPRECATED):
            await store.blueprints.set_state(content_id(graph(2)), state, actor="ann", reason="on second thoughts")
        await seed_library(store.blueprints, shipping(comes=2, other=12))
        assert await offered(store) == [("other", 3)]

    async def test_a_release_that_is_overtaken_neither_offers_nor_withdraws(
        self, database: Database, store: UrzaStore
    ) -> None:
        """A newer one starts just before each of the older one's steps."""

        class Overtaken(BlueprintStore):
            async def set_state(self, blueprint_id: str, state: BlueprintState, **said: Any) -> Blueprint:
                await seed_library(store.blueprints, shipping(other=10, stays=3))
                return await super().set_state(blueprint_id, state, **said)

        for registry in (shipping(comes=2, other=10, stays=3), shipping(other=10, stays=3, more=4)):
            await seed_library(store.blueprints, registry)
        slow = Overtaken(database, max_blueprints=100)
        await seed_library(slow, shipping(comes=2, other=11))
        assert await offered(store) == [("other", 1), ("stays", 1)]
