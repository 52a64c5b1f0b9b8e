"""The weighted mean: a fast one over addresses, and a slow one to be read.

Pure: no clock, no process, no arena. A *state* is a partial sum; ``init`` makes an empty one, ``fold`` adds updates to
it, ``finish`` divides. With float64 sums, the tree and the order of the updates change the result by less than
:func:`tolerance`; ``flower_mean`` repeats Flower's own arithmetic bit by bit. FedAvg: McMahan et al., AISTATS 2017,
algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import attrs
import numpy as np

from lifl.shm import kernels
from lifl.tensor import (
    CODES,
    ITEM_BYTES,
    NUMPY_DTYPES,
    Array,
    Layout,
    TensorSpec,
    dtype_name,
    flower_dtype,
    sum_item_bytes,
)

MANTISSA_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


# ---------------------------------------------------------------- over addresses: for workers


def fold_at(layout: Layout, total: int, previous: int | None, updates: Sequence[int], weights: Sequence[float]) -> None:
    """Computes the sum at `total` = sum at `previous` (or 0) + the weighted updates; every segment in one pass.

    Each update is read once; `previous` and `total` must not overlap. Releases the GIL.
    """
    for s in layout.segments:
        if s.count:
            before = None if previous is None else previous + s.sum_offset
            inputs = [u + s.update_offset for u in updates]
            kernels.fold(CODES[s.dtype], total + s.sum_offset, before, inputs, weights, s.count)


def add_weights(weight: tuple[float, float], more: Sequence[float]) -> tuple[float, float]:
    """A sum of weights as a pair of floats, nearest float64 first: exact to about 2^-106."""
    try:
        high = math.fsum((*weight, *more))
    except OverflowError:  # impossible for admitted updates: admission bounds weights
        return math.inf, 0.0
    return high, math.fsum((*weight, *more, -high))


WHOLE = (0, 1)
SHARD_ALIGNMENT = 512
"""Each shard begins at a multiple of so many elements: no two shards share a cache line of a block."""


def shard_bounds(count: int, part: tuple[int, int]) -> tuple[int, int]:
    """The elements [begin, end) of `count` that shard i of n, ``part = (i, n)``, makes.

    ``begin_i = floor(count * i / n)``, down to the next multiple of ``SHARD_ALIGNMENT``; the last one ends at `count`.
    """
    index, parts = part
    begin, end = (count * i // parts // SHARD_ALIGNMENT * SHARD_ALIGNMENT for i in (index, index + 1))
    return begin, count if index + 1 == parts else end


def finish_at(
    layout: Layout,
    mean: int,
    sums: Sequence[int],
    weight: tuple[float, float],
    updates: Sequence[int] = (),
    weights: Sequence[float] = (),
    part: tuple[int, int] = WHOLE,
) -> bool:
    """Computes the mean at `mean` = (sum of the sums + the weighted updates) / `weight`, in the range of a shard.

    Every sum and update is read once. False if a number of the mean left the range of its dtype, or the weight that of
    float64. Releases the GIL.
    """
    finite = math.isfinite(weight[0])
    for s in layout.segments:
        begin, end = shard_bounds(s.count, part)
        if begin < end:
            item = ITEM_BYTES[s.dtype]
            finite &= kernels.finish(
                CODES[s.dtype],
                mean + s.mean_offset + begin * item,
                [t + s.sum_offset + begin * sum_item_bytes(s.dtype) for t in sums],
                [u + s.update_offset + begin * item for u in updates],
                weights,
                weight,
                end - begin,
            )
    return finite


def flower_at(
    layout: Layout, mean: int, updates: Sequence[int], factors: Sequence[float], part: tuple[int, int] = WHOLE
) -> None:
    """Computes Flower's mean of updates in their order, in the range of a shard; `layout` is a ``flower_layout``."""
    for s in layout.segments:
        begin, end = shard_bounds(s.count, part)
        if begin < end:
            inputs = [u + s.update_offset + begin * ITEM_BYTES[s.dtype] for u in updates]
            target = mean + s.mean_offset + begin * ITEM_BYTES[flower_dtype(s.dtype)]
            kernels.flower(CODES[s.dtype], target, inputs, factors, end - begin)


# ---------------------------------------------------------------- over arrays: state first, then input


@attrs.frozen
class Sum:
    """A partial sum: `buffer` holds ``spec.layout.sum_bytes``; None before the first fold."""

    spec: TensorSpec
    buffer: Array | None = None
    weight: tuple[float, float] = (0.0, 0.0)
    num_updates: int = 0


def init(spec: TensorSpec) -> Sum:
    """The sum of no updates."""
    return Sum(spec)


def fold(state: Sum, updates: Sequence[Mapping[str, Array]], weights: Sequence[float]) -> Sum:
    """A new sum with `updates` added, each times its weight; `state` is not changed.

    Raises ``ValueError`` if an update does not match the spec, or the two sequences differ in length.
    """
    if len(updates) != len(weights) or not updates:
        raise ValueError(f"{len(updates)} updates with {len(weights)} weights: give one weight for each, at least one")
    layout = state.spec.layout
    packed = [_pack(state.spec, update) for update in updates]
    buffer = np.empty(layout.sum_bytes, np.uint8)
    before = None if state.buffer is None else kernels.address_of(state.buffer)
    fold_at(layout, kernels.address_of(buffer), before, [kernels.address_of(p) for p in packed], weights)
    return Sum(state.spec, buffer, add_weights(state.weight, weights), state.num_updates + len(updates))


