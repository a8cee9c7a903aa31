"""Runs what the manifests start, as processes on loopback: same command, same variables, same files, other places."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper.mesh.ports import free_ports
from esper.mesh.settings import SERVICES
from esper.telemetry.nats_server import find_binary
from tests.unit.deploy.conftest import ROOT, Object, Rendered, pod_of

REST_TOKEN = "of-this-test-alone"
"""What lets callers of Urza's REST face change the library."""


def make_secrets() -> ModuleType:
    """Load the script that makes the Secrets."""
    spec = importlib.util.spec_from_file_location("make_secrets", ROOT / "deploy/k8s/make_secrets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_secrets(root: Path, owner: str) -> None:
    """Put the files that a pod of ``owner`` sees below ``root``; all owners of a directory share one authority."""
    script = make_secrets()
    authority = script.CertificateAuthority.open_or_create(root.parent / "authority")
    hosts = ("localhost", "127.0.0.1")
    ca, certificate, key = authority.issue(owner, hosts).read()
    for name, content in {"ca.crt": ca, "tls.crt": certificate, "tls.key": key}.items():
        path = root / "etc/esper/tls" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    signing = script.SigningKey.load_or_create(root.parent / "signing")
    for name, content in {
        f"etc/esper/trusted/{signing.key_id}.pub": signing.public_pem(),
        f"run/esper/keys/{script.PRIVATE_FILE}": signing.private_pem(),
        "etc/esper/rest/token": REST_TOKEN.encode(),
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    for name in ("data", "var/run/nats", "var/lib/esper", "tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)


class Loopback:
    """The places of one rendered mesh on this machine."""

    def __init__(self, given: Rendered, directory: Path, database_url: str, redis_url: str = "") -> None:
        self.given = given
        self.directory = directory
        self.secrets = {"database-url": database_url, "redis-url": redis_url}
        names = ("nats", "monitor", "http", "rest", *SERVICES, *(f"{name}-health" for name in SERVICES))
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def environment(self, service: str, workload: Object) -> dict[str, str]:
        """Give the variables of a service's container, with places moved to loopback."""
        (container,) = [one for one in pod_of(workload)["containers"] if one["name"] == "esper"]
        found = dict(self.given.settings())
        for one in container["env"]:
            reference = one.get("valueFrom", {}).get("secretKeyRef")
            found[one["name"]] = one["value"] if reference is None else self.secrets[reference["key"]]
        moved = {name: self._moved(service, value) for name, value in found.items()}
        if service in SERVICES:
            moved["ESPER_HEALTH_PORT"] = str(self.ports[f"{service}-health"])
        moved["ESPER_NISSA_HTTP_PORT"] = str(self.ports["http"])
        moved["ESPER_URZA_REST_PORT"] = str(self.ports["rest"])
        return {name: value for name, value in moved.items() if name != "ESPER_OTLP_ENDPOINT"}

    def _moved(self, service: str, value: str) -> str:
        if value.startswith(("/etc/", "/var/", "/run/", "/tmp")):
            return f"{self.directory / service}{value}"
        if found := re.fullmatch(r"(dns:///|tls://)(\w+)\.esper\.svc:\d+", value):
            return f"{found[1]}localhost:{self.ports[found[2]]}"
        return "127.0.0.1" if value == "0.0.0.0" else value

    @contextmanager
    def nats(self) -> Iterator[None]:
        """Run the bus as its container does."""
        root = self.directory / "nats"
        write_secrets(root, "nats")
        (text,) = self.given.get("ConfigMap", "nats-config")["data"].values()
        for place in ("/etc/esper", "/data", "/var/run/nats"):
            text = text.replace(f'"{place}', f'"{root}{place}')
        text = text.replace("0.0.0.0:4222", f"127.0.0.1:{self.ports['nats']}")
        text = text.replace("0.0.0.0:8222", f"127.0.0.1:{self.ports['monitor']}")
        (root / "nats.conf").write_text(text)
        command = [str(find_binary()), "-c", str(root / "nats.conf")]
        with running(command, {"POD_NAME": "nats-0"}, root / "log"):
            yield

    @contextmanager
    def service(self, service: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a service as its container does."""
        root = self.directory / service
        write_secrets(root, service)
        workload = self.given.get("Deployment", service)
        (container,) = pod_of(workload)["containers"]
        command = [str(Path(sys.executable).parent / container["command"][0]), *container["args"]]
        with running(command, self.environment(service, workload), root / "log") as process:
            yield process

    @contextmanager
    def job(self, job: Object, index: int, *extra: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one pod of an Indexed Job as its container does, with further arguments at the end."""
        root = self.directory / "trainer"
        write_secrets(root, "trainer")
        (container,) = pod_of(job)["containers"]
        arguments = [one.replace("$(JOB_COMPLETION_INDEX)", str(index)) for one in container["args"]]
        arguments = [f"{root}{one}" if one.startswith("/var/lib/esper") else one for one in arguments]
        command = [str(Path(sys.executable).parent / container["command"][0]), *arguments, *extra]
        with running(command, self.environment("trainer", job), root / "log") as process:
            yield process

    def log_of(self, service: str) -> str:
        """Give what a service has written."""
        return (self.directory / service / "log").read_text(errors="replace")[-4000:]


@contextmanager
def running(command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with these variables and no ESPER_* of ours, and end it by its id."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**clean, **variables}, stdout=out, stderr=out)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def probe(port: int, given: dict[str, Any]) -> int | None:
    """Ask as the kubelet does, in plain text; ``None`` where nobody answers."""
    request = health_pb2.HealthCheckRequest(service=given.get("service", ""))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=3.0).status)
        except grpc.RpcError:
            return None


def await_probe(port: int, given: dict[str, Any], process: subprocess.Popen[bytes], *, within_s: float = 90.0) -> bool:
    """Ask until it serves; false once the process ended or the time is over."""
    wake = time.monotonic() + within_s
    while time.monotonic() < wake and process.poll() is None:
        if probe(port, given) == health_pb2.HealthCheckResponse.SERVING:
            return True
        with_pause(process)
    return False


def with_pause(process: subprocess.Popen[bytes]) -> None:
    """Wait a moment, or until the process ends."""
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return
