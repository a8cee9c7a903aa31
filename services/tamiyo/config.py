"""Settings of the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from esper.contracts.errors import InvalidInputError
from esper.services.tamiyo.calibration import CalibrationConfig
from esper.services.tamiyo.curve import CurveConfig
from esper.services.tamiyo.posterior import PosteriorConfig
from esper.services.tamiyo.seed_selection import SelectionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TamiyoConfig:
    """When a decision is acted on, and how much may be under way at once."""

    confidence_threshold: float = 0.7
    """Confidence before calibration from which a decision is actionable, 0 to 1."""
    urgency_threshold: float = 0.6
    """Urgency from which a decision is actionable, 0 to 1."""
    max_open_adaptations: int = 1
    """Adaptations of one run under way at once, at least 1; a race counts as one, wherever its seeds stand."""
    race_size: int = 8
    """Seeds that race for one place in the network: they learn side by side, one is grafted. As much of it as is left
    of the budget of parameters, since no race can bring more than fits; at least 1."""
    min_budget_share: float = 0.2
    """Share of the budget of parameters that must be left for another race, in [0, 1]: what fits in less is not worth
    what trying it costs."""
    first_race_epochs: int = 3
    """Epochs after which a run in which nothing was tried holds its first race though it still improves, at least 1."""
    layer_cooldown_epochs: int = 2
    """Epochs between two decisions for one layer. >= 0."""
    rest_epochs: int = 5
    """Epochs in which nothing grows after a seed or a race that came to nothing; twice as many after the next one, and
    so on, until one is kept. >= 0."""
    embargo_epochs: int = 8
    """Epochs during which a blueprint that failed at a layer is not tried there again. >= 0."""
    parameter_cooldown_epochs: int = 5
    """Epochs between two changes of the optimizer's settings. >= 0."""
    pending_epochs: int = 3
    """Epochs after which a decision the run never took up counts as lost. At least 1."""
    training_epochs: float = 5.0
    """Epochs that something grown needs to be trained and judged. > 0."""
    stretch_epochs: float = 3.0
    """Epochs over which a lasting plateau or rise becomes urgent. > 0."""
    learning_rate_factor: float = 0.5
    """Factor on the learning rate when a run is unstable or overfits, within (0, 1)."""
    weight_decay_factor: float = 2.0
    """Factor on the weight decay when a run overfits. > 0."""
    max_candidates: int = 512
    """Candidates judged for one decision, at least 1."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """Tests of the learning curve."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Prior and cooldown of seeds."""
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    """Prior of candidates."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Prior of how often decisions help."""

    def __post_init__(self) -> None:
        for name in ("confidence_threshold", "urgency_threshold", "min_budget_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidInputError.of(name, "be within [0, 1]", getattr(self, name))
        for name in ("max_open_adaptations", "race_size", "first_race_epochs", "pending_epochs", "max_candidates"):
            if getattr(self, name) < 1:
                raise InvalidInputError.of(name, "be >= 1", getattr(self, name))
        for name in ("layer_cooldown_epochs", "rest_epochs", "embargo_epochs", "parameter_cooldown_epochs"):
            if getattr(self, name) < 0:
                raise InvalidInputError.of(name, "be >= 0 epochs", getattr(self, name))
        for name in ("training_epochs", "stretch_epochs", "weight_decay_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidInputError.of(name, "be finite and > 0", getattr(self, name))
        if not 0.0 < self.learning_rate_factor < 1.0:
            raise InvalidInputError.of("learning_rate_factor", "be within (0, 1)", self.learning_rate_factor)
