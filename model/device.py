"""Which device a command, a pipeline or the server runs on, decided once and with a message for people."""

from __future__ import annotations

import re

import torch

__all__ = ["make_current", "resolve_device"]

_NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]{0,3}))?")


def resolve_device(name: torch.device | str | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda" or "cuda:N"); None takes CUDA where there is one, else the CPU.

    Raises ValueError for another name and for a device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if count else "cpu")
    match = _NAME.fullmatch(str(name))
    if match is None:
        raise ValueError(f"device: {str(name)!r} given; cpu, cuda or cuda:N is accepted")
    if str(name) != "cpu" and int(match.group(1) or 0) >= count:
        offered = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise ValueError(f"device: {str(name)!r} given; this machine offers {offered}")
    return torch.device(name)


def make_current(device: torch.device) -> None:
    """Have streams, graphs and kernels that name no device go to `device`; "cuda" is the current one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
