"""Servers with fake models for the tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi.testclient import TestClient

from model.pipeline import LaMambaPipeline
from service.app import create_app
from service.settings import Settings
from tests.fakes import fake_pipeline

ClientFactory = Callable[..., TestClient]


@pytest.fixture
def client_of() -> Iterator[ClientFactory]:
    """Makes clients of servers, each with its own models and settings; the servers end with the test."""
    with ExitStack() as stack:

        def make(*pipelines: LaMambaPipeline, **settings: Any) -> TestClient:
            app = create_app(Settings(**settings), pipelines or (fake_pipeline(),))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of two models at 16 and 32 pixels, shared by the tests of a file that do not disturb it."""
    app = create_app(Settings(), (fake_pipeline(), fake_pipeline("fake-32", resolution=32)))
    with TestClient(app, raise_server_exceptions=False) as shared:
        yield shared
