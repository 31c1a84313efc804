import os
import subprocess
import sys

import pytest

from dgmd_pipeline.workflow import machine

V2 = "0::/kubepods/pod1/container\n"
V1 = "12:cpu,cpuacct:/docker/1234\n9:memory:/docker/1234\n4:cpuset:/docker/1234\n0::/\n"
V1_UNLIMITED = "9223372036854771712"


def machine_with(root, groups, files):
    """Write /proc/self/cgroup and files below /sys/fs/cgroup, into a folder."""
    for path, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{path}": files[path] for path in files}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cpus", "memory"),
    [
        # In a container, its own group is the root of what is mounted.
        ("0::/\n", {"cpu.max": "50000 100000", "memory.max": "1500000000"}, 0.5, 1_500_000_000),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/\n", {}, None, None),
        ("", {}, None, None),
        # On the host, or where the container sees the host's path.
        (V2, {"kubepods/pod1/container/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5, None),
        (V2, {"kubepods/cpu.max": "400000 100000", "kubepods/pod1/cpu.max": "200000 100000"}, 2, None),
        (V2, {"kubepods/memory.max": "8000000000", "kubepods/pod1/container/memory.max": "max"}, None, 8_000_000_000),
        (V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2, None),
        (V1, {"cpu/docker/1234/cpu.cfs_quota_us": "-1", "cpu/docker/1234/cpu.cfs_period_us": "100000"}, None, None),
        (V1, {"memory/docker/1234/memory.limit_in_bytes": "1000", "memory/memory.limit_in_bytes": V1_UNLIMITED}, None,
         1000),
        (V1, {"memory/memory.limit_in_bytes": "2000"}, None, 2000),
    ],
)  # fmt: skip
def test_quota_and_memory_limit_are_those_of_the_control_groups(groups, files, cpus, memory, tmp_path):
    root = machine_with(tmp_path, groups, files)
    assert machine.cpu_quota(root) == cpus
    assert machine.memory_limit(root) == memory


def test_a_quota_is_rounded_up_and_allows_no_more_than_the_affinity(tmp_path):
    affinity = len(os.sched_getaffinity(0))
    for quota, cores in (("50000 100000", 1), ("100000 100000", 1), (f"{affinity * 2}00000 100000", affinity)):
        assert machine.cores(machine_with(tmp_path, "0::/", {"cpu.max": quota})) == cores
    assert machine.cores(tmp_path / "none") == affinity


def test_the_limit_of_a_control_group_counts_only_below_the_memory_of_the_machine(tmp_path):
    physical = machine.memory(tmp_path)
    assert machine.memory(machine_with(tmp_path, V1, {"memory/memory.limit_in_bytes": V1_UNLIMITED})) == physical
    assert machine.memory(machine_with(tmp_path, V1, {"memory/memory.limit_in_bytes": "1000000000"})) == 1_000_000_000


def test_blas_starts_as_many_threads_as_the_quota_allows(tmp_path):
    assert machine.thread_defaults(tmp_path) == {}
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("with one core, a quota changes nothing")
    root = machine_with(tmp_path, "0::/", {"cpu.max": "50000 100000"})
    code = "import numpy, threadpoolctl; print([pool['num_threads'] for pool in threadpoolctl.threadpool_info()])"
    environment = {**os.environ, **machine.thread_defaults(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[1]\n", done.stderr
