from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper.core.export as export_module
from esper.blueprints import default_registry
from esper.contracts.blueprint import SiteKind
from esper.contracts.errors import InvalidInputError, InvalidStateError
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.wrap import wrap
from esper.execution.layers import kasmina_class_of, register_layer


class Host(nn.Module):
    """Convolution, norm, attention, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        tokens = F.relu(self.norm(self.conv(image))).flatten(2).permute(2, 0, 1)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return self.head(mixed.mean(0))


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def shake(layer: Any, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for parameter in layer.seed_parameters(index):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def grow(model: Any, name: str, index: int, blueprint: int, *states: State, source: str = "") -> None:
    layer = model.kasmina_layer(name)
    site = layer.skip_site(source) if source else layer.site
    layer.germinate(index, default_registry().for_site(site)[blueprint].ir, source=source)
    for state in states:
        layer.transition(index, state)
    shake(layer, index)


@pytest.fixture
def host() -> Host:
    torch.manual_seed(0)
    return Host()


@pytest.fixture
def grown(host: Host) -> Any:
    model = wrap(host).eval()
    model(X)
    for number, name in enumerate(model.kasmina_layers):
        for index in range(2):
            grow(model, name, index, number + index, State.EVALUATING, State.FOSSILIZED)
    return model


def test_the_plain_model_gives_the_grown_models_output_to_the_bit(grown: Any, host: Host) -> None:
    plain = export(grown)
    assert torch.equal(plain(X), grown(X))
    assert plain is not host


def test_nothing_of_esper_is_left(grown: Any) -> None:
    plain = export(grown)
    assert not [name for name, module in plain.named_modules() if type(module).__module__.startswith("esper")]
    hooks = [hook for module in plain.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 4
    assert all(isinstance(hook, torch.fx.GraphModule) for hook in hooks)
    assert type(plain.head) is nn.Linear
    assert plain.head.in_features == 8
    assert "_kasmina" not in vars(plain.head)


def test_the_grown_model_goes_on_growing(grown: Any) -> None:
    before = grown(X)
    export(grown)
    assert torch.equal(grown(X), before)
    grown.head.clear_seed(0)
    assert not torch.equal(grown(X), before)


def test_keys_are_those_of_the_grown_model_without_its_notes(grown: Any) -> None:
    notes = {key for key in grown.state_dict() if key.endswith("_extra_state")}
    assert len(notes) == 8
    assert list(export(grown).state_dict()) == [key for key in grown.state_dict() if key not in notes]


def test_gradients_and_training_mode_are_those_of_the_grown_model(grown: Any) -> None:
    grown.train()
    plain = export(grown)
    for model in (grown, plain):
        F.cross_entropy(model(X), torch.tensor([0, 1, 2, 3])).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in grown.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert all(torch.equal(a, b) for a, b in zip(grown.norm.buffers(False), plain.norm.buffers(False), strict=True))


def test_a_dormant_model_exports_as_its_host(host: Host) -> None:
    twin = copy.deepcopy(host)
    plain = export(wrap(host))
    assert repr(plain) == repr(twin)
    assert torch.equal(plain.eval()(X), twin.eval()(X))


def test_open_seeds_are_named(grown: Any) -> None:
    grow(grown, "head", 2, 0)
    grow(grown, "conv", 3, 0, State.EVALUATING)
    with pytest.raises(InvalidStateError, match=r"got conv\[3\] \(EVALUATING\), head\[2\] \(ACTIVE\)"):
        export(grown)


def test_a_fossil_on_its_way_out_is_open(grown: Any) -> None:
    grown.head.set_alpha(1, 0.5)
    with pytest.raises(InvalidStateError, match=r"got head\[1\] \(FOSSILIZED\)"):
        export(grown)


def test_only_a_wrapped_model_is_exported(host: Host) -> None:
    with pytest.raises(InvalidInputError, match=r"model must be what wrap\(\) gave, got 'Host'"):
        export(host)  # type: ignore[arg-type]


def test_an_esper_class_as_kernel_is_refused(host: Host) -> None:
    model = wrap(host).eval()
    model(X)

    class Theirs(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h

    Theirs.__module__ = export_module.__name__
    model.head.attach_module(0, Theirs())
    model.head.transition(0, State.EVALUATING)
    model.head.transition(0, State.FOSSILIZED)
    with pytest.raises(InvalidInputError, match=r"module 'head.seeds.0.kernel' must be of a class of its own"):
        export(model)


def test_a_plain_copy_is_whole(grown: Any) -> None:
    plain = export(grown)
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(twin(X), grown(X))


def test_a_fused_encoder_does_not_go_around_a_fossil() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = wrap(nn.Sequential(nn.TransformerEncoder(layer, 2))).eval()
    x = torch.randn(2, 5, 8)
    model(x)
    grow(model, "0.layers.1.linear1", 0, 1, State.EVALUATING, State.FOSSILIZED)
    plain, padding = export(model), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))
        ours, theirs = (net[0](x, src_key_padding_mask=padding) for net in (plain, model))
    assert torch.equal(ours, theirs)


def test_it_goes_through_torch_export(grown: Any) -> None:
    plain = export(grown)
    program = torch.export.export(plain, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    wider = torch.randn(7, 3, 6, 6)
    torch.testing.assert_close(program.module()(wider), plain(wider))


def test_it_compiles_in_one_graph(grown: Any) -> None:
    plain = export(grown)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), plain(X))


def test_weights_go_through_safetensors(grown: Any, tmp_path: Any) -> None:
    plain = export(grown)
    save_file({name: value.contiguous() for name, value in plain.state_dict().items()}, tmp_path / "plain.safetensors")
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert torch.equal(twin(X), grown(X))


SCRIPT = """
import sys
sys.modules["esper"] = None
import torch
from safetensors.torch import save_file
program = torch.export.load(sys.argv[1])
x = torch.arange(4 * 3 * 6 * 6, dtype=torch.float32).reshape(4, 3, 6, 6) / 100
save_file({"out": program.module()(x)}, sys.argv[2])
"""


def test_a_saved_program_runs_where_esper_is_not(grown: Any, tmp_path: Any) -> None:
    plain = export(grown)
    torch.export.save(torch.export.export(plain, (X,)), tmp_path / "plain.pt2")
    paths = [str(tmp_path / "plain.pt2"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, *paths], check=True, timeout=120)
    out = load_file(tmp_path / "out.safetensors")["out"]
    x = torch.arange(4 * 3 * 6 * 6, dtype=torch.float32).reshape(4, 3, 6, 6) / 100
    torch.testing.assert_close(out, plain(x))


class Shift(nn.Module):
    """A user's own kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(5))

    def forward(self, value: Tensor) -> Tensor:
        return value + self.bias


