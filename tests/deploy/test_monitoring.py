"""docker/prometheus, docker/alertmanager, docker/grafana: if this fails, nobody is told of an outage, or
dashboards stay empty.

The programs are the real ones (`make programs`); without them these tests skip.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from model.pretrained import default_model_dir
from service.app import create_app
from service.benchmark.server import free_port
from service.metrics import Metrics
from service.runtime import Runtime
from service.settings import Settings
from tests.servers import serving

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
ALERTMANAGER = ROOT / "docker" / "alertmanager"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "lamamba.json"
TIMEOUT_S = 120.0  # of what hangs: nothing takes as long, on a busy machine either

CHECKS = {  # files and the command that checks them in their folder
    "config": (PROMETHEUS, "promtool check config prometheus.yml"),
    "rules": (PROMETHEUS, "promtool check rules lamamba.rules.yml"),
    "rule tests": (PROMETHEUS, "promtool test rules lamamba.test.yml"),
    "alertmanager": (ALERTMANAGER, "amtool check-config alertmanager.yml"),
}
MISTAKES = {  # check: file, and what is written wrongly there
    "config": ("prometheus.yml", "scrape_interval", "scrape_intervall"),
    "rules": ("lamamba.rules.yml", "sum by (job) (", "sum by (job ("),
    "rule tests": ("lamamba.rules.yml", "> 14.4 * 0.01", "> 144 * 0.01"),
    "alertmanager": ("alertmanager.yml", "receiver: page", "receiver: pages"),
}


def program(name: str) -> str:
    """The path of a program. Skips the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; `make programs` installs it as root on Debian")
    return path


