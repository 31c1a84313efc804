"""Finds how many cores and how much memory this process may use on a machine or in a container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use.

    The result is the smaller of two numbers: the cores in the CPU affinity of the process, and its CPU quota, rounded
    up to a whole number. `docker run --cpus 1.5` sets a quota of 1.5 cores, but does not change the affinity, which
    contains all cores of the host.
    """
    usable = _affinity()
    quota = cpu_quota(root)
    return usable if quota is None else min(usable, max(math.ceil(quota), 1))


def thread_defaults(root: Path = Path("/")) -> dict[str, str]:
    """Return environment variables that limit the threads of libraries to the CPU quota.

    By default, OpenMP, OpenBLAS and TensorFlow start a thread for each core of the affinity. OpenBLAS obeys
    OMP_NUM_THREADS too. The result is empty if there is no quota, or if the quota allows all cores of the affinity.
    """
    threads = cores(root)
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return dict.fromkeys(names, str(threads)) if threads < _affinity() else {}


def memory(root: Path = Path("/")) -> int:
    """Return how many bytes of memory this process may use.

    The result is the memory of the machine, or the limit of the container if this limit is smaller.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, memory_limit(root) or physical)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota, in cores, of this process's control groups; None without a quota.

    `root` is the folder that contains `proc` and `sys`. Both versions of control groups are read.
    """
    quotas = []
    for folder in _groups(root, "cpu"):
        limit, _, period = _read(folder / "cpu.max").partition(" ")  # version 2: "50000 100000", or "max 100000"
        limit, period = limit or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        if limit.isdecimal() and period.isdecimal() and int(period):  # version 1 without a quota: -1
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the memory limit, in bytes, of this process's control groups; None if no limit is found.

    `root` is the folder that contains `proc` and `sys`. Version 1 of control groups always reports a number. If there
    is no limit, this number is larger than the memory of any machine.
    """
    texts = [_read(folder / name) for folder in _groups(root, "memory") for name in _MEMORY_FILES]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


_MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")  # files of version 2 and of version 1


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of the groups that contain it. Each group limits the process.

    In a container, /proc/self/cgroup may contain the path of the group on the host. In this case, only the last folder
    that is yielded exists. It is the folder of the container's group.
    Sources: man 7 cgroups; Documentation/admin-guide/cgroup-v2.rst and cgroup-v1 of the Linux kernel.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounted = root / "sys/fs/cgroup"
        if controllers:  # version 1 has a tree for each controller
            if controller not in controllers.split(","):
                continue
            mounted = mounted / controller
        group = PurePosixPath(path.lstrip("/"))
        yield from (mounted / above for above in (group, *group.parents))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
