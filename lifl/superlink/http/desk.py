"""What the protocol asks of those who take requests past ASGI: the desk, and an exchange for each request.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lifl.superlink.http.allowance import Share


class Exchange(Protocol):
    """One request and its answer, as the desk sees it."""

    @property
    def is_aimed(self) -> bool:
        """True if the body may be written to :meth:`room`, False if it has to be fed."""

    @property
    def is_complete(self) -> bool:
        """True when the body has come whole."""

    def begin(self) -> None:
        """The head has come; may refuse it."""

    def feed(self, data: bytes) -> None:
        """Takes bytes of the body."""

    def room(self) -> Any:
        """Where the next bytes of the body go."""

    def advance(self, nbytes: int) -> None:
        """So many have been written there."""

    def complete(self) -> None:
        """The body is complete: the answer is due, now or later, by ``GatewayProtocol.answer``."""

    def drop(self) -> None:
        """The connection is gone, or the body is given up."""

    def hurry(self) -> None:
        """The server ends, or another request waits: what is held open is to be answered now."""


class Desk(Protocol):
    """Who takes requests past ASGI, and says what bodies may take."""

    max_body_bytes: int
    """No body is longer."""

    def begin(self, protocol: Any, path: bytes, headers: list[tuple[bytes, bytes]], length: int) -> Any:
        """An :class:`Exchange` for a POST request of which the head has come, or None to leave it to Flower."""

    def limit_of(self, path: str) -> int:
        """How long the body of a request that is left to Flower may be."""

    def admit(
        self,
        path: str,
        headers: list[tuple[bytes, bytes]],
        client: Any,
        give_up: Callable[[], None],
        then: Callable[[Share], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Looks who sends a body of more than ``FREE_BYTES``: calls `then` with its share, or `fail`."""

    def answer_error(
        self, error: BaseException, path: str, headers: list[tuple[bytes, bytes]], answer: Callable[..., None]
    ) -> None:
        """Calls `answer` with what Flower answers to an error."""
