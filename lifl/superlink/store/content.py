"""The bytes of an object: in a block of their own, in an update's or the mean's block, or as Python's bytes.

Owns those blocks until they are released. An object in a block of its own is kept as the body of the answer that
clients get, so that it is encoded once.

The content invariant: the bytes that can be read under an object's id are, at every moment, those that were hashed to
that id. So nobody writes to memory that a content shows before the content is released. Tests switch on a check of it,
see ``lifl.superlink.store.store``.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from lifl.shm.arena import Arena, Block
from lifl.superlink import flower

_names = flower.part("store")

MAX_SMALL_BYTES = 2**16
"""Longest object that is kept as bytes: a block takes at least as much of the arena."""

_ROOM = 16
"""Bytes before an object in its block, for the fields before it in an answer."""

CHUNK_HEAD = re.compile(rb"ArrayChunk  (0|[1-9][0-9]{0,15})\x00")


def varint(n: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def answer_head(nbytes: int) -> bytes:
    """The bytes before an object in a PullObjectResponse: object_found, object_available, object_content's length."""
    return b"\x08\x01\x10\x01\x1a" + varint(nbytes)


class Content:
    """The content of an object: in a block of its own, or, at least a part of it, in an update's or the mean's block.

    Attributes
    ----------
    is_lasting : bool
        True if its bytes stay as they are as long as a view of them is held.
    """

    is_lasting = True

    def __bytes__(self) -> bytes:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def begin(self, nbytes: int) -> bytes:
        """Its first bytes, at most so many."""
        raise NotImplementedError

    def answer(self) -> tuple[Any, ...]:
        """A PullObjectResponse with the object, in parts one after another, which stay as they are while held."""
        return answer_head(len(self)), bytes(self)

    def release(self) -> None:
        """Gives its memory back, once no view of it is held."""


class BlockContent(Content):
    """A whole object in a block of its own."""

    def __init__(self, arena: Arena, block: Block, nbytes: int) -> None:
        self._arena = arena
        self._block = block
        head = answer_head(nbytes)
        whole = memoryview(arena.buffer(block))
        whole[_ROOM - len(head) : _ROOM] = head
        self.view: Any = whole[_ROOM : _ROOM + nbytes]
        self._answer: Any = (whole[_ROOM - len(head) : _ROOM + nbytes],)

    @classmethod
    def make(cls, arena: Arena, nbytes: int) -> BlockContent | None:
        """A block with room for an object of `nbytes`, or None if the arena has none now."""
        block = arena.alloc(_ROOM + nbytes)
        return None if block is None else cls(arena, block, nbytes)

    def __len__(self) -> int:
        return len(self.view)

    def __bytes__(self) -> bytes:
        return bytes(self.view)

    def begin(self, nbytes: int) -> bytes:
        """Its first bytes, at most so many."""
        return bytes(self.view[:nbytes])

    def answer(self) -> tuple[Any, ...]:
        """The block, as one part; it has the fields before the object too."""
        answer: tuple[Any, ...] = self._answer
        return answer

    def release(self) -> None:
        """Gives the block back, once no view of it is held."""
        self.view, self._answer = None, ()
        self._arena.reclaim(self._block)


class PartContent(Content):
    """A chunk whose numbers are a part of a model in the arena. The model keeps them there."""

    def __init__(self, head: bytes, numbers: Any) -> None:
        self.head = head
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self.head) + len(self._numbers)

    def __bytes__(self) -> bytes:
        return b"".join((self.head, self._numbers))

    def begin(self, nbytes: int) -> bytes:
        """Its first bytes, at most so many."""
        return self.head[:nbytes] + bytes(self._numbers[: max(nbytes - len(self.head), 0)])

    def answer(self) -> tuple[Any, ...]:
        """Two parts: the heads of answer and chunk, and the numbers where they lie."""
        return answer_head(len(self)) + self.head, self._numbers

    def release(self) -> None:
        """Lets go of its view of the model."""
        self._numbers = b""


class Landed:
    """An object that has come whole, on its way into the store. ``len`` is the object's length.

    Parameters
    ----------
    content : Content or bytes
        Empty if the object was not kept, because it is in the store already.
    nbytes : int
    digest : str
        SHA-256 of the bytes, taken while they came; it stands for them from then on.
    head : bytes or None
        Head of an ArrayChunk, if it is known already.
    """

    def __init__(self, content: Content | bytes, nbytes: int, digest: str, head: bytes | None = None) -> None:
        self.content = content
        self._nbytes = nbytes
        self._digest = digest
        self._head = head

    @classmethod
    def of(cls, content: bytes) -> Landed:
        """An object whose bytes came another way, and are hashed here."""
        return cls(content, len(content), hashlib.sha256(content).hexdigest())

    def check(self, object_id: str) -> None:
        """Raises ``ValueError`` unless this is the object of that id, and formed as Flower's objects are."""
        if self._digest != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        if self.is_sunk:  # the store has checked the object that it has
            return
        content = self.content
        if isinstance(content, bytes):
            head = CHUNK_HEAD.match(content[:40])
            if head is None or int(head[1]) != len(content) - head.end():
                _names.validate_content(content=content)
            return
        head = CHUNK_HEAD.match(self._head if self._head is not None else bytes(content.view[:40]))  # type: ignore[attr-defined]
        if head is None or int(head[1]) != self._nbytes - head.end():
            _names.validate_content(content=bytes(content))

    @property
    def is_sunk(self) -> bool:
        """True if the content was not kept, because the store had it already."""
        return not self.content and self._nbytes > 0

    def take(self) -> Content | bytes:
        """The content, which is the caller's from here on."""
        content, self.content = self.content, b""
        return content

    def drop(self) -> None:
        """Releases content that will not be stored; harmless when it has been taken."""
        content = self.take()
        if isinstance(content, Content):
            content.release()

    def __len__(self) -> int:
        return self._nbytes
