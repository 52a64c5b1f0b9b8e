"""Flower's own aggregation, for benchmarks and comparisons: replies in, mean out.

Owns the conversion of a benchmark's arrays into Flower's replies. Changes nothing in Flower and does no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from lifl.strategy import npy
from lifl.tensor import Array

WEIGHT = "num-examples"


def make_reply(arrays: Mapping[str, Array], weight: float) -> RecordDict:
    """A client's reply as Flower's server holds it: the arrays as bytes in NumPy's format, and a weight."""
    record = ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({WEIGHT: weight})})


def view_arrays(record: ArrayRecord) -> dict[str, Array]:
    """The arrays of a record as read-only views of its bytes, without a copy."""
    return {name: npy.view(array.data) for name, array in record.items()}


def view_reply(reply: RecordDict) -> dict[str, Array]:
    """The arrays of a reply from :func:`make_reply`, as read-only views of its bytes, without a copy."""
    return view_arrays(reply.array_records["arrays"])


def aggregate(replies: list[RecordDict]) -> ArrayRecord:
    """Flower's weighted mean of the replies, as its strategies compute it each round."""
    return aggregate_arrayrecords(replies, WEIGHT)
