"""The C kernels of ``_fold.c``, over addresses (``int``) in this process. Each releases the GIL.

Pure. The kernels do not check addresses: the caller has mapped the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lifl.shm.arena import check, ffi, lib, require


def _pointers(addresses: Sequence[int]) -> Any:
    return ffi.new("void *[]", [ffi.cast("void *", a) for a in addresses])


def fold(
    dtype: int, total: int, previous: int | None, updates: Sequence[int], weights: Sequence[float], count: int
) -> None:
    """Computes total = previous + sum of weights[k] * updates[k] over `count` elements; all are addresses."""
    status = lib.lifl_fold(
        dtype,
        ffi.cast("void *", total),
        ffi.cast("void *", previous or 0),
        _pointers(updates),
        ffi.new("double[]", list(weights)),
        len(updates),
        count,
    )
    check(status, "fold")


def finish(
    dtype: int,
    mean: int,
    sums: Sequence[int],
    updates: Sequence[int],
    weights: Sequence[float],
    weight: tuple[float, float],
    count: int,
) -> bool:
    """Computes mean = (sum of sums + sum of weights[k] * updates[k]) / weight, rounded once.

    False if a number of the mean is not finite. One of the two sequences may be empty. `weight` is the weight of
    everything, as a pair whose sum counts: its second part is what a float64 cannot hold.
    """
    status = lib.lifl_finish(
        dtype,
        ffi.cast("void *", mean),
        _pointers(sums),
        len(sums),
        _pointers(updates),
        ffi.new("double[]", list(weights)),
        len(updates),
        *weight,
        count,
    )
    return bool(check(status, "finish") != lib.LIFL_OVERFLOW)


def flower(dtype: int, mean: int, updates: Sequence[int], factors: Sequence[float], count: int) -> None:
    """Computes mean = updates[0] * factors[0] + ..., in Flower's order, dtypes and roundings."""
    status = lib.lifl_flower(
        dtype,
        ffi.cast("void *", mean),
        _pointers(updates),
        ffi.new("double[]", list(factors)),
        len(updates),
        count,
    )
    check(status, "flower")


def copy_finite(dtype: int, target: int, source: int, count: int) -> int:
    """Copies `count` elements; the index of the first NaN or Inf, or -1. Only looks if source is target."""
    return int(lib.lifl_copy_finite(dtype, ffi.cast("void *", target), ffi.cast("void *", source), count))


def read_memory(source: int, nbytes: int, rounds: int) -> None:
    """Reads `nbytes` `rounds` times, as fast as one core can: for measuring the bandwidth of memory."""
    lib.lifl_bench_read(ffi.cast("void *", source), nbytes, rounds)


def vector_width() -> str:
    """The instruction set that the kernels use on this machine."""
    require()
    return str(ffi.string(lib.lifl_vector_width()).decode())


def address_of(buffer: Any) -> int:
    """The address at which a buffer begins, in this process."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
