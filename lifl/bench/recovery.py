"""The time that a worker's death costs: from the kill until its blocks are reclaimed, and until its successor starts.

Owns the kills and their clock; the Node recovers by itself and is only observed. Nothing is printed here.
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
from lifl.node.node import Node
from lifl.planner.shape import Shape
from lifl.round.round import Round, core_of
from lifl.shm.arena import Block, State
from lifl.shm.machine import cores
from lifl.shm.sizes import round_bytes
from lifl.tensor import TensorSpec
from lifl.workers.supervisor import Supervisor

WAYS = {"waiting": "its updates wait (READY)", "folding": "it is folding them (READING)"}
SPANS = {
    "kill_to_seen": ("killed_ns", "seen_ns", "killed, until the owner sees it"),
    "seen_to_reclaimed": ("seen_ns", "reclaimed_ns", "seen, to all reclaimed or requeued"),
    "kill_to_reclaimed": ("killed_ns", "reclaimed_ns", "killed, to all reclaimed or requeued"),
    "kill_to_heard": ("killed_ns", "heard_ns", "killed, to the successor's first message"),
}
GOAL_MS = 100.0
"""Goal for the time in which a dead worker's blocks are reclaimed or requeued, in milliseconds."""
WAIT_S = 60.0
INTO_THE_FOLD_S = 0.01
"""A worker is killed at a random moment in this many seconds after the begin of its fold."""


@attrs.define
class Death:
    """The death of a worker: times of the kill, the detection, the sweep and the successor; and the worker's updates.

    Times are of CLOCK_MONOTONIC; 0 until they are known.
    """

    worker: int
    killed_ns: int = 0
    seen_ns: int = 0
    reclaimed_ns: int = 0
    heard_ns: int = 0
    held: dict[State, int] = attrs.field(factory=dict)  # number of updates by state, when the death was seen
    left: int = 0  # updates that were still READING after the sweep
    is_over: threading.Event = attrs.field(factory=threading.Event)


