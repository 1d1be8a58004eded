"""k8s/: if this fails, a cluster refuses the manifests, or runs servers that lose requests, do not scale, or
may do more than they need.

The manifests are what `kubectl kustomize` builds; without kubectl these tests skip.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.app import create_app
from service.errors import StartupError
from service.settings import ENVIRONMENT_PREFIX, Settings, load_settings
from tests.deploy.custom_resources import SCHEMAS
from tests.deploy.kubernetes_policy import POLICY, START_S, WRITTEN, Manifests, violations
from tests.deploy.test_image_files import stage
from tests.deploy.test_monitoring import program, unknown_metrics

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
RULES = ROOT / "docker" / "prometheus" / "lamamba.rules.yml"
PROMETHEUS_RULE = K8S / "components" / "prometheus-operator" / "prometheus-rule.yaml"
OVERLAYS = ("cpu", "gpu", "gpu-keda")
VERSIONS = ("1.30", "1.37")  # of Kubernetes: the first with all that is used, and the last that is known
TIMEOUT_S = 120.0

POD = ("Deployment", "spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
SPREAD = (*POD, "topologySpreadConstraints", 0)
NETWORK = ("NetworkPolicy", "spec")
MISTAKES: dict[str, tuple[tuple[str | int, ...], object]] = {  # rule: kind and path, and what is wrong there
    "the namespace is restricted": (
        ("Namespace", "metadata", "labels", "pod-security.kubernetes.io/enforce"),
        "baseline",
    ),
    "no root": ((*POD, "securityContext", "runAsUser"), 0),
    "seccomp": ((*POD, "securityContext", "seccompProfile"), {"type": "Unconfined"}),
    "no privileges to gain": ((*CONTAINER, "securityContext", "privileged"), True),
    "no capabilities": ((*CONTAINER, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}),
    "read-only root": ((*CONTAINER, "securityContext", "readOnlyRootFilesystem"), False),
    "what is written is on volumes": ((*CONTAINER, "volumeMounts", 1, "readOnly"), True),
    "restricted kinds of volumes": ((*POD, "volumes", 0, "hostPath"), {"path": "/"}),
    "nothing of the host": ((*POD, "hostNetwork"), True),
    "no token": (("ServiceAccount", "automountServiceAccountToken"), True),
    "no variables of services": ((*POD, "enableServiceLinks"), True),
    "keys come from a Secret": ((*POD, "volumes", 2, "secret", "optional"), True),
    "probes": ((*CONTAINER, "livenessProbe", "httpGet", "path"), "/health/ready"),
    "a start has time": (("Deployment", "spec", "progressDeadlineSeconds"), 600),
    "resources": ((*CONTAINER, "resources", "requests"), {"cpu": "2"}),
    "cuda means a GPU": (("ConfigMap", "data", "LAMAMBA_DEVICE"), "cuda"),
    "endpoints go before the drain": ((*CONTAINER, "lifecycle"), {}),
    "grace is above the drain": ((*POD, "terminationGracePeriodSeconds"), 75),
    "one port": (("ConfigMap", "data", "LAMAMBA_PORT"), "8080"),
    "one autoscaler": (("Deployment", "spec", "replicas"), 2),
    "disruption budget": (("PodDisruptionBudget", "spec", "maxUnavailable"), 0),
    "service selects the pods": (("Service", "spec", "selector", "app"), "lamamba"),
    "scraped": (("PodMonitor", "spec", "podMetricsEndpoints", 0, "port"), "metrics"),
    "spread": ((*SPREAD, "labelSelector", "matchLabels", "app"), "lamamba"),
    "closed network": ((*NETWORK, "egress"), [{}]),
}
REFUSED: dict[str, tuple[str, tuple[str | int, ...], object]] = {  # by the schemas: overlay, path, value
    "misspelt field": ("cpu", (*CONTAINER, "livenesProbe"), {}),
    "number for text": ("cpu", ("ConfigMap", "data", "LAMAMBA_PORT"), 8000),
    "misspelt behaviour": ("cpu", ("HorizontalPodAutoscaler", "spec", "behavior", "scaleup"), {}),
    "port of another resource": ("cpu", ("PodMonitor", "spec", "podMetricsEndpoints", 0, "targetport"), 8000),
    "no duration": ("cpu", ("PodMonitor", "spec", "podMetricsEndpoints", 0, "interval"), "15"),
    "rule of both kinds": ("gpu", ("PrometheusRule", "spec", "groups", 0, "rules", 0, "alert"), "A"),
    "threshold as a number": (
        "gpu-keda",
        ("ScaledObject", "spec", "triggers", 0, "metadata", "threshold"),
        4,
    ),
    "unknown fallback": ("gpu-keda", ("ScaledObject", "spec", "fallback", "behavior"), "highest"),
    "unknown kind": ("cpu", ("Service", "kind"), "Servic"),
}


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The objects that kubectl builds from a folder. Skips the test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


@functools.cache
def _built(name: str) -> str:
    return json.dumps(kustomize(K8S / "overlays" / name))


def overlay(name: str) -> Manifests:
    """An overlay as it is built; each call gives a copy of its own."""
    return Manifests(json.loads(_built(name)))


def with_value(manifests: Manifests, path: tuple[str | int, ...], value: object) -> Manifests:
    """A copy with another value at a path, which begins with the object's kind."""
    kind, *names, last = path
    changed = Manifests(copy.deepcopy(manifests.documents))
    place: Any = changed.one(str(kind))
    for name in names:
        place = place[name]
    assert not isinstance(place, dict) or place.get(last) != value
    place[last] = value
    return changed


