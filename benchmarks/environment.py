"""What a benchmark ran on, and where its figures go: every results file states the same facts."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions, commit, date and command of this process."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *_relative_arguments()]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "diffusers", "triton", "mamba-ssm")},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def write_results(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Write `results` beside the environment as `<folder>/<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")
    return path


def _relative_arguments() -> list[str]:
    script = Path(sys.argv[0])
    root = RESULTS.parent.parent
    name = str(script.resolve().relative_to(root)) if script.resolve().is_relative_to(root) else script.name
    return [name, *sys.argv[1:]]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    return _output("git", "rev-parse", "--short", "HEAD")


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
