"""The limits of this process: memory and cores, of the machine and of every control group that the process is in.

Owns the search for control groups: version 1, version 2 and both, nested, with or without a namespace. A limit holds
for all groups below it, so each group up to the root of its mount is asked.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

PROC = Path("/proc")
"""The folder in which the kernel shows processes and memory; tests have another."""

UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number of this size: all pages that a machine could address."""


@attrs.frozen
class Group:
    """A control group, as files in a folder.

    Attributes
    ----------
    is_v2 : bool
        The names of its files are those of version 2.
    """

    path: Path
    is_v2: bool

    def number(self, name: str) -> int | None:
        """The number in a file; None without the file, or for "max"."""
        try:
            return int((self.path / name).read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def memory(self) -> tuple[int, int] | None:
        """Bytes that its processes may have, and bytes that are left; None without a limit.

        The page cache counts as left: the kernel drops it before it ends a process for want of memory.
        """
        limit = self.number("memory.max" if self.is_v2 else "memory.limit_in_bytes")
        used = self.number("memory.current" if self.is_v2 else "memory.usage_in_bytes")
        if limit is None or limit >= UNLIMITED:
            return None
        kept = (used or 0) - self._reclaimable()
        return limit, max(0, limit - max(0, kept))

    def _reclaimable(self) -> int:
        prefix = "" if self.is_v2 else "total_"
        try:
            fields = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
            return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        except (OSError, ValueError):
            return 0

    def cores(self) -> float | None:
        """Cores' worth of time that its processes may take; None without a limit."""
        if self.is_v2:
            try:
                quota, period = map(int, (self.path / "cpu.max").read_text().split())
            except (OSError, ValueError):  # "max 100000"
                return None
        else:
            quota, period = (self.number(f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        return quota / period if quota > 0 and period > 0 else None


@functools.lru_cache(4)
def groups(controller: str, proc: Path = PROC) -> tuple[Group, ...]:
    """The groups of this process whose limits on "memory" or "cpu" hold for it, the innermost first.

    Found once: a process is moved to another group before it runs lifl, not while it does.
    """
    found: list[Group] = []
    for path, mount, root, is_v2 in _hierarchies(controller, proc):
        inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else path
        folder = mount / inside.lstrip("/")
        # In a namespace the kernel may show a path outside of the mount ("/../x"), or one that is not mounted.
        while not folder.is_dir() and folder != mount and mount in folder.parents:
            folder = folder.parent
        if ".." in folder.parts or not folder.is_dir():
            folder = mount
        found += [Group(one, is_v2) for one in (folder, *folder.parents) if one == mount or mount in one.parents]
    return tuple(found)


def _hierarchies(controller: str, proc: Path) -> Iterator[tuple[str, Path, str, bool]]:
    """For each hierarchy that may limit the controller: this process's group, the mount, its root, and the version."""
    try:
        mine = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines() if line.count(":") > 1]
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        # ID parent major:minor root mount-point options ... - type source super-options; a space is written as \040.
        fields, _, filesystem = line.partition(" - ")
        places = [*fields.split()[3:5], "", ""][:2]
        root, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), one) for one in places)
        kind, _, options = [*filesystem.split(" ", 2), "", ""][:3]
        for _, controllers, path in mine:
            is_v2 = kind == "cgroup2" and not controllers
            is_v1 = kind == "cgroup" and controller in controllers.split(",") and controller in options.split(",")
            if is_v1 or is_v2:
                yield path, Path(point), root, is_v2


def limit_bytes() -> int | None:
    """Bytes of memory that this process and its group may have at most; None if no control group bounds it."""
    limits = [found[0] for group in groups("memory") if (found := group.memory()) is not None]
    return min(limits, default=None)


def available_bytes() -> int:
    """Bytes that this process can have without swapping: the least that the machine and its groups have left."""
    fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
    left = [int(fields["MemAvailable"].split()[0]) * 1024]
    left += [found[1] for group in groups("memory") if (found := group.memory()) is not None]
    return min(left)


def cpu_quota() -> float | None:
    """Cores' worth of time that this process's control groups allow; None if they allow all."""
    return min((share for group in groups("cpu") if (share := group.cores()) is not None), default=None)


def cores() -> int:
    """Cores that this process may use: those that it may run on, or fewer if its control groups allow less time."""
    there = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return there if quota is None else max(1, min(there, math.ceil(quota)))
