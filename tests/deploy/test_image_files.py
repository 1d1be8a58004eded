"""Dockerfile and docker-compose.yml as files: if this fails, a container is less confined, or less
reproducible, than they say. test_docker.py runs them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import server
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
SERVERS = ("lamamba", "lamamba-gpu")
SENDING_S = server._GRACE_S  # for the last answers, after the drain


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    path = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip("hadolint is not installed; the extra `deploy` brings it")
    return subprocess.run([path, "-"], input=text, capture_output=True, text=True, timeout=60, check=False)


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile, without its FROM."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1].rstrip()


def test_hadolint_finds_nothing_and_would_find_a_mistake() -> None:
    clean = hadolint(DOCKERFILE)
    assert clean.returncode == 0, clean.stdout
    assert hadolint(DOCKERFILE.replace("WORKDIR /src", "WORKDIR src")).returncode == 1


def test_both_images_run_the_same() -> None:
    assert stage("cuda").endswith(stage("cpu").split("\n", 1)[1])
    assert "STOPSIGNAL SIGTERM" in stage("cpu")
    assert "USER 10001:10001" in stage("cpu")


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_server_past_any_proxy(status: int) -> None:
    class Probed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", stage("cpu"), re.MULTILINE)
    assert found
    _, *arguments = json.loads(found[1])
    with HTTPServer(("127.0.0.1", 0), Probed) as probed:
        asked = threading.Thread(target=probed.handle_request, daemon=True)
        asked.start()
        proxy = "http://127.0.0.1:1"  # of Docker's config.json, say, which gives it to every container
        environment = os.environ | {"LAMAMBA_PORT": str(probed.server_port), "http_proxy": proxy}
        environment |= dict.fromkeys(("no_proxy", "NO_PROXY"), "")
        check = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, timeout=60, check=False
        )
        asked.join(1)
    assert (check.returncode == 0) == (status == 200)


def test_the_label_is_the_packages_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'org.opencontainers.image.version="{project["version"]}"' in stage("cpu")


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert "healthcheck" in service or name in SERVERS  # theirs is in the image
    if name not in SERVERS:
        assert service["environment"]["http_proxy"] == service["environment"]["HTTP_PROXY"] == ""
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    for port in service["ports"]:
        assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:")


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_longer_to_stop_than_it_drains(name: str) -> None:
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout_s + SENDING_S


def test_prometheus_scrapes_the_name_that_the_servers_have() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    [job] = [job for job in config["scrape_configs"] if job["job_name"] == "lamamba"]
    for name in SERVERS:
        assert SERVICES[name]["networks"]["default"]["aliases"] == job["dns_sd_configs"][0]["names"]
        assert SERVICES[name]["environment"]["LAMAMBA_PORT"] == str(job["dns_sd_configs"][0]["port"])


def test_the_example_lists_every_variable_with_its_default() -> None:
    lines = (ROOT / "docker" / ".env.example").read_text().splitlines()
    shown = dict(line.lstrip("#").split("=", 1) for line in lines if re.match(r"#?[A-Z_]+=", line))
    variables = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", COMPOSE))
    secrets = {name for name, default in variables.items() if default == "docker/no-secret"}
    assert shown.keys() == variables.keys()
    assert {name: shown[name] for name in variables.keys() - secrets} == {
        name: default for name, default in variables.items() if name not in secrets
    }
    assert (ROOT / "docker" / "no-secret").read_bytes() == b""
