"""Reads a reply: its one record of arrays, its weight, and arrays in dtypes that the model holds without loss.

No state, no arena. Both receivers of replies, a ServerApp and the server, read them with these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from lifl.errors import AdmissionError
from lifl.tensor import TensorSpec

MAX_NAME = 100


def read_reply(client: str, content: RecordDict, weight_key: str) -> tuple[ArrayRecord, Any]:
    """The arrays and the weight of a client's reply; raises :class:`AdmissionError` if it is no train reply."""
    check_records(client, len(content.array_records), len(content.metric_records))
    weight = weight_of(client, next(iter(content.metric_records.values())), weight_key)
    return next(iter(content.array_records.values())), weight


def check_records(client: str, num_arrays: int, num_metrics: int) -> None:
    """Raises :class:`AdmissionError` unless a reply has one ArrayRecord and one MetricRecord, as a train reply has."""
    for name, count in (("ArrayRecord", num_arrays), ("MetricRecord", num_metrics)):
        if count != 1:
            raise AdmissionError(client, "format", f"{count} {name}s, one is expected", count)


def weight_of(client: str, metrics: MetricRecord, weight_key: str) -> Any:
    """The weight of a reply as it came; raises :class:`AdmissionError` if there is none."""
    if weight_key not in metrics:
        names = [name[:MAX_NAME] for name in sorted(metrics)[:10]]  # a client chooses their number and their lengths
        raise AdmissionError(client, "weight", f"no {weight_key!r} among the metrics {names}", names)
    return metrics[weight_key]


def widened(views: Mapping[str, Any], spec: TensorSpec) -> Mapping[str, Any]:
    """The arrays of an update, converted to the model's dtypes where these hold every value without loss.

    Flower's clients expect that: after Flower's adaptive strategies the model on the server is float64, and PyTorch
    still replies in float32. All other arrays stay as they are, for admission to judge; so do 64-bit whole numbers
    beyond 2**53, which float64 cannot hold although NumPy calls the conversion safe.
    """
    wide = dict(views)
    for name, view in views.items():
        wanted = spec.get(name)
        if wanted is None or view.dtype.name == wanted.dtype or wanted.dtype == "bfloat16":
            continue
        if np.can_cast(view.dtype, wanted.dtype, "safe") and (view.dtype.itemsize < 8 or _are_exact(view)):
            wide[name] = view.astype(wanted.dtype)
    return wide


def _are_exact(whole: Any) -> bool:
    """True if float64 holds all of these 64-bit whole numbers exactly."""
    return bool(whole.size == 0 or (whole.min() >= -(2**53) and whole.max() <= 2**53))
