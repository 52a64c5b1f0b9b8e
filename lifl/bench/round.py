"""Whole Flower rounds, end to end: lifl's server and strategy and Flower's, which take turns in one run.

Owns the programs that are started, and the begin and end of each time. The server is real, and so is the ServerApp,
which ``flwr run`` starts; one process stands for all SuperNodes, see ``lifl.bench.load``. Nothing is printed here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from lifl.bench import peer
from lifl.bench.load import READY
from lifl.bench.shapes import model_spec, tensors_of
from lifl.bench.tree import MemoryLog, cpu_s, descendants_cpu_s
from lifl.bench.work import Run, Work, make_run
from lifl.deploy.deployment import Deployment
from lifl.errors import LiflError
from lifl.node import calibration
from lifl.round.settings import Timing
from lifl.shm.sizes import parse_bytes
from lifl.tensor import TensorSpec

APP = Path(__file__).parents[1] / "_round_app"
START_TIMEOUT_S = 120.0
ROUND_TIMEOUT_S = 600.0


@attrs.frozen
class Side:
    """A server and a strategy; ``command`` starts the server, ``takes_memory`` is true for one with an arena."""

    title: str
    command: tuple[str, ...]
    strategy: str
    takes_memory: bool = False


SIDES = {
    "flower": Side("Flower", ("flower-superlink",), "flower"),
    "strategy": Side("lifl's strategy", ("flower-superlink",), "lifl"),
    "server": Side("lifl-superlink", (sys.executable, "-m", "lifl.superlink"), "lifl", True),
    "unheld": Side("lifl, nothing held", (sys.executable, "-m", "lifl.superlink", "--lifl-hold", "0"), "lifl", True),
}
PEER = "nvflare"
TITLES = {name: side.title for name, side in SIDES.items()} | {PEER: peer.TITLE}
COMPARED = ("wall_s", "last_to_model_s", "cpu_s", "peak_bytes")


def measure_round(
    model: str = "resnet18",
    nodes: int = 8,
    rounds: int = 2,
    sides: Sequence[str] = ("flower", "strategy", "server"),
    *,
    timing: Timing = "eager",
    memory: str | None = None,
    is_patient: bool = False,
    has_profile: bool = False,
    repetitions: int = 1,
    spec: TensorSpec | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times `rounds` rounds of FedAvg with `nodes` virtual SuperNodes, `repetitions` times on each of `sides`.

    Each run has its own server. Every node pulls the model, and returns at once an update that was made before: random
    numbers of its own, in the model's shapes. Nothing is evaluated. The last model of every run is checked.

    The nodes wait less than SuperNodes do, because otherwise a round would mostly be sleep: one node asks for messages
    every 0.1 s and wakes the others when there are some, while each SuperNode asks every 3 s; and a node asks again
    for a missing object after 0.1 s to 1 s, while a SuperNode waits 1 s to 10 s.

    Parameters
    ----------
    model : str
        A name in ``lifl.bench.shapes.MODELS``.
    sides : sequence of str
        Names in ``TITLES``. ``"flower"``: Flower's SuperLink and Flower's FedAvg. ``"strategy"``: Flower's SuperLink
        and ``lifl.strategy.FedAvg``. ``"server"``: ``lifl-superlink`` and ``lifl.strategy.FedAvg``. ``"unheld"``: the
        same, but the server does not hold requests for work open. ``"nvflare"``, if it is installed: NVFLARE's server
        and FedAvg, and its clients, which return their arrays at once too.
    timing : {"eager", "lazy", "jit"}
        Timing of lifl's strategy.
    memory : str, optional
        Size of lifl-superlink's arena; default: the server's default.
    is_patient : bool
        True: the nodes wait as long as SuperNodes do.
    has_profile : bool
        True: lifl-superlink profiles its CPU time, from its start to its end; each round gets an equal share.
    spec : TensorSpec, optional
        Other shapes than those of `model`, which then is only a name.

    Returns
    -------
    dict
        ``model``, ``arrays``, ``update_bytes``, ``nodes``, ``rounds``, ``repetitions``, ``timing``, ``memory``,
        ``is_patient``, ``cores``, and ``rows``, one for each side, with medians over all its rounds, or runs:

        ``side``, ``title``
            The side.
        ``wall_s``
            Seconds from one model to the next, by Flower's calls of ``evaluate_fn`` with them.
        ``model_out_s``
            Seconds from one model until the last node has pulled it; None for NVFLARE.
        ``last_to_model_s``
            Seconds from the acknowledgement of the last update's last byte, at its node, to the new model; for NVFLARE
            from the time when its controller receives the last update.
        ``cpu_s``, ``cpu_by_process_s``
            CPU seconds of a round: of the SuperLink and all its descendants (SuperExec, ServerApp, lifl's workers),
            dead ones included, from the first model to the last, divided by the number of rounds.
        ``idle_bytes``, ``peak_bytes``
            Memory of the same processes: before the ServerApp makes the first array, when all is imported and
            idle; and the most above that from the first model to the last, measured every 50 ms. Both are sums of the
            proportional set sizes, so that memory that processes share is counted once.
        ``peak_over_updates``
            ``peak_bytes`` divided by the bytes of all updates of a round.
        ``requests``, ``sent_bytes``, ``received_bytes``, ``objects``
            Counts of a round, all nodes together, at the nodes; polls included. ``objects`` were pulled or pushed.
            None for NVFLARE.
        ``load_cpu_s``
            CPU seconds, per round, of the process that stands for the nodes; it runs on the same cores.
        ``profile_s``, ``gateway_bytes``
            With `has_profile`, for lifl-superlink, otherwise None: CPU seconds of a round by activity; and the bytes of
            the run that were ``received``, ``copied`` once more, and ``sent``.
        ``error_over_tolerance``
            The largest difference between the last model and the mean, divided by the difference that rounding allows.
        ``runs``
            For each repetition: the rounds one by one.
        ``over_flower``
            Each of ``wall_s``, ``last_to_model_s``, ``cpu_s`` and ``peak_bytes`` divided by Flower's; only if
            ``"flower"`` is a side.

    Raises
    ------
    ModuleNotFoundError
        If NVFLARE is asked for and not installed.
    LiflError
        If a model is not the mean of the updates.
    RuntimeError, TimeoutError
        If a program fails or a run does not end; both show the program's log.
    ValueError
        For an unknown model or side, or counts below 1.
    """
    spec = model_spec(model) if spec is None else spec
    if unknown := [side for side in sides if side not in TITLES]:
        raise ValueError(f"side {unknown[0]!r} is not known: choose one of {', '.join(TITLES)}")
    if PEER in sides and importlib.util.find_spec(PEER) is None:
        raise ModuleNotFoundError(f"{PEER} is not installed", name=PEER)
    if min(nodes, rounds, repetitions, len(sides)) < 1:
        raise ValueError(f"nodes={nodes}, rounds={rounds}, repetitions={repetitions}: at least 1 of each, and a side")
    if memory is not None:
        parse_bytes(memory)
    say = on_progress or (lambda _: None)
    work = Work(spec, nodes, rounds, timing, memory, is_patient, has_profile)
    if {"strategy", "server", "unheld"} & set(sides):
        say("the costs of aggregation on this machine, which lifl plans with")
        calibration.costs(measure=True)  # otherwise the first round would measure them
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for repetition in range(repetitions):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            say(f"{TITLES[side]}, run {repetition + 1} of {repetitions}")
            runs[side].append(peer.run_nvflare(work) if side == PEER else run_side(SIDES[side], work))
    rows = [_row(side, some, work) for side, some in runs.items()]
    for flower in [row for row in rows if row["side"] == "flower"]:
        for row in rows:
            row["over_flower"] = {name: row[name] / flower[name] for name in COMPARED}
    return {
        "model": model,
        "arrays": len(spec),
        "update_bytes": spec.nbytes,
        "nodes": nodes,
        "rounds": rounds,
        "repetitions": repetitions,
        "timing": timing,
        "memory": memory,
        "is_patient": is_patient,
        "cores": os.cpu_count(),
        "rows": rows,
    }


