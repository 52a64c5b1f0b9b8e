"""Measures the costs of work on memory: the kernels, the first touch of a page, the start of an array's copy.

Owns these measurements; ``lifl.node.calibration`` owns their use and the file.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import attrs
import numpy as np

from lifl.round import admission
from lifl.round.loan import Loan, copy_in
from lifl.shm import kernels
from lifl.shm.arena import Arena
from lifl.tensor import CODES, TensorSpec

PARAMETERS = 3_000_000
"""Parameters of the model that is folded here: an update has 12 MB, more than a core's own caches."""

UPDATES = 14
FEW_UPDATES = 2
REPETITIONS = 25
ALONE = 1.03
"""A run with at most so many seconds for each CPU second counts as undisturbed."""

PATIENCE_S = 0.5
"""Seconds to go on trying until all cores are free at the same time."""

ARRAYS = 200
TOUCHED = 5
"""Blocks that are touched, each twice."""


def measure_memory(cores: int) -> dict[str, Any]:
    """The costs of work on memory, by the names of :class:`~lifl.planner.costs.Costs`, for so many cores."""
    return _rates(cores) | _arrays() | _touches()


def _rates(count: int) -> dict[str, Any]:
    """The rates of the kernels, from pairs of runs whose difference is the step to measure.

    With U, S and M the bytes of an update, a sum and the mean, and t(n) the time to fold n updates into a new sum:
    ``fold = (14 - 2) U / (t(14) - t(2))``; ``sum = 2 S / (t'(2) - 2 U / fold)`` with t' the time to fold onto a sum,
    which reads one sum and writes one; ``mean = M / (f(2) - 2 S / sum)`` with f the time to make the mean of two sums.
    """
    n = PARAMETERS
    arena = Arena.create((UPDATES + 2 * 2 + 1) * 4 * n + 2**20, 1)  # of small pages, as workers read them
    try:
        return _kernels(arena, n, count)
    finally:
        arena.close()


def _kernels(arena: Arena, n: int, count: int) -> dict[str, Any]:
    def take(nbytes: int) -> int:
        block = arena.alloc(nbytes)
        assert block is not None, "the arena was made for them"
        return arena.map(block.index, block.generation).address

    source = np.ones(n, np.float32)  # ordinary memory, as a client's arrays
    code, weights = CODES["float32"], [1.0] * UPDATES
    at = [take(4 * n) for _ in range(UPDATES)]
    mean, one, two = take(4 * n), take(8 * n), take(8 * n)
    for update in at:
        kernels.copy_finite(code, update, kernels.address_of(source), n)

    def fold(count: int, previous: int | None = None) -> None:
        kernels.fold(code, one, previous, at[:count], weights[:count], n)

    def fold_range(part: int) -> None:
        start, end = part * n // count, (part + 1) * n // count
        kernels.fold(code, one + 8 * start, None, [a + 4 * start for a in at], weights, end - start)

    kernels.fold(code, two, None, at, weights, n)
    ways: dict[str, Callable[[], object]] = {
        "land": lambda: kernels.copy_finite(code, at[0], kernels.address_of(source), n),
        "few": lambda: fold(FEW_UPDATES),
        "all": lambda: fold(UPDATES),
        "onto": lambda: fold(FEW_UPDATES, two),
        "finish": lambda: kernels.finish(code, mean, [one, two], [], [], (1.0, 0.0), n),
    }
    for way in ways.values():
        way()  # a warm worker's work has no first touch of a page
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ways, "together")}
    for _ in range(REPETITIONS):  # in turn, so that a noisy moment hits all of them alike
        for name, way in ways.items():
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            way()
            cpu = time.thread_time() - begin_cpu
            runs[name].append((time.perf_counter() - begin, cpu))
        runs["together"].append(_together(fold_range, count))
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not any(seconds < ALONE * cpu for seconds, cpu in runs["together"]):
        runs["together"].append(_together(fold_range, count))  # all cores are seldom free at the same time
    t = {name: _undisturbed(some) for name, some in runs.items()}
    u, s, m = 4.0 * n, 8.0 * n, 4.0 * n
    # Noise may make a difference small or negative: each step gets a least share of its whole run.
    fold_s = max(t["all"] - t["few"], t["all"] * 0.2) / (UPDATES - FEW_UPDATES)
    sum_s = max(t["onto"] - FEW_UPDATES * fold_s, t["onto"] * 0.2) / 2
    mean_s = max(t["finish"] - 2 * sum_s, t["finish"] * 0.1)
    return {
        "land_bytes_s": u / t["land"],
        "fold_bytes_s": u / fold_s,
        "sum_bytes_s": s / sum_s,
        "mean_bytes_s": m / mean_s,
        "parallel": min(max(1.0, t["all"] / t["together"]), float(count)),
    }


