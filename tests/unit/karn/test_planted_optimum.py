"""A site class with a planted optimum, over gRPC: reports draw Karn's proposals there, in a fixed number of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esper.blueprints import default_registry
from esper.blueprints.registry import BlueprintRegistry
from esper.contracts.blueprint import Blueprint, BlueprintIR, Site
from esper.contracts.wire import from_wire, to_wire
from esper.mesh import InProcessChannel
from esper.services.karn.design import view
from esper.services.karn.grammar import Grammar
from esper.services.karn.server import KarnNode
from esper.v1 import karn_service_pb2
from esper.v1.karn_service_pb2_grpc import KarnServiceStub
from tests.unit.karn.conftest import LINEAR, report_of

ROUNDS, COUNT, LAST = 9, 4, 3
TIMEOUT_S = 100.0
MAX_PARAMETERS = 20_000


def planted_reward(ir: BlueprintIR, site: Site) -> float:
    """Gated convolutions six nodes deep earn 0.17, and it falls off from there."""
    seen = view(ir, site)
    operators = [step.node.op for step in seen.layout.steps]
    reward = -0.05 + (0.1 if seen.kind == "conv" else 0.0) + (0.12 if "mul" in operators else 0.0)
    return reward - 0.03 * abs(seen.depth - 6)


async def rewards_of(seed: int, rounds: int, *, tells: bool) -> list[float]:
    """Give the mean true reward of every round's proposals; noisy reports go back where ``tells``."""
    noise = np.random.default_rng(seed)
    channel = InProcessChannel()
    means = []
    async with await KarnNode.open() as node:
        node.add_to(channel)
        stub: Any = KarnServiceStub(channel)  # type: ignore[no-untyped-call]
        for turn in range(rounds):
            request = karn_service_pb2.ProposeBlueprintsRequest(count=COUNT, random_seed=1_000 * seed + turn)
            request.site.CopyFrom(to_wire(LINEAR))  # type: ignore[arg-type]
            request.constraints.max_parameters = MAX_PARAMETERS
            answer = await stub.ProposeBlueprints(request, timeout=TIMEOUT_S)
            designs = [from_wire(one.blueprint, Blueprint) for one in answer.proposals]
            rewards = [planted_reward(one.ir, LINEAR) for one in designs]
            means.append(float(np.mean(rewards)))
            for place, (design, reward) in enumerate(zip(designs, rewards, strict=True)):
                report = report_of(f"r{turn}-{place}", design.id, reward + noise.normal(0.0, 0.02))
                if tells:
                    told = karn_service_pb2.KarnServiceSubmitFieldReportRequest(report=to_wire(report))
                    assert (await stub.SubmitFieldReport(told)).learned
        assert answer.proposals[0].HasField("expected_reward") == tells
    await channel.close()
    return means


def random_generation(seed: int, count: int) -> list[float]:
    """Give the rewards of legal variations of random templates: no archive, no surrogate, no ranking."""
    random = np.random.default_rng(seed)
    registry: BlueprintRegistry = default_registry()
    templates = [one.ir for one in registry.for_site(LINEAR)]
    grammar = Grammar(LINEAR)
    found: list[float] = []
    while len(found) < count:
        parents = [templates[int(place)] for place in random.integers(0, len(templates), size=2)]
        made = grammar.vary(parents, random)
        if made is not None and view(made.ir, LINEAR).cost.parameters <= MAX_PARAMETERS:
            found.append(planted_reward(made.ir, LINEAR))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_reports_draw_proposals_to_the_optimum(seed: int) -> None:
    learned = await rewards_of(seed, ROUNDS, tells=True)
    untold = await rewards_of(seed, LAST, tells=False)
    chance = float(np.mean(random_generation(seed, 200)))
    assert np.mean(learned[-LAST:]) > chance + 0.05, "better than random generation"
    assert np.mean(learned[-LAST:]) > np.mean(untold) + 0.05, "and than its own proposals without reports"