def run_side(side: Side, work: Work) -> Run:
    """Runs the rounds on a server of their own; raises the same errors as :func:`measure_round`."""
    memory = ("--lifl-memory", work.memory) if side.takes_memory and work.memory is not None else ()
    is_profiled = work.has_profile and side.takes_memory
    profile = Path(tempfile.mkdtemp(prefix="lifl-profile-")) / "profile.json" if is_profiled else None
    flags = () if profile is None else ("--lifl-profile", str(profile))
    with Deployment(0, (*side.command, *memory, *flags), start_timeout=START_TIMEOUT_S) as deployment:
        answers, server = _start_load(deployment, work), deployment.pid("superlink")
        files = {name: deployment.folder / name for name in ("tensors.json", "out.json", "model.npz")}
        config: dict[str, str | int | float | bool] = {
            "num-server-rounds": work.rounds,
            "num-nodes": work.nodes,
            "strategy": side.strategy,
            "timing": work.timing,
            "server-pid": server,
            "tensors": str(files["tensors.json"]),
            "out": str(files["out.json"]),
            "model": str(files["model.npz"]),
        }
        load_s = sum(cpu_s(deployment.pid("load")).values())
        with MemoryLog(server) as memory_log:
            deployment.run(APP, config, timeout=START_TIMEOUT_S + work.rounds * ROUND_TIMEOUT_S)
        load_s = sum(cpu_s(deployment.pid("load")).values()) - load_s
        workers_s = descendants_cpu_s(server, without=("flower-superexe", "flwr-serverapp"))
        figures = json.loads(files["out.json"].read_text())
        answered = [json.loads(line) for line in answers.read_text().splitlines()][1:]
        with np.load(files["model.npz"]) as archive:
            model = {name: archive[f"arr_{k}"] for k, name in enumerate(work.spec)}
    rounds = [
        _round(before, after, answered, work)
        for before, after in zip(figures["models"], figures["models"][1:], strict=False)
    ]
    is_exact, each_s = side.strategy == "lifl", load_s / work.rounds
    run = make_run(work, side.title, rounds, figures, memory_log, model, is_exact=is_exact, load_cpu_s=each_s)
    if profile is None:
        return run
    profiled = json.loads(profile.read_text()) if profile.exists() else {"seconds": {}, "bytes": {}}
    shutil.rmtree(profile.parent)
    spent = {name: seconds / work.rounds for name, seconds in (profiled["seconds"] | {"fold": workers_s}).items()}
    return attrs.evolve(run, profile=spent, gateway_bytes=profiled["bytes"])


