"""Rounds of FedAvg, Flower's or lifl's; time and CPU time are read when Flower evaluates each model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from lifl.bench import tree
from lifl.bench.shapes import random_update, spec_of
from lifl.bench.work import FIRST_MODEL

app = ServerApp()


def fed_avg(config: Any, **arguments: Any) -> Strategy:
    """The strategy to be measured."""
    if config["strategy"] == "lifl":
        from lifl.strategy import FedAvg as LiflFedAvg

        return LiflFedAvg(timing=config["timing"], **arguments)
    from flwr.serverapp.strategy import FedAvg

    return FedAvg(**arguments)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds; writes the time of each model, and the CPU time of the server's processes until then."""
    config = context.run_config
    server, nodes = int(config["server-pid"]), int(config["num-nodes"])
    strategy = fed_avg(
        config,
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
    )
    # All modules are imported here, and no array of the model exists yet.
    idle_bytes = tree.pss_bytes(server)
    spec = spec_of(json.loads(Path(str(config["tensors"])).read_text()))
    first = ArrayRecord({name: Array(array) for name, array in random_update(spec, FIRST_MODEL).items()})
    models: list[dict[str, Any]] = []

    def note_model(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models.append({"round": server_round, "at_s": time.monotonic(), "cpu_s": tree.cpu_s(server)})
        return MetricRecord({"round": server_round})

    result = strategy.start(
        grid=grid, initial_arrays=first, num_rounds=int(config["num-server-rounds"]), evaluate_fn=note_model
    )
    # The arrays are saved by number, because a tensor's name may be no valid file name in the archive.
    np.savez(str(config["model"]), *(result.arrays[name].numpy() for name in spec))
    out = Path(str(config["out"]))
    unfinished = out.with_name(out.name + ".unfinished")
    unfinished.write_text(json.dumps({"idle_bytes": idle_bytes, "models": models}))
    os.replace(unfinished, out)
