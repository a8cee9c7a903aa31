"""The manifests as kubectl renders them, each once for the whole session."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
TARGETS = ("base", "overlays/local", "overlays/production", "training")

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The objects of one kustomization."""

    name: str
    objects: tuple[Object, ...]

    def of(self, *kinds: str) -> list[Object]:
        """Give the objects of these kinds."""
        return [one for one in self.objects if one["kind"] in kinds]

    def get(self, kind: str, name: str) -> Object:
        """Give one object."""
        found = [one for one in self.of(kind) if one["metadata"]["name"] == name]
        assert len(found) == 1, f"{self.name} must hold one {kind} {name}, got {len(found)}"
        return found[0]

    def settings(self) -> dict[str, str]:
        """Give what the services' ConfigMap sets."""
        data: dict[str, str] = self.get("ConfigMap", "esper-settings")["data"]
        return data


def pod_of(workload: Object) -> Object:
    """Give the pod spec of a workload."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def containers_of(workload: Object) -> Iterator[Object]:
    """Give every container of a workload, first those that only prepare."""
    pod = pod_of(workload)
    yield from pod.get("initContainers", ())
    yield from pod["containers"]


def render(target: str) -> Rendered:
    """Render a kustomization; a machine without kubectl fails the test, since nothing was checked."""
    kubectl = shutil.which("kubectl")
    assert kubectl is not None, "kubectl must be installed: it renders the manifests that these tests check"
    command = [kubectl, "kustomize", str(ROOT / "deploy/k8s" / target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    objects = tuple(one for one in yaml.safe_load_all(done.stdout) if one)
    assert objects
    return Rendered(target, objects)


_RENDERED: dict[str, Rendered] = {}


def rendered(target: str) -> Rendered:
    """Give a kustomization, rendered once."""
    if target not in _RENDERED:
        _RENDERED[target] = render(target)
    return _RENDERED[target]


@pytest.fixture(params=TARGETS)
def every(request: pytest.FixtureRequest) -> Rendered:
    """Each kustomization in turn."""
    return rendered(request.param)


@pytest.fixture(params=[target for target in TARGETS if target != "training"])
def mesh(request: pytest.FixtureRequest) -> Rendered:
    """Each kustomization that holds the whole mesh, in turn."""
    return rendered(request.param)


@pytest.fixture
def base() -> Rendered:
    """The base."""
    return rendered("base")


@pytest.fixture
def production() -> Rendered:
    """The production overlay."""
    return rendered("overlays/production")


@pytest.fixture
def training() -> Rendered:
    """The training job."""
    return rendered("training")
