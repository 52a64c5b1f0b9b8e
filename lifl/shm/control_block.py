"""The control block of a round: the layout of its blocks, and the recipe of its mean. Values and bytes, no arena.

The owner writes it, workers read it. The first part, the layout, is there when the round opens. The owner writes the
recipe when every sum and update lies where it will be read, and before it sends the first SHARD. Each worker writes the
times of its own shard.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import attrs

from lifl.tensor import Layout

FLOWER = 1
"""Flag of a round: the mean is made in Flower's order and arithmetic."""
BATCH_SHIFT = 8
"""The bits above the flags: the largest number of updates in a batch; 0 for as many as a manifest lists."""

MAX_SHARDS = 255
_HEAD = struct.Struct("<IIIIdd")
_ROW = struct.Struct("<IId")
_TIMES = struct.Struct("<QQ")


@attrs.frozen
class Source:
    """A block to read: a partial sum, or an update with its weight (in Flower's order: its factor)."""

    index: int
    generation: int
    weight: float = 0.0


@attrs.frozen
class MeanRecipe:
    """The sources of a mean: ``mean = (sum of sums + sum of weight_k * update_k) / weight``.

    Attributes
    ----------
    mean : Source
        The block that the mean is written to; its weight has no meaning.
    sums, updates : tuple of Source
    weight : tuple of float
        The sum of all weights, as a pair of floats; see ``fold.add_weights``.
    """

    mean: Source
    sums: tuple[Source, ...]
    updates: tuple[Source, ...]
    weight: tuple[float, float]


def control_bytes(layout: Layout, most_sources: int) -> int:
    """Bytes of the control block of a round whose mean has at most so many sums and updates."""
    return _recipe_offset(len(layout.encode(0))) + _HEAD.size + most_sources * _ROW.size


def times_offset(layout: Layout, shard: int) -> int:
    """Offset of a shard's times in the control block: its begin and its end (two uint64, ns)."""
    return _times_start(len(layout.encode(0))) + shard * _TIMES.size


def _times_start(layout_bytes: int) -> int:
    return -(-layout_bytes // 16) * 16


def _recipe_offset(layout_bytes: int) -> int:
    return _times_start(layout_bytes) + MAX_SHARDS * _TIMES.size


def write(buffer: Any, layout: Layout, recipe: MeanRecipe) -> None:
    """Writes a recipe behind the layout; `buffer` is the control block, at least ``control_bytes`` long."""
    at = _recipe_offset(len(layout.encode(0)))
    head = (recipe.mean.index, recipe.mean.generation, len(recipe.sums), len(recipe.updates), *recipe.weight)
    rows = b"".join(_ROW.pack(s.index, s.generation, s.weight) for s in (*recipe.sums, *recipe.updates))
    data = _HEAD.pack(*head) + rows
    buffer[at : at + len(data)] = data


def read(data: bytes) -> tuple[Layout, int, MeanRecipe]:
    """The layout, the flags and the recipe in a control block; raises ``ValueError`` if they reach beyond it."""
    layout, flags = Layout.decode(data)
    at = _recipe_offset(len(layout.encode(0)))
    if len(data) < at + _HEAD.size:
        raise ValueError(f"control block of {len(data)} bytes: the head of its order ends at {at + _HEAD.size}")
    index, generation, num_sums, num_updates, weight, low = _HEAD.unpack_from(data, at)
    at += _HEAD.size
    if len(data) < at + (num_sums + num_updates) * _ROW.size:
        raise ValueError(f"control block claims {num_sums} sums and {num_updates} updates in {len(data)} bytes")
    rows = [Source(*_ROW.unpack_from(data, at + i * _ROW.size)) for i in range(num_sums + num_updates)]
    return layout, flags, MeanRecipe(Source(index, generation), *_split(rows, num_sums), (weight, low))


def _split(rows: Sequence[Source], at: int) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    return tuple(rows[:at]), tuple(rows[at:])


def read_times(buffer: Any, layout: Layout, shard: int) -> tuple[int, int]:
    """The begin and the end of a shard, in nanoseconds of the monotonic clock."""
    begin, end = _TIMES.unpack_from(buffer, times_offset(layout, shard))
    return int(begin), int(end)


def times_of(begin_ns: int, end_ns: int) -> bytes:
    """The bytes of a shard's times, as its worker writes them."""
    return _TIMES.pack(begin_ns, end_ns)
