"""The NATS configuration of the manifests, read and run by the real server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from esper.telemetry.nats_server import find_binary
from tests.unit.deploy.conftest import Rendered
from tests.unit.deploy.on_loopback import write_secrets


def written(given: Rendered, directory: Path) -> Path:
    """Write the configuration with its directories below one of the test's own."""
    (text,) = given.get("ConfigMap", "nats-config")["data"].values()
    for place in ("/etc/esper", "/data", "/var/run/nats"):
        assert f'"{place}' in text
        text = text.replace(f'"{place}', f'"{directory}{place}')
    path = directory / "nats.conf"
    path.write_text(text)
    return path


def test_the_server_takes_the_configuration(mesh: Rendered, tmp_path: Path) -> None:
    write_secrets(tmp_path, "nats")
    command = [str(find_binary()), "-t", "-c", str(written(mesh, tmp_path))]
    variables = {**os.environ, "POD_NAME": "nats-0"}
    done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_option_is_refused(base: Rendered, tmp_path: Path) -> None:
    write_secrets(tmp_path, "nats")
    path = written(base, tmp_path)
    path.write_text(path.read_text().replace("sync_interval", "sync_intervall"))
    command = [str(find_binary()), "-t", "-c", str(path)]
    variables = {**os.environ, "POD_NAME": "nats-0"}
    done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "sync_intervall" in done.stderr


def test_acknowledged_messages_are_on_disk_and_callers_known(mesh: Rendered) -> None:
    (text,) = mesh.get("ConfigMap", "nats-config")["data"].values()
    assert "sync_interval: always" in text
    assert text.count("verify: true") == text.count("tls {")


@pytest.mark.parametrize("server", range(3))
def test_every_server_of_the_cluster_is_a_route(production: Rendered, server: int) -> None:
    (text,) = production.get("ConfigMap", "nats-config")["data"].values()
    stateful = production.get("StatefulSet", "nats")["spec"]
    assert stateful["replicas"] == 3
    assert f"nats-route://nats-{server}.{stateful['serviceName']}.esper.svc:6222" in text
