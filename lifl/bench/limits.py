"""The limits of this machine: memory, hashing, wake-ups, starting processes.

Owns the limits that other figures are compared with. Measures the machine and the start of lifl's processes, never the
work of a round; the costs of a round's steps come from ``lifl.node.calibration`` and are shown with the limits. Nothing
is printed here.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from lifl.bench import pair
from lifl.bench.handoff import one_way
from lifl.errors import PeerGoneError
from lifl.node import calibration
from lifl.node.node import Node
from lifl.shm import kernels, messages
from lifl.shm.arena import OWNER, Arena
from lifl.shm.machine import cores
from lifl.shm.messages import Kind
from lifl.shm.ring import Bell, Inbox, Outbox
from lifl.tensor import Array, TensorSpec
from lifl.workers.spawner import Spawner

MEMORY_BYTES = 512 * 2**20
"""Memory to read and copy: so much that most caches hold little of it."""

SHA256_BYTES = 64 * 2**20
"""Memory to hash: less, because the rate of hashing does not depend on caches."""

WAYS = {"spin": "ring_spinning", "futex": "ring_sleeping", "eventfd": "eventfd"}
ANSWER_TIMEOUT_S = 60.0

COST_TITLES = {
    "land_bytes_s": "copy and check an update",
    "land_array_s": "each array of it",
    "fold_bytes_s": "read an update while folding",
    "sum_bytes_s": "read or write a partial sum",
    "mean_bytes_s": "write the mean",
    "parallel": "all cores against one",
    "dispatch_s": "a task, until a warm worker begins it",
    "cold_start_s": "one more worker, until it waits",
    "first_read_bytes_s": "a process's first read of memory",
    "first_write_bytes_s": "a process's first write to memory",
    "wire_bytes_s": "receive over loopback TCP",
    "wire_cpu_bytes_s": "the CPU of that, on each side",
}
"""Titles for fields of ``lifl.planner.costs.Costs``; other fields are shown by their names."""


def measure_limits(
    memory_bytes: int = MEMORY_BYTES,
    repetitions: int = 5,
    round_trips: int = 5_000,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures the limits; every figure is a median of `repetitions`, or of `round_trips`.

    Takes twice `memory_bytes` of memory. All processes that the call starts have ended on return.

    Returns
    -------
    dict
        ``cores``, ``vector_width``, ``memory_bytes``;
        ``read_one_core_gb_per_s``, ``read_all_cores_gb_per_s``, ``copy_gb_per_s`` (bytes copied, so
        twice as many are moved), ``sha256_gb_per_s``, all in 10^9 bytes per second;
        ``wake_spin_us``, ``wake_futex_us``, ``wake_eventfd_us``: one way between two Python processes;
        ``node_cold_s``: from the call of ``Node`` to its first result, with one worker;
        ``worker_cold_s``: from the start of the spawner to the first answer of its first worker;
        ``worker_start_s``: one more worker, until its first answer;
        ``worker_warm_s``: a message to a running worker, until its answer;
        ``costs``: the costs that the planner uses (``lifl.planner.costs.Costs``), measured anew and cached.
    """
    say = on_progress or (lambda _: None)
    if memory_bytes < 4096 or repetitions < 1 or round_trips < 1:
        raise ValueError("give at least 4096 bytes of memory, 1 repetition and 1 round trip")
    figures: dict[str, Any] = {
        "cores": cores(),
        "vector_width": kernels.vector_width(),
        "memory_bytes": memory_bytes,
    }
    say("memory")
    figures |= _memory(memory_bytes, repetitions)
    for name, way in WAYS.items():
        say(f"wake-up: {name}")
        figures[f"wake_{name}_us"] = one_way(pair.run(way, round_trips))["median_us"]
    say("starting processes")
    figures |= medians({"node_cold_s": _node_cold_s}, repetitions)
    starts = [start_workers() for _ in range(repetitions)]
    figures |= {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    say("the costs of a round's steps")
    return figures | {"costs": calibration.calibrate().to_dict()}


def _memory(nbytes: int, repetitions: int) -> dict[str, float]:
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    some = source[:SHA256_BYTES].data
    ways: dict[str, Callable[[], float]] = {
        "read_one_core_gb_per_s": lambda: read_gb_per_s(source, 1),
        "read_all_cores_gb_per_s": lambda: read_gb_per_s(source, cores()),
        "copy_gb_per_s": lambda: _gb_per_s(nbytes, lambda: np.copyto(target, source)),
        "sha256_gb_per_s": lambda: _gb_per_s(some.nbytes, lambda: hashlib.sha256(some).digest()),
    }
    return medians(ways, repetitions)


def medians(ways: dict[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """Runs all `ways` in turn, `repetitions` times, so that a noisy moment affects all of them; medians of each."""
    runs = [{name: way() for name, way in ways.items()} for _ in range(repetitions)]
    return {name: statistics.median(run[name] for run in runs) for name in ways}


def read_gb_per_s(source: Array, threads: int) -> float:
    """The rate at which `threads` cores together read `source` once, in 10^9 bytes per second."""
    part = source.nbytes // threads
    starts = [source.ctypes.data + i * part for i in range(threads)]
    ready = threading.Barrier(threads)
    times: list[float] = []

    def read(start: int) -> None:
        ready.wait()
        begin = time.perf_counter()
        kernels.read_memory(start, part, 1)
        times.extend((begin, time.perf_counter()))

    readers = [threading.Thread(target=read, args=(start,)) for start in starts]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    # The readers' own clocks count: with every core busy, this thread may wake long after they have begun.
    return part * threads / (max(times) - min(times)) / 1e9


def _gb_per_s(nbytes: int, work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - begin) / 1e9


def _node_cold_s() -> float:
    arrays = {"w": np.ones(4, np.float32)}
    spec = TensorSpec.from_arrays(arrays)
    begin = time.perf_counter()
    with Node(memory="2MiB", workers=1) as node, node.open_round(spec, expected=1) as round_:
        round_.submit(arrays)
        round_.result(timeout=ANSWER_TIMEOUT_S)
        return time.perf_counter() - begin


def start_workers() -> dict[str, float]:
    """Seconds until a worker answers: the first worker (with the start of the spawner), a second one, a running one."""
    arena, bell = Arena.create(1, 3), Bell()
    inbox, outbox = Inbox(arena, OWNER), Outbox.of_rings(arena, OWNER)

    def ask(worker: int) -> None:
        # A worker answers ABORT with ABORTED for every round, also for an unknown one.
        outbox.push(worker, messages.abort(1))
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while (item := inbox.try_pop()) is None or item[1].kind != Kind.ABORTED:  # a new worker first sends HELLO
            if time.monotonic() > deadline:
                raise PeerGoneError(f"worker {worker} did not answer in {ANSWER_TIMEOUT_S:g} s")
            if item is None:
                inbox.wait(0.0)

    seconds: dict[str, float] = {}
    pidfds: list[int] = []
    spawner = None
    try:
        begin = time.perf_counter()
        spawner = Spawner(arena.fd, bell.fd, 0.0)
        for worker, name in ((1, "worker_cold_s"), (2, "worker_start_s")):
            pidfds.append(spawner.start_worker(worker)[1])
            ask(worker)
            seconds[name] = time.perf_counter() - begin
            begin = time.perf_counter()
        ask(1)
        seconds["worker_warm_s"] = time.perf_counter() - begin
        for worker in (1, 2):
            outbox.push(worker, messages.STOP)
    finally:
        if spawner is not None:
            spawner.close()
        for pidfd in pidfds:
            os.close(pidfd)
        bell.close()
        arena.close()
    return seconds


def limits_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_limits` as a table."""
    table = Table(title=f"The limits of this machine ({figures['cores']} cores, {figures['vector_width']})")
    table.add_column("limit")
    table.add_column("median", justify="right", no_wrap=True)
    for title, name in (
        ("read memory, one core", "read_one_core_gb_per_s"),
        ("read memory, all cores", "read_all_cores_gb_per_s"),
        ("copy memory, one core", "copy_gb_per_s"),
        ("SHA-256, one core", "sha256_gb_per_s"),
    ):
        table.add_row(title, f"{figures[name]:.1f} GB/s")
    table.add_section()
    for title, name in (
        ("wake a process that spins", "wake_spin_us"),
        ("wake a process that sleeps on a futex", "wake_futex_us"),
        ("wake a process that sleeps on an eventfd", "wake_eventfd_us"),
    ):
        table.add_row(title, f"{figures[name]:.1f} us")
    table.add_section()
    for title, name in (
        ("a new Node, to its first result", "node_cold_s"),
        ("the first worker, to its first answer", "worker_cold_s"),
        ("one more worker, to its first answer", "worker_start_s"),
        ("a running worker, to its answer", "worker_warm_s"),
    ):
        table.add_row(title, f"{figures[name] * 1000:,.2f} ms")
    table.add_section()
    costs = figures["costs"]
    for name, value in costs.items():
        if name != "cores":
            table.add_row(f"cost model: {COST_TITLES.get(name, name)}", _cost(name, value))
    return table


def _cost(name: str, value: float) -> str:
    if name.endswith("_bytes_s"):
        return f"{value / 1e9:.1f} GB/s"
    return f"{value * 1000:.2f} ms" if name.endswith("_s") else f"{value:.2f} x"