@attrs.define
class _Room:
    """The part of a loan that a copy needs."""

    address: int
    client_id: str = ""


def _arrays() -> dict[str, Any]:
    """The CPU time for each array of an update: of checking and copying many arrays of one number each."""
    update = {str(i): np.ones(1, np.float32) for i in range(ARRAYS)}
    spec = TensorSpec.from_arrays(update)
    target = np.empty(spec.layout.update_bytes, np.uint8)
    times = []
    for _ in range(1 + TOUCHED):
        begin = time.thread_time()
        admission.check_arrays("", spec, update)
        copy_in(spec, update, cast(Loan, _Room(target.ctypes.data)))
        times.append(time.thread_time() - begin)
    return {"land_array_s": statistics.median(times[1:]) / ARRAYS}


def _touches() -> dict[str, Any]:
    """The cost of a process' first touch of memory: the CPU time of a first pass over it, less that of a second.

    Memory is read in a mapping of its own, as in a new worker: ``U / (first - second)`` for an update's U bytes.
    """
    n, code = PARAMETERS, CODES["float32"]
    source = np.ones(n, np.float32)
    arena = Arena.create(TOUCHED * (4 * n + 2**17), 1)
    again = Arena.attach(arena.fd)
    made, read = [], []
    try:
        for _ in range(TOUCHED):
            block = arena.alloc(4 * n)
            assert block is not None, "the arena was made for them"
            one, other = (a.map(block.index, block.generation).address for a in (arena, again))
            made.append(_more_s(kernels.copy_finite, code, one, kernels.address_of(source), n))
            read.append(_more_s(kernels.copy_finite, code, other, other, n))
    finally:
        again.close()
        arena.close()
    rates = (4 * n / max(statistics.median(more), 1e-6) for more in (read, made))
    return dict(zip(("first_read_bytes_s", "first_write_bytes_s"), rates, strict=True))


def _more_s(work: Callable[..., object], *arguments: object) -> float:
    """The CPU time of `work` the first time, less that of the second time."""
    times = [time.thread_time()]
    for _ in range(2):
        work(*arguments)
        times.append(time.thread_time())
    return 2 * times[1] - times[0] - times[2]


def _together(work: Callable[[int], None], count: int) -> tuple[float, float]:
    """Runs `work` in `count` threads, each with its part and its core, and joins them.

    Returns the seconds from the first begin to the last end, and the CPU time of the thread that took most.
    """
    ready = threading.Barrier(count)
    cores = sorted(os.sched_getaffinity(0))
    times: list[float] = []
    spent: list[float] = []

    def run(part: int) -> None:
        # Pins this thread alone. Unpinned it would stay for milliseconds on the core on which it wakes up, also if
        # that is another thread's.
        os.sched_setaffinity(0, {cores[part % len(cores)]})
        ready.wait()
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        work(part)
        spent.append(time.thread_time() - begin_cpu)
        times.extend((begin, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(part,)) for part in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(times) - min(times), max(spent)


def _undisturbed(runs: list[tuple[float, float]]) -> float:
    """The median seconds of the undisturbed runs (seconds, CPU seconds); if there is none, of the least disturbed."""
    ranked = sorted((seconds / max(cpu, 1e-9), seconds) for seconds, cpu in runs)
    alone = [seconds for shared, seconds in ranked if shared < ALONE]
    return statistics.median(alone or [ranked[0][1]])
