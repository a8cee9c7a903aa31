"""The screen of a race: what each rival's features could take off the loss at once, judged on a probe it did not learn.

    symbol    meaning                                                                          shape
    f_i       what the seed's outgoing map (zero at birth) is given for row i                  [F]
    g_i       gradient of the loss at that map's output, of an example's own loss              [C]
    A, B      halves of the probe: learnt from, judged on; n_A, n_B rows                       [n, F], [n, C]
    C_f, C_g  second moments over A, shrunk: (1 - s) mean_i f_i f_i' + s t I                   [F, F], [C, C]
    M         mean over A of g_i f_i'                                                          [C, F]
    v_i       g_i' C_g^-1 M C_f^-1 f_i, row i of B                                             no unit
    gain      mean of v_i; its standard error is sd(v) / sqrt(n_B)                             no unit

- C_g^-1 M C_f^-1 is the natural-gradient step of the outgoing map, its Fisher factored as of a layer. Over A itself
  mean v is | C_f^-1/2 M C_g^-1/2 |^2, the gain of self-expanding networks; it grows with the number of features
  whatever they are, for any features fit noise. Over B noise brings nothing in the mean.
- Before that the features take a few steps (Adam) up that gain on A: random ones say little of what a narrow seed can
  become. The outgoing map stays 0 meanwhile.
- A row is an example, or a position of one. With as many features as rows or more, the inverse goes through the rows:
  F_A C_f^-1 = ((1 - s) / n F_A F_A' + s t I)^-1 F_A. s is the oracle approximating shrinkage, t = tr(F_A F_A') / (n F).
- A parameter that starts at 0 and is no linear or convolutional map (a scale) has its own gradient of each example in
  the place of f, and 1 in that of g.

A screen may thin the field; it does not decide: those that stay are measured by effect (``esper.core.race``). What it
was worth stands in experiment 0009; no run uses it.

Sources: R. Mitchell, R. Menzenbach, K. Kersting, M. Mundt, Self-Expanding Neural Networks, arXiv:2307.04526 (the
gain); J. Martens, R. Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015 (the
factors); Y. Chen, A. Wiesel, Y. Eldar, A. Hero, Shrinkage Algorithms for MMSE Covariance Estimation, IEEE Trans. Signal
Processing 58, 2010 (s).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import unfold

from esper.contracts.errors import InvalidInputError
from esper.execution.gradient_gate import readable
from esper.execution.incubation import SiteSample
from esper.execution.random_streams import frozen_streams

MAX_ROWS: Final = 512
"""Most rows of a half: what the screen costs grows with their square. Positions of examples are left out evenly."""
_LEAST_EXAMPLES: Final = 8
_TINY: Final = 1e-12

_Rows = tuple[Tensor, Tensor]
"""f [n, F] and g [n, C] of one outgoing map."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenConfig:
    """How features are trained before they are judged.

    Raises:
        InvalidInputError: A value breaks its rule; the message names it.
    """

    steps: int = 8
    """Steps that the features take up the gain, >= 0."""
    batch_size: int = 64
    """Examples of a step, at least 8; all of the half where it has fewer."""
    learning_rate: float = 1e-2
    """Learning rate of these steps (Adam), > 0."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InvalidInputError.of("screen.steps", "be >= 0", self.steps)
        if self.batch_size < _LEAST_EXAMPLES:
            raise InvalidInputError.of("screen.batch_size", f"be at least {_LEAST_EXAMPLES}", self.batch_size)
        if not self.learning_rate > 0.0:
            raise InvalidInputError.of("screen.learning_rate", "be > 0", self.learning_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a seed's features promise."""

    gain: float
    """Gain on the half it did not learn from, no unit; around 0 for features that say nothing of the gradient."""
    error: float
    """Its standard error."""
    fitted: float
    """Gain on the half it learnt from; what it is above ``gain`` is noise that was fitted."""


