"""What the tests of the Triton kernels beside the scan share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import LaMambaConfig

SMALL_NETWORK = LaMambaConfig(
    sample_size=8,
    hidden_size=8,
    num_heads=2,
    window_size=4,
    num_classes=5,
    depths=(2, 1, 1, 0),
    decoder_extra_block=False,
    vssm="vim",
)
"""With shifted windows and every kernel beside the scan, small enough for Triton's interpreter."""


def parametrize_cases(cases: dict[str, Any]) -> Any:
    """A test of each `case`, under its name."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def parametrize_dtypes(*dtypes: torch.dtype) -> Any:
    """A test of each `dtype`."""
    return pytest.mark.parametrize("dtype", dtypes, ids=str)


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """The error's norm over the expected norm."""
    value, expected = value.detach(), expected.detach()
    assert value.shape == expected.shape
    return float((value.double() - expected).norm() / expected.norm())
