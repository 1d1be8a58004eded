"""Fixtures of the diffusion tests: the default process and the authors' golden numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from model.diffusion import NoiseSchedule


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """The authors' process: 1000 linear betas."""
    return NoiseSchedule.linear()


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """Numbers made by the authors' released code; the keys are explained in the tests that use them."""
    return load_file(Path(__file__).parents[2] / "golden" / "diffusion.safetensors")
