"""How many CPU threads this process may really use.

In a container `os.cpu_count()` is the host's: 64 threads on a quota of 2 cores are throttled most of the
time. What counts is the smallest of: the process' affinity mask, and the quota of its cgroup and of every
cgroup above it,
    cgroup v2   cpu.max            "QUOTA PERIOD", or "max PERIOD" for none
    cgroup v1   cpu.cfs_quota_us / cpu.cfs_period_us, quota -1 for none
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

__all__ = ["available_cpu_threads"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpu_threads(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Threads that may run at once, at least 1.

    A quota is rounded down (1.5 cores: 1 thread): a thread more would stop all of them for a part of each
    period, and the rest is of use to the event loop.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _cgroup_folders(root, membership)]
    cores = min([float(affinity), *(quota for quota in quotas if quota is not None)])
    return max(1, math.floor(cores))


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    """The folders of this process' cgroups that govern CPU time, innermost first, with all above them.

    A container sees its own cgroup at the mount's root, whatever path the host calls it: a path that does
    not exist below `root` is no reason to give up, only to look at its parents.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [root, root / "cpu"]
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        for mount in mounts:
            relative = PurePosixPath(path.strip()).relative_to("/")
            folders += [mount / relative, *(mount / parent for parent in relative.parents), mount]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores that a cgroup folder allows, or None where it sets no limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        if quota == "max" or int(quota) <= 0:
            return None
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such controller, or a file of another form: no limit that we can read
        return None
