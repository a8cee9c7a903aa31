"""Lanes: one forward pass in which the seeds of a model take part otherwise for every configuration.

    symbol   meaning
    lane     a configuration, as it goes through the pass
    group    lanes that are alike up to here; they share one block of rows
    B        examples of the batch
    r        rows that one example has at a layer: 1, or the places of a sequence that the host folded into the batch
    row      of group g, example i, place p:  (g * B + i) * r + p

Every row is scaled by the alpha of its own lane. That alpha is one number a lane, so a layer blends lane by lane, with
the very code and the very rows of an ordinary pass: a kernel runs only where it is on, sees exactly the examples that
it would see alone, and fails for its own lane alone. Lanes in which a layer's chosen seeds are all off are blended
together.

A pass may begin with one group, whose block is the batch itself, and split it at the first layer where lanes differ
(what lies before is then computed once), or with a group a lane, whose blocks are copies of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from esper.execution.layers.recompute import checkpointed_part
from esper.execution.seed import BlendMode, Seed

if TYPE_CHECKING:
    from esper.execution.layers.holder import SeedHolder

Group = tuple[int, ...]
Add = Callable[[Tensor, Tensor], Tensor]
"""Takes x and h of some rows and gives h plus what the layer's seeds add as they are set."""
Visit = tuple[str, int]
"""A layer that ran in a pass, and its rows per example."""
Setting = tuple[float | None, ...]
"""Alphas of a layer's chosen seeds; ``None`` leaves a seed as it stands."""
Mark = TypeVar("Mark")


