"""service/ray_app.py in Ray Serve, on two nodes of one machine: if this fails, images depend on who makes
them, replicas do not follow the load, or a node that dies takes requests with it.

Minutes of work, and Ray wants an environment of its own, so it runs by `make test-ray` alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from benchmarks.soak import logged_answers
from model.pretrained import default_model_dir
from service.benchmark.mix import MixEntry
from service.benchmark.server import free_port, running_command, serve_command

pytest.importorskip("ray", reason="Ray is not installed: `make test-ray`")

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

CONFIG = Path(__file__).parents[2] / "k8s" / "ray" / "serve.yaml"
MODEL = default_model_dir(128)
SETTINGS = {
    "LAMAMBA_MODELS": str(MODEL),
    "LAMAMBA_DETERMINISTIC": "true",
    "LAMAMBA_LOG_JSON": "true",
}
ENTRY = MixEntry(steps=4, resolution=128)
LIMIT_S = 180.0
# Of nodes, as k8s/ray/ray-service.yaml has it: else a proxy spares the replicas of other nodes.
SPREAD = {"RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
POLL_S = 0.25
CLIENTS = 5
RETRIED = (500, 502, 503)  # 500 is Ray Serve's answer for a replica that has died
SOON = {"upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 2}


class Answer(NamedTuple):
    """The end of one request, and the ids that it was sent under."""

    request_ids: tuple[str, ...]
    status: int


@dataclass
class Service:
    """Ray Serve with the app, on a cluster of two nodes."""

    url: str
    cluster: Any
    worker: Any
    """The node that is not the head."""
    logs: Path

    def replicas(self) -> int:
        """Those that run."""
        from ray import serve

        deployments = serve.status().applications["lamamba"].deployments
        return int(deployments["LaMamba"].replica_states.get("RUNNING", 0))

    def answered(self) -> dict[str, Counter[str]]:
        """How often each replica, which has a file of its own, answered each id with an image."""
        return {
            file.name: Counter(
                request_id for request_id, status in logged_answers(file.read_bytes()) if status == 200
            )
            for file in self.logs.glob("worker-*.err")
        }

    def wait_for_answers_of(self, replicas: int) -> None:
        """Wait until so many of them answer."""
        before = {name: answers.total() for name, answers in self.answered().items()}

        def so_many() -> bool:
            now = {name: answers.total() for name, answers in self.answered().items()}
            return sum(total > before.get(name, 0) for name, total in now.items()) == replicas

        wait_until(so_many, f"{replicas} replicas do not answer")


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(POLL_S)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The checked-in Serve config, for replicas of one core and an autoscaler that does not wait long."""
    import ray
    from ray.cluster_utils import Cluster

    port = free_port()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["proxy_location"] = "HeadOnly"
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] = {"cpus": 1}
    application["runtime_env"]["env_vars"] |= SETTINGS
    application["deployments"][0]["autoscaling_config"] |= SOON | {
        "max_replicas": 2,
        "target_ongoing_requests": 2,
    }
    file = tmp_path_factory.mktemp("ray") / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    node = {"num_cpus": 1, "env_vars": SPREAD}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        worker = cluster.add_node(**node)
        command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAMAMBA_")}
        subprocess.run(
            [*command, "--address", cluster.address, str(file)],
            check=True,
            timeout=LIMIT_S,
            env=environment,
        )
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), "no replica is ready")
        logs = Path(cluster.head_node.get_session_dir_path()) / "logs"
        yield Service(url=url, cluster=cluster, worker=worker, logs=logs)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(file.parent)


@contextmanager
def loaded(service: Service) -> Iterator[list[Answer]]:
    """Clients that always have a request each, and try it again where there is no image; the answers."""
    answers: list[Answer] = []
    end = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
            while not end.is_set():
                request_ids = [uuid.uuid4().hex]
                while (status := send(client, request_ids[-1])) in RETRIED:
                    time.sleep(POLL_S)
                    request_ids.append(uuid.uuid4().hex)
                answers.append(Answer(tuple(request_ids), status))

    def send(client: httpx.Client, request_id: str) -> int:
        headers = {"x-request-id": request_id}
        try:
            return client.post(f"{service.url}/generate", json=ENTRY.body(0), headers=headers).status_code
        except httpx.TransportError:
            return RETRIED[0]

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        end.set()
        for thread in threads:
            thread.join(LIMIT_S)


def test_images_are_those_of_the_plain_server(service: Service) -> None:
    bodies = [ENTRY.body(seed) | {"class_id": seed % 3} for seed in range(4)]
    options = ["--device", "cpu"]
    with running_command(serve_command(options), environment=SETTINGS) as plain, httpx.Client() as client:
        headers = {"accept": "image/png"}
        for body in bodies:
            files = [
                client.post(f"{url}/generate", json=body, headers=headers, timeout=LIMIT_S)
                for url in (plain.url, service.url)
            ]
            assert [file.status_code for file in files] == [200, 200]
            assert files[0].content == files[1].content
            assert files[0].headers["x-lamamba-seed"] == files[1].headers["x-lamamba-seed"]


def test_replicas_follow_the_load_to_two_and_back(service: Service) -> None:
    assert service.replicas() == 1
    with loaded(service) as answers:
        wait_until(lambda: service.replicas() == 2, "no second replica")
        service.wait_for_answers_of(2)
    assert {answer.status for answer in answers} == {200}
    wait_until(lambda: service.replicas() == 1, "the second replica stays")


def test_a_node_that_dies_in_mid_load_loses_no_request(service: Service) -> None:
    with loaded(service) as answers:
        wait_until(lambda: service.replicas() == 2, "no second replica")
        service.wait_for_answers_of(2)
        service.cluster.remove_node(service.worker, allow_graceful=False)
        # The replica ends when it misses its node, seconds later.
        wait_until(lambda: any(len(answer.request_ids) > 1 for answer in answers), "nothing was tried again")
        service.wait_for_answers_of(1)
    assert {answer.status for answer in answers} == {200}
    received = {answer.request_ids[-1] for answer in answers}

    def times() -> Counter[str]:
        return sum(service.answered().values(), Counter())

    wait_until(lambda: received <= times().keys(), "what was received is in no replica's log")
    assert set(times().values()) == {1}