def refused(manifests: Manifests, version: str) -> list[str]:
    """The kinds of the objects that a cluster of this version, with both operators, would refuse."""
    validator = pytest.importorskip("kubernetes_validate")
    kinds = []
    for document in manifests.documents:
        try:
            if document["kind"] in SCHEMAS:
                jsonschema.validate(document, SCHEMAS[document["kind"]])
            else:
                validator.validate(document, version, strict=True)
        except (
            jsonschema.ValidationError,
            validator.ValidationError,
            validator.SchemaNotFoundError,
        ):
            kinds.append(document["kind"])
    return kinds


def promtool_checks(groups: list[dict[str, Any]], folder: Path) -> int:
    """The exit code of `promtool check rules` for these groups of rules."""
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    command = [program("promtool"), "check", "rules", "rules.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT_S, check=False).returncode


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment variables without any of the server's."""
    for name in [name for name in os.environ if name.upper().startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_of_an_overlay_is_valid(name: str, version: str) -> None:
    assert refused(overlay(name), version) == []


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_in_an_object_is_found(mistake: str) -> None:
    name, path, value = REFUSED[mistake]
    kind = str(value) if path[-1] == "kind" else path[0]
    assert refused(with_value(overlay(name), path, value), VERSIONS[0]) == [kind]


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_keep_to_the_policy(name: str) -> None:
    assert violations(overlay(name)) == []


def test_every_rule_of_the_policy_finds_its_mistake() -> None:
    assert MISTAKES.keys() == POLICY.keys()
    good = overlay("cpu")
    for rule, (path, value) in MISTAKES.items():
        assert violations(with_value(good, path, value)) == [rule]


def test_probes_and_prometheus_ask_for_routes_that_there_are() -> None:
    manifests = overlay("cpu")
    [scraped] = manifests.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    routes = create_app(Settings()).openapi()["paths"]
    assert {*manifests.probed().values(), scraped["path"]} <= routes.keys()


def test_the_pod_is_made_for_the_image() -> None:
    context = overlay("cpu").pod["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in stage("cpu")
    assert context["fsGroup"] == context["runAsGroup"]
    assert f"HOME={WRITTEN[0]} " in stage("cpu")
    assert f"VOLUME {WRITTEN[1]}" in stage("cpu")
    assert f"--start-period={START_S}s" in stage("cpu")


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_config_map_is_settings_of_the_server(name: str, environment: pytest.MonkeyPatch) -> None:
    for variable, value in overlay(name).settings.items():
        environment.setenv(variable, value)
    assert load_settings().log_json
    environment.setenv("LAMAMBA_MAX_QUEUE_IMAGE", "64")
    with pytest.raises(StartupError, match="LAMAMBA_MAX_QUEUE_IMAGE: no such setting"):
        load_settings()


def test_variables_of_services_would_stop_the_server(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LAMAMBA_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(StartupError, match="LAMAMBA_PORT"):
        load_settings()
    environment.delenv("LAMAMBA_PORT")
    environment.setenv("LAMAMBA_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(StartupError, match="LAMAMBA_SERVICE_HOST"):
        load_settings()


@pytest.mark.parametrize("name", OVERLAYS)
def test_prometheus_rule_is_the_rules_file(name: str, tmp_path: Path) -> None:
    spec = overlay(name).one("PrometheusRule")["spec"]
    assert spec == yaml.safe_load(RULES.read_text())
    assert promtool_checks(spec["groups"], tmp_path) == 0
    spec["groups"][0]["rules"][0]["expr"] += ")"
    assert promtool_checks(spec["groups"], tmp_path) == 1


def test_prometheus_rule_is_what_its_code_writes(tmp_path: Path) -> None:
    written = tmp_path / "written.yaml"
    subprocess.run([sys.executable, K8S / "prometheus_rule.py", written], check=True, timeout=TIMEOUT_S)
    assert written.read_text() == PROMETHEUS_RULE.read_text(), "`make rules` writes it anew"


def test_the_rules_job_is_what_the_pod_monitor_names() -> None:
    manifests = overlay("cpu")
    label = manifests.one("PodMonitor")["spec"]["jobLabel"]
    jobs = set(re.findall(r'job="([^"]*)"', RULES.read_text()))
    assert jobs == {manifests.labels[label]}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_autoscaler_asks_for_metrics_that_there_are(name: str) -> None:
    manifests = overlay(name)
    targets = pod_targets(manifests)
    adapter = yaml.safe_load((K8S / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    [served] = re.findall(r'__name__=~"([^"]*)"', adapter[0]["seriesQuery"])
    assert unknown_metrics(targets) == set()
    assert unknown_metrics(["lamamba_images_queue"])
    assert targets.keys() == set(served.split("|"))
    images_a_step = int(manifests.settings["LAMAMBA_MAX_ROWS"]) // 2
    assert int(targets["lamamba_active_slots"]) == images_a_step * 3 // 4
    queue = int(manifests.settings.get("LAMAMBA_MAX_QUEUE_IMAGES", Settings().max_queue_images))
    assert int(targets["lamamba_queue_images"]) < queue


def test_keda_scales_as_the_autoscaler_does() -> None:
    autoscaler = overlay("gpu").one("HorizontalPodAutoscaler")["spec"]
    scaled = overlay("gpu-keda").one("ScaledObject")["spec"]
    assert scaled["minReplicaCount"] == autoscaler["minReplicas"]
    assert scaled["maxReplicaCount"] == autoscaler["maxReplicas"]
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == autoscaler["behavior"]
    asked = {trigger["metadata"]["query"]: trigger["metadata"]["threshold"] for trigger in scaled["triggers"]}
    assert asked == {
        f'sum({metric}{{job="lamamba", namespace="lamamba"}})': target
        for metric, target in pod_targets(overlay("gpu")).items()
    }


def test_prometheus_understands_what_the_autoscalers_ask(tmp_path: Path) -> None:
    [rule] = yaml.safe_load((K8S / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    query = rule["metricsQuery"]
    for name, text in {
        "<<.Series>>": "lamamba_queue_images",
        "<<.LabelMatchers>>": 'namespace="lamamba",pod=~"a|b"',
        "<<.GroupBy>>": "pod",
    }.items():
        assert name in query
        query = query.replace(name, text)
    triggers = overlay("gpu-keda").one("ScaledObject")["spec"]["triggers"]
    queries = [query, rule["seriesQuery"], *(trigger["metadata"]["query"] for trigger in triggers)]
    rules = [{"record": f"asked:{number}", "expr": text} for number, text in enumerate(queries)]
    assert promtool_checks([{"name": "asked", "rules": rules}], tmp_path) == 0


def test_components_can_be_added(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    tree = shutil.copytree(K8S, tmp_path / "k8s")
    (tree / "overlays" / "mine").mkdir()
    (tree / "overlays" / "mine" / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "namespace": "lamamba",
                "resources": ["../gpu"],
                "components": ["../../components/hub-models", "../../components/volume-models"],
            }
        )
    )
    manifests = Manifests(kustomize(tree / "overlays" / "mine"))
    assert [refused(manifests, version) for version in VERSIONS] == [[], []]
    assert violations(manifests) == []
    for variable, value in manifests.settings.items():
        environment.setenv(variable, value)
    mounted = {mount["mountPath"] for mount in manifests.container["volumeMounts"]}
    assert str(load_settings().model_repository) in mounted
    [closed, hub] = manifests.all("NetworkPolicy")
    assert hub["spec"]["podSelector"] == closed["spec"]["podSelector"]
    assert [[port["port"] for port in rule["ports"]] for rule in hub["spec"]["egress"]] == [[53, 53], [443]]


def test_checkov_finds_nothing_else_than_is_explained(tmp_path: Path) -> None:
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not installed; `make test-k8s` installs it")
    built = {name: overlay(name) for name in OVERLAYS}
    built["training"] = Manifests(kustomize(K8S / "training" / "job"))
    built["mistake"] = with_value(built["cpu"], *MISTAKES["read-only root"])
    found = {}
    for name, manifests in built.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(manifests.documents))
    command = [checkov, "--framework", "kubernetes", "--skip-download", "--directory", str(tmp_path)]
    quiet = os.environ | {"LOG_LEVEL": "ERROR"}
    scan = subprocess.run(
        [*command, "--output", "json"],
        env=quiet,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert scan.returncode == 1, scan.stderr
    for failed in json.loads(scan.stdout)["results"]["failed_checks"]:
        found.setdefault(Path(failed["file_path"]).stem, set()).add(failed["check_id"])
    explained = set(yaml.safe_load((K8S / "checkov.yaml").read_text())["skip-check"])
    assert found == dict.fromkeys([*OVERLAYS, "training"], explained) | {
        "mistake": explained | {"CKV_K8S_22"}
    }
    (tmp_path / "mistake.yaml").unlink()
    command += ["--config-file", str(K8S / "checkov.yaml"), "--quiet"]
    scan = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert scan.returncode == 0, scan.stdout


def pod_targets(manifests: Manifests) -> dict[str, str]:
    """The average value for each pod, by the metric's name."""
    metrics = manifests.one("HorizontalPodAutoscaler")["spec"]["metrics"]
    return {
        metric["pods"]["metric"]["name"]: metric["pods"]["target"]["averageValue"]
        for metric in metrics
        if metric["type"] == "Pods" and metric["pods"]["target"]["type"] == "AverageValue"
    }
