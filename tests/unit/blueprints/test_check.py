from __future__ import annotations

import threading

import pytest
import torch

from esper.blueprints import BlueprintRegistry, check_blueprint, parse_text
from esper.blueprints.flops import count_flops
from esper.contracts.blueprint import BlueprintIR, Site, SiteKind
from esper.contracts.errors import InvalidBlueprintError


def graph(*lines: str) -> BlueprintIR:
    return parse_text("\n".join(["blueprint 1", *lines]))


def failed(ir: BlueprintIR, site: Site) -> set[str]:
    return {check.name for check in check_blueprint(ir, site).checks if not check.passed}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_template_passes_at_every_site_it_is_offered(registry: BlueprintRegistry, site: Site, seed: int) -> None:
    offered = registry.for_site(site)
    assert len(offered) >= 6
    before = torch.get_rng_state()
    for blueprint in offered:
        check_blueprint(blueprint.ir, site, seed=seed).require()
    assert torch.equal(torch.get_rng_state(), before), "torch's own stream is nobody's but the training's"


def test_zero_conv_before_norm_and_relu_is_refused_as_dead(conv2d: Site) -> None:
    dead = graph("c = conv(x, init=zero)", "n = group_norm(c)", "a = activation(n, fn=relu)", "return a")
    assert failed(dead, conv2d) == {"learning", "gradients"}
    with pytest.raises(InvalidBlueprintError, match=r"failed learning: .*; gradients: weakest parameter node_c"):
        check_blueprint(dead, conv2d).require()


def test_delta_that_is_not_zero_at_birth_is_refused(linear: Site) -> None:
    assert failed(graph("a = linear(x)", "return a"), linear) == {"identity"}


def test_graph_without_parameters_is_refused(linear: Site) -> None:
    assert failed(graph("a = multiply(h, value=0.0)", "return a"), linear) == {"learning", "gradients"}


def test_bias_of_attention_keys_is_refused_since_it_never_learns(tokens: Site) -> None:
    keys_with_bias = graph(
        "q = linear(h, bias=false)",
        "k = linear(h)",
        "v = linear(h, bias=false)",
        "a = attention(q, k, v)",
        "o = linear(a, init=zero)",
        "return o",
    )
    rows = {check.name: check for check in check_blueprint(keys_with_bias, tokens).checks}
    assert not rows["gradients"].passed
    assert "node_k.bias" in rows["gradients"].detail


def test_parameters_behind_two_zero_maps_are_refused(linear: Site) -> None:
    stacked = graph("a = linear(x)", "b = linear(a, init=zero)", "c = linear(b, init=zero, bias=false)", "return c")
    assert "gradients" in failed(stacked, linear)


def test_overflow_is_refused_in_the_dtype_where_it_happens(linear: Site) -> None:
    lines = ["g0 = linear(h, init=zero)", "s0 = multiply(h, value=1000.0)"]
    lines += [f"s{i} = multiply(s{i - 1}, value=1000.0)" for i in range(1, 14)]
    steep = graph(*lines, "m = mul(g0, s13)", "return m")
    assert {"finite_float32", "finite_bfloat16"} <= failed(steep, linear)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "group_norm"])
def test_norms_run_under_autocast_without_a_warning(norm: str, linear: Site) -> None:
    ir = graph("d = linear(h)", f"n = {norm}(d)", "u = linear(n, init=zero)", "return u")
    check_blueprint(ir, linear).require()


def test_graph_tied_to_positions_says_so(tokens: Site, registry: BlueprintRegistry) -> None:
    rows = check_blueprint(registry.create_blueprint("token_channel_mixer").ir, tokens).checks
    row = next(check for check in rows if check.name == "positions")
    assert row.passed
    assert row.figure is None
    assert row.detail == "the graph is tied to the site's positions"


def test_rows_carry_figures_and_limits(linear: Site, registry: BlueprintRegistry) -> None:
    report = check_blueprint(registry.create_blueprint("lora").ir, linear, dtypes=(torch.float32,))
    rows = {check.name: check for check in report.checks}
    assert report.passed
    assert rows["identity"].figure == 0.0
    assert rows["parameters"].figure == rows["parameters"].limit == 8 * (16 + 12)
    assert "finite_bfloat16" not in rows


def test_illegal_site_is_refused_before_anything_runs(linear: Site) -> None:
    with pytest.raises(InvalidBlueprintError, match="node 'c' input must be a signal or image here"):
        check_blueprint(graph("c = conv(x, init=zero)", "return c"), linear)


def test_count_flops_counts_a_known_product() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_one_feature_site_is_checked_too(registry: BlueprintRegistry) -> None:
    site = Site(kind=SiteKind.LINEAR, input_shape=(9,), output_shape=(1,))
    passing = [b.name for b in registry.for_site(site) if check_blueprint(b.ir, site).passed]
    assert "signal_conv" in passing
    assert "norm_shift" not in passing


def test_a_thread_that_draws_meanwhile_is_not_disturbed(linear: Site, registry: BlueprintRegistry) -> None:
    """In an embedded mesh Karn checks designs beside a training thread, whose stream nobody may put back."""
    ir = registry.create_blueprint("bottleneck_adapter").ir
    is_over = threading.Event()
    drawn: list[float] = []

    def draw() -> None:
        while not is_over.is_set():
            drawn.append(float(torch.rand(())))

    torch.manual_seed(5)
    drawing = threading.Thread(target=draw)
    drawing.start()
    for seed in range(5):
        check_blueprint(ir, linear, seed=seed)
    is_over.set()
    drawing.join()
    torch.manual_seed(5)
    assert drawn == [float(torch.rand(())) for _ in drawn]
    assert len(drawn) > 100
