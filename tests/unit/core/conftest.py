"""A small task that a linear host cannot solve, a line that keeps what is sent, and kernels packed as in production."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.blueprints import canonical_bytes, content_id, to_module
from esper.blueprints import cost as cost_of
from esper.contracts.decision import AdaptationDecision
from esper.contracts.kernel import CompileTarget, DeviceKind, KernelReady, ValidationCheck
from esper.contracts.run import CacheTierStatus
from esper.core.link import Arrival, KernelArrival
from esper.core.morphable import MorphableModel
from esper.execution.artifact import KernelContent, artifact_bytes, pack, verify
from esper.execution.keys import SigningKey
from esper.telemetry.subjects import Kind
from tests.decisions import add_seed

KEY = SigningKey.generate()


@dataclass
class KeptLine:
    """A run's line that keeps what is sent and gives what a test puts in."""

    sent: list[tuple[Kind, Any]] = field(default_factory=list)
    incoming: deque[Arrival] = field(default_factory=deque)
    closed: bool = False

    def send(self, kind: Kind, value: object, *, layer: str | None = None, msg_id: str | None = None) -> None:
        self.sent.append((kind, value))

    def arrivals(self) -> Iterator[Arrival]:
        while self.incoming:
            yield self.incoming.popleft()

    def cache_tiers(self) -> Sequence[CacheTierStatus]:
        return ()

    def close(self, deadline_s: float = 5.0) -> None:
        self.closed = True

    def values(self, kind: Kind) -> list[Any]:
        return [value for sent, value in self.sent if sent is kind]


@dataclass
class OneLineMesh:
    """A mesh whose only line is the one a test holds."""

    line: KeptLine

    def open_link(self, run_id: str, model: MorphableModel) -> KeptLine:
        return self.line


class Task:
    """Learn |x|-like features: a linear host is poor at it, a seed with a nonlinearity helps."""

    def __init__(self, num_train: int = 192, num_control: int = 128) -> None:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(num_train + num_control, 6, generator=generator)
        y = (x[:, :3].abs().sum(1) > x[:, 3:].abs().sum(1)).long()
        self.train = DataLoader(TensorDataset(x[:num_train], y[:num_train]), batch_size=32)
        self.control = DataLoader(TensorDataset(x[num_train:], y[num_train:]), batch_size=64)

    def host(self) -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def line() -> KeptLine:
    return KeptLine()


@pytest.fixture
def decide() -> Callable[..., AdaptationDecision]:
    """Make an actionable decision to add a seed of a template at a layer."""
    made = iter(range(1, 1000))

    def make(model: MorphableModel, layer: str = "0", template: str = "bottleneck_adapter", **changes: Any) -> Any:
        return add_seed(model, layer, template, **({"adaptation_id": f"a{next(made):032x}"} | changes))

    return make


@pytest.fixture
def kernel_for() -> Callable[[AdaptationDecision], KernelArrival]:
    """Make the arrival of the kernel that a decision asks for: packed, signed and verified."""

    def make(decision: AdaptationDecision, **changes: Any) -> KernelArrival:
        assert decision.blueprint is not None
        assert decision.site is not None
        ir, site = decision.blueprint.ir, decision.site
        content = KernelContent(
            content_key=content_id(ir),
            site=site,
            target=CompileTarget.EAGER,
            device=DeviceKind.CPU,
            ir=canonical_bytes(ir),
            weights=to_module(ir, site, seed=0).state_dict(),
            binary=b"",
            cost=cost_of(ir, site),
            checks=(ValidationCheck(name="packed", passed=True),),
            compilation_time=timedelta(0),
        )
        kernel = verify(artifact_bytes(pack(replace(content, **changes), KEY)), KEY.ring())
        ready = KernelReady(
            adaptation_id=decision.adaptation_id,
            run_id="r",
            job_id="j",
            blueprint_id=decision.blueprint_id,
            site=site,
            artifact_id=kernel.manifest.artifact_id,
        )
        return KernelArrival(ready=ready, kernel=kernel)

    return make


@pytest.fixture
def large_task() -> Task:
    """The same task with enough examples to generalise from."""
    return Task(num_train=1600, num_control=400)


@pytest.fixture
def open_session(task: Task, line: KeptLine) -> Iterator[Callable[..., esper.Session]]:
    """Open sessions over the task's wrapped host; closed at the end of the test."""
    opened: list[esper.Session] = []

    def make(
        model: MorphableModel | None = None, optimizer: torch.optim.Optimizer | None = None, **settings: Any
    ) -> Any:
        wrapped = model if model is not None else esper.wrap(task.host())
        budget = settings.pop("budget", None)
        loss_fn = settings.pop("loss_fn", nn.CrossEntropyLoss())
        control = settings.pop("control", task.control)
        step_optimizer = settings.pop("step_optimizer", True)
        session = esper.Session(
            wrapped,
            optimizer or torch.optim.AdamW(wrapped.parameters(), lr=1e-2),
            loss_fn=loss_fn,
            control_loader=control,
            mesh=OneLineMesh(line),
            budget=budget,
            seed=settings.pop("seed", 0),
            step_optimizer=step_optimizer,
            config=esper.SessionConfig(run_id="r", **settings),
        )
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()