class Row(nn.Module):
    """Every kind of layer in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm2d = nn.BatchNorm2d(8)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.norm1d = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)
        self.shift = Shift()

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.line(F.relu(self.norm2d(self.conv(image))).flatten(2)).transpose(1, 2)
        mixed = self.norm(self.attention(tokens, tokens, tokens)[0]).mean(1)
        return self.shift(self.head(F.relu(self.norm1d(mixed))))


SKIPS = {"norm2d": "conv", "norm": "attention", "head": "norm1d", "shift": "norm1d"}


@pytest.fixture(params=["dormant", "grown", "skips"])
def row(request: Any) -> Any:
    """A model with every kind of layer; grown, a fossil stands at each, and skip seeds at some beside it."""
    if kasmina_class_of(Shift) is None:
        register_layer(Shift, kind=SiteKind.LINEAR)
    torch.manual_seed(0)
    model = wrap(Row()).eval()
    model(X)
    for name in model.kasmina_layers if request.param != "dormant" else ():
        grow(model, name, 0, 0, State.EVALUATING, State.FOSSILIZED)
    for name, source in SKIPS.items() if request.param == "skips" else ():
        grow(model, name, 1, 0, State.EVALUATING, State.FOSSILIZED, source=source)
    return model


def test_every_kind_is_plain_and_equal_to_the_bit(row: Any) -> None:
    plain = export(row)
    assert not [name for name, module in plain.named_modules() if type(module).__module__.startswith("esper")]
    assert torch.equal(plain(X), row(X))


def test_every_kind_has_the_grown_models_gradients_and_copies(row: Any) -> None:
    plain = export(row)
    for model in (plain, copy.deepcopy(plain), row):
        model.zero_grad()
        model(X).square().sum().backward()
    expected = {name: value.grad for name, value in row.named_parameters()}
    for name, value in plain.named_parameters():
        assert torch.equal(value.grad, expected[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_every_kind_compiles_in_one_graph(row: Any) -> None:
    torch._dynamo.reset()
    plain, counter = export(row), CompileCounterWithBackend("eager")
    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(X), plain(X))
    assert counter.frame_count == 1


def test_a_graph_that_was_compiled_for_the_host_is_not_taken_for_the_grown_model(host: Host) -> None:
    alone = torch.compile(copy.deepcopy(host).eval(), fullgraph=True, backend="eager")
    model = wrap(host).eval()
    model(X)
    before = alone(X)
    grow(model, "head", 0, 0, State.EVALUATING, State.FOSSILIZED)
    plain = export(model)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(compiled, plain(X))
    assert not torch.equal(compiled, before)


def test_every_kind_goes_through_torch_export(row: Any) -> None:
    plain = export(row)
    program = torch.export.export(plain, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    wider = torch.randn(7, 3, 6, 6)
    torch.testing.assert_close(program.module()(wider), plain(wider))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_kind_goes_through_onnx(row: Any, tmp_path: Any) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'esper[models]'")
    import onnx
    import onnxruntime

    plain, path = export(row), tmp_path / "plain.onnx"
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    torch.onnx.export(plain, (X,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (X, torch.randn(7, 3, 6, 6)):
        (out,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), plain(batch), rtol=1e-4, atol=1e-5)


PICKLED = """
import sys
sys.modules["esper"] = None
import torch
from safetensors.torch import save_file
model = torch.load(sys.argv[1], weights_only=False)
x = torch.arange(4 * 3 * 6 * 6, dtype=torch.float32).reshape(4, 3, 6, 6) / 100
with torch.no_grad():
    save_file({"out": model(x)}, sys.argv[2])
