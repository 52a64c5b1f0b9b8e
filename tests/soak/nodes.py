"""A Node as the soak looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lifl
from lifl.shm.arena import Block, State
from lifl.shm.sizes import units_of


class SoakedNode(lifl.Node):
    """A Node that counts the workers whose death is proven, and knows all its blocks."""

    deaths = 0

    def __init__(self, memory: str, workers: int, **settings: Any) -> None:
        super().__init__(memory, workers, **settings)
        self.all_bytes = self.arena.free_bytes

    def replace(self, pidfd: int) -> None:
        """Counts a death."""
        self.deaths += 1
        super().replace(pidfd)

    @property
    def spawner(self) -> int:
        """Its pid."""
        assert self._supervisor is not None
        return self._supervisor.spawner.pid

    @property
    def is_orphaned(self) -> bool:
        """True while what starts its workers is dead and has no successor, which comes with the next worker."""
        with self.changed:
            return self._supervisor is not None and self._supervisor.spawner.is_gone

    def renew(self) -> None:
        """Has a worker started, if nobody is there who would notice that the spawner is dead."""
        with self.changed:
            if self.is_orphaned and not self.pids():
                self.pool.prepare(1)

    def held(self) -> Iterator[str]:
        """The blocks that are not free although no round is open, in words. Ends the Node's use."""
        for index in range(self.arena.block_bytes // units_of(0)):
            generation, owner, state, nbytes, _ = self.arena.describe(index)
            if state != State.FREE:
                yield f"block {index} of participant {owner} is {state.name}, {nbytes:,} bytes"
            elif self.arena.reclaim(Block(index, generation, nbytes)):
                yield f"block {index} was freed and not reclaimed, {nbytes:,} bytes"
