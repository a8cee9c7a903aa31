"""The Dockerfile, read as a file: what it copies is there, what it starts exists, and it runs as nobody special."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from esper.mesh.settings import DEFAULT_PORTS, MeshSettings
from tests.unit.deploy.conftest import ROOT, Rendered, pod_of

DOCKER = ROOT / "deploy/docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Give the Dockerfile's instructions, continued lines joined, comments left out."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest) for name, rest in pairs]


def last_stage() -> list[tuple[str, str]]:
    """Give the instructions of the image that is shipped."""
    found = instructions()
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def copied() -> list[str]:
    """Give every path taken from the build context."""
    sources = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from=" not in rest]
    return [one for group in sources for one in group]


def allowed() -> list[str]:
    """Give what the ignore file lets into the build context."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_in_the_context(path: str) -> None:
    assert (ROOT / path).exists()
    assert any(fnmatch(path, pattern) for pattern in allowed())


def test_what_the_build_reads_is_copied() -> None:
    project = PROJECT["project"]
    packages = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    wanted = {project["readme"], *project["license-files"], *packages.values(), "CMakeLists.txt", "csrc"}
    assert wanted <= set(copied())
    assert set(allowed()) == set(copied())


def test_stages_are_chosen_by_the_variant() -> None:
    names = [rest.split() for name, rest in instructions() if name == "FROM"]
    stages = {words[2] for words in names if len(words) == 3}
    assert {"base-cpu", "base-cuda", "build"} == stages
    assert ("ARG", "VARIANT=cpu") in instructions()
    assert ["base-${VARIANT}", "AS", "build"] in names
    assert all(re.search(r":\d+\.\d+", words[0]) for words in names if "VARIANT" not in words[0])


def test_the_constraint_of_torch_is_one_line() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(lines) == 1


def test_it_starts_the_command_of_the_package() -> None:
    stage = dict(last_stage())
    assert stage["ENTRYPOINT"] == '["esper"]'
    assert "esper" in PROJECT["project"]["scripts"]
    assert "/opt/esper/bin" in " ".join(rest for name, rest in last_stage() if name == "ENV")


def test_its_user_is_the_one_of_the_pods(base: Rendered) -> None:
    user = dict(last_stage())["USER"]
    context = pod_of(base.get("Deployment", "urza"))["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert int(user.partition(":")[0]) > 0


def test_its_ports_are_those_of_the_services(base: Rendered) -> None:
    exposed = {int(port) for port in dict(last_stage())["EXPOSE"].split()}
    health = int(base.settings()["ESPER_HEALTH_PORT"])
    http = {MeshSettings.model_fields[name].default for name in ("nissa_http_port", "urza_rest_port")}
    assert exposed == {*DEFAULT_PORTS.values(), health, *http}


def test_its_variables_are_settings() -> None:
    known = {f"ESPER_{name.upper()}" for name in MeshSettings.model_fields}
    text = " ".join(rest for name, rest in last_stage() if name == "ENV")
    assert set(re.findall(r"\bESPER_[A-Z_]+", text)) <= known


def test_no_secret_and_no_whole_tree_is_copied() -> None:
    assert not {".", "./", "deploy", ".git"} & set(copied())
    assert not re.search(r"(?i)(password|token|secret)\s*=", (DOCKER / "Dockerfile").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_copied_is_enough_for_a_wheel(tmp_path: Path) -> None:
    import shutil
    import subprocess
    import sys

    for path in copied():
        source = ROOT / path
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(source, tmp_path / path, ignore=ignored) if source.is_dir() else shutil.copy(source, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "out", "."]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.startswith(f"esper-{PROJECT['project']['version']}-")
