"""Settings of a session."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from esper.contracts.errors import InvalidInputError
from esper.core.governor import GovernorConfig
from esper.core.growth import GrowthConfig
from esper.core.memory import CheckpointStore

_RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Settings of a session beyond its stable face.

    Raises:
        InvalidInputError: A value breaks its rule; the message names it.
    """

    run_id: str = ""
    """Name of the run, [a-z0-9][a-z0-9-]{0,63}; empty makes one from the time. The mesh takes what a new run says under
    an old name for news that is late; only a run that is taken up from its checkpoint may have the old name."""
    planned_epochs: int | None = None
    """Epochs planned; lets the policy weigh how much time is left."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """How seeds are tried."""
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    """How harm is noticed."""
    decision_wait_s: float = 0.0
    """Longest wait at the end of an epoch for that epoch's decision and kernel, so that equal seeds and data give
    equal runs wherever the services are; 0 never waits."""
    gradient_norm_interval: int = 16
    """Steps between two samples of the gradient norm, at least 1."""
    counts_flops: bool = False
    """Whether the FLOPs of growth's own work are told by phase, beside its time: they are counted operator by operator,
    which takes time itself wherever growth is at work."""
    checkpoints: CheckpointStore | None = None
    """Where checkpoints go, e.g. ``esper.recovery.CheckpointManager``; ``None`` writes none."""

    def __post_init__(self) -> None:
        if self.run_id and not _RUN_ID.fullmatch(self.run_id):
            raise InvalidInputError.of("run_id", "match [a-z0-9][a-z0-9-]{0,63}", self.run_id)
        if self.planned_epochs is not None and self.planned_epochs < 1:
            raise InvalidInputError.of("planned_epochs", "be at least 1 epoch", self.planned_epochs)
        if self.decision_wait_s < 0:
            raise InvalidInputError.of("decision_wait_s", "be >= 0 s", self.decision_wait_s)
        if self.gradient_norm_interval < 1:
            raise InvalidInputError.of("gradient_norm_interval", "be at least 1 step", self.gradient_norm_interval)

    def resolve_run_id(self) -> str:
        """Give the run's name, made from the time when none was chosen."""
        return self.run_id or f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
