"""The blocks that a dead worker left, judged by the ownership words alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lifl.round.record import Update
from lifl.round.recovery import free, sweep, word
from lifl.shm.arena import AGENT, Arena, Block, State

ME, TOP = 1, 2


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena with an agent and two workers."""
    arena = Arena.create(2**20, 3)
    yield arena
    arena.close()


def given(arena: Arena, owner: int, state: State) -> Update:
    """An update whose block is in this state."""
    block = arena.alloc(64, owner, state)
    assert block is not None
    return Update("c", 1.0, block, 0.0, ME)


def partial_sum(arena: Arena, state: State, epoch: int = 0, batch: tuple[Block, ...] = (), owner: int = ME) -> Block:
    """A block for a sum, with its manifest."""
    block = arena.alloc(8192, owner, state)
    assert block is not None
    mapping = arena.map(block.index, block.generation)
    manifest = arena.manifest(mapping.address)
    manifest.epoch, manifest.batch = epoch, len(batch)
    for i, member in enumerate(batch):
        manifest.blocks[i], manifest.generations[i] = member.index, member.generation
    mapping.close()
    return block


def test_nothing_committed_is_folded_again(arena: Arena) -> None:
    """Without a commit every update goes to the successor, and those that were being read are suspects."""
    ready, reading = given(arena, ME, State.READY), given(arena, ME, State.READING)
    sums = [partial_sum(arena, State.ACCUM), partial_sum(arena, State.ACCUM)]
    remains = sweep(arena, ME, sums, [ready, reading])
    assert (remains.sum, remains.counted) == (None, [])
    assert remains.again == [ready, reading]
    assert remains.spare == sums
    assert remains.suspects == {reading.block.index}
    assert word(arena, reading.block) == (ME, State.READY)


def test_batch_of_a_committed_sum_counts_once(arena: Arena) -> None:
    """Inputs in the committed manifest are freed, freed ones count, others are folded again."""
    listed, freed, other = (given(arena, ME, s) for s in (State.READING, State.READING, State.READING))
    arena.move(freed.block, (ME, State.READING), (AGENT, State.FREE))
    total = partial_sum(arena, State.COMMITTED, 1, (listed.block, freed.block))
    remains = sweep(arena, ME, [total], [listed, freed, other])
    assert remains.sum == total
    assert (remains.counted, remains.again) == ([listed, freed], [other])
    assert word(arena, listed.block) == (AGENT, State.FREE)


@pytest.mark.parametrize("newer_first", [True, False])
def test_newer_of_two_committed_sums_is_kept(arena: Arena, newer_first: bool) -> None:
    """Dead between a commit and the release of the older sum: the higher epoch holds both batches."""
    old, new = given(arena, ME, State.READING), given(arena, ME, State.READING)
    older = partial_sum(arena, State.COMMITTED, 1, (old.block,))
    newer = partial_sum(arena, State.COMMITTED, 2, (new.block,))
    arena.move(old.block, (ME, State.READING), (AGENT, State.FREE))
    sums = [newer, older] if newer_first else [older, newer]
    remains = sweep(arena, ME, sums, [old, new])
    assert (remains.sum, remains.spare) == (newer, [older])
    assert (remains.counted, remains.again) == ([old, new], [])
    assert word(arena, older) == (ME, State.ACCUM)


def test_what_was_handed_over_is_left_alone(arena: Arena) -> None:
    """A sum that is the top's, and one that was freed, are no remains of the leaf."""
    handed = partial_sum(arena, State.COMMITTED, 1, owner=TOP)
    remains = sweep(arena, ME, [handed], [])
    assert (remains.sum, remains.spare) == (None, [])
    assert word(arena, handed) == (TOP, State.COMMITTED)


def test_sweeping_twice_is_harmless(arena: Arena) -> None:
    """A recovery that is itself repeated finds the same."""
    listed, other = given(arena, ME, State.READING), given(arena, ME, State.READING)
    sums = [partial_sum(arena, State.COMMITTED, 1), partial_sum(arena, State.COMMITTED, 2, (listed.block,))]
    first, second = (sweep(arena, ME, sums, [listed, other]) for _ in range(2))
    assert (first.sum, first.counted, first.again) == (second.sum, second.counted, second.again)
    assert first.spare == second.spare


def test_only_the_dead_ones_blocks_are_freed(arena: Arena) -> None:
    """Blocks of another participant, and of another generation, stay as they are."""
    mine, theirs = partial_sum(arena, State.ACCUM), partial_sum(arena, State.ACCUM, owner=TOP)
    stale = Block(theirs.index, theirs.generation - 1, theirs.nbytes)
    free(arena, ME, [mine, theirs, stale])
    assert word(arena, mine) == (AGENT, State.FREE)
    assert word(arena, theirs) == (TOP, State.ACCUM)
    assert word(arena, stale) == (AGENT, State.FREE)
