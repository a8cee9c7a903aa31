"""G2, its cost: the effects of eight rivals by fused passes, over the same with one configuration after the other.

Both give a loss for every control example and each of nine configurations: all rivals off, and each alone on. They are
held against each other before anything is timed.
"""

from __future__ import annotations

import time
import warnings
from typing import Final

import torch
from torch import Tensor, nn

import esper
from bench.growth_hosts import FamilyName, make_cell, make_net
from bench.growth_tasks import TaskName, load
from bench.hosts import HOSTS
from bench.paired import time_pair
from bench.report import Figure, Result, at_most
from esper.blueprints import default_registry
from esper.contracts.errors import InvalidStateError
from esper.core.wrap import SkippedLayersWarning
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.overrides import SeedRef

GOAL: Final = at_most(1.0)
NUM_RIVALS: Final = 8
CELLS: Final[tuple[tuple[TaskName, FamilyName], ...]] = (
    ("digits", "mlp"),
    ("mnist1d", "mlp"),
    ("digits", "cnn"),
    ("mnist1d", "cnn"),
    ("digits", "transformer"),
    ("mnist1d", "transformer"),
)
_MIN_ROUNDS: Final = 8
_TOLERANCE: Final = 1e-4


def measure(*, quick: bool) -> Result:
    """Measure the hosts of the growth measure on their control splits, and the larger ones of K1."""
    torch.set_num_threads(1)
    seconds = 1.0 if quick else 10.0
    figures = []
    for task, family in CELLS:
        cell, control = make_cell(task, family), load(task).control
        net = make_net(cell, cell.host, 0)
        figures.append(ratio(f"{cell.name}, {len(control)} examples", net, control.inputs, control.targets, seconds))
    for host in () if quick else HOSTS:
        x = host.batch()
        figures.append(ratio(f"{host.name}, {len(x)} examples", host.make(), x, torch.zeros(len(x)).long(), seconds))
    return Result(name="g2_counterfactual", figures=tuple(figures), notes=_NOTES)


def ratio(name: str, net: nn.Module, inputs: Tensor, targets: Tensor, seconds: float) -> Figure:
    """Give the figure of one host.

    Raises:
        InvalidStateError: Both ways give other losses.
    """
    model, rivals = with_rivals(net, inputs)
    off = dict.fromkeys(rivals, 0.0)
    configurations = [off, *({**off, ref: 1.0} for ref in rivals)]

    def run(max_rows: int | None = None) -> Tensor:
        return evaluate_configurations(model, [(inputs, targets)], loss_rows, configurations, max_rows=max_rows)

    apart = float((run() - run(1)).abs().max())
    if not apart <= _TOLERANCE:
        raise InvalidStateError(f"{name}: both ways must give the same losses within {_TOLERANCE}, got {apart}")
    times = time_pair(run, lambda: run(1), seconds=seconds, warmup=1, min_rounds=_MIN_ROUNDS, clock=time.thread_time_ns)
    return Figure(name=name, value=times.ratio, unit="ratio", goal=GOAL, spread=times.spread, certain=times.certain)


def with_rivals(net: nn.Module, inputs: Tensor) -> tuple[esper.MorphableModel, list[SeedRef]]:
    """Give the wrapped network with so many adapters that add something, spread over its layers in turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayersWarning)
        model = esper.wrap(net, telemetry=False)
    with torch.no_grad():
        model.eval()(inputs)
    ir = default_registry().create_blueprint("bottleneck_adapter").ir
    layers = [layer for layer in model.kasmina_layers.values() if layer.site is not None]
    places = [SeedRef(layer.layer_name, index) for index in range(layers[0].num_seeds) for layer in layers]
    for number, ref in enumerate(places[:NUM_RIVALS]):
        layer = model.kasmina_layer(ref.layer)
        layer.germinate(ref.seed_index, ir, random_seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in layer.seed_parameters(ref.seed_index):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, places[:NUM_RIVALS]


def loss_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    """Give the loss of each example: cross-entropy of logits, mean square of anything larger."""
    if outputs.dim() > 2:
        return outputs.flatten(1).square().mean(1)
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


_NOTES: Final = (
    "Eight bottleneck adapters, the layers in turn; one batch: the control split, as growth measures it.",
    "Where the shapes say that fusing does not pay, both sides are the same code and the ratio is 1 but for noise.",
    "Processor time of the training thread, one thread.",
    "'holds' compares the 99 % interval of the median with the goal; 'unsure' where the goal lies inside it.",
)
