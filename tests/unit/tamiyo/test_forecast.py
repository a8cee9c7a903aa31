"""What a forecast looks at, when there is a new one, and that nothing depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.errors import InvalidInputError, UnavailableError
from esper.contracts.kernel import CompileJob, CompileSpec, JobPhase
from esper.contracts.lifecycle import SeedLifecycleState
from esper.contracts.run import BudgetStatus, RunPhase, SeedStatus
from esper.contracts.wire import from_wire, to_wire
from esper.services.tamiyo.forecast import ForecastConfig, KernelForecaster
from esper.services.tamiyo.posterior import RewardPosterior, family_of, observation_of
from esper.v1.tezzeret_service_pb2 import JOB_PRIORITY_BULK, CompileResponse
from tests.unit.tamiyo.conftest import MOMENT, candidates_of, layer_of, packet_of, report_of


class Held:
    """Candidates that are at hand, and those that Karn has yet to be asked for, one answer after the other."""

    def __init__(self, found):
        self.found = found
        self.ahead = []
        self.error = None

    def held(self, packet):
        return self.found

    async def ask_ahead(self, packet):
        if self.error is not None:
            raise self.error
        if self.ahead:
            self.found = self.found + self.ahead.pop(0)
            return True
        return False


class Compiler:
    """Makes every kernel as a test says, and notes what it is asked for."""

    def __init__(self):
        self.requests = []
        self.phase = JobPhase.SUCCEEDED
        self.error = None
        self.watch = lambda: None

    async def Compile(self, request, **_):
        self.requests.append(request)
        self.watch()
        if self.error is not None:
            raise self.error
        spec = from_wire(request.spec, CompileSpec)
        job = CompileJob(
            job_id="j",
            content_key="0" * 64,
            blueprint_id="b",
            spec=spec,
            phase=self.phase,
            artifact_id=f"k{len(self.requests):032x}" if self.phase is JobPhase.SUCCEEDED else "",
            created_at=MOMENT,
        )
        return CompileResponse(job=to_wire(job))


class World:
    """A forecaster with everything it looks at."""

    def __init__(self, size=16, **config):
        self.now_s = 0.0
        self.posterior = RewardPosterior()
        self.held = Held(candidates_of())
        self.compiler = Compiler()
        self.forecaster = KernelForecaster(
            self.posterior, self.held, self.compiler, ForecastConfig(size=size, **config), clock=lambda: self.now_s
        )

    def learn(self, candidate, reward, number):
        report = report_of(f"r{number}", reward, blueprint_id=candidate.blueprint.id, site=candidate.site)
        assert self.posterior.learn(observation_of(report, family=family_of(candidate.blueprint.ir)))


@pytest.fixture
def world():
    return World()


def first_packet(**changes):
    return packet_of(1, 2.0, **changes)


def test_the_best_of_every_kind_come_first_and_each_kernel_once(world):
    specs = world.forecaster.likely(first_packet())
    families = [family_of(spec.ir) for spec in specs]
    kinds = {family_of(one.blueprint.ir) for one in world.held.found}
    assert set(families[: len(kinds)]) == kinds
    assert len(specs) == 16
    assert len({(str(spec.ir), spec.site) for spec in specs}) == 16
    assert {spec.random_seed for spec in specs} == {0}


def test_what_has_paid_comes_before_what_has_done_harm(world):
    same = [one for one in world.held.found if family_of(one.blueprint.ir) == "linear" and one.layer == "hidden"]
    good, bad = same[0], same[1]
    for number in range(6):
        world.learn(good, 0.2, number)
        world.learn(bad, -0.2, 100 + number)
    irs = [spec.ir for spec in world.forecaster.likely(first_packet()) if spec.site == good.site]
    assert good.blueprint.ir in irs
    assert bad.blueprint.ir not in irs or irs.index(good.blueprint.ir) < irs.index(bad.blueprint.ir)


def test_what_the_run_cannot_take_is_left_out(world):
    taken = SeedStatus(seed_index=0, state=SeedLifecycleState.ACTIVE)
    packet = first_packet(layers=(layer_of("hidden", seeds=(taken,)), layer_of("head")))
    assert {spec.site for spec in world.forecaster.likely(packet)} == {layer_of("head").site}
    small = first_packet(budget=BudgetStatus(max_added_parameters=40))
    cheap = [one for one in world.held.found if one.cost.parameters <= 40]
    assert 0 < len(world.forecaster.likely(small)) <= len(cheap)
    assert world.forecaster.likely(first_packet(budget=BudgetStatus(max_adaptations=0))) == []


async def test_what_is_there_is_told_once_and_nobody_is_asked_for_it_again(world):
    first = await world.forecaster.foresee(first_packet())
    assert first == tuple(f"k{number:032x}" for number in range(1, 17))
    assert {request.priority for request in world.compiler.requests} == {JOB_PRIORITY_BULK}
    world.now_s = 100.0
    assert await world.forecaster.foresee(packet_of(2, 2.0)) == ()
    assert len(world.compiler.requests) == 16, "with nothing learned nobody is asked"
    assert len(await world.forecaster.foresee(first_packet(run_id="run-2"))) == 16, "another run has its own"


async def test_what_was_learned_brings_other_kernels_but_not_so_soon_after_the_last(world):
    at_first = await world.forecaster.foresee(first_packet())
    specs = [from_wire(request.spec, CompileSpec) for request in world.compiler.requests]
    asked = [(spec.ir, spec.site) for spec in specs]
    left_out = next(one for one in world.held.found if (one.blueprint.ir, one.site) not in asked)
    for number in range(6):
        world.learn(left_out, 0.2, number)
    world.now_s = 0.4
    assert await world.forecaster.foresee(packet_of(2, 2.0)) == ()
    world.now_s = 0.5
    then = await world.forecaster.foresee(packet_of(3, 2.0))
    assert set(then) - set(at_first)
    anew = world.compiler.requests[16:]
    assert len(anew) == len(set(then) - set(at_first)), "what is known to be there is not asked for again"


async def test_what_is_being_made_is_asked_for_again_until_it_is_there(world):
    world.compiler.phase = JobPhase.QUEUED
    assert await world.forecaster.foresee(first_packet()) == ()
    world.compiler.phase = JobPhase.SUCCEEDED
    assert await world.forecaster.foresee(packet_of(2, 2.0)) == ()
    world.now_s = 0.5
    assert len(await world.forecaster.foresee(packet_of(3, 2.0))) == 16


async def test_what_is_being_made_is_looked_for_while_no_other_packet_may_come():
    world = World(refresh_s=0.01, patience_s=0.05)
    world.compiler.phase = JobPhase.QUEUED
    assert await world.forecaster.foresee(first_packet()) == ()
    assert len(world.compiler.requests) == 16, "nothing says yet how far packets are apart: it is looked once"
    world.now_s = 60.0
    assert await world.forecaster.foresee(packet_of(2, 2.0)) == ()
    assert len(world.compiler.requests) == 16 * (1 + 1 + 5), "no longer than the patience it has"

    def ready():
        if len(world.compiler.requests) >= 16 * 9:
            world.compiler.phase = JobPhase.SUCCEEDED

    world.compiler.watch = ready
    world.now_s = 120.0
    assert len(await world.forecaster.foresee(packet_of(3, 2.0))) == 16
    assert len(world.compiler.requests) < 16 * 11, "no longer than it takes"


async def test_designs_are_asked_for_once_nothing_at_hand_is_new_and_made_one_answer_after_the_other(world):
    new = [one for one in world.held.found if one.layer == "head"]
    world.held.found = [one for one in world.held.found if one.layer == "hidden"][:4]
    world.held.ahead = [new[:2], new[2:4]]
    assert len(await world.forecaster.foresee(first_packet())) == 4
    assert len(world.held.ahead) == 2, "what is there is told first"
    world.now_s = 0.5
    assert len(await world.forecaster.foresee(packet_of(2, 2.0))) == 8
    assert world.held.ahead == []
    assert len(world.compiler.requests) == 8


async def test_a_run_that_may_not_grow_has_no_designs_asked_for(world):
    world.held.ahead = [candidates_of()]
    full = BudgetStatus(max_adaptations=0)
    assert await world.forecaster.foresee(first_packet(budget=full)) == ()
    assert world.compiler.requests == []
    taken = tuple(SeedStatus(seed_index=index, state=SeedLifecycleState.ACTIVE) for index in range(4))
    world.now_s = 0.5
    assert await world.forecaster.foresee(packet_of(2, 2.0, layers=(layer_of("head", seeds=taken),))) == ()
    assert len(world.held.ahead) == 1


async def test_with_the_designer_away_a_forecast_is_given_up(world):
    world.held.found, world.held.error = [], UnavailableError("nobody designs")
    assert await world.forecaster.foresee(first_packet()) == ()
    world.held.error, world.held.ahead = None, [candidates_of()]
    assert len(await world.forecaster.foresee(packet_of(2, 2.0))) == 16


@pytest.mark.parametrize("phase", [JobPhase.FAILED, JobPhase.DEAD])
async def test_what_cannot_be_made_is_not_asked_for_again(world, phase):
    world.compiler.phase = phase
    assert await world.forecaster.foresee(first_packet()) == ()
    world.now_s = 10.0
    assert await world.forecaster.foresee(packet_of(2, 2.0)) == ()
    assert len(world.compiler.requests) == 16


async def test_with_the_compiler_away_a_forecast_is_made_at_the_next_packet(world):
    world.compiler.error = UnavailableError("nobody compiles")
    assert await world.forecaster.foresee(first_packet()) == ()
    assert len(world.compiler.requests) == 1
    world.compiler.error = None
    assert len(await world.forecaster.foresee(packet_of(2, 2.0))) == 16


async def test_a_kernel_that_is_refused_costs_the_others_nothing(world):
    refused = world.compiler.Compile

    async def all_but_the_first(request, **_):
        if not world.compiler.requests:
            world.compiler.requests.append(request)
            raise InvalidInputError("not this one")
        return await refused(request)

    world.compiler.Compile = all_but_the_first
    assert len(await world.forecaster.foresee(first_packet())) == 15


@pytest.mark.parametrize("phase", [RunPhase.FINISHED, RunPhase.FAILED, RunPhase.PAUSED])
async def test_a_run_that_does_not_train_is_told_nothing(world, phase):
    assert await world.forecaster.foresee(first_packet(phase=phase)) == ()
    assert world.compiler.requests == []


async def test_no_candidates_or_no_size_is_no_forecast(world):
    world.held.found = []
    assert await world.forecaster.foresee(first_packet()) == ()
    world.held.found, world.now_s = candidates_of(), 0.5
    assert len(await world.forecaster.foresee(packet_of(2, 2.0))) == 16, "looked at again as soon as there are some"
    off = World(size=0)
    assert await off.forecaster.foresee(first_packet()) == ()
    assert off.compiler.requests == []


def test_a_forecast_leaves_the_draws_of_decisions_alone(world):
    packet = first_packet()
    before = world.forecaster.likely(packet)
    assert world.forecaster.likely(replace(packet, random_seed=99)) == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"size": 65}, r"size must be within \[0, 64\], got 65"),
        ({"refresh_s": -1}, "refresh_s must be >= 0 seconds, got -1"),
        ({"patience_s": -1}, "patience_s must be >= 0 seconds, got -1"),
        ({"call_timeout_s": 0}, "call_timeout_s must be > 0 seconds, got 0"),
    ],
)
def test_settings_that_break_their_rule_are_refused(bad, message):
    with pytest.raises(InvalidInputError, match=message):
        ForecastConfig(**bad)
