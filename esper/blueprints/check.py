"""The blueprint contract test: may this graph be used at this site at all?

A seed must give exactly nothing at birth and yet be able to learn: a zero-initialised convolution in front of a norm
and a ReLU passes every shape test and is dead for ever. So each check runs the module and measures:

    identity     delta at birth, relative to h                              at most 1e-6
    learning     change of delta after one optimizer step                   above 1e-12
    gradients    weakest parameter's largest gradient in two steps,
                 relative to the strongest parameter's                      above 1e-10
    batch        delta has h's shape for batches of 1, 2 and 5              exact
    positions    the same for more positions, where the graph allows it     exact
    parameters   against the declared cost                                  equal
    flops        of one example against the declared cost                   equal
    finite       outputs, gradients on ordinary, zero and large inputs      no exception
    determinism  two builds from one seed, two runs of one module           equal bits

Learning and gradients are measured in float64, where a gradient that is zero by algebra (the bias of an attention's
keys) stays below 1e-14 and can't pass for a small one. ``finite`` runs once per dtype asked for; bfloat16 and float16
run under autocast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.build import build_plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.plan import Plan, plan
from esper.blueprints.types import larger_site
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import InvalidBlueprintError
from esper.contracts.kernel import ValidationCheck

IDENTITY_LIMIT: Final = 1e-6
"""Largest delta at birth, relative to the largest element of h."""
GRADIENT_LIMIT: Final = 1e-10
"""Smallest gradient that counts, relative to the strongest parameter's."""
LEARNING_LIMIT: Final = 1e-12
"""Smallest change of the output that counts, relative to h."""

_BATCH: Final = 4
_BATCHES: Final = (1, 2, 5)
_STEP_SIZE: Final = 0.02
_LARGE: Final = 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """Outcome of the blueprint contract test."""

    checks: tuple[ValidationCheck, ...]
    """Rows in the order they ran."""

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Do nothing when every row passed.

        Raises:
            InvalidBlueprintError: A row failed; the message names each with its figure.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            rows = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            raise InvalidBlueprintError(f"blueprint must pass its contract test, failed {rows}", parameter="ir")


def check_blueprint(
    ir: BlueprintIR, site: Site, *, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), seed: int = 0
) -> CheckReport:
    """Run the contract test of a blueprint at a site, on the CPU; torch's random state is left alone.

    Raises:
        InvalidBlueprintError: The graph is not legal at the site, so there is nothing to run.
    """
    layout = plan(ir, site)
    probe = _Probe(layout, seed)
    rows = [probe.identity(), *probe.learning(), probe.batches(), probe.positions()]
    rows += [*probe.cost(), *(probe.finite(dtype) for dtype in dtypes), probe.determinism()]
    return CheckReport(checks=tuple(rows))


def measured_flops(run: Callable[[], object]) -> int:
    """Give the operations of matrix products, convolutions and attention that a call performs."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu_attention: _attention_flops})
    with counter:
        run()
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Count the two products of a (batch, heads, length, features) attention, which torch leaves out on the CPU."""
    return 4 * math.prod(query) * key[-2]


