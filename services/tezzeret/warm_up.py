"""The start of a compile worker: torch imported and one template compiled, so that the first job waits for nothing."""

from __future__ import annotations

import torch

from esper.blueprints.registry import default_registry
from esper.contracts.kernel import CompileTarget
from esper.services.tezzeret.config import CompilerConfig
from esper.services.tezzeret.default_sites import DEFAULT_SITES
from esper.services.tezzeret.worker import TezzeretWorker


def warm_worker(config: CompilerConfig) -> TezzeretWorker:
    """Give a worker that has compiled the cheapest template to both trainable targets; torch gets one thread."""
    torch.set_num_threads(1)
    worker = TezzeretWorker(config)
    site = DEFAULT_SITES[0]
    cheapest = default_registry().for_site(site)[0]
    for target in (CompileTarget.TORCHSCRIPT, CompileTarget.EXPORTED_PROGRAM):
        worker.compile_blueprint(cheapest, site=site, target=target)
    return worker
