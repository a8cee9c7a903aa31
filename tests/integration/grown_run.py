"""Runs that grow, in their own process: ``python -m tests.integration.grown_run ACTION DIRECTORY MESH OPTIMIZER...``.

Action ``whole`` trains through and writes checkpoints in mid-incubation, mid-graft, after a seed was kept and after one
was culled, each in the middle of an epoch. ``resume`` takes every one up in a fresh model, over a mesh of its own.
Both print, as JSON by optimizer, the loss of every step to the bit and digests of everything there is at the end of
every epoch. What belongs to one optimizer lies in a directory of its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.contracts.decision import AdaptationDecision
from esper.core.flatten import flatten
from esper.recovery import CheckpointConfig, CheckpointManager
from tests.decisions import add_seed
from tests.optimizer_pairs import MuonAndAdamW

EPOCH_STEPS, LAST_STEP, BATCH = 20, 180, 64
SAVED_AT = {"incubating": 33, "grafting": 53, "kept": 133, "culled": 153}
GROWTH = esper.GrowthConfig(
    incubation_epochs=2,
    graft_epochs=2,
    incubation_learning_rate=1e-2,
    price_per_host_share=0.0,
    price_per_host_flops=0.0,
    embargo_epochs=1,
    cull_epochs=0,
)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda model: AdamW(
        [{"params": model[4].parameters(), "lr": 5e-3}, {"params": [*model[0].parameters(), *model[1].parameters()]}],
        lr=1e-2,
        fused=True,
    ),
    "sgd": lambda model: SGD(model.parameters(), lr=5e-2, momentum=0.9, nesterov=True, fused=True),
    "both": lambda model: MuonAndAdamW(model.parameters(), muon_lr=2e-3, adamw_lr=1e-2, defaults={"lr": 1e-2}),
}


class OwnDecisionsMesh:
    """A mesh whose decisions do not arrive: those of the run are made by the run."""

    def __init__(self, mesh: esper.Mesh) -> None:
        self.mesh = mesh

    def open_link(self, run_id: str, model: Any) -> Any:
        link = self.mesh.open_link(run_id, model)
        inner = link.arrivals
        link.arrivals = lambda: (item for item in inner() if not isinstance(item, AdaptationDecision))  # type: ignore[method-assign]
        return link


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(7))
    return x, (x[:, :3].abs().sum(1) > x[:, 3:].abs().sum(1)).long()


class Run:
    """Host, optimizer, schedule and session, as a fresh start makes them."""

    def __init__(self, directory: Path, optimizer: str, mesh: esper.Mesh) -> None:
        torch.manual_seed(3)
        host = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 2))
        self.model: Any = esper.wrap(host)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.x, self.y = examples()
        control = DataLoader(TensorDataset(self.x[1600:], self.y[1600:]), batch_size=100)
        self.session = esper.Session(
            self.model,
            self.optimizer,
            loss_fn=nn.CrossEntropyLoss(),
            control_loader=control,
            mesh=OwnDecisionsMesh(mesh),
            config=esper.SessionConfig(
                growth=GROWTH, checkpoints=CheckpointManager(CheckpointConfig(directory=directory))
            ),
        )
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(part, [g["lr"] for g in part.param_groups], total_steps=LAST_STEP + 2)
            for part in getattr(self.optimizer, "optimizers", [self.optimizer])
        ]
        for number, schedule in enumerate(self.schedules):
            self.session.track(f"schedule{number}", schedule)

    def decide(self, number: int, layer: str, template: str) -> None:
        """Germinate a seed in place, by a decision of the run's own."""
        decision = add_seed(
            self.model,
            layer,
            template,
            adaptation_id=f"a{number:032x}",
            run_id=self.session.run_id,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        failed = [check for check in self.session.orchestrator.decide(decision) if not check.passed]
        assert not failed, failed
        stream = torch.get_rng_state()
        self.session.orchestrator.germinate_in_place(decision.adaptation_id)
        assert torch.equal(stream, torch.get_rng_state())

    def step(self) -> str:
        """Take the step that the session has come to; gives the loss to the bit."""
        number = self.session.step_count
        if number == 2:
            self.decide(1, "0", "gated_mlp")
        if number == 101:
            self.decide(2, "4", "bottleneck_adapter")
        if number == 145:
            self.session.orchestrator.remove_seed("4", 0, "changed my mind")
        start = number * BATCH % 1600
        x, y = self.x[start : start + BATCH], self.y[start : start + BATCH]
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.session.step(loss, batch=(x, y))
        for schedule in self.schedules:
            schedule.step()
        if (number + 1) % EPOCH_STEPS == 0:
            self.session.end_epoch()
        return float(loss.detach()).hex()

    def digests(self) -> dict[str, str]:
        """Give a digest of every part of the state."""
        state = self.session._memory.capture()
        for item in state["orchestrator"]["adaptations"].values():
            item.pop("trace_id"), item.pop("trace_headers")
        tolaria = state["tolaria"]
        found = {name: tolaria[name] for name in ("epoch", "step", "optimizer", "tracked", "random", "control_loss")}
        found |= {"model": state["kasmina"]["model"]} | state["orchestrator"]
        return {name: digest(value) for name, value in found.items()}

    def seeds(self) -> list[tuple[str, float]]:
        """Give state and alpha of both seeds."""
        layouts = [self.model.kasmina_layers[name].state_layout for name in ("0", "4")]
        return [(layout.state(0).name, float(layout.alpha_blend[0])) for layout in layouts]

    def go_on(self, saved: dict[str, str] | None = None) -> dict[str, Any]:
        """Train on; give losses and digests by step. With ``saved``, to the end, and write the checkpoints into it."""
        losses, digests, seeds = {}, {}, {}
        last = LAST_STEP if saved is not None else min(LAST_STEP, self.session.step_count + 47)
        while self.session.step_count < last:
            losses[self.session.step_count] = self.step()
            for name, at in SAVED_AT.items():
                if self.session.step_count == at and saved is not None:
                    saved[name] = self.session.save_checkpoint()
            if self.session.step_count % EPOCH_STEPS == 0 or self.session.step_count in SAVED_AT.values():
                digests[self.session.step_count], seeds[self.session.step_count] = self.digests(), self.seeds()
        return {"losses": losses, "digests": digests, "seeds": seeds}


def digest(value: Any) -> str:
    """Give the SHA-256 of nested data with tensors."""
    tree, tensors = flatten(value)
    found = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name, tensor in tensors.items():
        found.update(name.encode() + str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def mesh_of(kind: str, directory: Path) -> Iterator[esper.Mesh]:
    """Bring up a mesh of its own."""
    with esper.Mesh.embedded() if kind == "embedded" else esper.Mesh.local(directory / "mesh") as mesh:
        yield mesh


def train_through(directory: Path, optimizer: str, mesh: esper.Mesh) -> dict[str, Any]:
    """Train to the end, and leave checkpoints behind."""
    saved: dict[str, str] = {}
    run = Run(directory / "checkpoints", optimizer, mesh)
    with run.session:
        found = run.go_on(saved)
    (directory / "saved.json").write_text(json.dumps(saved))
    return found


def take_up(directory: Path, optimizer: str, mesh: esper.Mesh) -> dict[str, Any]:
    """Go on from every checkpoint that was left, each in a fresh model; gives what was found by its name."""
    resumed = {}
    for name, checkpoint_id in json.loads((directory / "saved.json").read_text()).items():
        run = Run(directory / "checkpoints", optimizer, mesh)
        with run.session:
            torch.randn(17)  # a process that has drawn otherwise
            run.session.load_checkpoint(checkpoint_id)
            resumed[name] = {"at_once": run.digests(), "seeds_at_once": run.seeds(), **run.go_on()}
    return resumed


ACTIONS = {"whole": train_through, "resume": take_up}


def main(action: str, directory: Path, mesh: str, *optimizers: str) -> dict[str, Any]:
    """Do what the module's docstring says, over one mesh."""
    for optimizer in optimizers:
        (directory / optimizer).mkdir(exist_ok=True)
    with mesh_of(mesh, directory) as up:
        return {optimizer: ACTIONS[action](directory / optimizer, optimizer, up) for optimizer in optimizers}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