class _Probe:
    """The module under test with its inputs; each method gives one row or two, and ``learning`` must come early.

    ``module`` stays as it was born; ``trained`` (float64) and ``twin`` (float32) take two steps, so that what is
    measured on them is not the zero of birth.
    """

    def __init__(self, layout: Plan, seed: int) -> None:
        self.layout = layout
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.module = build_plan(layout, seed=seed)
        self.trained = build_plan(layout, seed=seed).double()
        self.twin = build_plan(layout, seed=seed)

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32, site: Site | None = None) -> list[torch.Tensor]:
        site = site or self.layout.site
        shapes = (site.input_shape, site.output_shape)
        return [torch.randn(batch, *shape, generator=self.generator, dtype=dtype) for shape in shapes]

    def identity(self) -> ValidationCheck:
        x, h = self.inputs(_BATCH)
        with torch.no_grad():
            figure = float(self.module(x, h).abs().max() / h.abs().max())
        return _row("identity", figure, IDENTITY_LIMIT, figure <= IDENTITY_LIMIT, "largest delta at birth over h")

    def learning(self) -> list[ValidationCheck]:
        x, h = self.inputs(_BATCH, torch.float64)
        target = torch.randn(h.shape, generator=self.generator, dtype=h.dtype)
        parameters = dict(self.trained.named_parameters())
        strongest = dict.fromkeys(parameters, 0.0)
        finite = True
        before, after = self.trained(x, h).detach(), h
        for step in range(2):
            gradients = _gradients(self.trained, x, h, target)
            finite = finite and all(math.isfinite(size) for size in _sizes(gradients).values())
            scale = max(_sizes(gradients).values(), default=0.0) or 1.0
            for name, size in _sizes(gradients).items():
                strongest[name] = max(strongest[name], size / scale)
            _descend(parameters, gradients)
            if step == 0:
                after = self.trained(x, h).detach()
        self.twin.load_state_dict(self.trained.state_dict())
        change = float((after - before).abs().max() / h.abs().max())
        weakest = min(strongest, key=lambda name: strongest[name], default=None)
        figure = strongest[weakest] if weakest is not None else 0.0
        detail = "no parameters" if weakest is None else f"weakest parameter {weakest}"
        learns = math.isfinite(change) and change > LEARNING_LIMIT
        return [
            _row("learning", change, LEARNING_LIMIT, learns, "change of delta over h after one step"),
            _row("gradients", figure, GRADIENT_LIMIT, finite and figure > GRADIENT_LIMIT, detail),
        ]

    def batches(self) -> ValidationCheck:
        return self._shapes("batch", self.layout.site, _BATCHES)

    def positions(self) -> ValidationCheck:
        site = larger_site(self.layout.site)
        if site is None:
            return _row("positions", None, None, True, "the site has no positions")
        if not self.layout.is_size_free:
            return _row("positions", None, None, True, "the graph is tied to the site's positions")
        return self._shapes("positions", site, (2,))

    def _shapes(self, name: str, site: Site, batches: Sequence[int]) -> ValidationCheck:
        wrong: list[str] = []
        for batch in batches:
            x, h = self.inputs(batch, torch.float64, site)
            try:
                with torch.no_grad():
                    got = tuple(self.trained(x, h).shape)
            except (RuntimeError, ValueError, IndexError) as error:
                wrong.append(f"batch {batch}: {str(error).splitlines()[0]}")
                continue
            if got != tuple(h.shape):
                wrong.append(f"batch {batch}: {got} for {tuple(h.shape)}")
        return _row(name, float(len(wrong)), 0.0, not wrong, "; ".join(wrong) or "delta has the shape of h")

    def cost(self) -> list[ValidationCheck]:
        declared = plan_cost(self.layout)
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        x, h = self.inputs(1)
        with torch.no_grad():
            flops = measured_flops(lambda: self.module(x, h))
        return [
            _row("parameters", parameters, declared.parameters, parameters == declared.parameters, "counted", "1"),
            _row("flops", flops, declared.flops, flops == declared.flops, "counted for one example", "1"),
        ]

    def finite(self, dtype: torch.dtype) -> ValidationCheck:
        wrong: list[str] = []
        for name, factor in (("random", 1.0), ("zero", 0.0), ("large", _LARGE)):
            x, h = ((factor * tensor).requires_grad_() for tensor in self.inputs(2))
            with _autocast(dtype):
                delta = self.twin(x, h)
            wanted = [*self.twin.parameters(), x, h]
            gradients = torch.autograd.grad(delta.float().mean(), wanted, allow_unused=True)
            tensors = [delta, *filter(torch.is_tensor, gradients)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                wrong.append(name)
        label = str(dtype).removeprefix("torch.")
        detail = f"not finite on {', '.join(wrong)} inputs" if wrong else "random, zero and large inputs"
        return _row(f"finite_{label}", float(len(wrong)), 0.0, not wrong, detail)

    def determinism(self) -> ValidationCheck:
        twin = build_plan(self.layout, seed=self.seed)
        pairs = zip(self.module.parameters(), twin.parameters(), strict=True)
        same = all(torch.equal(mine, other) for mine, other in pairs)
        x, h = self.inputs(_BATCH, torch.float64)
        with torch.no_grad():
            same = same and torch.equal(self.trained(x, h), self.trained(x, h))
        return _row("determinism", None, None, same, "two builds and two runs, bit by bit")


def _gradients(
    module: fx.GraphModule, x: torch.Tensor, h: torch.Tensor, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Give the gradients of a regression to a random target; a parameter that is not reached has none."""
    named = dict(module.named_parameters())
    if not named:
        return {}
    loss = ((h + module(x, h) - target) ** 2).mean()
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: found[index] for index, name in enumerate(named) if torch.is_tensor(found[index])}


def _sizes(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(gradient.abs().max()) for name, gradient in gradients.items()}


def _descend(parameters: dict[str, nn.Parameter], gradients: dict[str, torch.Tensor]) -> None:
    """Take one step of sign descent: the size of a gradient does not matter, a zero one moves nothing."""
    with torch.no_grad():
        for name, gradient in gradients.items():
            parameters[name].sub_(_STEP_SIZE * gradient.sign())


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    if dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            yield
    else:
        yield


def _row(
    name: str, figure: float | None, limit: float | None, passed: bool, detail: str, unit: str = ""
) -> ValidationCheck:
    row = ValidationCheck(name=name, figure=figure, limit=limit, unit=unit, passed=passed, detail=detail)
    return row if passed or figure is None else replace(row, detail=f"{detail} (figure {figure:g}, limit {limit:g})")
