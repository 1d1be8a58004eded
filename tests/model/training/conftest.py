"""What all training runs of the tests have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from model.data.places import Places
from service.benchmark.server import free_port


@pytest.fixture(scope="package", autouse=True)
def _places_are_read_once() -> Iterator[None]:
    """Nobody changes them, and to read them takes longer than the steps of a small run."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Places, "load", functools.cache(Places.load))
        yield


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that it gives to the only process of a run."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
