"""The facts beside figures: if this fails, results do not say what they were measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.benchmark.environment import device_slug, environment, write_results


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_cards_have_short_names(monkeypatch: pytest.MonkeyPatch, name: str, slug: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_slug(torch.device("cuda")) == slug
    assert device_slug(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("/usr/bin/lamamba", "lamamba bench model"),
        ("benchmarks/cpu.py", "python benchmarks/cpu.py bench model"),
        ("model/cli.py", "python -m model.cli bench model"),
    ],
)
def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch, script: str, command: str) -> None:
    root = Path(__file__).resolve().parents[3]
    monkeypatch.setattr("sys.argv", [str(root / script), "bench", "model"])
    assert environment()["command"] == command


def test_results_lie_beside_the_environment(tmp_path: Path) -> None:
    path = write_results("name", [1, 2], tmp_path / "new")
    content = json.loads(path.read_text())
    assert content["results"] == [1, 2]
    facts = content["environment"]
    assert {"date", "command", "commit", "python", "packages", "cpu", "threads"} <= facts.keys()
