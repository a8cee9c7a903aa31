"""Other people's models, randomly initialised: they wrap and train as they would have, to the bit.

timm and transformers stand in the optional extra ``models``; nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import default_registry
from esper.contracts.blueprint import SiteKind
from esper.contracts.lifecycle import SeedLifecycleState as State
from esper.core.export import export
from esper.core.morphable import MorphableModel
from esper.core.wrap import LayerTelemetry, unwrap, wrap
from esper.execution.incubation import trial_backward
from esper.execution.layers import KasminaLayer
from esper.execution.overrides import SeedRef

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::esper.core.wrap.SkippedLayersWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

_OPERATORS: list[torch.library.Library] = []


def admit_torchvision() -> None:
    """Let torchvision be imported where its wheel's operators do not load beside this torch.

    timm and parts of transformers import torchvision for its Python code alone. That import declares shapes for two
    operators, which fails where the library that defines them was not loaded. Their definitions, without any
    implementation, are all that is missing; calling one still fails.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)


def library(name: str) -> Any:
    """Import timm or transformers, or skip with the reason."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'esper[models]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        admit_torchvision()
        return importlib.import_module(name)


@dataclass(frozen=True)
class Family:
    """A family of models: how to make a small one, and what it is called with."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make().train()


def timm_family(name: str, *, size: int = 32, **settings: Any) -> Family:
    timm = library("timm")
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Family(lambda: timm.create_model(name, num_classes=4, **settings), {"x": image})


TIMM: dict[str, Callable[[], Family]] = {
    "resnet": lambda: timm_family("resnet10t"),
    "regnet": lambda: timm_family("regnetx_002"),
    "convnext": lambda: timm_family("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "vit": lambda: timm_family("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3),
    "swin": lambda: timm_family(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_heads=(2, 2), embed_dim=16
    ),
    "mobilenetv3": lambda: timm_family("mobilenetv3_small_050"),
    "efficientnet": lambda: timm_family("efficientnet_b0", size=64),
    "mixer": lambda: timm_family("mixer_s32_224", size=64, img_size=64),
    "densenet": lambda: timm_family("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
}

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text_family(model: str, config: str, settings: dict[str, Any], *, is_classifier: bool = False) -> Family:
    """Give a language model with its own loss, over a batch of random tokens."""
    transformers = library("transformers")
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1]) if is_classifier else tokens
    return Family(
        lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)),
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels},
    )


def vision_family() -> Family:
    transformers = library("transformers")
    config = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Family(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=16, patch_size=4)),
        {"pixel_values": image, "labels": torch.tensor([0, 1])},
    )


def speech_family() -> Family:
    transformers = library("transformers")
    settings = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 100,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "decoder_start_token_id": 1,
    }
    generator = torch.Generator().manual_seed(1)
    return Family(
        lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**settings, **ENDS)),
        {
            "input_features": torch.randn(2, 8, 32, generator=generator),
            "labels": torch.randint(3, 100, (2, 7), generator=generator),
        },
    )


TRANSFORMERS: dict[str, Callable[[], Family]] = {
    "bert": lambda: text_family("BertForSequenceClassification", "BertConfig", SMALL, is_classifier=True),
    "roberta": lambda: text_family("RobertaForMaskedLM", "RobertaConfig", {**SMALL, "is_decoder": False}),
    "distilbert": lambda: text_family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100},
    ),
    "gpt2": lambda: text_family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 32, **ENDS},
    ),
    "llama": lambda: text_family("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 1, **ENDS}),
    "t5": lambda: text_family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
        | {"decoder_start_token_id": 0},
    ),
    "vit": vision_family,
    "whisper": speech_family,
}

FAMILIES = {f"timm_{name}": make for name, make in TIMM.items()} | {
    f"transformers_{name}": make for name, make in TRANSFORMERS.items()
}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    if isinstance(out, Tensor):
        return torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])
    loss: Tensor = out.loss
    return loss


