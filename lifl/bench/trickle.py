"""Updates that trickle in: the time from the last update to the new model, for eager, just in time and lazy.

Owns the arrivals and the clock. The timed rounds are ordinary rounds of a Node. Nothing is printed here.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
from rich.table import Table

from lifl import fold
from lifl.bench.idle import process_ns
from lifl.bench.limits import MEMORY_BYTES, read_gb_per_s
from lifl.bench.shapes import model_spec
from lifl.errors import LiflError
from lifl.node.node import Node
from lifl.report.report import RoundReport
from lifl.round.settings import Timing
from lifl.shm.arena import Arena
from lifl.shm.machine import cores
from lifl.shm.sizes import round_bytes, units_of
from lifl.tensor import Array, TensorSpec

TIMINGS: tuple[Timing, ...] = ("eager", "jit", "lazy")
RESULT_TIMEOUT_S = 300.0
FOLDS = 5
"""Timed folds of one update onto a sum, after each repetition."""

GOAL_FOLDS = 1.0
"""Goal for eager: the time from the last update to the new model, as a multiple of the fold of one update."""


@attrs.frozen
class Run:
    """Figures of a round: time from the last ``send`` to the model, CPU time, peak of the arena in use, report."""

    last_to_model_s: float
    cpu_s: float
    peak_bytes: int
    report: RoundReport


def measure_trickle(
    updates: int = 32,
    over_s: float = 10.0,
    model: str = "resnet18",
    workers: int | None = None,
    repetitions: int = 3,
    *,
    spec: TensorSpec | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times rounds whose `updates` arrive evenly over `over_s` seconds: medians of `repetitions`; timings take turns.

    Each update is written into its block on arrival, then sent. The clock starts before the last ``send``, which
    checks for NaN and Inf, and stops when ``result`` returns. A first round of each timing, with all updates at
    once, warms up and is not counted. The planner chooses the shapes. Every mean is checked.

    Parameters
    ----------
    over_s : float
        Seconds from the first update to the last.
    model : str
        A name in ``lifl.bench.shapes.MODELS``.
    workers : int, optional
        Workers of the Node; default: one per core.
    spec : TensorSpec, optional
        Other shapes than those of `model`, which then is only a name.

    Returns
    -------
    dict
        ``model``, ``updates``, ``update_bytes``, ``over_s``, ``workers``, ``cores``, ``repetitions``, ``goal_folds``;
        ``fold_one_s``: seconds in which one core folds one update onto a sum, median, measured between the rounds;
        ``rows``: dicts with ``timing``, ``shape`` (of the last round), ``last_to_model_s`` (median), ``worst_s``,
        ``folds`` (the median as a multiple of ``fold_one_s``), ``arrived_to_model_s`` (median, from the time when the
        last update was counted, after the check for NaN and Inf), ``cpu_s`` (median, of all processes, with the
        copying), ``peak_bytes`` (the most of the arena that was in use), and ``after_last``, the spans that end after
        the last update was counted, of the round with the median time: dicts with ``runtime``, ``role``, ``updates``,
        and ``begin_ms`` and ``end_ms``, counted from that time.

    Raises
    ------
    LiflError
        If a mean is wrong.
    ShmError
        If the machine has too little memory.
    ValueError
        For an unknown model, or numbers that are too small.
    """
    spec = model_spec(model) if spec is None else spec
    workers = cores() if workers is None else workers
    if updates < 2 or repetitions < 1 or workers < 0 or not over_s >= 0:
        raise ValueError(
            f"updates={updates}, over_s={over_s}, workers={workers}, repetitions={repetitions}: at least 2, 0, 0 and 1"
        )
    say = on_progress or (lambda _: None)
    sources = [_filled(spec, value) for value in (1, 3)]
    memory = np.ones(min(MEMORY_BYTES, max(spec.nbytes * updates, 4096)), np.uint8)
    runs: dict[Timing, list[Run]] = {timing: [] for timing in TIMINGS}
    folds = []
    with Node(round_bytes(spec, workers, updates), workers) as node:
        for repetition in range(repetitions + 1):
            for timing in TIMINGS if repetition % 2 else reversed(TIMINGS):
                say(f"{timing}, " + (f"repetition {repetition}" if repetition else "warming up"))
                read_gb_per_s(memory, cores())  # removes the memory of the last round from the caches
                run = _round(node, spec, timing, sources, updates, over_s if repetition else 0.0)
                if repetition:
                    runs[timing].append(run)
            if repetition:
                folds.append(fold_one_s(spec, memory))
    fold_s = statistics.median(folds)
    return {
        "model": model,
        "updates": updates,
        "update_bytes": spec.nbytes,
        "over_s": over_s,
        "workers": workers,
        "cores": cores(),
        "repetitions": repetitions,
        "goal_folds": GOAL_FOLDS,
        "fold_one_s": fold_s,
        "rows": [_row(timing, some, fold_s) for timing, some in runs.items()],
    }


def _filled(spec: TensorSpec, value: int) -> dict[str, Array]:
    return {t.name: np.full(t.shape, value, t.dtype) for t in spec.tensors}


