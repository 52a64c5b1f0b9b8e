"""How much memory: what users write, and what blocks and rounds take of an arena."""

from __future__ import annotations

import math
import re

from lifl.shm import arena as shm
from lifl.tensor import Layout, TensorSpec

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}


MAX_DIGITS = 30
"""Of a size in words; float64 ends at 309, and no machine's memory is near this."""


def parse_bytes(memory: str | int) -> int:
    """``"2GiB"``, ``"512 MB"`` or a number of bytes, as bytes.

    Raises ``ValueError`` for anything else and for less than 1.
    """
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", memory)
        factor = UNITS.get(match[2].lower()) if match else None
        if not match or factor is None or len(match[1]) > MAX_DIGITS:
            raise ValueError(f"memory={memory!r} is not a size: write '2GiB', '512MiB' or a number of bytes")
        memory = int(float(match[1]) * factor)
    if memory < 1:
        raise ValueError(f"memory={memory} bytes: at least 1 is needed")
    return memory


def default_bytes(most: int) -> int:
    """The arena of who names no size: `most` bytes, or a quarter of what is available if that is less."""
    return min(most, shm.available_bytes() // 4)


def units_of(nbytes: int) -> int:
    """What a block of `nbytes` takes: whole units, at least one."""
    unit = int(shm.lib.lifl_unit_bytes())
    return max(1, math.ceil(nbytes / unit)) * unit


def sum_bytes_of(layout: Layout) -> int:
    """A partial sum's bytes, its manifest included."""
    return int(shm.lib.lifl_manifest_bytes()) + layout.sum_bytes


def round_bytes(spec: TensorSpec, workers: int, updates: int) -> int:
    """Memory with which a round of `spec` runs on all `workers` and `updates` fit beside each other."""
    layout = spec.layout
    sums = 2 * max(workers, 1) * units_of(sum_bytes_of(layout))
    return sums + 2 * units_of(0) + 2 * units_of(layout.mean_bytes) + updates * units_of(layout.update_bytes)
