"""What is damaged is refused with a typed error, and the run stands where it stood, to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.errors import CorruptDataError, EsperError, NotFoundError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.capture import cloned
from esper.recovery import CheckpointManager
from tests.nested_states import differences

GROWTH = esper.GrowthConfig(incubation_epochs=2, graft_epochs=3, incubation_learning_rate=1e-2)


class Rig:
    """A run with one seed that is grafted and one that learns alone."""

    def __init__(self, task: Any, open_session: Any, line: Any, decide: Any, kernel_for: Any, directory: Path) -> None:
        torch.manual_seed(3)
        self.task, self.line, self.decide, self.kernel_for = task, line, decide, kernel_for
        self.model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 2)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.store = CheckpointManager(directory)
        self.session = open_session(self.model, self.optimizer, checkpoints=self.store, growth=GROWTH)
        self.session.track("scheduler", self.scheduler)

    def grow(self, layer: str) -> None:
        decision = self.decide(self.model, layer=layer)
        self.line.incoming += [decision, self.kernel_for(decision)]

    def epochs(self, count: int) -> None:
        for _ in range(count):
            for x, y in self.task.train:
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                self.session.step(loss, batch=(x, y))
            self.scheduler.step()
            self.session.end_epoch()

    def everything(self) -> dict[str, Any]:
        return cloned(self.session._memory.capture())  # type: ignore[no-any-return]


@pytest.fixture
def rig(task: Any, open_session: Any, line: Any, decide: Any, kernel_for: Any, tmp_path: Path) -> Callable[[], Rig]:
    return lambda: Rig(task, open_session, line, decide, kernel_for, tmp_path / "checkpoints")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every mapping, list and leaf, but of the insides of long lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list | tuple) and len(value) < 16:
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def damaged(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Give a copy with one place changed."""
    if not path:
        return change(value)
    if isinstance(value, dict):
        return {key: damaged(item, path[1:], change) if key == path[0] else item for key, item in value.items()}
    found = [damaged(item, path[1:], change) if index == path[0] else item for index, item in enumerate(value)]
    return tuple(found) if isinstance(value, tuple) else found


def emptied(value: Any) -> Any:
    match value:
        case torch.Tensor():
            return torch.zeros(3, 5)
        case dict() | list() | tuple():
            return type(value)()
        case str():
            return value[:-1] + "!"
        case None:
            return {"not": "nothing"}
    return "not a number"


CHANGES: dict[str, Callable[[Any], Any]] = {
    "emptied": emptied,
    "another type": lambda value: [1, 2] if not isinstance(value, list) else {"a": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_one_damaged_place_changes_nothing(rig: Any, change: str) -> None:
    first = rig()
    first.grow("0")
    first.epochs(2)
    first.grow("3")
    first.epochs(1)
    layouts = [first.model.kasmina_layers[name].state_layout.state(0) for name in ("0", "3")]
    assert layouts == [State.EVALUATING, State.ACTIVE]
    saved = first.everything()
    second = rig()
    second.grow("3")
    second.epochs(1)
    before = second.everything()
    refused = 0
    for path in places(saved):
        if (path[:4] == ("tolaria", "optimizer", "parts", 0) and path[4:6] == ("state", "state")) or "tracked" in path[
            :-2
        ]:
            continue  # torch itself does not look at these, and takes them as they are
        state = damaged(saved, path, CHANGES[change])
        second.store.load_state = lambda _, state=state: state  # what a digest does not notice: it was written so
        try:
            second.session.load_checkpoint("c")
        except EsperError:
            refused += 1
            found = second.everything()
            found["tolaria"]["packets"] = before["tolaria"]["packets"]
            assert differences(before, found) == [], path
            held = {id(value) for group in second.optimizer.param_groups for value in group["params"]}
            assert held <= {id(value) for value in second.model.parameters()}, path
        else:  # a value as good as the one before, or one that nothing is built on
            second.session._orchestrator.forget()
            second.session._memory.restore(before)
    assert refused > 100


def test_bytes_that_are_damaged_anywhere_are_refused_and_change_nothing(rig: Any) -> None:
    first = rig()
    first.grow("0")
    first.epochs(1)
    checkpoint_id = first.session.save_checkpoint()
    directory = first.store.config.directory
    files = [directory / f"{checkpoint_id}.json", *sorted((directory / "blobs").iterdir())]
    first.epochs(1)
    before = first.everything()
    for path in files:
        whole = path.read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(CorruptDataError, match="must"):
                first.session.load_checkpoint(checkpoint_id)
        for at in range(0, len(whole), max(1, len(whole) // 23)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            with pytest.raises(CorruptDataError, match="must"):
                first.session.load_checkpoint(checkpoint_id)
        path.write_bytes(whole)
    assert differences(before, first.everything()) == []
    first.session.load_checkpoint(checkpoint_id)
    with pytest.raises(NotFoundError, match="checkpoint must exist"):
        first.session.load_checkpoint("c20260101120000000-0123abcd")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_by_its_number(rig: Any, version: object) -> None:
    first = rig()
    checkpoint_id = first.session.save_checkpoint()
    path = first.store.config.directory / f"{checkpoint_id}.json"
    body = json.loads(path.read_text())["body"] | {"format": version}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": digest}))
    before = first.everything()
    with pytest.raises(CorruptDataError, match=f"must have format 1, got {version!r}"):
        first.session.load_checkpoint(checkpoint_id)
    assert differences(before, first.everything()) == []


def test_a_grown_state_dict_that_does_not_fit_leaves_the_model_as_it_was(rig: Any) -> None:
    first = rig()
    first.grow("0")
    first.epochs(3)
    saved = cloned(dict(first.model.state_dict()))
    second = rig()
    second.grow("3")
    second.epochs(1)
    before = second.everything()
    parameters = {name: id(value) for name, value in second.model.named_parameters()}
    weight = next(key for key in saved if key.startswith("0.seeds.0.") and key.endswith("weight"))
    extra = "0.seeds.0._extra_state"
    for change, error, message in (
        ({weight: torch.zeros(1, 1)}, RuntimeError, "size mismatch for 0.seeds.0"),
        ({"3.bias": torch.zeros(9)}, RuntimeError, "size mismatch for 3.bias"),
        ({"nowhere.at.all": torch.zeros(1)}, RuntimeError, r"Unexpected key\(s\) in state_dict"),
        ({extra: saved[extra][:-20]}, CorruptDataError, "of a grown seed must have .* bytes"),
        ({extra: torch.zeros(0, dtype=torch.uint8)}, EsperError, "seed 0 of layer '0' must hold a kernel"),
        ({"3.seeds.9._extra_state": saved[extra]}, EsperError, r"3\.seeds\.9 must describe seed 9, got 0"),
    ):
        with pytest.raises(error, match=message):
            second.model.load_state_dict(saved | change)
        assert differences(before, second.everything()) == [], message
        assert {name: id(value) for name, value in second.model.named_parameters()} == parameters
    second.epochs(1)
