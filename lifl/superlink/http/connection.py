"""The parts of one HTTP connection: its states, the turn of an exchange, reading, sending, heads, and Flower's bodies.

Owns which changes of state are allowed, and when the socket is read. Knows no route. Everything here belongs to the
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import sys
import termios
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import Any

import httptools

from lifl.superlink import flower
from lifl.superlink.http.allowance import Share

_names = flower.part("gateway")

WRITE_BYTES = 2**17
"""Size of the pieces of an answer: asyncio copies the part of a piece that the socket does not take."""

LOG_EVERY_S = 5.0
"""Shortest time between two log lines about dropped peers."""


class State(IntEnum):  # ints, because an Enum's hash is Python code and a request changes its state eight times
    """The direction in: which part of a request is coming, or why none is taken any more."""

    IDLE = 0
    """No byte of a request has come since the last one."""
    HEAD = 1
    EXCHANGE_BODY = 2
    """The body of an exchange, which came with the head and goes through the parser."""
    DIRECT_BODY = 3
    """The rest of that body: the socket writes it where the exchange wants it, past the parser, which would copy."""
    FLOWER_BODY = 4
    UPGRADING = 5
    """A request that makes a WebSocket of the connection."""
    LAST_ANSWER = 6
    """No request is taken any more. The last answer waits until the requests before it are answered."""
    LINGERING = 7
    """The last answer is sent. The socket is read for a while, since a client that still sends might lose it."""
    CLOSED = 8
    """The connection is lost, dropped, or a WebSocket's."""


IDLE, HEAD, EXCHANGE_BODY, DIRECT_BODY, FLOWER_BODY, UPGRADING, LAST_ANSWER, LINGERING, CLOSED = State
# Names of the module, because `State.IDLE` calls Python code before 3.12.

ALLOWED: dict[State, tuple[State, ...]] = {
    IDLE: (HEAD, LAST_ANSWER, CLOSED),
    HEAD: (EXCHANGE_BODY, FLOWER_BODY, UPGRADING, LAST_ANSWER, CLOSED),
    EXCHANGE_BODY: (DIRECT_BODY, IDLE, LINGERING, CLOSED),
    DIRECT_BODY: (IDLE, LINGERING, CLOSED),
    FLOWER_BODY: (IDLE, LAST_ANSWER, CLOSED),
    UPGRADING: (IDLE, LAST_ANSWER, CLOSED),
    LAST_ANSWER: (LINGERING, CLOSED),
    LINGERING: (CLOSED,),
    CLOSED: (CLOSED,),  # a connection that was dropped is lost a moment later
}

AWAITED = {HEAD: "head", EXCHANGE_BODY: "body", DIRECT_BODY: "body", FLOWER_BODY: "body", UPGRADING: "body"}
"""The part of a request for which the peer has a bounded time, see ``lifl.superlink.http.rates``."""


class Progress(IntEnum):
    """The progress of an exchange. Its answer may be due while another request is already coming in behind it."""

    OVER = 0
    """There is no exchange."""
    RECEIVING = 1
    WORKING = 2
    """The body is whole, the answer is due. An exchange that waits for room is completed when it has room."""
    DISCARDING = 3
    """The exchange wants no more of its body, which still comes; the answer is due."""
    DISCARDED = 4
    """The exchange wanted no more of its body, which is whole; the answer is due."""
    ANSWERED_EARLY = 5
    """The answer is given, and the rest of the body still comes, unwanted."""
    SENDING = 6
    """The body is whole, and the answer is on its way."""


OVER, RECEIVING, WORKING, DISCARDING, DISCARDED, ANSWERED_EARLY, SENDING = Progress

WHEN_WHOLE = {RECEIVING: WORKING, DISCARDING: DISCARDED, ANSWERED_EARLY: SENDING}
WHEN_UNWANTED = {RECEIVING: DISCARDING, WORKING: DISCARDED}
WHEN_ANSWERED = {WORKING: SENDING, DISCARDING: ANSWERED_EARLY, DISCARDED: SENDING}
"""The progress after the last byte of a body, after the exchange is refused or fails, and after its answer."""


