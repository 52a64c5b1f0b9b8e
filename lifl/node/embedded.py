"""The embedded Node of a process, for strategies without a Node of their own: made on first use, closed at exit."""

from __future__ import annotations

import contextlib
import threading

from lifl.errors import LiflError
from lifl.node import calibration
from lifl.node.node import Node
from lifl.round.settings import Order
from lifl.shm import arena as shm
from lifl.shm import machine
from lifl.shm.sizes import round_bytes
from lifl.tensor import TensorSpec

MIN_BYTES = 2**28
MAX_SIDE_BY_SIDE = 16

_node: Node | None = None
_lock = threading.Lock()  # guards _node: two strategies in two threads share one Node


def embedded(spec: TensorSpec, updates: int, order: Order = "any") -> Node:
    """The embedded Node of this process; it is made anew when a model needs more room than it has.

    The Node has room for `updates` of `spec` beside each other. If updates can be folded one after another, it has
    room for 16 at most, and takes at most half of the available memory; more updates wait their turn.
    ``order="flower"`` keeps all updates, and raises :class:`~lifl.errors.ShmError` if the memory cannot be had. The
    first embedded Node on a machine measures the costs of aggregation; see ``lifl.node.calibration``.
    """
    global _node
    shm.require()
    with _lock:
        most, least = (updates, updates) if order == "flower" else (min(updates, MAX_SIDE_BY_SIDE), 1)
        wanted = max(round_bytes(spec, machine.cores(), most), MIN_BYTES)
        node = _node
        if node is not None and node.is_open:
            if node.has_rounds or node.arena.block_bytes >= wanted:
                return node
            node.close()
        # The first time on a machine this takes a second or two, before any client is asked for an update.
        measured = calibration.costs()
        with contextlib.suppress(LiflError, OSError):  # a machine that is too full to be measured can still aggregate
            measured = calibration.costs(measure=True)
        _node = Node(max(round_bytes(spec, 1, least), min(wanted, machine.available_bytes() // 2)))
        _node.forecast.costs = measured
        return _node
