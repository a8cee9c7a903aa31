"""A compiled form that takes no more memory than its graph has any use for, whatever its bytes say.

Bytes that do nothing but compute can still compute too much: a tensor joined to itself forty times has no room in any
machine, and a signature says nothing of it. So before a form runs at shapes that it has not run at before, it is gone
through on meta tensors, which have shapes and no contents. What its operators make is summed, and so is what those of
the module make that the graph yields, with its weights, which a form of int8 writes out where it uses them; a form that
makes more than ``MAX_RATIO`` times as much is refused, and has taken nothing. What a form does must follow from the
shapes alone, or that says nothing: one that looks at a number inside a tensor is refused too.

Only what operators give is counted. What they take for themselves while they run goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from esper.contracts.errors import CorruptDataError, InvalidInputError

MAX_RATIO: Final = 4
"""Most that a form makes, as a multiple of what the graph's own module makes and holds."""
_REHEARSALS: Final = 2
"""TorchScript lays a form out anew for what it saw in the first run, and works out constants then."""
_SLACK_BYTES: Final = 1024 * 1024
_MAX_PASSED: Final = 1024
_aten: Final = torch.ops.aten
_READS: Final = frozenset({_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default})
"""What gives a number or a truth out of a tensor."""
_QUANTIZED_LINEAR: Final = "quantized::linear_dynamic"
"""Has no form for meta tensors."""

_Forward = Callable[[Tensor, Tensor], object]


class BoundedForm(nn.Module):
    """A form that runs where it keeps to its bound. It stays on its device, and in its dtype."""

    def __init__(self, form: nn.Module, twin: nn.Module, module: nn.Module) -> None:
        """Bound a form.

        Args:
            form: What runs.
            twin: The same form, loaded once more: what a form was run with may change how it runs next.
            module: What the graph yields, in the form's dtype; says how much is enough.
        """
        super().__init__()
        self.form = form
        self._aside = (twin, module)  # in a tuple, so that they are no part of the form's parameters
        self._passed: set[tuple[object, ...]] = set()

    @override
    def forward(self, x: Tensor, h: Tensor) -> Any:
        """Give the delta.

        Raises:
            CorruptDataError: The form would take more memory than its graph has use for, or looks into a tensor.
        """
        key = (x.shape, x.dtype, h.shape, h.dtype)
        if key not in self._passed:
            self._rehearse(x, h)
            if len(self._passed) >= _MAX_PASSED:
                self._passed.clear()
            self._passed.add(key)
        return self.form(x, h)

    def _rehearse(self, x: Tensor, h: Tensor) -> None:
        twin, module = self._aside
        weights_bytes = sum(one.nbytes for one in module.parameters())
        limit_bytes = MAX_RATIO * (_made_by(module, x, h, None) + weights_bytes) + _SLACK_BYTES
        for _ in range(_REHEARSALS):
            _made_by(twin, x, h, limit_bytes)


def _made_by(forward: _Forward, x: Tensor, h: Tensor, limit_bytes: int | None) -> int:
    """Give the bytes of all tensors that operators make on the way from inputs of some shapes, without making them."""
    tally = _Tally(limit_bytes)
    inputs = [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in (x, h)]
    try:
        with torch.no_grad(), tally:
            forward(*inputs)
    except Exception as error:
        if tally.fault is not None:  # TorchScript gives it out as an error of its own
            raise tally.fault from error
        raise
    return tally.made_bytes


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has every operator run on meta tensors, and adds up what they make."""

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made_bytes = 0
        self.fault: CorruptDataError | None = None
        self._limit_bytes = limit_bytes

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            if any(isinstance(one, Tensor) and one.is_meta for one in args):
                raise self._refuse("do the same for all tensors of a shape", str(func))
            return func(*args)  # of constants: torch itself looks at them when it lays a form out
        on_meta, named = pytree.tree_map_only(Tensor, _bare, (args, kwargs or {}))
        found = _quantized_linear(*on_meta[:2]) if func.name() == _QUANTIZED_LINEAR else func(*on_meta, **named)
        if all(one.alias_info is None for one in func._schema.returns):
            self.made_bytes += sum(one.nbytes for one in pytree.tree_leaves(found) if isinstance(one, Tensor))
        if self._limit_bytes is not None and self.made_bytes > self._limit_bytes:
            rule = f"make at most {self._limit_bytes} bytes of tensors, {MAX_RATIO} times as many as its graph does"
            raise self._refuse(rule, f"more at {func.name()}")
        return found

    def _refuse(self, rule: str, received: str) -> CorruptDataError:
        self.fault = CorruptDataError(InvalidInputError.of("binary", rule, received).message, parameter="binary")
        return self.fault


def _bare(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.detach().to("meta")


def _quantized_linear(x: Tensor, packed: Any) -> Tensor:
    weight, _ = packed.unpack()
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
