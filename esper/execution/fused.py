"""Running many configurations of seeds in one forward pass, where that gives the same figures and pays.

For measuring them (``losses``), or for letting each learn (``outputs``, through which gradients go).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from esper.execution.lane_check import difference, num_tried, show_end
from esper.execution.lanes import LanePass, LayerLanes, LayerSeeds, Visit
from esper.execution.layers.pulse import is_compiled
from esper.execution.overrides import GrowingModel, SeedRef, every_module, named_seeds, unmeasured
from esper.execution.random_streams import frozen_streams

log = logging.getLogger(__name__)

LossRows = Callable[[Tensor, Tensor], Tensor]
"""Takes outputs and targets with the batch first and gives one loss per example, shape (batch,)."""

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Form:
    """A way to run lanes."""

    splits: bool
    """Whether the batch goes in once and is parted on the way; else a copy for each configuration goes in."""
    cpu_bytes: int
    """Size of a pass's largest layer output up to which it pays on a CPU."""


_FORMS: Final = (_Form(splits=True, cpu_bytes=8 * _MIB), _Form(splits=False, cpu_bytes=_MIB))
"""In the order in which they are tried. On a CPU a pass saves calls, and whatever it computes once; beyond the caches
the memory it goes through costs more than that. ``python -m bench g2`` measures where."""
_DEVICE_BYTES: Final = 64 * _MIB
"""The same for a device of its own, where rows are cheap and launches are not."""
_num_failed: Final[WeakKeyDictionary[GrowingModel, dict[bool, int]]] = WeakKeyDictionary()
"""How many of the forms a model has failed in, by whether it ran as in training: where to begin the next time. The
first pass of every object is checked anew."""


