"""K6: how long a training step is held up by growing, and whether a grown model comes back from a file to the bit.

Held up means: the time that the training thread spends in the call, over the median time of one training step of the
same host. A blueprint that has stood at such a site before is told apart from one that is new there, because its
shapes are checked once only.
"""

from __future__ import annotations

import io
import time
from typing import Final

import torch

import esper
from bench.bits import differing_values
from bench.hosts import HOSTS, Host
from bench.k1_dormant import training_call
from bench.k2_active import grown_model
from bench.paired import Call, median_interval, no_collector, percentile, spread
from bench.report import Figure, Goal, Result, Spread
from esper.blueprints import default_registry
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution import executor

ACTS: Final = ("germinate, new", "germinate, known", "graft", "cull")


def measure(*, quick: bool) -> Result:
    """Grow and cull on every host, then save and load it."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 40
    figures = [figure for host in HOSTS for figure in surgery_figures(host, rounds)]
    figures += [bits_figure(host) for host in HOSTS]
    return Result(name="k6_surgery", figures=tuple(figures), notes=_NOTES)


def surgery_figures(host: Host, rounds: int) -> list[Figure]:
    """Give what each act costs, in median steps of the host, and the step itself."""
    model = grown_model(host, 0)
    step = training_call(model, host.batch(), "step")
    step()
    with no_collector():
        acts = act_times(model, host.site, step, rounds)
    steps = acts.pop("a step")
    middle = percentile(steps, 50)
    figures = [Figure(name=f"{host.name}, a step", value=middle, unit="ms", spread=spread(steps))]
    for name, found in acts.items():
        ratios = [value / middle for value in found]
        certain: Spread = median_interval(ratios)
        figures.append(
            Figure(
                name=f"{host.name}, {name}",
                value=percentile(ratios, 50),
                unit="steps",
                spread=spread(ratios),
                certain=certain,
            )
        )
    return figures


def act_times(model: esper.MorphableModel, site: str, step: Call, rounds: int) -> dict[str, list[float]]:
    """Let a seed germinate, graft it and cull it, and train a step, so many times; gives milliseconds by act."""
    layer, states = model.kasmina_layer(site), SeedLifecycleState
    ir = default_registry().create_blueprint("bottleneck_adapter").ir
    found: dict[str, list[float]] = {name: [] for name in ("a step", *ACTS)}
    for _ in range(rounds):
        found["a step"].append(_ms(step))
        for name in ACTS[:2]:
            if name == ACTS[0]:
                executor.forget_passed()
            found[name].append(_ms(lambda: layer.germinate(0, ir)))
            if name == ACTS[0]:
                layer.clear_seed(0)

        def graft() -> None:
            layer.transition(0, states.EVALUATING)
            layer.set_alpha(0, 0.5)

        def cull() -> None:
            layer.set_alpha(0, 0.0)
            layer.transition(0, states.CULLED)

        found["graft"].append(_ms(graft))
        found["cull"].append(_ms(cull))
        layer.clear_seed(0)
    return found


def bits_figure(host: Host) -> Figure:
    """Give how many values of a grown model, and of what it puts out, differ after save and load by one bit or more."""
    grown, fresh = grown_model(host, 2), esper.wrap(host.make(seed=5), telemetry=False)
    file = io.BytesIO()
    torch.save(grown.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    there, back = grown.state_dict(), fresh.state_dict()
    missing = sum(value.numel() for name, value in there.items() if name not in back)
    differing = sum(differing_values(value, back[name]) for name, value in there.items() if name in back)
    with torch.no_grad():
        outputs = differing_values(grown.eval()(host.batch()), fresh.eval()(host.batch()))
    name = f"{host.name} grown, saved, loaded: values that differ"
    value = missing + differing + outputs
    return Figure(name=name, value=value, unit="values", goal=Goal(sign="==", limit=0))


def _ms(act: Call) -> float:
    start_ns = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - start_ns) / 1e6


_NOTES: Final = (
    "A bottleneck adapter. Germinate builds it, checks its shapes (where they are new) and runs it; graft makes "
    "it EVALUATING with a share; cull takes the share and frees it. Wall time, one thread.",
    "No goal is set for the times: they are paid once a growth, not once a step.",
)
