"""The mean of a round made in ranges of its coordinates: its sources, its makers, and the death of a maker.

Every worker reads its range of each source and writes its range of the mean, and nothing else: a worker that dies has
changed nothing that cannot be made again. The sources stay the owner's until all ranges are made. Called with the
host's lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lifl import fold
from lifl.round.blocks import Assignment
from lifl.round.host import Host
from lifl.round.record import Update
from lifl.shm import control_block, messages
from lifl.shm.arena import Block
from lifl.shm.control_block import MeanRecipe, Source
from lifl.shm.messages import Descriptor


class Finish:
    """Makes the mean of the leaves' sums and of what no leaf has folded.

    In a pass the workers make the shards of one recipe side by side. If a worker dies in a pass that reads updates, the
    updates are suspects: when no worker reads them any more, each is read alone. An update that a worker dies of again
    has to be refused (:meth:`drop_suspect`); the others are cleared. Then the pass is repeated.
    """

    def __init__(self, host: Host, number: int, work: Assignment, is_flower: bool) -> None:
        self._host = host
        self._number = number
        self._work = work
        self._is_flower = is_flower
        self._makers: list[int] = []  # shard -> its worker
        self._open: set[int] = set()  # ranges that are not made yet
        self._is_finite = True
        self._is_spoilt = False
        self._suspects: deque[Update] = deque()
        self._sums: list[Block] = []
        self.workers: set[int] = set()  # every worker that has had a part

    @property
    def is_running(self) -> bool:
        """True while a worker reads sources or writes the mean."""
        return bool(self._open)

    @property
    def makers(self) -> set[int]:
        """The workers that make a range now."""
        return {self._makers[shard] for shard in self._open}

    def begin(self) -> None:
        """Begins a pass over all sums and held updates, at least one of them; or first lets a suspect be read alone.

        The mean of a suspect alone is written over later.
        """
        self._is_spoilt, self._is_finite = False, True
        if self._suspects:
            suspect = self._suspects[0]
            self._give([], [suspect], [suspect.weight], 1)
            return
        self._sums, updates = self._work.sums(), list(self._work.held)
        weights = [update.weight for update in updates]
        factors = fold.flower_factors(weights) if self._is_flower else weights
        self._give(self._sums, updates, factors, self._work.shape.shards)

    def _give(self, sums: Sequence[Block], updates: Sequence[Update], factors: Sequence[float], shards: int) -> None:
        arena, work = self._host.arena, self._work
        what = MeanRecipe(
            Source(work.mean.index, work.mean.generation),
            tuple(Source(block.index, block.generation) for block in sums),
            tuple(Source(u.block.index, u.block.generation, f) for u, f in zip(updates, factors, strict=True)),
            fold.add_weights((0.0, 0.0), [*factors, *(w for block in sums for w in self._contents(block)[:2])]),
        )
        control_block.write(arena.buffer(work.control), work.layout, what)
        arena.note(work.mean.index).weight = what.weight[0]
        # By number, so that a worker gets the range of the last round: its pages of the blocks are mapped already.
        workers = sorted(self._host.pool.choose(shards))
        self._makers = [workers[shard % len(workers)] for shard in range(shards)]
        self._open = set(range(shards))
        self.workers |= set(workers)
        for shard, worker in enumerate(self._makers):
            self._host.outbox.push(worker, self._shard_message(shard))

    def _contents(self, block: Block) -> tuple[float, float, int]:
        """A partial sum's weight, as a pair, and the number of its updates."""
        mapping = self._host.arena.map(block.index, block.generation)
        manifest = self._host.arena.manifest(mapping.address)
        contents = manifest.weight, manifest.weight_low, manifest.num_updates
        mapping.close()
        return contents

    def _shard_message(self, shard: int) -> Descriptor:
        return messages.shard(self._number, self._work.control, (shard, len(self._makers)))

    # ------------------------------------------------------------ back from the workers

    def made(self, worker: int, shard: int, is_finite: bool) -> bool:
        """Notes that a range is made; true if it was the last one, and :meth:`is_done` has to be asked."""
        if shard not in self._open or self._makers[shard] != worker:
            return False
        self._open.remove(shard)
        self._is_finite &= is_finite
        return not self._open

    def is_done(self) -> bool:
        """Ends a pass whose shards are all made or given up: true if the mean is there, else call :meth:`begin`."""
        if self._suspects:
            self._suspects.popleft().deaths = 0  # it was read alone, and no worker died
            return False
        if self._is_spoilt:
            self._suspects = deque(self._work.held)
            return False
        note = self._host.arena.note(self._work.mean.index)
        note.num_updates = len(self._work.held) + sum(self._contents(block)[2] for block in self._sums)
        note.has_overflowed = not self._is_finite
        times = self.times()
        note.begin_ns, note.end_ns = min(begin for _, begin, _ in times), max(end for _, _, end in times)
        return True

    def times(self) -> list[tuple[int, int, int]]:
        """The worker, the begin and the end of each range, in nanoseconds of the monotonic clock."""
        buffer = self._host.arena.buffer(self._work.control)
        return [
            (worker, *control_block.read_times(buffer, self._work.layout, shard))
            for shard, worker in enumerate(self._makers)
        ]

    # ------------------------------------------------------------ when a worker is dead

    def lost(self, worker: int) -> list[Descriptor]:
        """Takes note of a dead worker; returns the descriptors for its successor. ``is_running`` may be false then."""
        if self._suspects:
            self._suspects[0].deaths += 1
        elif self._work.held:
            for update in self._work.held if not self._is_spoilt else ():
                update.deaths += 1
            self._is_spoilt = True
            self._open -= {shard for shard in self._open if self._makers[shard] == worker}
        return self.tell_again(worker)

    def tell_again(self, worker: int) -> list[Descriptor]:
        """The descriptors of the ranges that `worker` has been asked for and has not made."""
        return [self._shard_message(shard) for shard in sorted(self._open) if self._makers[shard] == worker]

    @property
    def suspect(self) -> Update | None:
        """The update that is read alone, if there is one."""
        return self._suspects[0] if self._suspects else None

    def drop_suspect(self) -> None:
        """Forgets the suspect, which is to be refused: no worker reads it any more, and :meth:`begin` is next."""
        self._suspects.popleft()
        self._open.clear()
