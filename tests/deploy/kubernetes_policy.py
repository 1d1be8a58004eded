"""What every overlay in k8s/ must keep to, each rule a name and a check of the built manifests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.deploy.test_image_files import SENDING_S

__all__ = ["POLICY", "START_S", "WRITTEN", "Manifests", "violations"]

RESTRICTED_VOLUMES = {  # of the Pod Security Standard "restricted"
    "configMap", "csi", "downwardAPI", "emptyDir",
    "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
START_S = 300  # that the image's health check waits for a start
WRITTEN = ("/tmp", "/var/cache/lamamba")  # by the image, whose root is read-only


@dataclass(frozen=True)
class Manifests:
    """The objects that `kubectl kustomize` writes for an overlay."""

    documents: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        """The objects of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of a kind. Raises ValueError where there is another number of them."""
        [document] = self.all(kind)
        return document

    @property
    def pod(self) -> dict[str, Any]:
        """The pod's spec."""
        return self.one("Deployment")["spec"]["template"]["spec"]

    @property
    def labels(self) -> dict[str, str]:
        """The pod's labels."""
        return self.one("Deployment")["spec"]["template"]["metadata"]["labels"]

    @property
    def container(self) -> dict[str, Any]:
        """The pod's only container."""
        [container] = self.pod["containers"]
        return container

    @property
    def settings(self) -> dict[str, str]:
        """The environment variables that the container takes from the ConfigMap."""
        config = self.one("ConfigMap")
        assert self.container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
        return config["data"]

    def writable(self, path: str) -> bool:
        """Whether a volume that can be written is mounted there."""
        mounts = self.container["volumeMounts"]
        return any(mount["mountPath"] == path and not mount.get("readOnly") for mount in mounts)

    def secret_file(self) -> bool:
        """Whether the file of API keys comes from a Secret that must exist."""
        folder, _, name = self.settings["LAMAMBA_API_KEYS_FILE"].rpartition("/")
        [mount] = [mount for mount in self.container["volumeMounts"] if mount["mountPath"] == folder]
        [volume] = [volume for volume in self.pod["volumes"] if volume["name"] == mount["name"]]
        secret = volume.get("secret", {})
        return (
            name in [item["path"] for item in secret.get("items", ())]
            and not secret.get("optional")
            and secret["defaultMode"] & 0o007 == 0
        )

    def probed(self) -> dict[str, str]:
        """The path that each probe asks at the server's port."""
        probes = {
            name: self.container.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")
        }
        return {name: probe["httpGet"]["path"] for name, probe in probes.items() if _port(probe) == "http"}

    def startup_s(self) -> float:
        """Seconds after which a pod that has not started is started again."""
        probe = self.container["startupProbe"]
        return float(probe["periodSeconds"] * probe["failureThreshold"])

    def autoscaled(self) -> bool:
        """Whether one autoscaler, which keeps two replicas and more, owns the Deployment's replicas."""
        scalers = [
            (scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount")), scaler)
            for kind in ("HorizontalPodAutoscaler", "ScaledObject")
            for scaler in self.all(kind)
        ]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "lamamba"}
        return (
            len(scalers) == 1
            and scalers[0][0] >= 2
            and scalers[0][1]["spec"]["scaleTargetRef"] == target
            and "replicas" not in self.one("Deployment")["spec"]
        )

    def sized(self) -> bool:
        """Whether processor, memory and disk are both asked for and limited."""
        resources = self.container.get("resources", {})
        return all(
            name in resources.get(kind, {})
            for kind in ("requests", "limits")
            for name in ("cpu", "memory", "ephemeral-storage")
        )

    def selected_by(self, kind: str, *path: str) -> bool:
        """Whether the first object of a kind selects the server's pods."""
        found: Any = self.all(kind)[0]["spec"]
        for name in path:
            found = found.get(name, {})
        return bool(found) and found.items() <= self.labels.items()


def _port(probe: dict[str, Any]) -> object:
    return probe.get("httpGet", {}).get("port")


def _grace_s(manifests: Manifests) -> float:
    """Seconds that a pod has left when it has drained and sent its last answers."""
    before = manifests.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain = float(manifests.settings["LAMAMBA_DRAIN_TIMEOUT_S"])
    return manifests.pod["terminationGracePeriodSeconds"] - before - drain - SENDING_S


