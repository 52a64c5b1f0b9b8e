"""Virtual time: events, and machines whose jobs share their cores and their memory bus.

Knows nothing of rounds. A job has the seconds that one core needs for it alone; its time among other jobs follows from
:meth:`Machine.rates`. All jobs of a kind proceed at the same rate. So a job ends when the kind's clock, which runs at
that rate, has moved by the job's seconds: an event costs O(log jobs).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any

CPU, MEMORY = 0, 1
"""Kinds of jobs: one needs a core, or a core and the memory bus."""

Done = Callable[[], object]


class Machine:
    """Cores and a memory bus, and the jobs that share them.

    Parameters
    ----------
    cores : int
        c.
    parallel : float
        P, the memory-bound work that the bus carries, in cores: 1 to c.
    """

    __slots__ = ("_clocks", "_jobs", "_now", "_rates", "cores", "cpu_s", "parallel", "version")

    def __init__(self, cores: int, parallel: float) -> None:
        self.cores, self.parallel = cores, min(max(1.0, parallel), float(cores))
        self.cpu_s = 0.0
        self.version = 0
        self._now = 0.0
        self._clocks = [0.0, 0.0]
        self._rates = [1.0, 1.0]
        self._jobs: tuple[list[tuple[float, int, Done]], list[tuple[float, int, Done]]] = ([], [])

    def rates(self) -> list[float]:
        """The rate of a job of each kind, as a part of its rate alone.

        With n jobs on c cores, m of which need the bus: ``min(1, c / n)`` for a job that needs a core, and
        ``min(1, c / n, P / m)`` for a job that needs the bus too.
        """
        m = len(self._jobs[MEMORY])
        n = m + len(self._jobs[CPU])
        share = 1.0 if n <= self.cores else self.cores / n
        return [share, share if m * share <= self.parallel else self.parallel / m]

    def move_to(self, now: float) -> None:
        """Lets time pass. A job that waits for the bus keeps its core, so ``cpu_s`` grows by min(n, c) a second."""
        passed = now - self._now
        if passed > 0:
            cpu, memory = self._jobs
            self.cpu_s += passed * min(len(cpu) + len(memory), self.cores)
            self._clocks[CPU] += passed * self._rates[CPU]
            self._clocks[MEMORY] += passed * self._rates[MEMORY]
            self._now = now

    def add(self, kind: int, seconds: float, order: int, done: Done) -> None:
        """Adds a job, from now on."""
        if not self._jobs[kind]:
            self._clocks[kind] = 0.0  # no job refers to this clock: small numbers keep their digits
        heappush(self._jobs[kind], (self._clocks[kind] + seconds, order, done))
        self._rates = self.rates()

    def next_end(self) -> tuple[float, int]:
        """The time at which the next job ends if none is added, and its kind."""
        when, which = inf, CPU
        for kind in (CPU, MEMORY):
            if jobs := self._jobs[kind]:
                end = self._now + max(0.0, jobs[0][0] - self._clocks[kind]) / self._rates[kind]
                if end < when:
                    when, which = end, kind
        return when, which

    def end_next(self) -> Done:
        """Removes the job that ends now, and returns its `done`."""
        kind = self.next_end()[1]
        end, _, done = heappop(self._jobs[kind])
        self._clocks[kind] = max(self._clocks[kind], end)
        self._rates = self.rates()
        return done


class Engine:
    """Events in the order of their times; those of one time in the order in which they were announced."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Any, int]] = []
        self._order = 0

    def at(self, time: float, action: Done) -> None:
        """Calls `action` at `time`, in seconds."""
        self._order += 1
        heappush(self._events, (time, self._order, action, -1))

    def begin(self, machine: Machine, kind: int, seconds: float, done: Done) -> None:
        """Begins a job of `seconds` of one core; `done` is called when it ends."""
        self._order += 1
        machine.move_to(self.now)
        machine.add(kind, seconds, self._order, done)
        self._expect(machine)

    def _expect(self, machine: Machine) -> None:
        machine.version += 1  # the end that was expected before is void
        end = machine.next_end()[0]
        if end < inf:
            self._order += 1
            heappush(self._events, (end, self._order, machine, machine.version))

    def run(self) -> None:
        """Runs until no event is left."""
        while self._events:
            time, _, what, version = heappop(self._events)
            if version < 0:
                self.now = time
                what()
            elif version == what.version:
                self.now = time
                what.move_to(time)
                done = what.end_next()
                self._expect(what)
                done()
