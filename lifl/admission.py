"""What an update must satisfy before it counts. Pure: raises or returns, touches nothing else.

Every way into a round goes through here. A refusal names the client, the rule and what was sent, and
never ends the round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lifl.errors import AdmissionError
from lifl.tensor import TensorSpec, dtype_name

NO_WEIGHTS = (bool, complex, str, np.bool_, np.complexfloating)  # each of them would pass as a float


MIN_WEIGHT, MAX_WEIGHT = 2.0**-100, 2.0**100
"""Beyond these a float64 sum of finite float32 values could underflow to 0 or overflow."""


def check_weight(client_id: str, weight: object) -> float:
    """The weight as a float: a real number, finite, above 0, from ``MIN_WEIGHT`` to ``MAX_WEIGHT``.

    NumPy scalars are numbers; booleans are not weights.
    """
    if isinstance(weight, NO_WEIGHTS) or not hasattr(weight, "__float__"):
        raise AdmissionError(client_id, "weight", f"the weight is a {type(weight).__name__}: send a number", weight)
    try:
        value = float(weight)
    except (OverflowError, TypeError, ValueError) as error:
        raise AdmissionError(client_id, "weight", f"the weight {weight!r} is no float: {error}", weight) from None
    if not math.isfinite(value) or value <= 0:
        raise AdmissionError(client_id, "weight", f"the weight is {value}: send a finite number above 0", weight)
    if not MIN_WEIGHT <= value <= MAX_WEIGHT:
        reason = f"the weight is {value}: send one from {MIN_WEIGHT:.3g} to {MAX_WEIGHT:.3g}"
        raise AdmissionError(client_id, "weight", reason, weight)
    return value


def check_arrays(client_id: str, spec: TensorSpec, arrays: Mapping[str, Any]) -> None:
    """Keys, shapes and dtypes are exactly those of the round's model.

    bfloat16 may come as its raw bits (uint16), which is how NumPy without extensions holds it.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays is a {type(arrays).__name__}: give a mapping from name to array")
    if arrays.keys() != spec.keys():
        missing, extra = sorted(spec.keys() - arrays.keys()), sorted(map(str, arrays.keys() - spec.keys()))
        reason = f"missing {_some(missing)}; not in the model: {_some(extra)}"
        raise AdmissionError(client_id, "keys", reason, tuple(arrays))
    for tensor in spec.tensors:
        array = arrays[tensor.name]
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            reason = f"{tensor.name!r} is a {type(array).__name__}, not an array"
            raise AdmissionError(client_id, "dtype", reason, type(array).__name__)
        dtype = dtype_name(array)
        if dtype != tensor.dtype and (dtype, tensor.dtype) != ("uint16", "bfloat16"):
            reason = f"{tensor.name!r} has dtype {dtype}, the model has {tensor.dtype}"
            raise AdmissionError(client_id, "dtype", reason, dtype)
        shape = tuple(array.shape)
        if shape != tensor.shape:
            reason = f"{tensor.name!r} has shape {shape}, the model has {tensor.shape}"
            raise AdmissionError(client_id, "shape", reason, shape)


def refuse_value(client_id: str, name: str, index: int, value: float) -> AdmissionError:
    """The refusal of an update whose array `name` holds a NaN or Inf at flat index `index`."""
    return AdmissionError(client_id, "values", f"{name!r} holds {value} at flat index {index}", value)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"
