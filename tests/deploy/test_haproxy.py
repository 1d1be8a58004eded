"""docker/haproxy: if this fails, all clients behind HAProxy share one client's limit, or choose whose.

How it spreads, and what it does when servers end, is tested in tests/benchmarks/test_replicas.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.replicas import balanced
from service.app import create_app
from service.settings import Settings
from tests.fakes import fake_pipeline
from tests.servers import serving


@pytest.fixture
def url() -> Iterator[str]:
    """HAProxy before a server that makes one image a minute for each client."""
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("haproxy is not installed")
    settings = Settings(rate_limit_images_per_minute=1, max_images_per_request=1)
    app = create_app(settings, (fake_pipeline(),))
    with serving(app) as server, balanced(Path(program), {"one": server}) as (proxy, _):
        yield proxy


def ask(url: str, address: str, forwarded_for: str | None = None) -> int:
    """The status of a request from this address of the loopback interface, which may name another."""
    headers = {} if forwarded_for is None else {"X-Forwarded-For": forwarded_for}
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, trust_env=False) as client:
        return client.post(f"{url}/generate", json={"class_id": 0, "steps": 1}, headers=headers).status_code


def test_a_clients_limit_is_its_own_whatever_it_says_of_itself(url: str) -> None:
    assert [ask(url, "127.0.0.2"), ask(url, "127.0.0.2")] == [200, 429]
    assert ask(url, "127.0.0.2", "203.0.113.9") == 429
    assert ask(url, "127.0.0.3", "127.0.0.2") == 200
