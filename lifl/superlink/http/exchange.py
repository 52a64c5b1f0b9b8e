"""The interface between a connection and the requests that go past ASGI: a router, and an exchange for each request.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lifl.superlink.http.allowance import Share


class Exchange(Protocol):
    """A request and its answer, as the connection sees them."""

    @property
    def is_aimed(self) -> bool:
        """True if the body may be written to :meth:`room`, False if it has to be fed."""

    @property
    def is_complete(self) -> bool:
        """True when the body has come whole and has its place."""

    def begin(self) -> None:
        """Begins; the head has come. May refuse the request."""

    def feed(self, data: bytes) -> None:
        """Takes bytes of the body; raises ``ValueError`` if they are no such request."""

    def room(self) -> Any:
        """A writable memoryview for the next bytes of the body."""

    def advance(self, nbytes: int) -> None:
        """Takes the next bytes of the body, which have been written to :meth:`room`."""

    def complete(self) -> None:
        """Does the work: the body is complete. The answer follows, now or later, by ``GatewayProtocol.answer``."""

    def drop(self) -> None:
        """Gives everything back: the connection is gone, or the body is not wanted."""

    def hurry(self) -> None:
        """Answers at once if the request is held open: the server ends, or another request waits behind it."""


class Router(Protocol):
    """Decides which requests go past ASGI, and how much memory bodies may take."""

    max_body_bytes: int
    """No body is longer."""

    def begin(self, protocol: Any, path: bytes, headers: list[tuple[bytes, bytes]], length: int) -> Any:
        """An :class:`Exchange` for a POST request whose head has come, or None to leave the request to Flower."""

    def limit_of(self, path: str) -> int:
        """The limit in bytes of a body that is left to Flower."""

    def admit(
        self,
        path: str,
        headers: list[tuple[bytes, bytes]],
        client: Any,
        give_up: Callable[[], None],
        then: Callable[[Share], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Identifies the sender of a body of more than ``FREE_BYTES``: calls `then` with its share, or `fail`."""

    def answer_error(
        self, error: BaseException, path: str, headers: list[tuple[bytes, bytes]], answer: Callable[..., None]
    ) -> None:
        """Calls `answer` with Flower's answer to an error."""
