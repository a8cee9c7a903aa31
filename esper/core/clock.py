"""Where a run is: steps, epochs, and how they relate."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final

_PACKETS_PER_LIFE: Final = 1_000_000


@dataclass(kw_only=True, slots=True)
class RunClock:
    """Counters of a run; belongs to the training thread."""

    step: int = 0
    """Optimizer steps completed."""
    epoch: int = 0
    """Epochs completed."""
    planned_epochs: int | None = None
    """Epochs planned; ``None`` when nobody said."""
    epoch_began_step: int = 0
    """Step at which the present epoch began."""
    last_epoch_steps: int | None = None
    """Steps of the last whole epoch; ``None`` before one is over."""
    packets: int = 0
    """Sequence of the last state packet."""
    life: str = field(default_factory=lambda: secrets.token_hex(4))
    """Name of this session: a run that is taken up again lives in another one."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the last whole epoch, or of the present one so far; at least 1."""
        return max(1, self.last_epoch_steps or self.step - self.epoch_began_step)

    @property
    def epochs_left(self) -> int | None:
        """Epochs until the planned end; ``None`` when nobody said how long the run is to be."""
        return None if not self.planned_epochs else max(0, self.planned_epochs - self.epoch)

    @property
    def progress(self) -> float | None:
        """Planned progress, 0 to 1; ``None`` when nobody said how long the run is to be."""
        return None if not self.planned_epochs else min(1.0, self.epoch / self.planned_epochs)

    def go_on_from(self, life: str, packets: int) -> None:
        """Number packets above all that an earlier life of the run, which ended after ``packets``, can have sent.

        The mesh takes a packet for old when its number is not above the last; nobody knows here how far that life came.
        """
        if life != self.life:
            next_life = (packets // _PACKETS_PER_LIFE + 1) * _PACKETS_PER_LIFE
            self.packets = max(self.packets, next_life)

    def end_epoch(self) -> None:
        """Count an epoch as completed."""
        self.last_epoch_steps = self.step - self.epoch_began_step
        self.epoch_began_step = self.step
        self.epoch += 1
