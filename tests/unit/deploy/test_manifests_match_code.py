"""Names, ports, variables and commands in the manifests are those of the code."""

from __future__ import annotations

import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from esper.cli.main import app
from esper.mesh.server import LIVE
from esper.mesh.settings import DEFAULT_PORTS, PREFIX, SERVICES, MeshSettings, resolve
from esper.telemetry import COMPILE
from tests.unit.deploy.conftest import ROOT, Object, Rendered, containers_of, pod_of
from tests.unit.deploy.on_loopback import make_secrets

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
KNOWN = {f"{PREFIX}{name.upper()}" for name in MeshSettings.model_fields}
HTTP_PORTS = {
    "nissa": ("http", MeshSettings.model_fields["nissa_http_port"].default),
    "urza": ("rest", MeshSettings.model_fields["urza_rest_port"].default),
}


def esper_container(workload: Object) -> Object:
    """Give the container that runs Esper."""
    (found,) = [one for one in pod_of(workload)["containers"] if one["name"] == "esper"]
    return dict(found)


def services(given: Rendered) -> list[Object]:
    """Give the Deployments of the six services."""
    return [given.get("Deployment", name) for name in SERVICES]


def environment(given: Rendered, workload: Object) -> dict[str, str]:
    """Give the ESPER_* variables of a workload; those out of Secrets by their key."""
    container = esper_container(workload)
    assert container["envFrom"] == [{"configMapRef": {"name": "esper-settings"}}]
    own = {one["name"]: one.get("value", "secret") for one in container.get("env", ())}
    return {**given.settings(), **{name: value for name, value in own.items() if name.startswith(PREFIX)}}


def test_every_service_is_deployed_and_nothing_else_as_one(mesh: Rendered) -> None:
    found = {
        one["metadata"]["name"]
        for one in mesh.of("Deployment")
        if one["metadata"]["labels"]["app.kubernetes.io/component"] == "service"
    }
    assert found == set(SERVICES)


def test_every_variable_is_a_setting(mesh: Rendered, training: Rendered) -> None:
    for workload in [*services(mesh), training.get("Job", "train-digits")]:
        assert environment(mesh, workload).keys() <= KNOWN


def test_the_settings_are_accepted(mesh: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    for workload in services(mesh):
        with monkeypatch.context() as patch:
            for name, value in environment(mesh, workload).items():
                patch.setenv(name, value)
            settings = resolve().settings
            name = workload["metadata"]["name"]
            assert settings.host == "0.0.0.0"
            assert settings.address_of(name).endswith(f":{DEFAULT_PORTS[name]}")
            assert not settings.allow_plaintext


def test_addresses_are_the_services_of_the_namespace(mesh: Rendered) -> None:
    settings = mesh.settings()
    for name in SERVICES:
        service = mesh.get("Service", name)["spec"]
        (port,) = [one["port"] for one in service["ports"] if one["name"] == "grpc"]
        assert settings[f"ESPER_{name.upper()}_ADDRESS"] == f"dns:///{name}.esper.svc:{port}"
        assert service["clusterIP"] == "None"
    assert settings["ESPER_NATS_URL"] == "tls://nats.esper.svc:4222"
    assert {one["port"] for one in mesh.get("Service", "nats")["spec"]["ports"]} == {4222}


def test_ports_are_those_of_the_code(mesh: Rendered) -> None:
    health = int(mesh.settings()["ESPER_HEALTH_PORT"])
    for workload in services(mesh):
        name = workload["metadata"]["name"]
        ports = {one["name"]: one["containerPort"] for one in esper_container(workload)["ports"]}
        http = dict([HTTP_PORTS[name]]) if name in HTTP_PORTS else {}
        assert ports == {"grpc": DEFAULT_PORTS[name], "health": health, **http}


def test_the_rest_face_is_served_beyond_its_pod_with_certificates_and_a_token(
    mesh: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = mesh.get("Deployment", "urza")
    with monkeypatch.context() as patch:
        for name, value in environment(mesh, workload).items():
            patch.setenv(name, value)
        settings = resolve().settings
    assert settings.urza_rest_host == "0.0.0.0"
    assert settings.tls_ca is not None
    assert not settings.allow_plaintext
    (service_port,) = [one for one in mesh.get("Service", "urza")["spec"]["ports"] if one["name"] == "rest"]
    wanted = {"name": "rest", "port": settings.urza_rest_port, "targetPort": "rest", "appProtocol": "https"}
    assert service_port == wanted
    names = settings.urza_rest_names.split(",")
    assert set(names) == {*make_secrets().hosts_of("urza"), "localhost"}


def test_the_token_of_the_rest_face_is_a_file_of_a_secret_that_the_library_alone_has(mesh: Rendered) -> None:
    path = Path(environment(mesh, mesh.get("Deployment", "urza"))["ESPER_URZA_REST_TOKEN_FILE"])
    for workload in services(mesh):
        mounts = {one["name"]: one for one in esper_container(workload)["volumeMounts"]}
        secrets = {one["name"]: one["secret"] for one in pod_of(workload)["volumes"] if "secret" in one}
        found = [name for name, secret in secrets.items() if secret["secretName"] == "urza-rest"]
        if workload["metadata"]["name"] != "urza":
            assert (found, "ESPER_URZA_REST_HOST" in environment(mesh, workload)) == ([], False)
            continue
        (name,) = found
        assert (mounts[name]["mountPath"], mounts[name]["readOnly"]) == (str(path.parent), True)
        assert path.name in decoded_keys(secrets[name]["secretName"])


def decoded_keys(secret: str) -> set[str]:
    """Give the keys of a Secret that the script makes."""
    with tempfile.TemporaryDirectory() as directory:
        made = make_secrets().stores_and_keys(Path(directory))
    (found,) = [one["data"] for one in made if one["metadata"]["name"] == secret]
    return set(found)


def test_only_what_is_labelled_for_it_reaches_the_rest_face(mesh: Rendered) -> None:
    port = int(mesh.settings()["ESPER_URZA_REST_PORT"])
    label = {"matchLabels": {"esper.dev/rest-client": "true"}}
    rules = mesh.get("NetworkPolicy", "urza")["spec"]["ingress"]
    assert [rule["from"] for rule in rules if {"port": port} in rule["ports"]] == [
        [{"podSelector": label}, {"namespaceSelector": label}]
    ]
    egress = mesh.get("NetworkPolicy", "rest-egress")["spec"]
    assert egress["podSelector"] == label
    urza = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "urza"}}}
    assert egress["egress"] == [{"to": [urza], "ports": [{"port": port}]}]


