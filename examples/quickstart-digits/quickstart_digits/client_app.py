"""The work of every node: train the received model, or measure its accuracy."""

from __future__ import annotations

from typing import cast

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart_digits import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this node's examples and send it back."""
    partition_id = int(context.node_config["partition-id"])
    (images, labels), _ = _examples(context)
    model, loss = task.train(
        _received_model(message),
        images,
        labels,
        seed=[partition_id, _server_round(message)],
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in model.items()}),
            # "num-examples" is the weight of this update in the average.
            "metrics": MetricRecord({"num-examples": len(labels), "train-loss": loss}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the received model on examples that this node did not train on."""
    _, (images, labels) = _examples(context)
    accuracy = task.accuracy(_received_model(message), images, labels)
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": accuracy})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _received_model(message: Message) -> task.Model:
    arrays = message.content.array_records["arrays"]
    return {name: array.numpy() for name, array in arrays.items()}


def _server_round(message: Message) -> int:
    return cast("int", message.content.config_records["config"]["server-round"])


def _examples(context: Context) -> tuple[task.Examples, task.Examples]:
    """This node's training part and test part; `flower-supernode --node-config` has the number of the node."""
    return task.load_partition(
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
    )
