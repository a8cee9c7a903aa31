"""C1 in its smallest form."""

from __future__ import annotations

import pytest

from bench.c1_compile import SITES, all_figures, case_figure, cases, cold_figure, time_case
from esper.blueprints.registry import default_registry


def test_every_template_is_measured_somewhere() -> None:
    found = list(cases())
    assert {case.blueprint.name for case in found} == set(default_registry().names())
    assert {case.site for case in found} == set(SITES)


def test_a_compile_is_timed_beside_scripting_alone() -> None:
    case = next(cases())
    times = {case.name: time_case(case, rounds=2)}
    p50, p99, ratio = all_figures(times)
    for figure in (p50, p99):
        assert figure.unit == "s"
        assert figure.value is not None
        assert 0 < figure.value < 60
    assert ratio.value is not None
    assert ratio.value > 1
    assert case_figure(case.name, times[case.name]).value == ratio.value


@pytest.mark.slow
def test_the_first_compile_of_a_process_is_timed() -> None:
    figure = cold_figure(1)
    assert figure.value is not None
    assert 0 < figure.value < 60
