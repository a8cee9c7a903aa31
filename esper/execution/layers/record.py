"""What a Kasmina layer keeps besides its parent's attributes: plain data, never parameters or submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch import nn

from esper.contracts.blueprint import Site
from esper.contracts.run import Contribution, SkipSite
from esper.execution._native import SignalRing
from esper.execution.device_probe import PendingFigures, Stopwatch
from esper.execution.health import Figures, RollingHealth
from esper.execution.layers.pulse import Pulse
from esper.execution.layers.skips import SkipInputs
from esper.execution.state import LayerStateLayout
from esper.telemetry.client import OonaClient

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from esper.execution.artifact import VerifiedKernel
    from esper.execution.lanes import Lanes
    from esper.execution.seed import BlendMode, Seed

DEFAULT_TELEMETRY_INTERVAL_STEPS: Final = 128
"""A layer measures its first forward pass and then one in every 128th pass of the model."""

_NO_CONTRIBUTIONS: Final[Mapping[int, Contribution]] = {}
"""Shared by all layers without any: an empty dictionary of its own would be 64 bytes a layer. Nobody writes to it."""


class KernelSource(Protocol):
    """Where kernels come from: the cache tiers in a run, anything else in tests."""

    def fetch(self, artifact_id: str) -> Awaitable[VerifiedKernel]:
        """Give a verified kernel.

        Raises:
            NotFoundError: There is no such kernel.
            CorruptDataError: It does not verify.
            UnavailableError: No tier could be reached.
        """
        ...


class PendingSignal:
    """A sampled forward pass whose figures or gradient have not all come yet."""

    __slots__ = ("figures", "gradient_on_device", "on_device", "step", "watch")

    def __init__(self, step: int, watch: Stopwatch) -> None:
        self.step = step
        self.watch = watch
        self.figures: Figures | None = None
        self.on_device: PendingFigures | None = None
        self.gradient_on_device: PendingFigures | None = None


class NestedPathGuard:
    """Keeps an ``nn.TransformerEncoder`` from packing its input while a seed inside takes part.

    In eval mode, with a padding mask and without gradients, the encoder hands its layers nested tensors, which the
    fused path understands and kernels do not.
    """

    def __init__(self, encoder: nn.TransformerEncoder, inside: Iterable[nn.Module]) -> None:
        self._encoder = encoder
        self._inside = tuple(inside)
        self._is_holding = False
        self._wanted = False

    def refresh(self) -> None:
        """Switch packing off once a seed inside takes part or reads from inside, and back once none does."""
        records = (vars(layer).get("_kasmina") for layer in self._inside)
        is_live = any(record is not None and (record.terms or record.is_read) for record in records)
        if is_live and not self._is_holding:
            self._wanted, self._encoder.use_nested_tensor = self._encoder.use_nested_tensor, False
        elif self._is_holding and not is_live:
            self._encoder.use_nested_tensor = self._wanted
        self._is_holding = is_live


class LayerRecord:
    """A layer's place in the model, what it has measured, and which seeds take part in its forward pass.

    A copy of a layer has no bus client: two models must not write into one ring.
    """

    __slots__ = (
        "_health",
        "_passes_at_start",
        "_passes_before",
        "batch_size",
        "client",
        "contributions",
        "displaced",
        "guards",
        "has_separate_gates",
        "is_armed",
        "is_common",
        "is_installed",
        "is_paused",
        "is_read",
        "is_site_settled",
        "kernel_source",
        "lanes",
        "layer_id",
        "num_kept",
        "num_samples",
        "order",
        "pending",
        "pulse",
        "ring",
        "site",
        "skip_sites",
        "skips",
        "standing",
        "state_layout",
        "telemetry_enabled",
        "terms",
        "waiting_since",
        "was_recomputed",
    )

    def __init__(self, state_layout: LayerStateLayout, *, layer_id: int, pulse: Pulse, skips: SkipInputs) -> None:
        self.state_layout = state_layout
        self.layer_id = layer_id
        self.pulse = pulse
        self.skips = skips
        self.client: OonaClient | None = None
        self.ring: SignalRing | None = None
        self.kernel_source: KernelSource | None = None
        self.site: Site | None = None
        self.is_site_settled = False
        self.batch_size: int | None = None
        self.telemetry_enabled = False
        self.is_paused = False
        self.is_armed = True
        self.terms: tuple[Seed, ...] = ()
        self.lanes: Lanes | None = None
        self.standing: tuple[tuple[Seed, BlendMode], ...] = ()
        self.has_separate_gates = False
        self.guards: tuple[NestedPathGuard, ...] = ()
        self.is_common = True
        self.is_installed = False
        self.displaced: Callable[..., Any] | None = None
        self.num_samples = 0
        self._health: RollingHealth | None = None
        self.pending: PendingSignal | None = None
        self.contributions: Mapping[int, Contribution] = _NO_CONTRIBUTIONS
        self.num_kept = 0
        self.is_read = False
        self.order = 0
        self.skip_sites: tuple[SkipSite, ...] | None = None
        self._passes_before = 0
        self._passes_at_start = 0
        self.waiting_since: int | None = None
        self.was_recomputed = False

    @property
    def health(self) -> RollingHealth:
        """Statistics over the sampled passes; made with the first one that is asked for or measured."""
        if self._health is None:
            self._health = RollingHealth()
        return self._health

    @property
    def is_plain(self) -> bool:
        """Whether the layer has nothing to do but its parent's forward."""
        return not self.terms and not self.is_armed and not self.is_read

    def switch_telemetry(self, enabled: bool) -> None:
        """Start or end measuring; the next forward pass is measured where it starts."""
        self._passes_before, self._passes_at_start = self._num_passes, self.pulse.num_passes
        self.telemetry_enabled, self.pending = enabled, None
        self.is_armed = enabled or not self.is_site_settled
        self.pulse.is_on = self.pulse.is_on or enabled

    def end_sample(self) -> None:
        """Note that a pass has been measured; with an interval of one step the next is due at once."""
        self.num_samples += self.telemetry_enabled
        every_pass = self.telemetry_enabled and self.pulse.interval_steps == 1
        self.is_armed = every_pass or not self.is_site_settled

    def wait_for_recomputation(self) -> None:
        """Put off cutting off a seed: the pass that it failed in may yet be recomputed."""
        if self.waiting_since is None:
            self.waiting_since, self.was_recomputed = self.state_layout.states.step, False

    def is_wait_over(self, *, recomputing: bool) -> bool:
        """Whether this pass is past the step whose recomputation a cut-off waits for; notes a recomputation."""
        if self.waiting_since is None:
            return False
        self.was_recomputed = self.was_recomputed or recomputing
        return not recomputing and (self.was_recomputed or self.state_layout.states.step != self.waiting_since)

    def note_figures(self, pending: PendingSignal, figures: Figures | None) -> None:
        """Average the figures of a sampled pass into the layer's health."""
        pending.figures, pending.on_device = figures, None
        self.health.add(figures, latency_ms=pending.watch.elapsed_ms())

    def publish(self, pending: PendingSignal, *, gradient_variance: float | None) -> None:
        """Push a sampled pass into the run's ring; a gradient that never came is not measured."""
        self.pending = None
        self.health.gradient_variance.add(gradient_variance)
        if self.ring is None:
            return
        found = pending.figures
        self.ring.push(
            self.layer_id,
            -1,
            pending.step,
            None if found is None else found.mean,
            None if found is None else found.variance,
            None if found is None else found.entropy,
            None if found is None else found.dead_share,
            None if found is None else found.nonfinite_share,
            gradient_variance,
            pending.watch.elapsed_ms(),
        )

    def note_contribution(self, seed_idx: int, contribution: Contribution | None) -> None:
        """Keep the measured effect of a seed; ``None`` forgets it."""
        others = {index: known for index, known in self.contributions.items() if index != seed_idx}
        added = {} if contribution is None else {seed_idx: contribution}
        self.contributions = (others | added) or _NO_CONTRIBUTIONS

    def settle(self) -> None:
        """Publish what is pending, with what has arrived from the device by now; waits for nothing."""
        pending = self.pending
        if pending is None:
            return
        if pending.on_device is not None:
            self.note_figures(pending, pending.on_device.take())
        gradient = pending.gradient_on_device.take() if pending.gradient_on_device is not None else None
        self.publish(pending, gradient_variance=None if gradient is None else gradient.variance)

    @property
    def num_forwards(self) -> int | None:
        """Passes of the model counted since telemetry was switched on; ``None`` where it never was."""
        return max(self._num_passes, self.num_samples) if self.telemetry_enabled else None

    @property
    def _num_passes(self) -> int:
        running = self.pulse.num_passes - self._passes_at_start if self.telemetry_enabled else 0
        return self._passes_before + running

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        state = {name: getattr(self, name) for name in self.__slots__}
        state.update(client=None, ring=None, pending=None)
        return None, state
