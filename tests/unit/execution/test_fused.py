"""Many configurations in one pass: the same losses as one after the other, and where it is refused."""

from __future__ import annotations

import copy
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts.errors import InvalidInputError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.morphable import MorphableModel
from esper.core.wrap import wrap
from esper.execution import fused
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.overrides import SeedRef

COUNT = 12


class Plain(nn.Module):
    """Linear layers in a row, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Residual(Plain):
    """Goes around its layers: copies of the batch must go in."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        x = x + torch.tanh(self.first(x))
        return self.head(x + torch.tanh(self.second(x)))


class Folded(Plain):
    """Folds a sequence of five behind the batch before its layers."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        places = torch.stack([x.roll(place, 1) for place in range(5)], 1).flatten(0, 1)
        return self.head(self.second(self.first(places))).view(-1, 5, 3).mean(1)


class TimeFirst(Plain):
    """Has a sequence of 24 in front of the batch at its layers: as many rows as some lanes would have."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        places = torch.stack([x.roll(place, 1) for place in range(24)])
        return self.head(self.second(self.first(places))).mean(0)


class TimeMajor(Plain):
    """Folds a sequence in front of the batch: the rows of a lane lie apart."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        places = torch.stack([x.roll(place, 1) for place in range(5)]).flatten(0, 1)
        return self.head(self.second(self.first(places))).view(5, -1, 3).mean(0)


class Mixing(Plain):
    """Normalises by the batch, in eval mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        x = self.second(self.first(x))
        return self.head((x - x.mean(0)) / (x.std(0) + 0.1))


class Drawing(Plain):
    """Draws in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class Fixed(Plain):
    """Takes batches of one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != COUNT:
            raise ValueError("a batch of 12")
        return super().forward(x)


