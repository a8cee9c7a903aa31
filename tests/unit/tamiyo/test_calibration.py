"""Confidence comes true as often as it says: learned from outcomes, by the set of them, and never a reason to stop."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from esper.contracts.decision import AdaptationDecision, AdaptationType, CurveState
from esper.contracts.errors import InvalidInputError
from esper.contracts.run import AdaptationOutcome
from esper.services.tamiyo.calibration import MAX_CASES, Asked, CalibrationConfig, Calibrator, Kind
from esper.services.tamiyo.config import TamiyoConfig
from esper.services.tamiyo.explanation import explain
from esper.services.tamiyo.policy import Policy

KEPT, CULLED, FAILED = AdaptationOutcome.KEPT, AdaptationOutcome.CULLED, AdaptationOutcome.FAILED
FRESH = Asked(kind=Kind.GROW, raw=0.97)


@pytest.fixture
def teach(make_report):
    """Have a calibrator ask and be told, as in a run, how decisions ended; gives the promise of each."""

    def taught(calibrator, outcomes, *, run_id="run-1", raw=0.9, kind=AdaptationType.ADD_SEED, size=0):
        promises = []
        for place, outcome in enumerate(outcomes):
            asked = calibrator.ask(Kind.of(kind), raw, run_id=run_id, under_way=())
            promises.append(calibrator.confidence(asked))
            begun = decision_of(asked, kind, size=size, created_at=make_report().created_at)
            report = make_report(f"{run_id}-{place}", adaptation_id=f"a-{run_id}-{place}", run_id=run_id)
            calibrator.learn(replace(report, outcome=outcome, adaptation_type=kind.value), begun)
        return promises

    return taught


def decision_of(asked, kind=AdaptationType.ADD_SEED, *, size=0, created_at):
    return AdaptationDecision(
        adaptation_id="a" + "1" * 32,
        run_id="run-1",
        state_sequence=1,
        epoch=1,
        adaptation_type=kind,
        confidence=0.5,
        urgency=0.7,
        curve_state=CurveState.PLATEAU,
        evidence=asked.evidence,
        race_size=size,
        created_at=created_at,
    )


def calibration_error(promises, came_true):
    """Give the expected calibration error over ten bins."""
    bins = {}
    for promise, truth in zip(promises, came_true, strict=True):
        bins.setdefault(min(9, int(promise * 10)), []).append(promise - truth)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(promises)


def test_a_promise_falls_with_every_decision_that_helped_nothing(teach):
    promises = teach(Calibrator(), [CULLED] * 8)
    assert all(later < earlier for earlier, later in itertools.pairwise(promises))
    assert promises[-1] < 0.1 < 0.3 < promises[0]


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7, 0.95])
def test_promises_are_kept_as_often_as_they_say_whatever_the_rate(teach, rate):
    calibrator, draws = Calibrator(), random.Random(3)
    promises, truths = [], []
    for run in range(60):
        outcomes = [KEPT if draws.random() < rate else CULLED for _ in range(8)]
        promises += teach(calibrator, outcomes, run_id=f"run-{run}")
        truths += [outcome is KEPT for outcome in outcomes]
    learned = slice(20 * 8, None)
    assert calibration_error(promises[learned], truths[learned]) <= 0.1
    before = [0.9] * len(truths)
    assert rate == 0.95 or calibration_error(before, truths) > 0.15, "uncalibrated, it would not hold"


def test_the_order_of_reports_changes_no_bit(make_report):
    rows = [(f"a{place}", CULLED if place % 3 else KEPT, 0.6 + 0.03 * place) for place in range(12)]
    found = set()
    for order in (rows, rows[::-1]):
        calibrator = Calibrator()
        for name, outcome, raw in order:
            begun = decision_of(replace(FRESH, raw=raw), created_at=make_report().created_at)
            calibrator.learn(make_report(name, adaptation_id=name, outcome=outcome), begun)
        found.add(calibrator.confidence(FRESH))
    assert len(found) == 1
    assert found != {Calibrator().confidence(FRESH)}


def test_a_race_is_one_case_and_over_once_it_must_be(make_report):
    calibrator = Calibrator()
    begun = decision_of(FRESH, size=3, created_at=make_report().created_at)

    def end(name, outcome):
        calibrator.learn(make_report(name, adaptation_id=name, race_id="a0", outcome=outcome), begun)
        return calibrator.num_cases

    assert end("a1", CULLED) == 0
    assert end("a1", CULLED) == 0, "the same report again"
    assert end("a2", FAILED) == 0
    assert end("a3", CULLED) == 1
    assert calibrator.ask(Kind.GROW, 0.9, run_id="run-1", under_way=()) == replace(FRESH, raw=0.9, fruitless=1)
    assert end("a3", KEPT) == 1
    assert calibrator.ask(Kind.GROW, 0.9, run_id="run-1", under_way=()) == replace(FRESH, raw=0.9, helped=1)


def test_a_race_under_way_is_not_fruitless_yet(make_report):
    calibrator = Calibrator()
    begun = decision_of(FRESH, size=3, created_at=make_report().created_at)
    calibrator.learn(make_report("r1", adaptation_id="a1", race_id="a0", outcome=CULLED), begun)
    assert calibrator.ask(Kind.GROW, 0.9, run_id="run-1", under_way={"a0"}).fruitless == 0
    assert calibrator.ask(Kind.GROW, 0.9, run_id="run-1", under_way=()).fruitless == 1, "the others never began"
    assert calibrator.ask(Kind.GROW, 0.9, run_id="run-2", under_way=()).fruitless == 0
    assert calibrator.ask(Kind.TUNE, 0.9, run_id="run-1", under_way=()).fruitless == 0


def test_what_never_ran_and_what_nobody_promised_teach_nothing(make_report, teach):
    calibrator = Calibrator()
    teach(calibrator, [FAILED] * 5)
    plain = replace(decision_of(FRESH, created_at=make_report().created_at), evidence=())
    calibrator.learn(make_report("r9", adaptation_id="a9", outcome=CULLED), plain)
    assert calibrator.num_cases == 0
    assert calibrator.confidence(FRESH) == Calibrator().confidence(FRESH)


def test_settings_are_promised_in_one_case_of_two_where_the_curve_is_sure_until_cases_come(teach):
    asked = Asked(kind=Kind.TUNE, raw=0.9)
    calibrator = Calibrator()
    assert calibrator.confidence(asked) == pytest.approx(0.5, abs=0.02)
    assert calibrator.confidence(replace(asked, raw=0.6)) < 0.45
    for run in range(15):
        teach(calibrator, [CULLED], run_id=f"run-{run}", kind=AdaptationType.OPTIMIZE_PARAMETERS)
    assert calibrator.confidence(asked) < 0.25
    assert calibrator.confidence(FRESH) == Calibrator().confidence(FRESH), "seeds are another matter"


def test_only_so_many_cases_are_kept(make_report):
    calibrator = Calibrator()
    begun = decision_of(FRESH, created_at=make_report().created_at)
    for place in range(MAX_CASES + 5):
        calibrator.learn(make_report(f"r{place}", adaptation_id=f"a{place}", outcome=CULLED), begun)
    assert calibrator.num_cases == MAX_CASES
    assert 0.0 < calibrator.confidence(FRESH) < 0.02


def test_growth_goes_on_after_fruitless_races_with_less_confidence(flattening, make_candidates, make_report):
    fresh, tried = (Policy(TamiyoConfig(rest_epochs=0)) for _ in range(2))
    begun = decision_of(FRESH, created_at=make_report().created_at)
    for place in range(9):
        # Rewards that are not known: the posterior learns nothing, the calibrator does.
        report = make_report(f"r{place}", reward=None, adaptation_id=f"a{place}", outcome=CULLED)
        tried.learn(report, begun=begun)
    first, later = (
        next(
            row[0] for row in [policy.analyze(packet, make_candidates()) for packet in flattening] if row[0].actionable
        )
        for policy in (fresh, tried)
    )
    assert later.epoch == first.epoch, "the threshold is held against the belief"
    assert (Asked.of(first).fruitless, Asked.of(later).fruitless) == (0, 9)
    assert Asked.of(later).raw == Asked.of(first).raw >= 0.7
    assert later.confidence < 0.1 < first.confidence
    text = "\n".join(explain(later, [later], []).lines(tried.config))
    assert f"confidence {later.confidence:.2f} ({Asked.of(later).raw:.2f} before calibration, threshold 0.7)" in text
    assert "earlier in this run 0 such decisions helped and 9 did not" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deviations": (1.0, 1.0, 0.0, 1.0)}, "deviations must be > 0"),
        ({"grow_mean": (1.0, 1.0)}, "grow_mean must hold 4 finite numbers"),
        ({"tune_mean": (1.0, 1.0, float("nan"), 0.0)}, "tune_mean must hold 4 finite numbers"),
    ],
)
def test_settings_that_break_their_rule_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        CalibrationConfig(**settings)


def test_a_first_race_is_promised_and_one_after_a_race_that_had_something_is_not():
    calibrator = Calibrator()
    assert calibrator.confidence(FRESH) > 0.93, "51 of 51 in experiment 0014"
    assert calibrator.confidence(replace(FRESH, helped=1)) < 0.4, "one of seven"
    assert calibrator.confidence(replace(FRESH, helped=1, fruitless=1)) < 0.2, "none of six"
