"""The rules that an update must satisfy before it counts. Pure: raises or returns, touches nothing else.

Every way into a round goes through here. A refusal names the client, the rule and the value that was sent, and never
ends the round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import attrs
import numpy as np

from lifl.errors import AdmissionError
from lifl.tensor import TensorSpec, dtype_name

NO_WEIGHTS = (bool, complex, str, np.bool_, np.complexfloating)
"""Types that are no weights, although ``float`` takes some values of most of them."""


MIN_WEIGHT, MAX_WEIGHT = 2.0**-100, 2.0**100
"""Beyond these a float64 sum of finite float32 values could underflow to 0 or overflow."""


@attrs.frozen(kw_only=True)
class Limits:
    """The bounds of a server, in addition to the rules for every update. The defaults bound nothing more.

    Attributes
    ----------
    max_weight : float
        The largest weight that is accepted; a larger one is refused, not cut. One client's part in the mean
        is its weight over the sum of all, so a server that does not know its clients should set it.
    clipping_norm : float, optional
        The largest distance of an update from the round's base model, in the L2 norm over all floating-point
        tensors together. An update that is farther away is moved onto that distance along the line to the base, as
        Flower's server-side clipping does. Integer and boolean tensors are neither counted nor changed.
    client_bytes : int, optional
        Bytes of the arena that one client may hold at once, in all open rounds: loans, and updates that are
        not folded yet.
    total_bytes : int, optional
        Bytes of the arena that all clients of the round may hold at once.
    """

    max_weight: float = MAX_WEIGHT
    clipping_norm: float | None = None
    client_bytes: int | None = None
    total_bytes: int | None = None

    def __attrs_post_init__(self) -> None:
        """Raises ``ValueError`` for a bound that bounds nothing or refuses everything."""
        for name in ("max_weight", "clipping_norm"):
            bound = getattr(self, name)
            optional = name == "clipping_norm" and bound is None
            if not optional and (not _is_real(bound) or not MIN_WEIGHT <= bound <= MAX_WEIGHT):
                raise ValueError(f"{name}={bound!r}: give a number from {MIN_WEIGHT:.3g} to {MAX_WEIGHT:.3g}")
        for name in ("client_bytes", "total_bytes"):
            bound = getattr(self, name)
            if bound is not None and (not isinstance(bound, Integral) or isinstance(bound, bool) or bound < 1):
                raise ValueError(f"{name}={bound!r}: give a whole number of bytes, at least 1, or None")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, NO_WEIGHTS)


def check_weight(client_id: str, weight: object, max_weight: float = MAX_WEIGHT) -> float:
    """The weight as a float: a real number, finite, above 0, from ``MIN_WEIGHT`` to `max_weight`.

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
    if not MIN_WEIGHT <= value <= max_weight:
        reason = f"the weight is {value}: send one from {MIN_WEIGHT:.3g} to {max_weight:.3g}"
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


def refuse_quota(client_id: str, whose: str, held: int, wanted: int, bound: int) -> AdmissionError | None:
    """The refusal of `wanted` more bytes for a holder of `held` bytes that may hold `bound`; None if they fit."""
    if held + wanted <= bound:
        return None
    reason = f"{whose} holds {held:,} bytes of the arena and may hold {bound:,}; the update takes {wanted:,}"
    return AdmissionError(client_id, "quota", reason, held + wanted)


def refuse_norm(client_id: str) -> AdmissionError:
    """The refusal of an update so far from the base model that the distance is no float64."""
    reason = "its distance from the base model is beyond float64 and cannot be clipped: send values below 1e154"
    return AdmissionError(client_id, "norm", reason, math.inf)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n[:100]) for n in names[:3])  # a client chooses the names, and their length
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"