def merge(state: Sum, *others: Sum) -> dict[str, Array]:
    """The mean over several partial sums, computed as by the top of a tree."""
    sums = [s for s in (state, *others) if s.buffer is not None]
    mean = np.zeros(state.spec.layout.mean_bytes, np.uint8)
    addresses = [kernels.address_of(s.buffer) for s in sums]
    total = add_weights((0.0, 0.0), [part for s in sums for part in s.weight])
    finish_at(state.spec.layout, kernels.address_of(mean), addresses, total)
    return state.spec.views(mean)


def finish(state: Sum) -> dict[str, Array]:
    """The mean: sum / weight, one division and one rounding to each tensor's dtype."""
    return merge(state)


def flower_mean(spec: TensorSpec, updates: Sequence[Mapping[str, Array]], weights: Sequence[float]) -> dict[str, Array]:
    """Flower's mean of `updates` in this order, bit by bit (``aggregate_arrayrecords``)."""
    packed = [_pack(spec, update) for update in updates]
    mean = np.zeros(spec.flower_layout.mean_bytes, np.uint8)
    flower_at(
        spec.flower_layout, kernels.address_of(mean), [kernels.address_of(p) for p in packed], flower_factors(weights)
    )
    return spec.flower_views(mean)


def flower_factors(weights: Sequence[float]) -> list[float]:
    """The share of each weight, computed as in Flower: Python's sum, then Python's division."""
    total = sum(weights)
    return [w / total for w in weights]


def _pack(spec: TensorSpec, update: Mapping[str, Array]) -> Array:
    form = {name: (array.dtype, array.shape) for name, array in update.items()}
    if form != {tensor.name: (NUMPY_DTYPES[tensor.dtype], tensor.shape) for tensor in spec.values()}:
        raise ValueError(f"update {form} does not match {dict(spec)}")
    packed = np.zeros(spec.layout.update_bytes, np.uint8)
    for name, view in spec.views(packed).items():
        view[...] = update[name]
    return packed


# ---------------------------------------------------------------- the slow reference and its tolerance


def mean_reference(updates: Sequence[Mapping[str, Array]], weights: Sequence[float]) -> dict[str, Array]:
    """The weighted mean in exact rational arithmetic, rounded once: the oracle of the fast one.

    For every element: ``round(sum(w_k * x_k) / sum(w_k))``, integers to the nearest even. Takes
    microseconds per element. bfloat16 arrives and leaves as uint16 bits.
    """
    exact = [Fraction(w) for w in weights]
    total = sum(exact)
    means = {}
    for name, first in updates[0].items():
        columns = [_exact(update[name]) for update in updates]
        mean = [
            sum((w * x for w, x in zip(exact, row, strict=True)), Fraction()) / total
            for row in zip(*columns, strict=True)
        ]
        means[name] = _rounded(mean, np.asarray(first).dtype).reshape(np.shape(first))
    return means


def _exact(array: Array) -> list[Fraction]:
    values = (np.asarray(array).astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
    return [Fraction(v) for v in np.ravel(values).tolist()]


def _rounded(mean: list[Fraction], dtype: np.dtype[Any]) -> Array:
    if dtype == np.uint16:
        return (
            np.array([_nearest(m, "bfloat16") for m in mean], np.float32).view(np.uint32).__rshift__(16).astype(dtype)
        )
    if dtype.kind == "f":
        return np.array([_nearest(m, dtype.name) for m in mean], dtype)
    return np.array([round(m) for m in mean], dtype)


def _nearest(value: Fraction, dtype: str) -> float:
    """The nearest number of a binary format, ties to even; exact because it never passes another float."""
    if value == 0:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)
    exponent -= abs(value) < Fraction(2) ** exponent
    step = max(Fraction(2) ** (exponent - MANTISSA_BITS[dtype] + 1), Fraction(SMALLEST[dtype]))
    return float(round(value / step) * step)


def tolerance(updates: Sequence[Mapping[str, Array]], weights: Sequence[float], spec: TensorSpec) -> dict[str, Array]:
    """A bound on the distance from :func:`mean_reference`, for each element, of any tree over any order.

    With n updates, u = 2^-53 and S = sum(w_k |x_k|) / W: each product, addition and the final division
    and the sum of the weights W rounds once, at most 2n + 2 roundings of relative size u, so the float64
    mean is off by at most (2n + 2) u S (Higham, Accuracy and Stability, section 3.1, first order; 4n u S
    covers the rest). Rounding to the output then adds one unit in its last place at most: half by itself,
    half if the error moved the value over a midpoint. Integers: off by one only where the exact mean is
    within 4n u S of a midpoint, 0 where 4n u S is 0. Sums of int64 are pairs of doubles, with u = 2^-100.
    """
    n, total = len(updates), float(sum(weights))
    bounds = {}
    for name, tensor in spec.items():
        u = 2.0**-100 if tensor.dtype == "int64" else 2.0**-53
        size = np.zeros(tensor.shape, np.float64)
        for update, weight in zip(updates, weights, strict=True):
            size += weight / total * np.abs(_as_float64(update[name]))
        error = 4 * n * u * size
        if tensor.dtype in MANTISSA_BITS:
            ulp = np.maximum(size * 2.0 ** (1 - MANTISSA_BITS[tensor.dtype]), SMALLEST[tensor.dtype])
            bounds[name] = error + ulp
        else:
            bounds[name] = np.where(size > 0, 1.0, 0.0) if error.any() else error
    return bounds


def _as_float64(array: Any) -> Array:
    values: Array = np.asarray(array)
    if dtype_name(values) == "uint16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
