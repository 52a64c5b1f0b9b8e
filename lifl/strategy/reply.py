"""What a reply says: its one record of arrays, its weight, and arrays in dtypes that the model holds without loss.

No state, no arena. Whoever takes replies in, a ServerApp or a server, reads them here.
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
    """The arrays of a client's reply and its weight; raises :class:`AdmissionError` if it is no train reply."""
    check_records(client, len(content.array_records), len(content.metric_records))
    weight = weight_of(client, next(iter(content.metric_records.values())), weight_key)
    return next(iter(content.array_records.values())), weight


def check_records(client: str, num_arrays: int, num_metrics: int) -> None:
    """A train reply has one ArrayRecord and one MetricRecord; raises :class:`AdmissionError`."""
    for name, count in (("ArrayRecord", num_arrays), ("MetricRecord", num_metrics)):
        if count != 1:
            raise AdmissionError(client, "format", f"{count} {name}s, one is expected", count)


def weight_of(client: str, metrics: MetricRecord, weight_key: str) -> Any:
    """A reply's weight as it came; raises :class:`AdmissionError` if there is none."""
    if weight_key not in metrics:
        names = [name[:MAX_NAME] for name in sorted(metrics)[:10]]  # a client chooses them, also how long they are
        raise AdmissionError(client, "weight", f"no {weight_key!r} among the metrics {names}", names)
    return metrics[weight_key]


def widened(views: Mapping[str, Any], spec: TensorSpec) -> Mapping[str, Any]:
    """Arrays whose dtype the model's holds without loss are converted, as Flower's clients expect.

    A model that has become float64 on the server (Flower's adaptive strategies do that) still gets
    float32 replies from PyTorch. Everything else is left to admission, whole numbers beyond 2**53 too, of which
    float64 has not all: NumPy calls that conversion safe.
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
    """True for 64-bit whole numbers that are all in float64."""
    return bool(whole.size == 0 or (whole.min() >= -(2**53) and whole.max() <= 2**53))