def test_probes_ask_the_port_of_health_checks(mesh: Rendered) -> None:
    health = int(mesh.settings()["ESPER_HEALTH_PORT"])
    for workload in services(mesh):
        container = esper_container(workload)
        assert container["startupProbe"]["grpc"] == {"port": health, "service": LIVE}
        assert container["livenessProbe"]["grpc"] == {"port": health, "service": LIVE}
        assert container["readinessProbe"]["grpc"] == {"port": health}


def test_probes_and_services_name_ports_that_are_open(mesh: Rendered) -> None:
    for workload in mesh.of("Deployment", "StatefulSet"):
        for container in pod_of(workload)["containers"]:
            opened = {one["containerPort"] for one in container["ports"]}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe: dict[str, Any] = container.get(kind, {})
                asked = [probe[way]["port"] for way in ("grpc", "httpGet", "tcpSocket") if way in probe]
                assert set(asked) <= opened, f"{workload['metadata']['name']}: {kind}"
    ports = {
        (one["metadata"]["name"], port["name"])
        for one in mesh.of("Deployment", "StatefulSet")
        for container in containers_of(one)
        for port in container.get("ports", ())
    }
    for service in mesh.of("Service"):
        owner = service["spec"]["selector"]["app.kubernetes.io/name"]
        assert {(owner, one["targetPort"]) for one in service["spec"]["ports"]} <= ports


def test_the_pod_outlives_its_drain(mesh: Rendered) -> None:
    for workload in services(mesh):
        drain_s = float(environment(mesh, workload)["ESPER_DRAIN_DEADLINE_S"])
        assert pod_of(workload)["terminationGracePeriodSeconds"] >= drain_s + 10


def test_every_command_exists_and_parses(mesh: Rendered, training: Rendered) -> None:
    for workload in [*services(mesh), training.get("Job", "train-digits")]:
        container = esper_container(workload)
        assert container["command"] == ["esper"]
        arguments = [one.replace("$(JOB_COMPLETION_INDEX)", "2") for one in container["args"]]
        done = CliRunner().invoke(app, [*arguments, "--help"])
        assert done.exit_code == 0, done.output
        shown = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
        for flag in [one for one in arguments if one.startswith("--")]:
            assert flag in shown
    assert {tuple(esper_container(one)["args"]) for one in services(mesh)} == {("serve", name) for name in SERVICES}


def test_every_image_of_esper_is_the_same_version(mesh: Rendered, training: Rendered) -> None:
    images = {one["image"] for workload in services(mesh) for one in containers_of(workload)}
    assert len(images) == 1
    assert images.pop().endswith(f"esper:{VERSION}")
    assert esper_container(training.get("Job", "train-digits"))["image"] == f"esper:{VERSION}"


def test_every_image_has_a_version(every: Rendered) -> None:
    for workload in every.of("Deployment", "StatefulSet", "Job"):
        for container in containers_of(workload):
            tag = container["image"].rpartition(":")[2]
            assert re.match(r"\d+(\.\d+)*", tag), container["image"]


def test_one_instance_is_replaced_before_the_next_comes(mesh: Rendered) -> None:
    for name in ("tolaria", "tamiyo", "karn", "nissa"):
        spec = mesh.get("Deployment", name)["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_the_compiler_scales_on_its_own_queue(production: Rendered) -> None:
    from esper.services.tezzeret.config import TezzeretConfig
    from esper.services.tezzeret.lanes import PRIORITIES, consumer_of

    triggers = [one["metadata"] for one in production.get("ScaledObject", "tezzeret")["spec"]["triggers"]]
    assert {trigger["stream"] for trigger in triggers} == {COMPILE.name}
    name = TezzeretConfig().durable_name
    assert sorted(trigger["consumer"] for trigger in triggers) == sorted(consumer_of(name, one) for one in PRIORITIES)


def test_streams_have_as_many_copies_as_there_are_servers(mesh: Rendered) -> None:
    servers = mesh.get("StatefulSet", "nats")["spec"]["replicas"]
    assert int(mesh.settings()["ESPER_NATS_REPLICAS"]) == servers


def test_metrics_are_asked_of_a_port_that_is_there(production: Rendered) -> None:
    monitor = production.get("ServiceMonitor", "nissa")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    (service,) = [one for one in production.of("Service") if wanted <= one["metadata"]["labels"].items()]
    assert {one["port"] for one in monitor["endpoints"]} <= {one["name"] for one in service["spec"]["ports"]}


def test_the_training_job_is_indexed_and_may_call_the_mesh(training: Rendered, base: Rendered) -> None:
    job = training.get("Job", "train-digits")
    assert job["spec"]["completionMode"] == "Indexed"
    labels = job["spec"]["template"]["metadata"]["labels"]
    for name in SERVICES:
        sources = [one for rule in base.get("NetworkPolicy", name)["spec"]["ingress"] for one in rule["from"]]
        assert any(one.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items() for one in sources)
