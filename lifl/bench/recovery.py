"""How long a worker's death costs: from the kill until what it held is reclaimed, and until its successor speaks.

Owns the deaths and their clock; what happens then is the Node's own work, which is only looked at. Nothing is
printed here.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import attrs
from rich.table import Table

from lifl.bench.shapes import model_spec
from lifl.errors import LiflError
from lifl.node.node import Node, cores
from lifl.planner.shape import Shape
from lifl.round.round import Round
from lifl.shm.arena import Block, State
from lifl.shm.sizes import round_bytes
from lifl.tensor import TensorSpec
from lifl.workers.supervisor import Supervisor

WAYS = {"waiting": "its updates wait (READY)", "folding": "it is folding them (READING)"}
SPANS = {
    "kill_to_seen": ("killed_ns", "seen_ns", "killed, to the agent's seeing it"),
    "seen_to_reclaimed": ("seen_ns", "reclaimed_ns", "seen, to all reclaimed or requeued"),
    "kill_to_reclaimed": ("killed_ns", "reclaimed_ns", "killed, to all reclaimed or requeued"),
    "kill_to_heard": ("killed_ns", "heard_ns", "killed, to the successor's first word"),
}
GOAL_MS = 100.0
"""What a dead worker held is to be back within, in milliseconds."""
WAIT_S = 60.0
INTO_THE_FOLD_S = 0.01
"""A worker is killed at a random moment of so many seconds after it began to fold."""


@attrs.define
class Death:
    """One worker's death: when it was killed, seen, swept and followed; and what the worker held."""

    worker: int
    killed_ns: int = 0
    seen_ns: int = 0
    reclaimed_ns: int = 0
    heard_ns: int = 0
    held: dict[State, int] = attrs.field(factory=dict)  # updates by state, when its death was seen
    left: int = 0  # updates that were still READING when all was said to be swept
    is_over: threading.Event = attrs.field(factory=threading.Event)


class WatchedNode(Node):
    """A Node whose agent writes down when it sees a death, has swept, and hears the successor."""

    def __init__(self, memory: int, workers: int) -> None:
        self.death: Death | None = None
        self.blocks: list[Block] = []  # of the round's updates
        super().__init__(memory, workers)
        assert self._supervisor is not None
        self.supervisor: Supervisor = self._supervisor
        self._start, self._heard = self.supervisor.start, self.supervisor.heard
        self.supervisor.start, self.supervisor.heard = self._after_sweep, self._on_word  # type: ignore[method-assign]

    def states(self, me: int) -> dict[State, int]:
        """How many of the updates worker `me` has in which state."""
        found: dict[State, int] = {}
        for block in self.blocks:
            generation, owner, state, _, _ = self.arena.describe(block.index)
            if (generation, owner) == (block.generation, me):
                found[state] = found.get(state, 0) + 1
        return found

    def kill(self, me: int) -> Death:
        """Kills worker `me`; returns when its successor has been heard."""
        with self.changed:
            pid = next(worker.pid for worker in self.supervisor._workers.values() if worker.number == me)
            self.death = death = Death(me)
        death.killed_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        if not death.is_over.wait(WAIT_S):
            self.check_workers()
            raise LiflError(f"worker {me} (pid {pid}) was killed and has no successor after {WAIT_S:g} s")
        if death.left:
            raise LiflError(f"{death.left} updates of the dead worker {me} were neither reclaimed nor requeued")
        return death

    def replace(self, pidfd: int) -> None:
        """Writes down when the death was seen, and what the dead one held."""
        if self.death is not None:
            self.death.seen_ns = time.monotonic_ns()
            self.death.held = self.states(self.death.worker)
        super().replace(pidfd)

    def _after_sweep(self, number: int) -> None:
        if self.death is not None:
            self.death.reclaimed_ns = time.monotonic_ns()
            self.death.left = self.states(number).get(State.READING, 0)
        self._start(number)

    def _on_word(self, number: int, has_worked: bool) -> None:
        self._heard(number, has_worked)
        death = self.death
        if death is not None and death.worker == number and death.reclaimed_ns:
            death.heard_ns = time.monotonic_ns()
            self.death = None
            death.is_over.set()


