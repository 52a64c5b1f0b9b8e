"""The fold of ready updates: lifl's against Flower's, in one run, alternating.

Owns what is timed and from when to when. Both sides get the same updates of a real model's shapes, and
their results are compared. Nothing is printed here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from lifl import fold
from lifl.bench.limits import MEMORY_BYTES, read_gb_per_s
from lifl.bench.shapes import model_spec
from lifl.runtime import Node, cores
from lifl.sizes import round_bytes
from lifl.tensor import Array, Tensor, TensorSpec

SEED = 20240501
RESULT_TIMEOUT_S = 300.0
GOAL_RATIO = 5.0
"""How many times as fast as Flower lifl's fold of ready updates is meant to be."""

Replies = list[Any]
"""Flower's RecordDicts."""


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

    Flower: ``aggregate_arrayrecords`` on replies in memory, one thread. lifl, lazy: the updates lie in
    the arena; the clock starts at the last ``send`` and stops when ``result`` returns. lifl, eager: the
    clock starts before the first ``submit``, so it includes copying the updates into the arena. One
    repetition before the others warms up and is not counted.

    Needs memory for two copies of the updates and for the sums; imports flwr.

    Parameters
    ----------
    model : str
        A name in ``lifl.bench.shapes.MODELS``.
    workers : int, optional
        Of the Node; default: one per core.
    spec : TensorSpec, optional
        Other shapes than `model`'s, which then is only a name.

    Returns
    -------
    dict
        ``model``, ``updates``, ``update_bytes``, ``workers``, ``cores``, ``repetitions``,
        ``read_all_cores_gb_per_s`` (measured before each of the others), ``error_over_tolerance`` (the
        largest difference between lifl's and Flower's means, as a share of what their roundings allow:
        above 1 is wrong), and ``rows``: dicts with ``way``, ``title``, ``workers``, ``median_s``,
        ``min_s``, ``gb_per_s`` (updates, 10^9 bytes), ``times_flower`` (Flower's median over this
        one's, of the repetitions that alternated with it) and ``share_of_read`` (of
        ``read_all_cores_gb_per_s``).

    Raises
    ------
    ShmError
        If the machine has not enough memory.
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
    replies = [reference.make_reply(_update(spec, k), k + 1.0) for k in range(updates)]
    weights = [k + 1.0 for k in range(updates)]
    total_bytes = spec.nbytes * updates
    memory = np.ones(min(MEMORY_BYTES, max(total_bytes, 4096)), np.uint8)

    reads: list[float] = []

    def settle() -> None:
        """Reads other memory before each clock starts, so that no side finds its updates in a cache."""
        reads.append(read_gb_per_s(memory, cores()))

    flower_s: list[float] = []
    rows = []
    largest = 0.0
    for node_workers in dict.fromkeys((workers, 0)):
        with Node(memory=round_bytes(spec, node_workers, updates), workers=node_workers) as node:
            sides = {"lazy": _lazy_s} | ({"eager": _eager_s} if node_workers == workers else {})
            runs: dict[str, list[float]] = {name: [] for name in ("flower", *sides)}
            for repetition in range(repetitions + 1):
                say(f"{node_workers} workers, " + (f"repetition {repetition}" if repetition else "warming up"))
                for name in runs if repetition % 2 else reversed(runs):
                    if name == "flower":
                        settle()
                        seconds, mean = _flower_s(replies)
                    else:
                        seconds, mean = sides[name](node, spec, replies, weights, settle)
                        if repetition == 0:
                            largest = max(largest, _error_over_tolerance(spec, mean, replies, weights))
                    del mean
                    if repetition:
                        runs[name].append(seconds)
            flower_s += runs["flower"]
            for name in sides:
                rows.append(_row(name, node_workers, runs[name], runs["flower"], total_bytes))
    rows.insert(0, _row("flower", 0, flower_s, flower_s, total_bytes))
    read = statistics.median(reads)
    for row in rows:
        row["share_of_read"] = row["gb_per_s"] / read
    return {
        "model": model,
        "updates": updates,
        "update_bytes": spec.nbytes,
        "workers": workers,
        "cores": cores(),
        "repetitions": repetitions,
        "read_all_cores_gb_per_s": read,
        "error_over_tolerance": largest,
        "rows": rows,
    }