class WatchedNode(Node):
    """A Node that notes the times at which it sees a death, has swept, and has a message from the successor."""

    def __init__(self, memory: int, workers: int) -> None:
        self.death: Death | None = None
        self.blocks: list[Block] = []  # of the round's updates
        super().__init__(memory, workers)
        assert self._supervisor is not None
        self.supervisor: Supervisor = self._supervisor
        # The supervisor starts the successor right after the sweep, and calls heard() for each worker's message.
        self._start = self.supervisor.start
        self._heard = self.supervisor.heard
        self.supervisor.start = self._after_sweep  # type: ignore[method-assign]
        self.supervisor.heard = self._on_message  # type: ignore[method-assign]

    def states(self, worker: int) -> dict[State, int]:
        """Number of the worker's updates in each state."""
        found: dict[State, int] = {}
        for block in self.blocks:
            generation, owner, state, _, _ = self.arena.describe(block.index)
            if (generation, owner) == (block.generation, worker):
                found[state] = found.get(state, 0) + 1
        return found

    def kill(self, worker: int) -> Death:
        """Kills a worker; returns after the first message of its successor."""
        with self.changed:
            pid = next(process.pid for process in self.supervisor._workers.values() if process.number == worker)
            self.death = death = Death(worker)
        death.killed_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        if not death.is_over.wait(WAIT_S):
            self.check_workers()
            raise LiflError(f"worker {worker} (pid {pid}) was killed and has no successor after {WAIT_S:g} s")
        if death.left:
            raise LiflError(f"{death.left} updates of the dead worker {worker} were neither reclaimed nor requeued")
        return death

    def replace(self, pidfd: int) -> None:
        """Notes the time at which the death was seen, and the states of the dead worker's updates."""
        if self.death is not None:
            self.death.seen_ns = time.monotonic_ns()
            self.death.held = self.states(self.death.worker)
        super().replace(pidfd)

    def _after_sweep(self, number: int) -> None:
        if self.death is not None:
            self.death.reclaimed_ns = time.monotonic_ns()
            self.death.left = self.states(number).get(State.READING, 0)
        self._start(number)

    def _on_message(self, number: int, has_worked: bool) -> None:
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
    """Kills workers that have `updates` updates each of a ResNet-18, while the other workers fold on.

    In each round every worker is killed twice, while its updates wait and while it folds them. Every mean is checked.

    Parameters
    ----------
    deaths : int
        Number of measured deaths of each way.
    spec : TensorSpec, optional
        Shapes other than a ResNet-18's; at least one tensor is float32, and all dtypes can hold 2**15.

    Returns
    -------
    dict
        ``cores``, ``workers``, ``updates`` (of each worker), ``update_bytes``, ``goal_ms``, and ``rows``: dicts with
        ``way`` (``waiting``: the dead worker's updates were READY; ``folding``: READING), ``span`` (of ``SPANS``),
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
        _one_round(node, spec, workers * updates, choose)  # warms up: the arena's pages exist after their first use
        while min(map(len, measured.values())) < deaths:
            if on_progress is not None:
                on_progress(", ".join(f"{len(done)} of {deaths} deaths, {way}" for way, done in measured.items()))
            for way, done in _one_round(node, spec, workers * updates, choose).items():
                measured[way] += done
    figures = {"cores": cores(), "workers": workers, "updates": updates, "update_bytes": spec.layout.update_bytes}
    return figures | {"goal_ms": GOAL_MS, "rows": list(_rows({way: done[:deaths] for way, done in measured.items()}))}


def _one_round(node: WatchedNode, spec: TensorSpec, updates: int, choose: random.Random) -> dict[str, list[Death]]:
    """A round in which every worker dies twice; checks the mean, and returns the deaths by way.

    The workers are stopped, so that their updates wait; the first death is that of a stopped worker, the second
    that of its successor, which folds. A successor that was not in a fold when it was killed is left out.
    """
    found: dict[str, list[Death]] = {way: [] for way in WAYS}
    node.blocks = []
    with node.open_round(spec, updates + 1, "lazy", shape=Shape(node.workers, 0)) as round_:
        for i in range(updates):
            _send(node, round_, i)
        with _stopped(node):
            with node.changed:
                core_of(round_).lifecycle.press()
            for worker in range(1, 1 + node.workers):
                found["waiting"].append(node.kill(worker))
                if not _wait_for_fold(node, worker):
                    continue
                time.sleep(choose.random() * INTO_THE_FOLD_S)
                if State.READING in (death := node.kill(worker)).held:
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
    """Stops the workers with SIGSTOP; at the end of the block those that still live continue."""
    pids = node.pids()
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in {*pids} & {*node.pids()}:
            os.kill(pid, signal.SIGCONT)


def _send(node: WatchedNode, round_: Round, i: int) -> None:
    """Sends update number i, written in place and full of 2**i, so that each sum of updates is a different number."""
    with round_.loan(i, timeout=WAIT_S) as loan:
        node.blocks.append(loan.lease.block)
        for array in loan.arrays.values():
            array.fill(2**i)
        loan.send(1.0)


def _wait_for_fold(node: WatchedNode, worker: int) -> bool:
    """Waits until a worker reads updates; false if it has none left."""
    end = time.monotonic() + WAIT_S
    while (states := node.states(worker)) and time.monotonic() < end:
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
    """Median, 99th percentile and maximum of `times_ns`, in milliseconds."""
    ordered = sorted(t / 1e6 for t in times_ns)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"median_ms": statistics.median(ordered), "p99_ms": p99, "worst_ms": ordered[-1]}


def recovery_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_recovery` as a table."""
    each = f"{figures['updates']} updates of {figures['update_bytes'] / 1e6:,.1f} MB"
    table = Table(title=f"A killed worker, of {figures['workers']}, that has {each} ({figures['cores']} cores)")
    table.add_column("from, to")
    for heading in ("deaths", "median\nms", "99 % within\nms", "worst\nms", "goal\nms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        goal = f"under {figures['goal_ms']:g}" if row["span"] == "kill_to_reclaimed" else ""
        numbers = (f"{row[key]:.2f}" for key in ("median_ms", "p99_ms", "worst_ms"))
        table.add_row(row["title"], str(row["deaths"]), *numbers, goal)
    return table
