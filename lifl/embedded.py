"""The process's own Node, for strategies that were given none: made on first use, closed at exit."""

from __future__ import annotations

import threading

from lifl import shm
from lifl.runtime import Node, cores, round_bytes
from lifl.tensor import TensorSpec

LEAST_BYTES = 2**28
MOST_SIDE_BY_SIDE = 16

_node: Node | None = None
_lock = threading.Lock()


def embedded(spec: TensorSpec, updates: int) -> Node:
    """The Node of this process, made anew when a model needs more room than it has.

    It has room for `updates` of `spec` beside each other, up to 16 of them and half of what the machine
    has; more than fit wait their turn.
    """
    global _node
    with _lock:
        wanted = max(round_bytes(spec, cores(), min(updates, MOST_SIDE_BY_SIDE)), LEAST_BYTES)
        node = _node
        if node is not None and node.is_open:
            if node.has_rounds or node.arena.block_bytes >= wanted:
                return node
            node.close()
        _node = Node(max(round_bytes(spec, 1, 1), min(wanted, shm.available_bytes() // 2)))
        return _node
