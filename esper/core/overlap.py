"""Whether a run trains on its own control examples: what was learnt by heart tells decisions nothing.

    b_ij   bits of value j of example i, as a whole number v, taken as v ^ (v >> half its width)
    w_j    odd whole numbers from a fixed stream                                          [values]
    h_i    sum_j b_ij w_j mod 2^64; two examples that differ agree less than once in 2^40     [examples]

Inputs are compared to the bit, targets not: an example is known again whatever it is called. What is drawn anew in
every epoch (augmented images, crops) is not known again, and neither is what is converted on its way to the model, nor
what is sparse, nested or quantised.

Source: L. Carter, M. Wegman, Universal classes of hash functions, JCSS 18 (1979); multilinear, modulo a power of two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_SEED: Final = 0x5EED
_WHOLE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_Kind = tuple[tuple[int, ...], torch.dtype]


class ControlOverlapWarning(UserWarning):
    """Examples of the control split are trained on: what is measured there is not held out."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Control examples of one shape and type: their digests in order, how many have each, how often each was seen."""

    digests: Tensor
    counts: Tensor
    seen: Tensor


class OverlapWatch:
    """Looks at the training examples of one epoch, and counts the control examples among them. Never waits for a GPU.

    Belongs to the training thread. Costs a pass over the inputs a step until :meth:`end_epoch`; by then every example
    was seen once.
    """

    def __init__(self, control_inputs: Iterable[Tensor]) -> None:
        """Take the inputs of the control split, batch by batch, the batch dimension first; at least one example."""
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self._num_control = 0
        parts: dict[_Kind, list[Tensor]] = {}
        for inputs in control_inputs:
            self._num_control += inputs.size(0)
            if _has_rows(inputs):
                parts.setdefault(_kind(inputs), []).append(self._digests(inputs))
        self._known = {kind: _known(torch.cat(found)) for kind, found in parts.items()}

    def look(self, inputs: Tensor) -> None:
        """Take in the inputs of a training step, the batch dimension first."""
        known = self._known.get(_kind(inputs)) if self._known and _has_rows(inputs) else None
        if known is None:
            return
        digests = self._digests(inputs).to(known.digests.device)
        places = torch.searchsorted(known.digests, digests).clamp_(max=len(known.digests) - 1)
        known.seen.index_add_(0, places, (known.digests[places] == digests).long())

    def end_epoch(self) -> int:
        """Look no more, and give how many control examples were trained on; later calls give 0.

        Warns:
            ControlOverlapWarning: There are such examples.
        """
        count = sum(int(known.counts[known.seen > 0].sum()) for known in self._known.values())
        self._known, self._weights = {}, {}
        if count:
            share = count / self._num_control
            message = (
                f"control_loader must hold examples that are not trained on, got {count} of {self._num_control} "
                f"({share:.1%}) that were trained on: what growth is decided by is not held out"
            )
            warnings.warn(message, ControlOverlapWarning, stacklevel=3)
        return count

    def _digests(self, inputs: Tensor) -> Tensor:
        """Give the digests of a batch, int64, [examples]."""
        rows = inputs.detach()
        if rows.is_complex():
            rows = torch.view_as_real(rows.resolve_conj())
        rows = rows.reshape(len(rows), math.prod(rows.shape[1:])).contiguous()
        width = rows.element_size()
        bits = rows.view(_WHOLE[width])
        # Values like 0.5 or 3/16 end in zeros, and every zero at the end would take a digit off the sum.
        mixed = (bits ^ (bits >> 4 * width)).long()
        return (mixed * self._weights_of(rows.shape[1], rows.device)).sum(1)

    def _weights_of(self, count: int, device: torch.device) -> Tensor:
        key = (count, device)
        if key not in self._weights:
            stream = torch.Generator().manual_seed(_SEED)
            drawn = torch.randint(-(2**63), 2**63 - 1, (count,), generator=stream, dtype=torch.int64)
            self._weights[key] = (drawn | 1).to(device)
        return self._weights[key]


def _known(digests: Tensor) -> _Known:
    ordered, counts = torch.unique(digests, return_counts=True)
    return _Known(ordered, counts, torch.zeros_like(counts))


def _has_rows(inputs: Tensor) -> bool:
    """Whether examples stand one after the other as plain values."""
    return inputs.ndim > 0 and inputs.layout is torch.strided and not (inputs.is_nested or inputs.is_quantized)


def _kind(inputs: Tensor) -> _Kind:
    return tuple(inputs.shape[1:]), inputs.dtype
