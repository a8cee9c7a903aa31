"""What a seed is for: it learns what the layer beside it can't."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from esper.blueprints import BlueprintRegistry, to_module
from esper.contracts.blueprint import Site, SiteKind

LENGTH = 40


def motifs(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one of two short motifs, of either sign, at a random place; and which of the two it is."""
    shapes = torch.tensor([[1.0, 2.0, -1.0, -2.0, 1.0], [-1.0, -1.0, 3.0, -1.0, 1.0]])
    signs = 2.0 * torch.randint(0, 2, (count, 1), generator=generator) - 1.0
    labels = torch.randint(0, 2, (count,), generator=generator)
    places = torch.randint(0, LENGTH - 5, (count,), generator=generator)
    x = 0.3 * torch.randn(count, LENGTH, generator=generator)
    x.scatter_add_(1, places[:, None] + torch.arange(5), signs * shapes[labels])
    return x, labels


def accuracy_with(name: str, registry: BlueprintRegistry) -> float:
    """Train one template beside a frozen layer of 16 features; give its accuracy on fresh examples."""
    generator = torch.Generator().manual_seed(0)
    (x, labels), (fresh_x, fresh_labels) = motifs(256, generator), motifs(512, generator)
    site = Site(kind=SiteKind.LINEAR, input_shape=(LENGTH,), output_shape=(16,))
    layer = 0.1 * torch.randn(LENGTH, 16, generator=generator)
    head = 0.25 * torch.randn(16, 2, generator=generator)
    seed = to_module(registry.create_blueprint(name).ir, site, seed=0)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        h = batch @ layer
        return torch.tanh(h + seed(batch, h)) @ head

    optimizer = torch.optim.AdamW(nn.ParameterList(seed.parameters()), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(logits(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float((logits(fresh_x).argmax(1) == fresh_labels).float().mean())


def test_convolution_on_a_flat_vector_learns_what_dense_seeds_do_not(registry: BlueprintRegistry) -> None:
    convolution = accuracy_with("signal_conv", registry)
    dense = max(accuracy_with(name, registry) for name in ("widen", "gated_mlp"))
    assert convolution > 0.95
    assert 1.0 - convolution < (1.0 - dense) / 4