POLICY: dict[str, Callable[[Manifests], bool]] = {
    "the namespace is restricted": lambda m: (
        m.one("Namespace")["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") == "restricted"
    ),
    "no root": lambda m: (
        m.pod["securityContext"].get("runAsNonRoot") is True
        and m.pod["securityContext"]["runAsUser"] >= 10_000
    ),
    "seccomp": lambda m: m.pod["securityContext"].get("seccompProfile") == {"type": "RuntimeDefault"},
    "no privileges to gain": lambda m: (
        m.container["securityContext"].get("allowPrivilegeEscalation") is False
        and not m.container["securityContext"].get("privileged")
    ),
    "no capabilities": lambda m: m.container["securityContext"].get("capabilities") == {"drop": ["ALL"]},
    "read-only root": lambda m: m.container["securityContext"].get("readOnlyRootFilesystem") is True,
    "what is written is on volumes": lambda m: all(map(m.writable, WRITTEN)),
    "restricted kinds of volumes": lambda m: all(
        volume.keys() - {"name"} <= RESTRICTED_VOLUMES for volume in m.pod["volumes"]
    ),
    "nothing of the host": lambda m: not {"hostNetwork", "hostPID", "hostIPC"} & m.pod.keys(),
    "no token": lambda m: (
        m.pod.get("automountServiceAccountToken") is False
        and m.one("ServiceAccount").get("automountServiceAccountToken") is False
        and m.pod["serviceAccountName"] == m.one("ServiceAccount")["metadata"]["name"]
    ),
    "no variables of services": lambda m: m.pod.get("enableServiceLinks") is False,
    "keys come from a Secret": lambda m: m.secret_file() and not m.all("Secret"),
    "probes": lambda m: (
        m.probed() == {"startup": "/health/startup", "readiness": "/health/ready", "liveness": "/health/live"}
    ),
    "a start has time": lambda m: (
        START_S <= m.startup_s() < m.one("Deployment")["spec"]["progressDeadlineSeconds"]
    ),
    "resources": lambda m: m.sized(),
    "cuda means a GPU": lambda m: (
        (m.settings["LAMAMBA_DEVICE"] == "cuda") == ("nvidia.com/gpu" in m.container["resources"]["limits"])
    ),
    "endpoints go before the drain": lambda m: (
        m.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) >= 5
    ),
    "grace is above the drain": lambda m: _grace_s(m) > 0,
    "one port": lambda m: (
        m.settings["LAMAMBA_HOST"] == "0.0.0.0"
        and m.container["ports"] == [{"name": "http", "containerPort": int(m.settings["LAMAMBA_PORT"])}]
        and [port["targetPort"] for port in m.one("Service")["spec"]["ports"]] == ["http"]
    ),
    "one autoscaler": lambda m: m.autoscaled(),
    "disruption budget": lambda m: (
        m.one("PodDisruptionBudget")["spec"].get("maxUnavailable") == 1
        and m.selected_by("PodDisruptionBudget", "selector", "matchLabels")
    ),
    "service selects the pods": lambda m: m.selected_by("Service", "selector"),
    "scraped": lambda m: (
        m.selected_by("PodMonitor", "selector", "matchLabels")
        and [end["port"] for end in m.one("PodMonitor")["spec"]["podMetricsEndpoints"]] == ["http"]
    ),
    "spread": lambda m: (
        {spread["topologyKey"] for spread in m.pod.get("topologySpreadConstraints", ())}
        == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        and all(
            spread["labelSelector"]["matchLabels"].items() <= m.labels.items()
            for spread in m.pod["topologySpreadConstraints"]
        )
    ),
    "closed network": lambda m: (
        m.selected_by("NetworkPolicy", "podSelector", "matchLabels")
        and set(m.all("NetworkPolicy")[0]["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not m.all("NetworkPolicy")[0]["spec"].get("egress")
        and all(
            rule.get("from") and [port["port"] for port in rule.get("ports", ())] == ["http"]
            for rule in m.all("NetworkPolicy")[0]["spec"]["ingress"]
        )
    ),
}


def violations(manifests: Manifests) -> list[str]:
    """The names of the rules that the manifests break."""
    return [name for name, kept in POLICY.items() if not kept(manifests)]
