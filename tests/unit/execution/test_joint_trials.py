"""Seeds that learn in one pass: each gets the gradient of its own trial, and where that cannot be, nothing happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.blueprints import default_registry
from esper.core.wrap import wrap
from esper.execution.counterfactual import evaluate_configurations
from esper.execution.fused import FusedPasses
from esper.execution.incubation import output_without, trial_backward
from esper.execution.joint_trials import JointTrials
from esper.execution.overrides import SeedRef

COUNT = 24
X = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (COUNT,), generator=torch.Generator().manual_seed(2))


class Plain(nn.Module):
    """Linear layers in a row; its passes are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Residual(Plain):
    """Goes around its layers."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        x = x + torch.tanh(self.first(x))
        return self.head(x + torch.tanh(self.second(x)))


class Normed(Plain):
    """Normalises by the batch in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Twice(Plain):
    """Runs a layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        middle = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.second(middle)))


class Dropping(Plain):
    """Drops units in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Checkpointed(Plain):
    """Runs its middle once more in backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        middle = checkpoint(
            lambda value: torch.tanh(self.second(value)), torch.tanh(self.first(x)), use_reentrant=self.reentrant
        )
        return self.head(middle)


class CheckpointedAgain(Checkpointed):
    """Likewise, in the older way."""

    reentrant = True


class Scale(nn.Module):
    """h times a weight that begins at 0.3."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.tensor(0.3)), factor

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.factor == 0.0:
            raise RuntimeError("a kernel that does not run")
        return h * self.weight * self.factor


PLACES = (("first", 0), ("first", 1), ("second", 0), ("head", 0))


def grown(host: type[Any], **kernels: nn.Module) -> Any:
    """Give a wrapped host in training with four seeds that are born and have no share; some kernels by layer."""
    model: Any = wrap(host(), telemetry=False)
    model(X)
    for number, (layer, index) in enumerate(PLACES):
        kernel = kernels.get(layer)
        if kernel is not None:
            model.kasmina_layer(layer).attach_module(index, kernel)
            continue
        ir = default_registry().create_blueprint("gated_mlp" if number % 2 else "bottleneck_adapter").ir
        model.kasmina_layer(layer).germinate(index, ir, random_seed=number)
        with torch.no_grad():
            for value in model.kasmina_layer(layer).seed_parameters(index):
                value.add_(0.05)
    return model.train()


REFS = [SeedRef(*place) for place in PLACES]


def damped(output: Tensor, host: Tensor) -> Tensor:
    return F.cross_entropy(output - 0.5 * host, Y)


def gradients(model: Any) -> list[Tensor | None]:
    seeds = [model.kasmina_layer(ref.layer).seed_parameters(ref.seed_index) for ref in REFS]
    return [value.grad for values in seeds for value in values]