def _update(spec: TensorSpec, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(SEED + seed)
    return {t.name: _numbers(random, t) for t in spec.tensors}


def _numbers(random: np.random.Generator, tensor: Tensor) -> Array:
    if tensor.dtype == "float32":
        return random.random(tensor.shape, np.float32) - np.float32(0.5)
    return random.integers(0, 100, tensor.shape).astype(tensor.dtype)


# ---------------------------------------------------------------- the sides: seconds, and the mean


def _flower_s(replies: Replies) -> tuple[float, Mapping[str, Array]]:
    from lifl.strategy import reference

    begin = time.perf_counter()
    record = reference.aggregate(replies)
    seconds = time.perf_counter() - begin
    return seconds, reference.view_arrays(record)


def _lazy_s(
    node: Node, spec: TensorSpec, replies: Replies, weights: list[float], settle: Callable[[], None]
) -> tuple[float, Mapping[str, Array]]:
    from lifl.strategy import reference

    with node.open_round(spec, expected=len(replies), timing="lazy") as round_:
        loans = []
        for k, reply in enumerate(replies):
            loan = round_.loan(client_id=k)
            for name, array in reference.view_reply(reply).items():
                loan.arrays[name][...] = array
            loans.append(loan)
        for loan, weight in zip(loans[:-1], weights, strict=False):
            loan.send(weight)
        settle()
        begin = time.perf_counter()
        loans[-1].send(weights[-1])
        result = round_.result(timeout=RESULT_TIMEOUT_S)
        return time.perf_counter() - begin, result.arrays


def _eager_s(
    node: Node, spec: TensorSpec, replies: Replies, weights: list[float], settle: Callable[[], None]
) -> tuple[float, Mapping[str, Array]]:
    from lifl.strategy import reference

    arrays = [reference.view_reply(reply) for reply in replies]
    settle()
    with node.open_round(spec, expected=len(replies), timing="eager") as round_:
        begin = time.perf_counter()
        for k, (update, weight) in enumerate(zip(arrays, weights, strict=True)):
            round_.submit(update, weight, client_id=k)
        result = round_.result(timeout=RESULT_TIMEOUT_S)
        return time.perf_counter() - begin, result.arrays


# ---------------------------------------------------------------- what is made of them


TITLES = {
    "flower": "Flower (one core)",
    "lazy": "lifl, updates ready (lazy)",
    "eager": "lifl, copied in (eager)",
}


def _row(way: str, workers: int, runs: list[float], flower: list[float], nbytes: int) -> dict[str, Any]:
    median = statistics.median(runs)
    return {
        "way": way,
        "title": TITLES[way],
        "workers": workers,
        "median_s": median,
        "min_s": min(runs),
        "gb_per_s": nbytes / median / 1e9,
        "times_flower": statistics.median(flower) / median,
    }


def _error_over_tolerance(spec: TensorSpec, mean: Mapping[str, Array], replies: Replies, weights: list[float]) -> float:
    """The largest difference from Flower's mean as a share of what the two may differ by.

    lifl may be off the exact mean by :func:`lifl.fold.tolerance`, t. Flower rounds to the arrays' dtype,
    with unit roundoff u = 2^-24 for float32: the factor, the product and at most n - 1 additions, so it
    is off by at most (n + 1) u S to first order, (n + 2) u S with the rest (S as in ``tolerance``); and
    t is at least 2 u S. Together t (1 + (n + 2) / 2). Flower's mean of integers is float64 and not
    rounded: half of one more.
    """
    from lifl.strategy import reference

    _, flower = _flower_s(replies)
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
        # 0 / 0 is no difference where none is allowed; a NaN in either mean is as wrong as can be.
        share = np.where(difference == 0, 0.0, np.where(np.isnan(share), np.inf, share))
        worst = max(worst, float(share.max(initial=0.0)))
    return worst


def fold_table(figures: dict[str, Any]) -> Table:
    """The figures of :func:`measure_fold` as a table."""
    megabytes = figures["update_bytes"] / 1e6
    table = Table(
        title=f"The mean of {figures['updates']} updates of {figures['model']}, {megabytes:.1f} MB each",
        caption=(
            f"Medians of {figures['repetitions']}. Reading memory, {figures['cores']} cores reach "
            f"{figures['read_all_cores_gb_per_s']:.1f} GB/s.\nlifl's mean differs from Flower's by "
            f"{figures['error_over_tolerance']:.2f} of what rounding allows."
        ),
        caption_justify="left",
    )
    table.add_column("way", no_wrap=True)
    for heading in ("workers", "ms", "GB/s", "against\nFlower", "of the\nread rate"):
        table.add_column(heading, justify="right")
    for row in figures["rows"]:
        table.add_row(
            row["title"],
            "" if row["way"] == "flower" else str(row["workers"]),
            f"{row['median_s'] * 1000:,.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['times_flower']:.1f} x",
            f"{row['share_of_read']:.0%}",
        )
    return table
