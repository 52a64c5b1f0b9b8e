"""Messages between the owner and its workers: each kind is packed and read back."""

from __future__ import annotations

import pytest

from lifl.shm import messages
from lifl.shm.arena import Block, ffi
from lifl.shm.messages import NO_BLOCK, Descriptor, Flush, Kind, Made

BLOCK = Block(7, 2**32 - 1, 0)
MAX = 255
"""Workers and shards have numbers up to this, so that two of them fit in an argument."""


def test_each_kind_names_its_round_and_its_block() -> None:
    """A message without an argument is its kind, the round and the block."""
    for packed, kind in (
        (messages.open_round(3, BLOCK), Kind.OPEN),
        (messages.folded(3, BLOCK), Kind.FOLDED),
        (messages.result(3, BLOCK), Kind.RESULT),
    ):
        assert packed == Descriptor(kind, 3, BLOCK.index, BLOCK.generation)
        assert messages.block_of(packed) == BLOCK
    for packed, kind in (
        (messages.abort(3), Kind.ABORT),
        (messages.aborted(3), Kind.ABORTED),
        (messages.failed(3), Kind.FAILED),
    ):
        assert packed == Descriptor(kind, 3, NO_BLOCK)


@pytest.mark.parametrize("flag", [False, True])
def test_flags(flag: bool) -> None:
    """GRANT and UPDATE carry one flag each."""
    granted, update = messages.grant(3, BLOCK, holds_sum=flag), messages.update(3, BLOCK, is_alone=flag)
    assert (granted.kind, messages.block_of(granted), messages.holds_sum(granted)) == (Kind.GRANT, BLOCK, flag)
    assert (update.kind, messages.block_of(update), messages.is_alone(update)) == (Kind.UPDATE, BLOCK, flag)


@pytest.mark.parametrize("pair", [(0, 1), (1, MAX), (MAX, MAX)])
def test_pairs(pair: tuple[int, int]) -> None:
    """FLUSH and SHARD carry two numbers each, and a SHARDED names the shard that its SHARD asked for."""
    flush, shard = messages.flush(3, BLOCK, Flush(*pair)), messages.shard(3, BLOCK, pair)
    assert (flush.kind, messages.block_of(flush), messages.flush_of(flush)) == (Kind.FLUSH, BLOCK, pair)
    assert (shard.kind, messages.block_of(shard), messages.part_of(shard)) == (Kind.SHARD, BLOCK, pair)
    for is_finite in (False, True):
        made = messages.sharded(shard, is_finite)
        assert (made.kind, made.round, messages.block_of(made)) == (Kind.SHARDED, 3, BLOCK)
        assert messages.made_of(made) == Made(pair[0], is_finite)


def test_a_sum_may_be_of_nothing() -> None:
    """A SUM names the leaf, and the block unless the leaf folded nothing; a FLUSH names no mean if shards make it."""
    packed, nothing = messages.leaf_sum(3, MAX, BLOCK), messages.leaf_sum(3, MAX, None)
    assert (packed.kind, messages.leaf_of(packed), messages.sum_of(packed)) == (Kind.SUM, MAX, BLOCK)
    assert (nothing.kind, messages.leaf_of(nothing), messages.sum_of(nothing)) == (Kind.SUM, MAX, None)
    assert messages.flush(3, None, Flush(0, 2)).block == NO_BLOCK


def test_the_bytes_in_a_ring_hold_every_field() -> None:
    """A descriptor of the largest numbers comes back out of 16 bytes."""
    largest = Descriptor(2**16 - 1, 2**32 - 1, NO_BLOCK, 2**32 - 1, 2**16 - 1)
    slot = ffi.new("lifl_desc *")
    messages.write(largest, slot)
    assert ffi.sizeof("lifl_desc") == 16
    assert messages.read(slot) == largest
