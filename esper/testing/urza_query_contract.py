# ruff: noqa: D102 - a test is named by the sentence that it proves
"""What the library's queries and statistics promise on every database, as tests: subclass and give what they stand on.

The fixtures ``database`` and ``empty_database`` are those of `esper.testing.urza_contract`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, text

from esper.blueprints.cost import cost
from esper.blueprints.ir import canonical_bytes
from esper.blueprints.plan import is_legal
from esper.blueprints.registry import default_registry
from esper.contracts.blueprint import (
    Blueprint,
    BlueprintBounds,
    BlueprintMetadata,
    KernelStatistics,
    SiteKind,
)
from esper.contracts.errors import CapacityExceededError, InvalidInputError, NotFoundError
from esper.contracts.kernel import CompileTarget, DeviceKind, ValidationCheck
from esper.contracts.run import AdaptationOutcome
from esper.contracts.tag_expression import parse_tags
from esper.execution.artifact import KernelContent, artifact_bytes, pack
from esper.execution.keys import SigningKey
from esper.mesh.database import Database
from esper.mesh.driver_reads import numbered
from esper.services.urza import queries
from esper.services.urza.migrate import migrate
from esper.services.urza.models import BLUEPRINTS, CostRow, KernelStatisticsRow, StatisticsRow, TotalRow
from esper.services.urza.reference_costs import REFERENCE_SITES
from esper.services.urza.rules import BlueprintDraft, BlueprintQuery, PageRequest
from esper.services.urza.seeding import seed_library
from esper.services.urza.store import StoreLimits, UrzaStore
from esper.testing.urza_contract import names, put
from esper.testing.urza_samples import SITE, field_report, graph

KEY: Final = SigningKey.generate()
TAGS: Final = ("conv2d", "validated", "t-1", "t.2", "x")
UNKNOWN: Final = "unknown"
"""A tag that no blueprint has."""

Tree = tuple[Any, ...] | str
"""An expression as a test knows it: a tag, or a sign with its operands."""

TREES: Final = st.recursive(
    st.sampled_from([*TAGS, UNKNOWN]),
    lambda inner: st.one_of(
        st.tuples(st.just("!"), inner), st.tuples(st.just("&"), inner, inner), st.tuples(st.just("|"), inner, inner)
    ),
    max_leaves=10,
)
BLANKS: Final = st.lists(st.sampled_from(["", " ", "  ", "\t", "\n"]), min_size=4, max_size=4)


def holds(tree: Tree, tags: frozenset[str]) -> bool:
    """Tell whether an expression holds for a set of tags."""
    if isinstance(tree, str):
        return tree in tags
    if tree[0] == "!":
        return not holds(tree[1], tags)
    both = (holds(tree[1], tags), holds(tree[2], tags))
    return all(both) if tree[0] == "&" else any(both)


def written(tree: Tree, blanks: list[str], *, binding: int = 0) -> str:
    """Give an expression's text, with only the parentheses that it needs, or with more where blanks say so."""
    if isinstance(tree, str):
        return tree
    own = {"|": 1, "&": 2, "!": 3}[tree[0]]
    parts = [written(operand, blanks[1:] + blanks[:1], binding=own) for operand in tree[1:]]
    inside = f"!{blanks[0]}{parts[0]}" if own == 3 else f"{parts[0]}{blanks[1]}{tree[0]}{blanks[2]}{parts[1]}"
    return f"({blanks[0]}{inside}{blanks[3]})" if own < binding or len(blanks[3]) == 2 else inside


