"""What a seed brings: the same held-out examples with it on and off, paired, with an interval.

    symbol   meaning                                                             shape
    l_ci     loss of example i under configuration c (which seeds are at which alpha)   (configurations, examples)
    d_i      l of example i with the seed off minus on; positive means the seed helps   (examples,)

Interval: mean(d) +- t * sd(d) / sqrt(n), t the quantile of Student's t with n - 1 degrees of freedom. Pairing takes the
spread between examples out of the comparison, which is most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from esper.contracts.errors import InvalidInputError
from esper.contracts.run import Contribution
from esper.execution.fused import FusedPasses, LossRows
from esper.execution.overrides import GrowingModel, SeedRef, evaluating, seeds_at
from esper.execution.student import student_quantile


def evaluate_configurations(
    model: GrowingModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: LossRows,
    configurations: Sequence[Mapping[SeedRef, float]],
    *,
    max_rows: int | None = None,
) -> Tensor:
    """Give the loss of every example under every configuration, float64 on the CPU, shape (configurations, examples).

    A configuration names the alphas of some live seeds; the others stay as they are. Runs in eval mode without
    gradients; parameters, buffers, modes and random streams are untouched to the bit.

    Configurations go through the model together where that gives what they give one after the other, which is checked
    in every call, and where it pays, which shapes decide. ``max_rows`` bounds examples times configurations of a pass
    instead; 1 measures one after the other.

    Raises:
        InvalidInputError: There is no batch, no configuration, or a loss gives something else than a row per example.
        NotFoundError, InvalidStateError: A configuration names a seed where no kernel stands.
    """
    if not configurations:
        raise InvalidInputError.of("configurations", "hold at least one", configurations)
    fused = FusedPasses(model, configurations, loss=loss, max_rows=max_rows)
    parts: list[Tensor] = []
    with evaluating(model):
        for inputs, targets in batches:
            losses = fused.losses(inputs, targets)
            if losses is None:
                losses = _one_by_one(model, inputs, targets, loss, configurations)
            parts.append(losses.double().cpu())
    if not parts:
        raise InvalidInputError.of("batches", "hold at least one batch", "none")
    return torch.cat(parts, dim=1)


def _one_by_one(
    model: GrowingModel,
    inputs: Tensor,
    targets: Tensor,
    loss: LossRows,
    configurations: Sequence[Mapping[SeedRef, float]],
) -> Tensor:
    rows = []
    for configuration in configurations:
        with seeds_at(model, configuration):
            losses = loss(model(inputs), targets)
        if losses.shape != (len(inputs),):
            raise InvalidInputError.of("loss", f"give shape ({len(inputs)},)", tuple(losses.shape))
        rows.append(losses)
    return torch.stack(rows)


def measure_contribution(
    model: GrowingModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: LossRows,
    *,
    layer: str,
    seed_index: int,
    alpha: float = 1.0,
    confidence_level: float = 0.95,
) -> Contribution:
    """Give the effect of one live seed at ``alpha`` against 0, all other seeds as they stand.

    Raises:
        InvalidInputError: There are fewer than two examples.
        NotFoundError, InvalidStateError: No kernel stands there.
    """
    ref = SeedRef(layer, seed_index)
    off, on = evaluate_configurations(model, batches, loss, [{ref: 0.0}, {ref: alpha}])
    return paired_interval(off - on, confidence_level=confidence_level)


def paired_interval(differences: Tensor, *, confidence_level: float = 0.95) -> Contribution:
    """Give the mean of paired differences with its t-interval.

    Raises:
        InvalidInputError: There are fewer than two differences, or the level is not within (0, 1).
    """
    if differences.ndim != 1 or len(differences) < 2:
        raise InvalidInputError.of("differences", "hold at least two examples in one dimension", differences.shape)
    if not 0.0 < confidence_level < 1.0:
        raise InvalidInputError.of("confidence_level", "be within (0, 1)", confidence_level)
    values = differences.double()
    count = len(values)
    mean = float(values.mean())
    reach = student_quantile(0.5 + confidence_level / 2.0, count - 1) * float(values.std()) / math.sqrt(count)
    return Contribution(
        estimate=mean,
        low=mean - reach,
        high=mean + reach,
        confidence_level=confidence_level,
        num_examples=count,
    )
