"""How seeds leave the network: a share is ramped out, then the seed is freed, its place rests, the budget comes back.

A seed that was blended in, or kept, has others lean on it. Taken out between two steps it leaves a jump of its whole
effect; over an epoch the host learns to do without it. What a veto takes out goes in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from esper.contracts.lifecycle import SeedLifecycleState
from esper.core.adaptation import Adaptation
from esper.core.blending import BlendSchedule
from esper.core.context import RunContext
from esper.core.pacing import SeedPacer
from esper.core.telling import Teller

Place = tuple[str, int]
"""Layer and seed."""


@dataclass(slots=True)
class Fade:
    """A seed on its way out."""

    adaptation: Adaptation
    """Its adaptation, which has ended."""
    ramp: BlendSchedule
    """From the share it had to none."""
    steps: int = 0
    """Steps done."""


class Leaving:
    """Takes seeds out of a run; belongs to the training thread.

    ``places`` are the adaptations by the place where they stand, or rest.
    """

    def __init__(self, context: RunContext, pacer: SeedPacer, tell: Teller, places: dict[Place, Adaptation]) -> None:
        self._context, self._pacer, self._tell, self._places = context, pacer, tell, places
        self._fades: dict[str, Fade] = {}
        self._embargo_until: dict[Place, int] = {}

    @property
    def groups(self) -> set[str]:
        """Races, or single adaptations, of which a seed is on its way out."""
        return {fade.adaptation.decision.group for fade in self._fades.values()}

    @property
    def fading(self) -> frozenset[str]:
        """Adaptations whose seed is on its way out."""
        return frozenset(self._fades)

    def has_share(self, adaptation: Adaptation) -> bool:
        """Say whether there is anything to ramp out of the adaptation's seed, and an epoch or more to do it in."""
        layer, index = self._context.model.kasmina_layers[adaptation.layer], adaptation.seed_index
        stands = layer.find_seed(index) is not None and float(layer.state_layout.alpha_blend[index]) > 0.0
        return stands and self._context.growth.cull_epochs > 0

    def fade(self, adaptation: Adaptation) -> None:
        """Begin to ramp out a seed that is CULLED and has a share; it goes on learning meanwhile."""
        growth, clock = self._context.growth, self._context.clock
        layout = self._context.model.kasmina_layers[adaptation.layer].state_layout
        share = float(layout.alpha_blend[adaptation.seed_index])
        steps = growth.cull_epochs * clock.steps_per_epoch
        ramp = BlendSchedule(kind=growth.blend, start=share, end=0.0, num_steps=steps)
        self._fades[adaptation.id] = Fade(adaptation, ramp)

    def tick(self) -> None:
        """Do one step's share of every ramp."""
        for key, fade in list(self._fades.items()):
            fade.steps += 1
            layer, index = self._context.model.kasmina_layers[fade.adaptation.layer], fade.adaptation.seed_index
            if fade.steps >= fade.ramp.num_steps or layer.find_seed(index) is None:  # or its kernel failed on the way
                self.end(key)
            else:
                layer.set_alpha(index, fade.ramp.alpha_at(fade.steps))

    def end(self, adaptation_id: str) -> None:
        """Take a seed out now that is on its way out."""
        adaptation = self._fades.pop(adaptation_id).adaptation
        layer = self._context.model.kasmina_layers[adaptation.layer]
        self._pacer.leave(layer, adaptation.layer, adaptation.seed_index)
        layer.set_alpha(adaptation.seed_index, 0.0)
        self.rest(adaptation)

    def end_failed(self) -> None:
        """Take out those whose kernel failed on the way: their layer has freed them, the optimizer holds them yet."""
        for key, fade in list(self._fades.items()):
            if self._context.model.kasmina_layers[fade.adaptation.layer].find_seed(fade.adaptation.seed_index) is None:
                self.end(key)

    def end_all(self) -> bool:
        """Take out at once every seed that is on its way out; says whether there was one."""
        found = list(self._fades)
        for key in found:
            self.end(key)
        return bool(found)

    def rest(self, adaptation: Adaptation) -> None:
        """Let the place of a CULLED seed rest, and give its place in the budget back."""
        epochs = self._context.growth.embargo_epochs
        self._move(
            (adaptation.layer, adaptation.seed_index), SeedLifecycleState.EMBARGOED, f"rests for {epochs} epochs"
        )
        self._context.ledger.release(adaptation.id)

    def clear_away(self, place: Place, reason: str) -> None:
        """Take out at once a live seed that no adaptation of the run stands for."""
        self._pacer.leave(self._context.model.kasmina_layers[place[0]], *place)
        self._move(place, SeedLifecycleState.CULLED, reason)
        self._move(place, SeedLifecycleState.EMBARGOED, reason)

    def lift_embargoes(self) -> None:
        """Free the places that have rested long enough."""
        for place, until in list(self._embargo_until.items()):
            if self._context.clock.epoch >= until:
                del self._embargo_until[place]
                self._move(place, SeedLifecycleState.DORMANT, "embargo over")
                self._places.pop(place, None)

    def let_go(self) -> None:
        """Forget what is on its way out and what rests, without touching the model."""
        self._fades.clear()
        self._embargo_until.clear()

    def state_dict(self) -> dict[str, Any]:
        """Give what is on its way out and what rests, as plain data."""
        return {
            "fades": {key: {"steps": fade.steps, "ramp": asdict(fade.ramp)} for key, fade in self._fades.items()},
            "embargo": [(layer, index, until) for (layer, index), until in self._embargo_until.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any], known: Mapping[str, Adaptation]) -> None:
        """Take over what :meth:`state_dict` gave; older checkpoints hold no seed on its way out."""
        self._embargo_until = {(layer, index): until for layer, index, until in state["embargo"]}
        self._fades = {
            key: Fade(known[key], BlendSchedule(**item["ramp"]), item["steps"])
            for key, item in state.get("fades", {}).items()
        }

    def _move(self, place: Place, to: SeedLifecycleState, reason: str) -> None:
        layer, index = place
        context = self._context
        with self._tell.because(reason):
            context.model.kasmina_layers[layer].state_layout.transition(index, to, context.clock.step)
        if to is SeedLifecycleState.EMBARGOED:
            self._embargo_until[place] = context.clock.epoch + context.growth.embargo_epochs