def kernel_with_latency(number: int, latency_ms: float | None, *, blueprint: int = 0) -> bytes:
    """Give a signed artefact whose validation measured a latency; without one, none that has such a row."""
    checks = [ValidationCheck(name="gradient_flow", passed=True, figure=1.0)]
    if latency_ms is not None:
        checks.append(ValidationCheck(name="latency", passed=True, figure=latency_ms, limit=250.0, unit="ms"))
    ir = graph(blueprint)
    content = KernelContent(
        content_key=f"{number:064x}",
        site=SITE,
        target=CompileTarget.EAGER,
        device=DeviceKind.CPU,
        ir=canonical_bytes(ir),
        weights={},
        binary=b"",
        cost=cost(ir, SITE),
        checks=tuple(checks),
        compilation_time=timedelta(milliseconds=1),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    return artifact_bytes(pack(content, KEY))


class _QuerySuite:
    @pytest.fixture(params=[queries.FEW, 0], ids=["from-the-few", "from-the-names"])
    def few(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have queries begin from the rows of a condition that few meet, and then never."""
        monkeypatch.setattr(queries, "FEW", request.param)

    @pytest.fixture
    async def store(self, database: Database) -> UrzaStore:
        """Give a store that trusts one key."""
        return UrzaStore(database, key_ring=KEY.ring())


class TagExpressionContract(_QuerySuite):
    """Expressions over tags find what they say, page by page."""

    @pytest.mark.usefixtures("few")
    async def test_random_expressions_find_what_the_reference_evaluation_finds(self, store: UrzaStore) -> None:
        every = [frozenset(tags) for size in range(len(TAGS) + 1) for tags in itertools.combinations(TAGS, size)]
        for number, tags in enumerate(every):
            await put(store, number, tags=tuple(sorted(tags)))

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(tree=TREES, blanks=BLANKS)
        async def agrees(tree: Tree, blanks: list[str]) -> None:
            wanted = [f"blueprint-{number:03d}" for number, tags in enumerate(every) if holds(tree, tags)]
            assert await names(store, tags=parse_tags(written(tree, blanks))) == wanted

        await asyncio.to_thread(_in_loop(agrees, asyncio.get_running_loop()))

    @pytest.mark.usefixtures("few")
    async def test_expressions_narrow_what_other_conditions_find(self, store: UrzaStore) -> None:
        await put(store, 1, "both", tags=("validated", "conv2d"))
        await put(store, 2, "old", tags=("validated", "conv2d", "deprecated"))
        await put(store, 3, "one", tags=("validated",))
        await put(store, 4, "bare")
        assert await names(store, tags=parse_tags("validated & conv2d & !deprecated")) == ["both"]
        assert await names(store, tags=parse_tags("!deprecated")) == ["bare", "both", "one"]
        assert await names(store, tags=parse_tags("conv2d | deprecated"), no_tags=("deprecated",)) == ["both"]
        assert await names(store, tags=parse_tags("!conv2d"), all_tags=("validated",)) == ["one"]
        assert await names(store, tags=parse_tags("validated"), text="OLD") == ["old"]
        assert await names(store, tags=parse_tags("nobody")) == []
        assert await names(store, tags=parse_tags("  ")) == ["bare", "both", "old", "one"]

    async def test_a_token_is_bound_to_the_expression_and_the_bounds(self, store: UrzaStore) -> None:
        for number in range(3):
            await put(store, number, tags=("cheap", "wide"))
        query = BlueprintQuery(tags=parse_tags("cheap & wide"), bounds=BlueprintBounds(max_parameters=100))
        page = await store.blueprints.search(query, PageRequest(size=1))
        same = replace(query, tags=parse_tags("(wide)&cheap"), bounds=BlueprintBounds(max_parameters=100))
        rest = await store.blueprints.search(same, PageRequest(token=page.next_token))
        assert [item.name for item in rest.items] == ["blueprint-001", "blueprint-002"]
        for other in (
            replace(query, tags=parse_tags("cheap | wide")),
            replace(query, tags=None, all_tags=("cheap", "wide")),
            replace(query, bounds=BlueprintBounds(max_parameters=101)),
            replace(query, bounds=BlueprintBounds(max_flops=100)),
        ):
            with pytest.raises(InvalidInputError, match="page_token must be empty or one this listing gave"):
                await store.blueprints.search(other, PageRequest(token=page.next_token))

    async def test_the_largest_expression_is_answered(self, store: UrzaStore) -> None:
        await put(store, 1, tags=("t00",))
        deep = "!(" * 8 + " | ".join(f"t{number:02d}" for number in range(32)) + ")" * 8
        assert await names(store, tags=parse_tags(deep)) == ["blueprint-001"]

    async def test_a_rare_tag_is_read_from_the_tags_index(self, database: Database, store: UrzaStore) -> None:
        for number in range(300):
            await put(store, number, tags=("common", "rare") if number == 7 else ("common",))
        plan = await _plan_of(database, BlueprintQuery(tags=parse_tags("common & rare & !old")))
        assert "ix_urza_blueprint_tags_tag" in plan
        assert await names(store, tags=parse_tags("common & rare & !old")) == ["blueprint-007"]


class BoundsContract(_QuerySuite):
    """Bounds on figures find what lies within them."""

    @pytest.mark.usefixtures("few")
    async def test_costs_bound_the_search_as_the_cost_model_says(self, store: UrzaStore) -> None:
        registry = default_registry()
        templates = await seed_library(store.blueprints, registry)
        figures = {template.name: _figures(template) for template in templates}
        amounts = sorted({figure for costs in figures.values() for pair in costs.values() for figure in pair})

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            ends=st.lists(st.none() | st.sampled_from(amounts), min_size=4, max_size=4),
            kind=st.none() | st.sampled_from(SiteKind),
        )
        async def agrees(ends: list[int | None], kind: SiteKind | None) -> None:
            low, high, low_flops, high_flops = ends
            if (low is not None and high is not None and low > high) or (
                low_flops is not None and high_flops is not None and low_flops > high_flops
            ):
                return
            bounds = BlueprintBounds(min_parameters=low, max_parameters=high, min_flops=low_flops, max_flops=high_flops)
            wanted = sorted(
                name
                for name, costs in figures.items()
                if any(
                    _between(low, parameters, high) and _between(low_flops, flops, high_flops)
                    for site_kind, (parameters, flops) in costs.items()
                    if kind in (None, site_kind)
                )
            )
            if ends == [None] * 4:
                return
            assert await names(store, bounds=bounds, site_kind=kind) == wanted

        await asyncio.to_thread(_in_loop(agrees, asyncio.get_running_loop()))

    async def test_both_costs_are_held_against_the_same_site(self, store: UrzaStore) -> None:
        template = default_registry().create_blueprint("lora")
        await store.blueprints.create(BlueprintDraft(name="lora", ir=template.ir))
        costs = _figures(replace(template, metadata=BlueprintMetadata()))
        fewest, most = min(costs.values(), key=lambda pair: pair[1]), max(costs.values(), key=lambda pair: pair[1])
        assert fewest[1] < most[1]
        mixed = BlueprintBounds(max_parameters=fewest[0], max_flops=fewest[1])
        assert await names(store, bounds=mixed) == ["lora"]
        kind = next(kind for kind, pair in costs.items() if pair == most)
        assert await names(store, bounds=mixed, site_kind=kind) == []

    async def test_a_blueprint_that_is_legal_at_no_reference_site_is_within_no_bound(self, store: UrzaStore) -> None:
        meant = BlueprintMetadata(site_kinds=(SiteKind.LINEAR,))
        conv = default_registry().create_blueprint("conv3x3")
        assert not is_legal(conv.ir, REFERENCE_SITES[0])
        await store.blueprints.create(BlueprintDraft(name="misfit", ir=conv.ir, metadata=meant))
        assert await names(store, bounds=BlueprintBounds(min_parameters=0)) == []
        assert await names(store) == ["misfit"]

    @pytest.mark.usefixtures("few")
    async def test_success_and_latency_bound_the_search(self, store: UrzaStore) -> None:
        for number, (kept, latency_ms) in enumerate([(3, 1.5), (1, 4.0), (0, None)]):
            blueprint = await put(store, number)
            kernel, _ = await store.kernels.put(kernel_with_latency(number, latency_ms, blueprint=number))
            for trial in range(10):
                outcome = AdaptationOutcome.KEPT if trial < kept else AdaptationOutcome.CULLED
                report = field_report(f"r{number}-{trial}", blueprint_id=blueprint.id, outcome=outcome)
                await store.reports.record(replace(report, artifact_id=kernel.artifact_id))
        await put(store, 3)
        first, second, third = (f"blueprint-00{number}" for number in range(3))
        for bounds, wanted in (
            (BlueprintBounds(min_success_rate=0.3), [first]),
            (BlueprintBounds(max_success_rate=0.1), [second, third]),
            (BlueprintBounds(min_success_rate=0.0), [first, second, third]),
            (BlueprintBounds(min_success_rate=0.05, max_success_rate=0.3), [first, second]),
            (BlueprintBounds(max_latency_ms=1.5), [first]),
            (BlueprintBounds(min_latency_ms=0.0), [first, second]),
            (BlueprintBounds(min_latency_ms=1.6, min_success_rate=0.1), [second]),
            (BlueprintBounds(max_latency_ms=4.0, max_success_rate=0.0), []),
        ):
            assert await names(store, bounds=bounds) == wanted

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({"min_parameters": -1}, r"bounds.min_parameters must be finite and within \[0"),
            ({"max_flops": 2**63}, r"bounds.max_flops must be finite and within \[0"),
            ({"max_latency_ms": float("nan")}, "bounds.max_latency_ms must be finite"),
            ({"min_success_rate": 1.5}, r"bounds.min_success_rate must be finite and within \[0, 1\], got 1.5"),
            ({"min_flops": 5, "max_flops": 4}, r"bounds.min_flops must be at most bounds.max_flops \(4\), got 5"),
        ],
    )
    def test_bounds_that_break_a_rule_are_refused(self, bounds: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            BlueprintQuery(bounds=BlueprintBounds(**bounds))


class KernelStatisticsContract(_QuerySuite):
    """Field reports by kernel, counted once each."""

    async def test_reports_add_up_by_kernel_beside_their_blueprint(self, store: UrzaStore) -> None:
        blueprint = await put(store, 0)
        fast, _ = await store.kernels.put(kernel_with_latency(1, 2.0))
        slow, _ = await store.kernels.put(kernel_with_latency(2, 5.0))
        reports = (
            (fast, AdaptationOutcome.KEPT, 0.5),
            (fast, AdaptationOutcome.CULLED, None),
            (slow, AdaptationOutcome.FAILED, -0.25),
        )
        for number, (kernel, outcome, estimate) in enumerate(reports):
            report = field_report(f"r{number}", blueprint_id=blueprint.id, outcome=outcome, estimate=estimate)
            for _ in range(2):
                await store.reports.record(replace(report, artifact_id=kernel.artifact_id))
        assert await store.reports.kernel_statistics(fast.artifact_id) == KernelStatistics(
            trials=2, kept=1, mean_contribution=0.5, mean_latency_ms=2.0
        )
        assert await store.reports.kernel_statistics(slow.artifact_id) == KernelStatistics(
            trials=1, kept=0, mean_contribution=-0.25, mean_latency_ms=5.0
        )
        whole = await store.reports.statistics(blueprint.id)
        assert whole is not None
        assert (whole.trials, whole.kept, whole.mean_contribution, whole.mean_latency_ms) == (3, 1, 0.125, 3.0)

    async def test_parallel_reports_of_one_kernel_are_counted_once_each(self, store: UrzaStore) -> None:
        artifact_id = f"k{'0' * 32}"
        reports = [
            replace(field_report(f"r{number % 10}", estimate=0.5), artifact_id=artifact_id) for number in range(20)
        ]
        await asyncio.gather(*(store.reports.record(report) for report in reports))
        assert await store.reports.kernel_statistics(artifact_id) == KernelStatistics(
            trials=10, kept=10, mean_contribution=0.5
        )

    async def test_a_latency_nobody_measured_is_none(self, store: UrzaStore) -> None:
        kernel, _ = await store.kernels.put(kernel_with_latency(1, None))
        for number, artifact_id in enumerate([kernel.artifact_id, f"k{'f' * 32}"]):
            report = field_report(f"r{number}", blueprint_id=kernel.blueprint_id)
            await store.reports.record(replace(report, artifact_id=artifact_id))
            counted = await store.reports.kernel_statistics(artifact_id)
            assert counted == KernelStatistics(trials=1, kept=1)
        whole = await store.reports.statistics(kernel.blueprint_id)
        assert whole is not None
        assert whole.mean_latency_ms is None

    async def test_a_kernel_nobody_reported_has_no_statistics(self, store: UrzaStore) -> None:
        assert await store.reports.kernel_statistics(f"k{'0' * 32}") is None
        with pytest.raises(InvalidInputError, match="artifact_id must be 'k' and 32 lower-case hex digits"):
            await store.reports.kernel_statistics("kernel_123")

    async def test_a_report_of_another_kind_of_kernel_id_counts_for_its_blueprint(self, store: UrzaStore) -> None:
        blueprint = await put(store, 0)
        report = replace(field_report("r1", blueprint_id=blueprint.id), artifact_id="x" * 500)
        result = await store.reports.record(report)
        assert result.recorded
        assert result.statistics is not None
        assert result.statistics.trials == 1


class TotalContract(_QuerySuite):
    """The library knows how many blueprints it holds without counting them."""

    async def test_the_bound_holds_exactly_however_many_write_at_once(self, database: Database) -> None:
        store = UrzaStore(database, limits=StoreLimits(max_blueprints=5))
        await store.migrate()
        results = await asyncio.gather(*(put(store, number) for number in range(12)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        assert len(refused) == 7
        assert {type(error) for error in refused} == {CapacityExceededError}
        assert (len(await names(store)), await _total(database)) == (5, 5)

    async def test_what_was_not_stored_is_not_counted(self, database: Database, store: UrzaStore) -> None:
        first = await put(store, 1)
        await store.blueprints.create(BlueprintDraft(name=first.name, ir=first.ir))
        orphan = replace(first.lineage, parent_ids=("0" * 64,))
        with pytest.raises(NotFoundError, match="must name stored blueprints"):
            await store.blueprints.create(BlueprintDraft(name="orphan", ir=graph(2), lineage=orphan))
        assert await _total(database) == 1

    async def test_a_blueprint_is_stored_without_counting_the_others(
        self, database: Database, store: UrzaStore
    ) -> None:
        statements: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            statements.append(statement)

        engine = database._engine.sync_engine  # nothing else sees what is asked of the database
        event.listen(engine, "before_cursor_execute", note)
        await put(store, 1)
        event.remove(engine, "before_cursor_execute", note)
        counting = [one for one in statements if "count(*)" in one and "urza_state_changes" not in one]
        assert len(statements) > 5
        assert counting == []


class FiguresMigrationContract:
    """The tables of figures, on the way up and down with data in place."""

    @pytest.fixture
    def database(self, empty_database: Database) -> Database:
        """Give a database without tables."""
        return empty_database

    async def test_figures_of_what_is_there_already_are_those_of_what_comes_later(self, database: Database) -> None:
        store = UrzaStore(database, key_ring=KEY.ring())
        await store.migrate()
        await seed_library(store.blueprints, default_registry())
        blueprint = await put(store, 0, tags=("of-mine",))
        kernels = [
            (await store.kernels.put(kernel_with_latency(number, latency_ms)))[0].artifact_id
            for number, latency_ms in enumerate([2.0, 5.0, None])
        ]
        for number, artifact_id in enumerate([*kernels, kernels[0], "", "x" * 40, f"k{'0' * 32}"]):
            estimate = None if number == 1 else number / 8
            outcome = AdaptationOutcome.KEPT if number % 2 else AdaptationOutcome.CULLED
            report = field_report(f"r{number}", blueprint_id=blueprint.id, estimate=estimate, outcome=outcome)
            await store.reports.record(replace(report, artifact_id=artifact_id))
        before = await _figures_at_rest(database)
        assert [len(rows) for rows in before["rows"][1:]] == [1, 4]
        assert len(before["rows"][0]) > 40
        await migrate(database, "r0003")
        statement = "SELECT count(*) FROM urza_statistics WHERE trials = 7"
        async with database.reading() as session:
            assert await session.scalar(text(statement)) == 1
        await store.migrate()
        assert await _figures_at_rest(database) == before
        assert await names(store, tags=parse_tags("of-mine")) == [blueprint.name]
        await put(store, 1, tags=("of-mine",))
        assert await _total(database) == before["total"] + 1

    async def test_a_kernel_that_rotted_does_not_stop_the_way_up(self, database: Database) -> None:
        store = UrzaStore(database, key_ring=KEY.ring())
        await store.migrate()
        kernel, _ = await store.kernels.put(kernel_with_latency(1, 2.0))
        report = replace(field_report("r1", blueprint_id=kernel.blueprint_id), artifact_id=kernel.artifact_id)
        await store.reports.record(report)
        await migrate(database, "r0003")
        async with database.session() as session:
            await session.execute(text("UPDATE urza_kernels SET manifest = :rot"), {"rot": b"\xff\xff\xff"})
        await migrate(database, "r0004")
        async with database.reading() as session:
            rows = (await session.execute(select(KernelStatisticsRow.trials, KernelStatisticsRow.latency_count))).all()
        assert [tuple(row) for row in rows] == [(1, 0)]


def _in_loop(test: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """Give a test of Hypothesis, which calls from a plain thread, that does its work in a running event loop."""
    inner = test.hypothesis.inner_test

    def run(**drawn: Any) -> None:
        asyncio.run_coroutine_threadsafe(inner(**drawn), loop).result(60)

    test.hypothesis.inner_test = run
    return test


def _figures(blueprint: Blueprint) -> dict[SiteKind, tuple[int, int]]:
    """Give parameters and FLOPs at every reference site that a blueprint is meant for and legal at."""
    meant = blueprint.metadata.site_kinds or tuple(SiteKind)
    sites = [site for site in REFERENCE_SITES if site.kind in meant and is_legal(blueprint.ir, site)]
    found = {site.kind: cost(blueprint.ir, site) for site in sites}
    return {kind: (figures.parameters, figures.flops) for kind, figures in found.items()}


def _between(low: int | None, figure: int, high: int | None) -> bool:
    return (low is None or low <= figure) and (high is None or figure <= high)


async def _plan_of(database: Database, query: BlueprintQuery) -> str:
    """Give the database's plan of a search, as text."""
    page = await database.read(queries.page(query, None, 51))
    async with database.session() as session:
        if database.dialect == "postgresql":
            # A table of one page is read whole whatever the index; this one stands for many.
            await session.execute(text("SET LOCAL enable_seqscan = off"))
        connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        if database.dialect == "postgresql":
            rows = await connection.fetch(f"EXPLAIN {page.text}", *page.parameters)
        else:
            rows = await connection.execute_fetchall(f"EXPLAIN QUERY PLAN {numbered(page.text)}", page.parameters)
    return json.dumps([tuple(row) for row in rows])


async def _total(database: Database) -> int:
    async with database.reading() as session:
        return int(await session.scalar(select(TotalRow.total).where(TotalRow.name == BLUEPRINTS)) or 0)


async def _figures_at_rest(database: Database) -> dict[str, Any]:
    async with database.reading() as session:
        rows = []
        for table in (CostRow, StatisticsRow, KernelStatisticsRow):
            columns = sorted(column.name for column in table.__table__.columns)
            found = (await session.execute(select(*(table.__table__.c[name] for name in columns)))).all()
            rows.append(sorted(tuple(row) for row in found))
    return {"rows": rows, "total": await _total(database)}
