"""Runs of each kind, one after another, and their results as JSON and arrays."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from lifl.node import embedded
from lifl.strategy import FedAvg

app = ServerApp()


class Both(FedAvg):
    """Compares each round's model with the one that Flower makes of the very same replies."""

    equal: list[bool]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The model is lifl's."""
        replies = list(replies)
        expected, expected_metrics = FlowerFedAvg().aggregate_train(server_round, replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.equal.append(arrays.object_id == expected.object_id and metrics == expected_metrics)
        return arrays, metrics


def first_model() -> ArrayRecord:
    """More than one of Flower's chunks of 5 MiB, and the shapes that trip others up."""
    rng = np.random.default_rng(0)
    arrays = {
        "weight": rng.normal(size=(1500, 1000)).astype(np.float32),
        "bias": np.zeros(3),
        "num_batches_tracked": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def everything(grid: Grid, out: Path, num_nodes: int, patience: float, *, is_short: bool = False) -> None:
    """All the runs; writes NAME-ROUND.npz for the model after each round, and results.json."""
    sample = {"min_train_nodes": num_nodes, "min_evaluate_nodes": num_nodes, "min_available_nodes": num_nodes}
    no_evaluation = {**sample, "fraction_evaluate": 0.0}
    both = Both(order="flower", **no_evaluation)
    both.equal = []
    strict = FedAvg(quorum=num_nodes, deadline=patience, **no_evaluation)
    # Late in round 2, however slow the others are: it waits for the model of round 2, and its reply arrives
    # in round 3.
    mischief = {"who": 1, "fail": 1, "sleep": 2, "until": str(out / "strict-2.npz")}
    # First what a lifl-superlink folds: that no Node has been made by then shows that it did.
    runs: list[tuple[str, Any, int, dict[str, Any]]] = [
        ("any", FedAvg(timing="lazy", **sample), 1, {}),
        ("lenient", FedAvg(**no_evaluation), 1, {"who": 1, "nan": 1}),
        ("strict", strict, 3, mischief),
        ("flower", FlowerFedAvg(**no_evaluation), 2, {}),
        ("both", both, 2, {}),
    ]
    if is_short:
        runs = [(name, strategy, 1, config) for name, strategy, _, config in runs if name != "strict"]
    said: dict[str, Any] = {"main thread": threading.current_thread() is threading.main_thread()}
    for name, strategy, rounds, config in runs:

        def save(number: int, arrays: ArrayRecord, name: str = name) -> None:
            np.savez(out / f"{name}-{number}.npz", **{key: array.numpy() for key, array in arrays.items()})

        began = time.monotonic()
        told = ConfigRecord(config)
        result = strategy.start(grid, first_model(), rounds, timeout=120, train_config=told, evaluate_fn=save)
        said[name] = {
            "seconds": time.monotonic() - began,
            "id": result.arrays.object_id,
            "metrics": {n: dict(m) for n, m in result.train_metrics_clientapp.items()},
            "evaluated": {n: dict(m) for n, m in result.evaluate_metrics_clientapp.items()},
            "reports": {n: r.to_dict() for n, r in getattr(result, "reports", {}).items()},
            "embedded": embedded._node is not None,
        }
    said["equal"] = both.equal
    said["workers"] = list(embedded._node.pids())
    (out / "results.json").write_text(json.dumps(said))


def resumable(grid: Grid, out: Path, checkpoint: str, end: int) -> None:
    """A run with a checkpoint, whose process ends as by a crash after round `end`, if that is not 0."""

    def save(number: int, arrays: ArrayRecord) -> None:
        np.savez(out / f"resumable-{number}.npz", **{key: array.numpy() for key, array in arrays.items()})
        if end and number == end:
            (out / "end").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    sample = {"min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2}
    strategy = FedAvg(order="flower", fraction_evaluate=0.0, checkpoint=checkpoint, resume=True, **sample)
    result = strategy.start(grid, first_model(), 3, timeout=120, evaluate_fn=save)
    (out / "results.json").write_text(json.dumps({n: r.to_dict() for n, r in result.reports.items()}))


def single(grid: Grid, out: Path, config: Any) -> None:
    """A single run, of Flower's strategy or of lifl's, as `config` says; writes the same as `everything`."""
    sample = {"min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
    limits = {"quorum": int(config["quorum"]), "deadline": float(config["deadline"])}
    strategy = FlowerFedAvg(**sample) if config["strategy"] == "flower" else FedAvg(**limits, **sample)

    def save(number: int, arrays: ArrayRecord) -> None:
        np.savez(out / "single.npz", **{key: array.numpy() for key, array in arrays.items()})
        (out / "single.npz").rename(out / f"single-{number}.npz")
        while number == config["pause"] and not (out / "on").exists():
            time.sleep(0.05)
        while config["steps"] and number < config["rounds"] and not (out / f"on-{number + 1}").exists():
            time.sleep(0.05)

    told = ConfigRecord({"who": 1, "sleep": int(config["sleep"]), "until": str(out / "go")})
    result = strategy.start(
        grid, first_model(), int(config["rounds"]), timeout=120, train_config=told, evaluate_fn=save
    )
    reports = {n: r.to_dict() for n, r in getattr(result, "reports", {}).items()}
    said = {"reports": reports, "embedded": embedded._node is not None}
    (out / "results.json").write_text(json.dumps({"single": said}))


@app.main()
def main(grid: Grid, context: Context) -> None:
    """On a SuperLink."""
    config = context.run_config
    if config["checkpoint"]:
        resumable(grid, Path(str(config["out"])), str(config["checkpoint"]), int(config["end"]))
        return
    if config["strategy"]:
        single(grid, Path(str(config["out"])), config)
        return
    settings = Path(str(config["out"])), int(config["num-nodes"]), float(config["patience"])
    everything(grid, *settings, is_short=bool(config["short"]))
