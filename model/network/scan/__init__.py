"""Selective scan behind one signature (`reference.selective_scan`), and the choice between its backends.

A backend is a value that whoever loads a network passes to it; the network never chooses. The choice is made
once, here, by asking what the device and the installed packages can do, and it is reported by name wherever a
model is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.network.scan import mamba_cuda, reference, triton_scan, vectorized
from model.network.scan.paths import scan_paths

__all__ = ["SCAN_BACKENDS", "ScanBackend", "resolve_scan_backend", "scan_paths"]

SelectiveScan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SCAN_BACKENDS: tuple[str, ...] = ("reference", "vectorized", "mamba_cuda", "triton")


@dataclass(frozen=True)
class ScanBackend:
    """A selective scan and the name it is reported under.

    `kernels`: whether the rest of a block runs on Triton's kernels too, rather than on torch's.
    """

    name: str
    selective_scan: SelectiveScan
    kernels: bool = False


def resolve_scan_backend(name: str = "auto", device: torch.device | str = "cpu") -> ScanBackend:
    """The backend called `name`; "auto" takes the fastest that `device` can run.

    Raises ValueError for an unknown name, and for a backend that this machine cannot run, saying what it
    needs.
    """
    if name == "auto":
        name = _fastest_backend(device)
    if name == "reference":
        return ScanBackend(name, reference.selective_scan)
    if name == "vectorized":
        return ScanBackend(name, vectorized.selective_scan)
    if name == "mamba_cuda":
        if not mamba_cuda.is_available(device):
            raise ValueError(
                "scan_backend: 'mamba_cuda' given; it needs a CUDA device and the package mamba-ssm"
            )
        return ScanBackend(name, mamba_cuda.selective_scan)
    if name == "triton":
        if not triton_scan.is_available(device):
            raise ValueError("scan_backend: 'triton' given; it needs a CUDA device and the package triton")
        return ScanBackend(name, triton_scan.selective_scan, kernels=True)
    raise ValueError(f"scan_backend: {name!r} given; auto or one of {', '.join(SCAN_BACKENDS)} is accepted")


def _fastest_backend(device: torch.device | str) -> str:
    if torch.device(device).type != "cuda":
        return "vectorized"
    if triton_scan.is_available(device):
        return "triton"
    return "mamba_cuda" if mamba_cuda.is_available(device) else "vectorized"