def two_steps(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Train two steps; gives losses, parameters and buffers by name."""
    torch.manual_seed(7)  # dropout and stochastic depth
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Tensor] = {}
    for step in range(2):
        loss = loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found[f"loss {step}"] = loss.detach()
    return found | {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_wraps_and_trains_unchanged(name: str) -> None:
    family = FAMILIES[name]()
    host = family.model()
    twin = copy.deepcopy(host)
    model = wrap(host, telemetry=LayerTelemetry(interval_steps=1))
    theirs, ours = two_steps(twin, family.inputs), two_steps(model, family.inputs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert list(model.state_dict()) == list(twin.state_dict())
    sites = [layer.site for layer in model.kasmina_layers.values()]
    assert len(sites) >= 5
    assert sum(site is not None for site in sites) >= 0.9 * len(sites), "layers know their shapes after a step"


@pytest.mark.parametrize("name", ["timm_resnet", "timm_vit", "transformers_gpt2", "transformers_bert"])
def test_it_grows_and_goes_back(name: str) -> None:
    family = FAMILIES[name]()
    host = family.model()
    model = wrap(host)
    loss_of(model, family.inputs).backward()
    model.eval()
    with torch.no_grad():
        before = loss_of(model, family.inputs)
    layer = next(found for found in model.kasmina_layers.values() if found.site is not None)
    layer.germinate(0, default_registry().for_site(layer.site)[0].ir)
    layer.transition(0, State.EVALUATING)
    layer.transition(0, State.FOSSILIZED)
    with torch.no_grad():
        for parameter in layer.seed_parameters(0):
            parameter.add_(0.1)
        grown = loss_of(model, family.inputs)
        assert grown != before
        assert torch.equal(loss_of(export(model), family.inputs), grown)
        layer.clear_seed(0)
        assert unwrap(model) is host
        assert torch.equal(loss_of(host, family.inputs), before)


def one_step(model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """Train one step, with the same dropout for all that take this one."""
    torch.manual_seed(number)
    loss = loss_of(model, inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def germinate_each_kind(model: MorphableModel) -> dict[SiteKind, KasminaLayer]:
    """Bring a seed to ACTIVE at the middle layer of every kind: a bottleneck adapter, or the cheapest legal there."""
    chosen: dict[SiteKind, KasminaLayer] = {}
    sites = [layer for layer in model.kasmina_layers.values() if layer.site is not None]
    for kind in dict.fromkeys(layer.site.kind for layer in sites):
        of_kind = [layer for layer in sites if layer.site.kind is kind]
        layer = chosen[kind] = of_kind[len(of_kind) // 2]
        offered = {blueprint.name: blueprint for blueprint in default_registry().for_site(layer.site)}
        blueprint = offered.get("bottleneck_adapter") or next(iter(offered.values()))
        layer.germinate(0, blueprint.ir, blueprint_id=blueprint.id, random_seed=1)
    return chosen


@pytest.mark.parametrize("name", FAMILIES)
def test_it_grows_a_seed_of_every_kind(name: str) -> None:
    family = FAMILIES[name]()
    host = family.model()
    twin = copy.deepcopy(host)
    model = wrap(host)
    ours, theirs = (torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (model, twin))
    assert one_step(model, family.inputs, ours, 0) == one_step(twin, family.inputs, theirs, 0)

    layers = germinate_each_kind(model)
    refs = [SeedRef(layer.layer_name, 0) for layer in layers.values()]
    seeds = {
        f"{kind.name} {n}": p for kind, one in layers.items() for n, p in one.find_seed(0).kernel.named_parameters()
    }
    learner = torch.optim.AdamW(seeds.values(), lr=1e-2)
    for number in (1, 2):  # behind the host's back
        assert one_step(model, family.inputs, ours, number) == one_step(twin, family.inputs, theirs, number)
        learner.zero_grad()
        assert math.isfinite(trial_backward(model, refs, lambda: loss_of(model, family.inputs)))
        learner.step()
    assert [key for key, value in seeds.items() if value.grad is None or not value.grad.any()] == []
    grown = dict((*model.named_parameters(), *model.named_buffers()))
    for key, value in (*twin.named_parameters(), *twin.named_buffers()):
        assert torch.equal(grown[key], value), key

    for layer in layers.values():
        layer.transition(0, State.EVALUATING)
        layer.set_alpha(0, 0.5)
    learner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {key: value.detach().clone() for key, value in seeds.items()}
    for number in (3, 4):
        loss = one_step(model, family.inputs, learner, number)
        assert torch.isfinite(loss)
        assert loss != one_step(twin, family.inputs, theirs, number), "the seeds take part"
    assert [key for key, value in seeds.items() if not value.grad.any() or torch.equal(value, before[key])] == []
    assert [name for name, layer in model.kasmina_layers.items() if layer.state_layout.errors.any()] == []

    fresh = wrap(FAMILIES[name]().model())
    fresh.load_state_dict(model.state_dict())
    assert fresh.grown_structure() == model.grown_structure()
    saved, loaded = model.state_dict(), fresh.state_dict()
    assert list(loaded) == list(saved)
    for key, value in saved.items():
        assert torch.equal(loaded[key], value) if isinstance(value, Tensor) else loaded[key] == value, key
    with torch.no_grad():
        assert torch.equal(loss_of(fresh.eval(), family.inputs), loss_of(model.eval(), family.inputs))
