"""The Secrets that the script prints are the ones that the manifests name, and they fit together."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
from cryptography import x509

from esper.execution.keys import KeyRing, SigningKey
from esper.services.urza.server import UrzaConfig
from tests.unit.deploy.conftest import ROOT, Object, Rendered, containers_of, pod_of, rendered
from tests.unit.deploy.on_loopback import make_secrets

SCRIPT = ROOT / "deploy/k8s/make_secrets.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return make_secrets()


@pytest.fixture
def made(script: ModuleType, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    items = [*script.stores_and_keys(tmp_path), *script.certificates(tmp_path)]
    for item in items:
        kubernetes_validate.validate(item, "1.33", strict=True)
    return {item["metadata"]["name"]: decoded(item) for item in items}


def decoded(item: dict[str, Any]) -> dict[str, bytes]:
    return {name: base64.b64decode(text) for name, text in item["data"].items()}


def named_keys(workload: Object) -> Iterator[tuple[str, str]]:
    """Give secret and key of everything a workload takes out of Secrets."""
    needed = {"esper-signing-key": ("kernel-signing.pem",), "esper-trusted-keys": (), "urza-rest": ("token",)}
    for volume in pod_of(workload)["volumes"]:
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            yield from ((name, key) for key in needed.get(name, ("ca.crt", "tls.crt", "tls.key")))
    for container in containers_of(workload):
        for one in container.get("env", ()):
            reference = one.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                yield reference["name"], reference["key"]


def test_everything_the_pods_ask_for_is_made(every: Rendered, made: dict[str, dict[str, bytes]]) -> None:
    for workload in every.of("Deployment", "StatefulSet", "Job"):
        for name, key in named_keys(workload):
            assert key in made[name]


def test_nothing_is_made_that_nobody_asks_for(made: dict[str, dict[str, bytes]]) -> None:
    everything = [*rendered("base").of("Deployment", "StatefulSet"), *rendered("training").of("Job")]
    asked = {
        volume["secret"]["secretName"] for one in everything for volume in pod_of(one)["volumes"] if "secret" in volume
    }
    assert made.keys() == asked | {"esper-stores"}


def test_trusted_keys_are_those_of_the_signing_key(made: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    for name, content in made["esper-trusted-keys"].items():
        (tmp_path / name).write_bytes(content)
    signing = SigningKey.from_pem(made["esper-signing-key"]["kernel-signing.pem"])
    assert KeyRing.from_dir(tmp_path).key_ids == (signing.key_id,)


def test_certificates_name_the_services_as_the_production_overlay_does(
    made: dict[str, dict[str, bytes]], production: Rendered
) -> None:
    leaves = [one["spec"] for one in production.of("Certificate") if not one["spec"].get("isCA")]
    assert {spec["secretName"] for spec in leaves} == {name for name in made if name.endswith("-tls")}
    for spec in leaves:
        found = x509.load_pem_x509_certificate(made[spec["secretName"]]["tls.crt"])
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == spec["dnsNames"]
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == spec["uris"]
        assert set(spec["usages"]) >= {"server auth", "client auth"}


def test_stores_are_where_the_services_are(made: dict[str, dict[str, bytes]], base: Rendered) -> None:
    stores = {name: value.decode() for name, value in made["esper-stores"].items()}
    assert f":{stores['postgres-password']}@postgres.esper.svc:5432/esper" in stores["database-url"]
    assert f":{stores['redis-password']}@redis.esper.svc:6379" in stores["redis-url"]
    assert {"postgres", "redis"} <= {one["metadata"]["name"] for one in base.of("Service")}


def test_the_token_of_the_rest_face_is_one_that_the_library_takes(made: dict[str, dict[str, bytes]]) -> None:
    UrzaConfig(database_url="sqlite://", rest_write_token=made["urza-rest"]["token"].decode())


def test_a_second_run_keeps_passwords_keys_and_authority(script: ModuleType, tmp_path: Path) -> None:
    first, second = script.stores_and_keys(tmp_path), script.stores_and_keys(tmp_path)
    assert first == second
    before, after = (decoded(script.certificates(tmp_path)[0]) for _ in range(2))
    assert before["ca.crt"] == after["ca.crt"]
    assert before["tls.crt"] != after["tls.crt"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("*.password"))


def test_the_command_prints_a_list_for_kubectl(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dir", str(tmp_path), "--no-certificates"]
    command += ["--database-url", "postgresql://me@db.example.com/esper"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    items = json.loads(done.stdout)["items"]
    names = [one["metadata"]["name"] for one in items]
    assert names == ["esper-stores", "esper-signing-key", "esper-trusted-keys", "urza-rest"]
    assert decoded(items[0])["database-url"] == b"postgresql://me@db.example.com/esper"
