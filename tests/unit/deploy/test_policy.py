"""What every pod must hold to: restricted security, bounded resources, closed network, no secret in git."""

from __future__ import annotations

import pytest

from tests.unit.deploy.conftest import Object, Rendered, containers_of, pod_of

WORKLOADS = ("Deployment", "StatefulSet", "Job")


def workloads(given: Rendered) -> list[Object]:
    """Give everything that runs pods."""
    found = given.of(*WORKLOADS)
    assert found
    return found


def test_pods_run_as_nobody_special(every: Rendered) -> None:
    for workload in workloads(every):
        pod = pod_of(workload)
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def test_containers_can_gain_nothing(every: Rendered) -> None:
    for workload in workloads(every):
        for container in containers_of(workload):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{workload['metadata']['name']}/{container['name']}"


def test_containers_say_what_they_need(every: Rendered) -> None:
    for workload in workloads(every):
        for container in containers_of(workload):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys()
            assert "memory" in resources["limits"]


def test_pods_get_no_token_and_no_variables_of_neighbours(every: Rendered) -> None:
    accounts = {one["metadata"]["name"]: one for one in every.of("ServiceAccount")}
    for workload in workloads(every):
        pod = pod_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False


def test_volumes_are_of_kinds_that_the_restricted_profile_lets_through(every: Rendered) -> None:
    for workload in workloads(every):
        pod = pod_of(workload)
        claims = workload["spec"].get("volumeClaimTemplates", [])
        known = {volume["name"] for volume in pod["volumes"]} | {claim["metadata"]["name"] for claim in claims}
        for volume in pod["volumes"]:
            assert volume.keys() - {"name"} <= {"emptyDir", "secret", "configMap"}
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""})
        for container in containers_of(workload):
            assert {mount["name"] for mount in container["volumeMounts"]} <= known


def test_no_secret_is_in_git(every: Rendered) -> None:
    assert every.of("Secret") == []


def test_the_namespace_enforces_the_restricted_profile(mesh: Rendered) -> None:
    labels = mesh.get("Namespace", "esper")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_nothing_passes_that_no_policy_names(mesh: Rendered) -> None:
    policy = mesh.get("NetworkPolicy", "default-deny")["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_every_workload_has_its_policy_and_budget(mesh: Rendered) -> None:
    for workload in mesh.of("Deployment", "StatefulSet"):
        name = workload["metadata"]["name"]
        selector = {"matchLabels": {"app.kubernetes.io/name": name}}
        policy = mesh.get("NetworkPolicy", name)["spec"]
        assert policy["podSelector"] == selector
        assert policy["policyTypes"] == ["Ingress"]
        opened = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        offered = {
            port["containerPort"] for container in containers_of(workload) for port in container.get("ports", ())
        }
        assert opened <= offered
        assert all(rule["from"] for rule in policy["ingress"])
        budget = mesh.get("PodDisruptionBudget", name)["spec"]
        assert budget == {"maxUnavailable": 1, "selector": selector}


def test_what_runs_more_than_once_is_spread(mesh: Rendered) -> None:
    for workload in mesh.of("Deployment", "StatefulSet"):
        if workload["spec"].get("replicas", 2) > 1:
            rules = pod_of(workload)["topologySpreadConstraints"]
            own = workload["spec"]["selector"]
            assert {"kubernetes.io/hostname"} == {rule["topologyKey"] for rule in rules if rule["labelSelector"] == own}


def test_selectors_find_their_pods(mesh: Rendered) -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in mesh.of("Deployment", "StatefulSet")]
    for service in mesh.of("Service"):
        wanted = service["spec"]["selector"].items()
        assert sum(wanted <= found.items() for found in labels) == 1


@pytest.mark.parametrize(("name", "least"), [("urza", 2), ("tezzeret", 2)])
def test_what_scales_keeps_no_count_of_its_own(production: Rendered, name: str, least: int) -> None:
    assert "replicas" not in production.get("Deployment", name)["spec"]
    scalers = production.of("HorizontalPodAutoscaler", "ScaledObject")
    (scaler,) = [one for one in scalers if one["spec"]["scaleTargetRef"]["name"] == name]
    spec = scaler["spec"]
    assert spec.get("minReplicas", spec.get("minReplicaCount")) == least


def test_production_leaves_postgres_to_others(production: Rendered) -> None:
    assert [one["kind"] for one in production.objects if one["metadata"]["name"] == "postgres"] == []


def test_the_local_overlay_runs_one_of_each() -> None:
    from tests.unit.deploy.conftest import rendered

    local = rendered("overlays/local")
    assert {one["spec"]["replicas"] for one in local.of("Deployment", "StatefulSet")} == {1}