def _start_load(deployment: Deployment, work: Work) -> Path:
    """Starts the nodes and waits until they are registered; returns the path of the file with their answers."""
    answers, order = deployment.folder / "answers.jsonl", deployment.folder / "order.json"
    tensors = tensors_of(work.spec)
    (deployment.folder / "tensors.json").write_text(json.dumps(tensors))
    settings = {
        "address": deployment.address,
        "nodes": work.nodes,
        "tensors": tensors,
        "out": str(answers),
        "patient": work.is_patient,
    }
    order.write_text(json.dumps(settings))
    home = {"FLWR_HOME": str(deployment.folder / "load")}
    deployment.launch("load", [sys.executable, "-m", "lifl.bench.load", str(order)], home)
    deployment.wait_until(
        lambda: answers.exists() and READY in answers.read_text(), "the virtual SuperNodes did not register", "load"
    )
    return answers


def _round(before: dict[str, Any], after: dict[str, Any], answered: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    # Answers have no number of a round, so they are assigned by their times: no message is under way between rounds.
    answered = [one for one in answered if before["at_s"] <= one["got_s"] < after["at_s"]]
    if len(answered) != work.nodes:
        raise LiflError(f"round {after['round']} had {len(answered)} answers of {work.nodes} nodes")
    last_s = max(one["acknowledged_s"] for one in answered)
    return {
        "round": after["round"],
        "wall_s": after["at_s"] - before["at_s"],
        "model_out_s": max(one["pulled_s"] for one in answered) - before["at_s"],
        "last_to_model_s": after["at_s"] - last_s,
        "requests": sum(one["traffic"]["calls"] for one in answered),
        "sent_bytes": sum(one["traffic"]["sent_bytes"] for one in answered),
        "received_bytes": sum(one["traffic"]["received_bytes"] for one in answered),
        "repeated": sum(one["traffic"]["repeated"] for one in answered),
        "waits": sum(one["waits"] for one in answered),
        "objects": sum(one["pulled"] + one["pushed"] for one in answered),
    }


def _row(side: str, runs: list[Run], work: Work) -> dict[str, Any]:
    rounds = [one for run in runs for one in run.rounds]

    def median(name: str) -> float | None:
        return float(statistics.median(one[name] for one in rounds)) if name in rounds[0] else None

    peak_bytes = statistics.median(run.peak_bytes for run in runs)
    return {
        "side": side,
        "title": TITLES[side],
        "wall_s": median("wall_s"),
        "model_out_s": median("model_out_s"),
        "last_to_model_s": median("last_to_model_s"),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "cpu_by_process_s": runs[-1].cpu_by_process_s,
        "idle_bytes": statistics.median(run.idle_bytes for run in runs),
        "peak_bytes": peak_bytes,
        "peak_over_updates": peak_bytes / (work.nodes * work.spec.nbytes),
        "requests": median("requests"),
        "sent_bytes": median("sent_bytes"),
        "received_bytes": median("received_bytes"),
        "objects": median("objects"),
        "load_cpu_s": runs[-1].load_cpu_s,
        "profile_s": runs[-1].profile,
        "gateway_bytes": runs[-1].gateway_bytes,
        "error_over_tolerance": max(run.error_over_tolerance for run in runs),
        "runs": [run.rounds for run in runs],
    }
