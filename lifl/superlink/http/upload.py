"""An object on its way from a socket to its target, hashed while it comes.

Owns the bytes until they have landed. Touches no socket: the reader of the socket asks for room, and reports the bytes
that it has written there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from lifl.superlink.http.body import Cut, cut
from lifl.superlink.http.targets import Sink
from lifl.superlink.store.content import Landed


class Target(Protocol):
    """The target of an object's content: pieces of memory, one after another, of its whole length."""

    def pieces(self) -> Iterable[Any]:
        """Writable memoryviews, each asked for when the one before is full."""

    def came(self, nbytes: int) -> None:
        """Notes that `nbytes` more have been written."""

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Has `on_revoked` called if the memory is needed elsewhere: with True if the bytes so far are to be kept.

        It may be called from any thread.
        """

    def landed(self, digest: str) -> Landed:
        """The content, which has come whole and is the caller's from here on."""

    def drop(self) -> None:
        """Gives the memory back: the content will not come whole."""


class Upload:
    """The body of a push-object request.

    Its first bytes are fed, until `on_prefix` is called with the fields before the content and the content's length.
    Then its owner has to :meth:`aim` it at a target or to :meth:`drop` it. Bytes that have come meanwhile wait here, at
    most one read from the socket.

    Attributes
    ----------
    failure : MemoryError or None
        The reason why the content was let go of while it came; the rest of it is still read.
    copied_bytes : int
        Bytes that came with the first ones and had to be moved to the target.
    """

    def __init__(self, length: int, on_prefix: Callable[[bytes, int], None]) -> None:
        self._length = length
        self._on_prefix = on_prefix
        self._cut: Cut | None = None
        self._prefix = bytearray()  # the first bytes, and later the bytes that wait for a target
        self._pieces: Iterator[Any] = iter(())
        self._piece: Any = b""  # the piece that is being filled
        self._at = 0
        self._seen = 0  # bytes of the body that lie where they belong
        self._content_left = 0
        self._hash = hashlib.sha256()
        self._tail = bytearray()
        self._target: Target | None = None
        self.failure: MemoryError | None = None
        self.copied_bytes = 0

    @property
    def is_aimed(self) -> bool:
        """True when bytes may be written to :meth:`room`."""
        return self._target is not None

    def is_aimed_at(self, target: Target) -> bool:
        """True while the content goes to `target`."""
        return self._target is target

    @property
    def is_complete(self) -> bool:
        """True when the last byte lies where it belongs."""
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
        """Sends the content to `target` from here on, and moves the bytes there that have come."""
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
        """A writable buffer for the next bytes; never empty before the body is complete."""
        while self._at == len(self._piece):
            self._piece, self._at = self._next_piece(), 0
        return self._piece[self._at :]

    def _next_piece(self) -> Any:
        if not self._content_left:
            return memoryview(self._tail)
        try:
            return next(self._pieces)
        except MemoryError as error:
            # The rest is read and forgotten: a client reads the answer when it has sent all of its body.
            assert self._target is not None, "it is aimed"
            self.failure = error
            self._target.drop()
            self._target = Sink(self._content_left)
            self._pieces = iter(self._target.pieces())
            return next(self._pieces)

    def advance(self, nbytes: int) -> None:
        """Notes that `nbytes` have been written to :meth:`room`."""
        if self._content_left:
            self._hash.update(self._piece[self._at : self._at + nbytes])
            self._content_left -= nbytes
            if self._target is not None:
                self._target.came(nbytes)
        self._at += nbytes
        self._seen += nbytes

    def move(self, target: Target) -> None:
        """Goes on at another target: the content so far is copied there, and the target before is given up.

        The target before must be one that gives the same pieces again: a place, not a spool.
        """
        assert self._target is not None, "it is aimed"
        assert self._cut is not None, "it is aimed"
        before, came = self._target, self._cut.nbytes - self._content_left
        tail_at = self._seen - self._cut.begin - self._cut.nbytes
        self._target, self._pieces = target, iter(target.pieces())
        self._piece, self._at = b"", 0
        self._content_left = self._cut.nbytes
        try:
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
        finally:
            before.drop()

    def take(self) -> Landed:
        """The content of a complete body; it is the caller's from here on."""
        assert self._target is not None, "it is complete"
        # No view is kept: the memory belongs to the content, which may go before this upload does.
        self._pieces, self._piece = iter(()), b""
        target, self._target = self._target, None
        return target.landed(self._hash.hexdigest())

    def drop(self) -> None:
        """Gives back all that it holds: nothing more will come, or nobody wants it."""
        self._pieces, self._piece, self._prefix = iter(()), b"", bytearray()
        target, self._target = self._target, None
        if target is not None:
            target.drop()
