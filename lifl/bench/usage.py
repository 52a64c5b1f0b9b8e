"""CPU time of this process and its workers, and of all other processes on the machine meanwhile.

Owns nothing; reads ``/proc``.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
QUIET = 0.1
"""The largest share of the machine that others may use for it to count as quiet."""
LOOK_S = 0.1


def own_s() -> float:
    """CPU seconds of this process and of its living descendants."""
    spent = 0.0
    for pid in _descendants(os.getpid()):
        with suppress(OSError):  # the process ended meanwhile
            spent += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    return spent + time.process_time()


def _descendants(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found


def machine_s() -> float:
    """CPU seconds of all processes, and of other virtual machines on its cores, since this machine was started.

    The kernel counts in ticks of ``TICKS_PER_S`` for each core, which is coarse for short times.
    """
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def wait_for_quiet(patience_s: float, cores: int) -> bool:
    """Waits until this machine is almost idle, at most `patience_s` seconds; true if it is."""
    deadline = time.monotonic() + patience_s
    while True:
        begin, busy_s = time.monotonic(), machine_s()
        time.sleep(LOOK_S)
        if machine_s() - busy_s <= QUIET * cores * (time.monotonic() - begin):
            return True
        if time.monotonic() > deadline:
            return False
