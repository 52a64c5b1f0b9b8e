"""Processes as the soak looks at them, and one that is killed with a Node of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

GONE_S = 5.0
"""Within it everything of a killed parent is gone: a bound on liveness under load, not a measurement."""

PARENT = """
import lifl, numpy as np, time
node = lifl.Node("16MiB", workers=2)
round_ = node.open_round(lifl.TensorSpec.from_arrays({"w": np.zeros(8)}), 9)
round_.submit({"w": np.zeros(8)})
print(node._supervisor.spawner.pid, *node.pids(), flush=True)
time.sleep(60)
"""


def children_of(pid: int) -> list[int]:
    """Processes whose parent this is, zombies too; none if it is gone."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found


def descriptors() -> dict[str, int]:
    """The number of this process's descriptors of each kind: a kind that drifts says more than a sum."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of the listing itself
            name = os.readlink(f"/proc/self/fd/{fd}")
            found[f"descriptors, {re.sub('[0-9]+', '', name)}"] += 1
    return dict(found)


def private_bytes(pid: int) -> int:
    """Memory that is the process's own: the arena, which all share, does not count."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


def kill_a_parent() -> None:
    """A process with a Node of its own is killed in the middle of a round: nothing of it is left."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    if len(pids) != 3:
        raise AssertionError("the process that was to be killed did not start: see its output above")
    end = time.monotonic() + GONE_S
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        if time.monotonic() > end:
            raise AssertionError(f"of the spawner and workers {pids} of a killed parent, {left} live on")
        time.sleep(0.01)
