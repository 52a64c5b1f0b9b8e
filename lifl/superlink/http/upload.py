"""One object on its way from a socket to where it will lie, hashed while it comes.

Owns the bytes until they have landed. Touches no socket: who reads one asks for room and says how much came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from lifl.superlink.http.body import Cut, cut
from lifl.superlink.http.targets import Sink
from lifl.superlink.store.content import Landed


class Target(Protocol):
    """Where an object's content goes: pieces of memory, one after another, of its whole length."""

    def pieces(self) -> Iterable[Any]:
        """Writable memoryviews, each asked for when the one before is full."""

    def came(self, nbytes: int) -> None:
        """So many bytes more have been written."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Calls it, from any thread, if the memory is needed elsewhere: with True if what has come is to be kept."""

    def landed(self, digest: str) -> Landed:
        """All of it has come."""

    def drop(self) -> None:
        """It will not."""


class Upload:
    """A push-object body.

    Its prefix is fed; then `on_prefix` is called with the bytes of the small fields, and somebody has to :meth:`aim`
    it at a target or :meth:`refuse` it. What came meanwhile waits, at most what one read from the socket gives.
    """

    def __init__(self, length: int, on_prefix: Callable[[bytes, int], None]) -> None:
        self._length, self._on_prefix = length, on_prefix
        self._cut: Cut | None = None
        self._prefix = bytearray()  # then: what waits for a target
        self._pieces: Iterator[Any] = iter(())
        self._piece: Any = b""  # of them the one that is being filled
        self._at = 0
        self._seen = 0  # bytes of the body that have gone where they belong
        self._content_left = 0
        self._hash = hashlib.sha256()
        self._tail = bytearray()
        self._target: Target | None = None
        self.failure: MemoryError | None = None  # why what has come was let go of
        self.copied_bytes = 0  # that came with the prefix and had to be moved

    @property
    def is_aimed(self) -> bool:
        """True when what comes may be written where it belongs."""
        return self._target is not None

    @property
    def is_complete(self) -> bool:
        """True when the last byte has come to where it belongs."""
        return self.is_aimed and self._seen == self._length

    @property
    def fields(self) -> bytes:
        """The small fields before and behind the content; all of them once it is complete."""
        return self._fields + bytes(self._tail)

    def feed(self, data: bytes) -> None:
        """Takes bytes of the body in order; raises ``ValueError`` if they are no push-object request."""
        if self.is_aimed:
            self._write(data)
            return
        self._prefix += data
        if self._cut is None and (found := cut(self._prefix, self._length)) is not None:
            self._cut = found
            self._fields = bytes(self._prefix[: found.field_at])
            self._on_prefix(self._fields, found.nbytes)

    def aim(self, target: Target) -> None:
        """From here on the content goes there."""
        assert self._cut is not None, "aimed after on_prefix"
        self._target = target
        self._tail = bytearray(self._cut.tail_bytes)
        self._pieces, self._piece, self._at = iter(target.pieces()), b"", 0
        self._content_left = self._cut.nbytes
        self._seen = self._cut.begin
        waiting, self._prefix = memoryview(self._prefix)[self._cut.begin :], bytearray()
        self._write(waiting)

    def _write(self, data: Any) -> None:
        data = memoryview(data)
        self.copied_bytes += len(data)
        while len(data):
            room = self.room()
            n = min(len(room), len(data))
            room[:n] = data[:n]
            self.advance(n)
            data = data[n:]

    def room(self) -> Any:
        """Where the next bytes go; never empty before it is complete."""
        while self._at == len(self._piece):
            self._piece, self._at = self._next_piece(), 0
        return self._piece[self._at :]

    def _next_piece(self) -> Any:
        if not self._content_left:
            return memoryview(self._tail)
        try:
            return next(self._pieces)
        except MemoryError as error:  # the rest is read and forgotten, so that the client reads the answer
            assert self._target is not None, "it is aimed"
            self.failure = error
            self._target.drop()
            self._target = Sink(self._content_left)
            self._pieces = iter(self._target.pieces())
            return next(self._pieces)

    def advance(self, nbytes: int) -> None:
        """So many bytes have been written to :meth:`room`."""
        if self._content_left:
            self._hash.update(self._piece[self._at : self._at + nbytes])
            self._content_left -= nbytes
            if self._target is not None:
                self._target.came(nbytes)
        self._at += nbytes
        self._seen += nbytes

    def move(self, target: Target) -> None:
        """Goes on elsewhere: what has come of the content is copied there, and the place before is given up."""
        assert self._target is not None, "it is aimed"
        assert self._cut is not None, "it is aimed"
        before, came = self._target, self._cut.nbytes - self._content_left
        tail_at = self._seen - self._cut.begin - self._cut.nbytes
        self._target, self._pieces = target, iter(target.pieces())
        self._piece, self._at = b"", 0
        self._content_left = self._cut.nbytes
        for piece in before.pieces():
            data = memoryview(piece)[:came]
            came -= len(data)
            while len(data):
                room = self.room()
                n = min(len(room), len(data))
                room[:n] = data[:n]
                self._at += n
                self._content_left -= n
                data = data[n:]
        if not self._content_left:
            self._piece, self._at = memoryview(self._tail), tail_at
        before.drop()

    def take(self) -> Landed:
        """The content, once it is complete; it is the caller's then."""
        assert self._target is not None, "it is complete"
        self._pieces, self._piece = iter(()), b""  # the memory is the content's, which may go before this does
        target, self._target = self._target, None
        return target.landed(self._hash.hexdigest())

    def drop(self) -> None:
        """Nothing more will come, or nobody wants it: what it holds is given back."""
        self._pieces, self._piece, self._prefix = iter(()), b"", bytearray()
        target, self._target = self._target, None
        if target is not None:
            target.drop()
