"""Clients that do as they are told: add a little noise, fail, send nonsense, or take their time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def update(arrays: ArrayRecord, me: int, number: int) -> dict[str, np.ndarray]:
    """The model, and something that depends on the node and the round alone."""
    rng = np.random.default_rng([me, number])
    new = {}
    for name, array in arrays.items():
        values = array.numpy()
        step = rng.normal(size=values.shape) if values.dtype.kind == "f" else rng.integers(1, 9, values.shape)
        new[name] = np.asarray(values + step, values.dtype)
    return new


@app.train()
def train(message: Message, context: Context) -> Message:
    """The config names a node and, for each mischief, the round in which it is up to it."""
    config = message.content["config"]
    me = int(context.node_config["partition-id"])
    number = config["server-round"]
    mischief = {kind for kind in ("fail", "nan", "sleep") if me == config.get("who") and number == config.get(kind)}
    if "fail" in mischief:
        raise RuntimeError("told to fail")
    end = time.monotonic() + 100
    while "sleep" in mischief and not Path(config["until"]).exists() and time.monotonic() < end:
        time.sleep(0.05)
    new = update(message.content["arrays"], me, number)
    if "nan" in mischief:
        new["bias"][1] = np.nan
    arrays = ArrayRecord({name: Array(array) for name, array in new.items()})
    metrics = MetricRecord({"num-examples": 3 + 2 * me, "loss": 1.0 / (1 + me)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates by the size of the model."""
    me = int(context.node_config["partition-id"])
    norm = float(abs(message.content["arrays"]["bias"].numpy()).sum())
    metrics = MetricRecord({"num-examples": 3 + 2 * me, "norm": norm})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
