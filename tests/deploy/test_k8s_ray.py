"""k8s/ray/: if this fails, Ray Serve gets another configuration on Kubernetes than without, or a Ray cluster
that is open to others, may do too much, or ends before it has answered."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import ENVIRONMENT_PREFIX, Settings
from tests.deploy.kubernetes_policy import Manifests
from tests.deploy.test_k8s import K8S, ROOT, VERSIONS, kustomize, refused, with_value

RAY = K8S / "ray"
SERVE = yaml.safe_load((RAY / "serve.yaml").read_text())
GRACE_S = 15  # service/ray_app.py adds it to the time to drain
TEMPLATES = (
    ("headGroupSpec", "template"),
    ("workerGroupSpecs", 0, "template"),
)
RAY_PORTS = {8265, 8000}


@functools.cache
def _built() -> str:
    return json.dumps(kustomize(RAY))


def built() -> Manifests:
    return Manifests(json.loads(_built()))


def cluster(manifests: Manifests) -> dict[str, Any]:
    return manifests.one("RayService")["spec"]["rayClusterConfig"]


def template(manifests: Manifests, path: tuple[str | int, ...]) -> dict[str, Any]:
    """The pod template there, as an object that Kubernetes itself knows."""
    place: Any = cluster(manifests)
    for name in path:
        place = place[name]
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": place}


def application() -> dict[str, Any]:
    [only] = SERVE["applications"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_and_its_pods_are_valid(version: str) -> None:
    manifests = built()
    pods = Manifests([template(manifests, path) for path in TEMPLATES])
    assert refused(manifests, version) == refused(pods, version) == []
    spoilt = copy.deepcopy(pods.documents)
    spoilt[1]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert refused(Manifests(spoilt), version) == ["PodTemplate"]
    wrong = ("RayService", "spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica")
    assert refused(with_value(manifests, wrong, 1), version) == ["RayService"]


def test_the_ray_service_has_the_serve_config() -> None:
    assert yaml.safe_load(built().one("RayService")["spec"]["serveConfigV2"]) == SERVE


def test_the_image_of_both_pods_can_be_named_at_once(tmp_path: Path) -> None:
    tree = shutil.copytree(RAY, tmp_path / "ray")
    file = tree / "kustomization.yaml"
    named = {"images": [{"name": "lamamba", "newName": "registry/lamamba", "digest": "sha256:0123"}]}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | named))
    manifests = Manifests(kustomize(tree))
    for path in TEMPLATES:
        [container] = template(manifests, path)["template"]["spec"]["containers"]
        assert container["image"] == "registry/lamamba@sha256:0123"


def test_ray_is_everywhere_the_version_that_is_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["ray"] == [f"ray[serve]=={cluster(built())['rayVersion']}"]


def test_the_application_is_the_one_in_the_code() -> None:
    module, _, function = application()["import_path"].partition(":")
    code = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert f"\ndef {function}(" in code
    assert [f"\nclass {deployment['name']}:" in code for deployment in application()["deployments"]] == [True]
    [grace_s] = re.findall(r"^_GRACE_S: Final = (\S+)", code, re.MULTILINE)
    assert float(grace_s) == GRACE_S
    variables = application()["runtime_env"]["env_vars"].items()
    settings = {name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in variables}
    assert settings.keys() <= Settings.model_fields.keys()
    Settings.model_validate(settings)


@pytest.mark.parametrize("path", TEMPLATES, ids=["head", "worker"])
def test_pods_are_restricted_spread_requests_and_tell_nobody_of_them(path: tuple[str | int, ...]) -> None:
    pod = template(built(), path)["template"]
    [container] = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert {"readinessProbe", "livenessProbe"} <= container.keys()
    assert pod["spec"]["enableServiceLinks"] is False
    assert {"name": "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING", "value": "0"} in container["env"]
    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }


def test_a_worker_has_one_gpu_and_longer_to_end_than_its_replica() -> None:
    pod = template(built(), TEMPLATES[1])["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert application()["args"] == {"cpus": 0}
    assert pod["terminationGracePeriodSeconds"] > Settings().drain_timeout_s + GRACE_S
    [workers] = cluster(built())["workerGroupSpecs"]
    scaling = application()["deployments"][0]["autoscaling_config"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (
        scaling["min_replicas"],
        scaling["max_replicas"],
    )


def test_the_ports_of_ray_are_closed_to_all_but_its_pods() -> None:
    manifests = built()
    policy = manifests.one("NetworkPolicy")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    for path in TEMPLATES:
        assert labels.items() <= template(manifests, path)["template"]["metadata"]["labels"].items()
    for rule in policy["ingress"]:
        if rule["from"] != [{"podSelector": {"matchLabels": labels}}]:
            ports = {port["port"] for port in rule["ports"]}
            assert ports == {8000} or (ports == RAY_PORTS and "podSelector" in rule["from"][0])