def score_kernel(kernel: nn.Module, sample: SiteSample, *, seed: int, config: ScreenConfig = ScreenConfig()) -> Score:
    """Score a newly born kernel on the probe; kernel and random streams stay as they are.

    Args:
        kernel: ``kernel(x, h)`` with an outgoing map of zeros.
        sample: The probe: examples seen at the site, at least 16, and the gradient of each example's own loss.
        seed: Draws the order of the examples, >= 0.
        config: How the features are trained.

    Raises:
        InvalidInputError: The probe is too small.
    """
    count = len(sample.g)
    if count < 2 * _LEAST_EXAMPLES:
        raise InvalidInputError.of("sample", f"hold at least {2 * _LEAST_EXAMPLES} examples", count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(sample.g.device)
    learn, judge = (_part(sample, rows) for rows in (order[: count // 2], order[count // 2 :]))
    with frozen_streams(), torch.enable_grad(), torch.autocast(sample.g.device.type, enabled=False):
        own = copy.deepcopy(kernel).float()
        heads = _heads(own)
        _train_features(own, heads, learn, config)
        return _judge(_rows(own, heads, learn), _rows(own, heads, judge))


def thin(scores: Sequence[Score]) -> list[int]:
    """Give the places of the better half of the scores, best first; equal ones stay in the order they were given."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place].gain, place))
    return order[: (len(scores) + 1) // 2]


def _judge(learn: Sequence[_Rows], judge: Sequence[_Rows]) -> Score:
    """Give the gain of all outgoing maps together."""
    fitted = sum(float(_gains(a, a).mean()) for a in learn)
    held_out = [_gains(b, a) for a, b in zip(learn, judge, strict=True)]
    if not held_out:
        return Score(gain=0.0, error=0.0, fitted=0.0)
    error = sum(float(v.var()) / len(v) for v in held_out) ** 0.5
    return Score(gain=sum(float(v.mean()) for v in held_out), error=error, fitted=fitted)


def _gains(rows: _Rows, learnt: _Rows) -> Tensor:
    """Give v of each row [n], the outgoing map's step taken from ``learnt``."""
    (f, g), (f_learnt, g_learnt) = rows, learnt
    step = _whitened(g_learnt).T @ _whitened(f_learnt) / len(f_learnt)
    gains: Tensor = ((f @ step.T) * g).sum(1)
    return gains


def _whitened(rows: Tensor) -> Tensor:
    """Give rows [n, F] times the inverse of their shrunk second moment, by way of the smaller of F x F and n x n."""
    count, width = rows.shape
    product = rows.T @ rows if width < count else rows @ rows.T
    trace, square = product.detach().trace() / count, product.detach().square().sum() / count**2
    spread = (count + 1 - 2 / width) * (square - trace**2 / width)
    shrinkage = (((1 - 2 / width) * square + trace**2) / spread.clamp_min(_TINY)).clamp(1e-3, 1.0)
    floor = (shrinkage * trace / width).clamp_min(_TINY)
    moment = (1 - shrinkage) / count * product + floor * torch.eye(len(product), dtype=rows.dtype, device=rows.device)
    whitened: Tensor = torch.linalg.solve(moment, rows.T).T if width < count else torch.linalg.solve(moment, rows)
    return whitened


def _train_features(kernel: nn.Module, heads: Sequence[nn.Module], sample: SiteSample, config: ScreenConfig) -> None:
    inner = [value for value in kernel.parameters() if value.requires_grad]
    if not heads or not inner:
        return
    optimizer = torch.optim.Adam(inner, lr=config.learning_rate)
    for number in range(config.steps):
        rows = torch.arange(config.batch_size, device=sample.g.device) + number * config.batch_size
        pairs = _of_heads(kernel, heads, _part(sample, rows[: len(sample.g)] % len(sample.g)), differentiable=True)
        gain = sum((_gains(pair, pair).mean() for pair in pairs), torch.zeros((), device=sample.g.device))
        if not gain.requires_grad:
            return  # nothing before the outgoing map can learn
        found = torch.autograd.grad(-gain, inner, allow_unused=True)
        for value, gradient in zip(inner, found, strict=True):
            value.grad = gradient
        optimizer.step()


def _heads(kernel: nn.Module) -> list[nn.Module]:
    """Give the maps that start at 0, in the order in which they stand."""
    maps = [module for module in kernel.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return [module for module in maps if not module.weight.any() and getattr(module, "groups", 1) == 1]


def _rows(kernel: nn.Module, heads: Sequence[nn.Module], sample: SiteSample) -> list[_Rows]:
    """Give the rows of every outgoing map, and those of the other parameters that start at 0."""
    found = _of_heads(kernel, heads, sample, differentiable=False) if heads else []
    others = _other_starts(kernel, heads, sample)
    return [*found, _of_parameters(kernel, others, sample)] if others else found


def _of_heads(
    kernel: nn.Module, heads: Sequence[nn.Module], sample: SiteSample, *, differentiable: bool
) -> list[_Rows]:
    with _watched(heads) as seen:
        delta = kernel(sample.x, sample.h)
    met = [head for head in heads if head in seen]
    ends = [seen[head][1] for head in met]
    gradients = torch.autograd.grad((delta * sample.g).sum(), ends, create_graph=differentiable)
    found: list[_Rows] = []
    for head, g in zip(met, gradients, strict=True):
        rows = _thinned(_inputs(head, seen[head][0])), _thinned(_outputs(head, g))
        found.append(rows if differentiable else (rows[0].detach(), rows[1]))
    return found


@contextmanager
def _watched(heads: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Keep what each map is given and what it gives."""
    seen = dict[nn.Module, tuple[Tensor, Tensor]]()

    def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[module] = (args[0], out)

    handles = [head.register_forward_hook(see) for head in heads]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _inputs(head: nn.Module, value: Tensor) -> Tensor:
    """Give what a map is given as rows [n, F]: of a convolution, each place with its neighbours."""
    if isinstance(head, nn.Linear):
        return value.reshape(-1, value.shape[-1])
    assert isinstance(head, nn.Conv1d | nn.Conv2d)
    assert not isinstance(head.padding, str)
    kernel, dilation, padding, stride = head.kernel_size, head.dilation, head.padding, head.stride
    if isinstance(head, nn.Conv1d):  # a signal is an image of one line
        value = value.unsqueeze(2)
        kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    places = unfold(value, kernel, dilation, padding, stride)
    return places.transpose(1, 2).reshape(-1, places.shape[1])


def _outputs(head: nn.Module, value: Tensor) -> Tensor:
    """Give what a map gives as rows [n, C], in the order of its inputs."""
    if not isinstance(head, nn.Linear):
        value = value.flatten(2).transpose(1, 2)
    return value.reshape(-1, value.shape[-1])


def _thinned(rows: Tensor) -> Tensor:
    """Give at most ``MAX_ROWS`` rows, evenly spread."""
    return rows[:: -(-len(rows) // MAX_ROWS)]


def _other_starts(kernel: nn.Module, heads: Sequence[nn.Module], sample: SiteSample) -> list[str]:
    """Give the names of the parameters at 0 that change the delta at once and are no map of ``heads``.

    What stands before a map of zeros (a norm's shift) may be 0 too, and changes nothing yet.
    """
    own = {id(value) for head in heads for value in head.parameters()}
    asked = {name: value for name, value in kernel.named_parameters() if id(value) not in own and not value.any()}
    if not asked:
        return []
    total = (kernel(sample.x, sample.h) * sample.g).sum()
    found = torch.autograd.grad(total, list(asked.values()), materialize_grads=True)
    return [name for name, value in zip(asked, found, strict=True) if value.any()]


def _of_parameters(kernel: nn.Module, names: Sequence[str], sample: SiteSample) -> _Rows:
    """Give each example's gradient of the named parameters."""
    rest = {name: value.detach() for name, value in kernel.named_parameters()}

    def along(values: dict[str, Tensor], x: Tensor, h: Tensor, g: Tensor) -> Tensor:
        delta: Tensor = functional_call(kernel, {**rest, **values}, (x[None], h[None]))
        return (delta[0] * g).sum()

    start = {name: rest[name] for name in names}
    found = vmap(grad(along), in_dims=(None, 0, 0, 0), randomness="different")(start, sample.x, sample.h, sample.g)
    rows = _thinned(torch.cat([value.flatten(1) for value in found.values()], 1))
    return rows, torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)


def _part(sample: SiteSample, rows: Tensor) -> SiteSample:
    """Give some of the examples, in the precision in which the screen computes."""
    x, h, g = (value[rows] for value in (sample.x, sample.h, sample.g))
    return SiteSample(x=readable(x.float() if x.is_floating_point() else x), h=readable(h.float()), g=g.float())
