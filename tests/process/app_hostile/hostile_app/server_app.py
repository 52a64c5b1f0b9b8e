"""lifl's FedAvg over the whole table, then Flower's over some rows of it; what came of them as JSON and arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from hostile_app.nonsense import EVALUATIONS, ROWS, rounds
from lifl.strategy import FedAvg

app = ServerApp()

NODES: dict[str, Any] = {"min_train_nodes": 8, "min_evaluate_nodes": 8, "min_available_nodes": 8}
STOCK = ("a NaN", "one array too many")
CLIPPING_NORM = 5000.0


def first_model() -> ArrayRecord:
    """A small one: it is not the size that this is about."""
    arrays = {"w": np.zeros(3, np.float32), "bias": np.zeros(3), "count": np.array(0, np.int64)}
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Writes NAME-ROUND.npz for the model after each round, and results.json."""
    out = Path(str(context.run_config["out"]))
    blind = {**NODES, "fraction_evaluate": 0.0}
    lifl = FedAvg(max_weight=2**40, quorum=3, **blind)
    runs: list[tuple[str, Any, int]] = [
        ("table", lifl, rounds(ROWS)),
        ("evaluations", FedAvg(fraction_train=0.0, **NODES), rounds(EVALUATIONS)),
        ("far", FedAvg(clipping_norm=CLIPPING_NORM, **blind), 1),
        *((row, FlowerFedAvg(**blind), 1) for row in STOCK),
    ]
    said: dict[str, Any] = {}
    for name, strategy, number_of_rounds in runs:
        said[name] = {}

        def save(number: int, arrays: ArrayRecord, name: str = name) -> MetricRecord | None:
            np.savez(out / f"{name}-{number}.npz", **{key: array.numpy() for key, array in arrays.items()})
            return None

        told = {"what": name, "out": str(out)}
        try:
            result = strategy.start(
                grid,
                first_model(),
                number_of_rounds,
                timeout=120,
                train_config=ConfigRecord(told),
                evaluate_config=ConfigRecord(told),
                evaluate_fn=save,
            )
        except Exception as error:  # of Flower's, which ends the run
            said[name]["error"] = f"{type(error).__name__}: {error}"
            continue
        said[name]["reports"] = {n: r.to_dict() for n, r in getattr(result, "reports", {}).items()}
        said[name]["evaluated"] = {n: dict(m) for n, m in result.evaluate_metrics_clientapp.items()}
    (out / "results.json").write_text(json.dumps(said))