def checked(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    name, *arguments = command.split()
    return subprocess.run(
        [program(name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "lamamba.rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_expressions() -> list[str]:
    """What is recorded, and each alert's condition as 0 or 1 where it would give no series or one."""
    return [
        re.sub(r" (==|!=|>=|<=|>|<) ", r" \1 bool ", rule["expr"]) if "alert" in rule else rule["expr"]
        for rule in rules()
    ]


def dashboard_expressions() -> list[str]:
    """The expressions of all panels, for one service and all of its servers."""
    variables = {"$__rate_interval": "1m", "$job": "lamamba", "$instance": ".*"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    for name, value in variables.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def unknown_metrics(expressions: Iterable[str]) -> set[str]:
    """The names in the expressions that neither the service exports nor a rule records."""
    suffixes = {
        "counter": ("_total", "_created"),
        "histogram": ("_bucket", "_sum", "_count", "_created"),
        "gauge": ("",),
    }
    known = {
        family.name + suffix for family in Metrics().registry.collect() for suffix in suffixes[family.type]
    }
    known |= {rule["record"] for rule in rules() if "record" in rule}
    named = re.compile(r"(?<![\w:\"])(?:(?:job|instance):)?lamamba_\w+(?::\w+)?")
    return {name for expression in expressions for name in named.findall(expression)} - known


def without_value(url: str, expressions: Iterable[str]) -> list[str]:
    """The expressions that give no series at a Prometheus, or none with a number."""
    with httpx.Client(base_url=url, trust_env=False) as client:

        def numbers(expression: str) -> list[float]:
            answer = client.get("/api/v1/query", params={"query": expression}).json()
            return [float(series["value"][1]) for series in answer.get("data", {}).get("result", ())]

        return [text for text in expressions if not any(map(math.isfinite, numbers(text)))]


def evaluated_rules(url: str) -> list[dict[str, Any]]:
    """The rules as a Prometheus has them, with how their last evaluation went."""
    groups = httpx.get(f"{url}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


@contextmanager
def running_prometheus(target: str, folder: Path) -> Iterator[str]:
    """Prometheus with our configuration, but for what it scrapes and how often; gives its URL."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    del config["alerting"]
    service = next(job for job in config["scrape_configs"] if job["job_name"] == "lamamba")
    del service["dns_sd_configs"]
    service["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    config["scrape_configs"] = [service]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    # Before it has opened its data it answers queries with a text.
    with running([*command, "--log.level=warn"], folder) as url:
        yield url


@contextmanager
def running_alertmanager(folder: Path) -> Iterator[str]:
    """Alertmanager with our configuration; gives its URL."""
    files = [f"--config.file={ALERTMANAGER / 'alertmanager.yml'}", f"--storage.path={folder}"]
    command = [program("prometheus-alertmanager"), *files, "--cluster.listen-address="]
    with running(command, folder) as url:
        yield url


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[str]:
    """A program of Prometheus', in `folder`, once it is ready; gives its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    listen = f"--web.listen-address={url.removeprefix('http://')}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, listen], cwd=folder, stderr=log)
    try:
        wait_until(lambda: httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200)
        yield url
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def put_under_load(url: str, stop: threading.Event) -> None:
    """Requests of every kind until `stop`: images, a stream with previews, a mistake, more than may wait."""
    body = {"class_id": 3, "steps": 4}
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        while not stop.is_set():
            assert client.post("/generate", json=body).status_code == 200
            streamed = client.post(
                "/generate", json=body | {"previews": 1}, headers={"Accept": "text/event-stream"}
            )
            assert streamed.status_code == 200
            assert client.post("/generate", json=body | {"steps": 0}).status_code == 422
            assert client.post("/generate", json=body | {"num_images": 16}).status_code == 429


@pytest.fixture(scope="module")
def prometheus_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus, which scrapes a real server of the shipped model under load.

    The server has no GPU, but says of one what it would.
    """
    program("prometheus")
    app = create_app(Settings(models=(str(default_model_dir(128)),), max_queue_images=8))
    runtime: Runtime = app.state.runtime
    sizes = {"allocated": lambda: 2e9, "reserved": lambda: 4e9, "total": lambda: 8e10}
    runtime.metrics.read_gpu_memory("cuda:0", sizes)
    stop = threading.Event()
    with serving(app) as target:
        wait_until(lambda: httpx.get(f"{target}/health/ready", trust_env=False).status_code == 200)
        load = threading.Thread(target=put_under_load, args=(target, stop))
        load.start()
        try:
            with running_prometheus(target, tmp_path_factory.mktemp("prometheus")) as url:
                yield url
        finally:
            stop.set()
            load.join(TIMEOUT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; a server that does not listen yet does not meet it.

    Raises TimeoutError where it does not in time.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.parametrize("check", CHECKS)
def test_the_programs_accept_their_files(check: str) -> None:
    folder, command = CHECKS[check]
    result = checked(command, folder)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_the_programs_find_a_mistake(check: str, tmp_path: Path) -> None:
    folder, command = CHECKS[check]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    name, right, wrong = MISTAKES[check]
    text = (folder / name).read_text()
    assert right in text
    (tmp_path / name).write_text(text.replace(right, wrong))
    assert checked(command, tmp_path).returncode == 1


def test_every_expression_is_of_metrics_that_the_service_exports() -> None:
    assert unknown_metrics([*rule_expressions(), *dashboard_expressions()]) == set()
    mistakes = ["rate(lamamba_image_total[5m]) / lamamba_queue_images", "job:lamamba_images:rate6m > 0"]
    assert unknown_metrics(mistakes) == {"lamamba_image_total", "job:lamamba_images:rate6m"}


def test_the_rules_look_at_codes_and_bounds_that_there_are() -> None:
    exported = Metrics().render().decode()
    selectors = {
        (label, value)
        for rule in rules()
        for label, values in re.findall(r'\b(code|le)[=!]~?"([^"]*)"', rule["expr"])
        for value in values.split("|")
    }
    assert {label for label, _ in selectors} == {"code", "le"}
    assert [value for label, value in selectors if f'{label}="{value}"' not in exported] == []
    assert 'code="model_load_fails"' not in exported


def test_the_dashboard_is_what_its_code_writes(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    script = ROOT / "docker" / "grafana" / "dashboard.py"
    subprocess.run([sys.executable, script, tmp_path / "written.json"], check=True, timeout=TIMEOUT_S)
    assert (tmp_path / "written.json").read_text() == DASHBOARD.read_text(), "`make dashboard` writes it anew"


def test_every_alert_has_a_runbook_a_severity_and_a_unit_test() -> None:
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    tested = yaml.safe_load((PROMETHEUS / "lamamba.test.yml").read_text())["tests"]
    fired = {
        case["alertname"] for test in tested for case in test.get("alert_rule_test", ()) if case["exp_alerts"]
    }
    alerts = [rule for rule in rules() if "alert" in rule]
    for alert in alerts:
        name = alert["alert"]
        assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert name in headings
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert f"#{name.lower()})" in DASHBOARD.read_text()
    assert fired == {alert["alert"] for alert in alerts}


def test_panels_that_runbooks_name_are_there() -> None:
    _, _, runbooks = (ROOT / "docs" / "operations.md").read_text().partition("\n## Runbooks\n")
    board = json.loads(DASHBOARD.read_text())
    titles = {panel["title"] for panel in board["panels"]}
    titles |= {variable["label"] for variable in board["templating"]["list"]}
    named = set(re.findall(r'"([A-Z][^"]*)"', runbooks))
    assert len(named) > 5
    assert named <= titles


def test_a_dead_server_hides_its_own_alerts_and_no_others(tmp_path: Path) -> None:
    alerts = {  # name: labels beside it
        "LaMambaDown": {"severity": "critical", "job": "one", "instance": "a"},
        "LaMambaNoImages": {"severity": "critical", "job": "one", "instance": "a"},
        "LaMambaModelNotLoaded": {"severity": "critical", "job": "one", "instance": "b"},
        "LaMambaSaturated": {"severity": "warning", "job": "one"},
        "LaMambaErrorBudgetBurn": {"severity": "critical", "job": "one"},
    }
    sent = [{"alertname": name} | labels for name, labels in alerts.items()]
    # Another service: it has no server, and one of its two kinds of the same alert is the page's.
    sent += [{"alertname": "LaMambaDown", "severity": "critical", "job": "two"}]
    sent += [{"alertname": "LaMambaQueueFull", "severity": "warning", "job": "two"}]
    for job in ("one", "three"):
        sent += [{"alertname": "LaMambaErrorBudgetBurn", "severity": "warning", "job": job}]
    with running_alertmanager(tmp_path) as url, httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.post("/api/v2/alerts", json=[{"labels": labels} for labels in sent])
        assert answer.status_code == 200

        def hidden() -> set[tuple[str, str, str]]:
            return {
                (alert["labels"]["job"], alert["labels"]["alertname"], alert["labels"]["severity"])
                for alert in client.get("/api/v2/alerts").json()
                if alert["status"]["inhibitedBy"]
            }

        explained = {
            ("one", "LaMambaNoImages", "critical"),
            ("one", "LaMambaErrorBudgetBurn", "warning"),
            ("two", "LaMambaQueueFull", "warning"),
        }
        with suppress(TimeoutError):
            wait_until(lambda: len(client.get("/api/v2/alerts").json()) == len(sent))
            wait_until(lambda: explained <= hidden())
        assert hidden() == explained


def test_under_load_every_expression_gives_a_value(prometheus_url: str) -> None:
    expressions = [*rule_expressions(), *dashboard_expressions()]
    assert len(expressions) > 50
    missing = expressions

    def nothing_is_missing() -> bool:
        nonlocal missing
        missing = without_value(prometheus_url, missing)
        return not missing

    with suppress(TimeoutError):
        wait_until(nothing_is_missing)
    assert missing == []
    evaluated: list[dict[str, Any]] = []

    def all_rules_are_well() -> bool:
        evaluated[:] = evaluated_rules(prometheus_url)
        states = {rule["name"]: rule["state"] for rule in evaluated if rule["type"] == "alerting"}
        # One scrape that takes too long makes an alert pending, and the next one takes that back.
        inactive = states["LaMambaDown"] == states["LaMambaModelNotLoaded"] == "inactive"
        return inactive and {rule["health"] for rule in evaluated} == {"ok"}

    try:
        wait_until(all_rules_are_well)
    except TimeoutError:
        pytest.fail(f"not all rules are well: {evaluated}")
    assert len(evaluated) == len(rules())
    mistakes = [
        'lamamba_queue_images{devise="cpu"}',
        "rate(lamamba_images[1m])",
        "lamamba_rows_total / 0 * 0",
    ]
    assert without_value(prometheus_url, mistakes) == mistakes
