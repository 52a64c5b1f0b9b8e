"""The server's half: the strategy that aggregates, and the accuracy of the model after each round."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from quickstart_digits import task

app = ServerApp()


def fed_avg(library: str, **arguments: Any) -> Strategy:
    """FedAvg of Flower or of lifl: the import is the only difference between the two."""
    if library == "lifl":
        from lifl.strategy import FedAvg
    elif library == "flower":
        from flwr.serverapp.strategy import FedAvg
    else:
        raise ValueError(f'strategy must be "lifl" or "flower", not "{library}"')
    return FedAvg(**arguments)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the configured number of rounds; write the results if the configuration names a file."""
    library = str(context.run_config["strategy"])
    num_nodes = int(context.run_config["num-nodes"])
    num_rounds = int(context.run_config["num-server-rounds"])
    images, labels = task.load_central_test()
    rounds: list[dict[str, Any]] = []
    started = round_ended = time.monotonic()

    def evaluate_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        # Flower calls this before the first round (as round 0) and after each round.
        nonlocal round_ended
        model = {name: array.numpy() for name, array in arrays.items()}
        accuracy = task.accuracy(model, images, labels)
        seconds, round_ended = time.monotonic() - round_ended, time.monotonic()
        if server_round > 0:
            rounds.append({"round": server_round, "accuracy": accuracy, "seconds": seconds})
            print(f"Round {server_round} of {num_rounds}: accuracy {accuracy:.4f}")
        return MetricRecord({"accuracy": accuracy})

    strategy = fed_avg(
        library,
        min_train_nodes=num_nodes,
        min_evaluate_nodes=num_nodes,
        min_available_nodes=num_nodes,
    )
    first = {name: Array(array) for name, array in task.initial_model().items()}
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first),
        num_rounds=num_rounds,
        evaluate_fn=evaluate_centrally,
    )

    if path := str(context.run_config["results"]):
        # Only lifl's result has reports: the contributions to each round, and the times of its stages.
        reports = getattr(result, "reports", {})
        for entry in rounds:
            report = reports.get(entry["round"])
            entry["report"] = report.to_dict() if report is not None else None
        seconds = time.monotonic() - started
        write_json(Path(path), {"strategy": library, "rounds": rounds, "seconds": seconds})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that a reader finds the whole file or none."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2))
    os.replace(unfinished, path)
