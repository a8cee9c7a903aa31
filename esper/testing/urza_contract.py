# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What the library's store promises on every database, as tests: subclass and give what they stand on as fixtures.

``database`` gives an open `Database` with the newest tables and nothing in them, and closes it afterwards;
``empty_database``, which only the contracts of migrations ask for, one without tables.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from dataclasses import replace
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, update

from esper.contracts.blueprint import Blueprint, BlueprintMetadata, BlueprintState, Lineage, SiteKind
from esper.contracts.errors import (
    AlreadyExistsError,
    CapacityExceededError,
    CorruptDataError,
    InvalidInputError,
    InvalidStateError,
    InvalidTransitionError,
    NotFoundError,
    SignatureError,
)
from esper.contracts.run import AdaptationOutcome
from esper.execution.artifact import verify
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.services.urza import blueprint_store
from esper.services.urza.genealogy import LineageDirection, Relative
from esper.services.urza.migrate import VERSION_TABLE, current_revision, migrate, newest_revision
from esper.services.urza.models import Base, KernelChunkRow
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.store import StoreLimits, UrzaStore
from esper.testing.urza_samples import field_report, graph, kernel_bytes

KEY = SigningKey.generate()


async def put(
    store: UrzaStore, number: int, name: str = "", *, tags: tuple[str, ...] = (), parents: tuple[Blueprint, ...] = ()
) -> Blueprint:
    """Store one blueprint and give it."""
    draft = BlueprintDraft(
        name=name or f"blueprint-{number:03d}",
        ir=graph(number),
        metadata=BlueprintMetadata(tags=list(tags)),
        lineage=Lineage(parent_ids=tuple(parent.id for parent in parents), operator="mutation", author="karn"),
    )
    blueprint, created = await store.blueprints.create(draft)
    assert created
    return blueprint


async def names(store: UrzaStore, **conditions: object) -> list[str]:
    """Give the names of the blueprints that match, page by page, each page checked for its size."""
    query = BlueprintQuery(**conditions)  # type: ignore[arg-type]
    found: list[str] = []
    token = ""
    while True:
        page = await store.blueprints.search(query, PageRequest(size=2, token=token))
        assert len(page.items) == 2 or not page.next_token
        found.extend(blueprint.name for blueprint in page.items)
        token = page.next_token
        if not token:
            return found


async def content(store: UrzaStore, artifact_id: str, offset: int = 0) -> bytes:
    """Give the bytes of a stored kernel from an offset on."""
    _, chunks = await store.kernels.open(artifact_id, offset=offset)
    return b"".join([chunk.data async for chunk in chunks])


