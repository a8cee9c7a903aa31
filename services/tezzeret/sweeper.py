"""Now and then, a look for jobs whose work item is gone: put on the queue again, or DEAD once attempted too often.

The queue may lose what it was given (its disk, its bound in age or bytes), a service may die between its store and
the queue, and a store may be full or away for longer than anybody holds a delivery. The store is the truth: what it
says is unfinished is looked for here, a bounded number of jobs at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from esper.contracts.errors import NotFoundError
from esper.contracts.kernel import CompileJob, JobPhase
from esper.services.tezzeret.attempt_store import AttemptStore
from esper.services.tezzeret.config import TezzeretConfig
from esper.services.tezzeret.job_rows import now_us

log = logging.getLogger(__name__)

MAX_SWEPT: Final = 500
"""Jobs that one look takes up at most."""


class Sweeper:
    """Looks when it is told to. Belongs to one event loop."""

    def __init__(
        self,
        store: AttemptStore,
        config: TezzeretConfig,
        reached_us: Callable[[], Mapping[str, int]],
        publish: Callable[[CompileJob], Awaitable[None]],
        on_change: Callable[[CompileJob], None],
    ) -> None:
        """Join the parts.

        Args:
            store: Where the attempts rest.
            config: How jobs are treated.
            reached_us: Gives, by lane, until when everything that was put there has been given out.
            publish: Puts a job on the queue.
            on_change: Told of every job that was moved.
        """
        self._store = store
        self._config = config
        self._reached_us = reached_us
        self._publish = publish
        self._on_change = on_change

    async def sweep(self) -> list[CompileJob]:
        """Look once; give the jobs that were lost, as they stand now.

        Raises:
            UnavailableError: Store or bus cannot be reached; what was moved by then is given by the next look.
        """
        margin_us = int(self._config.sweep_after_s * 1e6)
        quiet_since_us = now_us() - margin_us
        reached_us = {lane: moment_us - margin_us for lane, moment_us in self._reached_us().items()}
        found: list[CompileJob] = []
        for job_id in await self._store.lost(reached_us, quiet_since_us, MAX_SWEPT):
            try:
                job = await self._store.put_again(job_id, quiet_since_us, max_deliver=self._config.max_deliver)
            except NotFoundError:  # forgotten since
                continue
            if job is None:
                continue
            extra = {"job_id": job_id, "phase": job.phase.name, "generation": job.generation}
            log.warning("compile_job_lost", extra=extra)
            found.append(job)
            self._on_change(job)
            if job.phase is JobPhase.QUEUED:
                await self._publish(job)
        return found
