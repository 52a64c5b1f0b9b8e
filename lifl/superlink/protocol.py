"""uvicorn's HTTP protocol, with a way past ASGI for the routes of the data plane.

The parser, keep-alive, TLS, limits and everything else are uvicorn's. Of a request that a :class:`Desk` takes, the
head goes to it when it has come, the body to whatever the desk gives room in, and the answer from wherever it lies.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol

import httptools

from lifl.superlink import flower

_names = flower.part("gateway")

READ_BYTES = 2**16
WRITE_BYTES = 2**17
"""An answer is written in such pieces, so that asyncio, which copies what a socket does not take, copies little."""

STALL_S = 30.0
"""A body of which nothing comes for so long is given up."""

MAX_DISCARD_BYTES = 2**26
"""More than this of a refused body is not read: the connection ends."""

_scratch = memoryview(bytearray(READ_BYTES))  # one loop reads at a time, and what is read is used at once


class Exchange(Protocol):
    """One request and its answer, as the desk sees it."""

    @property
    def is_aimed(self) -> bool:
        """True if the body may be written to :meth:`room`, False if it has to be fed."""

    @property
    def is_complete(self) -> bool:
        """True when the body has come whole."""

    def feed(self, data: bytes) -> None:
        """Takes bytes of the body."""

    def room(self) -> Any:
        """Where the next bytes of the body go."""

    def advance(self, nbytes: int) -> None:
        """So many have been written there."""

    def complete(self) -> None:
        """The body is complete: the answer is due, now or later, by :meth:`GatewayProtocol.answer`."""

    def drop(self) -> None:
        """The connection is gone, or the body is given up."""

    def hurry(self) -> None:
        """The server ends: what is held open is to be answered now."""


class Desk(Protocol):
    """Who takes requests past ASGI."""

    def begin(self, protocol: GatewayProtocol, path: bytes, headers: list[tuple[bytes, bytes]], length: int) -> Any:
        """An :class:`Exchange` for a POST request of which the head has come, or None to leave it to Flower."""


class GatewayProtocol(_names.HttpProtocol, asyncio.BufferedProtocol):  # type: ignore[misc,name-defined]
    """A connection. Made by a subclass of one server's own, see :func:`protocol_of`.

    Attributes
    ----------
    desk : Desk
    busy : set
        The connections that have an exchange going on.
    """

    desk: Desk
    busy: set[GatewayProtocol]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange: Exchange | None = None
        self._left = 0  # bytes of the exchange's body that have not come
        self._is_ours = False  # the message that the parser is in
        self._has_ended = False  # all of the exchange's body has come
        self._is_past_parser = False
        self._is_answered = False
        self._discarding = False
        self._sending: deque[Any] = deque()
        self._closes = False
        self._is_waiting = False
        self._last_s = 0.0

    # ------------------------------------------------------------ bytes in

    def get_buffer(self, sizehint: int) -> Any:
        """Where the socket writes next."""
        if self._is_past_parser:
            if self._discarding:
                return _scratch[: self._left]
            assert self._exchange is not None
            if self._exchange.is_aimed:
                return self._exchange.room()[: self._left]
            return _scratch[: self._left]
        return _scratch

    def buffer_updated(self, nbytes: int) -> None:
        """So much has been written there."""
        if not self._is_past_parser:
            self.data_received(bytes(_scratch[:nbytes]))
            if self._exchange is not None and self._left and not self.transport.is_closing():
                self._is_past_parser = True  # the parser would copy
            return
        self._unset_keepalive_if_required()
        self._last_s = time.monotonic()
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
            self.parser = httptools.HttpRequestParser(self)  # which has not seen the end of this body
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._body_ended()

    # ------------------------------------------------------------ the parser's callbacks

    def on_headers_complete(self) -> None:
        """Gives the request to the desk if it wants it."""
        if self._exchange is not None:  # pipelined behind one that is not answered: nobody does that with POST
            self.transport.close()
            return
        if self._is_free and self.parser.get_method() == b"POST" and (length := self._length()) is not None:
            exchange = self.desk.begin(self, self.url, self.headers, length)
            if exchange is not None:
                self._exchange, self._left, self._is_ours = exchange, length, True
                self._has_ended = self._is_answered = self._discarding = False
                self._closes = self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive()
                self._last_s = time.monotonic()
                self.busy.add(self)
                if self.expect_100_continue:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
        super().on_headers_complete()

    @property
    def _is_free(self) -> bool:
        """True if the client has had all of the last answer that came through ASGI.

        Flower's middlewares end an answer with an empty piece, a little after its last byte: a quick client's next
        request comes in between. uvicorn would take it for pipelined, and so the one after it, and so on.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return True
        is_whole = cycle.chunked_encoding is False and cycle.expected_content_length == 0
        return bool(cycle.response_started and is_whole and cycle.keep_alive)

    def on_response_complete(self) -> None:
        """An answer has been sent: while an exchange goes on, the one before it, which ended with an empty piece."""
        if self._exchange is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    def _length(self) -> int | None:
        """The declared length of the body, if there is one that can be relied on."""
        found = None
        for name, value in self.headers:
            if name == b"transfer-encoding" or name == b"content-encoding":
                return None
            if name == b"content-length" and value.isdigit():
                found = int(value)
        return found

    def on_body(self, body: bytes) -> None:
        """Feeds the exchange."""
        if not self._is_ours:
            super().on_body(body)
            return
        self._left -= len(body)
        if self._exchange is not None and not self._discarding:
            self._feed(body)

    def on_message_complete(self) -> None:
        """All of the body has come through the parser."""
        if self._is_ours:
            self._is_ours = False
            self._body_ended()
        else:
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
        self._is_waiting, self._last_s = False, time.monotonic()
        self.flow.resume_reading()
        exchange = self._exchange
        if exchange is not None and self._has_ended and exchange.is_complete:
            exchange.complete()

    def wait(self) -> None:
        """The exchange has to wait for something: nothing more is read, so the client's socket fills up."""
        self._is_waiting = True
        self.flow.pause_reading()

    # ------------------------------------------------------------ bytes out

    def answer(self, body: Any, status: int = 200, headers: Any = ()) -> None:
        """Answers the request: with bytes, or with parts of memory, which are held until they are written."""
        if self._exchange is None or self._is_answered or self.transport.is_closing():
            return
        self._is_answered = True
        head = [_names.STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            head += [name, b": ", value, b"\r\n"]
        for name, value in headers or ((b"content-type", _names.MEDIA_TYPE.encode()),):
            head += [name, b": ", value, b"\r\n"]
        if self._closes:
            head.append(b"connection: close\r\n")
        parts = body if isinstance(body, tuple) else (body,)
        length = sum(map(len, parts))
        head.append(b"content-length: %d\r\n\r\n" % length)
        if status >= 400 and self.access_log:
            client = f"{self.client[0]}:{self.client[1]}" if self.client else ""
            self.access_logger.info('%s - "%s %s HTTP/%s" %d', client, "POST", self.url.decode("ascii"), "1.1", status)
        if length <= READ_BYTES:
            self.transport.write(b"".join((*head, *parts)))
            self._sent()
        else:
            self._sending.extend((b"".join(head), *(memoryview(part) for part in parts)))
            self._send()

    def _send(self) -> None:
        while self._sending and not self.flow.write_paused and not self.transport.is_closing():
            part = self._sending.popleft()
            if len(part) > WRITE_BYTES:
                self._sending.appendleft(part[WRITE_BYTES:])
                part = part[:WRITE_BYTES]
            self.transport.write(part)
            if not self._sending:
                self._sent()

    def resume_writing(self) -> None:
        """The socket takes more."""
        super().resume_writing()
        self._send()

    def refuse(self, status: int, reason: str) -> None:
        """Answers with an error; the rest of the body is read and forgotten."""
        self.discard()
        self.answer(reason.encode(), status, ((b"content-type", b"text/plain; charset=utf-8"),))

    def discard(self) -> None:
        """What is still to come of the body is not wanted; an answer is due all the same."""
        if self._exchange is not None and not self._discarding:
            self._discarding = True
            self._exchange.drop()
            if self._left > MAX_DISCARD_BYTES:
                self._closes = True
            self.flow.resume_reading()

    def _sent(self) -> None:
        """The answer is with the transport."""
        if self._has_ended or self._closes:
            self._end()

    def _end(self) -> None:
        self.busy.discard(self)
        self._exchange = None
        self._is_past_parser = False
        if self._closes:
            self.transport.close()
        self.on_response_complete()  # uvicorn's: counts, and starts the keep-alive clock

    # ------------------------------------------------------------ ends

    def give_up_if_stalled(self, now_s: float) -> None:
        """Ends a connection of which a body has not gone on for too long; called now and then for all of them."""
        if self._exchange is None or self._has_ended or self._is_waiting or now_s - self._last_s < STALL_S:
            return
        self.logger.warning("An upload of which nothing came for %g s is given up", STALL_S)
        self._exchange.drop()
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives back what the exchange held."""
        exchange, self._exchange = self._exchange, None
        self._sending.clear()
        self.busy.discard(self)
        if exchange is not None:
            exchange.drop()
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
    return type("Protocol", (GatewayProtocol,), {"desk": desk, "busy": set()})