assert not [name for name in sys.modules if name.startswith("esper.")]
"""


@pytest.mark.parametrize("skips", [False, True])
def test_a_pickled_plain_model_runs_where_esper_is_not(tmp_path: Any, skips: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.Conv1d(4, 4, 1), nn.LayerNorm(16)]
    model = wrap(nn.Sequential(*layers, nn.Linear(16, 8), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 2))).eval()
    model(X)
    for name in model.kasmina_layers:
        grow(model, name, 0, 0, State.EVALUATING, State.FOSSILIZED)
    if skips:
        grow(model, "6", 1, 0, State.EVALUATING, State.FOSSILIZED, source="5")
        grow(model, "9", 1, 0, State.EVALUATING, State.FOSSILIZED, source="8")
    plain = export(model)
    torch.save(plain, tmp_path / "plain.pt")
    paths = [str(tmp_path / "plain.pt"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", PICKLED, *paths], check=True, timeout=120)
    x = torch.arange(4 * 3 * 6 * 6, dtype=torch.float32).reshape(4, 3, 6, 6) / 100
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], model(x))


class Tower(nn.Module):
    """Two attentions, batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.MultiheadAttention(8, 2)
        self.upper = nn.MultiheadAttention(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = torch.tanh(self.lower(tokens, tokens, tokens)[0])
        return self.upper(mixed, mixed, mixed)[0]


def test_a_skip_fossil_between_attentions_with_the_batch_second(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, tokens = wrap(Tower()).eval(), torch.randn(7, 3, 8)
    model(tokens)
    host_alone = model(tokens)
    grow(model, "upper", 0, 0, State.EVALUATING, State.FOSSILIZED, source="lower")
    plain = export(model)
    assert not torch.equal(plain(tokens), host_alone)
    assert torch.equal(plain(tokens), model(tokens))
    hooks = [hook for module in plain.modules() for hook in module._forward_pre_hooks.values()]
    assert [kept for hook in hooks for kept in hook.args] == [{}], "nothing is kept after a pass"
    torch.save(plain, tmp_path / "plain.pt")
    assert torch.equal(torch.load(tmp_path / "plain.pt", weights_only=False)(tokens), model(tokens))
