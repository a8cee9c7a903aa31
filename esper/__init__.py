"""Esper: PyTorch networks that grow while they train.

The names below are the stable face; they load on first use, so that importing the package costs nothing and no part of
it pulls in the services behind :class:`Mesh` and :class:`Trainer` before they are asked for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# A forked DataLoader worker beside a busy gRPC client can crash the trainer; must be set before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from esper.contracts.errors import EsperError as EsperError
    from esper.core.budget import Budget as Budget
    from esper.core.export import export as export
    from esper.core.governor import GovernorConfig as GovernorConfig
    from esper.core.growth import GrowthConfig as GrowthConfig
    from esper.core.morphable import MorphableModel as MorphableModel
    from esper.core.report import RunReport as RunReport
    from esper.core.session import Session as Session
    from esper.core.settings import SessionConfig as SessionConfig
    from esper.core.wrap import unwrap as unwrap
    from esper.core.wrap import wrap as wrap
    from esper.services.mesh import Mesh as Mesh
    from esper.services.tolaria.trainer import Trainer as Trainer
    from esper.services.tolaria.trainer import TrainerConfig as TrainerConfig

__version__ = "0.1.0"

_HOMES = {
    "Budget": "esper.core.budget",
    "EsperError": "esper.contracts.errors",
    "GovernorConfig": "esper.core.governor",
    "GrowthConfig": "esper.core.growth",
    "Mesh": "esper.services.mesh",
    "MorphableModel": "esper.core.morphable",
    "RunReport": "esper.core.report",
    "Session": "esper.core.session",
    "SessionConfig": "esper.core.settings",
    "Trainer": "esper.services.tolaria.trainer",
    "TrainerConfig": "esper.services.tolaria.trainer",
    "export": "esper.core.export",
    "unwrap": "esper.core.wrap",
    "wrap": "esper.core.wrap",
}

__all__ = [
    "Budget",
    "EsperError",
    "GovernorConfig",
    "GrowthConfig",
    "Mesh",
    "MorphableModel",
    "RunReport",
    "Session",
    "SessionConfig",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "export",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
