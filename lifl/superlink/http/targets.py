"""Targets for an object while it comes: none, memory that grows with it, or a block of its own.

Owns that memory until the object has landed. A part of an update has a target of another kind, its place in the
update's block; see ``lifl.superlink.rounds.incoming_reply``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from lifl.shm.arena import Arena
from lifl.superlink.store.content import MAX_SMALL_BYTES, BlockContent, Content, Landed

SINK_BYTES = 2**16
_sink = memoryview(bytearray(SINK_BYTES))  # shared: bytes that nobody wants overwrite each other

FIRST_BYTES, MAX_GROWTH_BYTES = 2**14, 2**20
"""Length of a spool's first piece, and limit for the later ones: each is as long as all pieces before it."""


@attrs.define(eq=False)
class Sink:
    """A target for content that is not wanted: it is read and hashed, and forgotten."""

    nbytes: int

    def pieces(self) -> Iterator[Any]:
        """The same memory, again and again."""
        whole, rest = divmod(self.nbytes, SINK_BYTES)
        for _ in range(whole):
            yield _sink
        if rest:
            yield _sink[:rest]

    def came(self, nbytes: int) -> None:
        """Does nothing: the bytes take no memory."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Does nothing: nobody else needs the memory."""

    def landed(self, digest: str) -> Landed:
        """No content, with the hash of the bytes that came."""
        return Landed(b"", self.nbytes, digest)

    def drop(self) -> None:
        """Does nothing: no memory is held."""


class SpoolBudget:
    """The limits for objects that come into spools at once. Belongs to the event loop.

    For one sender the announced bytes count, since the sender decides about those. For all senders together only the
    bytes that have come count, so that nobody waits for bytes that others only announce.

    Parameters
    ----------
    most_bytes : int
        Limit of the memory of all spools.
    most_of_a_node : int
        Limit of the bytes that one sender has announced. A single object may be larger.

    Attributes
    ----------
    taken_bytes : int
        Memory that spools have now.
    """

    def __init__(self, most_bytes: int, most_of_a_node: int) -> None:
        self._most = most_bytes
        self.taken_bytes = 0
        self._most_of_a_node = most_of_a_node
        self._announced: Counter[str] = Counter()

    def announce(self, sender: str, nbytes: int) -> str | None:
        """Counts an object of a sender until it is forgotten; returns why the sender may not send it now, or None."""
        under_way = self._announced[sender]
        if under_way and under_way + nbytes > self._most_of_a_node:
            return (
                f"{sender} is sending {under_way:,} bytes already, and may send {self._most_of_a_node:,} at "
                f"once: send these {nbytes:,} when others have come"
            )
        self._announced[sender] += nbytes
        return None

    def forget(self, sender: str, nbytes: int) -> None:
        """Ends the count of an object, which has come, or will not come."""
        self._announced[sender] -= nbytes
        if self._announced[sender] <= 0:
            del self._announced[sender]

    def take(self, nbytes: int) -> bool:
        """Takes memory for bytes that come; False if there is none left."""
        if self.taken_bytes + nbytes > self._most:
            return False
        self.taken_bytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Gives memory back, which is free, or belongs to the store now."""
        self.taken_bytes -= nbytes


class Spool:
    """A target whose memory grows with the bytes that have come; the object lands in a block of the arena or as bytes.

    Parameters
    ----------
    arena : lifl.shm.Arena or None
        None: the object lands as bytes.
    budget : SpoolBudget
        Has counted the object as announced.
    sender : str
    nbytes : int
        Length of the object.
    on_full : callable
        Called if a large object lands as bytes, because the arena has no room.
    """

    def __init__(
        self, arena: Arena | None, budget: SpoolBudget, sender: str, nbytes: int, on_full: Callable[[], None]
    ) -> None:
        self._arena = arena
        self._budget = budget
        self._sender = sender
        self._nbytes = nbytes
        self._on_full = on_full
        self._pieces: list[bytearray] = []
        self._taken = 0
        self._is_open = True

    def pieces(self) -> Iterator[Any]:
        """Pieces, each made when the one before is full; raises :class:`MemoryError` beyond the budget."""
        while self._taken < self._nbytes:
            nbytes = min(max(FIRST_BYTES, min(self._taken, MAX_GROWTH_BYTES)), self._nbytes - self._taken)
            if not self._budget.take(nbytes):
                raise MemoryError("too much is coming in at once: try again later")
            self._taken += nbytes
            self._pieces.append(bytearray(nbytes))
            yield memoryview(self._pieces[-1])

    def came(self, nbytes: int) -> None:
        """Does nothing: pieces are counted as they are made."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Does nothing: the memory is the upload's own."""

    def landed(self, digest: str) -> Landed:
        """The object in a block of its own if it is large and the arena has room, else as bytes."""
        is_large = self._arena is not None and self._nbytes > MAX_SMALL_BYTES
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
        """The whole block, as one piece."""
        return [self._content.view]

    def came(self, nbytes: int) -> None:
        """Does nothing: the block is taken already."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Does nothing: the memory is the upload's own."""

    def landed(self, digest: str) -> Landed:
        """The object in its block."""
        return Landed(self._content, len(self._content), digest)

    def drop(self) -> None:
        """Gives the block back."""
        self._content.release()
