"""Wall time and spans of a job's phases: each phase is one span of the adaptation, ended when the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from esper.contracts.kernel import CompileJob, JobPhase

_TRACER = trace.get_tracer("esper.tezzeret")


class PhaseClock:
    """Follows one delivery of one job. Not thread-safe."""

    def __init__(self, job: CompileJob, parent: Context, clock: Callable[[], float] = time.perf_counter) -> None:
        self._job = job
        self._parent = parent
        self._clock = clock
        self._span: Span | None = None
        self._phase: JobPhase | None = None
        self._begun = 0.0
        self._times: dict[str, timedelta] = {}

    @property
    def times(self) -> dict[str, timedelta]:
        """Wall time of the phases that have ended, by lower-case name."""
        return dict(self._times)

    def enter(self, phase: JobPhase) -> None:
        """End the phase that runs and begin another; a phase entered twice adds up."""
        self.end()
        self._phase, self._begun = phase, self._clock()
        self._span = _TRACER.start_span(
            f"tezzeret.{phase.name.lower()}",
            context=self._parent,
            attributes={
                "esper.adaptation_id": self._job.adaptation_id,
                "esper.run_id": self._job.run_id,
                "esper.job_id": self._job.job_id,
                "esper.blueprint_id": self._job.blueprint_id,
            },
        )

    def end(self, error: BaseException | None = None) -> None:
        """End the phase that runs, as failed when there is an error."""
        if self._span is None or self._phase is None:
            return
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, str(error)[:200]))
        self._span.end()
        name = self._phase.name.lower()
        lasted = timedelta(seconds=self._clock() - self._begun)
        self._times[name] = self._times.get(name, timedelta()) + lasted
        self._span = self._phase = None
