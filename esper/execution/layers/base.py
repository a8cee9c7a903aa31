"""The mixin that makes a layer hold seeds; concrete layers are in ``kinds``, users' own come by ``register_layer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from torch import Tensor

from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import Contribution, HealthSummary, LayerStatus, SeedStatus
from esper.execution.layers.forms import form_of
from esper.execution.layers.germination import Germination
from esper.execution.layers.graphs import busy_forward, settle_common
from esper.telemetry.client import OonaClient

NO_REPLICAS: Final = (
    "a wrapped model must not be replicated by nn.DataParallel, whose threads would write into one set of seeds: "
    "use DistributedDataParallel"
)
NO_SCRIPT: Final = (
    "a wrapped model must not be scripted, as its layers change while it grows: script what export() gives"
)


class KasminaLayer(Germination):
    """A layer that can hold seeds: its parent's forward, plus ``sum_i alpha_i * delta_i`` of its live seeds.

    Made by swapping ``__class__`` in place (``esper.wrap``), so parameters, names, hooks and optimizers stay.
    Everything but reading state is for the training thread.
    """

    busy_forward = busy_forward
    """What ``forward`` is while seeds take part or a pass is to be measured: that of the class's busy form.

    A layer whose class others derived, or with a ``forward`` of the user's in its instance, has it in its instance.
    """

    def refresh_forward(self) -> None:
        """Put ``busy_forward`` in the way or take it away, by whether there is anything to do.

        A ``forward`` that the user has put into the instance stays in force: below ours where it was there first, and
        around ours where it came later. A class that others derived from the busy form stays busy.
        """
        record, own = self._kasmina, self.__dict__
        form = form_of(type(self), is_busy=not record.is_plain)
        if form is not None and "forward" not in own:
            object.__setattr__(self, "__class__", form)
            record.displaced, record.is_installed = None, False
        elif record.is_plain:
            self._uninstall_forward()
        elif not record.is_installed or "forward" not in own:
            self._install_forward()
        settle_common(record)

    def remove_forward(self) -> None:
        """Take ``busy_forward`` away, whatever there is to do: out of the instance, and by the form at rest."""
        self._uninstall_forward()
        form = form_of(type(self), is_busy=False)
        if form is not None:
            object.__setattr__(self, "__class__", form)

    def _install_forward(self) -> None:
        """Put ``busy_forward`` into the instance, unless the class has it."""
        record, own = self._kasmina, self.__dict__
        if type(self).forward is not KasminaLayer.busy_forward:
            record.displaced, record.is_installed = own.get("forward"), True
            object.__setattr__(self, "forward", self.busy_forward)

    def _uninstall_forward(self) -> None:
        """Take ``busy_forward`` out of the instance, unless something else stands around it by now."""
        record, own = self._kasmina, self.__dict__
        if getattr(own.get("forward"), "__func__", None) is not KasminaLayer.busy_forward:
            return
        del own["forward"]
        if record.displaced is not None:
            own["forward"] = record.displaced
        record.displaced, record.is_installed = None, False

    def arm(self) -> None:
        """Measure the next forward pass."""
        if not self._kasmina.is_armed:
            self._kasmina.is_armed = True
            self.refresh_forward()

    # --- what a kind of layer may say otherwise ---

    def seed_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Give x out of the arguments of forward."""
        found: Tensor = args[0] if args else next(iter(kwargs.values()))
        return found

    def seed_output(self, out: Any) -> Tensor:
        """Give h out of the parent's output."""
        found: Tensor = out
        return found

    def with_output(self, out: Any, blended: Tensor) -> Any:
        """Give the parent's output with h replaced."""
        del out
        return blended

    def unbatched_dims(self) -> int | None:
        """Give the rank of an input without a batch dimension; ``None`` where the layer takes no such input."""
        return None

    def to_site(self, value: Tensor) -> Tensor:
        """Give the value with its batch dimension in front."""
        return value.unsqueeze(0) if value.dim() == self.unbatched_dims() else value

    def from_site(self, value: Tensor, *, like: Tensor) -> Tensor:
        """Undo ``to_site``."""
        return value.squeeze(0) if value.dim() != like.dim() else value

    # --- what it is refused to ---

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InvalidStateError(NO_REPLICAS)

    def __prepare_scriptable__(self) -> NoReturn:
        raise InvalidStateError(NO_SCRIPT)

    # --- what others see of it ---

    @property
    def telemetry_enabled(self) -> bool:
        """Whether sampled forward passes are measured."""
        return self._kasmina.telemetry_enabled

    @property
    def oona_client(self) -> OonaClient | None:
        """The run's bus client, whose ring takes this layer's signals; ``None`` without one."""
        return self._kasmina.client

    def set_telemetry(self, enabled: bool) -> None:
        """Switch measuring on or off; off, a dormant layer runs its parent's forward and nothing else."""
        self._kasmina.switch_telemetry(enabled)
        self.refresh_forward()

    def get_health_signal(self) -> HealthSummary:
        """Give rolling statistics over the sampled passes; a figure nobody measured is ``None``.

        On an accelerator the newest sample is in it once its figures have arrived.
        """
        pending = self._kasmina.pending
        if pending is not None and pending.gradient_on_device is not None:
            self._kasmina.settle()
        return self._kasmina.health.summary(errors=int(self.state_layout.errors.sum()))

    def get_layer_stats(self) -> dict[str, Any]:
        """Give counts and figures by name; a figure nobody measured is ``None``.

        ``kernel_execution_latency_ms`` is the mean over live seeds, one forward each; ``performance_improvement`` the
        sum of the measured contributions of the seeds that stand, in units of loss; ``total_forwards`` counts the eager
        passes of the model while telemetry is on.
        """
        record, layout = self._kasmina, self.state_layout
        latencies = [ms for ms in (layout.read(seed.index).latency_ms for seed in self.live_seeds()) if ms is not None]
        gains = record.contributions.values()
        return {
            "kernel_execution_latency_ms": sum(latencies) / len(latencies) if latencies else None,
            "total_forwards": record.num_forwards,
            "successful_adaptations": record.num_kept,
            "performance_improvement": sum(gain.estimate for gain in gains) if gains else None,
            "errors": int(layout.errors.sum()),
            "fallbacks": int(layout.fallbacks.sum()),
            "seeds_by_state": {state.name.lower(): count for state, count in layout.counts_by_state().items()},
        }

    def record_contribution(self, seed_idx: int, contribution: Contribution) -> None:
        """Note the measured effect of a seed; a later one replaces it, and freeing the seed forgets it."""
        self.state_layout.index(seed_idx)
        self._kasmina.note_contribution(seed_idx, contribution)

    def layer_status(self) -> LayerStatus:
        """Give the layer as a state packet shows it."""
        return LayerStatus(
            layer=self.layer_name,
            site=self.site,
            health=self.get_health_signal(),
            seeds=tuple(self._seed_status(index) for index in range(self.num_seeds)),
            skip_sites=self.skip_sites(),
        )

    def _seed_status(self, index: int) -> SeedStatus:
        found, record = self.find_seed(index), self.state_layout.read(index)
        return SeedStatus(
            seed_index=index,
            state=SeedLifecycleState(record.state),
            alpha=record.alpha,
            blueprint_id=found.blueprint_id if found else "",
            adaptation_id=found.adaptation_id if found else "",
            parameters=found.num_parameters if found else 0,
            last_transition_step=record.last_transition_step,
            source=found.source if found else "",
        )
