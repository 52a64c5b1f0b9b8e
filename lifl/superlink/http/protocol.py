"""uvicorn's HTTP protocol, with a way past ASGI for the routes of the data plane.

The parser, keep-alive, TLS and everything else are uvicorn's. Of a request that a ``Desk`` takes, the head goes to it
when it has come, the body to whatever the desk gives room in, and the answer from wherever it lies. A request behind
one that is not answered is uvicorn's, which answers it in turn.

A body, whoever's, has a bound, and so has the time that a peer may take for it, for a head and for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sys
import termios
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import httptools

from lifl.superlink import flower
from lifl.superlink.http.allowance import Share
from lifl.superlink.http.desk import Desk, Exchange
from lifl.superlink.http.rates import Rates
from lifl.superlink.http.turns import Body, Flow, Turn

_names = flower.part("gateway")

READ_BYTES = 2**16
WRITE_BYTES = 2**17
"""An answer is written in such pieces, so that asyncio, which copies what a socket does not take, copies little."""

STALL_S = 10.0
"""Over so long a peer has to be faster than ``MIN_RATE``, in either direction; a head has to come in that time."""

LINGER_S = 1.0
"""A connection that ends before all of its request has come is read from for so long: else the answer may be lost."""

FREE_BYTES = 2**16
"""More of a body is taken only for a sender who is known, or within what strangers may take together."""

MAX_DISCARD_BYTES = 2**26
"""More than this of a refused body is not read: the connection ends."""

MAX_HEAD_BYTES = 2**16
MAX_PIPELINED = 64

SAID_S = 5.0
"""Dropped peers are logged at most so often."""

_COPIES = sys.version_info < (3, 12)
"""asyncio copies what a socket does not take; later ones keep a view of it, which would pin the arena."""

_scratch = memoryview(bytearray(READ_BYTES))  # one loop reads at a time, and what is read is used at once
_PLAIN = (b"content-type", b"text/plain; charset=utf-8")
_CLOSE = (b"connection", b"close")
_KIND = (b"content-type", _names.MEDIA_TYPE.encode())


@lru_cache(maxsize=64)  # of a path, which may have 64 KiB; there are some 30
def _path_of(url: bytes) -> str:
    """As uvicorn has it."""
    return urllib.parse.unquote(httptools.parse_url(url).path.decode("ascii"))


class GatewayProtocol(_names.HttpProtocol, asyncio.BufferedProtocol):  # type: ignore[misc,name-defined]
    """A connection. Made by a subclass of one server's own, see :func:`protocol_of`.

    Attributes
    ----------
    desk : Desk
    open : set
        All connections.
    busy : set
        The connections that have an exchange going on.
    """

    desk: Desk
    open: set[GatewayProtocol]
    busy: set[GatewayProtocol]
    _usual: tuple[Any, bytes] = None, b""  # uvicorn's headers, and a head that begins with them
    _said_s = -SAID_S
    _unsaid = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange: Exchange | None = None
        self.path = ""
        self._left = 0  # bytes of the exchange's body that have not come
        self._is_ours = False  # the message that the parser is in
        self._is_nobodys = False  # or of it nothing is wanted
        self._has_ended = False  # all of the exchange's body has come
        self._is_past_parser = False
        self._is_answered = False
        self._discarding = False
        self._sending: deque[Any] = deque()
        self._is_private = False  # what is sent has been copied out of the arena
        self._closes = self._says_so = False
        self._turn = Turn()
        self.cycle: Any = None
        self._bodies: dict[Any, Body] = {}  # of the cycles that are not complete
        self._last_words: bytes | None = None  # to be said when all is answered; then the connection ends
        self._is_ending = False  # they have been said
        self._awaits: str | None = None  # the rest of a "head" or "body"
        self._extra_bytes = 0  # of this message, that are not its body
        self.rates = Rates(time.monotonic())

    def connection_made(self, transport: Any) -> None:
        """uvicorn's."""
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self.open.add(self)

    # ------------------------------------------------------------ bytes in

    def get_buffer(self, sizehint: int) -> Any:
        """Where the socket writes next."""
        if self._is_past_parser and not self._is_ending:
            if self._discarding:
                return _scratch[: self._left]
            assert self._exchange is not None
            if self._exchange.is_aimed:
                return self._exchange.room()[: self._left]
            return _scratch[: self._left]
        return _scratch

    def buffer_updated(self, nbytes: int) -> None:
        """So much has been written there."""
        if self._is_ending:
            return
        self.rates.came_bytes += nbytes
        if not self._is_past_parser:
            self._extra_bytes += nbytes
            self.data_received(bytes(_scratch[:nbytes]))
            if self._exchange is not None and self._left and not self.transport.is_closing():
                self._is_past_parser = True  # the parser would copy
            elif self._awaits and self._extra_bytes > MAX_HEAD_BYTES + READ_BYTES:
                self.end_with(431, f"a request's head may have {MAX_HEAD_BYTES:,} bytes")
            return
        self._unset_keepalive_if_required()
        exchange = self._exchange
        self._left -= nbytes
        if self._discarding or exchange is None:
            pass
        elif exchange.is_aimed:
            exchange.advance(nbytes)
        else:
            self._feed(bytes(_scratch[:nbytes]))
        if not self._left:
            self._is_past_parser = self._is_ours = False
            self._awaits = None
            self.parser = httptools.HttpRequestParser(self)  # which has not seen the end of this body
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._body_ended()

    # ------------------------------------------------------------ the parser's callbacks

    @property
    def _is_over(self) -> bool:
        """True if no request is taken any more."""
        return self._last_words is not None or self._is_ending or self.transport.is_closing()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._awaits, self._extra_bytes = "head", 0
        self.rates.begin_in()

    def on_headers_complete(self) -> None:
        """Gives the request to the desk if it wants it, else to Flower."""
        self._awaits = "body"
        self._is_ours, self._is_nobodys = False, True
        if self._is_over:
            self._awaits = None
            return
        path, said = _path_of(self.url), dict(self.headers)
        length = said.get(b"content-length", b"").strip()
        declared = int(length) if length.isdigit() else 0
        is_plain = length and b"transfer-encoding" not in said and self._is_identity(said)
        if is_plain and self._is_free and self.parser.get_method() == b"POST" and not self.parser.should_upgrade():
            if declared > self.desk.max_body_bytes:
                self._refuse_length(declared, self.desk.max_body_bytes)
                return
            exchange = self.desk.begin(self, self.url, self.headers, declared)
            if exchange is not None:
                self._take(exchange, path, declared)
                return
        limit = self.desk.limit_of(path)
        if declared > limit:
            self._refuse_length(declared, limit)
        elif len(self.pipeline) >= MAX_PIPELINED:
            self.end_with(503, f"more than {MAX_PIPELINED} requests that wait for answers")
        else:
            self._leave_to_flower(path, limit)

    def _take(self, exchange: Exchange, path: str, length: int) -> None:
        self._overtake()
        self._turn.response_complete = False
        self.cycle = self._turn
        self._exchange, self.path, self._left = exchange, path, length
        self._is_ours, self._is_nobodys = True, False
        self._has_ended = self._is_answered = self._discarding = False
        self._says_so = _CLOSE in self.headers
        self._closes = self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive()
        self.busy.add(self)
        exchange.begin()
        if self.expect_100_continue and not self._is_answered:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _leave_to_flower(self, path: str, limit: int) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is before:
            return  # it becomes a WebSocket
        self._is_nobodys = False
        self._bodies[self.cycle] = Body(self.cycle, path, self.headers, limit)
        self.cycle.on_response = partial(self._cycle_ended, self.cycle)
        if self._exchange is not None:
            self._exchange.hurry()

    def _overtake(self) -> None:
        """The last cycle's answer is whole, though it has not said so: when it does, that is the end of nothing."""
        if self.cycle in self._bodies:
            self._forget(self.cycle)
            self.cycle.on_response = lambda: None
            self.server_state.total_requests += 1

    @property
    def _is_free(self) -> bool:
        """True if the client has had all of the last answer.

        Flower's middlewares end an answer with an empty piece, a little after its last byte: a quick client's next
        request comes in between. uvicorn would take it for pipelined, and so the one after it, and so on.
        """
        cycle = self.cycle
        if self._exchange is not None:
            return False
        if cycle is None or cycle.response_complete:
            return True
        is_whole = cycle.chunked_encoding is False and cycle.expected_content_length == 0
        return bool(cycle.response_started and is_whole and cycle.keep_alive)

    def _is_identity(self, said: Mapping[bytes, bytes]) -> bool:
        """True if the body is what is sent."""
        if b"content-encoding" not in said:
            return True
        encodings = [value for name, value in self.headers if name == b"content-encoding"]
        return all(encoding.strip().lower() == b"identity" for encoding in encodings)

    def on_body(self, body: bytes) -> None:
        """Feeds the exchange, or counts what goes to Flower."""
        self._extra_bytes -= min(17 * len(body), self._extra_bytes)  # chunks of one byte have five around it
        if self._is_ours:
            self._left -= len(body)
            if self._exchange is not None and not self._discarding:
                self._feed(body)
        elif not self._is_nobodys and not self._is_over:
            said = self._bodies.get(self.cycle)
            if said is None or self._may_come(said, len(body)):
                super().on_body(body)

    def on_message_complete(self) -> None:
        """All of the body has come through the parser."""
        self._awaits = None
        if self._is_ours:
            self._is_ours = False
            self._body_ended()
        elif not self._is_nobodys:
            if (said := self._bodies.get(self.cycle)) is not None and said.share is not None:
                said.share.is_whole = True
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        assert self._exchange is not None
        try:
            self._exchange.feed(data)
        except ValueError as error:
            self.refuse(400, str(error))

    def _body_ended(self) -> None:
        self._has_ended = True
        if self._exchange is None:
            return
        if self._discarding:
            if self._is_answered:
                self._end()
            return
        if self._exchange.is_complete:
            self._exchange.complete()
        # else: it waits for room; who gives that calls `proceed`

    def proceed(self) -> None:
        """The exchange has got what it waited for: reading goes on, or its body is complete."""
        self.rates.begin_in()
        self._let_go()
        exchange = self._exchange
        if exchange is not None and self._has_ended and exchange.is_complete:
            exchange.complete()

    def wait(self) -> None:
        """The exchange has to wait for something: nothing more is read, so the client's socket fills up."""
        self.flow.hold()

    def _let_go(self) -> None:
        if self._last_words is None or self._is_ending:
            self.flow.let_go()

    def handle_websocket_upgrade(self) -> None:
        """The connection is somebody else's from now on."""
        self.open.discard(self)
        super().handle_websocket_upgrade()

    # ------------------------------------------------------------ bodies that go to Flower

    def _may_come(self, body: Body, nbytes: int) -> bool:
        body.nbytes += nbytes
        if body.nbytes > body.limit:
            self._cut(body)
            self._refuse_length(body.nbytes, body.limit)
            return False
        if body.share is None:
            body.unshared_bytes += nbytes
        if body.nbytes <= FREE_BYTES or body.cycle.response_complete:
            return True
        if body.share is None:
            self.flow.hold()
            if not body.is_asked_for:
                body.is_asked_for = True
                give_up = partial(self._give_up, body)
                then, fail = partial(self._admit, body), partial(self._refuse_sender, body)
                self.desk.admit(body.path, body.headers, self.client, give_up, then, fail)
        elif not body.share.grow(nbytes, self._let_go):
            self.flow.hold()
        return True

    def _admit(self, body: Body, share: Share) -> None:
        if body.cycle not in self._bodies:
            share.close()
            return
        body.share = share
        share.is_whole = not body.cycle.more_body
        if share.grow(body.unshared_bytes, self._let_go):
            self._let_go()

    def _refuse_sender(self, body: Body, error: BaseException) -> None:
        def answer(text: bytes, status: int, headers: Any) -> None:
            if body.cycle in self._bodies:
                self._cut(body)
                self.end_with(status, text, headers)

        self.desk.answer_error(error, body.path, body.headers, answer)

    def _give_up(self, body: Body) -> None:
        self._cut(body)
        self.end_with(503, "the server has no memory for this request now: try again")

    def _cut(self, body: Body) -> None:
        """Flower gets no more of a request: it is not begun, or hears that the client has gone."""
        cycle = body.cycle
        self._forget(cycle)
        self._is_nobodys = True
        waiting = [one for one in self.pipeline if one[0] is cycle]
        if waiting:
            self.pipeline.remove(waiting[0])
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:  # nothing can be said in the middle of an answer
                self.transport.close()

    def _forget(self, cycle: Any) -> None:
        body = self._bodies.pop(cycle, None)
        if body is not None and body.share is not None:
            body.share.close()

    def _cycle_ended(self, cycle: Any) -> None:
        self._forget(cycle)
        super().on_response_complete()
        self._say_last_words()

    # ------------------------------------------------------------ bytes out

    def answer(self, body: Any, status: int = 200, headers: Any = ()) -> None:
        """Answers the request: with bytes, or with parts of memory, which are held until they are written."""
        if self._exchange is None or self._is_answered or self.transport.is_closing():
            return
        self._is_answered = True
        parts = body if isinstance(body, tuple) else (body,)
        length = sum(map(len, parts))
        is_plain = status == 200 and not headers and not self._says_so
        head = self._usual_head(length) if is_plain else self._head(status, length, headers or (_KIND,), self._says_so)
        if status >= 400 and self.access_log:
            client = f"{self.client[0]}:{self.client[1]}" if self.client else ""
            self.access_logger.info('%s - "%s %s HTTP/%s" %d', client, "POST", self.path, "1.1", status)
        self.rates.begin_out(len(head) + length)
        if length <= READ_BYTES:
            self.transport.write(b"".join((head, *parts)))
            self._sent()
        else:
            self._sending.extend((head, *(memoryview(part) for part in parts)))
            self._send()

    def _usual_head(self, length: int) -> bytes:
        """Of an answer as most are: made once for all of a second, as uvicorn makes its own headers."""
        cls, default = type(self), self.server_state.default_headers
        if cls._usual[0] is not default:
            cls._usual = default, self._begun(200, (_KIND,), False)
        return b"%bcontent-length: %d\r\n\r\n" % (cls._usual[1], length)

    def _head(self, status: int, length: int, headers: Iterable[tuple[bytes, bytes]], closes: bool) -> bytes:
        return b"%bcontent-length: %d\r\n\r\n" % (self._begun(status, headers, closes), length)

    def _begun(self, status: int, headers: Iterable[tuple[bytes, bytes]], closes: bool) -> bytes:
        said = (*self.server_state.default_headers, *headers, *((_CLOSE,) if closes else ()))
        return b"".join((_names.STATUS_LINE[status], *(b"%b: %b\r\n" % one for one in said)))

    def _send(self) -> None:
        while self._sending and not self.flow.write_paused and not self.transport.is_closing():
            part = self._sending.popleft()
            if len(part) > WRITE_BYTES:
                self._sending.appendleft(part[WRITE_BYTES:])
                part = part[:WRITE_BYTES]
            self.transport.write(part if _COPIES else bytes(part))
            if not self._sending:
                self._is_private = False
                self._sent()

    def resume_writing(self) -> None:
        """The socket takes more."""
        super().resume_writing()
        self._send()

    def refuse(self, status: int, reason: str) -> None:
        """Answers with an error; the rest of the body is read and forgotten."""
        self.discard()
        self.answer(reason.encode(), status, (_PLAIN,))

    def discard(self) -> None:
        """What is still to come of the body is not wanted; an answer is due all the same."""
        if self._exchange is not None and not self._discarding:
            self._discarding = True
            self._exchange.drop()
            if self._left > MAX_DISCARD_BYTES:
                self._closes = self._says_so = True
            self._let_go()

    def _sent(self) -> None:
        """The answer is with the transport."""
        if self._has_ended or self._closes:
            self._end()

    def _end(self) -> None:
        self.busy.discard(self)
        self._exchange = None
        self._is_past_parser = False
        self._turn.response_complete = True
        if self._closes and not self._has_ended:
            self._linger()
        elif self._closes:
            self.transport.close()
        if self._is_ending:
            self.server_state.total_requests += 1
        else:
            super().on_response_complete()  # counts, and begins the next request or the keep-alive clock
        self._say_last_words()

    # ------------------------------------------------------------ ends

    def send_400_response(self, msg: str) -> None:
        """What comes is no request; behind an exchange its answer is first, since it is done."""
        if self._exchange is not None:
            self.end_with(400, msg)
        elif not self._is_over:
            super().send_400_response(msg)

    def _refuse_length(self, nbytes: int, limit: int) -> None:
        self.end_with(
            413,
            f"a body of {nbytes:,} bytes or more, this server takes {limit:,} here: for larger objects give it "
            "--lifl-max-object, or send smaller chunks",
        )

    def end_with(self, status: int, reason: str | bytes, headers: Iterable[tuple[bytes, bytes]] = (_PLAIN,)) -> None:
        """Answers the request that is coming in when all before it are answered; then the connection ends."""
        if self._awaits == "body" and not self._is_nobodys and self.cycle in self._bodies:
            self._cut(self._bodies[self.cycle])
        self._is_nobodys = True
        self._awaits = None
        if self._is_over:
            return
        body = reason if isinstance(reason, bytes) else reason.encode()
        self._last_words = self._head(status, len(body), headers, True) + body
        self.flow.hold()
        if self._exchange is not None:
            self._exchange.hurry()
        self._say_last_words()

    def _say_last_words(self) -> None:
        is_answered = self._exchange is None and (not self._bodies or self._is_free)
        if self._last_words is not None and is_answered and not self._is_ending and not self.transport.is_closing():
            self.transport.write(self._last_words)
            self._linger()

    def _linger(self) -> None:
        self._is_ending = True
        self.flow.let_go()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def give_up_if_stalled(self, now_s: float) -> None:
        """Ends a connection whose peer is too slow; called now and then for all of them."""
        if self.flow is None:
            return
        awaits = None if self.flow.is_paused or self._is_ending else self._awaits
        is_sending = bool(self._sending) or self.transport.get_write_buffer_size() > 0
        reason = self.rates.look(now_s, STALL_S, awaits, self._unsent() if is_sending else None)
        if reason is not None:
            self.drop(reason)

    def _unsent(self) -> int:
        """Bytes that the peer has not had, those in the kernel included: it takes them in large steps."""
        queued = bytearray(4)
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        here = sum(map(len, self._sending)) + self.transport.get_write_buffer_size()
        return int(here) + int.from_bytes(queued, sys.byteorder)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are still to be sent, which hold their blocks."""
        if self._is_private:
            return 0
        return sum(len(part) for part in self._sending if not isinstance(getattr(part, "obj", part), bytes))

    @property
    def private_bytes(self) -> int:
        """Bytes still to be sent that were copied out of the arena."""
        return sum(map(len, self._sending)) if self._is_private else 0

    def unpin(self) -> None:
        """Copies what is still to be sent out of the arena, whose blocks come free."""
        self._sending = deque(memoryview(bytes(part)) for part in self._sending)
        self._is_private = True

    def drop(self, reason: str) -> None:
        """Ends the connection at once, and says why, though not for each of many."""
        cls, now_s = type(self), time.monotonic()
        if now_s - cls._said_s < SAID_S:
            cls._unsaid += 1
        else:
            more = f" (and {cls._unsaid} others since the last such line)" if cls._unsaid else ""
            cls._said_s, cls._unsaid = now_s, 0
            peer = f"{self.client[0]}:{self.client[1]}" if self.client else "a peer"
            self.logger.warning("The connection of %s is dropped: %s%s", peer, reason, more)
        self._sending.clear()
        exchange, self._exchange = self._exchange, None
        self.busy.discard(self)
        if exchange is not None:
            exchange.drop()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives back what the exchange held."""
        exchange, self._exchange = self._exchange, None
        self._sending.clear()
        self.busy.discard(self)
        self.open.discard(self)
        if exchange is not None:
            exchange.drop()
        for cycle in list(self._bodies):
            self._forget(cycle)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends: an exchange that is going on is finished first, one that is held open at once."""
        if self._exchange is None:
            super().shutdown()
        else:
            self._closes = True
            self._exchange.hurry()


def protocol_of(desk: Desk) -> type[GatewayProtocol]:
    """The protocol class for one server, whose requests go to `desk`."""
    return type("Protocol", (GatewayProtocol,), {"desk": desk, "open": set(), "busy": set()})
