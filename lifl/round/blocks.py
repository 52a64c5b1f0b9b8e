"""The blocks of a round and their holders: the updates and sums of its leaves, and the descriptors to the leaves.

Carries out, and does not decide which updates count: that is up to ``lifl.round.lifecycle``. Called with the host's
lock held.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable

from lifl.errors import ArenaCorruptError, PeerGoneError, ShmError
from lifl.planner.shape import Shape
from lifl.planner.timing import wants_leaf
from lifl.round import recovery
from lifl.round.host import WAIT_CAP_S, Host, wait_for_block
from lifl.round.record import Update
from lifl.round.recovery import Remains
from lifl.round.settings import Terms
from lifl.shm import control_block, messages
from lifl.shm.arena import OWNER, Block, State
from lifl.shm.messages import Descriptor, Flush
from lifl.shm.sizes import sum_bytes_of, units_of
from lifl.tensor import Layout

ROOM_FOR_UPDATES = 4
"""A leaf that joins a round leaves room for so many more updates, so that it does not keep them out."""


class Assignment:
    """The blocks of one round, and the worker that holds each.

    The constructor allocates what the round needs beside its updates; the arena must have the room.

    Attributes
    ----------
    mean, control : Block
        The owner's blocks: room for the mean, and the description of the round.
    """

    def __init__(self, host: Host, number: int, terms: Terms) -> None:
        self._host, self._number, self.layout = host, number, terms.layout
        encoded, control_bytes = self.layout.encode(terms.flags), self.control_bytes(host, self.layout, terms.expected)
        self.control = wait_for_block(host, control_bytes, 0, "a round's control block")
        host.arena.buffer(self.control)[: len(encoded)] = encoded
        self.mean = wait_for_block(host, self.layout.mean_bytes, 0, "a round's mean")
        self._pair: list[Block] = []  # room for the sums of the first leaf; Flower's order has no leaves
        self._has_leaves = not terms.is_flower
        if self._has_leaves:
            nbytes = sum_bytes_of(self.layout)
            self._pair = [wait_for_block(host, nbytes, 0, "a leaf's sum", apart=True) for _ in range(2)]
        self.shape = Shape(1, 0)
        self._sums: dict[int, list[Block]] = {}  # leaf -> the two blocks for its partial sum
        self.working: set[int] = set()  # leaves that have not sent their sum
        self.updates: dict[tuple[int, int], Update] = {}  # accepted, and not known to be folded
        self.held: deque[Update] = deque()  # the updates of these that no leaf was given
        self._outstanding: dict[int, int] = {}  # leaf -> updates that it was given and has not reported as folded
        self._given: dict[int, int] = {}  # leaf -> updates that it was given
        self._flushed: Descriptor | None = None
        self.top = OWNER

    @staticmethod
    def control_bytes(host: Host, layout: Layout, expected: int) -> int:
        """Bytes of the control block, with room for a sum of each worker and as many updates as the arena can hold."""
        room = host.arena.block_bytes // units_of(layout.update_bytes)
        return control_block.control_bytes(layout, min(expected, room) + host.pool.most)

    @classmethod
    def wait_for_room(cls, host: Host, terms: Terms) -> None:
        """Waits until memory is free for what a round needs beside all but one of its updates.

        Raises :class:`ShmError` if nothing will come free.
        """
        layout, arena = terms.layout, host.arena
        needed = units_of(cls.control_bytes(host, layout, terms.expected))
        needed += units_of(layout.mean_bytes) + units_of(max(layout.update_bytes, host.largest_update_bytes))
        needed += 0 if terms.is_flower else 2 * units_of(sum_bytes_of(layout))
        while arena.free_bytes < needed:
            if not host.relieve():
                raise ShmError(
                    errno.ENOSPC,
                    f"no room for a round of {terms.spec.nbytes:,} bytes per update: {needed:,} bytes are needed (two "
                    f"sums, the mean, one update), {arena.free_bytes:,} of {arena.block_bytes:,} are free; "
                    f"give the Node at least memory={needed}, close rounds, or drop old results",
                )
            host.changed.wait(WAIT_CAP_S)

    @property
    def leaves(self) -> tuple[int, ...]:
        """The workers that fold ahead, in the order in which they joined."""
        return tuple(self._sums)

    # ------------------------------------------------------------ to the leaves

    def enlist(self) -> bool:
        """Makes one more worker a leaf; false if no other worker can be had, or there is no room for its sums.

        Raises :class:`PeerGoneError` if there is no leaf yet and no worker can be had.
        """
        try:
            chosen = self._host.pool.choose(1, self._sums)
        except PeerGoneError:
            if not self._sums:
                raise
            return False  # the present leaves fold everything, in more time
        pair = (self._pair or self._take_pair()) if chosen else []
        if not pair:
            return False
        (leaf,), self._pair = chosen, []
        self._sums[leaf] = pair
        self._outstanding[leaf] = self._given[leaf] = 0
        self.working.add(leaf)
        self._host.outbox.push(leaf, messages.open_round(self._number, self.control))
        for block in pair:
            self._host.arena.move(block, (OWNER, State.WRITING), (leaf, State.ACCUM))
            self._host.outbox.push(leaf, messages.grant(self._number, block))
        return True

    def _take_pair(self) -> list[Block]:
        arena, sum_bytes = self._host.arena, sum_bytes_of(self.layout)
        rest = arena.free_bytes - 2 * units_of(sum_bytes)
        if rest < ROOM_FOR_UPDATES * units_of(self.layout.update_bytes):
            return []
        blocks = [arena.alloc(sum_bytes, apart=True) for _ in range(2)]
        assert all(blocks), "there is room, under the same lock"
        return [block for block in blocks if block is not None]

    def add(self, update: Update) -> None:
        """Takes an accepted update into the books; it is held until it is given to a leaf or becomes the mean."""
        self.updates[update.block.index, update.block.generation] = update
        if not self._host.arena.move(update.block, (OWNER, State.WRITING), (OWNER, State.READY)):
            raise ArenaCorruptError(errno.EBADMSG, f"block {update.block.index} changed hands while it was written")
        self.held.append(update)

    def give(self) -> None:
        """Gives the held updates to leaves: each to the leaf with the least to do, and of these to the one given least.

        One more leaf joins by the rule of :func:`~lifl.planner.timing.wants_leaf`.
        """
        while self.held:
            if not self._sums:
                self.enlist()
            leaf = min(self._sums, key=lambda i: (self._outstanding[i], self._given[i]))
            if wants_leaf(self._outstanding[leaf], len(self._sums), self.shape.leaves) and self.enlist():
                leaf = self.leaves[-1]
            update = self.held.popleft()
            self._given[leaf] += 1
            update.worker = leaf
            self._outstanding[leaf] += 1
            self._host.arena.move(update.block, (OWNER, State.READY), (leaf, State.READY))
            self._host.outbox.push(leaf, self._update_message(update))

    def press(self) -> None:
        """Gives the held updates to leaves, because memory is short; does nothing in Flower's order, without leaves."""
        if self._has_leaves and self._flushed is None:
            self.give()

    def _update_message(self, update: Update) -> Descriptor:
        # An update that a worker died of is folded alone, so that a second death points at the culprit only.
        return messages.update(self._number, update.block, is_alone=update.deaths > 0)

    def flush(self) -> None:
        """Makes the leaves commit and send their sums, to the top in a tree, else to the owner: all updates are in."""
        mean = None
        if self.shape.shards:
            self._take_back()
        else:
            self.give()
            self.top = self._choose_top()
            self._host.transport.route_top(self._number, self.top)
            self._host.arena.move(self.mean, (OWNER, State.WRITING), (self.top, State.WRITING))
            mean = self.mean
        self._flushed = messages.flush(self._number, mean, Flush(self.top, len(self._sums)))
        for leaf in self._sums:
            self._host.outbox.push(leaf, self._flushed)

    def _choose_top(self) -> int:
        """The leaf that will be done first: it changes its role, and no process is started for the top."""
        return min(self._sums, key=lambda i: self._outstanding[i])

    def _take_back(self) -> None:
        """Takes back the updates that no leaf has begun with, apart from those that have to be folded alone."""
        for update in self.updates.values():
            leaf, block = update.worker, update.block
            if leaf and not update.deaths and self._host.arena.move(block, (leaf, State.READY), (OWNER, State.READY)):
                update.worker = OWNER
                self._outstanding[leaf] -= 1
                self.held.append(update)

    def abort(self, workers: Iterable[int]) -> None:
        """Makes workers let go of the round."""
        for worker in workers:
            self._host.outbox.push(worker, self.aborted)

    @property
    def aborted(self) -> Descriptor:
        """The descriptor that makes a worker let go of the round, and give back sums that reach it later."""
        return messages.abort(self._number)

    # ------------------------------------------------------------ back from them

    @property
    def is_busy(self) -> bool:
        """True while a leaf has updates that it has not reported as folded."""
        return any(self._outstanding.values())

    def is_top(self, worker: int) -> bool:
        """True for the leaf that adds up the sums, as soon as it has folded its own updates."""
        return worker == self.top and not self._outstanding[worker]

    @property
    def is_committed(self) -> bool:
        """True when every leaf has sent its sum to the owner: the mean can be made in shards."""
        return self._flushed is not None and self.top == OWNER and not self.working

    def sums(self) -> list[Block]:
        """The partial sums that leaves have sent to the owner."""
        word = recovery.word
        blocks = [block for pair in self._sums.values() for block in pair]
        return [block for block in blocks if word(self._host.arena, block) == (OWNER, State.COMMITTED)]

    def sent(self) -> list[tuple[int, int, int]]:
        """Leaf, begin and end of each hand-over of a sum, in nanoseconds of the monotonic clock."""
        notes = [(leaf, self._host.arena.note(block.index)) for leaf, pair in self._sums.items() for block in pair]
        return [(leaf, note.begin_ns, note.end_ns) for leaf, note in notes if note.end_ns]

    def settle(self, update: Update) -> None:
        """Takes an update that is in a committed sum, or refused, off the books, and reclaims its free block."""
        del self.updates[update.block.index, update.block.generation]
        if update.worker:
            self._outstanding[update.worker] -= 1
        self._host.arena.reclaim(update.block)

    def take_all(self) -> list[Block]:
        """Gives up every block that may still be the round's, and returns them to be reclaimed."""
        held = [*self._reserved(), self.mean, *(update.block for update in self.updates.values())]
        self._host.arena.move(self.mean, (self.top, State.WRITING), (OWNER, State.FREE))
        self.updates = {}
        self.held.clear()
        return held

    def _reserved(self) -> list[Block]:
        return [self.control, *self._pair, *(block for pair in self._sums.values() for block in pair)]

    # ------------------------------------------------------------ when a worker is dead

    def held_by(self, worker: int) -> list[Update]:
        """The updates that a leaf was given and has not reported."""
        return [update for update in self.updates.values() if update.worker == worker]

    def has_made_mean(self, worker: int) -> bool:
        """True if the dead worker was the top and had committed the mean."""
        return worker == self.top and recovery.word(self._host.arena, self.mean) == (OWNER, State.READY)

    def free(self, worker: int) -> None:
        """Frees every block that the dead worker still owns."""
        recovery.free(self._host.arena, worker, [*self._reserved(), *(update.block for update in self.held_by(worker))])

    def sweep(self, worker: int, of_work: bool) -> Remains:
        """Makes a dead worker's blocks ready for its successor; the updates that it read are suspects if `of_work`."""
        remains = recovery.sweep(self._host.arena, worker, self._sums[worker], self.held_by(worker))
        for update in remains.again:
            update.deaths += of_work and update.block.index in remains.suspects
        return remains

    def refuse(self, update: Update) -> None:
        """Takes an update away for good; no living worker has it."""
        recovery.free(self._host.arena, update.worker, [update.block])
        if update.worker:
            self._given[update.worker] -= 1
        else:
            self.held.remove(update)
        self.settle(update)

    def retell(self, worker: int, remains: Remains) -> list[Descriptor]:
        """The descriptors for the dead worker's successor, in order; sends the top what it may have missed."""
        again = [u for u in remains.again if (u.block.index, u.block.generation) in self.updates]
        has_sum_for_top = remains.sum is not None and self.top != OWNER
        if self._flushed is not None and worker != self.top and not again and not has_sum_for_top:
            # The dead worker's part was done, or it had none.
            if remains.sum is not None:
                self._host.arena.move(remains.sum, (worker, State.COMMITTED), (OWNER, State.COMMITTED))
            recovery.free(self._host.arena, worker, self._sums[worker])
            self.working.discard(worker)
            if self.top != OWNER:
                self._host.outbox.push(self.top, self._sum_of(worker))
            return []
        told = [messages.open_round(self._number, self.control)]
        if remains.sum is not None:
            told.append(messages.grant(self._number, remains.sum, holds_sum=True))
        told += [messages.grant(self._number, block) for block in remains.spare]
        told += map(self._update_message, again)
        if self._flushed is not None:
            told += self._sums_for_top() if worker == self.top else ()
            told.append(self._flushed)
        return told

    def _sum_of(self, leaf: int) -> Descriptor:
        """The SUM of a leaf that has sent its own, or has none; the top may get it twice."""
        for block in self._sums[leaf]:
            if recovery.word(self._host.arena, block)[0] == self.top:
                return messages.leaf_sum(self._number, leaf, block)
        return messages.leaf_sum(self._number, leaf, None)

    def _sums_for_top(self) -> Iterable[Descriptor]:
        """The sums that the other leaves had handed over to a top that died, whether or not the top had read them."""
        for leaf in self._sums:
            if leaf == self.top:
                continue
            if any(recovery.word(self._host.arena, block)[0] == leaf for block in self._sums[leaf]):
                continue  # this leaf still has a block: it sends its own SUM, and until then the round may not end
            for block in self._sums[leaf]:
                self._host.arena.move(block, (self.top, State.READING), (self.top, State.COMMITTED))
            message = self._sum_of(leaf)
            if messages.sum_of(message) is not None or not self._given[leaf]:
                yield message
