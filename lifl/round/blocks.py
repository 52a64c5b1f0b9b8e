"""Who has which blocks of a round: the updates and sums that its leaves were given, and what they are told.

Carries out, decides nothing about who counts: that is ``lifl.round.round``'s. Called with the host's lock held.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable

from lifl.errors import ArenaCorruptError, PeerGoneError, ShmError
from lifl.planner.hierarchy import FAN_IN
from lifl.planner.shape import Shape
from lifl.round import recovery
from lifl.round.host import WAIT_CAP_S, Host, wait_for_block
from lifl.round.record import Update
from lifl.round.recovery import Remains
from lifl.round.settings import Terms
from lifl.shm import control_block as order
from lifl.shm import messages
from lifl.shm.arena import OWNER, Block, State
from lifl.shm.messages import Descriptor, Flush
from lifl.shm.sizes import sum_bytes_of, units_of
from lifl.tensor import Layout

ROOM_FOR_UPDATES = 4
"""A leaf that joins a round leaves room for so many more updates, so that it does not keep them out."""


class Assignment:
    """A round's blocks and their keepers.

    Parameters
    ----------
    mean, control : Block
        The agent's: what takes the mean, and the description of the round.
    pair : list of Block
        Room for the sums of the first leaf (empty in Flower's order, which has none).
    """

    def __init__(self, host: Host, number: int, layout: Layout, mean: Block, control: Block, pair: list[Block]) -> None:
        self._host, self._number, self.layout, self._has_leaves = host, number, layout, bool(pair)
        self.mean, self.control, self._pair = mean, control, pair
        self.shape = Shape(1, 0)
        self._sums: dict[int, list[Block]] = {}  # leaf -> the two blocks for its partial sum
        self.working: set[int] = set()  # leaves that have not sent their sum
        self.updates: dict[tuple[int, int], Update] = {}  # accepted, and not known to be folded
        self.held: deque[Update] = deque()  # of these, what no leaf was given
        self._outstanding: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._flushed: Descriptor | None = None
        self.top = OWNER

    @staticmethod
    def control_bytes(host: Host, layout: Layout, expected: int) -> int:
        """Bytes of the control block: it names a sum of each worker and as many updates as there can be at a time."""
        room = host.arena.block_bytes // units_of(layout.update_bytes)
        return order.control_bytes(layout, min(expected, room) + host.pool.most)

    @classmethod
    def wait_for_room(cls, host: Host, terms: Terms, largest_update: int) -> None:
        """Waits until memory is free for what a round needs beside all but one of its updates.

        `largest_update` is bytes, of the rounds that are open. Raises :class:`ShmError` if nothing will come free.
        """
        layout, arena = terms.layout, host.arena
        needed = units_of(cls.control_bytes(host, layout, terms.expected))
        needed += units_of(layout.mean_bytes) + units_of(max(layout.update_bytes, largest_update))
        needed += 0 if terms.order == "flower" else 2 * units_of(sum_bytes_of(layout))
        while arena.free_bytes < needed:
            if not host.relieve():
                raise ShmError(
                    errno.ENOSPC,
                    f"no room for a round of {terms.spec.nbytes:,} bytes per update: {needed:,} bytes are needed (two "
                    f"sums, the mean, one update), {arena.free_bytes:,} of {arena.block_bytes:,} are free; "
                    f"give the Node at least memory={needed}, close rounds, or drop old results",
                )
            host.changed.wait(WAIT_CAP_S)

    @classmethod
    def reserve(cls, host: Host, number: int, layout: Layout, flags: int, expected: int) -> Assignment:
        """Allocates what a round needs beside its updates; the arena must have the room."""
        encoded = layout.encode(flags)
        control = wait_for_block(host, cls.control_bytes(host, layout, expected), 0, "a round's control block")
        host.arena.buffer(control)[: len(encoded)] = encoded
        mean = wait_for_block(host, layout.mean_bytes, 0, "a round's mean")
        pair = []
        if not flags & order.FLOWER:
            pair = [wait_for_block(host, sum_bytes_of(layout), 0, "a leaf's sum", apart=True) for _ in range(2)]
        return cls(host, number, layout, mean, control, pair)

    @property
    def leaves(self) -> tuple[int, ...]:
        """The workers that fold ahead, in the order in which they joined."""
        return tuple(self._sums)

    # ------------------------------------------------------------ to the leaves

    def enlist(self) -> bool:
        """One more leaf, if there is a worker that is none, and room for its sums; false if not.

        Raises :class:`PeerGoneError` if there is no leaf yet and no worker can be had.
        """
        try:
            chosen = self._host.pool.choose(1, self._sums)
        except PeerGoneError:
            if not self._sums:
                raise
            return False  # the leaves that are there fold everything, in more time
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
        """Hands what is held to the leaves: to the one with the least to do; of those, with the least so far.

        When all have ``FAN_IN`` updates or more to do, one more leaf joins, up to what the shape allows.
        """
        while self.held:
            if not self._sums:
                self.enlist()
            leaf = min(self._sums, key=lambda i: (self._outstanding[i], self._given[i]))
            busy = self._outstanding[leaf] >= FAN_IN and len(self._sums) < self.shape.leaves
            if busy and self.enlist():
                leaf = self.leaves[-1]
            update = self.held.popleft()
            self._given[leaf] += 1
            update.runtime = leaf
            self._outstanding[leaf] += 1
            self._host.arena.move(update.block, (OWNER, State.READY), (leaf, State.READY))
            self._host.outbox.push(leaf, self._told(update))

    def press(self) -> None:
        """Gives what is held to leaves, because memory is short; nothing in Flower's order, which has none."""
        if self._has_leaves and self._flushed is None:
            self.give()

    def _told(self, update: Update) -> Descriptor:
        # One that a worker died of is folded alone, so that only the culprit meets the second death.
        return messages.update(self._number, update.block, is_alone=update.deaths > 0)

    def flush(self) -> None:
        """All have come: the leaves commit and send, to the top in a tree, else to the agent."""
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
        """The leaf that is done first: it changes its role, and no process is started for it."""
        return min(self._sums, key=lambda i: self._outstanding[i])

    def _take_back(self) -> None:
        """Takes what no leaf has begun with, but for what has to be folded alone."""
        for update in self.updates.values():
            leaf, block = update.runtime, update.block
            if leaf and not update.deaths and self._host.arena.move(block, (leaf, State.READY), (OWNER, State.READY)):
                update.runtime = OWNER
                self._outstanding[leaf] -= 1
                self.held.append(update)

    def abort(self, workers: Iterable[int]) -> None:
        """Tells workers to let go of the round."""
        for worker in workers:
            self._host.outbox.push(worker, self.aborted)

    @property
    def aborted(self) -> Descriptor:
        """What makes a worker let go, and give back sums that reach it later."""
        return messages.abort(self._number)

    # ------------------------------------------------------------ back from them

    @property
    def is_busy(self) -> bool:
        """True while a leaf has updates that it has not reported as folded."""
        return any(self._outstanding.values())

    def is_top(self, me: int) -> bool:
        """True for the leaf that adds up the sums, from when it has folded its own updates."""
        return me == self.top and not self._outstanding[me]

    @property
    def is_committed(self) -> bool:
        """True when every leaf has sent its sum to the agent: the mean can be made in shards."""
        return self._flushed is not None and self.top == OWNER and not self.working

    def sums(self) -> list[Block]:
        """The partial sums that leaves have sent to the agent."""
        word = recovery.word
        blocks = [block for pair in self._sums.values() for block in pair]
        return [block for block in blocks if word(self._host.arena, block) == (OWNER, State.COMMITTED)]

    def sent(self) -> list[tuple[int, int, int]]:
        """The leaves that had a sum to hand over, and when they did, in nanoseconds of the monotonic clock."""
        notes = [(leaf, self._host.arena.note(block.index)) for leaf, pair in self._sums.items() for block in pair]
        return [(leaf, note.begin_ns, note.end_ns) for leaf, note in notes if note.end_ns]

    def settle(self, update: Update) -> None:
        """The update is in a committed sum, or refused: its block, which is free, is reclaimed."""
        del self.updates[update.block.index, update.block.generation]
        if update.runtime:
            self._outstanding[update.runtime] -= 1
        self._host.arena.reclaim(update.block)

    def take_all(self) -> list[Block]:
        """Every block that may still be the round's, for good."""
        held = [*self._reserved(), self.mean, *(update.block for update in self.updates.values())]
        self._host.arena.move(self.mean, (self.top, State.WRITING), (OWNER, State.FREE))
        self.updates = {}
        self.held.clear()
        return held

    def _reserved(self) -> list[Block]:
        return [self.control, *self._pair, *(block for pair in self._sums.values() for block in pair)]

    # ------------------------------------------------------------ when a worker is dead

    def held_by(self, me: int) -> list[Update]:
        """The updates that a leaf was given and has not reported."""
        return [update for update in self.updates.values() if update.runtime == me]

    def has_made_mean(self, me: int) -> bool:
        """True if the dead worker was the top and had committed the mean."""
        return me == self.top and recovery.word(self._host.arena, self.mean) == (OWNER, State.READY)

    def free(self, me: int) -> None:
        """Frees everything that the dead worker still owned."""
        recovery.free(self._host.arena, me, [*self._reserved(), *(update.block for update in self.held_by(me))])

    def sweep(self, me: int, of_work: bool) -> Remains:
        """What the dead worker left, made ready for its successor; what it read is suspect if it died of its work."""
        remains = recovery.sweep(self._host.arena, me, self._sums[me], self.held_by(me))
        for update in remains.again:
            update.deaths += of_work and update.block.index in remains.suspects
        return remains

    def refuse(self, update: Update) -> None:
        """Takes an update away, for good; no living worker has it."""
        recovery.free(self._host.arena, update.runtime, [update.block])
        if update.runtime:
            self._given[update.runtime] -= 1
        else:
            self.held.remove(update)
        self.settle(update)

    def retell(self, me: int, remains: Remains) -> list[Descriptor]:
        """What the dead worker's successor has to be told, in order; tells the top what it may not know."""
        again = [u for u in remains.again if (u.block.index, u.block.generation) in self.updates]
        if self._flushed is not None and me != self.top and not again and (remains.sum is None or self.top == OWNER):
            # Its part was done, or it had none.
            if remains.sum is not None:
                self._host.arena.move(remains.sum, (me, State.COMMITTED), (OWNER, State.COMMITTED))
            recovery.free(self._host.arena, me, self._sums[me])
            self.working.discard(me)
            if self.top != OWNER:
                self._host.outbox.push(self.top, self._sum_of(me))
            return []
        told = [messages.open_round(self._number, self.control)]
        if remains.sum is not None:
            told.append(messages.grant(self._number, remains.sum, holds_sum=True))
        told += [messages.grant(self._number, block) for block in remains.spare]
        told += map(self._told, again)
        if self._flushed is not None:
            told += self._sums_for_top() if me == self.top else ()
            told.append(self._flushed)
        return told

    def _sum_of(self, leaf: int) -> Descriptor:
        """The SUM of a leaf that has sent its own, or has none; it may be told twice."""
        for block in self._sums[leaf]:
            if recovery.word(self._host.arena, block)[0] == self.top:
                return messages.leaf_sum(self._number, leaf, block)
        return messages.leaf_sum(self._number, leaf, None)

    def _sums_for_top(self) -> Iterable[Descriptor]:
        """What the other leaves had handed over to a top that died; it may have read of them or not."""
        for leaf in self._sums:
            if leaf == self.top:
                continue
            if any(recovery.word(self._host.arena, block)[0] == leaf for block in self._sums[leaf]):
                continue  # it has not let go of all: it will say so itself, and until then the round may not end
            for block in self._sums[leaf]:
                self._host.arena.move(block, (self.top, State.READING), (self.top, State.COMMITTED))
            said = self._sum_of(leaf)
            if messages.sum_of(said) is not None or not self._given[leaf]:
                yield said
