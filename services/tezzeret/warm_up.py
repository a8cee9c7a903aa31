"""The first compile of a process, done before anyone waits for one: it pulls in seconds of torch's own modules."""

from __future__ import annotations

import threading

from esper.blueprints.registry import default_registry
from esper.contracts.kernel import CompileTarget

_lock = threading.Lock()
_done: set[CompileTarget] = set()


def warm_up(*targets: CompileTarget) -> None:
    """Compile the cheapest template to each target, once in a process; later calls return at once. Thread-safe."""
    from esper.services.tezzeret.default_sites import DEFAULT_SITES
    from esper.services.tezzeret.worker import TezzeretWorker

    with _lock:
        missing = [target for target in targets if target not in _done]
        if not missing:
            return
        worker = TezzeretWorker(warm=False)
        cheapest = default_registry().for_site(DEFAULT_SITES[0])[0]
        for target in missing:
            worker.compile_blueprint(cheapest, site=DEFAULT_SITES[0], target=target)
            _done.add(target)
