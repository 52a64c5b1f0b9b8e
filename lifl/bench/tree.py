"""A process and all its descendants: their CPU time and their memory.

Owns nothing; reads ``/proc``.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PSS = re.compile(rb"^Pss: *([0-9]+) kB", re.MULTILINE)
LOOKS = 5
LOOKS_PER_SEARCH = 5
"""The memory log searches for processes at every fifth look, because a search takes as long as a look."""


@attrs.frozen
class Process:
    """A process as in ``/proc/PID/stat``; ``ticks`` include those of dead descendants that it has waited for."""

    name: str
    parent: int
    ticks: int


def _processes() -> dict[int, Process]:
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # the process ended meanwhile
            head, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")
            fields = rest.split()
            found[int(pid)] = Process(head.partition(" (")[2], int(fields[1]), sum(map(int, fields[11:15])))
    return found


def _tree(root: int) -> dict[int, Process]:
    processes = _processes()
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        if pid in processes:
            found[pid] = processes[pid]
            todo += children.get(pid, [])
    return found


def cpu_s(root: int) -> dict[str, float]:
    """CPU seconds of `root` and its descendants, dead ones included, by the processes' names.

    The kernel counts in ticks of 10 ms. The CPU time of a dead process is added to its parent's; it is lost only if the
    parent has ended too, or never waits for its children.
    """
    for _ in range(LOOKS):
        tree = _tree(root)
        # A process that ended between the reads of two files would be counted twice, or not at all.
        if _tree(root).keys() == tree.keys():
            break
    spent: Counter[str] = Counter()
    for process in tree.values():
        spent[process.name] += process.ticks
    return {name: ticks / TICKS_PER_S for name, ticks in spent.items()}


def descendants_cpu_s(root: int, without: tuple[str, ...]) -> float:
    """CPU seconds of the living descendants of `root`, except processes named in `without` and their descendants."""
    processes = _tree(root)
    todo = [root]
    ticks = 0
    while todo:
        pid = todo.pop()
        below = [child for child, process in processes.items() if process.parent == pid and process.name not in without]
        ticks += sum(processes[child].ticks for child in below)
        todo += below
    return ticks / TICKS_PER_S


def pss_bytes(root: int) -> int:
    """Memory of `root` and its descendants; memory that several of them share is counted once."""
    return _pss_bytes(_tree(root))


def _pss_bytes(pids: Iterable[int]) -> int:
    kilobytes = 0
    for pid in pids:
        with suppress(OSError):
            match = PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
            kilobytes += int(match[1]) if match else 0
    return kilobytes * 1024


class MemoryLog:
    """`with MemoryLog(pid) as log:` records the memory of a process tree, every `every_s`, until the block ends.

    A thread reads the memory; the block starts and ends it. To read some GB takes the kernel milliseconds, and the
    thread reads for at most a tenth of the time.
    """

    def __init__(self, root: int, every_s: float = 0.05) -> None:
        self.looks: list[tuple[float, int]] = []
        self._root = root
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def peak_bytes(self, begin_s: float, end_s: float) -> int:
        """The largest recorded memory between two times of CLOCK_MONOTONIC; 0 if there is no record."""
        return max((nbytes for at, nbytes in self.looks if begin_s <= at <= end_s), default=0)

    def _watch(self) -> None:
        took_s = 0.0
        pids: list[int] = []
        number = 0
        while not self._stop.wait(max(self._every_s - took_s, 9 * took_s)):
            begin = time.monotonic()
            if number % LOOKS_PER_SEARCH == 0:
                pids = list(_tree(self._root))
            self.looks.append((begin, _pss_bytes(pids)))
            took_s = time.monotonic() - begin
            number += 1
