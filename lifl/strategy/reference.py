"""Flower's own aggregation, to be measured and compared with: replies in, mean out.

Owns how a benchmark's arrays become Flower's replies. Changes nothing of Flower and does no arithmetic.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from lifl.tensor import Array

WEIGHT = "num-examples"
HEADER_BYTES = 4096
"""More than the header of any array in NumPy's file format here."""


def make_reply(arrays: Mapping[str, Array], weight: float) -> RecordDict:
    """A client's reply as Flower's server holds it: the arrays as bytes in NumPy's format, and a weight."""
    record = ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({WEIGHT: weight})})


def view_reply(reply: RecordDict) -> dict[str, Array]:
    """The arrays of a reply as read-only views of its bytes, without a copy."""
    return {name: _view(array.data) for name, array in reply.array_records["arrays"].items()}


def aggregate(replies: list[RecordDict]) -> dict[str, Array]:
    """Flower's weighted mean of the replies, as new arrays: what its FedAvg calls each round."""
    return {name: array.numpy() for name, array in flower_mean(replies).items()}


def flower_mean(replies: list[RecordDict]) -> ArrayRecord:
    """Flower's weighted mean of the replies, as Flower leaves it."""
    return aggregate_arrayrecords(replies, WEIGHT)


def _view(data: bytes) -> Array:
    header = io.BytesIO(data[:HEADER_BYTES])
    np.lib.format.read_magic(header)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if is_fortran:
        raise ValueError("an array in Fortran's order: a reply made by make_reply has none")
    flat: Array = np.frombuffer(data, dtype, int(np.prod(shape)), header.tell())
    return flat.reshape(shape)
