"""Decisions as a mesh makes them, for tests that make their own."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from esper.blueprints import default_registry
from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.core.morphable import MorphableModel


def add_seed(model: MorphableModel, layer: str, template: str, **changes: Any) -> AdaptationDecision:
    """Give an actionable decision to add a seed of a template at a layer; ``changes`` replace single fields."""
    blueprint = default_registry().create_blueprint(template)
    fields: dict[str, Any] = {
        "adaptation_id": f"a{uuid.uuid4().hex}",
        "run_id": "r",
        "state_sequence": 1,
        "epoch": 0,
        "adaptation_type": AdaptationType.ADD_SEED,
        "layer": layer,
        "seed_index": 0,
        "blueprint_id": blueprint.id,
        "confidence": 0.9,
        "urgency": 0.9,
        "curve_state": CurveState.PLATEAU,
        "actionable": True,
        "created_at": datetime.now(UTC),
        "blueprint": blueprint,
        "site": model.kasmina_layers[layer].site if layer else None,
    }
    return AdaptationDecision(**(fields | changes))
