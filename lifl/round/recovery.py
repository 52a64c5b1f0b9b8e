"""The blocks that a dead worker left behind, read from their ownership words: rings are hints, the words are the truth.

The owner calls this for a worker that is proven dead, before its successor starts; other workers go on meanwhile.
Everything here may be done twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from lifl.round.record import Update
from lifl.shm.arena import OWNER, Arena, Block, State, lib


@attrs.define
class Remains:
    """A dead leaf's part of a round.

    Attributes
    ----------
    sum : Block or None
        Its newest committed sum, if that has not been handed over to the top.
    spare : list of Block
        Its other blocks for sums, ready to be granted again.
    counted : list of Update
        The updates in a committed sum: their blocks are free by now.
    again : list of Update
        The updates in no committed sum: READY for the successor.
    suspects : set of int
        Indices of the blocks that the worker was reading when it died.
    """

    sum: Block | None = None
    spare: list[Block] = attrs.field(factory=list)
    counted: list[Update] = attrs.field(factory=list)
    again: list[Update] = attrs.field(factory=list)
    suspects: set[int] = attrs.field(factory=set)


def sweep(arena: Arena, worker: int, sums: Sequence[Block], updates: Iterable[Update]) -> Remains:
    """Sorts the blocks of a dead worker: its granted blocks `sums`, and the `updates` that it was given."""
    remains = Remains()
    committed = []
    for block in sums:
        owner, state = word(arena, block)
        if owner != worker:
            continue  # handed over, or freed
        if state in (State.COMMITTED, State.READING):
            committed.append((_epoch_and_batch(arena, block), block))
            arena.move(block, (worker, State.READING), (worker, State.COMMITTED))
        else:
            remains.spare.append(block)
    batch: set[tuple[int, int]] = set()
    # Two sums are committed if the worker died between a commit and the release of the sum before: the newer sum
    # contains the older.
    for (_, members), block in sorted(committed, key=lambda pair: pair[0][0]):
        if remains.sum is not None:
            arena.move(remains.sum, (worker, State.COMMITTED), (worker, State.ACCUM))
            remains.spare.append(remains.sum)
        remains.sum, batch = block, members
    for update in updates:
        block = update.block
        owner, state = word(arena, block)
        if owner != worker:
            remains.counted.append(update)  # the leaf freed it after its commit
        elif (block.index, block.generation) in batch:
            arena.move(block, (worker, State.READING), (OWNER, State.FREE))
            remains.counted.append(update)
        else:
            if arena.move(block, (worker, State.READING), (worker, State.READY)):
                remains.suspects.add(block.index)
            remains.again.append(update)
    return remains


def word(arena: Arena, block: Block) -> tuple[int, State]:
    """A block's owner and state; (OWNER, FREE) if it is of another generation by now."""
    generation, owner, state, _, _ = arena.describe(block.index)
    return (owner, state) if generation == block.generation else (OWNER, State.FREE)


def free(arena: Arena, worker: int, blocks: Iterable[Block]) -> None:
    """Frees those of `blocks` that the dead worker still owns, in whatever state."""
    for block in blocks:
        owner, state = word(arena, block)
        if owner == worker:
            arena.move(block, (worker, state), (OWNER, State.FREE))


def _epoch_and_batch(arena: Arena, block: Block) -> tuple[int, set[tuple[int, int]]]:
    mapping = arena.map(block.index, block.generation)
    manifest = arena.manifest(mapping.address)
    count = min(manifest.batch, int(lib.lifl_batch_max()))
    found = manifest.epoch, {(manifest.blocks[i], manifest.generations[i]) for i in range(count)}
    mapping.close()
    return found
