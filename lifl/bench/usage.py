"""CPU time: what this process and its workers took, and what everybody else on the machine took meanwhile.

Owns nothing; reads ``/proc``.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
QUIET = 0.1
"""What part of the machine others may take for it to count as quiet."""
LOOK_S = 0.1


def own_s() -> float:
    """CPU seconds of this process, of its living descendants, and of no one else."""
    spent = 0.0
    for pid in _descendants(os.getpid()):
        with suppress(OSError):  # it ended meanwhile
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
    """CPU seconds of everybody on this machine, and of other machines on its cores, since it was started.

    In ticks of ``TICKS_PER_S``, for each core: of a short time it says little.
    """
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def wait_for_quiet(patience_s: float, cores: int) -> bool:
    """Waits until this machine has hardly anything to do, at most `patience_s`; true if it is so."""
    deadline = time.monotonic() + patience_s
    while True:
        begin, busy_s = time.monotonic(), machine_s()
        time.sleep(LOOK_S)
        if machine_s() - busy_s <= QUIET * cores * (time.monotonic() - begin):
            return True
        if time.monotonic() > deadline:
            return False
