"""Nodes 0 to 2 are honest; 3 to 7 do what the run's config tells them."""

from __future__ import annotations

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from hostile_app.nonsense import EVALUATIONS, FAR, HOSTILE, ROWS, Update, row_of, sends

app = ClientApp()


def honest(me: int, server_round: int) -> tuple[Update, int]:
    """An update of whole numbers, so that sums are exact, and its weight."""
    update = {
        "w": np.array([me, server_round, 2**me], np.float32),
        "bias": np.array([1.0, me * server_round, -(4.0**me)]),
        "count": np.array(100 * server_round + me, np.int64),
    }
    return update, 3 + 2 * me


@app.train()
def train(message: Message, context: Context) -> Message:
    """The config names what the bad nodes are up to: the whole table, one row, or to go too far."""
    config = message.content["config"]
    me, server_round = int(context.node_config["partition-id"]), int(config["server-round"])
    update, weight = honest(me, server_round)
    what, said = config["what"], sends(update, weight)
    if what == "table" and me in HOSTILE:
        said = ROWS[row_of(ROWS, server_round, me)].make(update, str(config["out"]))
    elif what in ROWS and me == 7:
        said = ROWS[str(what)].make(update, str(config["out"]))
    elif what == "far" and me == 6:
        said = sends({"w": 100 * update["w"], "bias": 100 * update["bias"], "count": update["count"]}, weight)
    elif what == "far" and me == 7:
        said = sends(update | {"bias": np.full(3, FAR)}, weight)
    return Message(said, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The bad nodes' replies cannot be averaged."""
    config = message.content["config"]
    me, server_round = int(context.node_config["partition-id"]), int(config["server-round"])
    said = RecordDict({"m": MetricRecord({"num-examples": 3 + 2 * me, "norm": float(me)})})
    if config["what"] == "evaluations" and me in HOSTILE:
        said = EVALUATIONS[row_of(EVALUATIONS, server_round, me)]()
    return Message(said, reply_to=message)
