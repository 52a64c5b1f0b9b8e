"""The ablation: each step adds one idea of lifl; simulated for clusters, and for real with Nodes of this machine.

Owns the settings that are compared, and the simulation's error against the real rounds. ``lifl.bench.cluster`` carries
out a round, the planner simulates one. Nothing is printed here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from lifl import fold
from lifl.bench.cluster import Cluster, Played
from lifl.bench.shapes import model_spec
from lifl.bench.usage import QUIET, machine_s, own_s, wait_for_quiet
from lifl.errors import LiflError
from lifl.node import calibration
from lifl.planner.costs import Costs, Sizes
from lifl.planner.simulate import LIFL, POLICIES, Outcome, Policy, cluster, divide, simulate
from lifl.planner.traces import ABLATION_CAPACITY, ABLATION_NODES, ABLATION_UPDATES, Trace, ablation
from lifl.shm.machine import cores
from lifl.tensor import Array, TensorSpec

MODEL = "resnet18"
STEPS = (*POLICIES, LIFL)
MANY_NODES = 100
REAL_UPDATES = (20, 30, 40)
"""Updates of the real rounds. Five Nodes of one machine need 12 GB for 40 updates, most of it the fixed tree's sums."""
WINDOW_S = 2.0
"""Seconds over which the updates of the last real setting arrive; only there does it show how late the model is."""

DISTINCT = 8
"""Number of different updates. Clients share them, each with its own weight, so that they fit into memory too."""
SEED = 20240513
WARM_ROUNDS = 6
"""Rounds before those that count, if workers are kept: after them each worker has touched all of its memory."""
MAX_TRIES = 3
"""Bound for the tries of a setting, as a multiple of the repetitions; a disturbed round is repeated."""
PATIENCE_S = 5.0
CALIBRATIONS = 5

COUNTS = ("completion_s", "last_to_model_s", "cpu_s", "runtimes_started", "nodes_used", "bytes_between_nodes")
"""Figures of each round, simulated or real."""


