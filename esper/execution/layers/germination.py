"""How a seed comes to stand at a layer: from a signed kernel, from a blueprint built in place, or from a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from esper.blueprints import canonical_bytes, content_id
from esper.blueprints.types import site_types
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import InvalidInputError, InvalidStateError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import SkipSite
from esper.execution.artifact import VerifiedKernel
from esper.execution.executor import KernelExecutor, Placement, build_kernel, check_shapes, first_run
from esper.execution.layers.holder import SeedHolder, log
from esper.execution.layers.ranks import require_whole
from esper.execution.layers.record import KernelSource
from esper.execution.random_streams import frozen_streams
from esper.execution.seed import Origin, Seed

MAX_SOURCES: Final = 4
"""Layers whose input a skip seed at one layer may be offered to read."""


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

    def attach_kernel(
        self,
        seed_idx: int,
        kernel: VerifiedKernel,
        *,
        adaptation_id: str = "",
        source: str = "",
        random_seed: int | None = None,
    ) -> Seed:
        """Bring a verified kernel to ACTIVE at a DORMANT or LOADING seed.

        It begins with the kernel's own weights, or, with a ``random_seed``, with weights drawn from that, as
        :meth:`germinate` draws them. With a ``source`` it becomes a skip seed: its x is the input of that layer, which
        runs before this one, and the kernel must have been built for :meth:`skip_site`. On failure the seed passes
        through ERROR to CULLED.

        Raises:
            NotFoundError: The model has no layer of the source's name.
            InvalidInputError: The source does not run before this layer, or sees another batch.
            InvalidStateError: The site is unknown, the seed is in another state, or the layer is sharded.
            InvalidBlueprintError: The graph is not legal at the site.
            ShapeMismatchError: Weights or delta do not fit the layer.
            KernelExecutionError: The kernel raised, or its delta was not finite.
        """
        manifest = kernel.manifest

        def prepare(site: Site, placement: Placement) -> Seed:
            origin = Origin(
                ir=kernel.ir_bytes,
                blueprint_id=manifest.blueprint_id,
                artifact_id=manifest.artifact_id,
                adaptation_id=adaptation_id,
            )
            module = KernelExecutor().prepare(kernel, site, placement, random_seed=random_seed)
            return self._new_seed(seed_idx, module, origin, site, source)

        return self._germinate(seed_idx, prepare, source)

    def germinate(
        self,
        seed_idx: int,
        ir: BlueprintIR,
        *,
        blueprint_id: str = "",
        random_seed: int = 0,
        adaptation_id: str = "",
        source: str = "",
    ) -> Seed:
        """Build a blueprint in place and bring it to ACTIVE at a dormant seed, without kernel or cache.

        With a ``source`` it becomes a skip seed, as in :meth:`attach_kernel`.

        Raises:
            As :meth:`attach_kernel`.
        """

        def prepare(site: Site, placement: Placement) -> Seed:
            module = build_kernel(ir, site, placement, random_seed=random_seed)
            check_shapes(module, site, placement, structure=content_id(ir))
            origin = Origin(ir=canonical_bytes(ir), blueprint_id=blueprint_id, adaptation_id=adaptation_id)
            return self._new_seed(seed_idx, module, origin, site, source)

        return self._germinate(seed_idx, prepare, source)

    def attach_module(self, seed_idx: int, module: nn.Module, *, adaptation_id: str = "", source: str = "") -> Seed:
        """Bring any module ``delta(x, h)`` to ACTIVE at a dormant seed; with a ``source`` it becomes a skip seed.

        Such a seed has no blueprint, so a checkpoint cannot build it again: ``grown_seed`` refuses it.

        Raises:
            As :meth:`attach_kernel`.
        """

        def prepare(site: Site, placement: Placement) -> Seed:
            module.to(placement.device, placement.dtype)
            check_shapes(module, site, placement)
            return self._new_seed(seed_idx, module, Origin(adaptation_id=adaptation_id), site, source)

        return self._germinate(seed_idx, prepare, source)

    def skip_site(self, source: str) -> Site:
        """Give the site of a skip seed that stands here and reads the input of the layer ``source``.

        Raises:
            NotFoundError: The model has no such layer.
            InvalidInputError: It is this layer, runs after it, or sees another batch.
            InvalidStateError: No forward pass has shown the shapes of both.
        """
        found = self._kasmina.skips.layer(source)
        if found is None:
            raise NotFoundError(f"source must be a layer of the model that can hold seeds, got {source!r}")
        site, theirs = self._required_site(), found._required_site()
        if not found._kasmina.order < self._kasmina.order:
            raise InvalidInputError.of("source", f"run before the layer {self.layer_name!r}", source)
        if found._kasmina.batch_size != self._kasmina.batch_size:
            rule = f"see a batch of {self._kasmina.batch_size}, as the layer {self.layer_name!r} did"
            raise InvalidInputError.of("source", rule, f"{source!r} with {found._kasmina.batch_size}")
        return Site(kind=site.kind, input_shape=theirs.input_shape, output_shape=site.output_shape)

    def skip_sites(self) -> tuple[SkipSite, ...]:
        """Give where skip seeds may stand here: with the nearest sources that have a legal site, and the first one."""
        record = self._kasmina
        if record.skip_sites is None and record.site is not None and record.order > 0:
            before = [layer for layer in record.skips.layers() if 0 < layer._kasmina.order < record.order]
            before.sort(key=lambda layer: layer._kasmina.order)
            found = [place for layer in before if (place := self._skip_site_of(layer)) is not None]
            record.skip_sites = tuple(found[:1] + found[1:][-(MAX_SOURCES - 1) :])
        return record.skip_sites or ()

    def _skip_site_of(self, source: SeedHolder) -> SkipSite | None:
        try:
            site = self.skip_site(source.layer_name)
            site_types(site)
        except InvalidInputError:
            return None
        return SkipSite(source=source.layer_name, site=site)

    def _germinate(self, seed_idx: int, prepare: Callable[[Site, Placement], Seed], source: str) -> Seed:
        site, states = self.skip_site(source) if source else self._required_site(), SeedLifecycleState
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
