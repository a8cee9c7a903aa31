"""The state of every seed of a model: one native layout, and a view of it per layer.

All changes go through :meth:`LayerStateLayout.transition`, which asks the native table; nothing else writes states.
One writer (the training thread), any number of readers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution._native import SeedRecord, StateLayout

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedTransition:
    """One step a seed has taken."""

    layer: str
    """Dotted module name."""
    seed_index: int
    """Seed within its layer."""
    from_state: SeedLifecycleState
    """State before."""
    to_state: SeedLifecycleState
    """State after."""
    step: int
    """Training step at which it was taken."""
    alpha: float
    """Blend factor after the step."""


TransitionListener = Callable[[SeedTransition], None]


class TransitionOwner(Protocol):
    """The layer behind a view: may refuse a step before it is taken, and acts on it afterwards."""

    def _before_transition(self, seed_idx: int, to: SeedLifecycleState) -> None: ...

    def _after_transition(self, seed_idx: int, to: SeedLifecycleState) -> None: ...


class SeedStates:
    """State of every seed of a model, and the training step that transitions and signals are stamped with.

    Copies (``copy.deepcopy``) have a layout of their own and no listeners.
    """

    def __init__(self, num_seeds: int, *, capacity: int | None = None) -> None:
        self.layout = StateLayout(num_seeds, capacity)
        self.step = 0
        self._listeners: list[TransitionListener] = []
        self._is_silent = False

    @property
    def num_seeds(self) -> int:
        """Seeds of the model, dormant ones included."""
        return self.layout.num_seeds

    def subscribe(self, listener: TransitionListener) -> Callable[[], None]:
        """Call ``listener`` after every transition, in the thread that made it; gives the function that ends that.

        What a listener raises reaches whoever asked for the transition, which has already happened.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def announce(self, transition: SeedTransition) -> None:
        """Tell every listener of a step that was taken."""
        for listener in () if self._is_silent else tuple(self._listeners):
            listener(transition)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Tell no listener meanwhile: for rebuilding what was announced before."""
        before, self._is_silent = self._is_silent, True
        try:
            yield
        finally:
            self._is_silent = before

    def counts_by_state(self) -> dict[SeedLifecycleState, int]:
        """Give the number of seeds in each state, states without seeds included."""
        return count_states(self.layout.lifecycle_states)

    def snapshot(self) -> bytes:
        """Give all seeds' state as versioned bytes with a checksum."""
        return self.layout.snapshot()

    def restore(self, snapshot: bytes) -> None:
        """Take over a snapshot, without transitions: the caller sees to it that the layers agree.

        Raises:
            CorruptDataError: Magic, version, size or checksum do not hold.
            InvalidStateError: The snapshot has fewer seeds.
            CapacityExceededError: It has more than the capacity.
        """
        self.layout.restore(snapshot)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_states, (self.num_seeds, self.layout.capacity, self.step, self.snapshot())


def _restored_states(num_seeds: int, capacity: int, step: int, snapshot: bytes) -> SeedStates:
    states = SeedStates(num_seeds, capacity=capacity)
    states.step = step
    states.restore(snapshot)
    return states


def count_states(numbers: Iterable[int]) -> dict[SeedLifecycleState, int]:
    """Give how often each state occurs among state numbers."""
    found = Counter(int(number) for number in numbers)
    return {state: found[state] for state in SeedLifecycleState}