def measure_ablation(
    updates: Sequence[int] = ABLATION_UPDATES,
    real_updates: Sequence[int] = REAL_UPDATES,
    repetitions: int = 3,
    *,
    is_simulated_only: bool = False,
    window_s: float = WINDOW_S,
    patience_s: float = PATIENCE_S,
    spec: TensorSpec | None = None,
    costs: Costs | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs every step of the ablation, simulated and real, and compares them.

    Simulated: on 5 and on 100 nodes, each a machine like this one, with equally many updates for each node. Real: on
    five Nodes of this machine, which share its cores and its memory bus, next to a simulation of the same setting. The
    updates arrive all at once; in a last setting the first of `real_updates` arrive evenly over `window_s`.

    Every real model is checked against the mean of the same updates in float64.

    Parameters
    ----------
    updates : sequence of int
        Updates for the 5 simulated nodes; 20 times as many for 100 nodes.
    real_updates : sequence of int
        Updates of the real rounds.
    repetitions : int
        Real rounds of each step that count; the figures are their medians.
    is_simulated_only : bool
        True: no real rounds.
    patience_s : float
        Longest wait, in seconds, before each real round until nobody else uses the machine.
    spec : TensorSpec, optional
        Shapes of the model. Default: ResNet-18's.
    costs : Costs, optional
        Default: measured now.

    Returns
    -------
    dict
        ``update_bytes``, ``cores``, ``capacity``, ``repetitions``, ``costs``; ``simulated``: dicts with ``nodes``,
        ``updates`` and ``rows``; ``real``: dicts with ``nodes``, ``updates``, ``window_s``, ``memory_bytes`` (of the
        largest cluster) and ``rows``; ``median_error`` and ``median_last_error`` over all real rows, None without any.
        A row has ``policy`` and ``COUNTS``; a real one also ``simulated`` (``COUNTS``), ``error`` (of the completion
        time, ``abs(simulated - real) / real``), ``last_error`` (the same for the time from the last arrival on),
        ``others`` (the largest share of the machine that others took) and ``rounds`` (the number that counted).

    Raises
    ------
    LiflError
        If a model is wrong.
    ValueError
        For counts below 1, or more updates than 5 nodes have room for, ``ABLATION_NODES * ABLATION_CAPACITY``.
    """
    if not (updates and real_updates) or min(*updates, *real_updates, repetitions) < 1:
        raise ValueError(f"updates={updates}, real_updates={real_updates}, repetitions={repetitions}: at least 1 each")
    most = ABLATION_NODES * ABLATION_CAPACITY
    if max(*updates, *real_updates) > most:
        raise ValueError(f"updates={updates}, real_updates={real_updates}: {ABLATION_NODES} nodes have room for {most}")
    say = on_progress or (lambda _: None)
    spec = model_spec(MODEL) if spec is None else spec
    sizes = Sizes(spec.layout.update_bytes, spec.layout.sum_bytes, spec.layout.mean_bytes, len(spec))
    if costs is None:
        say("the costs of this machine")
        costs = _calibrated(patience_s)
    figures: dict[str, Any] = {
        "update_bytes": sizes.update_bytes,
        "cores": costs.cores,
        "capacity": ABLATION_CAPACITY,
        "repetitions": repetitions,
        "costs": costs.to_dict(),
        "simulated": [],
        "real": [],
    }
    for nodes in (ABLATION_NODES, MANY_NODES):
        for n in updates:
            say(f"simulated: {nodes} nodes, {n} updates for each 5")
            trace = ablation(n, nodes, sizes)
            outcomes = [
                simulate(trace, policy, cluster(nodes, ABLATION_CAPACITY, costs.cores), costs) for policy in STEPS
            ]
            figures["simulated"].append({"nodes": nodes, "updates": len(trace), "rows": [_row(o) for o in outcomes]})
    if not is_simulated_only:
        arrays = [_numbers(spec, k) for k in range(DISTINCT)]
        for n, window in [*((n, 0.0) for n in real_updates), (real_updates[0], window_s)]:
            trace = ablation(n, ABLATION_NODES, sizes, window)
            figures["real"].append(_Real(spec, trace, arrays, costs, repetitions, patience_s, say).measure())
    rows = [row for setting in figures["real"] for row in setting["rows"]]
    for name in ("error", "last_error"):
        figures[f"median_{name}"] = statistics.median(row[name] for row in rows) if rows else None
    return figures


def _row(outcome: Outcome | Played, policy: str = "") -> dict[str, Any]:
    return {"policy": policy or getattr(outcome, "policy", "")} | {name: getattr(outcome, name) for name in COUNTS}


def _calibrated(patience_s: float) -> Costs:
    """The costs of this machine, from the try in which other processes used the machine least."""
    tried: list[tuple[float, Costs]] = []
    while len(tried) < CALIBRATIONS and not (tried and tried[-1][0] <= QUIET):
        wait_for_quiet(patience_s, cores())
        begin, own = machine_s(), own_s()
        costs = calibration.calibrate()
        own = own_s() - own
        tried.append(((machine_s() - begin - own) / max(own, 1e-9), costs))
    return min(tried, key=lambda one: one[0])[1]


# ---------------------------------------------------------------- for real


class _Real:
    """Real rounds of one trace, with the policy of each step in turn."""

    def __init__(
        self,
        spec: TensorSpec,
        trace: Trace,
        arrays: Sequence[Mapping[str, Array]],
        costs: Costs,
        repetitions: int,
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self._trace = trace
        self._arrays = arrays
        self._costs = costs
        self._repetitions = repetitions
        self._patience_s = patience_s
        self._say = say
        self._weights = [1.0 + i for i in range(len(trace))]
        self._nodes = cluster(ABLATION_NODES, ABLATION_CAPACITY, costs.cores)
        self._machines = {node.name: "this" for node in self._nodes}
        self._mean, self._allowed = _expected(spec, arrays, self._weights)
        self._memory_bytes = 0

    def measure(self) -> dict[str, Any]:
        rows = [self._step(policy) for policy in STEPS]
        return {
            "nodes": ABLATION_NODES,
            "updates": len(self._trace),
            "window_s": self._trace.times_s[-1],
            "memory_bytes": self._memory_bytes,
            "rows": rows,
        }

    def _step(self, policy: Policy) -> dict[str, Any]:
        # In a Node the first leaf that is done always becomes the top, so the simulation must do the same.
        policy = attrs.evolve(policy, is_changing_roles=True)
        outcome = simulate(self._trace, policy, self._nodes, self._costs, machines=self._machines)
        parts = divide(self._trace, policy, self._nodes, self._costs)
        names = [node.name for node in self._nodes]
        tries: list[Played] = []
        with Cluster(self._spec, self._trace, policy, names, parts) as real:
            self._memory_bytes = max(self._memory_bytes, real.memory_bytes)
            for _ in range(WARM_ROUNDS if policy.is_reusing else 1):
                real.play(self._arrays, self._weights, self._check)
            while len(tries) < MAX_TRIES * self._repetitions and len(self._quiet(tries)) < self._repetitions:
                self._say(
                    f"for real: {len(self._trace)} updates over {self._trace.times_s[-1]:g} s, {policy.name}, "
                    f"round {len(tries) + 1}, {len(self._quiet(tries))} of {self._repetitions} undisturbed"
                )
                wait_for_quiet(self._patience_s, self._costs.cores)
                tries.append(real.play(self._arrays, self._weights, self._check))
        counted = self._quiet(tries) or sorted(tries, key=self._others)[: self._repetitions]
        row = _row(counted[0], policy.name)
        for name in COUNTS:
            row[name] = statistics.median(getattr(one, name) for one in counted)
        simulated = _row(outcome)
        return row | {
            "simulated": {name: simulated[name] for name in COUNTS},
            "error": abs(simulated["completion_s"] - row["completion_s"]) / row["completion_s"],
            "last_error": abs(simulated["last_to_model_s"] - row["last_to_model_s"]) / row["last_to_model_s"],
            "others": max(map(self._others, counted)),
            "rounds": len(counted),
        }

    def _quiet(self, tries: Sequence[Played]) -> list[Played]:
        return [one for one in tries if self._others(one) <= QUIET]

    def _others(self, one: Played) -> float:
        return one.others_s / (one.completion_s * self._costs.cores)

    def _check(self, model: Mapping[str, Array]) -> None:
        for name, mean in self._mean.items():
            off = np.abs(model[name] - mean)
            if not (off <= self._allowed[name]).all():
                raise LiflError(f"the model is wrong: {name} is off by up to {off.max():g}")


def _numbers(spec: TensorSpec, k: int) -> dict[str, Array]:
    random = np.random.default_rng(SEED + k)
    return {
        t.name: random.random(t.shape, np.float32) - np.float32(0.5)
        if t.dtype == "float32"
        else random.integers(0, 100, t.shape).astype(t.dtype)
        for t in spec.tensors
    }


def _expected(
    spec: TensorSpec, arrays: Sequence[Mapping[str, Array]], weights: Sequence[float]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The mean in float64, and the largest difference that a model may have from it.

    Each node rounds its mean, and the top rounds the mean of those: so the difference is bounded by two times
    :func:`lifl.fold.tolerance`, the bound for one rounding.
    """
    n = min(len(arrays), len(weights))
    together = [sum(weights[k::n]) for k in range(n)]
    bounds = fold.tolerance(arrays[:n], together, spec)
    total = sum(weights)
    mean = {}
    for name, tensor in spec.items():
        mean[name] = np.zeros(tensor.shape)
        for weight, update in zip(together, arrays, strict=False):
            mean[name] += weight / total * update[name]
    return mean, {name: 2 * bound for name, bound in bounds.items()}
