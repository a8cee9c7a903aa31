"""Stage 7: seeds are measured while they blend in; checkpoints restore a run."""

from __future__ import annotations

from pathlib import Path

from esper.blueprints.registry import default_registry
from esper.contracts.lifecycle import SeedLifecycleState
from esper.recovery import CheckpointManager, ComponentState, ComponentType
from esper.services.tamiyo.performance_tracker import PerformanceTracker
from tests.acceptance.conftest import fresh_net
from tests.acceptance.test_stage_3_decision import packet


async def test_the_tracker_gives_metrics_of_a_seed() -> None:
    tracker = PerformanceTracker()
    for sequence in range(1, 8):
        tracker.observe_packet(packet(sequence, 1.0 / sequence))
    metrics = await tracker.get_seed_metrics("layer1", seed_idx=0)
    assert metrics.accuracy_trend is not None or metrics.activation_entropy is not None
    assert metrics.activation_entropy > 0


def test_a_seed_blends_in_with_alpha_between_zero_and_one() -> None:
    wrapped, batch = fresh_net()
    layer = wrapped.layer1
    layer.germinate(0, default_registry().create_blueprint("lora").ir)
    layer.transition(0, SeedLifecycleState.EVALUATING)
    layer.set_alpha(0, 0.3)
    lifecycle_states, alpha_blend = layer.state_layout.lifecycle_states, layer.state_layout.alpha_blend
    assert lifecycle_states[0] == SeedLifecycleState.EVALUATING
    assert 0 < alpha_blend[0] < 1
    assert layer(batch).shape == (32, 16)


async def test_a_checkpoint_restores_what_was_saved(tmp_path: Path) -> None:
    checkpoint_manager = CheckpointManager(tmp_path)
    wrapped, _ = fresh_net()
    components = {
        ComponentType.TOLARIA: ComponentState(component=ComponentType.TOLARIA, state_data={"epoch": 17}),
        ComponentType.KASMINA: ComponentState(
            component=ComponentType.KASMINA, state_data={"model": dict(wrapped.state_dict())}
        ),
    }
    checkpoint_id = await checkpoint_manager.create_checkpoint(components)
    restored = await checkpoint_manager.restore_checkpoint(checkpoint_id)
    assert restored.components[ComponentType.TOLARIA].state_data["epoch"] == 17
    loaded = restored.components[ComponentType.KASMINA].state_data["model"]
    assert all(value.equal(loaded[key]) for key, value in wrapped.state_dict().items())
