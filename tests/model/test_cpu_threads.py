"""model/cpu_threads.py: if this fails, a container on 2 cores of 64 starts 64 threads and crawls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.cpu_threads import available_cpu_threads


@pytest.fixture(autouse=True)
def _host_with_64_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        pytest.param("200000 100000", 2, id="two-cores"),
        pytest.param("150000 100000", 1, id="rounded-down"),
        pytest.param("10000 100000", 1, id="at-least-one"),
        pytest.param("max 100000", 64, id="no-limit"),
        pytest.param("nonsense", 64, id="unreadable"),
    ],
)
def test_available_cpu_threads_follows_cgroup_v2(tmp_path: Path, quota: str, threads: int) -> None:
    write(tmp_path / "self", "0::/\n")
    write(tmp_path / "cgroup/cpu.max", quota + "\n")
    assert available_cpu_threads(tmp_path / "cgroup", tmp_path / "self") == threads


def test_available_cpu_threads_takes_the_tightest_parent_of_v2(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/pod/container\n")
    write(tmp_path / "cgroup/pod/cpu.max", "300000 100000\n")
    write(tmp_path / "cgroup/pod/container/cpu.max", "800000 100000\n")
    assert available_cpu_threads(tmp_path / "cgroup", tmp_path / "self") == 3


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_available_cpu_threads_follows_cgroup_v1(tmp_path: Path, mount: str) -> None:
    write(tmp_path / "self", "5:memory:/a\n4:cpu,cpuacct:/docker/not-visible-in-here\n")
    write(tmp_path / f"cgroup/{mount}/cpu.cfs_quota_us", "400000\n")
    write(tmp_path / f"cgroup/{mount}/cpu.cfs_period_us", "100000\n")
    assert available_cpu_threads(tmp_path / "cgroup", tmp_path / "self") == 4


def test_available_cpu_threads_of_v1_without_quota(tmp_path: Path) -> None:
    write(tmp_path / "self", "1:cpu:/\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert available_cpu_threads(tmp_path / "cgroup", tmp_path / "self") == 64


def test_available_cpu_threads_obeys_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert available_cpu_threads(tmp_path / "none", tmp_path / "none") == 3
