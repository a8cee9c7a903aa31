"""``esper kernels verify`` on files, with keys by hand and no mesh: what holds is shown, what does not ends in 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper.cli.kernel_proof import prove, trusted_keys
from esper.contracts.errors import ConfigError, NotFoundError, SignatureError
from esper.contracts.kernel import KernelArtifact, KernelManifest, ValidationCheck
from esper.contracts.wire import parse, serialize
from esper.execution.artifact import SIGNED_PREFIX, artifact_bytes
from esper.execution.keys import KeyRing, SigningKey
from tests.damaged_kernels import KEY, damaged, kernel_bytes

Esper = Callable[..., tuple[int, str, str]]
ARTIFACT_ID, DATA = kernel_bytes()


@pytest.fixture
def key(tmp_path: Path) -> str:
    return str(KEY.write_public(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "kernel.bin"
    path.write_bytes(DATA)
    return str(path)


def resigned(**changes: Any) -> bytes:
    """Give the kernel with a changed manifest that its maker signed."""
    artifact = parse(DATA, KernelArtifact)
    manifest = serialize(replace(parse(artifact.manifest, KernelManifest), **changes))
    signature = KEY.sign(SIGNED_PREFIX + manifest)  # by hand: ``sign`` refuses what does not agree
    return artifact_bytes(replace(artifact, manifest=manifest, signature=signature))


def test_a_good_kernel_verifies_with_every_step_and_row_shown(esper: Esper, file: str, key: str) -> None:
    code, out, err = esper("kernels", "verify", file, "--key", key)
    assert (code, err) == (0, "")
    assert out.endswith(f"{ARTIFACT_ID} verifies\n")
    for shown in (
        "signature",
        KEY.key_id,
        "digest of ir",
        "digest of weights",
        "digest of binary",
        "contents",
        "shapes",
    ):
        assert shown in out


def test_the_same_as_json(esper: Esper, file: str, key: str) -> None:
    code, out, _ = esper("kernels", "verify", file, "--key", key, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["artifact_id"], found["verified"], found["error"]) == (ARTIFACT_ID, True, None)
    assert [step["step"] for step in found["steps"]] == [
        *("form", "signature", "manifest", "digest of binary", "digest of ir", "digest of weights"),
        *("contents", "validation"),
    ]
    assert [row["check"] for row in found["checks"]] == ["shapes"]


def test_a_kernel_by_another_key_says_nothing_of_itself(esper: Esper, file: str, tmp_path: Path) -> None:
    other = SigningKey.generate().write_public(tmp_path)
    code, out, err = esper("kernels", "verify", file, "--key", str(other), "--json")
    found = json.loads(out)
    assert code == 1
    assert err.startswith(f"esper: {SignatureError.reason}: signing key must be a trusted one")
    assert (found["verified"], found["artifact_id"], found["checks"]) == (False, "", [])
    assert [(step["step"], step["holds"]) for step in found["steps"]] == [("form", True), ("signature", False)]


def test_no_change_of_a_bit_verifies() -> None:
    ring, seen = KEY.ring(), set()
    for name, data in damaged(DATA):
        proof = prove(data, ring)
        assert proof.error is not None, name
        *before, (step, holds, _) = proof.steps
        assert not holds
        assert all(row[1] for row in before)
        seen.add(step)
    assert {"form", "signature", "digest of ir", "digest of weights", "digest of binary"} <= seen


def test_a_kernel_that_is_not_the_one_expected_does_not_verify() -> None:
    proof = prove(DATA, KEY.ring(), artifact_id="k" + "0" * 32)
    assert proof.steps[-1][:2] == ("contents", False)
    assert "artefact must be k000" in str(proof.error)


@pytest.mark.parametrize("checks", [(), (ValidationCheck(name="latency", passed=False, detail="slow"),)])
def test_a_signed_kernel_without_passed_checks_does_not_verify(
    esper: Esper, tmp_path: Path, key: str, checks: tuple[ValidationCheck, ...]
) -> None:
    path = tmp_path / "failed.bin"
    path.write_bytes(resigned(checks=checks))
    code, out, err = esper("kernels", "verify", str(path), "--key", key, "--json")
    assert code == 1
    assert "kernel must have passed every check" in err
    assert json.loads(out)["steps"][-1]["step"] == "validation"
    assert [row["check"] for row in json.loads(out)["checks"]] == [check.name for check in checks]


def test_a_signed_manifest_that_lies_of_its_blueprint_does_not_verify() -> None:
    proof = prove(resigned(blueprint_id="0" * 64), KEY.ring())
    assert proof.steps[-1] == ("contents", False, "blueprint id must be the SHA-256 of the ir part, it is not")


def test_details_are_shown_as_they_are_written(esper: Esper, tmp_path: Path, key: str) -> None:
    path = tmp_path / "kernel.bin"
    path.write_bytes(resigned(checks=(ValidationCheck(name="shapes", passed=True, detail="as [bold]asked[/]"),)))
    assert "as [bold]asked[/]" in esper("kernels", "verify", str(path), "--key", key)[1]


def test_keys_come_as_a_file_a_directory_or_json(tmp_path: Path) -> None:
    first, second = SigningKey.generate(), SigningKey.generate()
    pem = first.write_public(tmp_path / ".")
    (tmp_path / "ring.json").write_text(second.ring().to_json())
    assert trusted_keys([pem]).key_ids == (first.key_id,)
    assert trusted_keys([tmp_path]).key_ids == (first.key_id,)
    assert set(trusted_keys([pem, tmp_path / "ring.json"]).key_ids) == {first.key_id, second.key_id}


def test_what_is_no_public_key_is_refused_with_its_place(tmp_path: Path) -> None:
    private = tmp_path / "private.pem"
    private.write_bytes(KEY.private_pem())
    with pytest.raises(ConfigError, match=r"key must be a public key in PEM, got .*private.pem"):
        trusted_keys([private])
    with pytest.raises(NotFoundError, match=r"trusted keys must be at .*nothing \(--key names another place\)"):
        trusted_keys([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match=r"must hold at least one \*.pub file"):
        trusted_keys([tmp_path])


def test_an_empty_ring_trusts_nothing() -> None:
    assert isinstance(prove(DATA, KeyRing()).error, SignatureError)


def test_without_a_key_or_a_mesh_the_missing_keys_are_named(esper: Esper, file: str, tmp_path: Path) -> None:
    code, out, err = esper("kernels", "verify", file)
    assert (code, out) == (1, "")
    assert err.startswith(f"esper: NOT_FOUND: trusted keys must be at {tmp_path}/esper/keys (--key names another")


def test_a_file_that_is_no_kernel_does_not_verify(esper: Esper, tmp_path: Path, key: str) -> None:
    path = tmp_path / "text"
    path.write_text("no kernel at all")
    code, _, err = esper("kernels", "verify", str(path), "--key", key)
    assert code == 1
    assert err.startswith("esper: CORRUPT_DATA: ")


def test_a_directory_is_no_kernel(esper: Esper, tmp_path: Path, key: str) -> None:
    code, _, err = esper("kernels", "verify", str(tmp_path), "--key", key)
    assert (code, err) == (1, f"esper: UNAVAILABLE: file must be readable, got {tmp_path}: Is a directory\n")
