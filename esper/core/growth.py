"""How a run grows: the settings of incubation, graft, evaluation and price."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Final, Literal, get_args

from esper.blueprints.tags import unknown_tags
from esper.contracts.errors import InvalidInputError
from esper.contracts.tag_expression import TagExpression, parse_tags
from esper.core.blending import BlendKind, BlendSchedule

IncubationChoice = Literal["auto", "damped", "trial", "local"]
UndoneChoice = Literal["change", "snapshot"]
_WAYS: Final = get_args(IncubationChoice)
_UNDONE: Final = get_args(UndoneChoice)
_PRICES: Final = ("price_per_host_share", "price_per_host_flops", "price_per_host_latency")


class UnknownTagWarning(UserWarning):
    """An expression names a tag that nothing has of what ships with Esper: somebody's own, or a mistake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """Settings of the seed orchestrator; spans in epochs of the run.

    Raises:
        InvalidInputError: A value breaks its rule; the message names it.
    """

    incubation_epochs: int = 4
    """Epochs a seed learns behind the host's back before it is grafted, at least 1."""
    race_rounds: int = 2
    """Times in which the seeds of one race are held against each other while they learn alone, at least 1."""
    incubation_learning_rate: float = 3e-3
    """Learning rate of a seed while it learns alone (AdamW), > 0."""
    data_dependent_birth: bool = True
    """Whether a seed's first weights are fitted to what its site carries before its first step
    (``esper.execution.birth``): no unit dead, features of unit variance, its delta still 0."""
    incubation_way: IncubationChoice = "auto"
    """How a seed learns alone: on a trial branch with the host damped, on a plain one, by a local regression, or by
    the one that ``incubation_cost`` has room for."""
    incubation_cost: float = 0.5
    """Most that a seed that learns alone may add to a training step, as a share of the FLOPs that the step will have
    once it is grafted, > 0: at 0.5 it learns from half of each batch, beside a damped host."""
    graft_epochs: int = 2
    """Epochs of the ramp from alpha 0 to ``hold_alpha``, at least 1."""
    graft_rate: float = 1.0
    """Share of its group's step that a grafted seed takes: its learning rate over its layer's, > 0."""
    graft_tail: float = 1.0 / 3.0
    """Last share of a grafted seed's planned steps in which its step size falls to 1 %, in [0, 1]; 0 lets it stay.
    Without ``SessionConfig.planned_epochs`` it stays."""
    blend: BlendKind = "cosine"
    """Shape of the ramp."""
    hold_alpha: float = 0.99
    """Alpha at which the effect is measured, in (0, 1)."""
    max_looks: int = 5
    """Times the effect is measured, one epoch apart, before a seed that is not proven goes, at least 1; one that helps
    beyond doubt, and by more than its price if not yet that beyond doubt, has twice as many."""
    confidence_level: float = 0.95
    """Coverage of the interval over all looks together, in (0.5, 1)."""
    price_per_host_share: float = 0.02
    """Price of as many parameters as the host has, as a share of the control loss, finite and >= 0."""
    price_per_host_flops: float = 0.001
    """Price of as many forward FLOPs as the host's, as a share of the control loss, finite and >= 0. Small beside that
    of parameters: a convolution on a host of dense layers costs twenty times its FLOPs."""
    price_per_host_latency: float = 0.0
    """Price of as much time as the host's forward pass takes, as a share of the control loss, finite and >= 0. It is
    measured once the kernel is there; with a price above 0, equal runs need not be equal."""
    cull_epochs: int = 1
    """Epochs in which the share of a seed that was blended in, or kept, falls to 0 once it is to go, >= 0; 0 takes it
    out between two steps, as a veto does whatever is set here."""
    recheck_epochs: int = 8
    """Epochs after which the effect of a kept seed is measured again, and so on, >= 0; 0 never does."""
    embargo_epochs: int = 2
    """Epochs a seed's place rests after a cull, >= 0."""
    max_open: int = 2
    """Adaptations under way at once, at least 1, a race counting as one; never two of them in one layer."""
    loading_timeout_s: float = 60.0
    """Seconds after which a kernel that has not come is given up, > 0."""
    max_kernel_latency_ms: float = 1000.0
    """Milliseconds a forward pass of a kernel may take, on average; a slower seed is removed at the next gate, > 0."""
    settle_epochs: int = 2
    """Epochs after which a change of the optimizer's settings is judged, at least 1."""
    undone: UndoneChoice = "change"
    """What a change of the optimizer's settings that is not shown to help takes back with it. ``"change"``: what was
    changed, and no more; the weights keep what they learned since. ``"snapshot"``: weights, buffers and the optimizer's
    state too, as they were when it began, so that nothing of the trial is left in the network. Its steps are lost
    then: they stay counted, schedulers stand where they stood, their examples were seen. It costs a copy of weights
    and state during a trial."""
    allowed_blueprints: str = ""
    """Expression over tags that a blueprint must keep to stand in the run, whoever asks for it: ``"dense"``,
    ``"!conv & !attention"``, ``"linear & !widening"``; empty lets every one stand. What can be read off the graph is
    read off it (`esper.blueprints.tags`). A seed that stands already is left alone."""

    def __post_init__(self) -> None:
        rules = (
            ("incubation_epochs", "be at least 1 epoch", self.incubation_epochs >= 1),
            ("race_rounds", "be at least 1", self.race_rounds >= 1),
            ("incubation_learning_rate", "be > 0", self.incubation_learning_rate > 0),
            ("incubation_way", f"be one of {', '.join(_WAYS)}", self.incubation_way in _WAYS),
            ("incubation_cost", "be > 0", self.incubation_cost > 0),
            ("graft_epochs", "be at least 1 epoch", self.graft_epochs >= 1),
            ("graft_rate", "be finite and > 0", 0 < self.graft_rate < float("inf")),
            ("graft_tail", "lie in [0, 1]", 0 <= self.graft_tail <= 1),
            ("hold_alpha", "lie in (0, 1)", 0 < self.hold_alpha < 1),
            ("max_looks", "be at least 1", self.max_looks >= 1),
            ("confidence_level", "lie in (0.5, 1)", 0.5 < self.confidence_level < 1),
            *((name, "be finite and >= 0", 0 <= getattr(self, name) < math.inf) for name in _PRICES),
            ("cull_epochs", "be >= 0 epochs", self.cull_epochs >= 0),
            ("recheck_epochs", "be >= 0 epochs", self.recheck_epochs >= 0),
            ("embargo_epochs", "be >= 0 epochs", self.embargo_epochs >= 0),
            ("max_open", "be at least 1", self.max_open >= 1),
            ("loading_timeout_s", "be > 0 s", self.loading_timeout_s > 0),
            ("max_kernel_latency_ms", "be > 0 ms", self.max_kernel_latency_ms > 0),
            ("settle_epochs", "be at least 1 epoch", self.settle_epochs >= 1),
            ("undone", f"be one of {', '.join(_UNDONE)}", self.undone in _UNDONE),
        )
        for name, rule, holds in rules:
            if not holds:
                raise InvalidInputError.of(f"growth.{name}", rule, getattr(self, name))
        unknown = unknown_tags(self.blueprint_rule)
        if unknown:
            message = f"growth.allowed_blueprints names {', '.join(unknown)}: no operator or template of Esper's has it"
            warnings.warn(message, UnknownTagWarning, stacklevel=3)

    @property
    def blueprint_rule(self) -> TagExpression | None:
        """``allowed_blueprints`` as it was read; ``None`` lets every blueprint stand."""
        return parse_tags(self.allowed_blueprints, parameter="growth.allowed_blueprints")

    def ramp(self, steps_per_epoch: int) -> BlendSchedule:
        """Give the way of a graft's alpha from 0 to ``hold_alpha``."""
        return BlendSchedule(kind=self.blend, end=self.hold_alpha, num_steps=self.graft_epochs * steps_per_epoch)
