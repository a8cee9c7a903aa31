"""The growth measure: figures from given outcomes, what is written down and gone on with, and random growth."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

import esper
from bench import growth
from bench.growth import Extent, arms_of, extent_of, main, measure_extent, run_seed
from bench.growth_arms import ARMS, CONTROLS, GROWN, KINDS, PLAIN_ARMS, Kind, Option, choose, options, run_arm
from bench.growth_figures import (
    CellRuns,
    accuracy_margin,
    arm_rows,
    calibration_error,
    figures_of,
    loss_margin,
    time_to,
)
from bench.growth_hosts import FAMILIES, Cell, FamilyName, make_cell
from bench.growth_log import _PLAIN_SOURCES, RunLog, Versions, versions_here, versions_of
from bench.growth_training import Outcome, Point, Tried
from bench.random_growth import FIRST_EPOCH, RandomMesh, draws
from bench.report import Figure
from esper.blueprints.plan import is_legal
from esper.cli import digits
from esper.contracts.decision import AdaptationDecision
from esper.contracts.errors import CorruptDataError
from esper.contracts.run import BudgetStatus, RunPhase, SystemStatePacket
from esper.core.link import KernelArrival
from esper.telemetry.subjects import Kind as SubjectKind

MLP = make_cell("digits", "mlp")
NUMBERS = count()
ONE = Versions(plain="p", grown="g")


def point(epoch: int, accuracy: float | None) -> Point:
    loss = None if accuracy is None else 1 - accuracy
    return Point(epoch=epoch, flops=1000 * epoch, seconds=float(epoch), accuracy=accuracy, loss=loss)


def outcome(accuracy: float, *, tried: tuple[Tried, ...] = ()) -> Outcome:
    return Outcome(
        accuracy=accuracy,
        loss=1 - accuracy,
        parameters=100,
        flops=2000,
        own_flops=500,
        seconds=2.0,
        curve=(point(1, accuracy - 0.1), point(2, accuracy)),
        rate=1e-2,
        tried=tried,
        is_repeated=True,
    )


def tried(confidence: float, ended: str, *, low: float | None = 0.02, price: float | None = 0.01) -> Tried:
    return Tried(
        group=f"a{next(NUMBERS)}",
        blueprint="glu",
        layer="0",
        outcome=ended,
        confidence=confidence,
        contribution=0.03,
        low=low,
        high=0.04,
        price=price,
        parameters=10,
        begun_epoch=3,
    )


def runs(*pairs: tuple[float, float], cell: Cell = MLP) -> CellRuns:
    seeds = tuple({GROWN: outcome(grown)} | {arm: outcome(control) for arm in CONTROLS} for grown, control in pairs)
    return CellRuns(cell=cell, seeds=seeds)


def named(figures: list[Figure], name: str) -> Figure:
    return next(figure for figure in figures if figure.name == name)


def test_a_margin_is_the_mean_of_paired_differences_with_its_interval() -> None:
    figure = accuracy_margin(runs((0.97, 0.95), (0.96, 0.95), (0.98, 0.95)), "host", is_claim=True)
    assert figure.value == pytest.approx(2.0)
    assert figure.spread is not None
    assert figure.spread.low == pytest.approx(2.0 - 4.303 / 3**0.5, abs=1e-3)
    assert figure.holds is False


def test_a_clear_margin_holds() -> None:
    given = runs((0.97, 0.95), (0.971, 0.95), (0.969, 0.95))
    assert accuracy_margin(given, "static-wide", is_claim=True).holds is True


def test_a_worse_result_is_said_as_it_is() -> None:
    figure = accuracy_margin(runs((0.94, 0.95), (0.93, 0.95)), "host", is_claim=True)
    assert figure.value == pytest.approx(-1.5)
    assert figure.holds is False


def test_one_seed_claims_nothing() -> None:
    figure = accuracy_margin(runs((0.97, 0.95)), "host", is_claim=True)
    assert figure.value == pytest.approx(2.0)
    assert (figure.goal, figure.spread, figure.holds) == (None, None, None)


def test_loss_margins_are_positive_where_growing_is_better_and_text_has_bits() -> None:
    assert loss_margin(runs((0.97, 0.95), (0.96, 0.95)), "host", is_claim=False).value == pytest.approx(0.015)
    figure = loss_margin(runs((0.97, 0.95), (0.96, 0.95), cell=make_cell("chars", "mlp")), "host", is_claim=True)
    assert figure.unit == "bits per character"
    assert figure.value == pytest.approx(0.015 / 0.693147, abs=1e-5)


def test_every_control_has_margins_and_a_row_and_what_was_not_measured_has_no_number() -> None:
    given = runs((0.9, 0.8), (0.9, 0.7))
    for seed in given.seeds:
        del seed["gromo"]
    figures = figures_of([given])
    for control in CONTROLS:
        value = named(figures, f"digits/mlp: grown minus {control}, sealed accuracy").value
        assert (value is None) is (control == "gromo")
    assert [row.arm for row in arm_rows(given)] == [arm for arm in ARMS if arm != "gromo"]


def test_the_largest_net_is_held_against_the_budget() -> None:
    given = runs((0.9, 0.8), (0.9, 0.8))
    name = "digits/mlp: grown, most parameters"
    assert named(figures_of([given]), name).holds is True
    given.seeds[1][GROWN] = replace(outcome(0.9), parameters=given.cell.max_parameters + 1)
    assert named(figures_of([given]), name).holds is False


def test_what_took_a_seed_out_or_tried_settings_counts_as_no_seed() -> None:
    given = runs((0.9, 0.8), (0.9, 0.8))
    removal = replace(tried(0.9, "kept"), adaptation_type="remove_seed")
    settings = replace(tried(0.9, "kept", low=None, price=None), adaptation_type="optimize_parameters")
    given.seeds[0][GROWN] = outcome(0.9, tried=(tried(0.9, "kept"), tried(0.9, "culled"), removal, settings))
    figures = figures_of([given])
    assert named(figures, "digits/mlp: seeds tried per one kept").value == pytest.approx(2.0)
    assert named(figures, "digits/mlp: kept seeds certain to pay").value == pytest.approx(1.0)
    assert calibration_error([[removal]]) is None, "nothing shows whether a removal was right"
    assert calibration_error([[settings]]) == pytest.approx(0.1)


def test_kept_seeds_must_all_pay_for_certain() -> None:
    given = runs((0.9, 0.8), (0.9, 0.8))
    kept = (tried(0.9, "kept"), tried(0.9, "kept", low=0.005), tried(0.2, "culled"), tried(0.2, "culled"))
    given.seeds[0][GROWN] = outcome(0.9, tried=kept)
    figures = figures_of([given])
    assert named(figures, "digits/mlp: kept seeds certain to pay").value == pytest.approx(0.5)
    assert named(figures, "digits/mlp: kept seeds certain to pay").holds is False
    assert named(figures, "digits/mlp: seeds tried per one kept").value == pytest.approx(2.0)
    assert named(figures, "digits/mlp: growth's own share of the FLOPs").value == pytest.approx(0.25)


def test_the_calibration_error_is_taken_bin_by_bin_over_all_decisions() -> None:
    well = [tried(0.75, "kept"), tried(0.75, "kept"), tried(0.75, "kept"), tried(0.75, "culled")]
    assert calibration_error([well]) == pytest.approx(0.0)
    assert calibration_error([[tried(0.95, "culled"), tried(0.05, "kept")]]) == pytest.approx(0.95)
    assert calibration_error([[tried(1.0, "kept"), tried(0.0, "failed")]]) == pytest.approx(0.0)
    assert calibration_error([[], []]) is None


def test_a_race_is_one_decision_that_comes_true_when_any_of_it_is_kept() -> None:
    race = [replace(tried(1.0, ended), group="r") for ended in ("culled", "kept", "culled")]
    assert calibration_error([race]) == pytest.approx(0.0)
    lost = [replace(tried(1.0, "culled"), group="r") for _ in range(3)]
    assert calibration_error([race, lost]) == pytest.approx(0.5), "equal names in two runs are two races"


def test_the_time_to_the_hosts_best_is_relative_to_the_hosts_own() -> None:
    assert time_to(outcome(0.9), outcome(0.8)) == (0.5, 1.0)
    assert time_to(outcome(0.8), outcome(0.9)) is None


# ------------------------------------------------------------------ what is written down


def small_cell() -> Cell:
    return replace(MLP, settings=replace(MLP.settings, epochs=2))


@cache  # every one is found by building networks until one is too large
def first_options(cell: Cell) -> dict[Kind, Option]:
    return {kind: options(cell, kind)[0] for kind in KINDS if options(cell, kind)}


def test_what_is_written_down_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, asked = small_cell(), list[str]()

    def run_arm(arm: str, *_: object, **__: object) -> Outcome:
        if len(asked) == 3 and not goes_on:
            raise KeyboardInterrupt
        asked.append(arm)
        return outcome(0.9)

    goes_on = False
    monkeypatch.setattr(growth, "run_arm", run_arm)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_seed(RunLog(path, versions=ONE), cell, 0, first_options(cell))
    assert asked == arms_of(cell)[:3]
    goes_on = True
    done = run_seed(RunLog(path, versions=ONE), cell, 0, first_options(cell))
    assert asked == arms_of(cell)
    assert list(done) == arms_of(cell)
    run_seed(RunLog(path, versions=ONE), cell, 0, first_options(cell))
    assert asked == arms_of(cell)


def test_lines_of_other_sources_settings_or_seeds_do_not_count(tmp_path: Path) -> None:
    cell, path = small_cell(), tmp_path / "runs.jsonl"
    log = RunLog(path, versions=ONE)
    log.add_outcome(cell, 0, GROWN, outcome(0.9))
    log.add_chosen(cell, 1, "host", options(cell, "host")[1])
    assert log.outcomes(cell, 0) == {GROWN: outcome(0.9)}
    assert log.chosen(cell, 1) == {"host": options(cell, "host")[1]}
    assert log.outcomes(cell, 1) == {}
    assert log.outcomes(MLP, 0) == {}
    assert log.chosen(cell, 3) == {}
    other = RunLog(path, versions=Versions(plain="q", grown="h"))
    assert (other.outcomes(cell, 0), other.chosen(cell, 1)) == ({}, {})


def test_controls_in_which_nothing_of_espers_grows_outlast_a_change_of_it_and_of_what_may_grow(tmp_path: Path) -> None:
    cell, path = small_cell(), tmp_path / "runs.jsonl"
    log = RunLog(path, versions=ONE)
    for arm in ARMS:
        log.add_outcome(cell, 0, arm, outcome(0.9))
    log.add_chosen(cell, 1, "host", options(cell, "host")[1])
    plain = {"host", "host, train+control", "static-wide", "static-wide, train+control", "static-deep"}
    plain |= {"Net2Wider", "gromo"}
    changed, dense = RunLog(path, versions=Versions(plain="p", grown="h")), replace(cell, kinds="dense")
    assert set(changed.outcomes(cell, 0)) == set(changed.outcomes(dense, 0)) == set(log.outcomes(dense, 0)) == plain
    assert changed.chosen(dense, 1) == log.chosen(cell, 1) == {"host": options(cell, "host")[1]}
    assert RunLog(path, versions=Versions(plain="q", grown="g")).outcomes(cell, 0).keys() == set(ARMS) - plain
    log.add_outcome(dense, 0, GROWN, outcome(0.8))
    log.add_outcome(dense, 0, "host", outcome(0.8))
    assert log.outcomes(dense, 0)[GROWN] == outcome(0.8) != log.outcomes(cell, 0)[GROWN]
    assert log.outcomes(cell, 0)["host"] == outcome(0.8), "written for dense alone, it counts for all"


def test_a_last_line_that_was_cut_off_is_dropped_and_a_broken_one_before_is_said(tmp_path: Path) -> None:
    cell, path = small_cell(), tmp_path / "runs.jsonl"
    log = RunLog(path, versions=ONE)
    log.add_outcome(cell, 0, GROWN, outcome(0.9))
    with path.open("a") as file:
        file.write('{"version": "1", "ce')
    log.repair()
    log.add_outcome(cell, 0, "host", outcome(0.8))
    assert set(log.outcomes(cell, 0)) == {GROWN, "host"}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(CorruptDataError, match=r"runs.jsonl:1 must be a JSON object"):
        log.outcomes(cell, 0)


def test_a_version_changes_with_the_sources_that_it_depends_on_and_no_others(tmp_path: Path) -> None:
    root = Path(growth.__file__).parents[1]
    for place in ("esper", "services", "bench", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(root / place, tmp_path / place, ignore=ignored)
    before = versions_of(tmp_path)
    assert before == versions_of(root) == versions_here()
    assert before.plain != before.grown
    for name, plain, grown in (
        ("bench/growth_figures.py", False, False),
        ("esper/core/race.py", False, True),
        ("services/tamiyo/policy.py", False, True),
        ("bench/growth_grown.py", False, True),
        ("bench/random_growth.py", False, True),
        ("bench/growth_training.py", True, True),
        ("esper/blueprints/flops.py", True, True),
    ):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "\n")
        after = versions_of(tmp_path)
        assert (after.plain != before.plain, after.grown != before.grown) == (plain, grown), name
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_controls_in_which_nothing_of_espers_grows_run_through_no_source_but_those_of_their_version(
    family: FamilyName,
) -> None:
    cell = replace(make_cell("digits", family), settings=replace(MLP.settings, epochs=2, batch_size=512, tail=0.3))
    root, ran = Path(growth.__file__).parents[1], set[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            ran.add(frame.f_code.co_filename)

    chosen, arms = first_options(cell), [arm for arm in arms_of(cell) if arm in PLAIN_ARMS]
    choose(cell, "host", num_seeds=1)  # what is imported late is imported now
    sys.setprofile(note)
    try:
        choose(cell, "host", num_seeds=1)
        for arm in arms:
            run_arm(arm, cell, seed=0, chosen=chosen, done={})
    finally:
        sys.setprofile(None)
    named = {str(path.relative_to(root)) for path in map(Path, ran) if path.is_relative_to(root)}
    ours = {name for name in named if not name.startswith((".venv", "tests"))}
    assert {"bench/growth_training.py", "esper/blueprints/flops.py"} <= ours <= set(_PLAIN_SOURCES)


def test_extents_are_those_of_the_design() -> None:
    whole, quick = extent_of(quick=False), extent_of(quick=True)
    assert (len(whole.cells), whole.num_seeds) == (9, 10)
    assert ([cell.name for cell in quick.cells], quick.num_seeds) == (["digits/mlp", "mnist1d/mlp"], 3)


def test_the_command_line_refuses_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["--task", "cifar"], ["--host", "rnn"], ["--seeds", "0"], ["--first-seed", "-3"]):
        with pytest.raises(SystemExit) as ended:
            main(line)
        assert ended.value.code == 2
        assert line[-1] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--first-seed", "8995", "--seeds", "6"])
    assert "all seeds below 9000, with which controls choose, got 8995 to 9000" in capsys.readouterr().err


def test_a_measure_writes_its_arms_and_its_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = small_cell()
    found = outcome(0.9, tried=(tried(0.9, "kept"), tried(0.1, "culled")))
    monkeypatch.setattr(growth, "choose", lambda cell, kind, **_: first_options(cell).get(kind))
    monkeypatch.setattr(growth, "run_arm", lambda *_, **__: found)
    result = measure_extent(Extent(cells=(cell,), num_seeds=2, num_tuning_seeds=1, directory=tmp_path))
    assert json.loads((tmp_path / "arms.json").read_text())["digits/mlp"][0]["arm"] == GROWN
    for name in ("digits-mlp-curves.png", "digits-mlp-tried.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert named(list(result.figures), "digits/mlp: grown minus host, sealed accuracy").value == 0.0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2 * len(arms_of(cell)) + len(first_options(cell))


def test_a_measure_begins_with_the_seed_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = small_cell()
    monkeypatch.setattr(growth, "choose", lambda cell, kind, **_: first_options(cell).get(kind))
    monkeypatch.setattr(growth, "run_arm", lambda *_, **__: outcome(0.9))
    extent = Extent(cells=(cell,), num_seeds=2, num_tuning_seeds=1, first_seed=10, directory=tmp_path)
    result = measure_extent(extent)
    log = RunLog(tmp_path / "runs.jsonl", versions=versions_here())
    assert [bool(log.outcomes(cell, seed)) for seed in (0, 9, 10, 11, 12)] == [False, False, True, True, False]
    assert "seeds 10 to 11." in result.notes[0]


# ------------------------------------------------------------------ random growth


def packet(**budget: int) -> SystemStatePacket:
    model = esper.wrap(digits.make_host(0))
    model(digits.load_digits().sealed.tensors[0])
    layers = tuple(layer.layer_status() for layer in model.kasmina_layers.values())
    return SystemStatePacket(
        run_id="r",
        sequence=1,
        phase=RunPhase.TRAINING,
        epoch=FIRST_EPOCH,
        step=1,
        layers=layers,
        budget=BudgetStatus(**budget),
        host_parameters=1210,
        current_parameters=1210,
        created_at=datetime.now(UTC),
    )


def test_random_draws_span_layers_and_legal_affordable_templates() -> None:
    everything = draws(packet())
    assert {draw.layer for draw in everything} == {"0", "2"}
    assert all(is_legal(draw.blueprint.ir, draw.site) for draw in everything)
    cheap = draws(packet(max_added_parameters=100))
    assert 0 < len(cheap) < len(everything)
    assert not draws(packet(max_added_parameters=0))


def test_random_growth_draws_from_what_the_run_allows() -> None:
    def drawn(text: str) -> set[str]:
        return {draw.blueprint.name for draw in draws(replace(packet(), allowed_blueprints=text))}

    assert drawn("dense") == {"bottleneck_adapter", "deepen", "gated_mlp", "glu", "lora", "norm_shift", "widen"}
    assert drawn("") - drawn("dense") == {"image_conv", "signal_conv"}
    assert not drawn("attention")


def test_random_growth_asks_for_nothing_before_its_first_epoch() -> None:
    link = RandomMesh(0).open_link("r", esper.wrap(digits.make_host(0)))
    link.send(SubjectKind.STATE, replace(packet(), epoch=FIRST_EPOCH - 1))
    assert not list(link.arrivals())
    link.send(SubjectKind.STATE, packet())
    arrivals = list(link.arrivals())
    decisions = [one for one in arrivals if isinstance(one, AdaptationDecision)]
    kernels = [one for one in arrivals if isinstance(one, KernelArrival)]
    assert [one.ready.adaptation_id for one in kernels] == [one.adaptation_id for one in decisions]
    assert len(decisions) == 8, "two layers with four seeds each: a race as large as Tamiyo's"
    assert {(one.race_id, one.race_size) for one in decisions} == {(decisions[0].adaptation_id, 8)}
    assert len({(one.layer, one.seed_index) for one in decisions}) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_seed_of_every_arm(tmp_path: Path) -> None:
    cell = small_cell()
    result = measure_extent(Extent(cells=(cell,), num_seeds=1, num_tuning_seeds=1, directory=tmp_path))
    done = RunLog(tmp_path / "runs.jsonl", versions=versions_here()).outcomes(cell, 0)
    assert list(done) == arms_of(cell)
    assert all(0 < arm.accuracy <= 1 for arm in done.values())
    assert all(arm.flops >= done[GROWN].flops for name, arm in done.items() if name.endswith("same compute"))
    assert done["static-final, born"].parameters == done[GROWN].parameters
    assert done[GROWN].is_repeated is True
    assert result.figures
