"""Sizes of memory: as users write them, and as blocks and rounds take them from an arena."""

from __future__ import annotations

import math
import re

from lifl.shm import arena as shm
from lifl.shm import machine
from lifl.tensor import Layout, TensorSpec

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}


MAX_DIGITS = 30
"""Digits in a size that a user writes: no machine has that much memory, and float64 holds it."""


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
    """Default arena size: `most` bytes, or a quarter of the available memory if that is less."""
    return min(most, machine.available_bytes() // 4)


def units_of(nbytes: int) -> int:
    """Bytes that a block of `nbytes` takes: whole units, at least one."""
    unit = int(shm.lib.lifl_unit_bytes())
    return max(1, math.ceil(nbytes / unit)) * unit


def sum_bytes_of(layout: Layout) -> int:
    """Bytes of a partial sum, with its manifest."""
    return int(shm.lib.lifl_manifest_bytes()) + layout.sum_bytes


def round_bytes(spec: TensorSpec, workers: int, updates: int) -> int:
    """Bytes with which a round of `spec` runs on all `workers` while the arena holds so many updates."""
    layout = spec.layout
    sums = 2 * max(workers, 1) * units_of(sum_bytes_of(layout))
    return sums + 2 * units_of(0) + 2 * units_of(layout.mean_bytes) + updates * units_of(layout.update_bytes)