class LanePass:
    """One forward pass: which lanes are still alike, and which layers it has come by. Training thread only."""

    def __init__(
        self,
        num_lanes: int,
        num_examples: int,
        *,
        splits: bool,
        expected: Sequence[Visit] | None = None,
        num_shown: int = 0,
    ) -> None:
        lanes = range(num_lanes)
        self.groups: tuple[Group, ...] = (tuple(lanes),) if splits else tuple((lane,) for lane in lanes)
        self.num_examples = num_examples
        self.visits: list[Visit] = []
        self.shown: list[Tensor] = []
        """What ``num_shown`` first examples of the last lane were at the layers, in order: for a check."""
        self.is_broken = False
        """Whether a layer saw other rows than lanes explain; what the pass gives is then worth nothing."""
        self._last = num_lanes - 1
        self._learns = torch.is_grad_enabled()
        self._expected = expected
        self._num_shown = num_shown
        # Splits only refine, so the number of groups says which they were.
        self._groups_by_count = {len(self.groups): self.groups}

    @property
    def is_sound(self) -> bool:
        """Whether, once it is over, the pass came by the layers and rows that it had to."""
        return not self.is_broken and (self._expected is None or len(self.visits) == len(self._expected))

    def enter(self, layer: str, x: Tensor, h: Tensor) -> int | None:
        """Note that a layer runs; gives the rows of a group, or ``None`` where its rows are no lanes."""
        count = len(self.groups)
        per_example, rest = divmod(len(h), count * self.num_examples)
        visit, place = (layer, per_example), len(self.visits)
        self.visits.append(visit)
        is_other = self._expected is not None and tuple(self._expected[place : place + 1]) != (visit,)
        if rest or len(x) % count or is_other or self._may_come_again():
            self.is_broken = True
        if self.is_broken:
            return None
        self.show(h)
        return len(h) // count

    def _may_come_again(self) -> bool:
        """Whether backward may run this part of the pass once more, when its lanes are gone (checkpointing)."""
        return self._learns and (not torch.is_grad_enabled() or checkpointed_part() is not None)

    def show(self, value: Tensor, groups: Sequence[Group] | None = None) -> None:
        """Keep what a check is to see of a value with one block a group, of the present groups or of ``groups``.

        REQUIRES: its rows are a multiple of groups times examples.
        """
        if self._num_shown:
            groups = self.groups if groups is None else groups
            place = next(place for place, group in enumerate(groups) if self._last in group)
            size = len(value) // len(groups)
            start, count = place * size, size // self.num_examples * self._num_shown
            self.shown.append(value[start : start + count].detach().clone())

    def split(self, marks: Sequence[Mark]) -> list[tuple[int, Mark]]:
        """Part lanes of different marks; gives the place of the group that each new one comes from, and its mark."""
        pieces: list[tuple[int, Mark]] = []
        groups: list[Group] = []
        for place, group in enumerate(self.groups):
            by_mark: dict[Mark, list[int]] = {}
            for lane in group:
                by_mark.setdefault(marks[lane], []).append(lane)
            pieces.extend((place, mark) for mark in by_mark)
            groups.extend(tuple(lanes) for lanes in by_mark.values())
        if len(groups) > len(self.groups):
            self.groups = tuple(groups)
            self._groups_by_count[len(groups)] = self.groups
        return pieces

    def rows(self, value: Tensor, groups: Sequence[Group], size: int) -> Tensor:
        """Give the rows of some groups, ``size`` each, of a value that was made before they were parted, or after."""
        made = self._groups_by_count.get(len(value) // size)
        if made is None or len(value) % size:
            self.is_broken = True
            return value
        if any(self._last in group for group in groups):
            self.show(value, made)
        if made == groups:
            return value
        place_of = {lane: place for place, group in enumerate(made) for lane in group}
        places = [place_of[group[0]] for group in groups]
        first, end = places[0], places[0] + len(places)
        if places == list(range(first, end)):
            return value[first * size : end * size]
        return torch.cat([value[place * size : (place + 1) * size] for place in places])

    def lanes_of(self, values: Tensor) -> Tensor:
        """Give one block of rows a lane, of values with one block a group; shape (lanes, rows of a block, ...)."""
        blocks = values.reshape(len(self.groups), -1, *values.shape[1:])
        place_of = {lane: place for place, group in enumerate(self.groups) for lane in group}
        return blocks[[place_of[lane] for lane in range(len(place_of))]]


class Lanes(Protocol):
    """What stands in a layer's record while passes with lanes run."""

    def blend(self, x: Tensor, h: Tensor, add: Add) -> Tensor:
        """Give the blended rows, one block a group, lanes parted that differ from here on."""
        ...

    def source_rows(self, x: Tensor) -> Tensor:
        """Give the rows of a skip seed's input that belong to the rows being blended."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSeeds:
    """The seeds of one layer that configurations name, and how the layer stands without them saying."""

    layer: SeedHolder
    """The layer."""
    seeds: tuple[Seed, ...]
    """Those that are named."""
    standing: Mapping[Seed, tuple[BlendMode, bool]]
    """Mode and silence of the seeds that take part anyway."""
    terms: tuple[Seed, ...]
    """All that may take part, in order."""

    @classmethod
    def of(cls, layer: SeedHolder, seeds: Sequence[Seed]) -> LayerSeeds:
        """Note how a layer stands."""
        standing = {seed: (seed.mode, seed.is_silent) for seed in layer._kasmina.terms}
        terms = sorted({*standing, *seeds}, key=lambda seed: seed.index)
        return cls(layer=layer, seeds=tuple(seeds), standing=standing, terms=tuple(terms))

    def setting(self, alphas: Sequence[float | None]) -> Setting:
        """Give the alphas of the named seeds in a lane; one that does not take part by itself is off unless named."""
        return tuple(
            0.0 if alpha is None and seed not in self.standing else alpha
            for seed, alpha in zip(self.seeds, alphas, strict=True)
        )

    def set(self, setting: Setting) -> None:
        """Let the named seeds take part so."""
        if self.layer._kasmina.terms is not self.terms:  # at first, and after a seed was cut off
            self.layer.set_terms(self.terms)
        for seed, alpha in zip(self.seeds, setting, strict=True):
            mode, is_silent = self.standing[seed] if alpha is None else (_mode_at(alpha), alpha == 0.0)
            if seed.mode is not mode:  # a module's attributes are slow to write
                seed.mode = mode
            if seed.is_silent is not is_silent:
                seed.is_silent = is_silent
            if alpha and mode is BlendMode.TRIAL:
                seed.trial_alpha.fill_(alpha)


def _mode_at(alpha: float) -> BlendMode:
    """Give how a seed takes part at an alpha: whole at 1, and then nothing is written that a graph may hold on to."""
    return BlendMode.WHOLE if alpha == 1.0 else BlendMode.TRIAL


class LayerLanes:
    """Blends a layer's seeds by the alphas of each lane; stands in its record while passes with lanes run."""

    def __init__(self, own: LayerSeeds, settings: Sequence[Setting], one: LanePass) -> None:
        self._own = own
        self._settings = settings
        self._pass = one
        self._blended: Sequence[Group] = ()
        self._size = 0

    def blend(self, x: Tensor, h: Tensor, add: Add) -> Tensor:
        """Give the blended rows, one block a group, lanes parted that differ from here on."""
        size = self._pass.enter(self._own.layer.layer_name, x, h)
        if size is None:
            return h
        before, x_size = self._pass.groups, len(x) // len(self._pass.groups)
        self._size, parts = size, []
        for first, end, setting in _together(self._pass.split(self._settings)):
            self._blended = before[first:end]
            self._own.set(setting)
            parts.append(add(x[first * x_size : end * x_size], h[first * size : end * size]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def source_rows(self, x: Tensor) -> Tensor:
        """Give the rows of a skip seed's input that belong to the rows being blended."""
        return self._pass.rows(x, self._blended, self._size)


def _together(pieces: Sequence[tuple[int, Setting]]) -> Iterator[tuple[int, int, Setting]]:
    """Give (first place, end, setting) of what is blended at once: neighbours join where every chosen seed is off."""
    first, end, setting = pieces[0][0], pieces[0][0] + 1, pieces[0][1]
    for place, further in pieces[1:]:
        if further == setting and place == end and all(alpha == 0.0 for alpha in setting):
            end += 1
            continue
        yield first, end, setting
        first, end, setting = place, place + 1, further
    yield first, end, setting