class Attending(nn.Module):
    """Attention with the sequence in front, and a skip around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.MultiheadAttention(6, 2, batch_first=False)
        self.head = nn.Linear(6, 3)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        x = self.first(torch.stack([x, x.roll(1, 1), x.roll(2, 1)], 1)).transpose(0, 1)
        return self.head((x + self.second(x, x, x, need_weights=False)[0]).mean(0))


class Convolving(nn.Module):
    """Convolutions with a norm that stands on running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        x = x.view(-1, 1, 2, 3)
        return self.head(self.norm(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Delta(nn.Module):
    """A map of h, row by row, that also reads x's size."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.value * torch.sin(3.0 * h)


class Skip(nn.Module):
    """A linear map of another layer's input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        del h
        return self.map(x)


class Centring(nn.Module):
    """A kernel that mixes the examples it is given."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h.mean(0, keepdim=True).expand_as(h) + 0.01


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def batch(seed: int = 1, count: int = COUNT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def grown(host: nn.Module) -> tuple[MorphableModel, list[SeedRef]]:
    """Two seeds at each of two layers, one of which is blended in already."""
    torch.manual_seed(0)
    model = wrap(host, telemetry=False)
    model.eval()(batch()[0])
    refs = [SeedRef(name, index) for name in ("first", "second") for index in range(2)]
    for number, ref in enumerate(refs):
        model.kasmina_layer(ref.layer).attach_module(ref.seed_index, Delta(0.2 + 0.3 * number))
    model.kasmina_layer("second").transition(1, State.EVALUATING)
    model.kasmina_layer("second").set_alpha(1, 0.25)
    host.rows.clear()
    return model, refs


def rivals(refs: list[SeedRef]) -> list[dict[SeedRef, float]]:
    off = dict.fromkeys(refs, 0.0)
    return [off, *({**off, ref: 1.0} for ref in refs), dict.fromkeys(refs, 0.5), {}, {refs[0]: 0.7}]


def measured(model: MorphableModel, batches: Any, configurations: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """The losses as they are measured, and one after the other."""
    return (
        evaluate_configurations(model, batches, losses_of, configurations, **settings),
        evaluate_configurations(model, batches, losses_of, configurations, max_rows=1),
    )


@pytest.mark.parametrize("host", [Plain, Residual, Folded, Attending, Convolving])
def test_a_fused_pass_gives_the_losses_of_one_after_the_other(host: type[Any]) -> None:
    model, refs = grown(host())
    configurations = rivals(refs)
    batches = [batch(1), batch(2), batch(3, 5)]
    together, alone = measured(model, batches, configurations)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert len({tuple(row.tolist()) for row in alone}) == len(configurations), "every configuration is told apart"


def test_it_runs_once_a_batch_where_nothing_goes_around_the_layers() -> None:
    model, refs = grown(Plain())
    evaluate_configurations(model, [batch(1), batch(2)], losses_of, rivals(refs))
    assert model.rows == [COUNT, 4, COUNT], "a pass for each batch, and a few examples alone"


def test_copies_go_in_where_something_does_and_the_model_is_known_for_it() -> None:
    model, refs = grown(Residual())
    configurations = rivals(refs)
    evaluate_configurations(model, [batch(1), batch(2)], losses_of, configurations)
    rows = len(configurations) * COUNT
    assert model.rows == [COUNT, rows, 4, rows]
    model.rows.clear()
    evaluate_configurations(model, [batch(1)], losses_of, configurations)
    assert model.rows == [rows, 4], "every measurement is checked, and no pass is lost"


@pytest.mark.parametrize("host", [TimeFirst, TimeMajor, Mixing, Drawing, Fixed])
def test_a_host_whose_rows_are_no_lanes_is_measured_one_after_the_other(
    host: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, refs = grown(host())
    with caplog.at_level(logging.DEBUG, logger=fused.__name__):
        together, alone = measured(model, [batch(1), batch(2)], rivals(refs))
    assert torch.equal(together, alone)
    assert [record.getMessage() for record in caplog.records] == ["fused_pass_refused"] * 2
    assert all(record.reason for record in caplog.records)


@pytest.mark.parametrize("host", [TimeMajor, Mixing])
def test_it_is_refused_while_the_seeds_still_add_nothing(host: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    model, refs = grown(host())
    for ref in refs:
        seed = model.kasmina_layer(ref.layer).find_seed(ref.seed_index)
        seed.kernel.value.data.zero_()
    with caplog.at_level(logging.DEBUG, logger=fused.__name__):
        evaluate_configurations(model, [batch(1)], losses_of, rivals(refs))
    assert {record.getMessage() for record in caplog.records} == {"fused_pass_refused"}


def test_a_batch_that_goes_another_way_than_the_first_is_measured_one_after_the_other() -> None:
    model, refs = grown(Plain())
    forward = type(model.host_module).forward

    def forked(x: Tensor) -> Tensor:
        return forward(model.host_module, x if x[0, 0] < 50 else model.first(x))

    model.host_module.forward = forked
    other = batch(2)
    other[0][0, 0] = 100.0
    together, alone = measured(model, [batch(1), other], rivals(refs))
    torch.testing.assert_close(together[:, :COUNT], alone[:, :COUNT], rtol=1e-5, atol=1e-6)
    assert torch.equal(together[:, COUNT:], alone[:, COUNT:])


def test_a_kernel_that_mixes_examples_sees_those_of_its_own_configuration() -> None:
    model, refs = grown(Plain())
    model.kasmina_layer("second").attach_module(2, Centring())
    refs.append(SeedRef("second", 2))
    together, alone = measured(model, [batch(1)], rivals(refs))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host", [Plain, Residual])
def test_skip_seeds_read_the_rows_of_their_own_configuration(host: type[Any]) -> None:
    model, refs = grown(host())
    for name in ("second", "head"):
        module = Skip(6, model.kasmina_layer(name).out_features)
        model.kasmina_layer(name).attach_module(3, module, source="first" if name == "second" else "second")
        refs.append(SeedRef(name, 3))
    together, alone = measured(model, [batch(1), batch(2)], rivals(refs))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host", [Plain, Residual])
def test_a_standing_skip_seed_that_nobody_names_reads_the_rows_it_is_blended_with(host: type[Any]) -> None:
    """Its source's input was made before the lanes parted, its own layer's rows after."""
    model, refs = grown(host())
    head = model.kasmina_layer("head")
    head.attach_module(0, Skip(6, 3), source="first")
    head.transition(0, State.EVALUATING)
    head.set_alpha(0, 0.9)
    model.kasmina_layer("second").transition(1, State.CULLED)
    named = [ref for ref in refs if ref.layer == "first"]
    model.rows.clear()
    together, alone = measured(model, [batch(1)], rivals(named))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert head.state_layout.errors[0] == 0
    assert len(model.rows) < 2 * len(rivals(named)), "it was fused"


def test_rows_of_a_pass_are_bounded() -> None:
    model, refs = grown(Residual())
    configurations = rivals(refs)
    together, alone = measured(model, [batch(1)], configurations, max_rows=3 * COUNT)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert max(model.rows) == 3 * COUNT


def test_what_would_not_pay_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, refs = grown(Residual())
    monkeypatch.setattr(fused, "_FORMS", (fused._Form(splits=False, cpu_bytes=6 * 4 * COUNT * 2 - 1),))
    evaluate_configurations(model, [batch(1)], losses_of, rivals(refs))
    assert max(model.rows) == COUNT


def test_a_seed_that_fails_fails_for_its_own_configuration() -> None:
    model, refs = grown(Plain())
    twin, _ = grown(Plain())
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        one.kasmina_layer("first").find_seed(0).kernel.value.data.fill_(torch.nan)
    configurations = rivals(refs)
    together = evaluate_configurations(model, [batch(1)], losses_of, configurations)
    alone = evaluate_configurations(twin, [batch(1)], losses_of, configurations, max_rows=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert model.kasmina_layer("first").state_layout.errors[0] > 0
    assert torch.equal(together[0], together[1]), "its configuration is then the one without it"


def test_nothing_is_left_behind() -> None:
    model, refs = grown(Residual())
    model.train()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    streams = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    evaluate_configurations(model, [batch(1)], losses_of, rivals(refs))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]  # noqa: NPY002
    assert all(layer._kasmina.lanes is None for layer in model.kasmina_layers.values())
    assert [[seed.index for seed in layer._kasmina.terms] for layer in model.kasmina_layers.values()] == [[], [1], []]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_part_is_measured_one_after_the_other(fresh_compiler: None) -> None:
    del fresh_compiler
    model, refs = grown(Plain())
    model.host_module.compile(backend="eager")
    evaluate_configurations(model, [batch(1)], losses_of, rivals(refs)[:2])
    assert set(model.rows) == {COUNT}
    assert len(model.rows) == 2


def test_a_loss_that_gives_no_row_an_example_is_refused() -> None:
    model, refs = grown(Plain())
    with pytest.raises(InvalidInputError, match=r"loss must give shape \(12,\), got \(\)"):
        evaluate_configurations(model, [batch(1)], F.cross_entropy, rivals(refs))


def test_equal_runs_measure_equal_bits() -> None:
    found = []
    for _ in range(2):
        model, refs = grown(Residual())
        found.append(evaluate_configurations(model, [batch(1), batch(2)], losses_of, rivals(refs)))
    assert torch.equal(*found)
