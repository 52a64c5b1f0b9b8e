"""uvicorn's HTTP protocol, with a way past ASGI for the routes of the data plane.

The parser, keep-alive, TLS and everything else are uvicorn's. A request that the ``Router`` takes becomes an exchange:
it gets the head, then the body, which the socket writes into memory that the exchange gives, and its answer is sent
from where the bytes lie. A request behind one that is not answered goes to uvicorn, which answers in order.

Every body has a bound, and a peer has a bounded time for a head, for a body and for taking an answer.

A connection has two states, since a request may come in while the answer to another is due: ``State`` for the
direction in, ``Progress`` for the exchange; see ``lifl.superlink.http.connection``.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import httptools

from lifl.superlink import flower
from lifl.superlink.http.allowance import Share
from lifl.superlink.http.connection import (
    ALLOWED,
    AWAITED,
    CLOSE,
    CLOSED,
    DIRECT_BODY,
    DISCARDING,
    EXCHANGE_BODY,
    FLOWER_BODY,
    HEAD,
    IDLE,
    LAST_ANSWER,
    LINGERING,
    OVER,
    PLAIN,
    RECEIVING,
    SENDING,
    UPGRADING,
    WHEN_ANSWERED,
    WHEN_UNWANTED,
    WORKING,
    DropLog,
    Flow,
    FlowerBody,
    Heads,
    Outgoing,
    State,
    Turn,
    path_of,
    queued_bytes,
)
from lifl.superlink.http.exchange import Exchange, Router
from lifl.superlink.http.rates import Rates

_names = flower.part("gateway")

READ_BYTES = 2**16
STALL_S = 10.0
"""Window over which a peer has to be faster than ``MIN_RATE``, in either direction; also the time for a head."""

LINGER_S = 1.0
"""Time for which a connection is still read after its last answer, if its request has not come whole.

