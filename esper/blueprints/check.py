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
    determinism  two builds from one seed, two runs of one module           equal bits
    finite_*     outputs and gradients on ordinary, zero and large inputs,
                 in one dtype: finite, no parameter cut off, and within
                 10 times the largest gradient of float64                   no exception

Learning and gradients are measured in float64, where a gradient that is zero by algebra (the bias of an attention's
keys) stays below 1e-14 and can't pass for a small one. A row that fails says which node is at fault.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import fx

from esper.blueprints.build import build_plan
from esper.blueprints.cost import plan_cost
from esper.blueprints.diagnosis import (
    blocked_edge,
    failing_node,
    overflowing_node,
    wrong_flops,
    wrong_parameters,
)
from esper.blueprints.flops import count_flops
from esper.blueprints.plan import Plan, plan
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import InvalidBlueprintError, InvalidInputError
from esper.contracts.kernel import ValidationCheck
from esper.contracts.memory import raise_if_out_of_memory

IDENTITY_LIMIT: Final = 1e-6
"""Largest delta at birth, relative to the largest element of h."""
GRADIENT_LIMIT: Final = 1e-10
"""Smallest gradient that counts, relative to the strongest parameter's."""
LEARNING_LIMIT: Final = 1e-12
"""Smallest change of the output that counts, relative to h."""

FULL_DTYPES: Final = (torch.float32, torch.float64)
"""Types in which a blueprint runs as it is."""
HALF_DTYPES: Final = (torch.bfloat16, torch.float16)
"""Types in which it runs under autocast, or with parameters of that type."""

_BATCH: Final = 4
_BATCHES: Final = (1, 2, 5)
_STEP_SIZE: Final = 0.02
_LARGE: Final = 1e3
_POSITIONS: Final = 8
_MORE_POSITIONS: Final = 3
_WILD: Final = 10.0


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
    ir: BlueprintIR,
    site: Site,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    parameter_dtypes: Sequence[torch.dtype] = (),
    seed: int = 0,
) -> CheckReport:
    """Run the contract test of a blueprint at a site, on the CPU.

    It draws from generators of its own and never touches torch's: a training thread may be drawing from that meanwhile,
    so it can't be put back. An operator that draws from it fails the row ``determinism``.

    ``dtypes`` are those it must compute in: float32 and float64 as they are, bfloat16 and float16 under autocast with
    float32 parameters. ``parameter_dtypes`` are those its own parameters must be able to have, without autocast.
    A graph that serves every size is run on few positions, whatever the site's; its features are never cut.

    Raises:
        InvalidBlueprintError: The graph is not legal at the site, so there is nothing to run.
        InvalidInputError: A dtype is none of float32, float64, bfloat16 and float16.
        CapacityExceededError: Memory ran out, which says nothing of the graph.
    """
    modes = [*(_mode(dtype) for dtype in dtypes), *(_mode(dtype, parameters=True) for dtype in parameter_dtypes)]
    layout = plan(ir, site)
    rows: list[ValidationCheck] = []
    probe = _Probe(layout, seed)
    for name, stage in probe.stages():
        try:
            rows += stage()
        except Exception as error:  # noqa: BLE001 - whatever a graph raises, the row says what
            raise_if_out_of_memory(error)
            rows.append(_row(name, None, None, False, _raised(error) + _at(probe.failing())))
    rows += [probe.finite(mode) for mode in modes]
    return CheckReport(checks=tuple(rows))


@dataclass(frozen=True, slots=True)
class _Mode:
    """One way to compute."""

    label: str
    """End of the row's name."""
    parameters: torch.dtype
    """Type of parameters and inputs."""
    autocast: torch.dtype | None
    """Type of autocast; ``None`` without."""


