"""The bytes of a record and of its counters, as record.h has them."""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

RECORD_BYTES = 32
LAUNCHER = 0xFFFFFFFF
"""The key of the owner's socket."""
MAX_SOCKETS = 1024
MAX_ROUTES = 4096

_RECORD = struct.Struct("=IHHII" + "IIIHH")
_METRICS = struct.Struct("=8Q")
METRICS_BYTES = _METRICS.size


Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Record(NamedTuple):
    """A record as it passes through a socket; record.h describes the fields."""

    dst: int
    src: int
    line: int
    seq: int
    busy_us: int
    block: int
    generation: int
    round: int
    kind: int
    arg: int

    def pack(self) -> bytes:
        """The 32 bytes of the record."""
        return _RECORD.pack(*self)

    @classmethod
    def unpack(cls, data: Buffer) -> list[Record]:
        """The records in `data`, which holds whole ones."""
        return [cls._make(fields) for fields in _RECORD.iter_unpack(data)]


class Metrics(NamedTuple):
    """The kernel's counters of one participant; see record.h. Times are nanoseconds of the monotonic clock."""

    records: int = 0
    bytes: int = 0
    updates: int = 0
    first_ns: int = 0
    last_ns: int = 0
    folded: int = 0
    busy_ns: int = 0
    missed: int = 0

    @classmethod
    def merged(cls, of_cpus: Buffer) -> Metrics:
        """The counters of all CPUs, put together."""
        parts = [cls(*fields) for fields in _METRICS.iter_unpack(of_cpus)]
        sums = [sum(column) for column in zip(*parts, strict=True)]
        firsts = [part.first_ns for part in parts if part.first_ns]
        whole = cls(*sums)
        return whole._replace(first_ns=min(firsts, default=0), last_ns=max(part.last_ns for part in parts))