def measure_recovery(
    deaths: int = 200,
    updates: int = 8,
    workers: int = 2,
    *,
    spec: TensorSpec | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Kills workers that have `updates` updates each of a ResNet-18; the others live and fold on.

    In each round every worker is killed twice, while its updates wait and while it folds them. Every mean is checked.

    Parameters
    ----------
    deaths : int
        How many are measured of each way.
    spec : TensorSpec, optional
        Other updates than a ResNet-18's; some tensor is float32, and all can hold 2**15.

    Returns
    -------
    dict
        ``cores``, ``workers``, ``updates`` (each worker's), ``update_bytes``, ``goal_ms``, and ``rows``: dicts with
        ``way`` (``waiting``: the dead one's updates were READY; ``folding``: READING), ``span`` (a key of ``SPANS``),
        ``title``, ``deaths``, ``updates_held`` (median), ``median_ms``, ``p99_ms``, ``worst_ms``.

    Raises
    ------
    LiflError
        If a block is left behind, a result is wrong, or a successor does not come.
    """
    if deaths < 1 or workers < 1 or not 2 <= workers * updates <= 16:
        raise ValueError(
            f"deaths={deaths}, workers={workers}, updates={updates}: give at least one of each, and 2 to 16 updates "
            "for all workers together, so that the means can be checked exactly"
        )
    spec = model_spec("resnet18") if spec is None else spec
    choose = random.Random(0)
    measured: dict[str, list[Death]] = {way: [] for way in WAYS}
    with closing(WatchedNode(round_bytes(spec, workers, workers * updates + 1), workers)) as node:
        _one_round(node, spec, workers * updates, choose)  # the arena's pages, which come at the first touch
        while min(map(len, measured.values())) < deaths:
            if on_progress is not None:
                on_progress(", ".join(f"{len(done)} of {deaths} deaths, {way}" for way, done in measured.items()))
            for way, done in _one_round(node, spec, workers * updates, choose).items():
                measured[way] += done
    figures = {"cores": cores(), "workers": workers, "updates": updates, "update_bytes": spec.layout.update_bytes}
    return figures | {"goal_ms": GOAL_MS, "rows": list(_rows({way: done[:deaths] for way, done in measured.items()}))}


def _one_round(node: WatchedNode, spec: TensorSpec, updates: int, choose: random.Random) -> dict[str, list[Death]]:
    """A round in which every worker dies twice, checked; the deaths that found the worker as it was meant.

    The workers are stopped, so that what they are given waits; the first death is that of a stopped one, the second
    that of its successor, which folds.
    """
    found: dict[str, list[Death]] = {way: [] for way in WAYS}
    node.blocks = []
    with node.open_round(spec, updates + 1, "lazy", shape=Shape(node.workers, 0)) as round_:
        for i in range(updates):
            _send(node, round_, i)
        with _stopped(node):
            with node.changed:
                round_.lifecycle.press()
            for me in range(1, 1 + node.workers):
                found["waiting"].append(node.kill(me))
                if not _wait_for_fold(node, me):
                    continue
                time.sleep(choose.random() * INTO_THE_FOLD_S)
                if State.READING in (death := node.kill(me)).held:
                    found["folding"].append(death)
        _send(node, round_, updates)
        result = round_.result(WAIT_S)
        mean = (2 ** (updates + 1) - 1) / (updates + 1)
        name = next(name for name, tensor in spec.items() if tensor.dtype == "float32" and tensor.size)
        if result.num_updates != updates + 1 or (abs(result.arrays[name] - mean) > mean * 2**-23).any():
            raise LiflError(f"the mean of {result.num_updates} of {updates + 1} updates is wrong after {found}")
    return found


@contextmanager
def _stopped(node: WatchedNode) -> Iterator[None]:
    """The workers are stopped; at the end those of them that still live go on."""
    pids = node.pids()
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in {*pids} & {*node.pids()}:
            os.kill(pid, signal.SIGCONT)


def _send(node: WatchedNode, round_: Round, i: int) -> None:
    """Update number i, full of 2**i, so that a sum tells who is in it; written in place."""
    with round_.loan(i, timeout=WAIT_S) as loan:
        node.blocks.append(loan.lease.block)
        for array in loan.arrays.values():
            array.fill(2**i)
        loan.send(1.0)


def _wait_for_fold(node: WatchedNode, me: int) -> bool:
    """Waits until worker `me` reads updates; false if it has none left."""
    end = time.monotonic() + WAIT_S
    while (states := node.states(me)) and time.monotonic() < end:
        if State.READING in states:
            return True
        time.sleep(0.0002)
    return False


def _rows(measured: dict[str, list[Death]]) -> Iterable[dict[str, Any]]:
    for way, deaths in measured.items():
        held = statistics.median(sum(death.held.values()) for death in deaths)
        for span, (begin, end, title) in SPANS.items():
            yield {
                "way": way,
                "span": span,
                "title": f"{WAYS[way]}: {title}",
                "deaths": len(deaths),
                "updates_held": held,
                **spread_ms([getattr(death, end) - getattr(death, begin) for death in deaths]),
            }


def spread_ms(times_ns: Sequence[int]) -> dict[str, float]:
    """Median, 99th percentile and worst of some times, in milliseconds."""
    ordered = sorted(t / 1e6 for t in times_ns)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"median_ms": statistics.median(ordered), "p99_ms": p99, "worst_ms": ordered[-1]}


def recovery_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_recovery` as a table."""
    each = f"{figures['updates']} updates of {figures['update_bytes'] / 1e6:,.1f} MB"
    table = Table(title=f"A killed worker, of {figures['workers']}, that has {each} ({figures['cores']} cores)")
    table.add_column("from, to")
    for heading in ("deaths", "median\nms", "99 % within\nms", "worst\nms", "goal\nms"):
        table.add_column(heading, justify="right")
    for row in figures["rows"]:
        goal = f"under {figures['goal_ms']:g}" if row["span"] == "kill_to_reclaimed" else ""
        numbers = (f"{row[key]:.2f}" for key in ("median_ms", "p99_ms", "worst_ms"))
        table.add_row(row["title"], str(row["deaths"]), *numbers, goal)
    return table
