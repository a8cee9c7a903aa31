"""The part of K3 that needs real runs: what growing networks ask the first cache tier for, and how often it has it.

Runs grow one after another through one embedded mesh, as a sweep over seeds does. Their requests are recorded where
kernels arrive; hits are the tier's own counts. A kernel that was loaded stays in its layer as an ordinary module, so
within a run nothing is asked for twice: no cache without foresight can have it, and Belady's optimum says how far off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import esper
from bench.cache_traces import CAPACITY, optimal_hits
from bench.growth_arms import grow
from bench.report import Figure, at_least
from esper.cli import digits
from esper.contracts.errors import InvalidStateError
from esper.core.link import Arrival, KernelArrival, RunLink
from esper.core.morphable import MorphableModel

GOAL: Final = at_least(0.95)


class RecordingMesh:
    """A mesh whose runs' requests for kernels are written down."""

    def __init__(self, mesh: esper.Mesh) -> None:
        self._mesh = mesh
        self.requests: list[str] = []

    def open_link(self, run_id: str, model: MorphableModel) -> RunLink:
        """Give the run's line, which writes down what arrives."""
        link = self._mesh.open_link(run_id, model)
        arrivals = link.arrivals

        def recorded() -> Iterator[Arrival]:
            for item in arrivals():
                if isinstance(item, KernelArrival) and item.ready.artifact_id:
                    self.requests.append(item.ready.artifact_id)
                yield item

        link.arrivals = recorded  # type: ignore[method-assign]
        return link


def training_figures(*, num_runs: int, epochs: int) -> list[Figure]:
    """Grow the digits host ``num_runs`` times, once a seed; gives the hit ratio of the first tier.

    Raises:
        InvalidStateError: No run asked for a kernel.
    """
    splits = digits.load_digits()
    with esper.Mesh.embedded() as mesh:
        recording = RecordingMesh(mesh)
        for seed in range(num_runs):
            grow(recording, splits, epochs=epochs, seed=seed)
        tier = mesh.kernel_source.stats()[0]
    trace = recording.requests
    asked = tier.hits + tier.misses
    if not trace:
        raise InvalidStateError(f"{num_runs} runs of {epochs} epochs must ask for a kernel, none did")
    return [
        Figure(
            name=f"hits on the requests of training runs ({num_runs})", value=tier.hits / asked, unit="share", goal=GOAL
        ),
        Figure(name="the same, Belady's optimum", value=optimal_hits(trace, CAPACITY) / asked, unit="share"),
        Figure(name="the same, requests", value=float(asked), unit="count"),
        Figure(name="the same, different kernels", value=float(len(set(trace))), unit="count"),
    ]
