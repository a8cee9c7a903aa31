"""What the compiler named for a request answers an equal one, and no other: not one of another seed or toolchain."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from esper.blueprints import default_registry
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import InvalidInputError
from esper.contracts.kernel import CompileSpec, CompileTarget, DeviceKind, KernelManifest
from esper.execution.answers import KernelAnswers, content_key, job_id_of
from esper.execution.keys import SigningKey
from esper.services.tezzeret.content_key import content_key as compilers_key
from esper.services.tezzeret.worker import TezzeretWorker

IR = BlueprintIR(nodes=(IRNode(name="map", op="linear", inputs=("h",)),), output="map")
SITE = Site(kind=SiteKind.LINEAR, input_shape=(3,), output_shape=(2,))
SPEC = CompileSpec(ir=IR, site=SITE)
TOOLS = {"torch": "2.13.0", "recipe": "2"}


def manifest(spec: CompileSpec = SPEC, number: int = 0, **tools: str) -> KernelManifest:
    """Give what is said of a kernel that answers a request; another number, another kernel for it."""
    return KernelManifest(
        artifact_id=f"k{number:032x}",
        content_key=content_key(spec, TOOLS | tools),
        blueprint_id="",
        site=spec.site,
        target=CompileTarget.TORCHSCRIPT,
        device=spec.device,
        parts=(),
        checks=(),
        cost=BlueprintCost(parameters=1, flops=1, activation_bytes=1),
        compilation_time=timedelta(0),
        toolchain=TOOLS | tools,
        created_at=datetime.now(UTC),
    )


def test_what_was_named_answers_an_equal_request() -> None:
    answers = KernelAnswers()
    assert answers.find(SPEC) is None
    answers.learn(manifest(number=7))
    assert answers.find(CompileSpec(ir=IR, site=SITE)) == f"k{7:032x}"


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, random_seed=1),
        replace(SPEC, target=CompileTarget.EAGER),
        replace(SPEC, device=DeviceKind.CUDA),
        replace(SPEC, site=replace(SITE, input_shape=(4,))),
        replace(SPEC, ir=replace(IR, nodes=(replace(IR.nodes[0], inputs=("x",)),))),
    ],
    ids=["seed", "target", "device", "site", "graph"],
)
def test_it_answers_no_other_request(other: CompileSpec) -> None:
    answers = KernelAnswers()
    answers.learn(manifest())
    assert answers.find(other) is None
    answers.learn(manifest(other, number=1))
    assert (answers.find(SPEC), answers.find(other)) == (f"k{0:032x}", f"k{1:032x}")


def test_the_kernel_named_last_answers() -> None:
    answers = KernelAnswers()
    answers.learn(manifest(number=1))
    answers.learn(manifest(number=2))
    assert answers.find(SPEC) == f"k{2:032x}"


def test_once_a_renewed_compiler_speaks_nothing_of_the_old_one_answers() -> None:
    answers, other = KernelAnswers(), replace(SPEC, random_seed=1)
    answers.learn(manifest(number=1))
    answers.learn(manifest(other, number=2, recipe="3"))
    assert answers.find(SPEC) is None
    answers.learn(manifest(number=3, recipe="3"))
    assert answers.find(SPEC) == f"k{3:032x}"


def test_what_the_compiler_takes_back_answers_nothing_until_it_is_named_anew() -> None:
    answers = KernelAnswers()
    answers.learn(manifest())
    assert answers.refuse("j" + "0" * 32) is False
    assert answers.find(SPEC) is not None
    assert answers.refuse(job_id_of(content_key(SPEC, TOOLS))) is True
    assert answers.find(SPEC) is None
    answers.learn(manifest())
    assert answers.find(SPEC) is not None


def test_the_oldest_answers_go_where_there_are_too_many() -> None:
    answers, specs = KernelAnswers(max_answers=2), [replace(SPEC, random_seed=seed) for seed in range(3)]
    for number, spec in enumerate([*specs[:2], specs[0], specs[2]]):
        answers.learn(manifest(spec, number))
    assert [answers.find(spec) for spec in specs] == [f"k{2:032x}", None, f"k{3:032x}"]
    with pytest.raises(InvalidInputError, match="max_answers must be >= 1, got 0"):
        KernelAnswers(max_answers=0)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_manifest_of_a_compiled_kernel_says_which_request_it_answers(seed: int) -> None:
    blueprint, answers = default_registry().create_blueprint("lora"), KernelAnswers()
    spec = CompileSpec(ir=blueprint.ir, site=SITE, random_seed=seed)
    kernel = TezzeretWorker(signer=SigningKey.generate()).compile_blueprint(blueprint, site=SITE, random_seed=seed)
    assert kernel.manifest.content_key == compilers_key(spec)
    answers.learn(kernel.manifest)
    assert answers.find(spec) == kernel.artifact_id
    assert answers.find(replace(spec, random_seed=seed + 1)) is None
