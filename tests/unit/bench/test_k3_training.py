"""The requests of real runs reach the first tier, and are written down as they do."""

from __future__ import annotations

import pytest

from bench.k3_training import training_figures
from esper.contracts.errors import InvalidStateError


@pytest.mark.slow
def test_runs_ask_for_kernels_and_are_counted() -> None:
    figures = {figure.name: figure.value for figure in training_figures(num_runs=1, epochs=24)}
    requests, kernels = figures["the same, requests"], figures["the same, different kernels"]
    assert requests is not None
    assert kernels is not None
    assert 1 <= kernels <= requests
    share, best = figures["hits on the requests of training runs (1)"], figures["the same, Belady's optimum"]
    assert share is not None
    assert best is not None
    assert 0.0 <= share <= best <= 1.0


def test_runs_that_ask_for_nothing_are_no_measurement() -> None:
    with pytest.raises(InvalidStateError, match="1 runs of 1 epochs must ask for a kernel"):
        training_figures(num_runs=1, epochs=1)
