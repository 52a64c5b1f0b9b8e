"""The L2 clip of an update against the round's base model. Pure: over arrays, in chunks, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lifl.errors import AdmissionError
from lifl.round import admission
from lifl.tensor import Array, TensorSpec

FLOATS = ("float32", "float64", "float16", "bfloat16")
CHUNK = 2**15
"""Elements that are worked on at once: two float64 arrays of them stay in a core's cache."""


class Clip:
    """u' = b + (u - b) * min(1, norm / ||u - b||), over all floating-point tensors of a model together.

    Integer and boolean tensors are neither counted nor changed. Each element is computed in float64 and
    rounded to its dtype (bfloat16 by way of float32); the same arrays give the same bits. An update that
    is near enough stays as it is, bit by bit.

    Parameters
    ----------
    spec : TensorSpec
        The form of an update.
    base : mapping of str to numpy.ndarray
        The base model, of exactly that form (bfloat16 as its bits). Kept, not copied: it must not change.
    norm : float
        Above 0.

    Raises
    ------
    ValueError
        If the base is of another form, or has a NaN or Inf.
    """

    def __init__(self, spec: TensorSpec, base: Mapping[str, Array], norm: float) -> None:
        try:
            admission.check_arrays("the base model", spec, base)
        except AdmissionError as error:
            raise ValueError(f"the base model has another form than the updates: {error.reason}") from None
        self.norm = norm
        self._base = [(t.name, t.dtype, _flat(base[t.name])) for t in spec.tensors if t.dtype in FLOATS]
        for name, dtype, array in self._base:
            if not all(np.isfinite(_wide(array[at], dtype)).all() for at in _chunks(array.size)):
                raise ValueError(f"the base model's {name!r} holds a NaN or Inf: updates cannot be clipped against it")

    def apply(self, arrays: Mapping[str, Array]) -> float:
        """Clips contiguous, finite arrays in place; returns the factor, 1.0 if nothing was changed.

        0.0 if the distance is beyond float64: then nothing was changed, and the update cannot be clipped.
        """
        distance = self._distance(arrays)
        if distance <= self.norm:
            return 1.0
        if not math.isfinite(distance):
            return 0.0
        factor = self.norm / distance
        for name, dtype, base in self._base:
            update = arrays[name].reshape(-1)
            for at in _chunks(base.size):
                start = _wide(base[at], dtype)
                change = _wide(update[at], dtype)
                change -= start
                change *= factor
                change += start
                update[at] = _narrow(change, dtype)
        return factor

    def _distance(self, arrays: Mapping[str, Array]) -> float:
        squares = []
        with np.errstate(over="ignore"):  # an overflow shows in the sum
            for name, dtype, base in self._base:
                update = arrays[name].reshape(-1)
                for at in _chunks(base.size):
                    change = _wide(update[at], dtype)
                    change -= _wide(base[at], dtype)
                    np.square(change, out=change)
                    # No dot product: BLAS has threads and an order of additions of its own.
                    squares.append(float(np.add.reduce(change)))
        try:
            return math.sqrt(math.fsum(squares))
        except OverflowError:
            return math.inf


def _flat(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint16) if flat.dtype.name == "bfloat16" else flat


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK)


def _wide(chunk: Array, dtype: str) -> Any:
    """A float64 copy of a chunk."""
    if dtype == "bfloat16":
        chunk = (chunk.astype(np.uint32) << 16).view(np.float32)
    return chunk.astype(np.float64)


def _narrow(chunk: Array, dtype: str) -> Any:
    """The chunk rounded to the nearest of `dtype`, ties to even."""
    if dtype != "bfloat16":
        return chunk.astype(dtype)
    # The lower 16 bits are rounded away: half of the last kept bit is added, a little less if that bit is even.
    bits = chunk.astype(np.float32).view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return (bits >> 16).astype(np.uint16)
