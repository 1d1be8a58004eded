"""model/cpu_memory.py: if this fails, a third of the server's CPU time is page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from model.cpu_memory import keep_freed_memory

_FAULTS = """
import resource
import torch
from model.cpu_memory import keep_freed_memory

assert keep_freed_memory()
torch.set_num_threads(1)
x = torch.ones(2**20)
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        y = x * x + x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_step()
print(faults_of_a_step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_reuses_the_memory_of_the_step_before() -> None:
    # In a process of its own: the setting stays for life.
    result = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    # Of the 16,384 that 8 steps of two tensors of 4 MiB would cost; the system may take a page back now and
    # then.
    assert int(result.stdout) < 4_000


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
