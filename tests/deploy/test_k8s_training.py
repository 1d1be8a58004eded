"""k8s/training/: if this fails, a training run on Kubernetes may do too much, loses its state where a pod
ends, or never comes together again."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.recipes import load_recipe
from model.training.config import TrainConfig
from service.benchmark.server import free_port
from tests.deploy.kubernetes_policy import RESTRICTED_VOLUMES, WRITTEN, Manifests
from tests.deploy.test_image_files import stage
from tests.deploy.test_k8s import K8S, ROOT, VERSIONS, kustomize, refused, with_value

WAYS = ("job", "train-job")
RECIPE = K8S / "training" / "base" / "train.yaml"
RUN_ENDS_S = 240.0
BACKOFF_S = 10.0  # after which the controller of Jobs makes a failed pod again, at first


@functools.cache
def _built(way: str) -> str:
    return json.dumps(kustomize(K8S / "training" / way))


def built(way: str) -> Manifests:
    return Manifests(json.loads(_built(way)))


def node(manifests: Manifests) -> dict[str, Any]:
    """The Job that is, or of which Kubeflow makes, the pods, as an object that Kubernetes itself knows."""
    if manifests.all("Job"):
        return manifests.one("Job")
    [replicated] = manifests.one("TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]
    return {"apiVersion": "batch/v1", "kind": "Job"} | template | {"metadata": {"name": replicated["name"]}}


def pod(manifests: Manifests) -> dict[str, Any]:
    return node(manifests)["spec"]["template"]["spec"]


def command(manifests: Manifests) -> str:
    """What the pods run, as one line."""
    if manifests.all("Job"):
        [container] = pod(manifests)["containers"]
        assert container["command"] == ["sh", "-c"]
        return container["args"][0]
    trainer = manifests.one("TrainJob")["spec"]["trainer"]
    return " ".join([*trainer["command"], *trainer["args"]])


def option(name: str, line: str) -> str:
    [value] = re.findall(rf"--{name} (\S+)", line)
    return value


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_every_object_and_its_pods_are_valid(way: str, version: str) -> None:
    manifests = built(way)
    assert refused(manifests, version) == refused(Manifests([node(manifests)]), version) == []
    spoilt = Manifests([copy.deepcopy(node(manifests))])
    spoilt.documents[0]["spec"]["podReplacementPolicies"] = "Failed"
    assert refused(spoilt, version) == ["Job"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("TrainJob", "spec", "trainer", "numNode"), 2, id="misspelt"),
        pytest.param(("TrainJob", "spec", "trainer", "numNodes"), "2", id="number-as-text"),
        pytest.param(
            ("TrainingRuntime", "spec", "mlPolicy", "torch", "numProcPerNode"), "most", id="processes"
        ),
        pytest.param(
            ("TrainingRuntime", "spec", "template", "spec", "failurePolicy", "rules", 0, "action"),
            "Restart",
            id="action",
        ),
    ],
)
def test_a_mistake_in_a_resource_of_kubeflow_is_found(path: tuple[str | int, ...], value: object) -> None:
    assert refused(with_value(built("train-job"), path, value), VERSIONS[0]) == [path[0]]


@pytest.mark.parametrize("way", WAYS)
def test_pods_are_restricted_and_write_to_volumes_alone(way: str) -> None:
    manifests = built(way)
    spec = pod(manifests)
    labels = manifests.one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in stage("cuda")
    assert spec["automountServiceAccountToken"] is False
    assert manifests.one("ServiceAccount")["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == manifests.one("ServiceAccount")["metadata"]["name"]
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(volume.keys() - {"name"} <= RESTRICTED_VOLUMES for volume in spec["volumes"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert written == {*WRITTEN, "/dev/shm", "/runs"}
    [policy] = manifests.all("NetworkPolicy")
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {}}]}]
    inside, names = policy["spec"]["egress"]
    assert inside == {"to": [{"podSelector": {}}]}
    assert {port["port"] for port in names["ports"]} == {53}


def test_both_ways_make_the_same_pods() -> None:
    """But for their names and what finds the other nodes: Kubeflow does that itself."""
    specs = [pod(built(way)) for way in WAYS]
    containers = [spec.pop("containers")[0] for spec in specs]
    assert specs[0].pop("subdomain") == built("job").one("Service")["metadata"]["name"]
    assert specs[0] == specs[1]
    for name in ("image", "imagePullPolicy", "securityContext", "volumeMounts"):
        assert containers[0][name] == containers[1][name]
    trainer = built("train-job").one("TrainJob")["spec"]["trainer"]
    assert containers[0]["resources"] == trainer["resourcesPerNode"]


@pytest.mark.parametrize("way", WAYS)
def test_the_recipe_is_one_on_the_mounted_volumes(way: str) -> None:
    manifests = built(way)
    config_map = manifests.one("ConfigMap")
    assert config_map["data"] == {"train.yaml": RECIPE.read_text()}
    config = TrainConfig.from_dict(load_recipe(str(RECIPE), []))
    assert config.num_images == 400_000 * config.batch_size
    [container] = pod(manifests)["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert option("config", command(manifests)) == f"{mounts['config']}/train.yaml"
    sources = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    assert sources["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert config.output_dir.startswith(mounts["runs"] + "/")
    for path in (config.data, config.autoencoder):
        assert path.startswith(mounts["data"] + "/")
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in manifests.all("PersistentVolumeClaim")}
    assert claims.keys() == {sources[name]["persistentVolumeClaim"]["claimName"] for name in ("data", "runs")}
    assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
    gpus = int(_resources(manifests)["limits"]["nvidia.com/gpu"])
    assert config.batch_size % (2 * gpus) == 0


def _resources(manifests: Manifests) -> dict[str, Any]:
    if manifests.all("Job"):
        return pod(manifests)["containers"][0]["resources"]
    return manifests.one("TrainJob")["spec"]["trainer"]["resourcesPerNode"]


@pytest.mark.parametrize("way", WAYS)
def test_a_pod_that_goes_has_time_to_save_and_all_begin_again(way: str) -> None:
    manifests = built(way)
    grace_s = pod(manifests)["terminationGracePeriodSeconds"]
    assert 30 < float(option("shutdown-timeout", command(manifests))) < grace_s
    job = node(manifests)["spec"]
    assert job["podReplacementPolicy"] == "Failed"
    assert pod(manifests)["restartPolicy"] == "Never"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    if way == "job":
        assert rule["action"] == "Ignore"
        assert option("max-restarts", command(manifests)) == "0"
    else:  # a disrupted pod ends its Job, and each end of a Job begins the JobSet again
        assert (rule["action"], job["backoffLimit"]) == ("FailJob", 0)
        policy = manifests.one("TrainingRuntime")["spec"]["template"]["spec"]["failurePolicy"]
        assert [r["onJobFailureReasons"] for r in policy["rules"]] == [["PodFailurePolicy"]]


def test_the_nodes_of_the_job_find_one_another() -> None:
    manifests = built("job")
    job, service, line = manifests.one("Job"), manifests.one("Service"), command(manifests)
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == option("nnodes", line)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    first = f"{job['metadata']['name']}-0.{spec['template']['spec']['subdomain']}"
    assert option("rdzv-endpoint", line).partition(":")[0] == first
    runtime = built("train-job").one("TrainJob")["spec"]["runtimeRef"]
    assert built("train-job").one("TrainingRuntime")["metadata"]["name"] == runtime["name"]


class IndexedJob:
    """Its pods as processes of this machine, each made again some time after it has failed."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder = folder
        self.line = command(built("job")).replace("--nproc-per-node gpu", "--nproc-per-node 1")
        endpoint = option("rdzv-endpoint", self.line)
        self.line = self.line.replace(endpoint, f"localhost:{free_port()}")
        self.line = self.line.replace(option("config", self.line), str(recipe))
        self.pods = [self._pod(index) for index in range(2)]
        self.failures = [0, 0]
        self._due: dict[int, float] = {}

    def _pod(self, index: int) -> subprocess.Popen[bytes]:
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": search, "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": str(index)}
        with (self.folder / f"pod-{index}.log").open("ab") as log:
            return subprocess.Popen(
                ["sh", "-c", self.line], cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log
            )

    def look(self) -> bool:
        """Do what the controller would do now; whether all pods are through."""
        for index, process in enumerate(self.pods):
            if index in self._due and time.monotonic() > self._due[index]:
                del self._due[index]
                self.pods[index] = self._pod(index)
            elif index not in self._due and process.poll() not in (None, 0):
                self.failures[index] += 1
                self._due[index] = time.monotonic() + BACKOFF_S
        return all(process.poll() == 0 for process in self.pods)

    def kill(self, index: int) -> None:
        """End a pod and all that runs in it, as a node that is lost does."""
        _kill(self.pods[index].pid)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("pod-*.log")))


def _kill(pid: int) -> None:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    os.kill(pid, signal.SIGKILL)
    for child in listed.split():
        _kill(int(child))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1], ids=["first", "other"])
def test_a_run_whose_node_is_lost_goes_on_from_its_newest_state(tmp_path: Path, lost: int) -> None:
    recipe = tmp_path / "train.yaml"
    fields = {"base": "smoke", "name": "tiny", "output_dir": str(tmp_path / "run"), "num_images": 2400}
    recipe.write_text(yaml.safe_dump(fields | {"state_every_s": 2, "sample_every": 0, "tensorboard": False}))
    job = IndexedJob(tmp_path, recipe)
    try:
        states, deadline, killed = tmp_path / "run" / "states", time.monotonic() + RUN_ENDS_S, False
        while not job.look():
            assert time.monotonic() < deadline, job.log()
            if not killed and list(states.glob("state-*")):
                job.kill(lost)
                killed = True
            time.sleep(0.1)
    finally:
        for index, process in enumerate(job.pods):
            if process.poll() is None:
                job.kill(index)
    assert job.failures == [1, 1]
    assert len(re.findall(r"resuming from \S+/state-0*([1-9]\d*)", job.log())) == 1
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
