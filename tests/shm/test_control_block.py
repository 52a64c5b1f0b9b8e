"""Control blocks: what is written is read, and what claims more than it has is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lifl
from lifl.shm import control_block
from lifl.shm.control_block import MeanRecipe, Source

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(7, np.float32), "n": np.array(0), "h": np.zeros(3, np.float16)})
numbers = st.integers(0, 2**32 - 1)
sources = st.builds(Source, numbers, numbers, st.floats(allow_nan=False))


def control(what: MeanRecipe, flags: int = 0) -> bytearray:
    """A control block with an order in it."""
    encoded = SPEC.layout.encode(flags)
    block = bytearray(control_block.control_bytes(SPEC.layout, len(what.sums) + len(what.updates)))
    block[: len(encoded)] = encoded
    control_block.write(block, SPEC.layout, what)
    return block


@given(
    st.builds(
        MeanRecipe,
        sources.map(lambda s: Source(s.index, s.generation)),
        st.lists(sources, max_size=5).map(tuple),
        st.lists(sources, max_size=70).map(tuple),
        st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    ),
    st.integers(0, 2**16),
)
def test_what_is_written_is_read(what: MeanRecipe, flags: int) -> None:
    """Layout, flags and every source, bit by bit."""
    assert control_block.read(bytes(control(what, flags))) == (SPEC.layout, flags, what)


def test_each_shard_has_times_of_its_own() -> None:
    """A worker's note touches neither the order nor another worker's note."""
    what = MeanRecipe(Source(1, 2), (Source(3, 4),), (Source(5, 6, 7.0),), (8.0, 0.0))
    block = control(what)
    for shard in (0, 1, control_block.MAX_SHARDS - 1):
        at, times = control_block.times_offset(SPEC.layout, shard), control_block.times_of(10 + shard, 20 + shard)
        block[at : at + len(times)] = times
    assert control_block.read(bytes(block))[2] == what
    assert [control_block.read_times(block, SPEC.layout, shard) for shard in (0, 1, 2)] == [(10, 20), (11, 21), (0, 0)]


def test_an_order_that_leaves_its_block_is_refused() -> None:
    """Counts come from shared memory: they are held against the bytes that are there."""
    block = bytes(control(MeanRecipe(Source(1, 2), (), tuple(Source(i, 1, 1.0) for i in range(3)), (3.0, 0.0))))
    with pytest.raises(ValueError, match="claims 0 sums and 3 updates"):
        control_block.read(block[:-1])
    with pytest.raises(ValueError, match="the head of its order"):
        control_block.read(block[: control_block.times_offset(SPEC.layout, 3)])