class LayerStateLayout:
    """One layer's seeds in the model's layout: zero-copy, read-only columns, and the one way to change a state.

    A column is a view made when it is asked for: eight of them kept for every layer would take up more than the rows.
    """

    __slots__ = ("_owner", "first", "layer", "num_seeds", "states")

    def __init__(self, states: SeedStates, layer: str, first: int, num_seeds: int) -> None:
        self.states = states
        self.layer = layer
        self.first = first
        self.num_seeds = num_seeds
        self._owner: TransitionOwner | None = None

    @property
    def lifecycle_states(self) -> NDArray[np.uint8]:
        """State of each seed, as a number."""
        return self._rows_of(self.states.layout.lifecycle_states)

    @property
    def alpha_blend(self) -> NDArray[np.float32]:
        """Share of each seed, 0 to 1."""
        return self._rows_of(self.states.layout.alpha)

    @property
    def kernel_ids(self) -> NDArray[np.uint64]:
        """Number that stands for each seed's kernel; 0 for none."""
        return self._rows_of(self.states.layout.kernel_ids)

    @property
    def blueprint_ids(self) -> NDArray[np.uint64]:
        """Number that stands for each seed's blueprint; 0 for none."""
        return self._rows_of(self.states.layout.blueprint_ids)

    @property
    def last_transition_steps(self) -> NDArray[np.uint64]:
        """Training step of each seed's last transition."""
        return self._rows_of(self.states.layout.last_transition_steps)

    @property
    def forwards(self) -> NDArray[np.uint64]:
        """Sound forward passes of each seed."""
        return self._rows_of(self.states.layout.forwards)

    @property
    def errors(self) -> NDArray[np.uint64]:
        """Failures of each seed."""
        return self._rows_of(self.states.layout.errors)

    @property
    def fallbacks(self) -> NDArray[np.uint64]:
        """Passes that went on without each seed."""
        return self._rows_of(self.states.layout.fallbacks)

    def _rows_of(self, column: NDArray[T]) -> NDArray[T]:
        rows = column[self.first : self.first + self.num_seeds]
        rows.flags.writeable = False
        return rows

    def __len__(self) -> int:
        return self.num_seeds

    def attach_owner(self, owner: TransitionOwner) -> None:
        """Name the layer that is asked before, and told after, each transition."""
        self._owner = owner

    def index(self, seed_idx: int) -> int:
        """Give the seed's row in the model's layout.

        Raises:
            InvalidInputError: The layer has no such seed.
        """
        if type(seed_idx) is not int or not 0 <= seed_idx < self.num_seeds:
            raise InvalidInputError.of("seed_idx", f"be 0 to {self.num_seeds - 1} for layer {self.layer!r}", seed_idx)
        return self.first + seed_idx

    def state(self, seed_idx: int) -> SeedLifecycleState:
        """Give the seed's state."""
        return SeedLifecycleState(self.states.layout.state(self.index(seed_idx)))

    def read(self, seed_idx: int) -> SeedRecord:
        """Give one seed's record, consistent in itself; from any thread."""
        return self.states.layout.read(self.index(seed_idx))

    def transition(self, seed_idx: int, to: SeedLifecycleState, step: int | None = None) -> None:
        """Move a seed to another state at a training step (the model's current one by default).

        Raises:
            InvalidTransitionError: The table forbids it; the seed keeps its state.
            InvalidStateError: The layer forbids it, such as ACTIVE without a kernel.
        """
        row, to = self.index(seed_idx), SeedLifecycleState(to)
        before, at_step = self.state(seed_idx), self.states.step if step is None else step
        if self._owner is not None:
            self._owner._before_transition(seed_idx, to)
        self.states.layout.transition(row, to, at_step)
        if self._owner is not None:
            self._owner._after_transition(seed_idx, to)
        self.states.announce(
            SeedTransition(
                layer=self.layer,
                seed_index=seed_idx,
                from_state=before,
                to_state=to,
                step=at_step,
                alpha=float(self.alpha_blend[seed_idx]),
            )
        )

    def set_alpha(self, seed_idx: int, alpha: float) -> None:
        """Note the seed's share; layers do this through their own ``set_alpha``, which also moves the tensor.

        Raises:
            InvalidInputError: ``alpha`` is not in [0, 1].
        """
        self.states.layout.set_alpha(self.index(seed_idx), alpha)

    def set_kernel(self, seed_idx: int, kernel_id: int, blueprint_id: int) -> None:
        """Note which kernel and blueprint stand at the seed; 0 for none."""
        self.states.layout.set_kernel(self.index(seed_idx), kernel_id, blueprint_id)

    def counts_by_state(self) -> dict[SeedLifecycleState, int]:
        """Give the number of the layer's seeds in each state."""
        return count_states(self.lifecycle_states)

    def __reduce__(self) -> tuple[Any, ...]:
        made_from = (self.states, self.layer, self.first, self.num_seeds)
        return LayerStateLayout, made_from, (None, {"_owner": self._owner})
