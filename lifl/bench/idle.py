"""The cost of an idle Node: CPU time of each of its processes and threads, from the kernel's counters.

Owns the waiting and the reading of ``/proc``. Nothing is printed here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from rich.table import Table

from lifl.errors import LiflError
from lifl.node.node import Node
from lifl.shm.machine import cores
from lifl.tensor import TensorSpec
from lifl.workers.transport import Name as TransportName

TITLES = {
    "warm": "warm workers, after a round",
    "open": "warm workers, a round waits for updates",
    "zero": "scaled to zero: all workers have gone",
}
ARRAYS = {"w": np.ones(1000, np.float32)}
MEMORY_BYTES = 16 * 2**20
GOAL_MS_PER_S = 1.0
"""Goal for an idle Node: milliseconds of CPU per second, all its processes together."""

IDLE_TIMEOUT_S = 0.2
"""Idle time-out of the Node that scales to zero."""

WAIT_S = 60.0
SETTLE_S = 0.5
"""Seconds between the last round and the first reading, in which workers end their work for that round."""


def process_ns(pid: int) -> int:
    """CPU time of all living threads of a process, in nanoseconds; 0 if the process has ended."""
    spent = 0
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            spent += _schedstat_ns(task)
    return spent


def thread_ns(tid: int) -> int:
    """CPU time of one thread of this process, in nanoseconds; 0 if the thread has ended."""
    return _schedstat_ns(Path(f"/proc/self/task/{tid}"))


def _schedstat_ns(task: Path) -> int:
    # schedstat counts nanoseconds, for a running thread up to its last tick; /proc/PID/stat counts ticks of 10 ms.
    with suppress(OSError):
        return int((task / "schedstat").read_text().split()[0])
    return 0


@attrs.frozen
class IdleNode:
    """An idle Node, with the ids of its owner's thread and of its spawner."""

    way: str
    node: Node
    owner_tid: int
    spawner_pid: int

    def spent_ns(self) -> dict[str, int]:
        """CPU nanoseconds so far, by part: ``owner`` (the Node's thread in its owner), ``spawner``, ``workers``."""
        return {
            "owner": thread_ns(self.owner_tid),
            "spawner": process_ns(self.spawner_pid),
            "workers": sum(map(process_ns, self.node.pids())),
        }


@contextmanager
def idle_nodes(workers: int, transport: TransportName | None = None) -> Iterator[list[IdleNode]]:
    """An idle Node for each of ``TITLES``, after a round on all its workers; the Nodes are closed at the end."""
    with ExitStack() as stack:
        nodes = []
        for way in TITLES:
            before = set(threading.enumerate())
            timeout = IDLE_TIMEOUT_S if way == "zero" else None
            node = stack.enter_context(Node(MEMORY_BYTES, workers, idle_timeout=timeout, transport=transport))
            thread = next(t for t in threading.enumerate() if t not in before and t.name == "lifl-listener")
            assert node._supervisor is not None
            assert thread.native_id is not None
            nodes.append(IdleNode(way, node, thread.native_id, node._supervisor.spawner.pid))
        for idle in nodes:
            _one_round(idle.node, workers)
            if idle.way == "open":
                stack.enter_context(idle.node.open_round(TensorSpec.from_arrays(ARRAYS), expected=1))
        deadline = time.monotonic() + WAIT_S
        while any(idle.way == "zero" and idle.node.pids() for idle in nodes):
            if time.monotonic() > deadline:
                raise LiflError(f"idle workers have not ended after {WAIT_S:g} s")
            time.sleep(0.01)
        time.sleep(SETTLE_S)
        yield nodes


def _one_round(node: Node, updates: int) -> None:
    with node.open_round(TensorSpec.from_arrays(ARRAYS), expected=updates) as round_:
        for k in range(updates):
            round_.submit(ARRAYS, client_id=k)
        round_.result(WAIT_S)


def measure_idle(
    seconds: float = 60.0,
    workers: int | None = None,
    transport: TransportName | None = None,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures the CPU time of three idle Nodes for `seconds`, all three at the same time.

    Parameters
    ----------
    seconds : float
        Length of the measurement.
    workers : int, optional
        Workers of each Node; default: one per core.
    transport : {"rings", "ebpf", "auto"}, optional
        Transport of the descriptors, see :class:`lifl.Node`.

    Returns
    -------
    dict
        ``cores``, ``workers``, ``transport`` (the one that was used), ``seconds`` (as measured), ``goal_ms_per_s``, and
        ``rows``: dicts with ``way``, ``title``, ``processes`` (the number of the spawner and the living workers),
        ``ms_per_s`` (all), ``owner_ms_per_s``, ``spawner_ms_per_s`` and ``workers_ms_per_s``: milliseconds of CPU time
        per second.

    Raises
    ------
    LiflError
        If idle workers do not end, or workers start or end during the measurement.
    EbpfUnavailableError
        If the transport is not available here.
    ValueError
        If `seconds` is not above 0, `workers` is below 1, or the transport is unknown.
    """
    workers = cores() if workers is None else workers
    if not seconds > 0 or workers < 1:
        raise ValueError(f"seconds={seconds}, workers={workers}: give more than 0 seconds and at least 1 worker")
    with idle_nodes(workers, transport) as nodes:
        if on_progress is not None:
            on_progress(f"three Nodes at rest, {seconds:g} s")
        begin, before = time.monotonic(), [idle.spent_ns() for idle in nodes]
        pids, used = [idle.node.pids() for idle in nodes], nodes[0].node.transport.name
        time.sleep(seconds)
        after, passed_s = [idle.spent_ns() for idle in nodes], time.monotonic() - begin
        if pids != [idle.node.pids() for idle in nodes]:
            raise LiflError("workers started or ended during the measurement, which therefore is not one of idle Nodes")
    rows = []
    for idle, workers_pids, old, new in zip(nodes, pids, before, after, strict=True):
        taken = {part: (new[part] - old[part]) / 1e6 / passed_s for part in new}
        row = {
            "way": idle.way,
            "title": TITLES[idle.way],
            "processes": 1 + len(workers_pids),
            "ms_per_s": sum(taken.values()),
        }
        rows.append(row | {f"{part}_ms_per_s": value for part, value in taken.items()})
    return {
        "cores": cores(),
        "workers": workers,
        "transport": used,
        "seconds": passed_s,
        "goal_ms_per_s": GOAL_MS_PER_S,
        "rows": rows,
    }


def idle_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_idle` as a table."""
    title = f"CPU time of an idle Node in {figures['seconds']:,.0f} s, ms per second"
    table = Table(title=f"{title} ({figures['transport']}, {figures['cores']} cores)")
    table.add_column("the Node")
    for heading in ("processes", "owner", "spawner", "workers", "all", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        parts = (row[f"{part}ms_per_s"] for part in ("owner_", "spawner_", "workers_", ""))
        numbers = (f"{value:.4f}" for value in parts)
        table.add_row(row["title"], str(row["processes"]), *numbers, f"under {figures['goal_ms_per_s']:g}")
    return table
