"""A signed kernel with every part filled, and its bytes with one bit changed in each kind of place."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch

from esper.blueprints.ir import canonical_bytes
from esper.contracts.blueprint import BlueprintCost, BlueprintIR, IRNode, Site, SiteKind
from esper.contracts.kernel import CompileTarget, DeviceKind, KernelArtifact, ValidationCheck
from esper.contracts.wire import parse
from esper.execution.artifact import KernelContent, artifact_bytes, pack, verify
from esper.execution.keys import SigningKey

KEY = SigningKey.generate()
PARTS = ("manifest", "signature", "key_id", "ir", "weights", "binary")
"""Fields of an artefact, in the order of its bytes."""


def kernel_bytes(number: int = 0, key: SigningKey = KEY) -> tuple[str, bytes]:
    """Give the id and bytes of a signed kernel; another number, another kernel."""
    content = KernelContent(
        content_key=f"{number:064x}",
        site=Site(kind=SiteKind.LINEAR, input_shape=(3,), output_shape=(2,)),
        target=CompileTarget.TORCHSCRIPT,
        device=DeviceKind.CPU,
        ir=canonical_bytes(BlueprintIR(nodes=(IRNode(name="map", op="linear", inputs=("h",)),), output="map")),
        weights={"w": torch.arange(64.0) + number},
        binary=b"compiled bytes" * 20,
        cost=BlueprintCost(parameters=4, flops=8, activation_bytes=8),
        checks=(ValidationCheck(name="shapes", passed=True),),
        compilation_time=timedelta(milliseconds=1),
        toolchain={"torch": "2.13.0"},
    )
    data = artifact_bytes(pack(content, key))
    return verify(data, key.ring()).artifact_id, data


def places(data: bytes) -> Iterator[tuple[str, int]]:
    """Give a name and an offset for each kind of place: every field's tag, length, and first, middle and last byte."""
    artifact, begin = parse(data, KernelArtifact), 0
    for name in PARTS:
        value = getattr(artifact, name)
        raw = value.encode() if isinstance(value, str) else value
        length_bytes = 1 if len(raw) < 128 else 2
        body = begin + 1 + length_bytes
        assert data[body : body + len(raw)] == raw
        yield f"{name} tag", begin
        for number in range(length_bytes):
            yield f"{name} length {number}", begin + 1 + number
        for where, offset in (("first", 0), ("middle", len(raw) // 2), ("last", len(raw) - 1)):
            yield f"{name} {where}", body + offset
        if name == "weights":
            yield "weights header", body + 20
        begin = body + len(raw)
    assert begin == len(data)


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    """Give the bytes with one bit changed."""
    return data[:offset] + bytes([data[offset] ^ (1 << bit)]) + data[offset + 1 :]


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Give every one-bit change at every kind of place, each with a name."""
    for name, offset in places(data):
        for bit in range(8):
            yield f"{name}, bit {bit}", flipped(data, offset, bit)
