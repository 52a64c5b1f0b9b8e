"""A node as a place of work in virtual time: its machine, its gateway, and what was done there by whom."""

from __future__ import annotations

from collections import deque
from functools import partial

import attrs

from lifl.planner.engine import MEMORY, Done, Engine, Machine


@attrs.frozen
class Span:
    """What one runtime did for a while, a bar of a Gantt picture; roles and steps as in ``lifl.report.report.Span``.

    ``runtime`` is its number on the node, None its gateway. Two steps more than there
    are: "start", and "touch", the first touch of memory by a new process.
    """

    node: str
    runtime: int | None
    role: str
    step: str
    begin_s: float
    end_s: float


class Site:
    """One node; several may share a machine.

    Parameters
    ----------
    engine : Engine
    machine : Machine
    name : str
    spans : list of Span, optional
        Where they are noted; default: nowhere.
    """

    def __init__(self, engine: Engine, machine: Machine, name: str = "", spans: list[Span] | None = None) -> None:
        self.engine, self.machine, self.name, self.spans = engine, machine, name, spans
        self._at_gateway: deque[Done] = deque()  # who is at the gateway, and who waits for it

    def work(self, runtime: int | None, role: str, step: str, seconds: float, then: Done, kind: int = MEMORY) -> None:
        """A job of `seconds` of one core, for a runtime, or for the gateway if that is None."""
        if self.spans is not None:
            then = partial(self._note, runtime, role, step, self.engine.now, then)
        self.engine.begin(self.machine, kind, seconds, then)

    def _note(self, runtime: int | None, role: str, step: str, begin_s: float, then: Done) -> None:
        assert self.spans is not None
        self.spans.append(Span(self.name, runtime, role, step, begin_s, self.engine.now))
        then()

    # ------------------------------------------------------------ the gateway takes in one update after another

    def land(self, seconds: float, then: Done) -> None:
        """An update's bytes are there: they are copied and checked when the gateway is free, then `then` is called."""
        self.enter(partial(self.work, None, "gateway", "receive", seconds, partial(self.leave, then)))

    def enter(self, begin: Done) -> None:
        """Calls `begin` when the gateway is free; it is kept until :meth:`leave`."""
        self._at_gateway.append(begin)
        if len(self._at_gateway) == 1:
            begin()

    def leave(self, then: Done) -> None:
        """The update that is at the gateway is in."""
        then()
        self._at_gateway.popleft()
        if self._at_gateway:
            self._at_gateway[0]()
