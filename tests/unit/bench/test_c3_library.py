"""C3 in its smallest form: rows as the API writes them, SQL that answers as the library does, and one real server."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from bench import library_sql as sql
from bench.bare_grpc import BareClient, BareServer
from bench.c3_library import DIALECTS, Extent, dialect_figures
from bench.library_questions import CALLS, SEARCHES, Library, create_request
from bench.library_rows import NUM_CHOSEN, OWNER, TABLES, VERSIONS_PER_NAME, Shelf, blueprint_id, ir_bytes, variant
from bench.library_sql import SqliteSql, fill_library
from esper.blueprints.ir import canonical_bytes, content_id
from esper.contracts.chunks import split
from esper.execution.keys import SigningKey
from esper.mesh import InProcessChannel
from esper.mesh.database import Database
from esper.services.urza.genealogy import LineageDirection
from esper.services.urza.models import Base
from esper.services.urza.rules import BlueprintQuery, PageRequest
from esper.services.urza.server import register
from esper.services.urza.service import UrzaServicer
from esper.services.urza.store import UrzaStore
from esper.testing.urza_samples import field_report
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

SHELF = Shelf(size=200)
VARYING = {"created_at_us", "changed_at_us", "recorded_at_us"}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[UrzaStore]:
    """A library with the two blueprints that rows are modelled on."""
    async with Database.open(f"sqlite:///{tmp_path}/urza.db") as database:
        made = UrzaStore(database)
        await made.migrate()
        for number in (SHELF.size, SHELF.size + 1):
            stored, _ = await made.blueprints.create(SHELF.draft(number))
        await made.reports.record(field_report("sample", blueprint_id=stored.id, estimate=0.5))
        yield made


@pytest.fixture
async def hand(store: UrzaStore, tmp_path: Path) -> AsyncIterator[SqliteSql]:
    made = SqliteSql(tmp_path / "urza.db")
    await fill_library(made, SHELF, blueprint_id(SHELF.size + 1))
    yield made
    await made.close()


@pytest.fixture
async def library(store: UrzaStore, hand: SqliteSql) -> Library:
    channel = InProcessChannel()
    register(channel, UrzaServicer(store))
    return Library(
        shelf=SHELF,
        stub=UrzaServiceStub(channel),
        hand=hand,
        sample_id=blueprint_id(SHELF.size + 1),
        key=SigningKey.generate(),
        fresh=count(SHELF.size + 2),
        drawn=random.Random(0),
    )


@pytest.mark.parametrize("number", [0, 1, 999_999, 2**24 - 1])
def test_a_graphs_bytes_are_made_without_the_graph(number: int) -> None:
    assert ir_bytes(number) == canonical_bytes(variant(number))
    assert blueprint_id(number) == content_id(variant(number))


@pytest.mark.parametrize("size", [1_000, 5_000, 10_000, 100_000])
def test_what_a_search_finds_does_not_grow_with_the_library(size: int) -> None:
    shelf = Shelf(size=size)
    tags = [set(shelf.tags(number)) for number in range(size)]
    assert sum("chosen" in held for held in tags) == NUM_CHOSEN
    assert sum("validated" in held for held in tags) == size // 2
    all_tags, no_tags = SEARCHES["search, tag expression"]
    assert 60 < sum(held.issuperset(all_tags) and held.isdisjoint(no_tags) for held in tags) < 140


async def test_rows_are_those_that_the_api_writes(hand: SqliteSql, tmp_path: Path) -> None:
    """Another library gets the first name's blueprints one by one, and has the same rows of them."""
    async with Database.open(f"sqlite:///{tmp_path}/other.db") as database:
        other = UrzaStore(database)
        await other.migrate()
        for number in range(VERSIONS_PER_NAME):
            await other.blueprints.create(SHELF.draft(number))
        await other.reports.record(field_report("r", blueprint_id=blueprint_id(0), estimate=0.5))
        await other.reports.record(field_report("s", blueprint_id=blueprint_id(10), estimate=0.5))
        by_api = SqliteSql(tmp_path / "other.db")
        ids = {blueprint_id(number) for number in range(VERSIONS_PER_NAME)} | {SHELF.name(0)}
        for table in Base.metadata.tables.keys() & set(TABLES):
            columns = [column.name for column in Base.metadata.tables[table].columns if column.name not in VARYING]
            statement = f"SELECT {', '.join(columns)} FROM {table}"
            wanted = sorted(await by_api.fetch(statement), key=repr)
            owner = columns.index(OWNER.get(table, "blueprint_id"))
            made = [row for row in await hand.fetch(statement) if row[owner] in ids]
            assert wanted
            assert sorted(made, key=repr) == wanted, table
        await by_api.close()


