"""The mean of ready updates: lifl's ways, Flower's and NVFLARE's, which alternate in one run.

Owns the work that is timed, and the begin and end of each time. All sides get the same updates, with the shapes of a
real model, and their results are compared. Nothing is printed here.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
from rich.table import Table
from rich.text import Text

from lifl import fold
from lifl.bench.limits import MEMORY_BYTES, read_gb_per_s
from lifl.bench.shapes import model_spec, random_update
from lifl.node.node import Node
from lifl.planner.shape import Shape
from lifl.shm.machine import cores
from lifl.shm.sizes import round_bytes
from lifl.tensor import Array, TensorSpec

RESULT_TIMEOUT_S = 300.0
GOAL_SHARE = 0.8
"""Goal for shards, as a share of the rate at which all cores read memory."""

TITLES = {
    "flower": "Flower (one core)",
    "nvflare": "NVFLARE (one core)",
    "tree": "lifl, updates ready: tree",
    "shards": "lifl, updates ready: shards",
    "planned": "lifl, updates ready: as planned",
    "eager": "lifl, copied in (eager)",
    "alone": "lifl, updates ready: no workers",
}
NO_NVFLARE = "not installed: pip install 'lifl[peers]'"

Replies = list[Any]
"""Flower's RecordDicts."""

Ready = Callable[[], None]
"""A side calls it when it is ready, just before its clock starts."""


@attrs.frozen
class Inputs:
    """The updates for every side; ``arrays`` are views of the replies' bytes."""

    spec: TensorSpec
    replies: Replies
    arrays: list[dict[str, Array]]
    weights: list[float]


@attrs.frozen
class Run:
    """A run of one side: its time, its mean, and the shape of lifl's tree (empty for others)."""

    seconds: float
    mean: Mapping[str, Array]
    shape: str = ""


Side = Callable[[Inputs, Ready], Run]


