"""A node as a place of work in virtual time: its machine, its gateway, and the spans of its workers."""

from __future__ import annotations

from collections import deque
from functools import partial

import attrs

from lifl.planner.engine import MEMORY, Done, Engine, Machine


@attrs.frozen
class Span:
    """A stretch of one worker's work; roles and steps as in ``lifl.report.entries.Span``.

    ``runtime`` is the worker's number on the node, or None for the node's gateway. There are two more steps: "start",
    and "touch", the first touch of memory by a new process.
    """

    node: str
    runtime: int | None
    role: str
    step: str
    begin_s: float
    end_s: float


class Site:
    """A node; several may share a machine.

    Parameters
    ----------
    engine : Engine
    machine : Machine
    name : str
    spans : list of Span, optional
        The list to which spans are added; default: none is noted.
    """

    def __init__(self, engine: Engine, machine: Machine, name: str = "", spans: list[Span] | None = None) -> None:
        self.engine, self.machine, self.name, self.spans = engine, machine, name, spans
        self._at_gateway: deque[Done] = deque()  # the update that is at the gateway, and those that wait

    def work(self, worker: int | None, role: str, step: str, seconds: float, then: Done, kind: int = MEMORY) -> None:
        """Begins a job of `seconds` of one core, for a worker, or for the gateway if `worker` is None."""
        if self.spans is not None:
            then = partial(self._note, worker, role, step, self.engine.now, then)
        self.engine.begin(self.machine, kind, seconds, then)

    def _note(self, worker: int | None, role: str, step: str, begin_s: float, then: Done) -> None:
        assert self.spans is not None
        self.spans.append(Span(self.name, worker, role, step, begin_s, self.engine.now))
        then()

    # ------------------------------------------------------------ the gateway lands one update after another

    def land(self, seconds: float, then: Done) -> None:
        """Copies and checks an update whose bytes are there, when the gateway is free, then calls `then`."""
        self.enter(partial(self.work, None, "gateway", "receive", seconds, partial(self.leave, then)))

    def enter(self, begin: Done) -> None:
        """Calls `begin` when the gateway is free; the gateway is taken until :meth:`leave`."""
        self._at_gateway.append(begin)
        if len(self._at_gateway) == 1:
            begin()

    def leave(self, then: Done) -> None:
        """Ends the landing of the update at the gateway: calls `then`, and begins the next."""
        then()
        self._at_gateway.popleft()
        if self._at_gateway:
            self._at_gateway[0]()
