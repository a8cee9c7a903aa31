"""How a seed comes to stand at a layer: from a signed kernel, from a blueprint built in place, or from a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from esper.blueprints import content_id
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.artifact import VerifiedKernel
from esper.execution.executor import KernelExecutor, Placement, build_kernel, check_shapes, first_run
from esper.execution.layers.holder import SeedHolder, log
from esper.execution.layers.ranks import require_whole
from esper.execution.layers.record import KernelSource
from esper.execution.random_streams import frozen_streams
from esper.execution.seed import Seed


class Germination(SeedHolder):
    """The part of a Kasmina layer that brings seeds from DORMANT to ACTIVE. Training thread only."""

    @property
    def kernel_source(self) -> KernelSource | None:
        """Where :meth:`load_kernel` gets kernels; ``None`` until one is set."""
        return self._kasmina.kernel_source

    @kernel_source.setter
    def kernel_source(self, source: KernelSource | None) -> None:
        self._kasmina.kernel_source = source

    async def load_kernel(self, *, seed_idx: int, artifact_id: str) -> bool:
        """Fetch a kernel and bring it to ACTIVE at a dormant seed; true when it stands there.

        On any failure the seed passes through ERROR to CULLED; it never stays LOADING. Must run in the training thread.

        Raises:
            InvalidInputError: There is no such seed.
            InvalidStateError: No kernel source is set, the site is unknown, or the seed is not DORMANT.
            EsperError: What the source or the checks of :meth:`attach_kernel` say.
        """
        self.state_layout.index(seed_idx)
        source = self.kernel_source
        if source is None:
            raise InvalidStateError(f"layer {self.layer_name!r} must have a kernel source, got none: set kernel_source")
        self._required_site()
        self.transition(seed_idx, SeedLifecycleState.LOADING)
        try:
            kernel = await source.fetch(artifact_id)
        except BaseException as error:
            self._fail_loading(seed_idx, error)
            raise
        self.attach_kernel(seed_idx, kernel)
        return True

    def attach_kernel(self, seed_idx: int, kernel: VerifiedKernel, *, adaptation_id: str = "") -> Seed:
        """Bring a verified kernel to ACTIVE at a DORMANT or LOADING seed.

        On failure the seed passes through ERROR to CULLED.

        Raises:
            InvalidStateError: The site is unknown, the seed is in another state, or the layer is sharded.
            InvalidBlueprintError: The graph is not legal at the site.
            ShapeMismatchError: Weights or delta do not fit the layer.
            KernelExecutionError: The kernel raised, or its delta was not finite.
        """
        manifest = kernel.manifest

        def prepare(site: Site, placement: Placement) -> Seed:
            return self._new_seed(
                seed_idx,
                KernelExecutor().prepare(kernel, site, placement),
                kernel.ir,
                blueprint_id=manifest.blueprint_id,
                artifact_id=manifest.artifact_id,
                adaptation_id=adaptation_id,
            )

        return self._germinate(seed_idx, prepare)

    def germinate(
        self,
        seed_idx: int,
        ir: BlueprintIR,
        *,
        blueprint_id: str = "",
        random_seed: int = 0,
        adaptation_id: str = "",
    ) -> Seed:
        """Build a blueprint in place and bring it to ACTIVE at a dormant seed, without kernel or cache.

        Raises:
            As :meth:`attach_kernel`.
        """

        def prepare(site: Site, placement: Placement) -> Seed:
            module = build_kernel(ir, site, placement, random_seed=random_seed)
            check_shapes(module, site, placement, structure=content_id(ir))
            return self._new_seed(seed_idx, module, ir, blueprint_id=blueprint_id, adaptation_id=adaptation_id)

        return self._germinate(seed_idx, prepare)

    def attach_module(self, seed_idx: int, module: nn.Module, *, adaptation_id: str = "") -> Seed:
        """Bring any module ``delta(x, h)`` to ACTIVE at a dormant seed.

        Such a seed has no blueprint, so a checkpoint cannot build it again: ``grown_seed`` refuses it.

        Raises:
            As :meth:`attach_kernel`.
        """

        def prepare(site: Site, placement: Placement) -> Seed:
            module.to(placement.device, placement.dtype)
            check_shapes(module, site, placement)
            return self._new_seed(seed_idx, module, None, adaptation_id=adaptation_id)

        return self._germinate(seed_idx, prepare)

    def _germinate(self, seed_idx: int, prepare: Callable[[Site, Placement], Seed]) -> Seed:
        site, states = self._required_site(), SeedLifecycleState
        require_whole(self)
        if self.state_layout.state(seed_idx) is not states.LOADING:
            self.transition(seed_idx, states.LOADING)
        try:
            placement = self.placement()
            with frozen_streams():
                seed = prepare(site, placement)
                latency_ms = first_run(seed.kernel, site, placement, batch_size=self._kasmina.batch_size or 1)
            self._plant(seed)
            self.transition(seed_idx, states.ACTIVE)
        except BaseException as error:
            self._fail_loading(seed_idx, error)
            raise
        layout = self.state_layout
        layout.states.layout.record_health(layout.index(seed_idx), None, None, None, None, latency_ms)
        return seed

    def _fail_loading(self, seed_idx: int, error: BaseException) -> None:
        self.state_layout.states.layout.count_error(self.state_layout.index(seed_idx))
        log.warning(
            "seed_load_failed",
            extra={"layer": self.layer_name, "seed_index": seed_idx, "error": f"{type(error).__name__}: {error}"},
        )
        if self.state_layout.state(seed_idx) is SeedLifecycleState.LOADING:
            self.transition(seed_idx, SeedLifecycleState.ERROR)
        if self.state_layout.state(seed_idx) is SeedLifecycleState.ERROR:
            self.transition(seed_idx, SeedLifecycleState.CULLED)

    def _required_site(self) -> Site:
        if self.site is None:
            raise InvalidStateError(
                f"layer {self.layer_name!r} must know its shapes before a seed germinates, got no forward pass yet"
            )
        return self.site
