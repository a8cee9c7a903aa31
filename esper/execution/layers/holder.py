"""The seeds that stand at a layer: their modules, life cycle, share, and what a checkpoint keeps of them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from esper.blueprints import canonical_bytes
from esper.contracts.blueprint import Site, SiteKind
from esper.contracts.errors import CorruptDataError, InvalidStateError
from esper.contracts.lifecycle import LIVE_STATES, SeedLifecycleState
from esper.execution.circuit_breaker import FailureKind
from esper.execution.device_guard import read_failures
from esper.execution.executor import Placement, build_kernel
from esper.execution.grown import GrownSeed
from esper.execution.layers.graphs import structure_changed
from esper.execution.layers.ranks import require_whole
from esper.execution.layers.recompute import is_recomputing, may_be_recomputed
from esper.execution.layers.record import LayerRecord
from esper.execution.seed import BlendMode, Origin, Seed, extra_states, number_of
from esper.execution.state import LayerStateLayout

log = logging.getLogger(__name__)

_BLENDED = frozenset({SeedLifecycleState.EVALUATING, SeedLifecycleState.FOSSILIZED, SeedLifecycleState.CULLED})
_FREED = frozenset({SeedLifecycleState.EMBARGOED, SeedLifecycleState.DORMANT})
_ROUTE = (
    SeedLifecycleState.LOADING,
    SeedLifecycleState.ACTIVE,
    SeedLifecycleState.EVALUATING,
    SeedLifecycleState.FOSSILIZED,
)


class SeedHolder(nn.Module):
    """The part of a Kasmina layer that holds seeds. Training thread only, but for reading states."""

    host_class: ClassVar[type[nn.Module]]
    """Class that this one stands in for: the layer's before it was wrapped, or the form at rest of a busy one."""
    site_kind: ClassVar[SiteKind]
    """Kind of site that the layer is."""

    _kasmina: LayerRecord

    @property
    def layer_name(self) -> str:
        """Dotted module name in the wrapped model."""
        return self._kasmina.state_layout.layer

    @property
    def num_seeds(self) -> int:
        """Seeds of the layer, dormant ones included."""
        return self._kasmina.state_layout.num_seeds

    @property
    def state_layout(self) -> LayerStateLayout:
        """The layer's seeds in the model's native layout."""
        return self._kasmina.state_layout

    @property
    def site(self) -> Site | None:
        """Kind and shapes; ``None`` until a forward pass has shown them."""
        return self._kasmina.site

    def find_seed(self, seed_idx: int) -> Seed | None:
        """Give the module of a seed; ``None`` where none stands there."""
        self.state_layout.index(seed_idx)
        bank = self._modules.get("seeds")
        found = bank._modules.get(str(seed_idx)) if bank is not None else None
        return found if isinstance(found, Seed) else None

    def live_seeds(self) -> tuple[Seed, ...]:
        """Give the modules that stand at the layer, in order."""
        found = (self.find_seed(index) for index in range(self.num_seeds))
        return tuple(seed for seed in found if seed is not None)

    def seed_parameters(self, seed_idx: int) -> list[nn.Parameter]:
        """Give the trainable parameters of a seed.

        Raises:
            InvalidStateError: No module stands there.
        """
        return [parameter for parameter in self.require_seed(seed_idx).parameters() if parameter.requires_grad]

    def require_seed(self, seed_idx: int) -> Seed:
        """Give the module of a seed.

        Raises:
            InvalidStateError: No module stands there.
        """
        found = self.find_seed(seed_idx)
        if found is None:
            state = self.state_layout.state(seed_idx).name
            raise InvalidStateError(
                f"seed {seed_idx} of layer {self.layer_name!r} must hold a kernel, got none in state {state}",
                parameter="seed_idx",
            )
        return found

    def transition(self, seed_idx: int, to: SeedLifecycleState, step: int | None = None) -> None:
        """Move a seed through its life cycle; the same as ``state_layout.transition``.

        FOSSILIZED sets alpha to 1, ERROR to 0. CULLED frees a seed without share; one with a share stays blended, so
        that alpha can be ramped out, until alpha is 0 or the seed is EMBARGOED.

        Raises:
            InvalidTransitionError: The table forbids it.
            InvalidStateError: ACTIVE without a kernel.
        """
        self.state_layout.transition(seed_idx, to, step)

    def _before_transition(self, seed_idx: int, to: SeedLifecycleState) -> None:
        if to in LIVE_STATES:
            self.require_seed(seed_idx)

    def _after_transition(self, seed_idx: int, to: SeedLifecycleState) -> None:
        found = self.find_seed(seed_idx)
        if to is SeedLifecycleState.FOSSILIZED:
            self._kasmina.num_kept += 1
            self.set_alpha(seed_idx, 1.0)
        elif to is SeedLifecycleState.ERROR:
            if found is not None:
                found.forget_alpha()
            self.set_alpha(seed_idx, 0.0)
        elif to in _FREED or (to is SeedLifecycleState.CULLED and (found is None or found.is_silent)):
            self._free(seed_idx)
        self.refresh_terms()

    def set_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set a seed's share, in the state layout and on the device; neither recompiles nor waits.

        A culled seed is freed once its share is 0.

        Raises:
            InvalidInputError: ``alpha`` is not in [0, 1].
            InvalidStateError: The seed is not EVALUATING, FOSSILIZED or CULLED and ``alpha`` is not 0.
        """
        state, found = self.state_layout.state(seed_idx), self.find_seed(seed_idx)
        if alpha != 0.0 and (state not in _BLENDED or found is None):
            raise InvalidStateError(
                f"seed {seed_idx} of layer {self.layer_name!r} must be EVALUATING, FOSSILIZED or CULLED to "
                f"have a share, got {state.name}",
                parameter="alpha",
            )
        self.state_layout.set_alpha(seed_idx, alpha)
        if found is not None:
            found.set_alpha(alpha)
            if found.mode is BlendMode.WHOLE:
                self.refresh_terms()
            if alpha == 0.0 and state is SeedLifecycleState.CULLED:
                self._free(seed_idx)
                self.refresh_terms()

    def refresh_terms(self) -> None:
        """Work out again which seeds take part in the forward pass."""
        terms = []
        for seed in self.live_seeds():
            state = self.state_layout.state(seed.index)
            alpha = float(self.state_layout.alpha_blend[seed.index])
            # The other ranks go on waiting for its gradients: DistributedDataParallel does not let a parameter go.
            owes = state is SeedLifecycleState.ERROR and seed.breaker.ranks is not None
            whole = state is SeedLifecycleState.FOSSILIZED and alpha == 1.0
            seed.mode = BlendMode.WHOLE if whole else BlendMode.ALPHA
            seed.is_silent = alpha == 0.0
            if state in _BLENDED or owes:
                terms.append(seed)
        standing = tuple((seed, seed.mode) for seed in terms)
        if standing != self._kasmina.standing:
            self._kasmina.standing, self._kasmina.has_separate_gates = standing, False
            structure_changed()
        self.set_terms(tuple(terms))

    def set_terms(self, terms: tuple[Seed, ...]) -> None:
        """Let exactly these seeds take part in the forward pass.

        Meanwhile a forward hook that does nothing stands on the seeds' container: fused paths, which go around a
        submodule's forward, step back where they see a hook on any module below them. Nobody calls the container, so
        the hook costs nothing.
        """
        self._kasmina.terms = terms
        self._kasmina.skips.let_read(self.layer_name, frozenset(seed.source for seed in terms if seed.source))
        bank = self._modules.get("seeds")
        if bank is not None:
            if not terms:
                _drop_hook(bank)
            elif _keep_forward not in bank._forward_hooks.values():
                bank.register_forward_hook(_keep_forward)
        for guard in self._kasmina.guards:
            guard.refresh()
        self.refresh_forward()

    def set_read(self, is_read: bool) -> None:
        """Keep the layer's input in every pass from now on, for the skip seeds that read it, or no longer.

        A hook that does nothing holds fused paths back, as in ``set_terms``.
        """
        self._kasmina.is_read = is_read
        if is_read:
            self.register_forward_hook(_keep_forward)
        else:
            _drop_hook(self)
        for guard in self._kasmina.guards:
            guard.refresh()
        self.refresh_forward()

    @abstractmethod
    def refresh_forward(self) -> None:
        """Work out again whether the layer has anything to do but its parent's forward."""

    def _free(self, seed_idx: int) -> None:
        bank = self._modules.get("seeds")
        if bank is not None and bank._modules.pop(str(seed_idx), None) is not None:
            structure_changed()  # it had graphs of its trials
            if not bank._modules:
                del self._modules["seeds"]
        self.state_layout.set_alpha(seed_idx, 0.0)
        self.state_layout.set_kernel(seed_idx, 0, 0)
        self._kasmina.note_contribution(seed_idx, None)

    def placement(self) -> Placement:
        """Give the device and floating type of the layer's own parameters."""
        own = [*self._parameters.values(), *self._buffers.values()]
        for value in (*own, *self.parameters()):
            if value is not None and value.is_floating_point():
                return Placement(device=value.device, dtype=value.dtype)
        return Placement(device=torch.device("cpu"), dtype=torch.get_default_dtype())

    def note_failure(self, seed: Seed, kind: FailureKind, detail: str) -> None:
        """Count a failed pass of a seed whose contribution was dropped; three in a row send it to ERROR."""
        self._note_failures(seed, kind, detail, times=1, in_row=seed.breaker.failures_in_row + 1)

    def _note_failures(self, seed: Seed, kind: FailureKind, detail: str, *, times: int, in_row: int) -> None:
        layout = self.state_layout
        row = layout.index(seed.index)
        for _ in range(times):
            layout.states.layout.count_error(row)
            layout.states.layout.count_fallback(row)
        is_open = seed.breaker.note_failure(kind, detail, in_row=in_row)
        log.warning(
            "seed_cut_off" if is_open else "seed_failed",
            extra={"layer": self.layer_name, "seed_index": seed.index, "kind": kind.value, "detail": detail},
        )
        # Inside a backward pass nothing may be moved that autograd has yet to replay; the next pass does it. Where
        # ranks train the seed together, they settle it together.
        if is_open and seed.breaker.ranks is None and not is_recomputing():
            if may_be_recomputed():
                self._kasmina.wait_for_recomputation()
            else:
                self.cut_off(seed)

    def separate_gates(self) -> None:
        """Give each seed a gate of its own, until other seeds take part: one spoils gradients, and which is unknown."""
        self._kasmina.has_separate_gates = True

    def cut_off_waiting(self) -> None:
        """Cut off the seeds that had to wait until no recomputation of a checkpointed pass could ask for them."""
        self._kasmina.waiting_since, self._kasmina.was_recomputed = None, False
        for seed in self.live_seeds():
            if seed.breaker.is_open:
                self.cut_off(seed)

    def cut_off(self, seed: Seed) -> None:
        """Send a seed whose breaker is open to ERROR; one that is being ramped out is freed."""
        state = self.state_layout.state(seed.index)
        if state in LIVE_STATES:
            self.transition(seed.index, SeedLifecycleState.ERROR)
        elif state is SeedLifecycleState.CULLED:
            self.set_alpha(seed.index, 0.0)

    def settle_failures(self) -> int:
        """Read the failures that the device counted (accelerators, compiled graphs); gives how many there were.

        Waits for the device, so it belongs at a step boundary, every few steps.
        """
        if self._kasmina.waiting_since is not None:
            self.cut_off_waiting()
        found = 0
        for seed in self.live_seeds():
            failures, in_row = read_failures(seed)
            found += failures
            if failures:
                detail = "delta holds NaN or infinity"
                self._note_failures(seed, FailureKind.NON_FINITE, detail, times=failures, in_row=in_row)
            elif seed.breaker.is_open and seed.breaker.ranks is None:
                self.cut_off(seed)
        return found

    # --- checkpoints ---

    def grown_seed(self, seed_idx: int) -> GrownSeed:
        """Give what a checkpoint must know of a live seed, beside its weights.

        Raises:
            InvalidStateError: No module stands there, or it was not built from a blueprint.
        """
        seed = self.require_seed(seed_idx)
        if seed.ir is None or seed.site is None:
            raise InvalidStateError(
                f"seed {seed_idx} of layer {self.layer_name!r} must come from a blueprint to be saved, got a module",
                parameter="seed_idx",
            )
        return GrownSeed(
            layer=self.layer_name,
            seed_index=seed_idx,
            state=self.state_layout.state(seed_idx),
            alpha=float(self.state_layout.alpha_blend[seed_idx]),
            ir=seed.ir,
            site=seed.site,
            blueprint_id=seed.blueprint_id,
            artifact_id=seed.artifact_id,
            adaptation_id=seed.adaptation_id,
            source=seed.source,
        )

    def rebuild_seed(self, grown: GrownSeed) -> Seed:
        """Put a saved seed back at a DORMANT seed, in the state and with the share it had; its weights come after.

        Raises:
            InvalidStateError: The seed is not DORMANT, or the layer is sharded.
            CorruptDataError: The graph does not parse, or the model lacks the layer whose input the seed reads.
            InvalidBlueprintError: The graph is not legal at the saved site.
        """
        index = grown.seed_index
        require_whole(self)
        if self.state_layout.state(index) is not SeedLifecycleState.DORMANT:
            name = self.state_layout.state(index).name
            raise InvalidStateError(
                f"seed {index} of layer {self.layer_name!r} must be DORMANT to be rebuilt, got {name}"
            )
        if grown.source and self._kasmina.skips.layer(grown.source) in (None, self):
            raise CorruptDataError(f"a skip seed of {self.layer_name!r} must read another layer, got {grown.source!r}")
        ir = grown.blueprint_ir()
        module = build_kernel(ir, grown.site, self.placement())
        origin = Origin(
            ir=canonical_bytes(ir),
            blueprint_id=grown.blueprint_id,
            artifact_id=grown.artifact_id,
            adaptation_id=grown.adaptation_id,
        )
        seed = self._new_seed(index, module, origin, grown.site, grown.source)
        if self._kasmina.site is None and not grown.source:
            self._kasmina.site, self._kasmina.is_site_settled = grown.site, True
        self.transition(index, SeedLifecycleState.LOADING)
        self._plant(seed)
        for step in _ROUTE[1 : _ROUTE.index(_route_end(grown.state)) + 1]:
            self.transition(index, step)
        self.set_alpha(index, grown.alpha)
        if self.state_layout.state(index) is not grown.state:
            self.transition(index, grown.state)
        return seed

    def clear_seed(self, seed_idx: int) -> None:
        """Bring a seed back to DORMANT along the table and free its module, whatever its state."""
        states = SeedLifecycleState
        if self.state_layout.state(seed_idx) is states.LOADING:
            self.transition(seed_idx, states.ERROR)
        if self.state_layout.state(seed_idx) in (*LIVE_STATES, states.ERROR):
            self.transition(seed_idx, states.CULLED)
        if self.state_layout.state(seed_idx) is states.CULLED:
            self.transition(seed_idx, states.EMBARGOED)
        if self.state_layout.state(seed_idx) is states.EMBARGOED:
            self.transition(seed_idx, states.DORMANT)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.grow_to(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def grow_to(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Build the seeds that the state dict names and the layer lacks, before their weights are read.

        Raises:
            CorruptDataError: A seed's entry is not ours, or is damaged; no seed has been built.
            InvalidBlueprintError: A graph is not legal at its site.
            InvalidStateError: A bare module's entry finds none at its seed.
        """
        packed = extra_states(state_dict, prefix)
        bare = [index for index, value in packed.items() if not value.numel()]
        for index in bare:
            self.require_seed(index)
        saved = {
            index: GrownSeed.from_bytes(value.cpu().numpy().tobytes())
            for index, value in sorted(packed.items())
            if index not in bare
        }
        for index, grown in saved.items():
            if grown.seed_index != index:
                raise CorruptDataError(f"{prefix}seeds.{index} must describe seed {index}, got {grown.seed_index}")
        self.match_seeds(saved)

    def clear_others(self, kept: Collection[int]) -> None:
        """Bring every live seed but those ``kept`` back to DORMANT, without telling listeners."""
        with self.state_layout.states.silenced():
            for seed in self.live_seeds():
                if seed.index not in kept:
                    self.clear_seed(seed.index)

    def match_seeds(self, saved: Mapping[int, GrownSeed]) -> None:
        """Bring these seeds to their saved form by index, without telling listeners; weights come after."""
        with self.state_layout.states.silenced():
            for index, grown in saved.items():
                present = self.find_seed(index)
                is_same = present is not None and (present.ir, present.source) == (grown.ir, grown.source)
                if not is_same or self.state_layout.state(index) is not grown.state:
                    self.clear_seed(index)
                    self.rebuild_seed(grown)
                else:
                    self.set_alpha(index, grown.alpha)

    def _new_seed(self, seed_idx: int, module: nn.Module, origin: Origin, site: Site, source: str) -> Seed:
        device = self.placement().device
        seed = Seed(module, index=seed_idx, device=device, site=site, origin=origin, source=source)
        seed._owner = (self,)
        return seed.train(self.training)

    def _plant(self, seed: Seed) -> None:
        """Make the seed's module a submodule ``seeds.<i>`` of the layer."""
        if "seeds" not in self._modules:
            self.add_module("seeds", nn.Module())
        bank = self._modules["seeds"]
        assert bank is not None
        bank.train(self.training)
        bank.add_module(str(seed.index), seed)
        # By index, whatever the order of germination: a rebuilt model must have its parameters in the same order.
        bank._modules = dict(sorted(bank._modules.items(), key=lambda item: int(item[0])))
        self.state_layout.set_kernel(seed.index, number_of(seed.artifact_id), number_of(seed.blueprint_id))


def _route_end(state: SeedLifecycleState) -> SeedLifecycleState:
    """Give the state from which a seed is brought to the one it was saved in."""
    if state is SeedLifecycleState.CULLED:
        return SeedLifecycleState.EVALUATING
    return SeedLifecycleState.ACTIVE if state is SeedLifecycleState.ERROR else state


def _drop_hook(module: nn.Module) -> None:
    hooks = module._forward_hooks
    for number in [number for number, hook in hooks.items() if hook is _keep_forward]:
        del hooks[number]


def _keep_forward(*_: Any) -> None:
    """Change nothing: a hook that is there keeps fused paths from going around the layer's forward."""
