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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import fx

from esper.blueprints.build import build_plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.flops import count_flops
from esper.blueprints.plan import Plan, plan
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
_POSITIONS: Final = 8
_MORE_POSITIONS: Final = 3


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

    A graph that serves every size is run on few positions, whatever the site's; its features are never cut.

    Raises:
        InvalidBlueprintError: The graph is not legal at the site, so there is nothing to run.
    """
    layout = plan(ir, site)
    probe = _Probe(layout, seed)
    rows = [probe.identity(), *probe.learning(), probe.batches(), probe.positions(), *probe.cost(), probe.determinism()]
    rows += probe.finite(dtypes)
    return CheckReport(checks=tuple(rows))


def _small(layout: Plan) -> Plan:
    """Give the plan for fewer positions where the module is the same."""
    largest = max(layout.h.positions, default=0)
    if largest <= _POSITIONS or not layout.is_size_free:
        return layout
    return layout.resized(_POSITIONS - largest) or layout


class _Probe:
    """The module under test with its inputs; each method gives one row or more, in the order of ``check_blueprint``.

    ``born`` stays as it was built; ``trained`` takes two steps, so that what is measured on it later is not the zero
    of birth.
    """

    def __init__(self, layout: Plan, seed: int) -> None:
        self.layout = layout
        self.run_on = _small(layout)
        self.generator = torch.Generator().manual_seed(seed)
        self.born = build_plan(layout, seed=seed)
        twin = build_plan(layout, seed=seed)
        pairs = zip(self.born.parameters(), twin.parameters(), strict=True)
        self.same_builds = all(torch.equal(mine, other) for mine, other in pairs)
        self.trained = twin.double()

    def inputs(self, batch: int, dtype: torch.dtype = torch.float64, site: Site | None = None) -> list[torch.Tensor]:
        site = site or self.run_on.site
        shapes = (site.input_shape, site.output_shape)
        return [torch.randn(batch, *shape, generator=self.generator, dtype=dtype) for shape in shapes]

    def identity(self) -> ValidationCheck:
        x, h = self.inputs(_BATCH, torch.float32)
        with torch.no_grad():
            figure = float(self.born(x, h).abs().max() / h.abs().max())
        return _row("identity", figure, IDENTITY_LIMIT, figure <= IDENTITY_LIMIT, "largest delta at birth over h")

    def learning(self) -> list[ValidationCheck]:
        x, h = self.inputs(_BATCH)
        target = torch.randn(h.shape, generator=self.generator, dtype=h.dtype)
        strongest: dict[str, float] = {name: 0.0 for name, _ in self.trained.named_parameters()}
        before = self.trained(x, h).detach()
        finite = _step(self.trained, (x, h, target), strongest)
        change = float((self.trained(x, h).detach() - before).abs().max() / h.abs().max())
        finite = _step(self.trained, (x, h, target), strongest) and finite
        weakest = min(strongest, key=lambda name: strongest[name], default=None)
        figure = strongest[weakest] if weakest is not None else 0.0
        detail = "no parameters" if weakest is None else f"weakest parameter {weakest}"
        learns = math.isfinite(change) and change > LEARNING_LIMIT
        return [
            _row("learning", change, LEARNING_LIMIT, learns, "change of delta over h after one step"),
            _row("gradients", figure, GRADIENT_LIMIT, finite and figure > GRADIENT_LIMIT, detail),
        ]

    def batches(self) -> ValidationCheck:
        return self._shapes("batch", self.run_on.site, _BATCHES)

    def positions(self) -> ValidationCheck:
        if not self.layout.h.positions:
            return _row("positions", None, None, True, "the site has no positions")
        larger = self.run_on.resized(_MORE_POSITIONS)
        if larger is None:
            return _row("positions", None, None, True, "the graph is tied to the site's positions")
        return self._shapes("positions", larger.site, (2,))

    def _shapes(self, name: str, site: Site, batches: Sequence[int]) -> ValidationCheck:
        wrong: list[str] = []
        for batch in batches:
            x, h = self.inputs(batch, site=site)
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
        declared, run_cost = plan_cost(self.layout), plan_cost(self.run_on)
        parameters = sum(parameter.numel() for parameter in self.born.parameters())
        x, h = self.inputs(1, torch.float32)
        with torch.no_grad():
            flops = count_flops(lambda: self.born(x, h))
        return [
            _row("parameters", parameters, declared.parameters, parameters == declared.parameters, "counted", "1"),
            _row("flops", flops, run_cost.flops, flops == run_cost.flops, "counted for one example", "1"),
        ]

    def determinism(self) -> ValidationCheck:
        x, h = self.inputs(_BATCH)
        with torch.no_grad():
            same = self.same_builds and torch.equal(self.trained(x, h), self.trained(x, h))
        return _row("determinism", None, None, same, "two builds and two runs, bit by bit")

    def finite(self, dtypes: Sequence[torch.dtype]) -> list[ValidationCheck]:
        self.trained.float()
        return [self._finite(dtype) for dtype in dtypes]

    def _finite(self, dtype: torch.dtype) -> ValidationCheck:
        factors = torch.tensor([1.0, 0.0, _LARGE])
        x, h = (
            (tensor * factors.view(-1, *(1,) * (tensor.dim() - 1))).requires_grad_()
            for tensor in self.inputs(len(factors), torch.float32)
        )
        with _autocast(dtype):
            delta = self.trained(x, h)
        gradients: Sequence[torch.Tensor | None] = ()
        if delta.requires_grad:
            wanted = [*self.trained.parameters(), x, h]
            gradients = torch.autograd.grad(delta.float().mean(), wanted, allow_unused=True)
        kinds = zip(("random", "zero", "large"), delta, strict=True)
        wrong = [f"delta on {name} inputs" for name, part in kinds if not _is_finite(part)]
        if not all(_is_finite(gradient) for gradient in gradients if gradient is not None):
            wrong.append("gradients")
        label = str(dtype).removeprefix("torch.")
        detail = f"not finite: {', '.join(wrong)}" if wrong else "random, zero and large inputs"
        return _row(f"finite_{label}", float(len(wrong)), 0.0, not wrong, detail)


def _step(
    module: fx.GraphModule, data: tuple[torch.Tensor, torch.Tensor, torch.Tensor], strongest: dict[str, float]
) -> bool:
    """Take one step of sign descent on a regression to a target, and note each parameter's relative gradient.

    Sign descent, since the size of a gradient must not matter here and a zero one must move nothing. Gives whether
    every gradient was finite.
    """
    x, h, target = data
    named = dict(module.named_parameters())
    loss = ((h + module(x, h) - target) ** 2).mean()
    if not named or not loss.requires_grad:
        return True
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {name: found[index] for index, name in enumerate(named) if torch.is_tensor(found[index])}
    sizes = {name: float(torch.linalg.vector_norm(gradient, math.inf)) for name, gradient in gradients.items()}
    scale = max(sizes.values(), default=0.0) or 1.0
    with torch.no_grad():
        for name, gradient in gradients.items():
            strongest[name] = max(strongest[name], sizes[name] / scale)
            named[name].sub_(gradient.sign_(), alpha=_STEP_SIZE)
    return all(math.isfinite(size) for size in sizes.values())


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


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