def measure_fold(
    model: str = "resnet18",
    updates: int = 16,
    workers: int | None = None,
    repetitions: int = 5,
    *,
    spec: TensorSpec | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times the weighted mean of `updates` updates of `model`, medians of `repetitions`.

    Flower: ``aggregate_arrayrecords`` on replies in memory, one thread. NVFLARE, if it is installed: its
    ``WeightedAggregationHelper`` on the same NumPy arrays, one thread. lifl, updates ready: they lie in the
    arena; the clock starts at the last ``send`` and stops when ``result`` returns. As planned: with the shape that
    the planner chooses by the costs that ``lifl bench limits`` measures. lifl, copied in: the clock
    starts before the first ``submit``, so it includes copying the updates into the arena. The first repetition
    warms up and is not counted.

    Needs memory for two copies of the updates and for the sums; imports flwr, and NVFLARE if it is installed.

    Parameters
    ----------
    model : str
        A name in ``lifl.bench.shapes.MODELS``.
    workers : int, optional
        Workers of the Node, leaves of the tree, and number of shards; default: one per core.
    spec : TensorSpec, optional
        Other shapes than those of `model`, which then is only a name.

    Returns
    -------
    dict
        ``model``, ``updates``, ``update_bytes``, ``workers``, ``cores``, ``repetitions``, ``goal_share``,
        ``read_all_cores_gb_per_s`` (measured before each of the others), ``error_over_tolerance`` (the
        largest difference between lifl's and Flower's means, divided by the difference that rounding allows:
        above 1 is wrong), and ``rows``: dicts with ``way``, ``title``, ``workers``, ``shape`` (as carried out;
        empty for the peers), ``median_s``, ``min_s``, ``gb_per_s`` (updates, 10^9 bytes), ``times_flower``
        (Flower's median, of the repetitions that alternated with this way, divided by this way's median) and
        ``share_of_read`` (each run's rate as a share of the read rate just before it, median over the runs); or with
        ``way``, ``title`` and ``skipped``, the reason.

    Raises
    ------
    ShmError
        If the machine has too little memory.
    ValueError
        For an unknown model, or counts below 1.
    """
    spec = model_spec(model) if spec is None else spec
    workers = cores() if workers is None else workers
    if updates < 1 or repetitions < 1 or workers < 0:
        raise ValueError(f"updates={updates}, repetitions={repetitions}, workers={workers}: at least 1, 1 and 0")
    from lifl.strategy import reference

    say = on_progress or (lambda _: None)
    say(f"making {updates} updates of {model}")
    weights = [k + 1.0 for k in range(updates)]
    replies = [reference.make_reply(random_update(spec, k), weights[k]) for k in range(updates)]
    inputs = Inputs(spec, replies, [reference.view_reply(reply) for reply in replies], weights)
    total_bytes = spec.nbytes * updates
    memory = np.ones(min(MEMORY_BYTES, max(total_bytes, 4096)), np.uint8)
    reads: list[float] = []

    def settle() -> None:
        """Reads other memory before each clock starts, so that no side finds its updates in a cache."""
        reads.append(read_gb_per_s(memory, cores()))

    peers: dict[str, Side] = {"flower": _flower}
    if importlib.util.find_spec("nvflare") is not None:
        peers["nvflare"] = _nvflare
    rows: list[dict[str, Any]] = []
    largest = 0.0
    for node_workers in dict.fromkeys((workers, 0)):
        with Node(memory=round_bytes(spec, node_workers, updates), workers=node_workers) as node:
            is_main = node_workers == workers
            sides = peers | _on_node(node, workers) if is_main else {"flower": _flower, "alone": _ready(node, None)}
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            shapes: dict[str, str] = {}
            for repetition in range(repetitions + 1):
                say(f"{node_workers} workers, " + (f"repetition {repetition}" if repetition else "warming up"))
                for name in sides if repetition % 2 else reversed(sides):
                    run = sides[name](inputs, settle)
                    if repetition == 0 and name not in peers:
                        largest = max(largest, _error_over_tolerance(spec, run.mean, replies, weights))
                    elif repetition:
                        runs[name].append((run.seconds, reads[-1]))
                        shapes[name] = run.shape
                    del run  # its mean takes room in the arena that the next run needs
            known = {row["way"] for row in rows}
            rows += [_row(name, node_workers, shapes[name], runs, total_bytes) for name in runs if name not in known]
    if "nvflare" not in peers:
        rows.insert(1, {"way": "nvflare", "title": TITLES["nvflare"], "skipped": NO_NVFLARE})
    return {
        "model": model,
        "updates": updates,
        "update_bytes": spec.nbytes,
        "workers": workers,
        "cores": cores(),
        "repetitions": repetitions,
        "goal_share": GOAL_SHARE,
        "read_all_cores_gb_per_s": statistics.median(reads),
        "error_over_tolerance": largest,
        "rows": rows,
    }


# ---------------------------------------------------------------- the sides


def _flower(inputs: Inputs, ready: Ready) -> Run:
    from lifl.strategy import reference

    ready()
    begin = time.perf_counter()
    record = reference.aggregate(inputs.replies)
    seconds = time.perf_counter() - begin
    return Run(seconds, reference.view_arrays(record))


def _nvflare(inputs: Inputs, ready: Ready) -> Run:
    from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

    helper = WeightedAggregationHelper()
    ready()
    begin = time.perf_counter()
    for k, (arrays, weight) in enumerate(zip(inputs.arrays, inputs.weights, strict=True)):
        helper.add(arrays, weight, f"client-{k}", 0)
    mean = helper.get_result()
    return Run(time.perf_counter() - begin, mean)


def _on_node(node: Node, workers: int) -> dict[str, Side]:
    most = max(1, workers)
    return {
        "tree": _ready(node, Shape(most, 0)),
        "shards": _ready(node, Shape(0, most)),
        "planned": _ready(node, None),
        "eager": _copied(node),
    }


def _ready(node: Node, shape: Shape | None) -> Side:
    """A side whose updates lie in the arena when the clock starts."""

    def side(inputs: Inputs, ready: Ready) -> Run:
        with node.open_round(inputs.spec, expected=len(inputs.arrays), timing="lazy", shape=shape) as round_:
            loans = []
            for k, update in enumerate(inputs.arrays):
                loan = round_.loan(client_id=k)
                for name, array in update.items():
                    loan.arrays[name][...] = array
                loans.append(loan)
            for loan, weight in zip(loans[:-1], inputs.weights, strict=False):
                loan.send(weight)
            ready()
            begin = time.perf_counter()
            loans[-1].send(inputs.weights[-1])
            result = round_.result(timeout=RESULT_TIMEOUT_S)
            return Run(time.perf_counter() - begin, result.arrays, result.report.shape)

    return side


def _copied(node: Node) -> Side:
    """A side that copies the updates into the arena while the clock runs."""

    def side(inputs: Inputs, ready: Ready) -> Run:
        ready()
        with node.open_round(inputs.spec, expected=len(inputs.arrays), timing="eager") as round_:
            begin = time.perf_counter()
            for k, (update, weight) in enumerate(zip(inputs.arrays, inputs.weights, strict=True)):
                round_.submit(update, weight, client_id=k)
            result = round_.result(timeout=RESULT_TIMEOUT_S)
            return Run(time.perf_counter() - begin, result.arrays, result.report.shape)

    return side


# ---------------------------------------------------------------- the figures


def _row(way: str, workers: int, shape: str, runs: dict[str, list[tuple[float, float]]], nbytes: int) -> dict[str, Any]:
    seconds = [run for run, _ in runs[way]]
    median = statistics.median(seconds)
    return {
        "way": way,
        "title": TITLES[way],
        "workers": workers,
        "shape": shape,
        "median_s": median,
        "min_s": min(seconds),
        "gb_per_s": nbytes / median / 1e9,
        "times_flower": statistics.median(run for run, _ in runs["flower"]) / median,
        "share_of_read": statistics.median(nbytes / run / 1e9 / read for run, read in runs[way]),
    }


def _error_over_tolerance(spec: TensorSpec, mean: Mapping[str, Array], replies: Replies, weights: list[float]) -> float:
    """The largest difference from Flower's mean, divided by the difference that rounding allows.

    lifl may be off the exact mean by :func:`lifl.fold.tolerance`, t. Flower rounds to the arrays' dtype,
    with unit roundoff u = 2^-24 for float32: the factor, the product and at most n - 1 additions, so its mean
    is off by at most (n + 1) u S to first order, (n + 2) u S with the rest (S as in ``tolerance``); and
    t is at least 2 u S. Both together: t (1 + (n + 2) / 2). Flower's mean of integers is float64 and not
    rounded, which adds 0.5 to the bound.
    """
    from lifl.strategy import reference

    flower = reference.view_arrays(reference.aggregate(replies))
    views = [reference.view_reply(reply) for reply in replies]
    worst = 0.0
    for tensor in spec.tensors:
        columns = [{tensor.name: view[tensor.name]} for view in views]
        bound = fold.tolerance(columns, weights, TensorSpec((tensor,)))[tensor.name]
        is_float = tensor.dtype.startswith("float")
        allowed = bound * (1 + (len(replies) + 2) / 2) if is_float else bound + 0.5
        difference = np.abs(mean[tensor.name].astype(np.float64) - flower[tensor.name])
        with np.errstate(divide="ignore", invalid="ignore"):
            share = difference / allowed
        # 0 / 0 is no difference where none is allowed; a NaN in either mean is an infinite error.
        share = np.where(difference == 0, 0.0, np.where(np.isnan(share), np.inf, share))
        worst = max(worst, float(share.max(initial=0.0)))
    return worst


def fold_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_fold` as a table."""
    megabytes = figures["update_bytes"] / 1e6
    table = Table(
        title=f"The mean of {figures['updates']} updates of {figures['model']}, {megabytes:.1f} MB each",
        caption_justify="left",
    )
    notes = [
        f"Medians of {figures['repetitions']}. Reading memory, {figures['cores']} cores reach "
        f"{figures['read_all_cores_gb_per_s']:.1f} GB/s; the goal of shards is {figures['goal_share']:.0%}.",
        f"lifl's and Flower's means differ by {figures['error_over_tolerance']:.2f} of the difference that rounding "
        "allows.",
    ]
    table.add_column("way")
    for heading in ("workers", "ms", "GB/s", "against\nFlower", "of the\nread rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["rows"]:
        if "skipped" in row:
            table.add_row(row["title"], "", "-", "-", "-", "-")
            notes.append(f"{row['title']}: {row['skipped']}")
            continue
        table.add_row(
            row["title"] + (f" ({row['shape']})" if row["way"] == "planned" else ""),
            str(row["workers"]) if row["shape"] else "",
            f"{row['median_s'] * 1000:,.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['times_flower']:.1f} x",
            f"{row['share_of_read']:.0%}",
        )
    table.caption = Text("\n".join(notes))  # as rich's markup, 'lifl[peers]' would lose its brackets
    return table