class Turn:
    """The turn of one exchange after another; stands for uvicorn's cycle, so that uvicorn queues what comes behind it.

    Attributes
    ----------
    progress : Progress
        Changed by the methods only.
    exchange : Exchange or None
        None when the turn is over, so that the memory of the exchange is not kept until the next request.
    keep_alive : bool
        False if the connection ends with the answer. uvicorn's name for it.
    announces_close : bool
        True if the answer has the header "connection: close".
    """

    __slots__ = ("announces_close", "disconnected", "exchange", "keep_alive", "message_event", "progress")

    def __init__(self) -> None:
        self.progress = OVER
        self.exchange: Any = None
        self.keep_alive = True
        self.announces_close = False
        self.disconnected = False  # this and the event are written by uvicorn, read by nobody
        self.message_event = asyncio.Event()

    @property
    def response_complete(self) -> bool:
        """True for uvicorn when the next request may begin."""
        return self.progress is OVER

    def begin(self, exchange: Any, *, keep_alive: bool, announces_close: bool) -> None:
        """Begins the turn of an exchange whose head has come."""
        assert self.progress is OVER, "one exchange at a time"
        self.exchange = exchange
        self.keep_alive = keep_alive
        self.announces_close = announces_close
        self.progress = RECEIVING

    def note_whole(self) -> None:
        """Notes that the last byte of the body has come."""
        self.progress = WHEN_WHOLE[self.progress]

    def note_unwanted(self) -> None:
        """Notes that the exchange wants no more of the body."""
        self.progress = WHEN_UNWANTED[self.progress]

    def note_answered(self) -> None:
        """Notes that the answer is given."""
        self.progress = WHEN_ANSWERED[self.progress]

    def end(self) -> Any:
        """Ends the turn; returns its exchange."""
        exchange, self.exchange = self.exchange, None
        self.progress = OVER
        return exchange


class Flow(_names.FlowControl):  # type: ignore[misc,name-defined]
    """uvicorn's flow control, and a second hold on reading: the socket is read when neither pauses it."""

    def __init__(self, transport: Any, pipeline: Any) -> None:
        super().__init__(transport)
        self._pipeline = pipeline
        self.is_held = False

    @property
    def is_paused(self) -> bool:
        """True if the socket is not read."""
        return bool(self.read_paused or self.is_held)

    def pause_reading(self) -> None:
        """Pauses reading for uvicorn."""
        if not self.is_paused:
            self._transport.pause_reading()
        self.read_paused = True

    def resume_reading(self) -> None:
        """Ends uvicorn's pause, unless requests are queued."""
        # uvicorn resumes when an app waits for its body. If requests are queued, the body has come whole, and reading
        # would only let more requests in.
        if self.read_paused and not self._pipeline:
            self.read_paused = False
            if not self.is_held:
                self._transport.resume_reading()

    def hold(self) -> None:
        """Holds reading for an exchange or a body."""
        if not self.is_paused:
            self._transport.pause_reading()
        self.is_held = True

    def let_go(self) -> None:
        """Ends the hold; reading goes on unless uvicorn has paused it."""
        if self.is_held:
            self.is_held = False
            if not self.read_paused:
                self._transport.resume_reading()