def _round(
    node: Node, spec: TensorSpec, timing: Timing, sources: list[dict[str, Array]], updates: int, over_s: float
) -> Run:
    """Runs a round and checks its mean, which is known: the updates are full of 1 and 3 by turns, with weight 1."""
    cpu_ns = _cpu_ns(node)
    peak_bytes = 0
    sent = 0.0
    with node.open_round(spec, expected=updates, timing=timing) as round_:
        begin = time.perf_counter()
        for k in range(updates):
            time.sleep(max(0.0, begin + over_s * k / (updates - 1) - time.perf_counter()))
            with round_.loan(client_id=k) as loan:
                for name, array in sources[k % len(sources)].items():
                    loan.arrays[name][...] = array
                # A loan takes a block, and a send may take blocks for sums, so the peak is right after one of them.
                peak_bytes = max(peak_bytes, _used_bytes(node))
                sent = time.perf_counter()
                loan.send(1.0)
            peak_bytes = max(peak_bytes, _used_bytes(node))
        result = round_.result(RESULT_TIMEOUT_S)
        seconds = time.perf_counter() - sent
        cpu_s = (_cpu_ns(node) - cpu_ns) / 1e9
        mean = (updates + 2 * (updates // 2)) / updates
        for name, tensor in spec.items():
            if tensor.dtype == "float32" and (result.arrays[name] != np.float32(mean)).any():
                raise LiflError(f"{timing}: the mean of {updates} updates is wrong in {name}: {mean} was expected")
        return Run(seconds, cpu_s, peak_bytes, result.report)


def _cpu_ns(node: Node) -> int:
    """CPU time of this process and the workers, in nanoseconds."""
    return time.process_time_ns() + sum(map(process_ns, node.pids()))


def _used_bytes(node: Node) -> int:
    return node.arena.block_bytes - node.arena.free_bytes


def fold_one_s(spec: TensorSpec, memory: Array) -> float:
    """Seconds in which this thread folds one update onto a sum in an arena, with cold caches; median of ``FOLDS``."""
    layout = spec.layout
    sizes = (layout.update_bytes, layout.sum_bytes, layout.sum_bytes)
    arena = Arena.create(sum(map(units_of, sizes)), 1)
    try:
        blocks = [arena.alloc(nbytes) for nbytes in sizes]
        mappings = [arena.map(block.index, block.generation) for block in blocks if block is not None]
        for mapping in mappings:
            ctypes.memset(mapping.address, 0, mapping.nbytes)  # so that all pages exist
        update, previous, total = (mapping.address for mapping in mappings)
        seconds = []
        for _ in range(FOLDS):
            read_gb_per_s(memory, cores())
            begin = time.perf_counter()
            fold.fold_at(layout, total, previous, [update], [1.0])
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)
    finally:
        arena.close()


# ---------------------------------------------------------------- the figures


def _row(timing: Timing, runs: list[Run], fold_s: float) -> dict[str, Any]:
    ranked = sorted(runs, key=lambda run: run.last_to_model_s)
    median_s = statistics.median(run.last_to_model_s for run in runs)
    return {
        "timing": timing,
        "shape": runs[-1].report.shape,
        "last_to_model_s": median_s,
        "worst_s": ranked[-1].last_to_model_s,
        "folds": median_s / fold_s,
        "arrived_to_model_s": statistics.median(run.report.stages["last_to_result"] for run in runs),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "after_last": list(_after_last(ranked[len(ranked) // 2].report)),
    }


def _after_last(report: RoundReport) -> Iterator[dict[str, Any]]:
    last_s = max(one.arrived_s for one in report.accepted)
    for span in report.spans:
        if span.step == "aggregate" and span.end_s > last_s:
            yield {
                "runtime": span.runtime,
                "role": span.role,
                "updates": span.updates,
                "begin_ms": (span.begin_s - last_s) * 1000,
                "end_ms": (span.end_s - last_s) * 1000,
            }


def trickle_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_trickle` as a table."""
    each = f"{figures['updates']} updates of {figures['model']}, {figures['update_bytes'] / 1e6:.1f} MB each"
    table = Table(
        title=f"{each}, evenly over {figures['over_s']:g} s ({figures['workers']} workers, {figures['cores']} cores)",
        caption=(
            f"Medians of {figures['repetitions']}. One core folds one update onto a sum in "
            f"{figures['fold_one_s'] * 1000:.1f} ms; the goal of eager is under {figures['goal_folds']:g} such fold."
        ),
        caption_justify="left",
    )
    table.add_column("timing", no_wrap=True)
    table.add_column("shape")
    headings = ("last update\nto model, ms", "worst\nms", "in folds of\none update", "CPU\ns", "arena\npeak, MB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        table.add_row(
            row["timing"],
            row["shape"],
            f"{row['last_to_model_s'] * 1000:,.1f}",
            f"{row['worst_s'] * 1000:,.1f}",
            f"{row['folds']:.2f}",
            f"{row['cpu_s']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    return table
