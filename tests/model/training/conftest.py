"""What all training runs of the tests have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from model.data.places import Places


@pytest.fixture(scope="package", autouse=True)
def _places_are_read_once() -> Iterator[None]:
    """Nobody changes them, and to read them takes longer than the steps of a small run."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Places, "load", functools.cache(Places.load))
        yield
