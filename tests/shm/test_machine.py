"""The limits of a process, from made-up control groups of every kind, and from real ones where root can make them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lifl.shm import machine

GIB = 2**30
V1_NONE = 9_223_372_036_854_771_712
"""Version 1's way to say that there is no limit."""

Files = dict[str, dict[str, str]]
Made = Callable[[str, str, Files], None]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes a machine of 64 GiB: /proc/self/cgroup, /proc/self/mountinfo, and folders with their files."""

    def make(cgroup: str, mountinfo: str, files: Files) -> None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable:   {60 * 2**20} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        (tmp_path / "proc/self/mountinfo").write_text(mountinfo.format(at=tmp_path))
        for folder, texts in files.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (tmp_path / folder / name).write_text(text)
        monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
        real = machine.groups
        monkeypatch.setattr(machine, "groups", lambda controller: real(controller, tmp_path / "proc"))

    return make


V2 = "24 23 0:28 {root} {{at}}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 {root} {{at}}/cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} {{at}}/cg/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / {{at}}/cg/unified rw - cgroup2 cgroup2 rw\n"
)


def stat(inactive: int, active: int = 0, prefix: str = "") -> str:
    """A memory.stat, in short; shared memory counts as file there, and is not reclaimable."""
    return f"anon 5\nfile {inactive + active + GIB}\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"


def test_without_control_groups(made: Made) -> None:
    """The machine's."""
    made("", "", {})
    assert (machine.limit_bytes(), machine.available_bytes()) == (None, 60 * GIB)
    assert machine.cpu_quota() is None
    assert machine.cores() == len(os.sched_getaffinity(0))


def test_nested_groups_of_version_2(made: Made) -> None:
    """The least of all groups up to the root; the one in the middle holds here."""
    group = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{GIB}\n", "cpu.max": "max 100000\n"}
    files = {
        "cg": {},
        "cg/outer.slice": {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n", "cpu.max": "150000 100000\n"},
        "cg/outer.slice/mine": group,
    }
    made("0::/outer.slice/mine\n", V2.format(root="/"), files)
    assert (machine.limit_bytes(), machine.available_bytes()) == (2 * GIB, GIB)
    assert machine.cpu_quota() == 1.5
    assert machine.cores() == min(2, len(os.sched_getaffinity(0)))


def test_page_cache_counts_as_free(made: Made) -> None:
    """A group that is full of it has room; shared memory is not cache, whatever memory.stat calls it."""
    files = {
        "cg/a": {"memory.max": f"{2 * GIB}", "memory.current": f"{2 * GIB}", "memory.stat": stat(GIB // 2, GIB // 4)}
    }
    made("0::/a\n", V2.format(root="/"), files)
    assert machine.available_bytes() == 3 * GIB // 4


def test_groups_of_version_1(made: Made) -> None:
    """Each controller has a hierarchy of its own; an enormous number is no limit."""
    files = {
        "cg/memory": {"memory.limit_in_bytes": f"{V1_NONE}\n", "memory.usage_in_bytes": "1\n"},
        "cg/memory/a": {"memory.limit_in_bytes": f"{GIB}\n", "memory.usage_in_bytes": f"{GIB}\n"},
        "cg/memory/a/b": {"memory.limit_in_bytes": f"{V1_NONE}\n", "memory.usage_in_bytes": "1\n"},
        "cg/cpu/x": {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"},
        "cg/cpu": {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"},
        "cg/unified": {},
    }
    files["cg/memory/a"]["memory.stat"] = stat(GIB // 4, prefix="total_")
    made("5:memory:/a/b\n2:cpu,cpuacct:/x\n0::/\n", V1.format(root="/"), files)
    assert (machine.limit_bytes(), machine.available_bytes()) == (GIB, GIB // 4)
    assert (machine.cpu_quota(), machine.cores()) == (0.5, 1)


@pytest.mark.parametrize(
    ("cgroup", "root"),
    [
        ("0::/\n", "/"),  # a namespace: the group is the root
        ("0::/docker/123\n", "/docker/123"),  # no namespace, and the group alone is mounted
        ("0::/../../other\n", "/"),  # moved out of the namespace's root
        ("0::/docker/123/gone\n", "/docker/123"),
    ],
)
def test_in_a_container(made: Made, cgroup: str, root: str) -> None:
    """The mount is the container's group."""
    made(cgroup, V2.format(root=root), {"cg": {"memory.max": f"{GIB}\n", "memory.current": "0\n"}})
    assert machine.limit_bytes() == machine.available_bytes() == GIB


def test_files_that_say_nonsense(made: Made) -> None:
    """They bound nothing."""
    files = {"cg/a": {"memory.max": "\n", "memory.current": "x", "memory.stat": "1 2 3\n", "cpu.max": "1"}}
    made("0::/a\n", V2.format(root="/"), files)
    assert machine.limit_bytes() is None
    assert machine.cpu_quota() is None


def test_lines_that_say_nonsense(made: Made) -> None:
    """Those of the kernel beside them hold."""
    nonsense = "\n1\n1 2 3 /\n24 23 0:28 / /x rw\n25 23 0:28 / /x rw - cgroup2\n"
    files = {"cg/a": {"memory.max": f"{GIB}\n", "memory.current": "0\n"}}
    made("\nnonsense\n1:2\n0::/a\n", nonsense + V2.format(root="/"), files)
    assert machine.limit_bytes() == GIB


# ---------------------------------------------------------------- real groups


CODE = """
import json, lifl
from lifl.shm import machine
with lifl.Node() as node:
    print(json.dumps([machine.limit_bytes(), machine.cpu_quota(), node.workers, node.arena.block_bytes]))
"""


@contextlib.contextmanager
def group(controller: str, name: str, value: str) -> Iterator[Path]:
    """A control group of version 1 with one limit; skips where there is none."""
    outer = Path(f"/sys/fs/cgroup/{controller}/lifl-tests-{os.getpid()}")
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / name).write_text(value)
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        yield inner
    finally:
        end = time.monotonic() + 30
        for folder in (inner, outer):
            while True:  # the kernel lets go of a group a moment after its last process
                try:
                    folder.rmdir()
                    break
                except OSError:
                    assert time.monotonic() < end
                    time.sleep(0.05)


def inside(path: Path) -> tuple[int | None, float | None, int, int]:
    """A default Node of a process that is in a group: limits, workers, and the arena's bytes."""
    command = f"echo $$ > {path}/cgroup.procs && exec '{sys.executable}' -c '{CODE}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    limit, quota, workers, nbytes = json.loads(done.stdout)
    return limit, quota, workers, nbytes


def test_a_node_in_a_group_with_little_memory() -> None:
    """The outer group's limit holds: the arena is a quarter of it, instead of a process that the kernel kills."""
    with group("memory", "memory.limit_in_bytes", str(GIB)) as path:
        limit, _, _, nbytes = inside(path)
    assert limit == GIB
    assert nbytes <= GIB // 4


def test_a_node_in_a_group_with_half_a_core() -> None:
    """One worker, not one for each core."""
    with group("cpu", "cpu.cfs_quota_us", "50000") as path:
        _, quota, workers, _ = inside(path)
    assert (quota, workers) == (0.5, 1)