class Outgoing:
    """The parts of an answer that the transport has not taken yet.

    Attributes
    ----------
    is_private : bool
        True if the parts have been copied out of the arena.
    """

    __slots__ = ("_parts", "is_private")

    def __init__(self) -> None:
        self._parts: deque[Any] = deque()
        self.is_private = False

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, parts: Iterable[Any]) -> None:
        """Adds buffers, which are held until they are taken."""
        self._parts.extend(parts)

    def take(self) -> Any:
        """Takes the next piece, of at most ``WRITE_BYTES``."""
        part = self._parts.popleft()
        if len(part) > WRITE_BYTES:
            self._parts.appendleft(part[WRITE_BYTES:])
            return part[:WRITE_BYTES]
        self.is_private = self.is_private and bool(self._parts)
        return part

    def clear(self) -> None:
        """Lets go of all parts."""
        self._parts.clear()

    def unpin(self) -> None:
        """Copies the parts out of the arena, whose blocks come free."""
        self._parts = deque(memoryview(bytes(part)) for part in self._parts)
        self.is_private = True

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(map(len, self._parts))

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena among them, which hold their blocks."""
        if self.is_private:
            return 0
        return sum(len(part) for part in self._parts if not isinstance(getattr(part, "obj", part), bytes))


@lru_cache(maxsize=64)  # there are some 30 paths; few are kept, since a client's may have 64 KiB
def path_of(url: bytes) -> str:
    """The path of a URL, decoded as uvicorn does it."""
    return urllib.parse.unquote(httptools.parse_url(url).path.decode("ascii"))


PLAIN = (b"content-type", b"text/plain; charset=utf-8")
CLOSE = (b"connection", b"close")
KIND = (b"content-type", _names.MEDIA_TYPE.encode())


class Heads:
    """The heads of one server's answers. `default` are uvicorn's own headers, which it makes anew once a second."""

    def __init__(self) -> None:
        self._usual: tuple[Any, bytes] = None, b""  # uvicorn's headers, and the beginning of a usual head with them

    def usual(self, default: Any, length: int) -> bytes:
        """The head of most answers, whose beginning is made as often as uvicorn makes its own headers."""
        if self._usual[0] is not default:
            self._usual = default, self._begin(default, 200, (), False)
        return b"%bcontent-length: %d\r\n\r\n" % (self._usual[1], length)

    def of(self, default: Any, status: int, length: int, headers: Iterable[tuple[bytes, bytes]], closes: bool) -> bytes:
        """A head; the body is protobuf if there are no `headers`."""
        return b"%bcontent-length: %d\r\n\r\n" % (self._begin(default, status, headers, closes), length)

    def last(self, default: Any, status: int, reason: str | bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """A whole answer with which a connection ends."""
        body = reason if isinstance(reason, bytes) else reason.encode()
        return self.of(default, status, len(body), headers, True) + body

    @staticmethod
    def _begin(default: Any, status: int, headers: Iterable[tuple[bytes, bytes]], closes: bool) -> bytes:
        all_headers = (*default, *(headers or (KIND,)), *((CLOSE,) if closes else ()))
        return b"".join((_names.STATUS_LINE[status], *(b"%b: %b\r\n" % one for one in all_headers)))


def queued_bytes(transport: Any) -> int:
    """Bytes that the peer of a transport has not had. The kernel's are counted too: it takes them in large steps."""
    queued = bytearray(4)
    with contextlib.suppress(OSError, ValueError):
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return int(transport.get_write_buffer_size()) + int.from_bytes(queued, sys.byteorder)


class DropLog:
    """Log lines about dropped peers of one server: one at once, then one in ``LOG_EVERY_S`` at most."""

    def __init__(self) -> None:
        self._logged_s = -LOG_EVERY_S
        self._unlogged = 0

    def log(self, logger: logging.Logger, client: tuple[str, int] | None, reason: str) -> None:
        """Logs why a peer is dropped, or counts it for the next line."""
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" (and {self._unlogged} others since the last such line)" if self._unlogged else ""
        self._logged_s = now_s
        self._unlogged = 0
        peer = f"{client[0]}:{client[1]}" if client else "a peer"
        logger.warning("The connection of %s is dropped: %s%s", peer, reason, more)


class FlowerBody:
    """A body that goes to Flower: its limit, its length so far, and its share of the memory for bodies.

    Attributes
    ----------
    cycle : RequestResponseCycle
        uvicorn's.
    nbytes, unshared_bytes : int
        Bytes that have come, and those of them that came before there was a share.
    is_asked_for : bool
        True when the share has been asked for.
    share : Share or None
        None until the sender is known.
    """

    def __init__(self, cycle: Any, path: str, headers: Any, limit: int) -> None:
        self.cycle = cycle
        self.path = path
        self.headers = headers
        self.limit = limit
        self.nbytes = 0
        self.unshared_bytes = 0
        self.is_asked_for = False
        self.share: Share | None = None
