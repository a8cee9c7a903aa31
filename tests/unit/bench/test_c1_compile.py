"""C1 in its smallest form: figures from given times, and one real plane of worker, service, library and NATS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.c1_compile import (
    SITES,
    all_figures,
    cached_figures,
    case_figure,
    cases,
    cold_figures,
    herd_figures,
    lean_figure,
    time_case,
    time_scripting,
)
from bench.compile_plane import CompilePlane
from bench.loops import Loop
from bench.paired import PairedTimes
from esper.blueprints.registry import default_registry


def times(ours_ms: float, reference_ms: float) -> PairedTimes:
    return PairedTimes(ours_ns=(ours_ms * 1e6,) * 3, reference_ns=(reference_ms * 1e6,) * 3)


def test_every_template_is_measured_somewhere() -> None:
    found = list(cases())
    assert {case.blueprint.name for case in found} == set(default_registry().names())
    assert {case.site for case in found} == set(SITES)


def test_a_template_counts_once_however_it_is_spread() -> None:
    found = {"a": times(100, 50), "b": times(120, 30), "c": times(140, 20)}
    ratio, p50, tail = all_figures(found)
    assert (ratio.value, ratio.holds) == (4.0, True)
    assert p50.value == pytest.approx(0.12)
    assert p50.holds is True
    assert tail.value == pytest.approx(140 / 120)


def test_the_ratio_to_lean_scripting_stands_beside_the_goals() -> None:
    found = lean_figure({"a": times(100, 50), "b": times(120, 30)}, {"a": times(50, 10), "b": times(30, 15)})
    assert found.value == pytest.approx(9.0)
    assert found.holds is None


def test_scripting_without_the_graph_takes_less() -> None:
    assert time_scripting(next(cases()), rounds=3).ratio > 1.0


def test_a_long_tail_misses_the_goal() -> None:
    slow = PairedTimes(ours_ns=(1e8, 1e8, 6e8), reference_ns=(1e8, 1e8, 1e8))
    assert all_figures({"a": slow})[2].holds is False


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with Loop() as made:
        yield made


@pytest.fixture(scope="module")
def plane(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompilePlane]:
    made = CompilePlane(tmp_path_factory.mktemp("plane"))
    loop.wait(made.__aenter__())
    yield made
    loop.wait(made.__aexit__())


@pytest.mark.slow
def test_a_compile_is_timed_beside_scripting_alone(loop: Loop, plane: CompilePlane) -> None:
    case = next(cases())
    before = plane.num_compiled
    found = {case.name: time_case(loop, plane, case, rounds=2)}
    ratio, p50, _ = all_figures(found)
    assert ratio.value is not None
    assert ratio.value > 1
    assert p50.value is not None
    assert 0 < p50.value < 60
    assert case_figure(case.name, found[case.name]).value == ratio.value
    assert plane.num_compiled == before


@pytest.mark.slow
def test_a_kernel_asked_for_twice_is_compiled_once_and_then_found(loop: Loop, plane: CompilePlane) -> None:
    chosen = list(cases())[:2]
    over, cached, fresh, compiles = cached_figures(loop, plane, chosen, {"a": times(1000, 1)})
    assert compiles.value == 1
    assert cached.value is not None
    assert fresh.value is not None
    assert 0 < cached.value < fresh.value
    assert over.value == pytest.approx(cached.value)


@pytest.mark.slow
def test_clients_that_ask_at_once_share_one_compile(loop: Loop, plane: CompilePlane) -> None:
    before = plane.num_compiled
    compiles, until = herd_figures(loop, plane, next(cases()), num_herds=2)
    assert (compiles.value, compiles.holds) == (1, True)
    assert plane.num_compiled == before + 2
    assert until.value is not None
    assert until.value > 0


@pytest.mark.slow
def test_a_worker_is_timed_from_its_start(loop: Loop, tmp_path: Path) -> None:
    start, first = cold_figures(loop, tmp_path, next(cases()), starts=1)
    assert start.value is not None
    assert first.value is not None
    assert 0.1 < start.value < 120
    assert 0 < first.value < start.value
    assert list(tmp_path.iterdir()) == []
