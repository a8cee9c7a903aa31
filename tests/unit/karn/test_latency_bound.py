"""A bound on latency: measured where it is asked for, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.blueprints import default_registry, to_module
from esper.client._async.karn import AsyncKarnClient
from esper.contracts.blueprint import BlueprintIR, Site
from esper.contracts.errors import CapacityExceededError, InvalidInputError, InvalidStateError
from esper.services.karn import latency as latency_module
from esper.services.karn.archive import Archive
from esper.services.karn.latency import median_latency_ms
from esper.services.karn.proposer import Constraints, Proposer
from esper.services.karn.surrogate import Surrogate
from tests.unit.karn.karn_mesh import Mesh, request_for


class Clock:
    """Says how long designs take, by their number of nodes, and which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[BlueprintIR] = []

    def __call__(self, ir: BlueprintIR, site: Site) -> float:
        self.asked.append(ir)
        return float(len(ir.nodes))


def proposer(clock: Clock) -> Proposer:
    return Proposer(default_registry(), Archive(), Surrogate(), check=lambda *_: True, timer=clock)


def test_the_bound_is_kept_and_only_asked_where_it_is_set(linear_site: Site) -> None:
    clock = Clock()
    free = proposer(clock).propose(linear_site, 8, Constraints(), 0)
    assert clock.asked == []
    assert max(len(one.blueprint.ir.nodes) for one in free) > 3
    bound = proposer(clock).propose(linear_site, 8, Constraints(max_latency_ms=3.0), 0)
    assert max(len(one.blueprint.ir.nodes) for one in bound) == 3, "a design at the bound keeps it"
    assert max(len(ir.nodes) for ir in clock.asked) > 3
    with pytest.raises(InvalidStateError, match=r"none passed the contract test within 0\.5 ms"):
        proposer(clock).propose(linear_site, 8, Constraints(max_latency_ms=0.5), 0)


def test_what_is_too_slow_costs_no_contract_test(linear_site: Site) -> None:
    checked: list[BlueprintIR] = []

    def check(ir: BlueprintIR, site: Site) -> bool:
        checked.append(ir)
        return True

    maker = Proposer(default_registry(), Archive(), Surrogate(), check=check, timer=Clock())
    maker.propose(linear_site, 2, Constraints(max_latency_ms=3.0), 0)
    assert len(checked) >= 2
    assert max(len(ir.nodes) for ir in checked) <= 3


def test_what_cannot_run_is_never_in_time(
    monkeypatch: pytest.MonkeyPatch, linear_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(ir: BlueprintIR, site: Site, *, seed: int) -> Any:
        def forward(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(message)

        return forward

    monkeypatch.setattr(latency_module, "to_module", broken)
    lora = default_registry().create_blueprint("lora").ir
    message = "shapes differ"
    assert median_latency_ms(lora, linear_site) == float("inf")
    assert [(record.message, record.__dict__["error"]) for record in caplog.records] == [("design_cannot_run", message)]
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    with pytest.raises(CapacityExceededError, match="memory must suffice"):
        median_latency_ms(lora, linear_site)


def test_it_is_the_median_of_five_passes_at_the_whole_site(monkeypatch: pytest.MonkeyPatch, any_site: Site) -> None:
    taken_s = [9.0, 0.5, 0.1, 0.4, 0.2, 0.3]
    ticks = iter([moment for taken in taken_s for moment in (100.0, 100.0 + taken)])
    shapes: list[tuple[torch.Size, torch.Size]] = []

    def watched(ir: BlueprintIR, site: Site, *, seed: int) -> Any:
        module = to_module(ir, site, seed=seed)

        def forward(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            shapes.append((x.shape, h.shape))
            return module(x, h)

        return forward

    monkeypatch.setattr(latency_module, "to_module", watched)
    with monkeypatch.context() as patched:
        patched.setattr(latency_module.time, "perf_counter", lambda: next(ticks))
        found = median_latency_ms(default_registry().create_blueprint("lora").ir, any_site)
    assert found == pytest.approx(300.0)
    assert shapes == [((1, *any_site.input_shape), (1, *any_site.output_shape))] * 6


async def test_a_request_bounds_latency(mesh: Mesh, linear_site: Site) -> None:
    stub = await mesh.open()
    with pytest.raises(InvalidStateError, match="none passed the contract test within 1e-06 ms"):
        await stub.ProposeBlueprints(request_for(linear_site, count=1, max_latency_ms=1e-6, allowed_blueprints="dense"))
    answer = await stub.ProposeBlueprints(request_for(linear_site, count=1, max_latency_ms=1e6))
    assert len(answer.proposals) == 1
    with pytest.raises(InvalidInputError, match=r"constraints\.max_latency_ms must be finite and > 0 ms, got -1\.0"):
        await stub.ProposeBlueprints(request_for(linear_site, count=1, max_latency_ms=-1.0))


async def test_the_client_passes_it_on(mesh: Mesh, linear_site: Site) -> None:
    stub = await mesh.open()

    class Transport:
        async def call(self, service: str, method: str, request: Any) -> Any:
            assert service == "karn"
            return await getattr(stub, method)(request)

    client = AsyncKarnClient(Transport())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"max_latency_ms must be finite and > 0 ms, got 0\.0"):
        await client.propose_blueprints(linear_site, max_latency_ms=0.0)
    assert len(await client.propose_blueprints(linear_site, count=1)) == 1
