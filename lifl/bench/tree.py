"""A process and all its descendants: the CPU time that they took and the memory that they have.

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
"""To find out which processes there are takes as long as to look at them."""


@attrs.frozen
class Process:
    """One line of ``/proc/PID/stat``; ``ticks`` are its own and those of the descendants that it has waited for."""

    name: str
    parent: int
    ticks: int


def _processes() -> dict[int, Process]:
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ended meanwhile
            head, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")
            fields = rest.split()
            found[int(pid)] = Process(head.partition(" (")[2], int(fields[1]), sum(map(int, fields[11:15])))
    return found


def _tree(root: int) -> dict[int, Process]:
    everyone = _processes()
    children: dict[int, list[int]] = {}
    for pid, process in everyone.items():
        children.setdefault(process.parent, []).append(pid)
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        if pid in everyone:
            found[pid] = everyone[pid]
            todo += children.get(pid, [])
    return found


def cpu_s(root: int) -> dict[str, float]:
    """CPU seconds of `root` and its descendants, dead ones included, by the processes' names.

    The kernel counts in ticks of 10 ms. What a dead one took is its parent's; lost are only those whose parent has
    gone too, or never waits for its children.
    """
    for _ in range(LOOKS):
        tree = _tree(root)
        # One that ended between two reads would be counted twice, or not at all.
        if _tree(root).keys() == tree.keys():
            break
    spent: Counter[str] = Counter()
    for process in tree.values():
        spent[process.name] += process.ticks
    return {name: ticks / TICKS_PER_S for name, ticks in spent.items()}


def descendants_cpu_s(root: int, without: tuple[str, ...]) -> float:
    """CPU seconds of a process's living descendants, those of the names `without` and their own left out."""
    everyone, todo, ticks = _tree(root), [root], 0
    while todo:
        pid = todo.pop()
        below = [child for child, process in everyone.items() if process.parent == pid and process.name not in without]
        ticks += sum(everyone[child].ticks for child in below)
        todo += below
    return ticks / TICKS_PER_S


def pss_bytes(root: int) -> int:
    """Memory of `root` and its descendants; what several processes share is counted once, shared memory too."""
    return _pss_bytes(_tree(root))


def _pss_bytes(pids: Iterable[int]) -> int:
    kilobytes = 0
    for pid in pids:
        with suppress(OSError):
            match = PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
            kilobytes += int(match[1]) if match else 0
    return kilobytes * 1024


class MemoryLog:
    """`with MemoryLog(pid) as log:` the tree's memory, looked at every `every_s` by a thread, until the block ends.

    A look at some GB takes the kernel milliseconds; it never looks for more than a tenth of the time.
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
        """The most between two times of CLOCK_MONOTONIC; 0 if it was not looked at."""
        return max((nbytes for at, nbytes in self.looks if begin_s <= at <= end_s), default=0)

    def _watch(self) -> None:
        took_s, pids, number = 0.0, list[int](), 0
        while not self._stop.wait(max(self._every_s - took_s, 9 * took_s)):
            begin = time.monotonic()
            if number % LOOKS_PER_SEARCH == 0:
                pids = list(_tree(self._root))
            self.looks.append((begin, _pss_bytes(pids)))
            took_s = time.monotonic() - begin
            number += 1
