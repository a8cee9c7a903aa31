"""Every object holds to the schema of its kind, strictly; an unknown kind is a failure, never a pass."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.unit.deploy.conftest import Object, Rendered

KUBERNETES = "1.33"
CRDS = Path(__file__).parent / "crds"
CUSTOM_KINDS = {
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
}


@functools.cache
def check_text(text: str) -> None:
    """Hold an object, given as JSON, against the schema of its kind; overlays share most of theirs."""
    check(json.loads(text))


def check(one: Object) -> None:
    """Hold an object against the schema of its kind."""
    if (one["apiVersion"], one["kind"]) in CUSTOM_KINDS:
        schema: Any = json.loads((CRDS / f"{one['kind'].lower()}.json").read_text())
        jsonschema.validators.Draft202012Validator(schema).validate(one)
        return
    used = kubernetes_validate.validate(one, KUBERNETES, strict=True)
    assert used == KUBERNETES


def test_every_object_is_valid(every: Rendered) -> None:
    for one in every.objects:
        try:
            check_text(json.dumps(one, sort_keys=True))
        except (jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            where = f"{every.name}: {one['kind']} {one['metadata']['name']}"
            pytest.fail(f"{where}: {getattr(error, 'json_path', '')} {error.message}")


def test_no_object_comes_twice(every: Rendered) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in every.objects]
    assert len(names) == len(set(names))


def test_every_object_lies_in_the_namespace(every: Rendered) -> None:
    outside = [
        one for one in every.objects if one["kind"] != "Namespace" and one["metadata"].get("namespace") != "esper"
    ]
    assert outside == []


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({"apiVersion": "example.com/v1", "kind": "Unheard", "metadata": {"name": "x"}})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Deployment", "urza"),
        ("ScaledObject", "tezzeret"),
        ("Certificate", "urza"),
        ("Issuer", "esper-ca"),
        ("ServiceMonitor", "nissa"),
    ],
)
def test_a_misspelt_field_is_refused(production: Rendered, kind: str, name: str) -> None:
    wrong = copy.deepcopy(production.get(kind, name))
    wrong["spec"]["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        check(wrong)


def test_every_custom_kind_is_in_use(production: Rendered) -> None:
    used = {(one["apiVersion"], one["kind"]) for one in production.objects}
    assert used >= CUSTOM_KINDS