class FusedPasses:
    """Gives losses or outputs of batches under some configurations, in passes with lanes. Training thread only."""

    def __init__(
        self,
        model: GrowingModel,
        configurations: Sequence[Mapping[SeedRef, float]],
        *,
        loss: LossRows | None = None,
        max_rows: int | None = None,
    ) -> None:
        """Without a ``loss`` it is the outputs that are given."""
        self._model = model
        self._loss = loss
        self._configurations = configurations
        self._max_rows = max_rows
        self._named = named_seeds(model, configurations)
        # A compiled part would be compiled anew for every number of rows, and its layers know no lanes.
        self._is_compiled = any(is_compiled(module) for module in every_module(model))
        self._visits: dict[bool, tuple[Visit, ...]] = {}

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Give the losses, shape (configurations, examples); ``None`` where this batch is to be measured otherwise."""
        return self._values(inputs, targets)

    def outputs(self, inputs: Tensor) -> Tensor | None:
        """Give the outputs, shape (configurations, examples, ...); ``None`` where this batch is to be run otherwise."""
        return self._values(inputs, inputs)

    def _values(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        if not self._may_be_fused(inputs, targets):
            return None
        failed = _num_failed.setdefault(self._model, {})
        trains = torch.is_grad_enabled()
        for form in _FORMS[failed.get(trains, 0) :]:
            width = self._width(form, inputs)
            if width < 2:
                continue
            found = self._try(inputs, targets, width, splits=form.splits)
            if found is not None:
                return found
            failed[trains] = _FORMS.index(form) + 1
        return None

    def _may_be_fused(self, inputs: object, targets: object) -> bool:
        if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor) and self._named):
            return False
        if inputs.layout is not torch.strided or len(inputs) != len(targets):
            return False
        return not self._is_compiled and num_tried(len(inputs)) > 0

    def _width(self, form: _Form, inputs: Tensor) -> int:
        """Give how many configurations one pass of this form may take: by shapes alone, so equal runs do the same."""
        rows = self._max_rows
        if rows is None:
            sites = (layer.site for layer in self._model.kasmina_layers.values())
            values = max((math.prod(site.output_shape) for site in sites if site is not None), default=1)
            limit = form.cpu_bytes if inputs.device.type == "cpu" else _DEVICE_BYTES
            rows = limit // (4 * values)
        return min(rows // max(1, len(inputs)), len(self._configurations))

    def _try(self, inputs: Tensor, targets: Tensor, width: int, *, splits: bool) -> Tensor | None:
        """Measure a batch; ``None`` where that can't be done, or not so."""
        is_first, reason = splits not in self._visits, ""
        parts: list[Tensor] = []
        try:
            # What a pass draws that is given up must not be missing afterwards.
            with self._taking_part() as places, frozen_streams() if is_first else nullcontext():
                for configurations in _in_parts(self._configurations, width):
                    part, reason = self._measure(places, inputs, targets, configurations, splits=splits)
                    if reason:
                        break
                    parts.append(part)
        except Exception as error:  # noqa: BLE001 - the batch is then measured otherwise, which raises what is amiss
            reason = f"raised {type(error).__name__}: {error}"
        if is_first or reason:
            extra = {"configurations": len(self._configurations), "at_once": width, "splits": splits, "reason": reason}
            log.debug("fused_pass_refused" if reason else "fused_pass_taken", extra=extra)
        return None if reason else torch.cat(parts)

    @contextmanager
    def _taking_part(self) -> Iterator[list[LayerSeeds]]:
        """Let the named seeds take part, of no effect as yet.

        Layers of which none is named are there too where seeds stand: one may read what was before the lanes parted.
        """
        layers = self._model.kasmina_layers
        places = [LayerSeeds.of(layers[name], list(seeds.values())) for name, seeds in self._named.items()]
        standing = (layer for name, layer in layers.items() if name not in self._named and layer._kasmina.terms)
        places += [LayerSeeds.of(layer, ()) for layer in standing]
        try:
            with unmeasured(self._model):
                yield places
        finally:
            for own in places:
                own.layer._kasmina.lanes = None
                own.layer.refresh_terms()

    def _measure(
        self,
        places: Sequence[LayerSeeds],
        inputs: Tensor,
        targets: Tensor,
        configurations: Sequence[Mapping[SeedRef, float]],
        *,
        splits: bool,
    ) -> tuple[Tensor, str]:
        """Run one pass; gives its values, shape (configurations, examples, ...), and why they are worth nothing."""
        known = self._visits.get(splits)
        few = 0 if known is not None else num_tried(len(inputs))
        one = LanePass(len(configurations), len(inputs), splits=splits, expected=known, num_shown=few)
        values = self._run(places, inputs, targets, configurations, one)
        if not one.is_sound or not self._has_rows(values, len(one.groups) * len(inputs)):
            return values, "it comes by other rows or layers than lanes explain"
        if known is None:
            missed = set(self._named) - {name for name, _ in one.visits}
            if missed:
                return values, f"layer {min(missed)} does not run eagerly in it"
            alone = LanePass(1, few, splits=False, num_shown=few)
            self._run(places, inputs[:few], targets[:few], configurations[-1:], alone)
            reason = difference(alone, one)
            if reason:
                return values, reason
            self._visits[splits] = tuple(one.visits)
        return one.lanes_of(values), ""

    def _has_rows(self, values: object, num_rows: int) -> bool:
        if not isinstance(values, Tensor) or not values.dim() or len(values) != num_rows:
            return False
        return self._loss is None or values.dim() == 1

    def _run(
        self,
        places: Sequence[LayerSeeds],
        inputs: Tensor,
        targets: Tensor,
        configurations: Sequence[Mapping[SeedRef, float]],
        one: LanePass,
    ) -> Tensor:
        for own in places:
            refs = [SeedRef(own.layer.layer_name, seed.index) for seed in own.seeds]
            settings = [own.setting([alphas.get(ref) for ref in refs]) for alphas in configurations]
            own.set(settings[0])
            own.layer._kasmina.lanes = LayerLanes(own, settings, one)
        outputs: Tensor = self._model(_repeated(inputs, len(one.groups)))
        values = outputs if self._loss is None else self._loss(outputs, _repeated(targets, len(one.groups)))
        show_end(one, outputs, values)
        return values


def _repeated(value: Tensor, times: int) -> Tensor:
    return value if times == 1 else torch.cat([value] * times)


def _in_parts(items: Sequence[Mapping[SeedRef, float]], width: int) -> Iterator[Sequence[Mapping[SeedRef, float]]]:
    """Give the items in order, in as few parts of at most ``width`` as there can be, alike in size."""
    count = -(-len(items) // width)
    for part in range(count):
        yield items[part * len(items) // count : (part + 1) * len(items) // count]
