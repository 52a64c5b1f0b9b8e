"""Where an object goes while it comes: nowhere, into bytes, or into a block of its own.

Owns that memory until the object has landed. A part of an update has a place of another kind, see ``reception``.
"""

from __future__ import annotations

from typing import Any

import attrs

from lifl.superlink.content import BlockContent, Landed

SINK_BYTES = 2**16
_sink = memoryview(bytearray(SINK_BYTES))  # what nobody wants is written over itself


@attrs.define(eq=False)
class Sink:
    """For content that is not wanted: it is read and hashed, and forgotten."""

    nbytes: int

    @property
    def pieces(self) -> list[Any]:
        """The same memory, again and again."""
        whole, rest = divmod(self.nbytes, SINK_BYTES)
        return [_sink] * whole + ([_sink[:rest]] if rest else [])

    def landed(self, digest: str) -> Landed:
        """Nothing, with the hash of what came."""
        return Landed(b"", self.nbytes, digest)

    def drop(self) -> None:
        """Nothing is held."""


class Small:
    """A target for an object that is kept as bytes."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = bytearray(nbytes)

    @property
    def pieces(self) -> list[Any]:
        """One."""
        return [memoryview(self._bytes)]

    def landed(self, digest: str) -> Landed:
        """The bytes."""
        return Landed(bytes(self._bytes), len(self._bytes), digest)

    def drop(self) -> None:
        """Python's."""


class Large:
    """A target for an object in a block of its own."""

    def __init__(self, content: BlockContent) -> None:
        self._content = content

    @property
    def pieces(self) -> list[Any]:
        """One."""
        return [self._content.view]

    def landed(self, digest: str) -> Landed:
        """The block."""
        return Landed(self._content, len(self._content), digest)

    def drop(self) -> None:
        """Gives the block back."""
        self._content.release()