def _mode(dtype: torch.dtype, *, parameters: bool = False) -> _Mode:
    name = str(dtype).removeprefix("torch.")
    if dtype not in (*FULL_DTYPES, *HALF_DTYPES):
        raise InvalidInputError.of("dtype", "be float32, float64, bfloat16 or float16", name)
    if parameters:
        return _Mode(f"{name}_parameters", dtype, None)
    return _Mode(name, torch.float32, dtype) if dtype in HALF_DTYPES else _Mode(name, dtype, None)


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
        self.reference: list[torch.Tensor] | None = None
        self.extremes: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def stages(self) -> list[tuple[str, Callable[[], list[ValidationCheck]]]]:
        """Give the steps of the test, each under the name of its first row."""
        return [
            ("identity", self.identity),
            ("learning", self.learning),
            ("batch", self.batches),
            ("positions", self.positions),
            ("parameters", self.cost),
            ("determinism", self.determinism),
        ]

    def failing(self) -> str:
        """Give the node at which the module raises on an ordinary batch; empty where it runs."""
        x, h = self.inputs(_BATCH, torch.float32)
        return failing_node(self.born, (x, h))

    def inputs(self, batch: int, dtype: torch.dtype = torch.float64, site: Site | None = None) -> list[torch.Tensor]:
        site = site or self.run_on.site
        shapes = (site.input_shape, site.output_shape)
        return [torch.randn(batch, *shape, generator=self.generator, dtype=dtype) for shape in shapes]

    def identity(self) -> list[ValidationCheck]:
        x, h = self.inputs(_BATCH, torch.float32)
        with torch.no_grad():
            figure = float(self.born(x, h).abs().max() / h.abs().max())
        detail = f"largest delta at birth over h, at node '{self.layout.ir.output}'"
        return [_row("identity", figure, IDENTITY_LIMIT, figure <= IDENTITY_LIMIT, detail)]

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
        flows = finite and figure > GRADIENT_LIMIT
        blocked = "" if learns and flows else blocked_edge(self.trained, (x, h))
        why = f": {blocked}" if blocked else ""
        return [
            _row("learning", change, LEARNING_LIMIT, learns, f"change of delta over h after one step{why}"),
            _row("gradients", figure, GRADIENT_LIMIT, flows, (detail if finite else f"not finite, {detail}") + why),
        ]

    def batches(self) -> list[ValidationCheck]:
        return [self._shapes("batch", self.run_on.site, _BATCHES)]

    def positions(self) -> list[ValidationCheck]:
        if not self.layout.h.positions:
            return [_row("positions", None, None, True, "the site has no positions")]
        larger = self.run_on.resized(_MORE_POSITIONS)
        if larger is None:
            return [_row("positions", None, None, True, "the graph is tied to the site's positions")]
        return [self._shapes("positions", larger.site, (2,))]

    def _shapes(self, name: str, site: Site, batches: Sequence[int]) -> ValidationCheck:
        wrong: list[str] = []
        for batch in batches:
            x, h = self.inputs(batch, site=site)
            try:
                with torch.no_grad():
                    got = tuple(self.trained(x, h).shape)
            except (RuntimeError, ValueError, IndexError) as error:
                raise_if_out_of_memory(error)
                wrong.append(f"batch {batch}: {_raised(error)}{_at(failing_node(self.trained, (x, h)))}")
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
        size_right, work_right = parameters == declared.parameters, flops == run_cost.flops
        size = "counted" if size_right else f"counted: {wrong_parameters(self.born, self.layout)}"
        work = "counted for one example"
        work = work if work_right else f"{work}: {wrong_flops(self.born, self.run_on, (x, h))}"
        return [
            _row("parameters", parameters, declared.parameters, size_right, size, "1"),
            _row("flops", flops, run_cost.flops, work_right, work, "1"),
        ]

    def determinism(self) -> list[ValidationCheck]:
        x, h = self.inputs(_BATCH)
        with torch.no_grad():
            same_runs = torch.equal(self.trained(x, h), self.trained(x, h))
        wrong = [] if self.same_builds else ["two builds differ"]
        wrong += [] if same_runs else ["two runs differ"]
        return [_row("determinism", None, None, not wrong, ", ".join(wrong) or "two builds and two runs, bit by bit")]

    def finite(self, mode: _Mode) -> ValidationCheck:
        """Give the row of one way to compute, on one ordinary, one zero and one large example."""
        name = f"finite_{mode.label}"
        try:
            if self.reference is None:
                self.extremes = self._extremes()
                self.weights = [parameter.detach().clone() for parameter in self.trained.parameters()]
                self.reference = self._gradients(_Mode("float64", torch.float64, None))[1]
            delta, gradients = self._gradients(mode)
        except Exception as error:  # noqa: BLE001 - a type that an operator lacks raises anything; the row says what
            raise_if_out_of_memory(error)
            return _row(name, None, None, False, _raised(error) + _at(self.failing()))
        kinds = zip(("random", "zero", "large"), delta, strict=True)
        wrong = [f"delta on {kind} inputs" for kind, part in kinds if not _is_finite(part)]
        if wrong:
            wrong[-1] += _at(self._overflowing(mode))
            wrong = [f"not finite: {', '.join(wrong)}"]
        names = [*(label for label, _ in self.trained.named_parameters()), "x", "h"]
        found = zip(names, gradients, self.reference, strict=True)
        scale = max((float(value.abs().max()) for value in self.reference), default=0.0)
        faults = [_gradient_fault(label, mine, true, scale) for label, mine, true in found]
        wrong += [fault for fault in faults if fault]
        detail = "; ".join(wrong) or "random, zero and large inputs"
        return _row(name, float(len(wrong)), 0.0, not wrong, detail)

    def _extremes(self) -> list[torch.Tensor]:
        """Give x, h and the weights of delta in the loss; the mean of delta would hide what sums to nothing."""
        factors = torch.tensor([1.0, 0.0, _LARGE], dtype=torch.float64)
        x, h = (tensor * factors.view(-1, *(1,) * (tensor.dim() - 1)) for tensor in self.inputs(len(factors)))
        weights = torch.randn(h.shape, generator=self.generator, dtype=h.dtype) / h.numel()
        return [x, h, weights]

    def _overflowing(self, mode: _Mode) -> str:
        x, h, _ = (value.to(mode.parameters) for value in self.extremes)
        with _autocast(mode.autocast):
            return overflowing_node(self.trained, (x, h))

    def _gradients(self, mode: _Mode) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the trained module forward and backward one way; gives delta, and a gradient per parameter, x and h."""
        x, h, weights = (value.to(mode.parameters).requires_grad_() for value in self.extremes)
        self.trained.to(mode.parameters)
        with torch.no_grad():
            for parameter, value in zip(self.trained.parameters(), self.weights, strict=True):
                parameter.copy_(value)
        with _autocast(mode.autocast):
            delta = self.trained(x, h)
        wanted = [*self.trained.parameters(), x, h]
        if not delta.requires_grad:
            return delta, [torch.zeros_like(value) for value in wanted]
        exact = torch.promote_types(delta.dtype, torch.float32)
        loss = (delta.to(exact) * weights.detach().to(exact)).sum()
        return delta, list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def _gradient_fault(name: str, mine: torch.Tensor, true: torch.Tensor, scale: float) -> str:
    """Say what is wrong with a gradient beside the one of float64, where ``scale`` is the largest of all; or nothing.

    Rounding moves a gradient by a little; one that is off by multiples of the largest was computed wrongly (torch has
    been seen to leave one uninitialised).
    """
    if not _is_finite(mine):
        return f"not finite: gradient of {name}"
    if not mine.any() and true.any():
        return f"gradient of {name} vanishes"
    error = float((mine.double() - true).abs().max())
    return f"gradient of {name} is off by {error:g}" if error > _WILD * scale else ""


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
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
    else:
        with torch.autocast("cpu", dtype=dtype):
            yield


def _at(node: str) -> str:
    return f", at node '{node}'" if node else ""


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _row(
    name: str, figure: float | None, limit: float | None, passed: bool, detail: str, unit: str = ""
) -> ValidationCheck:
    row = ValidationCheck(name=name, figure=figure, limit=limit, unit=unit, passed=passed, detail=detail)
    return row if passed or figure is None else replace(row, detail=f"{detail} (figure {figure:g}, limit {limit:g})")
