"""Kernels as signed bytes: what was packed comes back, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.errors import CapacityExceededError, CorruptDataError, InvalidInputError, SignatureError
from esper.contracts.kernel import CompileTarget, DeviceKind, KernelArtifact, KernelManifest, ValidationCheck
from esper.contracts.wire import parse, serialize
from esper.execution import artifact as artifact_module
from esper.execution.artifact import (
    SIGNED_PREFIX,
    KernelContent,
    VerifiedKernel,
    artifact_bytes,
    assemble,
    dump_weights,
    load_weights,
    pack,
    require_artifact_id,
    sign,
    verify,
)
from esper.execution.keys import KeyRing, SigningKey

KEY = SigningKey.generate()
RING = KEY.ring()
IR = BlueprintIR(nodes=(IRNode(name="map", op="linear", inputs=("h",)),), output="map")


def content(**changes: object) -> KernelContent:
    base = KernelContent(
        content_key="ab" * 32,
        site=Site(kind=SiteKind.LINEAR, input_shape=(3,), output_shape=(2,)),
        target=CompileTarget.TORCHSCRIPT,
        device=DeviceKind.CPU,
        ir=canonical_bytes(IR),
        weights={"b": torch.arange(3.0), "a": torch.eye(2)},
        binary=b"compiled bytes",
        cost=BlueprintCost(parameters=6, flops=12, activation_bytes=8),
        checks=(ValidationCheck(name="shapes", passed=True),),
        compilation_time=timedelta(milliseconds=12),
        toolchain={"torch": "2.13.0"},
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> bytes:
    return artifact_bytes(pack(content(), KEY))


def resigned(artifact: KernelArtifact, manifest: KernelManifest) -> bytes:
    """A forger who holds the key: only what the signature does not cover can stop this."""
    raw = serialize(manifest)
    return artifact_bytes(replace(artifact, manifest=raw, signature=KEY.sign(SIGNED_PREFIX + raw), key_id=KEY.key_id))


def test_what_was_packed_comes_back(data: bytes) -> None:
    kernel = verify(data, RING)
    assert kernel.ir == IR
    assert kernel.ir_bytes == canonical_bytes(IR)
    assert kernel.binary == b"compiled bytes"
    assert torch.equal(kernel.weights["a"], torch.eye(2))
    assert torch.equal(kernel.weights["b"], torch.arange(3.0))
    assert kernel.size_bytes == len(data)
    assert kernel.manifest.validated
    assert kernel.manifest.compilation_time == timedelta(milliseconds=12)
    assert [part.name for part in kernel.manifest.parts] == ["binary", "ir", "weights"]


def test_the_id_follows_from_the_content(data: bytes) -> None:
    same = verify(artifact_bytes(pack(content(), KEY)), RING)
    other = verify(artifact_bytes(pack(content(binary=b"others"), KEY)), RING)
    assert same.artifact_id == verify(data, RING, artifact_id=same.artifact_id).artifact_id
    assert other.artifact_id != same.artifact_id


def test_every_flipped_bit_is_refused(data: bytes) -> None:
    """One bit of every byte (all eight of the first 512), so every region is hit."""
    for place in range(len(data)):
        for bit in range(8) if place < 512 else (place % 8,):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(CorruptDataError):
                verify(bytes(flipped), RING)


def test_every_truncation_and_extension_is_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(CorruptDataError):
            verify(data[:size], RING)
    with pytest.raises(CorruptDataError, match="one serialised form"):
        verify(data + b"\x3a\x00", RING)


@pytest.mark.parametrize("part", ["ir", "weights", "binary"])
def test_a_swapped_part_is_named(part: str) -> None:
    swapped = replace(pack(content(), KEY), **{part: b"something else"})  # type: ignore[arg-type]
    with pytest.raises(CorruptDataError, match=f"part {part} must match its digest"):
        verify(artifact_bytes(swapped), RING)


def test_an_unknown_key_is_refused(data: bytes) -> None:
    stranger = SigningKey.generate()
    with pytest.raises(SignatureError, match=f"trusted one \\({stranger.key_id}\\), got '{KEY.key_id}'"):
        verify(data, stranger.ring())


def test_an_unsigned_kernel_is_refused() -> None:
    with pytest.raises(SignatureError, match="signing key must be a trusted one"):
        verify(artifact_bytes(assemble(content())), RING)


def test_a_signature_for_another_purpose_is_refused() -> None:
    plain = pack(content(), KEY)
    bare = replace(plain, signature=KEY.sign(plain.manifest))
    with pytest.raises(SignatureError, match="got a false one"):
        verify(artifact_bytes(bare), RING)


def test_nothing_is_parsed_before_the_signature_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = replace(pack(content(), KEY), manifest=b"\xff" * 64)
    reached: list[str] = []
    monkeypatch.setattr(artifact_module, "check_parts", lambda _: reached.append("manifest"))
    with pytest.raises(SignatureError):
        verify(artifact_bytes(forged), RING)
    assert reached == []


def test_another_kernel_than_the_expected_one_is_refused(data: bytes) -> None:
    wanted = "k" + "0" * 32
    with pytest.raises(CorruptDataError, match=f"artefact must be {wanted}, got k"):
        verify(data, RING, artifact_id=wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artifact_id": "k" + "0" * 32}, "artefact id must follow from"),
        ({"artifact_id": "../../etc/passwd"}, "well-formed artefact id"),
        ({"content_key": "short"}, "well-formed artefact id and content key"),
        ({"parts": ()}, "must list the parts binary, ir, weights"),
        ({"target": CompileTarget.EAGER}, "binary must be empty for EAGER"),
        ({"blueprint_id": "0" * 64}, "blueprint id must be the SHA-256"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_even_when_signed(
    changes: dict[str, object], message: str
) -> None:
    artifact = pack(content(), KEY)
    manifest = replace(parse(artifact.manifest, KernelManifest), **changes)  # type: ignore[arg-type]
    with pytest.raises(CorruptDataError, match=message):
        verify(resigned(artifact, manifest), RING)


def test_signing_refuses_parts_that_do_not_match() -> None:
    with pytest.raises(CorruptDataError, match="part weights must match"):
        sign(replace(assemble(content()), weights=b"x"), KEY)


def test_too_large_is_refused_before_parsing(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "MAX_ARTIFACT_BYTES", len(data) - 1)
    with pytest.raises(CapacityExceededError, match=f"at most {len(data) - 1} bytes, got {len(data)}"):
        verify(data, RING)


def test_too_large_is_not_even_assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "MAX_ARTIFACT_BYTES", 100)
    with pytest.raises(CapacityExceededError, match="artefact must be at most 100 bytes, got"):
        assemble(content())


def test_eager_without_parameters_has_empty_parts() -> None:
    eager = content(target=CompileTarget.EAGER, binary=b"", weights={})
    kernel = verify(artifact_bytes(pack(eager, KEY)), RING)
    assert isinstance(kernel, VerifiedKernel)
    assert (kernel.weights, kernel.binary) == ({}, b"")


def test_weights_keep_kind_and_bits() -> None:
    weights = {
        "half": torch.randn(3, 2).bfloat16(),
        "count": torch.tensor(7),
        "strided": torch.arange(6.0).view(2, 3).t(),
    }
    back = load_weights(dump_weights(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) and back[name].dtype == weights[name].dtype for name in weights)


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"weights\[z\] must be a dense tensor of a numeric kind"):
        dump_weights({"z": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(CorruptDataError, match="safetensors format"):
        load_weights(b"not safetensors at all")


@pytest.mark.parametrize("bad", ["", "kernel_123", "k" + "0" * 31, "k" + "G" * 32, "k" + "0" * 32 + "\n", "../k"])
def test_ids_are_strict(bad: str) -> None:
    with pytest.raises(InvalidInputError, match=r"artifact_id must match k\[0-9a-f\]\{32\}"):
        require_artifact_id(bad)


def test_a_ring_of_two_keys_takes_both() -> None:
    other = SigningKey.generate()
    ring = RING.merged(other.ring())
    assert isinstance(ring, KeyRing)
    for key in (KEY, other):
        assert verify(artifact_bytes(pack(content(), key)), ring).manifest.validated
