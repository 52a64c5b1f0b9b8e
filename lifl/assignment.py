"""Who has which blocks of a round: the updates and sums that its leaves were given, and what they are told.

Carries out, decides nothing about who counts: that is ``lifl.round``'s. Called with the host's lock held.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from lifl import recovery
from lifl.books import Update
from lifl.errors import ArenaCorruptError
from lifl.host import Host, wait_for_block
from lifl.recovery import Remains
from lifl.ring import FLOWER, LAZY, Descriptor, Kind
from lifl.shm import AGENT, Block, State
from lifl.sizes import sum_bytes_of
from lifl.tensor import Layout


class Assignment:
    """A round's blocks and their keepers; the first leaf is the top.

    Parameters
    ----------
    mean, control : Block
        The agent's: what the top writes the mean into, and the description of the round.
    sums : dict of int to list of Block
        Per leaf, in order: the two blocks that were granted for its partial sum (none in Flower's order).
    """

    def __init__(
        self, host: Host, number: int, mean: Block, control: Block, sums: dict[int, list[Block]], is_lazy: bool
    ) -> None:
        self._host, self._number, self._is_lazy = host, number, is_lazy
        self.leaves, self.top = tuple(sums), next(iter(sums))
        self.mean, self._control, self._sums = mean, control, sums
        self.updates: dict[tuple[int, int], Update] = {}  # accepted, and not known to be folded
        self._outstanding = dict.fromkeys(sums, 0)
        self._given = dict.fromkeys(sums, 0)
        self._flushed: Descriptor | None = None

    @classmethod
    def reserve(cls, host: Host, number: int, layout: Layout, leaves: Sequence[int], flags: int) -> Assignment:
        """Allocates what a round needs beside its updates, and tells the leaves; the arena must have the room."""
        encoded = layout.encode(flags)
        control = wait_for_block(host, len(encoded), 0, "a round's control block")
        host.arena.buffer(control)[:] = encoded
        mean = wait_for_block(host, layout.mean_bytes, 0, "a round's mean")
        sums: dict[int, list[Block]] = {leaf: [] for leaf in leaves}
        for leaf in leaves:
            host.outbox.push(leaf, Descriptor(Kind.OPEN, number, control.index, control.generation))
            for _ in range(0 if flags & FLOWER else 2):
                block = host.arena.alloc(sum_bytes_of(layout), leaf, State.ACCUM)
                assert block is not None, "the caller has seen to it, under the same lock"
                sums[leaf].append(block)
                host.outbox.push(leaf, Descriptor(Kind.GRANT, number, block.index, block.generation))
        return cls(host, number, mean, control, sums, bool(flags & LAZY))

    # ------------------------------------------------------------ to the leaves

    def add(self, update: Update) -> None:
        """Takes an accepted update into the books, not yet given to a leaf."""
        self.updates[update.block.index, update.block.generation] = update

    def give(self, update: Update) -> None:
        """Hands an update to the leaf with the least to do; of those, to the one that has had the least."""
        leaf = min(self.leaves, key=lambda i: (self._outstanding[i], self._given[i]))
        self._given[leaf] += 1
        update.runtime = leaf
        self._outstanding[leaf] += 1
        if not self._host.arena.move(update.block, (AGENT, State.WRITING), (leaf, State.READY)):
            raise ArenaCorruptError(errno.EBADMSG, f"block {update.block.index} changed hands while it was written")
        self._host.outbox.push(leaf, self._told(update))

    def _told(self, update: Update) -> Descriptor:
        # One that a worker died of is folded alone, so that only the culprit meets the second death.
        block, alone = update.block, int(update.deaths > 0)
        return Descriptor(Kind.UPDATE, self._number, block.index, block.generation, alone)

    def press(self) -> None:
        """Makes lazy leaves fold what they hold, because memory is short."""
        for leaf, n in self._outstanding.items():
            if n and self._is_lazy:
                self._host.outbox.push(leaf, Descriptor(Kind.PRESS, self._number))

    def flush(self) -> None:
        """All have been given: the leaves commit and send to the top, which makes the mean."""
        self._host.arena.move(self.mean, (AGENT, State.WRITING), (self.top, State.WRITING))
        arg = self.top << 8 | len(self.leaves)
        self._flushed = Descriptor(Kind.FLUSH, self._number, self.mean.index, self.mean.generation, arg)
        for leaf in self.leaves:
            self._host.outbox.push(leaf, self._flushed)

    def abort(self) -> None:
        """Tells every leaf to let go of the round."""
        for leaf in self.leaves:
            self._host.outbox.push(leaf, self.aborted)

    @property
    def aborted(self) -> Descriptor:
        """What makes a leaf let go, and give back sums that reach it later."""
        return Descriptor(Kind.ABORT, self._number)

    # ------------------------------------------------------------ back from them

    @property
    def is_busy(self) -> bool:
        """True while a leaf has updates that it has not reported as folded."""
        return any(self._outstanding.values())

    def settle(self, update: Update) -> None:
        """The update is in a committed sum, or refused: its block, which is free, is reclaimed."""
        del self.updates[update.block.index, update.block.generation]
        self._outstanding[update.runtime] -= 1
        self._host.arena.reclaim(update.block)

    def take_all(self) -> list[Block]:
        """Every block that may still be the round's, for good."""
        held = [*self._reserved(), self.mean, *(update.block for update in self.updates.values())]
        self._host.arena.move(self.mean, (self.top, State.WRITING), (AGENT, State.FREE))
        self.updates = {}
        return held

    def _reserved(self) -> list[Block]:
        return [self._control, *(block for blocks in self._sums.values() for block in blocks)]

    # ------------------------------------------------------------ when a worker is dead

    def held_by(self, me: int) -> list[Update]:
        """The updates that a leaf was given and has not reported."""
        return [update for update in self.updates.values() if update.runtime == me]

    def has_made_mean(self, me: int) -> bool:
        """True if the dead worker was the top and had committed the mean."""
        return me == self.top and recovery.word(self._host.arena, self.mean) == (AGENT, State.READY)

    def free(self, me: int) -> None:
        """Frees everything that the dead worker still owned."""
        recovery.free(self._host.arena, me, [*self._reserved(), *(update.block for update in self.held_by(me))])

    def sweep(self, me: int) -> Remains:
        """What the dead worker left, made ready for its successor."""
        remains = recovery.sweep(self._host.arena, me, self._sums[me], self.held_by(me))
        for update in remains.again:
            update.deaths += update.block.index in remains.suspects
        return remains

    def refuse(self, update: Update) -> None:
        """Takes a dead worker's update away, for good."""
        recovery.free(self._host.arena, update.runtime, [update.block])
        self._given[update.runtime] -= 1
        self.settle(update)

    def retell(self, me: int, remains: Remains) -> list[Descriptor]:
        """What the dead worker's successor has to be told, in order; tells the top what it may not know."""
        again = [u for u in remains.again if (u.block.index, u.block.generation) in self.updates]
        if self._flushed is not None and me != self.top and remains.sum is None and not again:
            # Its part was done, or it had none.
            recovery.free(self._host.arena, me, self._sums[me])
            self._host.outbox.push(self.top, self._sum_of(me))
            return []
        told = [Descriptor(Kind.OPEN, self._number, self._control.index, self._control.generation)]
        if remains.sum is not None:
            told.append(Descriptor(Kind.GRANT, self._number, remains.sum.index, remains.sum.generation, 1))
        told += [Descriptor(Kind.GRANT, self._number, b.index, b.generation) for b in remains.spare]
        told += map(self._told, again)
        if self._flushed is not None:
            told += self._sums_for_top() if me == self.top else ()
            told.append(self._flushed)
        return told

    def _sum_of(self, leaf: int) -> Descriptor:
        """The SUM of a leaf that has sent its own, or has none; it may be told twice."""
        for block in self._sums[leaf]:
            if recovery.word(self._host.arena, block)[0] == self.top:
                return Descriptor(Kind.SUM, self._number, block.index, block.generation, leaf)
        return Descriptor(Kind.SUM, self._number, arg=leaf)

    def _sums_for_top(self) -> Iterable[Descriptor]:
        """What the other leaves had handed over to a top that died; it may have read of them or not."""
        for leaf in self.leaves[1:]:
            if any(recovery.word(self._host.arena, block)[0] == leaf for block in self._sums[leaf]):
                continue  # it has not let go of all: it will say so itself, and until then the round may not end
            for block in self._sums[leaf]:
                self._host.arena.move(block, (self.top, State.READING), (self.top, State.COMMITTED))
            said = self._sum_of(leaf)
            if said.block != Descriptor(Kind.SUM, 0).block or not self._given[leaf]:
                yield said
