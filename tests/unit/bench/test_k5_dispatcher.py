"""K5 in its smallest form: every figure comes out, and the mutation set is one that can fail."""

from __future__ import annotations

import pytest

from bench import k5_dispatcher
from bench.dispatcher_programs import TightProgram, missed_defects
from esper.execution._native import cuda_available


def test_costs_are_measured() -> None:
    figures = k5_dispatcher.cost_figures(2, seconds=0.0)
    assert [figure.unit for figure in figures] == ["ratio", "ratio", "ratio", "us"]
    assert all(figure.value is not None and figure.value > 0 for figure in figures)
    assert figures[0].name == "2 seeds, native probe of one value, over the pool"


def test_every_defect_is_found_and_nothing_else() -> None:
    planted, found, reports = k5_dispatcher.mutation_figures(2)
    assert planted.value is not None
    assert planted.value > 200
    assert found.holds is True
    assert reports.holds is True


def test_a_defect_that_harms_nothing_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recorded stream of a block is enough in a capture: claiming that both are needed must show."""
    monkeypatch.setattr(TightProgram, "needed", lambda _: ("record_stream",))
    _, missed = missed_defects(TightProgram(num_streams=2, num_seeds=2, is_captured=True))
    assert missed


@pytest.mark.skipif(cuda_available(), reason="a CUDA device is there")
def test_without_a_device_that_is_said_and_no_figure_made_up() -> None:
    assert k5_dispatcher.device_figures(0.0) == []
    assert "No CUDA device here" in k5_dispatcher.device_notes()[0]
