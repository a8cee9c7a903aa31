"""Checkpoints: durable, incremental, integrity-checked."""

from esper.recovery.checkpoints import (
    CheckpointConfig,
    CheckpointManager,
    ComponentState,
    ComponentType,
    RestoredCheckpoint,
)

__all__ = ["CheckpointConfig", "CheckpointManager", "ComponentState", "ComponentType", "RestoredCheckpoint"]