def one_by_one(model: Any) -> list[Tensor | None]:
    for ref in REFS:
        off = 0.5 * output_without(model, [ref], lambda: model(X))
        trial_backward(model, [ref], lambda off=off: F.cross_entropy(model(X) - off, Y))  # type: ignore[misc]
    found = [None if value is None else value.clone() for value in gradients(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("host", [Plain, Residual, Normed, Twice])
def test_every_seed_gets_the_gradient_of_its_own_trial(host: type[Any]) -> None:
    model = grown(host)
    alone = one_by_one(model)
    assert all(value is not None and value.abs().max() > 0 for value in alone)
    assert JointTrials(model, REFS).backward(X, damped)
    torch.testing.assert_close(gradients(model), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("host", [Plain, Residual, Normed, Twice])
@pytest.mark.parametrize("width", [2, 3])
def test_so_it_does_where_a_pass_has_room_for_a_few_alone(
    host: type[Any], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedPasses, "_width", lambda *_: width)
    model = grown(host)
    alone = one_by_one(model)
    trials = JointTrials(model, REFS)
    for _ in range(2):
        model.zero_grad()
        assert trials.backward(X, damped)
        torch.testing.assert_close(gradients(model), alone, rtol=1e-4, atol=1e-6)


def test_a_skip_seed_reads_the_rows_of_its_own_lane() -> None:
    model = grown(Plain)
    ir = default_registry().create_blueprint("gated_mlp").ir
    model.kasmina_layer("head").germinate(1, ir, random_seed=9, source="first")
    with torch.no_grad():
        for value in model.kasmina_layer("head").seed_parameters(1):
            value.add_(0.05)
    refs = [*REFS, SeedRef("head", 1)]
    trial_backward(model, refs[-1:], lambda: F.cross_entropy(model(X), Y))
    alone = [value.grad.clone() for value in model.kasmina_layer("head").seed_parameters(1)]
    model.zero_grad()
    assert JointTrials(model, refs).backward(X, lambda output, _: F.cross_entropy(output, Y))
    together = [value.grad for value in model.kasmina_layer("head").seed_parameters(1)]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_one_pass_does_for_all_once_it_has_been_checked() -> None:
    model = grown(Plain)
    trials = JointTrials(model, REFS)
    assert trials.backward(X, damped)
    before = model.num_passes
    assert trials.backward(X[:10], lambda output, _: F.cross_entropy(output, Y[:10]))
    assert model.num_passes - before == 1


def test_the_host_is_left_as_it_was() -> None:
    model = grown(Normed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(4)
    stream, trains = torch.get_rng_state(), [module.training for module in model.modules()]
    JointTrials(model, REFS).backward(X, damped)
    host = [value for name, value in model.named_parameters() if "seeds" not in name]
    assert host
    assert all(value.grad is None and value.requires_grad for value in host)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == trains
    assert not any(layer._kasmina.terms for layer in model.kasmina_layers.values())


def test_where_rows_are_no_lanes_nothing_is_learnt() -> None:
    model = grown(Dropping)
    torch.manual_seed(4)
    stream = torch.get_rng_state()
    trials = JointTrials(model, REFS)
    assert not trials.backward(X, damped)
    assert gradients(model) == [None] * len(gradients(model))
    assert torch.equal(torch.get_rng_state(), stream)
    before = model.num_passes
    assert not trials.backward(X, damped)
    assert model.num_passes == before, "it is known for it"


@pytest.mark.parametrize("host", [Checkpointed, CheckpointedAgain])
def test_what_backward_runs_again_is_tried_seed_by_seed(host: type[Any]) -> None:
    model = grown(host)
    assert not JointTrials(model, REFS).backward(X, damped)
    assert gradients(model) == [None] * len(gradients(model))


def test_a_refusal_in_training_says_nothing_of_measuring() -> None:
    model = grown(Dropping)
    assert not JointTrials(model, REFS).backward(X, damped)
    before = model.num_passes
    configurations = [*({ref: 1.0} for ref in REFS), {}]
    evaluate_configurations(model, [(X, Y)], lambda out, y: (out.sum(1) - y).square(), configurations)
    assert model.num_passes - before == 2, "one pass and its check"


def test_a_kernel_that_fails_gets_no_gradient_and_the_others_theirs() -> None:
    whole = one_by_one(grown(Plain))
    kernel = Scale()
    broken = grown(Plain, second=kernel)
    kernel.factor = 0.0
    assert JointTrials(broken, REFS).backward(X, damped)
    assert [value.grad for value in broken.kasmina_layer("second").seed_parameters(0)] == [None]
    counts = [len(grown(Plain).kasmina_layer(ref.layer).seed_parameters(ref.seed_index)) for ref in REFS]
    last = sum(counts[:3])
    theirs = [value.grad for value in broken.kasmina_layer("head").seed_parameters(0)]
    torch.testing.assert_close(theirs, whole[last:], rtol=1e-4, atol=1e-6)


def test_a_pass_that_is_given_up_counts_no_failure() -> None:
    kernel = Scale()
    model = grown(Dropping, second=kernel)
    kernel.factor = 0.0
    assert not JointTrials(model, REFS).backward(X, damped)
    breaker = model.kasmina_layer("second").require_seed(0).breaker
    assert (breaker.failures_in_row, breaker.last_failure) == (0, "")
    kernel = Scale()
    sound = grown(Plain, second=kernel)
    kernel.factor = 0.0
    assert JointTrials(sound, REFS).backward(X, damped)
    assert sound.kasmina_layer("second").require_seed(0).breaker.failures_in_row == 1


def test_a_loss_that_is_no_number_is_that_of_one_seed_alone() -> None:
    model = grown(Plain, second=Scale(1e30))

    def loss(output: Tensor, _: Tensor) -> Tensor:
        return output.square().square().mean()  # the one seed's is infinite, and its gradient no number

    assert JointTrials(model, REFS).backward(X, loss)
    (bad,) = (value.grad for value in model.kasmina_layer("second").seed_parameters(0))
    assert bad == 0, "what is no number goes no further than the layer"
    for ref in (REFS[0], REFS[1], REFS[3]):
        values = model.kasmina_layer(ref.layer).seed_parameters(ref.seed_index)
        assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in values)
