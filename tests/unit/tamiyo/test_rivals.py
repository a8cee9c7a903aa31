"""Which candidates race: spread over kinds, within seeds and budget, the same again from the same packet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from esper.contracts.decision import AdaptationType, ArchitectureChange
from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import AdaptationOutcome, BudgetStatus, SeedStatus
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.policy import Policy
from esper.services.tamiyo.posterior import Observation, PosteriorConfig, RewardPosterior, family_of, features_of
from esper.services.tamiyo.rivals import draw_rivals


def grown(policy, packets, candidates):
    rows = [policy.analyze(packet, candidates) for packet in packets]
    return next(row for row in rows if row[0].actionable)


def test_a_race_spans_families_places_and_seeds(flattening, make_candidates):
    race = grown(Policy(TamiyoConfig(race_size=6)), flattening, make_candidates())
    size = len(race)
    assert 3 <= size <= 6
    assert {one.race_id for one in race} == {race[0].adaptation_id}
    assert {one.race_size for one in race} == {size}
    assert len({one.adaptation_id for one in race}) == size
    assert len({(one.layer, one.seed_index) for one in race}) == size
    families = [family_of(one.blueprint.ir) for one in race]
    assert len(set(families)) == min(size, len({family_of(one.blueprint.ir) for one in make_candidates()}))
    assert len({one.confidence for one in race}) == 1
    for place, one in enumerate(race, start=1):
        assert f"{place} of {size} that race for one place" in one.explanation
        assert one.blueprint.name in one.explanation


def test_equal_packets_draw_equal_races(flattening, make_candidates):
    assert grown(Policy(), flattening, make_candidates()) == grown(Policy(), flattening, make_candidates())


def test_a_race_of_one_is_no_race(flattening, make_candidates):
    (alone,) = grown(Policy(TamiyoConfig(race_size=1)), flattening, make_candidates())
    assert (alone.race_id, alone.race_size) == ("", 0)
    assert "race" not in alone.explanation


def test_a_race_counts_as_one_adaptation_under_way(flattening, make_packet, make_layer, make_candidates):
    config = TamiyoConfig(max_open_adaptations=2, race_size=2, pending_epochs=1, layer_cooldown_epochs=0)
    policy = Policy(config)
    race = grown(policy, flattening, make_candidates(["hidden"]))
    seeds = [SeedStatus(seed_index=index, state=SeedLifecycleState.DORMANT) for index in range(4)]
    for one in race:
        seeds[one.seed_index] = SeedStatus(
            seed_index=one.seed_index, state=SeedLifecycleState.ACTIVE, adaptation_id=one.adaptation_id
        )
    layers = (make_layer("hidden", seeds=seeds), make_layer("head"))
    last = flattening[-1]
    packet = replace(last, sequence=13, epoch=13, step=416, layers=layers)
    second = policy.analyze(packet, make_candidates())
    assert second[0].actionable, second[0].explanation
    assert {one.layer for one in second} == {"head"}


def test_no_more_rivals_than_the_budget_has_adaptations(flattening, make_candidates):
    packets = [replace(one, budget=BudgetStatus(max_adaptations=2)) for one in flattening]
    assert len(grown(Policy(), packets, make_candidates())) == 2


def test_no_more_rivals_than_a_layer_has_dormant_seeds(flattening, make_layer, make_candidates):
    states = (SeedLifecycleState.DORMANT, SeedLifecycleState.FOSSILIZED, SeedLifecycleState.DORMANT)
    seeds = [SeedStatus(seed_index=index, state=state) for index, state in enumerate(states)]
    packets = [replace(one, layers=(make_layer("hidden", seeds=seeds),)) for one in flattening]
    race = grown(Policy(), packets, make_candidates(["hidden"]))
    assert sorted(one.seed_index for one in race) == [0, 2]


def kind_of(candidate):
    """Widening and deepening the host are kinds of their own, whatever operators they are made of."""
    changes = {"widening", "deepening"} & set(candidate.blueprint.metadata.tags)
    return min(changes) if changes else family_of(candidate.blueprint.ir)


def field_of(make_candidates, *, kinds, size, seed, believed=None):
    """Draw from candidates at one layer: every linear one, and the first of each other family, ``kinds`` in all."""
    candidates = make_candidates(["hidden"])
    families = sorted({kind_of(one) for one in candidates} - {"linear"})[: kinds - 1]
    picked = [one for one in candidates if kind_of(one) == "linear"]
    picked += [next(one for one in candidates if kind_of(one) == family) for family in families]
    asked = [
        (one, features_of(one.site, one.blueprint.id, parameters=1, progress=None, family=family_of(one.blueprint.ir)))
        for one in picked
    ]
    random = np.random.default_rng(seed)
    return draw_rivals(believed or RewardPosterior(), asked, size=size, free={"hidden": 9}, random=random)


def test_kinds_repeat_only_until_a_quarter_of_the_race_is_full(make_candidates):
    hopeful = RewardPosterior(PosteriorConfig(prior_mean=1.0))
    for seed in range(10):
        field = field_of(make_candidates, kinds=2, size=6, seed=seed, believed=hopeful)
        assert len(field.rivals) == 2, "a quarter is full with them"
        field = field_of(make_candidates, kinds=2, size=9, seed=seed, believed=hopeful)
        families = [kind_of(one.candidate) for one in field.rivals]
        assert len(families) == 3
        assert len(set(families[:2])) == 2
        assert len({one.candidate.blueprint.id for one in field.rivals}) == 3


def test_the_more_is_known_the_smaller_a_race(make_candidates):
    """One blueprint was seen to be far ahead in ten runs, all others to bring nothing."""
    known = RewardPosterior()
    candidates = make_candidates(["hidden"])
    best = next(one for one in candidates if family_of(one.blueprint.ir) == "conv")
    for number, one in enumerate(candidates * 10):
        features = features_of(
            one.site, one.blueprint.id, parameters=1, progress=None, family=family_of(one.blueprint.ir)
        )
        reward = 0.3 if one is best else 0.0
        known.learn(Observation(report_id=f"r{number}", features=features, reward=reward, variance=1e-6))
    for seed in range(10):
        field = field_of(make_candidates, kinds=3, size=8, seed=seed, believed=known)
        assert [one.candidate.blueprint.id for one in field.rivals] == [best.blueprint.id]


def test_what_promises_most_on_average_enters_first_and_one_that_may_be_better_against_it(make_candidates):
    """All kinds were tried; many designs that nobody tried win draws, each for a little while."""
    known = RewardPosterior()
    candidates = make_candidates(["hidden"])
    best = next(one for one in candidates if family_of(one.blueprint.ir) == "conv")
    tried = {kind_of(one): one for one in candidates} | {"conv": best}
    for kind, one in tried.items():
        family = family_of(one.blueprint.ir)
        features = features_of(one.site, one.blueprint.id, parameters=1, progress=None, family=family)
        reward = 0.08 if one is best else 0.02
        known.learn(Observation(report_id=kind, features=features, reward=reward, variance=1e-6))
    fields = [field_of(make_candidates, kinds=3, size=8, seed=seed, believed=known) for seed in range(20)]
    assert {field.rivals[0].candidate.blueprint.id for field in fields} == {best.blueprint.id}
    assert {len(field.rivals) for field in fields} == {2}
    assert len({field.rivals[1].candidate.blueprint.id for field in fields}) > 2
    assert len(field_of(make_candidates, kinds=3, size=8, seed=0).rivals) > 2


def test_of_what_was_never_tried_every_kind_enters(make_candidates):
    hopeless = RewardPosterior(PosteriorConfig(prior_mean=-1.0))
    field = field_of(make_candidates, kinds=3, size=6, seed=0, believed=hopeless)
    assert sorted(kind_of(one.candidate) for one in field.rivals) == ["conv", "deepening", "linear"]
    assert all(one.belief.draw < 0.0 for one in field.rivals)
    assert field.helps < 1e-6


def test_of_kinds_that_were_tried_nobody_enters_on_a_draw_that_promises_nothing(make_candidates):
    hopeless = RewardPosterior(PosteriorConfig(prior_mean=-1.0))
    for number, one in enumerate(make_candidates(["hidden"])):
        features = features_of(
            one.site, one.blueprint.id, parameters=1, progress=None, family=family_of(one.blueprint.ir)
        )
        hopeless.learn(Observation(report_id=f"r{number}", features=features, reward=-1.0, variance=0.01))
    field = field_of(make_candidates, kinds=3, size=6, seed=0, believed=hopeless)
    assert len(field.rivals) == 1


def test_every_family_comes_in_before_a_second_reach_of_one(make_candidates):
    candidates = make_candidates(["hidden"])
    asked = [
        (one, features_of(one.site, one.blueprint.id, parameters=1, progress=None, family=family, reach=reach))
        for one in candidates
        for family in [family_of(one.blueprint.ir)]
        for reach in ("own", "skip")
    ]
    kinds = {kind_of(one) for one, _ in asked}
    assert kinds == {"conv", "linear", "pointwise", "widening", "deepening"}
    for seed in range(10):
        field = draw_rivals(
            RewardPosterior(PosteriorConfig(prior_mean=1.0)),
            asked,
            size=6,
            free={"hidden": len(kinds)},
            random=np.random.default_rng(seed),
        )
        assert {kind_of(one.candidate) for one in field.rivals} == kinds


def two_layers(make_candidates):
    candidates = [one for one in make_candidates(["hidden", "head"]) if kind_of(one) != "pointwise"]
    return [
        (
            one,
            features_of(
                one.site,
                one.blueprint.id,
                parameters=1,
                progress=None,
                family=family_of(one.blueprint.ir),
                place=f"run-1/{one.layer}",
                reach="own",
            ),
        )
        for one in candidates
    ]


def changes_of(field):
    rivals = [(kind_of(one.candidate), one.candidate.layer) for one in field.rivals]
    return sorted(one for one in rivals if one[0] in ("widening", "deepening"))


def test_places_left_free_go_to_changes_of_the_host_at_every_layer(make_candidates):
    asked = two_layers(make_candidates)
    everywhere = sorted({(kind, layer) for kind in ("widening", "deepening") for layer in ("hidden", "head")})
    for seed in range(10):
        field = draw_rivals(
            RewardPosterior(PosteriorConfig(prior_mean=-1.0)),
            asked,
            size=8,
            free={"hidden": 8, "head": 8},
            random=np.random.default_rng(seed),
        )
        assert changes_of(field) == everywhere
        kinds = [kind_of(one.candidate) for one in field.rivals]
        assert len(set(kinds)) == len(kinds) - 2, "of other kinds one each"
        assert len(set(kinds[: len(set(kinds))])) == len(set(kinds)), "every kind comes first"


def test_where_a_change_of_the_host_was_tried_none_of_its_kind_is_drawn_for_a_free_place(make_candidates):
    asked = two_layers(make_candidates)
    known = RewardPosterior(PosteriorConfig(prior_mean=-1.0))
    (features,) = [two for one, two in asked if (kind_of(one), one.layer) == ("widening", "head")]
    known.learn(Observation(report_id="r1", features=features, reward=-1.0, variance=0.01))
    for seed in range(10):
        random = np.random.default_rng(seed)
        field = draw_rivals(known, asked, size=8, free={"hidden": 8, "head": 8}, random=random)
        assert ("widening", "head") not in changes_of(field)
        assert ("widening", "hidden") in changes_of(field)


def test_a_seed_that_was_only_outrun_may_try_again(flattening, make_candidates, make_report):
    policy = Policy(TamiyoConfig(race_size=2, pending_epochs=1, layer_cooldown_epochs=0))
    first, second = grown(policy, flattening, make_candidates())
    memory = policy._runs["run-1"]
    for report_id, one, reward in (("r1", first, 0.05), ("r2", second, -0.05)):
        report = make_report(
            report_id,
            reward=reward,
            adaptation_id=one.adaptation_id,
            layer=one.layer,
            blueprint_id=one.blueprint_id,
            outcome=AdaptationOutcome.CULLED,
            race_id=one.race_id,
        )
        policy.learn(report)
    assert not memory.embargoed(first.layer, first.blueprint_id, 8)
    assert memory.embargoed(second.layer, second.blueprint_id, 8)


def test_a_races_confidence_is_scored_once(make_report):
    policy = Policy()
    for name, outcome in (("r1", AdaptationOutcome.CULLED), ("r2", AdaptationOutcome.KEPT)):
        policy.learn(make_report(name, adaptation_id=f"a{name}", race_id="a0", outcome=outcome))
    policy.learn(make_report("r3", adaptation_id="ar3", race_id="a0", outcome=AdaptationOutcome.CULLED))
    score, count = policy.reliability()
    assert count == 1
    assert score == pytest.approx(0.2**2)


def test_a_race_needs_a_seed():
    with pytest.raises(InvalidInputError, match="race_size must be >= 1, got 0"):
        TamiyoConfig(race_size=0)


def test_widening_and_deepening_are_said_to_change_the_host(flattening, make_candidates):
    kinds = {}
    for name in ("widen", "deepen", "lora"):
        candidates = [one for one in make_candidates(["hidden"]) if one.blueprint.name == name]
        (decision,) = grown(Policy(), flattening, candidates)
        kinds[name] = decision
    assert kinds["lora"].adaptation_type is AdaptationType.ADD_SEED
    assert kinds["lora"].architecture_change is None
    assert kinds["widen"].adaptation_type is AdaptationType.MODIFY_ARCHITECTURE
    assert kinds["widen"].architecture_change == ArchitectureChange(added_units=16)
    assert "modify the host by widen at hidden" in kinds["widen"].explanation
    assert kinds["deepen"].adaptation_type is AdaptationType.MODIFY_ARCHITECTURE
    assert kinds["deepen"].architecture_change == ArchitectureChange()
    assert all(one.blueprint is not None for one in kinds.values())


def test_a_change_of_the_host_teaches_as_a_seed_does(make_report):
    policy = Policy()
    assert policy.learn(make_report("r1", adaptation_type="modify_architecture"))
    assert policy.posterior.num_observations == 1
    assert policy.reliability() is not None
    assert not policy.learn(make_report("r2", adaptation_id="a2", adaptation_type="optimize_parameters"))
