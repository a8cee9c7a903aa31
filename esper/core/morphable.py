"""A wrapped model: the host with its names and keys unchanged, and what Esper needs of it.

The wrapper holds no submodule of its own. It shares the host's dictionaries of submodules, parameters and buffers, so
``named_modules``, ``named_parameters`` and ``state_dict`` give the host's own names, and every move reaches the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn

import torch
from torch import nn
from torch.compiler import is_compiling

from esper.contracts.errors import InvalidStateError, NotFoundError
from esper.core.loading import load_whole
from esper.execution.grown import GrownSeed
from esper.execution.layers import KasminaLayer, kasmina_class_of
from esper.execution.layers.base import NO_REPLICAS, NO_SCRIPT
from esper.execution.layers.pulse import Pulse, arm
from esper.execution.seed import Seed, extra_states
from esper.execution.spread import agree_on_open
from esper.execution.state import SeedStates
from esper.telemetry.client import OonaClient

_tracing_state: Final = torch._C._get_tracing_state
_SHARED: Final = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    # State dicts are the host's own work, so hooks on them, whichever of the two they were put on, must be seen by it.
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OWN: Final = frozenset({"__class__", "training", "_host", "_kasmina_layers", "_seed_states", "_oona_client"})


class MorphableModel(nn.Module):
    """A model whose layers can hold seeds; made by ``esper.wrap``.

    Attributes that are not the wrapper's own are the host's, for reading and for writing. The wrapper's own public
    names are chosen so that few hosts have them: ``kasmina_layers``, ``seed_states``, ``oona_client``,
    ``host_module``, ``grown_structure``, ``rebuild``, ``tick_step``.

    A copy has its own layout and no bus client. ``state_dict`` has exactly the host's keys while every seed is dormant;
    a live seed adds keys below ``<layer>.seeds.<i>``, one of which says what stands there.
    """

    def __init__(
        self,
        host: nn.Module,
        layers: Mapping[str, KasminaLayer],
        states: SeedStates,
        client: OonaClient | None,
        pulse: Pulse,
    ) -> None:
        super().__init__()
        for name in _SHARED:
            object.__setattr__(self, name, getattr(host, name))
        object.__setattr__(self, "_host", host)
        self._kasmina_layers = dict(layers)
        self._seed_states = states
        self._oona_client = client
        object.__setattr__(self, "_pulse", pulse)
        self.training = host.training

    @property
    def host_module(self) -> nn.Module:
        """The model that was wrapped."""
        found: nn.Module = self.__dict__["_host"]
        return found

    @property
    def kasmina_layers(self) -> Mapping[str, KasminaLayer]:
        """The layers that can hold seeds, by dotted module name, in the model's order."""
        return MappingProxyType(self.__dict__["_kasmina_layers"])

    @property
    def seed_states(self) -> SeedStates:
        """State of every seed, and the training step that signals and transitions are stamped with."""
        found: SeedStates = self.__dict__["_seed_states"]
        return found

    @property
    def oona_client(self) -> OonaClient | None:
        """The run's bus client; ``None`` where the model was wrapped without telemetry, and for copies."""
        found: OonaClient | None = self.__dict__["_oona_client"]
        return found

    def kasmina_layer(self, name: str) -> KasminaLayer:
        """Give a layer by its dotted module name.

        Raises:
            NotFoundError: No wrapped layer has that name.
        """
        found = self.kasmina_layers.get(name)
        if found is None:
            names = ", ".join(self.kasmina_layers)
            raise NotFoundError(f"layer must be one of {names}, got {name!r}", parameter="layer")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give the host's output. Without hooks on the wrapper its own module call is left out: a frame, no more."""
        own = self.__dict__  # reading attributes would go through __getattr__, which costs more
        pulse = own["_pulse"]
        if pulse.is_on and not is_compiling() and pulse.tick():
            arm(own["_host"], own["_kasmina_layers"].values())
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or _tracing_state() is not None
        ):
            return super().__call__(*args, **kwargs)
        return own["_host"](*args, **kwargs)

    def tick_step(self) -> None:
        """Count a training step for telemetry, where the loop went around this model's own call."""
        if self._pulse.tick_step():
            arm(self._host, self._kasmina_layers.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give the host's output."""
        return self.__dict__["_host"](*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the host's call in place, as ``nn.Module.compile`` does; takes what ``torch.compile`` takes.

        The wrapper's own call would stand on the host and call it, which calls the wrapper.
        """
        self.__dict__["_host"].compile(*args, **kwargs)

    # --- what the host answers ---

    def __getattr__(self, name: str) -> Any:
        host = self.__dict__.get("_host")
        if host is None:
            raise AttributeError(name)
        return getattr(host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_host" not in self.__dict__ or name in _OWN or name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.__dict__["_host"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_host"], name)

    def __getitem__(self, key: Any) -> Any:
        return self.host_module[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.host_module)  # type: ignore[call-overload, no-any-return]

    def __len__(self) -> int:
        return len(self.host_module)  # type: ignore[arg-type]

    def __contains__(self, item: object) -> bool:
        return item in self.host_module  # type: ignore[operator]

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> Iterable[str]:
        return sorted({*object.__dir__(self), *dir(self.host_module)})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_oona_client": None}

    def extra_repr(self) -> str:
        """Give the host's class and the number of seeds."""
        return f"{type(self.host_module).__name__}, {self.seed_states.num_seeds} seeds"

    def train(self, mode: bool = True) -> MorphableModel:
        """Set training mode on the host and everything in it."""
        self.training = mode
        self.host_module.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> MorphableModel:
        self.host_module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the host's state dict."""
        return self.host_module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Build the seeds that the state dict names, then load every value; the host's own checkpoints load as well.

        A strict load brings the grown structure to the state dict's: live seeds it does not name are cleared. It is all
        or nothing where seeds stand or are named; a host alone loads as torch does it.

        Raises:
            CorruptDataError: A seed's entry is not ours, or is damaged.
            InvalidBlueprintError: A seed's graph is not legal at its site.
        """
        if strict and any(seeds or extra_states(state_dict, f"{name}.") for name, seeds in self._live().items()):
            return load_whole(self.host_module, self.kasmina_layers, self.seed_states, state_dict, assign=assign)
        return self.host_module.load_state_dict(state_dict, strict=strict, assign=assign)

    def _live(self) -> dict[str, tuple[Seed, ...]]:
        return {name: layer.live_seeds() for name, layer in self.kasmina_layers.items()}

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load the host's own entries, in the host's own way, where the model is part of a larger one."""
        self.host_module._load_from_state_dict(*args)

    # --- what a wrapped model is refused to ---

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InvalidStateError(NO_REPLICAS)

    def __prepare_scriptable__(self) -> NoReturn:
        raise InvalidStateError(NO_SCRIPT)

    # --- growth ---

    def grown_structure(self) -> list[GrownSeed]:
        """Give every live seed as plain data, in the model's order; weights are in ``state_dict``.

        Raises:
            InvalidStateError: A live seed was not built from a blueprint.
        """
        return [layer.grown_seed(seed.index) for layer in self.kasmina_layers.values() for seed in layer.live_seeds()]

    def rebuild(self, structure: Iterable[GrownSeed]) -> None:
        """Bring the grown structure to ``structure``: build what is missing, clear what is too much; tells no listener.

        Weights come after, by ``load_state_dict``.

        Raises:
            NotFoundError: A seed names a layer that the model lacks.
            InvalidInputError: A seed's index is out of its layer's range.
            CorruptDataError: A graph does not parse.
            InvalidBlueprintError: A graph is not legal at its site.
        """
        by_layer: dict[str, dict[int, GrownSeed]] = {}
        for grown in structure:
            self.kasmina_layer(grown.layer).state_layout.index(grown.seed_index)
            by_layer.setdefault(grown.layer, {})[grown.seed_index] = grown
        for name, layer in self.kasmina_layers.items():
            wanted = by_layer.get(name, {})
            layer.clear_others(wanted)
            layer.match_seeds(wanted)

    def settle_failures(self) -> int:
        """Read the failures that devices and compiled graphs have counted; gives how many there were.

        Waits for the device, so it belongs at a step boundary, every few steps. Where several ranks train the model it
        waits for them, too, and must be called on all at the same step: a seed that has failed three times in a row on
        one of them is cut off on all.
        """
        holders = [layer for layer in self.kasmina_layers.values() if layer.live_seeds()]
        found = sum(layer.settle_failures() for layer in holders)
        owners = {seed: layer for layer in holders for seed in layer.live_seeds() if seed.breaker.ranks is not None}
        for seed in agree_on_open(list(owners)):
            owners[seed].cut_off(seed)
        return found

    def require_dormant(self) -> None:
        """Check that no kernel stands anywhere.

        Raises:
            InvalidStateError: Names the seeds that are live.
        """
        live = [f"{name}[{seed.index}]" for name, layer in self.kasmina_layers.items() for seed in layer.live_seeds()]
        if live:
            where = ", ".join(live)
            raise InvalidStateError(f"every seed must be dormant, got kernels at {where}: export() keeps them")

    def require_own_classes(self) -> None:
        """Check that nothing has changed the model's or a layer's class since it was wrapped.

        Parametrisations and ``fully_shard`` do: giving a layer its host's class back would undo half of their work.

        Raises:
            InvalidStateError: Names the first that is of another class.
        """
        if type(self) is not MorphableModel:
            raise InvalidStateError(f"model must be of the class that wrap() gave it, got {type(self).__name__}")
        for name, layer in self.kasmina_layers.items():
            if type(layer) is not kasmina_class_of(layer.host_class):
                raise InvalidStateError(
                    f"layer {name!r} must be of the class that wrap() gave it, got {type(layer).__name__}: "
                    "remove its parametrisations first"
                )
