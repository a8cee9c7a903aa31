"""Stage 3: Tamiyo decides on state packets, and selects seeds by Thompson sampling."""

from __future__ import annotations

from datetime import UTC, datetime

from esper.client import EsperClient
from esper.contracts.run import BudgetStatus, RunPhase, SystemStatePacket
from esper.services.tamiyo.calibration import RAW
from esper.services.tamiyo.seed_selection import SeedSelector
from tests.acceptance.conftest import GrownRun, fresh_net

TYPES = {"add_seed", "remove_seed", "modify_architecture", "optimize_parameters"}


def packet(sequence: int, control_loss: float) -> SystemStatePacket:
    wrapped, _ = fresh_net()
    return SystemStatePacket(
        run_id="acceptance-stage-3",
        sequence=sequence,
        phase=RunPhase.TRAINING,
        epoch=sequence,
        step=40 * sequence,
        train_loss=control_loss * 0.95,
        control_loss=control_loss,
        control_loss_se=0.01,
        layers=tuple(layer.layer_status() for layer in wrapped.kasmina_layers.values()),
        budget=BudgetStatus(max_added_parameters=5000),
        host_parameters=1210,
        current_parameters=1210,
        planned_epochs=40,
        created_at=datetime.now(UTC),
    )


def test_tamiyo_analyzes_a_state(client: EsperClient) -> None:
    tamiyo_client = client.tamiyo
    for sequence in range(1, 13):
        system_state = packet(sequence, max(0.3, 1.5 * 0.6**sequence))
        decision = tamiyo_client.analyze(system_state)
        assert decision.adaptation_type in TYPES
        assert 0 <= decision.confidence <= 1
        assert 0 <= decision.urgency <= 1
        assert decision.evidence
        assert decision.explanation
    assert tamiyo_client.analyze(packet(12, 0.3)) == decision, "the same run and sequence give the same decision"


def test_on_a_plateau_tamiyo_asks_to_grow(grown_run: GrownRun, client: EsperClient) -> None:
    decisions = list(client.tamiyo.list_decisions(grown_run.report.run_id))
    asked = [decision for decision in decisions if decision.actionable]
    assert any(decision.adaptation_type == "add_seed" for decision in asked)
    assert all(decision.urgency >= 0.6 for decision in asked)
    for decision in asked:
        figures = {one.name: one.value for one in decision.evidence}
        # Decision 0014: the threshold is held against the belief, confidence is what came of decisions like this one.
        belief = decision.confidence if decision.adaptation_type == "remove_seed" else figures[RAW]
        assert belief >= 0.7
        assert 0 < decision.confidence < 1


def test_a_seed_is_selected_with_expected_reward_and_exploration_bonus() -> None:
    seed_selector = SeedSelector(random_seed=0)
    layer_name, performance_data = "layer1", {0: [0.02, 0.03], 1: [], 2: [-0.01]}
    selected = seed_selector.select_seed_for_adaptation(layer_name, performance_data)
    assert selected.seed_index in performance_data
    assert selected.exploration_bonus > 0
    assert selected.expected_reward > 0
