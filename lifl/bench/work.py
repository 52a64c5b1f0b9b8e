"""The work of every side of a measured round, and its figures; the same for each server.

Owns the settings of the work, the check of the model, and the names of the figures. Starts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np

from lifl import fold
from lifl.bench.shapes import random_update
from lifl.bench.tree import MemoryLog
from lifl.errors import LiflError
from lifl.round.settings import Timing
from lifl.tensor import Array, TensorSpec

FIRST_MODEL = -1
"""The seed of the first model; the seeds of the nodes' updates are 0 and up."""


@attrs.frozen
class Work:
    """The work of a side; only lifl's sides use ``timing``, ``memory`` and ``has_profile``."""

    spec: TensorSpec
    nodes: int
    rounds: int
    timing: Timing
    memory: str | None
    is_patient: bool = False
    has_profile: bool = False


@attrs.frozen
class Run:
    """A run of one side: its rounds, and figures of all of them; see :func:`lifl.bench.round.measure_round`."""

    rounds: list[dict[str, Any]]
    cpu_s: float
    cpu_by_process_s: dict[str, float]
    idle_bytes: int
    peak_bytes: int
    error_over_tolerance: float
    load_cpu_s: float | None
    profile: dict[str, float] | None = None
    gateway_bytes: dict[str, int] | None = None


def make_run(
    work: Work,
    title: str,
    rounds: list[dict[str, Any]],
    figures: Mapping[str, Any],
    memory: MemoryLog,
    model: Mapping[str, Array],
    *,
    is_exact: bool,
    load_cpu_s: float | None = None,
) -> Run:
    """A run from its server's `figures`: "idle_bytes", and "models", each with "at_s" and "cpu_s".

    `is_exact`: lifl made the model. `load_cpu_s`: CPU seconds of the nodes' process, per round. Raises
    :class:`LiflError` if the model is not the mean of the updates.
    """
    error = error_over_tolerance(model, work, is_exact=is_exact)
    if not error <= 1:
        raise LiflError(f"{title}: the model is off by {error:.3g} times what rounding allows")
    first, last = figures["models"][0], figures["models"][-1]
    spent = Counter(last["cpu_s"])
    spent.subtract(first["cpu_s"])
    return Run(
        rounds=rounds,
        cpu_s=sum(spent.values()) / work.rounds,
        cpu_by_process_s={name: seconds / work.rounds for name, seconds in spent.most_common()},
        idle_bytes=figures["idle_bytes"],
        peak_bytes=memory.peak_bytes(first["at_s"], last["at_s"]) - figures["idle_bytes"],
        error_over_tolerance=error,
        load_cpu_s=load_cpu_s,
    )


def weight_of(node: int) -> float:
    """The weight of the updates of node `node`: its number of examples."""
    return node + 1.0


def error_over_tolerance(model: Mapping[str, Array], work: Work, *, is_exact: bool) -> float:
    """The largest difference of `model` from the mean of the updates, divided by the difference that rounding allows.

    For an `is_exact` model, as lifl's, that is :func:`lifl.fold.tolerance`. For sums in float32, as Flower's and
    NVFLARE's, it is (n + 2) / 2 times as much for floats, with n updates (see ``lifl.bench.fold``), and the same for
    integers, whose mean they do not round. The mean here is computed in float64; its own error is less than a millionth
    of the allowed difference.
    """
    updates = [random_update(work.spec, k) for k in range(work.nodes)]
    weights = [weight_of(k) for k in range(work.nodes)]
    factor = 1.0 if is_exact else (work.nodes + 2) / 2
    worst = 0.0
    for tensor in work.spec.tensors:
        columns = [{tensor.name: update[tensor.name]} for update in updates]
        is_float = tensor.dtype.startswith("float")
        allowed = fold.tolerance(columns, weights, TensorSpec((tensor,)))[tensor.name] * (factor if is_float else 1.0)
        mean = np.average([np.asarray(update[tensor.name], np.float64) for update in updates], axis=0, weights=weights)
        difference = np.abs(np.asarray(model[tensor.name], np.float64) - mean)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = difference / allowed
        # 0 / 0 is no difference where none is allowed; a NaN is an infinite error.
        share = np.where(difference == 0, 0.0, np.where(np.isnan(share), np.inf, share))
        worst = max(worst, float(share.max(initial=0.0)))
    return worst
