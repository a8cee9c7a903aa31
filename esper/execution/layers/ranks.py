"""Models spread over ranks: a seed must be part of what the ranks agree on before it takes part.

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

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder
    from esper.execution.seed import Seed

_known: Final[WeakKeyDictionary[DistributedDataParallel, frozenset[int]]] = WeakKeyDictionary()


def world_size() -> int:
    """Processes that train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def require_synchronised(layer: SeedHolder, seeds: Iterable[Seed]) -> None:
    """Check, inside a pass of ``DistributedDataParallel``, that it averages the gradients of these seeds.

    Raises:
        InvalidStateError: A seed was planted after it was made, and there is more than one rank.
    """
    parallel = DistributedDataParallel._active_ddp_module
    if parallel is None or parallel.process_group.size() == 1:
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


def require_whole(layer: SeedHolder) -> None:
    """Check that a layer's parameters are not sharded.

    Raises:
        InvalidStateError: ``fully_shard`` has been there.
    """
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in layer.parameters(recurse=False)):
        raise InvalidStateError(
            f"layer {layer.layer_name!r} must hold its parameters whole to be grown, got sharded ones: "
            "grow the model first, then fully_shard it"
        )
