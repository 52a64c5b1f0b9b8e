"""Where an object goes while it comes: nowhere, into memory that grows with it, or into a block of its own.

Owns that memory until the object has landed. A part of an update has a place of another kind, see ``reception``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from lifl.shm.arena import Arena
from lifl.superlink.store.content import SMALL_BYTES, BlockContent, Content, Landed

SINK_BYTES = 2**16
_sink = memoryview(bytearray(SINK_BYTES))  # what nobody wants is written over itself

FIRST_BYTES, MAX_GROWTH_BYTES = 2**14, 2**20
"""A spool begins with so much, and each of its pieces is as long as all before it, up to a limit."""


@attrs.define(eq=False)
class Sink:
    """For content that is not wanted: it is read and hashed, and forgotten."""

    nbytes: int

    def pieces(self) -> Iterator[Any]:
        """The same memory, again and again."""
        whole, rest = divmod(self.nbytes, SINK_BYTES)
        for _ in range(whole):
            yield _sink
        if rest:
            yield _sink[:rest]

    def came(self, nbytes: int) -> None:
        """Nobody counts it."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Nobody needs it elsewhere."""

    def landed(self, digest: str) -> Landed:
        """Nothing, with the hash of what came."""
        return Landed(b"", self.nbytes, digest)

    def drop(self) -> None:
        """Nothing is held."""


class SpoolBudget:
    """How much may be coming into spools at once: what has come of all of them, and what a node may announce.

    Of a node the announced bytes count, of which it decides itself; of all together only what has really come, so
    that nobody is kept waiting by what others only announce. Not for several threads: the loop's.

    Attributes
    ----------
    taken_bytes : int
        Memory that spools have now.
    """

    def __init__(self, most_bytes: int, most_of_a_node: int) -> None:
        self._most, self.taken_bytes = most_bytes, 0
        self._most_of_a_node = most_of_a_node
        self._announced: Counter[str] = Counter()

    def announce(self, sender: str, nbytes: int) -> str | None:
        """Why a sender may not begin with so many bytes now; None: they are counted, until they are forgotten."""
        under_way = self._announced[sender]
        if under_way and under_way + nbytes > self._most_of_a_node:
            return (
                f"{sender} is sending {under_way:,} bytes already, and may send {self._most_of_a_node:,} at "
                f"once: send these {nbytes:,} when others have come"
            )
        self._announced[sender] += nbytes
        return None

    def forget(self, sender: str, nbytes: int) -> None:
        """An object has come, or will not come."""
        self._announced[sender] -= nbytes
        if self._announced[sender] <= 0:
            del self._announced[sender]

    def take(self, nbytes: int) -> bool:
        """Takes memory for what comes; false if too much has come already."""
        if self.taken_bytes + nbytes > self._most:
            return False
        self.taken_bytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """That memory is free, or is the store's now."""
        self.taken_bytes -= nbytes


class Spool:
    """Memory that grows with what has come; then one block of the arena, or bytes if that has no room or is None.

    Parameters
    ----------
    arena : lifl.shm.Arena or None
    sender : str
    nbytes : int
        Who sends how much, which the budget has counted as announced.
    on_full : callable
        Called if a large object is kept as bytes.
    """

    def __init__(
        self, arena: Arena | None, budget: SpoolBudget, sender: str, nbytes: int, on_full: Callable[[], None]
    ) -> None:
        self._arena, self._budget, self._sender, self._nbytes = arena, budget, sender, nbytes
        self._on_full = on_full
        self._pieces: list[bytearray] = []
        self._taken = 0
        self._is_open = True

    def pieces(self) -> Iterator[Any]:
        """The next one is made when the one before is full; raises :class:`MemoryError` beyond the budget."""
        while self._taken < self._nbytes:
            nbytes = min(max(FIRST_BYTES, min(self._taken, MAX_GROWTH_BYTES)), self._nbytes - self._taken)
            if not self._budget.take(nbytes):
                raise MemoryError("too much is coming in at once: try again later")
            self._taken += nbytes
            self._pieces.append(bytearray(nbytes))
            yield memoryview(self._pieces[-1])

    def came(self, nbytes: int) -> None:
        """Pieces are counted as they are made."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """It is the upload's own."""

    def landed(self, digest: str) -> Landed:
        """A block of its own if it is large and the arena has room, else bytes."""
        is_large = self._arena is not None and self._nbytes > SMALL_BYTES
        content: Content | bytes | None = None
        if self._arena and is_large and (block := BlockContent.make(self._arena, self._nbytes)) is not None:
            at = 0
            for piece in self._pieces:
                block.view[at : at + len(piece)] = piece
                at += len(piece)
            content = block
        else:
            content = b"".join(self._pieces)
            if is_large:
                self._on_full()
        self._end()
        return Landed(content, self._nbytes, digest)

    def drop(self) -> None:
        """Gives the memory back."""
        self._end()

    def _end(self) -> None:
        self._pieces.clear()
        if self._is_open:
            self._is_open = False
            self._budget.forget(self._sender, self._nbytes)
            self._budget.give_back(self._taken)


class Large:
    """A target for an object in a block of its own, whose sender is trusted to send all of it."""

    def __init__(self, content: BlockContent) -> None:
        self._content = content

    def pieces(self) -> list[Any]:
        """One."""
        return [self._content.view]

    def came(self, nbytes: int) -> None:
        """The block is there whatever comes."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """It is the upload's own."""

    def landed(self, digest: str) -> Landed:
        """The block."""
        return Landed(self._content, len(self._content), digest)

    def drop(self) -> None:
        """Gives the block back."""
        self._content.release()
