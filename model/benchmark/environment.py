"""What a benchmark ran on, and where its figures go: every results file states the same facts."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from model.whole_file import write_json

__all__ = ["RESULTS", "device_slug", "environment", "write_results"]

_ROOT = Path(__file__).resolve().parents[2]
_IN_CHECKOUT = (_ROOT / "benchmarks" / "results").is_dir()

RESULTS = _ROOT / "benchmarks" / "results" if _IN_CHECKOUT else Path("benchmark-results")
"""The default folder: the repository's own in a checkout, a folder of the working directory elsewhere."""

_PACKAGES = ("lamamba", "torch", "diffusers", "triton", "mamba-ssm")


def environment() -> dict[str, Any]:
    """Device, versions, commit, date and command of this process."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
        "commit": _output("git", "rev-parse", "--short", "HEAD") if _IN_CHECKOUT else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def device_slug(device: torch.device) -> str:
    """A short name for file names: "h100" for an NVIDIA H100 80GB HBM3, "cpu" for a CPU."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    model = re.search(r"\b[A-Z]{1,3}\d{2,4}[A-Z]*\b", name)
    return (model.group() if model else re.sub(r"\W+", "-", name)).lower()


def write_results(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Write `results` beside the environment as `<folder>/<name>.json`."""
    return write_json(folder / f"{name}.json", {"environment": environment(), "results": results})


def _command() -> str:
    script = Path(sys.argv[0])
    if script.suffix != ".py" or not script.resolve().is_relative_to(_ROOT):
        return " ".join([script.name, *sys.argv[1:]])
    relative = script.resolve().relative_to(_ROOT)
    if relative.parts[0] == "benchmarks":
        return " ".join(["python", str(relative), *sys.argv[1:]])
    return " ".join(["python", "-m", ".".join(relative.with_suffix("").parts), *sys.argv[1:]])


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
