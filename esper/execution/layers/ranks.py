"""Models spread over ranks: a seed must be part of what the ranks agree on before it takes part, and while it does.

``DistributedDataParallel`` averages the gradients of the parameters it found when it was made, and ``fully_shard``
shards those. Parameters that come later would be trained by each rank for itself, and the ranks drift apart unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from esper.contracts.errors import InvalidStateError
from esper.execution.spread import is_sharded

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

_known: Final[WeakKeyDictionary[DistributedDataParallel, frozenset[int]]] = WeakKeyDictionary()


def world_size() -> int:
    """Processes that train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_averaged() -> bool:
    """Whether this is a pass of ``DistributedDataParallel`` whose gradients several ranks average."""
    parallel = DistributedDataParallel._active_ddp_module
    return parallel is not None and parallel.process_group.size() > 1


def require_synchronised(layer: SeedHolder, seeds: Iterable[Seed]) -> None:
    """Check, inside a pass of ``DistributedDataParallel``, that it averages the gradients of these seeds.

    Each breaker is told which ranks have a say in cutting its seed off.

    Raises:
        InvalidStateError: A seed was planted after it was made, and there is more than one rank.
    """
    parallel = DistributedDataParallel._active_ddp_module
    if parallel is None or parallel.process_group.size() == 1:
        for seed in seeds:
            if is_sharded(seed):
                seed.breaker.ranks = distributed.group.WORLD
        return
    known = _known.get(parallel)
    if known is None:
        known = _known[parallel] = frozenset(id(parameter) for parameter in parallel._module_parameters)
    for seed in seeds:
        if any(id(parameter) not in known for parameter in seed.parameters() if parameter.requires_grad):
            raise InvalidStateError(
                f"seed {seed.index} of layer {layer.layer_name!r} must be planted before DistributedDataParallel is "
                "made, got one planted later, whose gradients it does not average: make a new "
                "DistributedDataParallel(model) after growing"
            )
        seed.breaker.ranks = parallel.process_group


def require_whole(layer: SeedHolder) -> None:
    """Check that a layer's parameters are not sharded.

    Raises:
        InvalidStateError: ``fully_shard`` has been there.
    """
    if world_size() > 1 and _is_sharded(layer):
        raise InvalidStateError(
            f"layer {layer.layer_name!r} must hold its parameters whole to be grown, got sharded ones: "
            "grow the model first, then fully_shard it"
        )


def _is_sharded(layer: SeedHolder) -> bool:
    """Whether ``fully_shard`` manages the layer; one without parameters shows it by what stands around it."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    own = list(layer.parameters(recurse=False))
    if own:
        return any(isinstance(parameter, DTensor) for parameter in own)
    host = layer._kasmina.skips.host
    units = [module for module in host.modules() if isinstance(module, FSDPModule)]
    if any(layer is inside for unit in units for inside in unit.modules()):
        return True
    of_units = {id(parameter) for unit in units for parameter in unit.parameters()}
    # Sharded, but by no unit inside the host: the model around the host is the unit, and the layer belongs to it.
    return any(isinstance(parameter, DTensor) and id(parameter) not in of_units for parameter in host.parameters())
