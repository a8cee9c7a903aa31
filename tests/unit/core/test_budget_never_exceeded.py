"""Whatever is booked, kept and released in whatever order: no bound is ever broken, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.contracts.blueprint import BlueprintCost
from esper.core.budget import Budget, BudgetLedger

PARAMETERS, FLOPS, ADAPTATIONS = 60, 90, 12


@dataclass
class Seed:
    """A seed as the orchestrator knows it."""

    cost: BlueprintCost
    group: str
    kept: bool = field(default=False)
    blended: bool = field(default=False)


class Growth(RuleBasedStateMachine):
    """Books as the orchestrator does: what is kept stands for good, of each race one seed is blended in, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BudgetLedger(
            Budget(added_params=PARAMETERS, added_flops=FLOPS, max_adaptations=ADAPTATIONS),
            host_parameters=100,
            host_flops=100,
        )
        self.seeds: dict[str, Seed] = {}
        self.begun = 0

    @rule(parameters=st.integers(0, 40), flops=st.integers(0, 60), data=st.data())
    def book(self, parameters: int, flops: int, data: st.DataObject) -> None:
        cost = BlueprintCost(parameters=parameters, flops=flops, activation_bytes=0)
        name = f"a{len(self.seeds)}-{self.begun}"
        races = sorted({seed.group for seed in self.seeds.values() if not seed.kept})
        race = data.draw(st.sampled_from([name, *races]))  # a race is called by its first rival's name
        if self.ledger.refusal(cost, race) is None:
            self.ledger.book(name, cost, race)
            self.seeds[name] = Seed(cost, race)
            self.begun += 1

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def blend(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(self.waiting()))
        race = [key for key in self.waiting() if self.seeds[key].group == self.seeds[first].group]
        chosen = data.draw(st.lists(st.sampled_from(race), min_size=1, unique=True))
        if self.ledger.fit_together(chosen):
            self.ledger.blend(chosen)
            for key in chosen:
                self.seeds[key].blended = True

    @precondition(lambda self: self.grafted())
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.grafted()))
        self.seeds[name].kept, self.seeds[name].blended = True, False
        for other in self.ledger.keep(name):  # those that fit no more are removed at once
            assert not self.seeds[other].blended, "what is blended in stands already"
            self.ledger.release(other)
            del self.seeds[other]

    @precondition(lambda self: self.seeds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.seeds)))
        self.ledger.release(name)
        del self.seeds[name]

    @rule()
    def reload(self) -> None:
        groups = {key: seed.group for key, seed in self.seeds.items() if not seed.kept}
        self.ledger.load_state_dict(self.ledger.state_dict(), groups)

    def waiting(self) -> list[str]:
        """Give the seeds that learn alone."""
        return sorted(key for key, seed in self.seeds.items() if not seed.kept and not seed.blended)

    def grafted(self) -> list[str]:
        """Give the seeds that may be judged: blended in beside others of their race, or alone."""
        company = {seed.group for seed in self.seeds.values() if seed.blended}
        names = (key for key, seed in self.seeds.items() if seed.blended or seed.group not in company)
        return sorted(key for key in names if not self.seeds[key].kept)

    @invariant()
    def whatever_stands_or_may_stand_next_is_within_the_bounds(self) -> None:
        for figure, bound in (("parameters", PARAMETERS), ("flops", FLOPS)):
            kept = sum(getattr(seed.cost, figure) for seed in self.seeds.values() if seed.kept)
            races: dict[str, list[Seed]] = {}
            for seed in self.seeds.values():
                if not seed.kept:
                    races.setdefault(seed.group, []).append(seed)
            held = kept
            for rivals in races.values():
                together = sum(getattr(seed.cost, figure) for seed in rivals if seed.blended)
                held += max(together, *(getattr(seed.cost, figure) for seed in rivals))
            assert held <= bound
            assert getattr(self.ledger.status(), f"added_{figure}") == held
        assert self.ledger.status().adaptations == self.begun <= ADAPTATIONS


Growth.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestGrowth = Growth.TestCase