async def test_a_filled_library_answers_as_if_its_api_had_filled_it(store: UrzaStore, hand: SqliteSql) -> None:
    for number in (0, 119, SHELF.size - 1):
        stored = await store.blueprints.get(blueprint_id(number))
        assert (stored.name, stored.version) == (SHELF.name(number), SHELF.version(number))
        assert stored.ir == variant(number)
        assert (stored.statistics is not None) == (number % 10 == 0)
    newest, _ = await store.blueprints.create(SHELF.draft(SHELF.size + 2))
    assert newest.version == 3


@pytest.mark.parametrize("name", SEARCHES)
async def test_sql_by_hand_finds_what_the_library_finds(store: UrzaStore, hand: SqliteSql, name: str) -> None:
    all_tags, no_tags = SEARCHES[name]
    page = await store.blueprints.search(BlueprintQuery(all_tags=all_tags, no_tags=no_tags), PageRequest())
    wanted = [item.id for item in page.items]
    assert wanted
    for way in (
        sql.search_by_tag(all_tags, no_tags, dialect="sqlite"),
        sql.search_by_name(all_tags, no_tags),
    ):
        found = await hand.fetch(way, *all_tags, *no_tags)
        assert [row[0] for row in found[:50]] == wanted


@pytest.mark.parametrize("direction", LineageDirection)
async def test_sql_by_hand_walks_as_the_library_does(
    store: UrzaStore, hand: SqliteSql, direction: LineageDirection
) -> None:
    middle = blueprint_id(VERSIONS_PER_NAME // 2)
    relatives = (await store.blueprints.lineage(middle, direction)).items
    assert len(relatives) >= 9
    found = await hand.fetch(sql.lineage(ancestors=direction is LineageDirection.ANCESTORS), middle)
    assert [(row[0], row[-1]) for row in found] == [(one.blueprint.id, one.depth) for one in relatives]


async def test_what_is_put_by_hand_is_there_for_the_library(store: UrzaStore, library: Library) -> None:
    put = await library.question_by_hand("put", 2)
    await put()
    await put()
    newest = await store.blueprints.get("grown-by-hand")
    assert newest.version == 2
    assert "lot-203" in newest.metadata.tags
    assert newest.lineage.parent_ids == (blueprint_id(3),)


@pytest.mark.parametrize("name", CALLS)
async def test_every_question_is_answered_both_ways(library: Library, name: str) -> None:
    ours, by_hand = library.question(name, 1), await library.question_by_hand(name, 1)
    assert (await ours()).ByteSize() > 0
    await by_hand()


async def test_a_bare_server_gives_what_it_was_told_to_hold() -> None:
    server = BareServer()
    client = BareClient(await server.start())
    request = create_request(SHELF, 0)
    held = pb.CreateBlueprintResponse(created=True)
    await client.hold("CreateBlueprint", held)
    assert await client.call("CreateBlueprint", request) == held
    data = bytes(range(256)) * 4_000
    fields = ("total_bytes", "sha256", "offset", "data", "crc32")
    await client.upload(
        [pb.UploadKernelRequest(**{name: getattr(chunk, name) for name in fields}) for chunk in split(data)]
    )
    assert await client.download() == data
    await client.close()
    await server.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_served_library_is_measured_whole(tmp_path: Path) -> None:
    tiny = Extent(size=100, flat_sizes=(40, 100), seconds=0.0, num_puts=2, kernel_floats=10_000, num_kernels=2)

    def url(name: str) -> str:
        return f"sqlite:///{tmp_path}/{name}.db"

    figures = dialect_figures("sqlite", url, tmp_path / "keys", tiny)
    names = [figure.name for figure in figures]
    assert len(names) == len(set(names)) == 3 * len(CALLS) + 5
    assert all(figure.value is not None and figure.value > 0 for figure in figures)
    assert all(DIALECTS["sqlite"] in name for name in names)
    goals = {figure.name for figure in figures if figure.goal is not None}
    assert len(goals) == len(SEARCHES) + len(CALLS) + 2