class _StoreSuite:
    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store that trusts one key."""
        return UrzaStore(database, key_ring=KEY.ring())


class BlueprintStoreContract(_StoreSuite):
    """Versions, tags, genealogy and life cycle."""

    async def test_a_blueprint_comes_back_as_it_was_stored(self, store: UrzaStore) -> None:
        metadata = BlueprintMetadata(
            tags=["optimized", "conv2d"], description="Ça va", citation="arXiv:1", site_kinds=(SiteKind.CONV2D,)
        )
        draft = BlueprintDraft(name="scale", ir=graph(1), metadata=metadata, lineage=Lineage(author="me"))
        stored, _ = await store.blueprints.create(draft)
        assert stored == await store.blueprints.get(stored.id)
        assert (stored.name, stored.version, stored.ir) == ("scale", 1, graph(1))
        assert (stored.metadata, stored.lineage, stored.state) == (metadata, draft.lineage, BlueprintState.DRAFT)
        assert stored.created_at is not None
        assert stored.statistics is None

    async def test_the_same_graph_again_is_the_same_version(self, store: UrzaStore) -> None:
        first = await put(store, 1, "scale")
        again, created = await store.blueprints.create(BlueprintDraft(name="scale", ir=graph(1)))
        assert (again, created) == (first, False)

    async def test_the_same_graph_under_another_name_is_refused(self, store: UrzaStore) -> None:
        await put(store, 1, "scale")
        with pytest.raises(AlreadyExistsError, match=r"got the one of scale@1 for 'other'"):
            await store.blueprints.create(BlueprintDraft(name="other", ir=graph(1)))
        assert await names(store) == ["scale"]

    async def test_twenty_parallel_creates_of_one_blueprint_make_one_version(self, store: UrzaStore) -> None:
        draft = BlueprintDraft(name="scale", ir=graph(1))
        results = await asyncio.gather(*(store.blueprints.create(draft) for _ in range(20)))
        assert sum(created for _, created in results) == 1
        assert {(blueprint.id, blueprint.version) for blueprint, _ in results} == {(results[0][0].id, 1)}

    async def test_twenty_parallel_versions_of_one_name_are_numbered_without_gaps(self, store: UrzaStore) -> None:
        drafts = [BlueprintDraft(name="scale", ir=graph(number)) for number in range(20)]
        results = await asyncio.gather(*(store.blueprints.create(draft) for draft in drafts))
        assert sorted(blueprint.version for blueprint, _ in results) == list(range(1, 21))

    async def test_one_graph_under_two_names_at_once_is_stored_once(self, store: UrzaStore) -> None:
        drafts = [BlueprintDraft(name=f"name-{number}", ir=graph(1)) for number in range(10)]
        results = await asyncio.gather(*(store.blueprints.create(draft) for draft in drafts), return_exceptions=True)
        assert sum(isinstance(result, AlreadyExistsError) for result in results) == 9
        assert len(await names(store)) == 1

    async def test_references_name_versions(self, store: UrzaStore) -> None:
        first, second = await put(store, 1, "scale"), await put(store, 2, "scale")
        assert await store.blueprints.get("scale") == second
        assert await store.blueprints.get("scale@1") == first
        assert await store.blueprints.get(second.id) == second

    @pytest.mark.parametrize("reference", ["scale", "scale@3", "0" * 64])
    async def test_an_unknown_reference_is_not_found(self, store: UrzaStore, reference: str) -> None:
        with pytest.raises(NotFoundError, match="reference must name a stored blueprint, got"):
            await store.blueprints.get(reference)

    @pytest.mark.parametrize("reference", ["scale@0", "scale@-1", "scale@x", "scale@99999999999", "scale@²"])
    async def test_a_malformed_version_is_refused(self, store: UrzaStore, reference: str) -> None:
        with pytest.raises(InvalidInputError, match="reference must be a content id, name or name@version"):
            await store.blueprints.get(reference)

    async def test_tags_find_those_and_only_those(self, store: UrzaStore) -> None:
        await put(store, 1, "both", tags=("validated", "conv2d"))
        await put(store, 2, "more", tags=("conv2d", "cheap", "validated"))
        await put(store, 3, "one", tags=("validated",))
        await put(store, 4, "other", tags=("conv2d",))
        await put(store, 5, "alike", tags=("conv2d-like", "validated"))
        await put(store, 6, "none")
        assert await names(store, all_tags=("validated", "conv2d")) == ["both", "more"]
        assert await names(store, any_tags=("conv2d", "cheap")) == ["both", "more", "other"]
        assert await names(store, all_tags=("validated",), no_tags=("conv2d", "cheap")) == ["alike", "one"]
        assert await names(store, all_tags=("unknown",)) == []

    async def test_states_text_and_kind_narrow_the_search(self, store: UrzaStore) -> None:
        kinds = BlueprintMetadata(description="Grün, 50% WIDER_ones", site_kinds=(SiteKind.CONV2D, SiteKind.LINEAR))
        drafted = BlueprintDraft(name="alpha", ir=graph(1), metadata=kinds, state=BlueprintState.ACTIVE)
        await store.blueprints.create(drafted)
        await put(store, 2, "beta")
        other = BlueprintMetadata(site_kinds=(SiteKind.ATTENTION,))
        await store.blueprints.create(BlueprintDraft(name="gamma", ir=graph(3), metadata=other))
        assert await names(store, states=(BlueprintState.ACTIVE, BlueprintState.RETIRED)) == ["alpha"]
        assert await names(store, text="GRÜN") == ["alpha"]
        assert await names(store, text="50% wider_") == ["alpha"]
        assert await names(store, text="50%_wider") == []
        assert await names(store, text="MM") == ["gamma"]
        assert await names(store, site_kind=SiteKind.CONV2D) == ["alpha", "beta"]
        assert await names(store, site_kind=SiteKind.ATTENTION) == ["beta", "gamma"]

    async def test_order_is_by_the_bytes_of_the_name_then_version(self, store: UrzaStore) -> None:
        wanted = ["a", "a-b", "a.b", "a1", "a_b", "ab", "b"]
        for number, name in enumerate(reversed(wanted)):
            await put(store, number, name)
        await put(store, 50, "a")
        assert await names(store) == ["a", *wanted]

    async def test_pages_stay_whole_while_blueprints_come_in(self, store: UrzaStore) -> None:
        for number in (1, 3, 5):
            await put(store, number)
        query = BlueprintQuery()
        first = await store.blueprints.search(query, PageRequest(size=2))
        await put(store, 0)
        await put(store, 4)
        rest = await store.blueprints.search(query, PageRequest(size=2, token=first.next_token))
        assert [item.name[-1] for item in first.items + rest.items] == ["1", "3", "4", "5"]

    async def test_a_token_of_another_query_is_refused(self, store: UrzaStore) -> None:
        for number in range(3):
            await put(store, number, tags=("cheap",))
        page = await store.blueprints.search(BlueprintQuery(), PageRequest(size=1))
        for token in (page.next_token, page.next_token[:-4] + "AAAA", "no token"):
            with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
                await store.blueprints.search(BlueprintQuery(all_tags=("cheap",)), PageRequest(token=token))

    async def test_the_genealogy_is_walked_both_ways(self, store: UrzaStore) -> None:
        root, other = await put(store, 1, "root"), await put(store, 2, "other")
        left = await put(store, 3, "left", parents=(root,))
        right = await put(store, 4, "right", parents=(root, other))
        leaf = await put(store, 5, "leaf", parents=(left, right, root))
        up = await store.blueprints.lineage(leaf.id, LineageDirection.ANCESTORS)
        assert [(item.blueprint.name, item.depth) for item in up.items] == [
            ("left", 1),
            ("right", 1),
            ("root", 1),
            ("other", 2),
        ]
        down = await store.blueprints.lineage(root.id, LineageDirection.DESCENDANTS)
        assert [(item.blueprint.name, item.depth) for item in down.items] == [("leaf", 1), ("left", 1), ("right", 1)]
        near = await store.blueprints.lineage(other.id, LineageDirection.DESCENDANTS, max_depth=1)
        assert [item.blueprint.name for item in near.items] == ["right"]

    async def test_a_genealogy_of_many_ways_is_walked_in_time(self, store: UrzaStore) -> None:
        pair = (await put(store, 0), await put(store, 1))
        for number in range(2, 42, 2):
            pair = (await put(store, number, parents=pair), await put(store, number + 1, parents=pair))
        async with asyncio.timeout(10):
            found = await store.blueprints.lineage(pair[0].id, LineageDirection.ANCESTORS)
        assert [item.depth for item in found.items] == [depth for depth in range(1, 21) for _ in range(2)]

    async def test_a_genealogy_of_any_size_is_given_page_by_page(
        self, store: UrzaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blueprint_store, "MAX_RELATIVES", 7)
        root = await put(store, 0, "root")
        children = [await put(store, number, "child", parents=(root,)) for number in range(1, 10)]
        for number in range(10, 15):
            await put(store, number, "aunt", parents=(children[number % 2],))
        wanted = [("child", version, 1) for version in range(1, 10)] + [("aunt", version, 2) for version in range(1, 6)]
        down = LineageDirection.DESCENDANTS
        with pytest.raises(CapacityExceededError, match=r"at most 7 relatives .* ask for it page by page"):
            await store.blueprints.lineage(root.id, down)
        given: list[Relative] = []
        token, pages = "", 0
        while pages == 0 or token:
            found = await store.blueprints.lineage(root.id, down, page=PageRequest(size=4, token=token))
            await put(store, 20 + pages, "late", parents=(root,))  # all behind the children: "l" is after "c"
            given += found.items
            token, pages = found.next_token, pages + 1
        shown = [(one.blueprint.name, one.blueprint.version, one.depth) for one in given]
        assert [one for one in shown if one[0] != "late"] == wanted
        assert len(set(shown)) == len(shown)
        first = await store.blueprints.lineage(root.id, down, page=PageRequest(size=4))
        for other in ({"max_depth": 1}, {"direction": LineageDirection.ANCESTORS}, {"blueprint_id": children[0].id}):
            asked: dict[str, Any] = {"blueprint_id": root.id, "direction": down} | other
            with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
                await store.blueprints.lineage(**asked, page=PageRequest(token=first.next_token))
        near = await store.blueprints.lineage(children[1].id, down, max_depth=1)
        assert (len(near.items), near.next_token) == (2, "")

    async def test_an_unknown_parent_is_refused_and_nothing_is_stored(self, store: UrzaStore) -> None:
        draft = BlueprintDraft(name="orphan", ir=graph(1), lineage=Lineage(parent_ids=("0" * 64,), operator="mutation"))
        with pytest.raises(NotFoundError, match=r"lineage\.parent_ids must name stored blueprints, got '0000"):
            await store.blueprints.create(draft)
        assert await names(store) == []
        assert (await put(store, 2, "orphan")).version == 1

    async def test_the_lineage_of_an_unknown_blueprint_is_not_found(self, store: UrzaStore) -> None:
        with pytest.raises(NotFoundError, match="blueprint_id must name a stored blueprint"):
            await store.blueprints.lineage("0" * 64, LineageDirection.ANCESTORS)
        with pytest.raises(InvalidInputError, match="max_depth must be 1 to 100 steps, or 0 for 100, got 101"):
            await store.blueprints.lineage("0" * 64, LineageDirection.ANCESTORS, max_depth=101)

    async def test_the_life_cycle_is_walked_and_written_down(self, store: UrzaStore) -> None:
        blueprint = await put(store, 1)
        for state in list(BlueprintState)[1:]:
            changed = await store.blueprints.set_state(blueprint.id, state, actor="ann", reason=f"to {state.name}")
            assert changed == replace(blueprint, state=state)
        steps = await store.blueprints.history(blueprint.id)
        assert [step.to_state for step in steps] == list(BlueprintState)
        assert [step.from_state for step in steps] == [None, *list(BlueprintState)[:-1]]
        assert [step.actor for step in steps] == ["karn", "ann", "ann", "ann", "ann"]
        assert steps[-1].reason == "to RETIRED"
        assert list(steps) == sorted(steps, key=lambda step: step.changed_at)

    async def test_every_other_step_of_the_life_cycle_is_refused(self, store: UrzaStore) -> None:
        blueprint = await put(store, 1)
        for place, state in enumerate(BlueprintState):
            if place:
                await store.blueprints.set_state(blueprint.id, state, actor="ann", reason="")
            back = {BlueprintState.ACTIVE} if state is BlueprintState.DEPRECATED else set()
            for wrong in set(BlueprintState) - set(list(BlueprintState)[place : place + 2]) - back:
                with pytest.raises(InvalidTransitionError, match=rf"{state.name} leads to .+\), got {wrong.name}"):
                    await store.blueprints.set_state(blueprint.id, wrong, actor="ann", reason="")
        assert len(await store.blueprints.history(blueprint.id)) == len(BlueprintState)

    async def test_what_is_deprecated_can_be_offered_again_but_not_what_is_retired(self, store: UrzaStore) -> None:
        draft = BlueprintDraft(name="b", ir=graph(1), state=BlueprintState.ACTIVE)
        blueprint, _ = await store.blueprints.create(draft)
        for state in (BlueprintState.DEPRECATED, BlueprintState.ACTIVE):
            await store.blueprints.set_state(blueprint.id, state, actor="ann", reason=f"to {state.name}")
        assert await names(store, states=(BlueprintState.ACTIVE,)) == ["b"]
        back = (await store.blueprints.history(blueprint.id))[-1]
        assert (back.from_state, back.to_state) == (BlueprintState.DEPRECATED, BlueprintState.ACTIVE)
        assert (back.actor, back.reason) == ("ann", "to ACTIVE")
        for state in (BlueprintState.DEPRECATED, BlueprintState.RETIRED):
            await store.blueprints.set_state(blueprint.id, state, actor="ann", reason="")
        with pytest.raises(InvalidTransitionError, match="RETIRED leads to nothing"):
            await store.blueprints.set_state(blueprint.id, BlueprintState.ACTIVE, actor="ann", reason="")

    async def test_a_step_that_is_meant_from_one_state_is_not_taken_from_another(self, store: UrzaStore) -> None:
        active, deprecated, validated = BlueprintState.ACTIVE, BlueprintState.DEPRECATED, BlueprintState.VALIDATED
        blueprint, _ = await store.blueprints.create(BlueprintDraft(name="b", ir=graph(1), state=active))
        await store.blueprints.set_state(blueprint.id, deprecated, actor="ann", reason="")
        with pytest.raises(InvalidTransitionError, match="state must be VALIDATED for this step to ACTIVE, got DEPREC"):
            await store.blueprints.set_state(blueprint.id, active, actor="ann", reason="", before=validated)
        assert (await store.blueprints.get("b")).state is deprecated

    async def test_a_repeated_step_changes_nothing(self, store: UrzaStore) -> None:
        blueprint = await put(store, 1)
        steps = (
            store.blueprints.set_state(blueprint.id, BlueprintState.VALIDATED, actor="ann", reason="") for _ in range(8)
        )
        assert {changed.state for changed in await asyncio.gather(*steps)} == {BlueprintState.VALIDATED}
        assert len(await store.blueprints.history(blueprint.id)) == 2

    async def test_the_state_of_an_unknown_blueprint_is_not_found(self, store: UrzaStore) -> None:
        with pytest.raises(NotFoundError, match="blueprint_id must name a stored blueprint"):
            await store.blueprints.set_state("0" * 64, BlueprintState.VALIDATED, actor="ann", reason="")

    async def test_a_full_library_takes_no_more(self, database: Database) -> None:
        store = UrzaStore(database, limits=StoreLimits(max_blueprints=2))
        await store.migrate()
        for number in range(2):
            await put(store, number)
        with pytest.raises(CapacityExceededError, match="must hold at most 2 blueprints"):
            await put(store, 3)


class KernelStoreContract(_StoreSuite):
    """Kernels, whole and proven or not at all."""

    async def test_a_kernel_comes_back_byte_for_byte(self, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY, weight_floats=200_000)
        record, created = await store.kernels.put(payload)
        assert created
        assert (record.size_bytes, record.sha256) == (len(payload), hashlib.sha256(payload).digest())
        assert await content(store, record.artifact_id) == payload
        assert verify(payload, KEY.ring()).manifest.artifact_id == record.artifact_id

    @pytest.mark.parametrize("offset", [1, 262_143, 262_144, 262_145, 800_000])
    async def test_a_download_goes_on_at_any_offset(self, store: UrzaStore, offset: int) -> None:
        payload = kernel_bytes(KEY, weight_floats=200_000)
        record, _ = await store.kernels.put(payload)
        assert await content(store, record.artifact_id, offset) == payload[offset:]

    async def test_at_the_end_there_is_one_empty_chunk(self, store: UrzaStore) -> None:
        record, _ = await store.kernels.put(kernel_bytes(KEY))
        _, chunks = await store.kernels.open(record.artifact_id, offset=record.size_bytes)
        assert [(chunk.offset, chunk.data) async for chunk in chunks] == [(record.size_bytes, b"")]
        with pytest.raises(InvalidInputError, match="offset must be within"):
            await store.kernels.open(record.artifact_id, offset=record.size_bytes + 1)

    async def test_the_same_request_is_stored_once(self, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY, weight_floats=200_000)
        results = await asyncio.gather(*(store.kernels.put(payload) for _ in range(8)))
        assert sum(created for _, created in results) == 1
        assert len({record.artifact_id for record, _ in results}) == 1
        assert await content(store, results[0][0].artifact_id) == payload

    async def test_the_first_kernel_of_a_content_key_stays(self, store: UrzaStore) -> None:
        first, _ = await store.kernels.put(kernel_bytes(KEY, weight_floats=8))
        second, created = await store.kernels.put(kernel_bytes(KEY, weight_floats=9))
        assert (second, created) == (first, False)

    async def test_a_kernel_of_a_key_no_longer_trusted_is_replaced(self, database: Database, store: UrzaStore) -> None:
        old, _ = await store.kernels.put(kernel_bytes(KEY))
        fresh_key = SigningKey.generate()
        rotated = UrzaStore(database, key_ring=fresh_key.ring())
        payload = kernel_bytes(fresh_key)
        new, created = await rotated.kernels.put(payload)
        assert created
        assert (new.content_key, new.key_id) == (old.content_key, fresh_key.key_id)
        assert await content(rotated, new.artifact_id) == payload

    async def test_a_kernel_is_found_by_id_and_by_content_key(self, store: UrzaStore) -> None:
        record, _ = await store.kernels.put(kernel_bytes(KEY))
        assert await store.kernels.get(artifact_id=record.artifact_id) == record
        assert await store.kernels.get(content_key=record.content_key) == record
        with pytest.raises(NotFoundError, match="content_key must name a stored kernel, got '0000"):
            await store.kernels.get(content_key="0" * 64)
        with pytest.raises(InvalidInputError, match="key must be exactly one of artifact_id and content_key"):
            await store.kernels.get()

    async def test_kernels_are_listed_newest_first(self, store: UrzaStore) -> None:
        stored = [(await store.kernels.put(kernel_bytes(KEY, n, blueprint=n % 2)))[0] for n in range(5)]
        listed: list[str] = []
        token = ""
        for _ in range(3):
            page = await store.kernels.list(PageRequest(size=2, token=token))
            listed.extend(record.artifact_id for record in page.items)
            token = page.next_token
        assert listed == [record.artifact_id for record in reversed(stored)]
        assert token == ""
        only = await store.kernels.list(PageRequest(), blueprint_id=stored[1].blueprint_id)
        assert [record.artifact_id for record in only.items] == [stored[3].artifact_id, stored[1].artifact_id]

    async def test_a_tampered_kernel_is_refused_and_nothing_is_stored(self, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY)
        for place in (len(payload) // 3, len(payload) // 2, len(payload) - 2):
            tampered = payload[:place] + bytes([payload[place] ^ 0x55]) + payload[place + 1 :]
            with pytest.raises(CorruptDataError, match=r"must|legal|parse"):
                await store.kernels.put(tampered)
        assert (await store.kernels.list(PageRequest())).items == ()

    async def test_a_stranger_s_signature_is_refused(self, store: UrzaStore) -> None:
        with pytest.raises(SignatureError, match="signing key must be a trusted one"):
            await store.kernels.put(kernel_bytes(SigningKey.generate()))

    async def test_without_a_key_ring_digests_are_checked_alone(self, database: Database) -> None:
        store = UrzaStore(database)
        await store.migrate()
        payload = kernel_bytes(SigningKey.generate())
        assert (await store.kernels.put(payload))[1]
        with pytest.raises(CorruptDataError, match=r"must|legal|parse"):
            await store.kernels.put(kernel_bytes(KEY, 1)[:-1] + b"\xff")

    async def test_bounds_hold(self, database: Database) -> None:
        size = len(kernel_bytes(KEY))
        limits = StoreLimits(max_kernel_bytes=size + 100, max_stored_bytes=size + 200)
        store = UrzaStore(database, limits=limits)
        await store.migrate()
        with pytest.raises(InvalidInputError, match=f"total_bytes must be at most {size + 100} bytes"):
            await store.kernels.put(kernel_bytes(KEY, weight_floats=1_000))
        await store.kernels.put(kernel_bytes(KEY))
        with pytest.raises(CapacityExceededError, match=r"must hold at most .* bytes of kernels"):
            await store.kernels.put(kernel_bytes(KEY, 1))

    async def test_a_kernel_whose_signer_is_no_longer_trusted_is_not_answered(
        self, database: Database, store: UrzaStore
    ) -> None:
        payload = kernel_bytes(KEY)
        record, _ = await store.kernels.put(payload)
        heir = SigningKey.generate()
        later = UrzaStore(database, key_ring=heir.ring())
        said = f"kernel {record.artifact_id} must be signed by a key that is trusted, key {record.key_id} no longer is"
        for key in ({"artifact_id": record.artifact_id}, {"content_key": record.content_key}):
            with pytest.raises(SignatureError, match=said):
                await later.kernels.get(**key)
        with pytest.raises(SignatureError, match=said):
            await later.kernels.open(record.artifact_id)
        assert (await store.kernels.get(artifact_id=record.artifact_id)) == record  # it was not removed
        assert (await later.kernels.put(kernel_bytes(heir)))[1]
        assert (await later.kernels.get(content_key=record.content_key)).key_id == heir.ring().key_ids[0]

    async def test_a_transfer_of_many_pieces_is_the_kernel_from_any_offset_on(self, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY, weight_floats=1_200_000)  # more than two reads of eight pieces
        record, _ = await store.kernels.put(payload)
        for offset in (0, 1, 262_144, 2_097_151, 2_097_152, 4_194_305, len(payload) - 1):
            _, chunks = await store.kernels.open(record.artifact_id, offset=offset)
            got = [chunk async for chunk in chunks]
            assert b"".join(chunk.data for chunk in got) == payload[offset:]
            assert [chunk.crc32 for chunk in got] == [zlib.crc32(chunk.data) for chunk in got]
            assert got[0].offset == offset

    async def test_a_transfer_that_its_reader_leaves_early_ends(self, store: UrzaStore) -> None:
        record, _ = await store.kernels.put(kernel_bytes(KEY, weight_floats=1_200_000))
        _, chunks = await store.kernels.open(record.artifact_id)
        assert (await anext(chunks)).offset == 0
        await chunks.aclose()  # type: ignore[attr-defined]
        assert not [task for task in asyncio.all_tasks() if "_pieces" in repr(task.get_coro())]

    async def test_a_damaged_kernel_is_found_and_removed(self, database: Database, store: UrzaStore) -> None:
        payload = kernel_bytes(KEY, weight_floats=200_000)
        record, _ = await store.kernels.put(payload)
        async with database.session() as session:
            damaged = update(KernelChunkRow).where(KernelChunkRow.index == 1).values(data=b"\0" * 262_144)
            await session.execute(damaged)
        with pytest.raises(CorruptDataError, match="piece 1 does not; it was removed"):
            await content(store, record.artifact_id)
        with pytest.raises(NotFoundError, match="artifact_id must name a stored kernel"):
            await store.kernels.get(artifact_id=record.artifact_id)
        assert (await store.kernels.put(payload))[1]


class ReportStoreContract(_StoreSuite):
    """Field reports, counted once each."""

    async def test_reports_add_up(self, store: UrzaStore) -> None:
        blueprint = await put(store, 1)
        kept = field_report("r1", blueprint_id=blueprint.id, estimate=0.5)
        culled = field_report("r2", blueprint_id=blueprint.id, estimate=-0.25, outcome=AdaptationOutcome.CULLED)
        failed = field_report("r3", blueprint_id=blueprint.id, outcome=AdaptationOutcome.FAILED)
        for report in (kept, culled, failed):
            assert (await store.reports.record(report)).recorded
        statistics = (await store.blueprints.get(blueprint.id)).statistics
        assert statistics is not None
        assert (statistics.trials, statistics.kept, statistics.mean_contribution) == (3, 1, 0.125)

    async def test_nothing_measured_is_no_mean(self, store: UrzaStore) -> None:
        result = await store.reports.record(field_report("r1", blueprint_id="0" * 64))
        assert result.statistics is not None
        assert result.statistics.mean_contribution is None

    async def test_a_report_is_counted_once_however_often_it_comes(self, store: UrzaStore) -> None:
        report = field_report("r1", blueprint_id="0" * 64, estimate=1.0)
        results = await asyncio.gather(*(store.reports.record(report) for _ in range(20)))
        assert sum(result.recorded for result in results) == 1
        statistics = await store.reports.statistics("0" * 64)
        assert statistics is not None
        assert statistics.trials == 1

    async def test_parallel_reports_are_all_counted(self, store: UrzaStore) -> None:
        reports = [field_report(f"r{number}", blueprint_id="0" * 64, estimate=0.5) for number in range(20)]
        await asyncio.gather(*(store.reports.record(report) for report in reports))
        statistics = await store.reports.statistics("0" * 64)
        assert statistics is not None
        assert (statistics.trials, statistics.kept, statistics.mean_contribution) == (20, 20, 0.5)

    async def test_a_report_without_a_blueprint_is_kept_and_counts_for_none(self, store: UrzaStore) -> None:
        result = await store.reports.record(field_report("r1"))
        assert (result.recorded, result.statistics) == (True, None)
        assert not (await store.reports.record(field_report("r1"))).recorded

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    async def test_a_figure_that_is_none_is_refused(self, store: UrzaStore, value: float) -> None:
        with pytest.raises(InvalidInputError, match=r"report.contribution.estimate must be finite, got (nan|inf)"):
            await store.reports.record(field_report("r1", estimate=value))

    @pytest.mark.parametrize(("report_id", "blueprint_id"), [("", ""), ("a/b", ""), ("r" * 200, ""), ("r", "ab")])
    async def test_a_bad_id_is_refused(self, store: UrzaStore, report_id: str, blueprint_id: str) -> None:
        with pytest.raises(InvalidInputError, match=r"report\.(report|blueprint)_id must"):
            await store.reports.record(field_report(report_id, blueprint_id=blueprint_id))


class MigrationContract:
    """The tables' way up and down, with data in place."""

    @pytest.fixture
    def database(self, empty_database: Database) -> Database:
        """Give a database without tables."""
        return empty_database

    async def test_migrated_tables_are_those_of_the_models(self, database: Database) -> None:
        def difference(connection: Connection) -> list[object]:
            options = {"version_table": VERSION_TABLE, "compare_type": True, "include_name": _is_ours}
            return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))

        assert await database.run_sync(difference)
        await migrate(database)
        assert await database.run_sync(difference) == []

    async def test_data_stays_on_the_way_down_and_up_again(self, database: Database) -> None:
        store = UrzaStore(database)
        await store.migrate()
        parent = await put(store, 1, tags=("cheap",))
        child = await put(store, 2, tags=("cheap",), parents=(parent,))
        record, _ = await store.kernels.put(kernel_bytes(KEY))
        await store.reports.record(field_report("r1", blueprint_id=child.id))
        await migrate(database, "r0002")
        await store.migrate()
        assert (await store.kernels.get(artifact_id=record.artifact_id)) == record
        assert await content(store, record.artifact_id) == kernel_bytes(KEY)
        await migrate(database, "r0001")
        assert await current_revision(database) == "r0001"
        await store.migrate()
        assert await current_revision(database) == newest_revision()
        assert await names(store, all_tags=("cheap",)) == [parent.name, child.name]
        assert (await store.blueprints.get(child.id)).statistics is None
        found = await store.blueprints.lineage(child.id, LineageDirection.ANCESTORS)
        assert [item.blueprint for item in found.items] == [parent]
        assert (await store.kernels.put(kernel_bytes(KEY)))[1]

    async def test_all_the_way_down_leaves_nothing(self, database: Database) -> None:
        store = UrzaStore(database)
        await store.migrate()
        await put(store, 1)
        await migrate(database, "base")
        assert await current_revision(database) is None
        await store.migrate()
        assert await names(store) == []

    async def test_replicas_that_start_at_once_migrate_once(self, database: Database) -> None:
        await asyncio.gather(*(UrzaStore(database).migrate() for _ in range(4)))
        assert await current_revision(database) == newest_revision()

    async def test_a_newer_build_s_tables_are_left_alone(self, database: Database) -> None:
        await migrate(database)

        def mark(connection: Connection) -> None:
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = 'r9999'")  # noqa: S608 - a constant

        await database.run_sync(mark)
        with pytest.raises(InvalidStateError, match="got r9999: a newer Esper has written them"):
            await migrate(database)

    async def test_an_unknown_revision_is_refused(self, database: Database) -> None:
        with pytest.raises(InvalidStateError, match="revision must be known to this build, got 'r7777'"):
            await migrate(database, "r7777")


def _is_ours(name: str | None, kind: str, parents: object) -> bool:  # noqa: ARG001 - Alembic's signature
    return kind != "table" or (name or "").startswith("urza_")
