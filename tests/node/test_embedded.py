"""The Node that a process gets without asking for one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import lifl
from lifl.node.embedded import MIN_BYTES, embedded
from lifl.tensor import Tensor

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(3, np.float32)})
LARGE = lifl.TensorSpec((Tensor("w", "float32", (2**23,)),))


def test_there_is_one_per_process() -> None:
    """Every call gives the same Node, also from several threads at once, with room for small models."""
    with ThreadPoolExecutor(4) as threads:
        nodes = {id(n) for n in threads.map(lambda _: embedded(SPEC, 10), range(8))}
    assert len(nodes) == 1
    assert embedded(SPEC, 10).arena.block_bytes >= MIN_BYTES


def test_larger_model_gets_a_larger_one() -> None:
    """A model that needs more room gets a new Node; results of the old one stay valid."""
    small = embedded(SPEC, 2)
    with small.open_round(SPEC, expected=1) as round_:
        round_.submit({"w": np.ones(3, np.float32)})
        result = round_.result(30)
    large = embedded(LARGE, 4)
    assert large is not small
    assert not small.is_open
    assert result.arrays["w"].tolist() == [1.0] * 3
    large.open_round(LARGE, expected=4).close()
    assert embedded(SPEC, 2) is large


def test_node_in_use_is_not_replaced() -> None:
    """While a round is open its Node stays, whatever is asked for."""
    node = embedded(SPEC, 2)
    with node.open_round(SPEC, expected=1):
        assert embedded(LARGE, 4) is node


def test_closed_one_is_replaced() -> None:
    """After the embedded Node was closed the next call makes another."""
    first = embedded(SPEC, 2)
    first.close()
    second = embedded(SPEC, 2)
    assert second is not first
    assert second.is_open


def test_flower_order_has_room_for_every_update() -> None:
    """With order="flower", which keeps all updates until the last, the Node is made for all of them."""
    spec = lifl.TensorSpec.from_arrays({"w": np.zeros(2**21, np.float32)})
    node = embedded(spec, 40, "flower")
    with node.open_round(spec, 40, order="flower") as round_:
        for i in range(40):
            round_.submit({"w": np.full(2**21, i, np.float32)}, client_id=i)
        assert round_.result(30).num_updates == 40