If the socket were closed with bytes unread, the kernel would reset the connection, and the answer might be lost.
"""

FREE_BYTES = 2**16
"""Bytes of a body that anybody may send; more needs a share of the memory for bodies."""

MAX_DISCARD_BYTES = 2**26
"""Longest rest of a refused body that is read; for a longer one the connection ends."""

MAX_HEAD_BYTES = 2**16
MAX_PIPELINED = 64

_COPIES = sys.version_info < (3, 12)
"""True if asyncio copies the bytes that a socket does not take. Later versions keep a view: it would pin the arena."""

# Shared by all connections: the event loop reads one socket at a time, and uses the bytes before it reads the next.
_scratch = memoryview(bytearray(READ_BYTES))


class GatewayProtocol(_names.HttpProtocol, asyncio.BufferedProtocol):  # type: ignore[misc,name-defined]
    """A connection. Each server makes a subclass of its own, see :func:`protocol_of`. Belongs to the event loop.

    Attributes
    ----------
    router : Router
    open : set
        All connections.
    busy : set
        The connections that have an exchange.
    drop_log : DropLog
    heads : Heads
        Of all answers.
    path : str
        The path of the exchange's request.
    rates : Rates
    """

    router: Router
    open: set[GatewayProtocol]
    busy: set[GatewayProtocol]
    drop_log: DropLog
    heads: Heads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = IDLE
        self._turn = Turn()
        self.path = ""
        self._left = 0  # bytes of the exchange's body that have not come
        self._extra_bytes = 0  # bytes of this request that are not its body
        self._outgoing = Outgoing()
        self.cycle: Any = None  # uvicorn's, or the turn: the last request that has begun
        self._bodies: dict[Any, FlowerBody] = {}  # by cycle, until it is answered
        self._last_answer = b""
        self.rates = Rates(time.monotonic())

    def _enter(self, state: State) -> None:
        """Changes the state; nothing else does."""
        if state not in ALLOWED[self._state]:
            raise RuntimeError(f"a connection cannot go from {self._state.name} to {state.name}")
        self._state = state

    def connection_made(self, transport: Any) -> None:
        """Begins; the flow control is replaced by one that exchanges can hold too."""
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self.open.add(self)

    # ------------------------------------------------------------ bytes in

    def get_buffer(self, sizehint: int) -> Any:
        """Memory for the next bytes from the socket."""
        if self._state is not DIRECT_BODY:
            return _scratch
        turn = self._turn
        if turn.progress is RECEIVING and turn.exchange.is_aimed:
            return turn.exchange.room()[: self._left]
        return _scratch[: self._left]  # not more: the bytes behind the body are the parser's

    def buffer_updated(self, nbytes: int) -> None:
        """Takes bytes that have been written to the buffer."""
        if self._state is DIRECT_BODY:
            self._take_direct(nbytes)
            return
        if self._state is LINGERING or self._state is CLOSED:
            return
        self.rates.came_bytes += nbytes
        self._extra_bytes += nbytes
        self.data_received(bytes(_scratch[:nbytes]))
        if self._state is EXCHANGE_BODY and self._left and not self.transport.is_closing():
            self._enter(DIRECT_BODY)
        elif self._state in AWAITED and self._extra_bytes > MAX_HEAD_BYTES + READ_BYTES:
            self.end_with(431, f"a request's head may have {MAX_HEAD_BYTES:,} bytes")

    def _take_direct(self, nbytes: int) -> None:
        self.rates.came_bytes += nbytes
        self._unset_keepalive_if_required()
        self._left -= nbytes
        turn = self._turn
        if turn.progress is RECEIVING:
            if turn.exchange.is_aimed:
                turn.exchange.advance(nbytes)
            else:
                self._feed(bytes(_scratch[:nbytes]))
        if not self._left and self._state is DIRECT_BODY:
            self._enter(IDLE)
            # A new parser, because this one has not seen the end of the body.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._body_ended()

    # ------------------------------------------------------------ the parser's callbacks

    @property
    def _is_over(self) -> bool:
        """True if no request is taken any more. The transport is asked too, since uvicorn may have closed it."""
        return self._state >= LAST_ANSWER or self.transport.is_closing()

    def on_message_begin(self) -> None:
        """Begins a request: its first byte has come."""
        super().on_message_begin()
        if self._state is IDLE:
            self._enter(HEAD)
            self._extra_bytes = 0
            self.rates.begin_in()

    def on_headers_complete(self) -> None:
        """Gives the request to the router if it wants it, else to Flower."""
        if self._is_over:
            return
        path, headers = path_of(self.url), dict(self.headers)
        length = headers.get(b"content-length", b"").strip()
        declared = int(length) if length.isdigit() else 0
        is_plain = length and b"transfer-encoding" not in headers and self._is_identity(headers)
        if is_plain and self._is_free and self.parser.get_method() == b"POST" and not self.parser.should_upgrade():
            if declared > self.router.max_body_bytes:
                self._refuse_length(declared, self.router.max_body_bytes)
                return
            exchange = self.router.begin(self, self.url, self.headers, declared)
            if exchange is not None:
                self._begin(exchange, path, declared)
                return
        limit = self.router.limit_of(path)
        if declared > limit:
            self._refuse_length(declared, limit)
        elif len(self.pipeline) >= MAX_PIPELINED:
            self.end_with(503, f"more than {MAX_PIPELINED} requests that wait for answers")
        else:
            self._leave_to_flower(path, limit)

    def _begin(self, exchange: Exchange, path: str, length: int) -> None:
        if self.cycle in self._bodies:
            self._overtake()
        self._enter(EXCHANGE_BODY)
        turn = self.cycle = self._turn
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        turn.begin(exchange, keep_alive=keep_alive, announces_close=CLOSE in self.headers)
        self.path, self._left = path, length
        self.busy.add(self)
        exchange.begin()
        if self.expect_100_continue and (turn.progress is RECEIVING or turn.progress is DISCARDING):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _leave_to_flower(self, path: str, limit: int) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is before:
            self._enter(UPGRADING)
            return
        self._enter(FLOWER_BODY)
        self._bodies[self.cycle] = FlowerBody(self.cycle, path, self.headers, limit)
        self.cycle.on_response = partial(self._cycle_ended, self.cycle)
        if self._turn.progress is not OVER:
            self._turn.exchange.hurry()

    def _overtake(self) -> None:
        """Takes the last cycle for answered, since its answer is whole; the end that it reports later is ignored."""
        self._forget(self.cycle)
        self.cycle.on_response = lambda: None
        self.server_state.total_requests += 1

    @property
    def _is_free(self) -> bool:
        """True if the client has had all of the last answer.

        Flower's middlewares end an answer with an empty piece, a little after its last byte: a quick client's next
        request comes in between. uvicorn would take it for pipelined, and so the one after it, and so on.
        """
        if self._turn.progress is not OVER:
            return False
        cycle = self.cycle
        if cycle is None or cycle is self._turn or cycle.response_complete:
            return True
        is_whole = cycle.chunked_encoding is False and cycle.expected_content_length == 0
        return bool(cycle.response_started and is_whole and cycle.keep_alive)

    def _is_identity(self, headers: Mapping[bytes, bytes]) -> bool:
        """True if the body is sent without an encoding."""
        if b"content-encoding" not in headers:
            return True
        encodings = [value for name, value in self.headers if name == b"content-encoding"]
        return all(encoding.strip().lower() == b"identity" for encoding in encodings)

    def on_body(self, data: bytes) -> None:
        """Gives bytes of a body to the exchange, or counts them and gives them to Flower."""
        # Chunks have framing, which is allowed for: a chunk of one byte has five bytes around it.
        self._extra_bytes -= min(17 * len(data), self._extra_bytes)
        if self._state is EXCHANGE_BODY:
            self._left -= len(data)
            if self._turn.progress is RECEIVING:
                self._feed(data)
        elif self._state is FLOWER_BODY and not self._is_over:
            body = self._bodies.get(self.cycle)
            if body is None or self._may_come(body, len(data)):
                super().on_body(data)

    def on_message_complete(self) -> None:
        """Ends a request: all of it has come through the parser."""
        if self._state is EXCHANGE_BODY:
            self._enter(IDLE)
            self._body_ended()
        elif self._state is FLOWER_BODY:
            self._enter(IDLE)
            body = self._bodies.get(self.cycle)
            if body is not None and body.share is not None:
                body.share.is_whole = True
            super().on_message_complete()
        elif self._state is UPGRADING:
            self._enter(IDLE)

    def _feed(self, data: bytes) -> None:
        try:
            self._turn.exchange.feed(data)
        except ValueError as error:
            self.refuse(400, str(error))
        except Exception as error:  # raised in the parser, it would become a 400, with which no exchange can end
            self.logger.error("A body for %s could not be taken", self.path, exc_info=error)
            self.refuse(500, "the server could not take this body")

    def _body_ended(self) -> None:
        turn = self._turn
        turn.note_whole()
        if turn.progress is WORKING:
            if turn.exchange.is_complete:  # else the body waits for room, and `proceed` is called when it has some
                turn.exchange.complete()
        elif turn.progress is SENDING and not self._outgoing:
            self._end()

    def proceed(self) -> None:
        """Goes on with an exchange that has got what it waited for: reading, or the work if its body is complete."""
        self.rates.begin_in()
        self._let_go()
        turn = self._turn
        if turn.progress is WORKING and turn.exchange.is_complete:
            turn.exchange.complete()

    def wait(self) -> None:
        """Stops reading while the exchange waits for something, so that the client's socket fills up."""
        self.flow.hold()

    def _let_go(self) -> None:
        if self._state < LAST_ANSWER:
            self.flow.let_go()

    def handle_websocket_upgrade(self) -> None:
        """Leaves the connection to uvicorn's WebSocket protocol."""
        self._enter(CLOSED)
        self.open.discard(self)
        super().handle_websocket_upgrade()

    # ------------------------------------------------------------ bodies that go to Flower

    def _may_come(self, body: FlowerBody, nbytes: int) -> bool:
        """Counts bytes of a body; False if the body has become too long, and has been refused."""
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
                self.router.admit(body.path, body.headers, self.client, give_up, then, fail)
        elif not body.share.grow(nbytes, self._let_go):
            self.flow.hold()
        return True

    def _admit(self, body: FlowerBody, share: Share) -> None:
        if body.cycle not in self._bodies:
            share.close()
            return
        body.share = share
        share.is_whole = not body.cycle.more_body
        if share.grow(body.unshared_bytes, self._let_go):
            self._let_go()

    def _refuse_sender(self, body: FlowerBody, error: BaseException) -> None:
        def answer(text: bytes, status: int, headers: Any) -> None:
            if body.cycle in self._bodies:
                self._refuse_body(body, status, text, headers)

        self.router.answer_error(error, body.path, body.headers, answer)

    def _give_up(self, body: FlowerBody) -> None:
        self._refuse_body(body, 503, "the server has no memory for this request now: try again")

    def _refuse_body(
        self, body: FlowerBody, status: int, reason: str | bytes, headers: Iterable[tuple[bytes, bytes]] = (PLAIN,)
    ) -> None:
        """Answers a request whose body is not wanted, which is the connection's last: none behind it is answered."""
        self._cut(body)
        if self._state is LAST_ANSWER:  # that of a request behind it, which may have been waiting for this one
            self._last_answer = self.heads.last(self.server_state.default_headers, status, reason, headers)
            self._send_last_answer()
        else:
            self.end_with(status, reason, headers)

    def _cut(self, body: FlowerBody) -> None:
        """Takes a request and all behind it from Flower: they are not begun, or Flower learns that the client has gone.

        A cycle that is disconnected reports no end, so that uvicorn would never begin those behind it.
        """
        cycle = body.cycle
        self._forget(cycle)
        while self.pipeline:
            last, _ = self.pipeline.popleft()  # the newest request stands first
            self._forget(last)
            if last is cycle:
                return
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started:  # an error cannot be sent in the middle of an answer
            self.transport.close()

    def _forget(self, cycle: Any) -> None:
        body = self._bodies.pop(cycle, None)
        if body is not None and body.share is not None:
            body.share.close()
        # The body may have held reading while it waited for its share. Another body that waits holds it again.
        self._let_go()

    def _cycle_ended(self, cycle: Any) -> None:
        self._forget(cycle)
        super().on_response_complete()
        self._send_last_answer()

    # ------------------------------------------------------------ bytes out

    def answer(self, body: Any, status: int = 200, headers: Any = ()) -> None:
        """Answers the request, if an answer is due: with bytes, or with buffers that are held until they are sent."""
        turn = self._turn
        assert turn.progress is not RECEIVING, "a request is complete or dropped before it is answered"
        if turn.progress not in WHEN_ANSWERED or self.transport.is_closing():
            return
        turn.note_answered()
        parts = body if isinstance(body, tuple) else (body,)
        length = sum(map(len, parts))
        closes = turn.announces_close
        default = self.server_state.default_headers
        is_usual = status == 200 and not headers and not closes
        head = (
            self.heads.usual(default, length) if is_usual else self.heads.of(default, status, length, headers, closes)
        )
        if status >= 400 and self.access_log:
            client = f"{self.client[0]}:{self.client[1]}" if self.client else ""
            self.access_logger.info('%s - "%s %s HTTP/%s" %d', client, "POST", self.path, "1.1", status)
        self.rates.begin_out(len(head) + length)
        if length <= READ_BYTES:
            self.transport.write(b"".join((head, *parts)))
            self._answer_sent()
        else:
            self._outgoing.add((head, *(memoryview(part) for part in parts)))
            self._send()

    def _send(self) -> None:
        while self._outgoing and not self.flow.write_paused and not self.transport.is_closing():
            piece = self._outgoing.take()
            self.transport.write(piece if _COPIES else bytes(piece))
            if not self._outgoing:
                self._answer_sent()

    def resume_writing(self) -> None:
        """Goes on sending: the socket takes more."""
        super().resume_writing()
        self._send()

    def refuse(self, status: int, reason: str) -> None:
        """Answers with an error; the rest of the body is read and forgotten."""
        self.discard()
        self.answer(reason.encode(), status, (PLAIN,))

    def discard(self) -> None:
        """Drops the exchange: the rest of its body is not wanted. An answer is still due."""
        turn = self._turn
        if turn.progress in WHEN_UNWANTED:
            turn.note_unwanted()
            turn.exchange.drop()
            if self._left > MAX_DISCARD_BYTES:
                turn.keep_alive = False
                turn.announces_close = True
            self._let_go()

    def _answer_sent(self) -> None:
        """Ends the turn if nothing more is to come: the transport has all of the answer."""
        if self._turn.progress is SENDING or not self._turn.keep_alive:
            self._end()

    def _end(self) -> None:
        turn = self._turn
        is_whole = turn.progress is SENDING
        turn.end()
        self.busy.discard(self)
        if turn.keep_alive:
            super().on_response_complete()  # counts, and begins the next request or the keep-alive clock
        elif is_whole:
            self.transport.close()
            super().on_response_complete()
        else:
            self._linger()
            self.server_state.total_requests += 1
        if self._state is LAST_ANSWER:
            self._send_last_answer()

    # ------------------------------------------------------------ ends

    def send_400_response(self, msg: str) -> None:
        """Answers that the bytes are no request; if an exchange is going on, its answer comes first."""
        if self._turn.progress is not OVER:
            self.end_with(400, msg)
        elif not self._is_over:
            super().send_400_response(msg)

    def _refuse_length(self, nbytes: int, limit: int) -> None:
        self.end_with(
            413,
            f"a body of {nbytes:,} bytes or more, this server takes {limit:,} here: for larger objects give it "
            "--lifl-max-object, or send smaller chunks",
        )

    def end_with(self, status: int, reason: str | bytes, headers: Iterable[tuple[bytes, bytes]] = (PLAIN,)) -> None:
        """Answers the request that is coming in when all before it are answered; then the connection ends."""
        if self._state is FLOWER_BODY and self.cycle in self._bodies:
            self._cut(self._bodies[self.cycle])
        if self._is_over:
            return
        self._enter(LAST_ANSWER)
        self._last_answer = self.heads.last(self.server_state.default_headers, status, reason, headers)
        self.flow.hold()
        if self._turn.progress is not OVER:
            self._turn.exchange.hurry()
        self._send_last_answer()

    def _send_last_answer(self) -> None:
        if self._state is not LAST_ANSWER or self.transport.is_closing() or self._turn.progress is not OVER:
            return
        if not self._bodies or self._is_free:
            self.transport.write(self._last_answer)
            self._linger()

    def _linger(self) -> None:
        self._enter(LINGERING)
        self.flow.let_go()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def give_up_if_stalled(self, now_s: float) -> None:
        """Ends a connection whose peer is too slow; called now and then for all of them."""
        if self.flow is None:
            return
        awaited = None if self.flow.is_paused else AWAITED.get(self._state)
        is_sending = self._outgoing or self.transport.get_write_buffer_size() > 0
        unsent_bytes = self._outgoing.nbytes + queued_bytes(self.transport) if is_sending else None
        reason = self.rates.look(now_s, STALL_S, awaited, unsent_bytes)
        if reason is not None:
            self.drop(reason)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that are still to be sent, and hold their blocks."""
        return self._outgoing.pinned_bytes

    @property
    def private_bytes(self) -> int:
        """Bytes still to be sent that were copied out of the arena."""
        return self._outgoing.nbytes if self._outgoing.is_private else 0

    def unpin(self) -> None:
        """Copies the bytes that are still to be sent out of the arena, whose blocks come free."""
        self._outgoing.unpin()

    def drop(self, reason: str) -> None:
        """Ends the connection at once, and logs why, though not for each of many."""
        self.drop_log.log(self.logger, self.client, reason)
        self._drop_exchange()
        self.transport.abort()

    def _drop_exchange(self) -> None:
        self._enter(CLOSED)
        self._outgoing.clear()
        self.busy.discard(self)
        exchange = self._turn.end()
        if exchange is not None:
            exchange.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives back everything that the exchange and the bodies hold."""
        self._drop_exchange()
        self.open.discard(self)
        for cycle in list(self._bodies):
            self._forget(cycle)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Ends the connection with the server: an exchange is finished first, and one that is held open at once."""
        if self._turn.progress is OVER:
            super().shutdown()
        else:
            self._turn.keep_alive = False
            self._turn.exchange.hurry()


def protocol_of(router: Router) -> type[GatewayProtocol]:
    """The protocol class for one server, whose requests go to `router`."""
    own = {"router": router, "open": set(), "busy": set(), "drop_log": DropLog(), "heads": Heads()}
    return type("Protocol", (GatewayProtocol,), own)
