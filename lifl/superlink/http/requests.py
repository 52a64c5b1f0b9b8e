"""The requests of the data plane, one class each: checked by the head, answered from where the bytes lie.

Each is the protocol's ``Exchange``. Flower's own handlers decide about messages and sessions; only the bytes of objects
go another way. Everything belongs to the event loop, except the `work` that is handed to ``Server.run`` or
``Server.run_aside``, which may be done in a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

from lifl.superlink import flower
from lifl.superlink.http.allowance import Share
from lifl.superlink.http.body import count_objects
from lifl.superlink.http.checks import Checks
from lifl.superlink.http.long_poll import LongPoll, LongPolls
from lifl.superlink.http.protocol import FREE_BYTES, GatewayProtocol
from lifl.superlink.http.targets import Sink
from lifl.superlink.http.upload import Target, Upload
from lifl.superlink.store.store import MAX_OBJECTS, ArenaStore, DurableStore

_names = flower.part("gateway")

MAX_REQUEST_BYTES = 2**16
"""Longest request without an object or a tree: a node, a run and an id."""

MAX_TREE_BYTES = 2**25
"""Longest request that announces a message: the ids of its objects, 70 to 140 bytes each."""

LONG_TREE_BYTES = 2**20
"""A longer announcement is counted before it is parsed: parsing may take 25 times its length for a moment."""

ID_BYTES, MAX_OTHER_FIELDS = 64, 1000
"""Fewest bytes of an object in an announcement, those of its id, and the most fields beside objects."""

_STORED = {flag: _names.PushObjectResponse(stored=flag).SerializeToString() for flag in (True, False)}


class Server(Protocol):
    """The gateway, as a request sees it."""

    store: ArenaStore | DurableStore
    checks: Checks
    long_polls: LongPolls
    is_quick: bool
    uploads: int
    received_bytes: int
    copied_bytes: int
    sent_bytes: int

    @property
    def state(self) -> Any:
        """Flower's LinkState."""

    def run(self, work: Callable[[], Any], then: Callable[[Any], None], fail: Callable[[BaseException], None]) -> None:
        """Does `work`, which asks the LinkState; calls `then` or `fail` in the loop."""

    def run_aside(
        self, work: Callable[[], Any], then: Callable[[Any], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Does `work`, which takes long, in a thread; calls `then` or `fail` in the loop."""

    def target_for(self, request: Any, nbytes: int, *, is_trusted: bool) -> Target:
        """The target of a wanted object; raises :class:`BlockingIOError` if there is no room now.

        ``MemoryError`` if its sender sends too much at once, ``ValueError`` if its reply has grown too large.
        """

    def spool_for(self, request: Any, nbytes: int, *, is_trusted: bool, is_beside: bool = False) -> Target:
        """A target beside the arena for an object; ``MemoryError`` if its sender sends too much at once."""

    def is_incoming(self, node_id: int) -> bool:
        """True if a request for work should wait for a message that is on its way."""

    def session_of(self, request: Any) -> str | None:
        """The session of a push; None if the object is not the node's to push."""

    def check_size(self, nbytes: int) -> str | None:
        """The reason why an object of this size is refused, or None."""

    def wait_for_room(self, ask: Callable[[], bool]) -> None:
        """Has `ask` called, in turn with others, until it returns True: there was room, or none is needed."""

    def admit(
        self,
        path: str,
        headers: Any,
        client: Any,
        give_up: Callable[[], None],
        then: Callable[[Share], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Identifies the sender of a body of more than ``FREE_BYTES``; see ``Router``."""


class DataRequest:
    """A request to one of the routes below; the protocol's ``Exchange``.

    Attributes
    ----------
    length : int
        Bytes of the body.
    is_gone : bool
        True when it has failed, was refused, or its connection is gone: it is not answered any more.
    """

    is_aimed = False

    def __init__(self, gateway: Server, protocol: GatewayProtocol, headers: Any, length: int) -> None:
        self.gateway = gateway
        self.protocol = protocol
        self.headers = headers
        self.length = length
        self.is_gone = False

    @property
    def is_welcome(self) -> bool:
        """False if the request is to be left to Flower."""
        return True

    def begin(self) -> None:
        """Begins; the protocol has taken the request."""

    def fail(self, error: BaseException) -> None:
        """Answers with Flower's answer to an error of its handlers and middlewares."""
        if self.is_gone:
            return
        self.protocol.discard()
        self.is_gone = True
        self.gateway.checks.answer_error(error, self.protocol.path, self.headers, self.protocol.answer)

    def drop(self) -> None:
        """Gives the request up."""
        self.is_gone = True

    def hurry(self) -> None:
        """Does nothing, unless the request can be held open."""

    def room(self) -> Any:
        """Memory for the next bytes; called only of a request that ``is_aimed``."""

    def advance(self, nbytes: int) -> None:
        """Takes bytes that were written to :meth:`room`; called only of a request that ``is_aimed``."""


class Unary(DataRequest):
    """A request without an object: its body is collected, then checked and handed to Flower's handler.

    Attributes
    ----------
    kind : type
        The protobuf message.
    max_bytes : int
        A longer body is refused.
    is_long : bool
        True if the work takes long, and is always done in a thread.
    request : kind or None
        The parsed body.
    """

    kind: Any
    max_bytes = MAX_REQUEST_BYTES
    is_long = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._body = bytearray()
        self._share: Share | None = None
        self._is_asked_for = False  # the share
        self._waits = False  # for the share, or for more memory
        self.request: Any = None

    @property
    def is_complete(self) -> bool:
        """True when the body has come whole, and its memory has been granted."""
        return len(self._body) == self.length and not self._waits

    def begin(self) -> None:
        """Refuses a request whose declared length is too large."""
        if self.length > self.max_bytes:
            self.protocol.refuse(413, f"a request of {self.length:,} bytes, which may have {self.max_bytes:,}")

    def feed(self, data: bytes) -> None:
        """Takes more of the body. Beyond ``FREE_BYTES`` the sender has to be known, and needs a share of the memory."""
        self._body += data
        if len(self._body) <= FREE_BYTES:
            return
        if self._share is not None:
            self._grow(len(data))
        elif not self._is_asked_for:
            self._is_asked_for = True
            self._wait()
            self.gateway.admit(
                self.protocol.path, self.headers, self.protocol.client, self._give_up, self._admit, self.fail
            )

    def _admit(self, share: Share) -> None:
        if self.is_gone:
            share.close()
            return
        self._share = share
        self._grow(len(self._body))

    def _grow(self, nbytes: int) -> None:
        assert self._share is not None
        if self._share.grow(nbytes, self._proceed):
            self._proceed()
        else:
            self._wait()

    def _wait(self) -> None:
        self._waits = True
        self.protocol.wait()

    def _proceed(self) -> None:
        if self._waits:
            self._waits = False
            self.protocol.proceed()

    def _give_up(self) -> None:
        self.protocol.refuse(503, "the server has no memory for this request now: try again")

    def complete(self) -> None:
        """Parses the request and has its work done."""
        if self._share is not None:
            self._share.is_whole = True
        body, self._body = bytes(self._body), bytearray()

        def work() -> Any:
            self.request = self.parse(body)
            return self.work()

        run = self.gateway.run_aside if self.is_long else self.gateway.run
        run(work, self.then, self.fail)

    def parse(self, body: bytes) -> Any:
        """The request in a body; raises Flower's error if the body is no such message."""
        try:
            return self.kind.FromString(body)
        except Exception as error:
            about = f"Invalid payload: {error!r}"
            raise _names.FlowerError(_names.ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, about) from None

    def work(self) -> Any:
        """Checks and handles the request. Any thread."""
        self.gateway.checks.fleet(self.headers, self.request)
        return self.handle()

    def handle(self) -> Any:
        """The answer of Flower's handler."""
        raise NotImplementedError

    def then(self, response: Any) -> None:
        """Answers with the result of the work."""
        self._close_share()
        if not self.is_gone:
            self.protocol.answer(response.SerializeToString())

    def drop(self) -> None:
        """Gives the request up, and the memory of its body back."""
        super().drop()
        self._body = bytearray()
        self._close_share()

    def _close_share(self) -> None:
        # The reference goes too: the share refers back to this request, and a circle would keep both, with all that
        # the request holds, until the garbage collector runs.
        share, self._share = self._share, None
        if share is not None:
            share.close()


class PushMessages(Unary):
    """A SuperNode announces a reply, whose objects are registered."""

    kind = _names.PushMessagesRequest
    max_bytes = MAX_TREE_BYTES

    def parse(self, body: bytes) -> Any:
        """The request in a body. In a long one the objects are counted first, since protobuf takes memory for each."""
        try:
            most = min(MAX_OBJECTS, len(body) // ID_BYTES + MAX_OTHER_FIELDS)
            if len(body) > LONG_TREE_BYTES and count_objects(body, most) > most:
                raise ValueError(f"more than {most:,} objects")
        except ValueError as error:
            about = f"Invalid payload: {error}"
            raise _names.FlowerError(_names.ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, about) from None
        return super().parse(body)

    def handle(self) -> Any:
        """The answer of Flower's handler."""
        return _names.fleet.push_messages(request=self.request, state=self.gateway.state)


class ConfirmMessage(Unary):
    """A SuperNode confirms a message: its objects go, unless others refer to them."""

    kind = _names.ConfirmMessageReceivedRequest

    def handle(self) -> Any:
        """The answer of Flower's handler."""
        state = self.gateway.state
        return _names.fleet.confirm_message_received(request=self.request, state=state, store=state.object_store)


class PullMessages(Unary):
    """A SuperNode asks for work; while there is none, the request is held open, until just before its time-out."""

    kind = _names.PullMessagesRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._poll: LongPoll | None = None
        self._is_hurried = False

    def handle(self) -> Any:
        """The answer of Flower's handler."""
        state = self.gateway.state
        return _names.fleet.pull_messages(request=self.request, state=state, store=state.object_store)

    def work(self) -> Any:
        """Checks the request and looks for a message. Any thread."""
        self.gateway.checks.fleet(self.headers, self.request)
        node_id = self.request.node.node_id
        # Before the look, so that a message that comes meanwhile is not missed.
        self._poll = self.gateway.long_polls.note(node_id)
        # A SuperNode that gets a message whose objects are still on their way sleeps a second before it asks for them
        # again, so it gets the message when they are there.
        return None if self.gateway.is_incoming(node_id) else self.handle()

    def then(self, response: Any) -> None:
        """Answers if there is a message, else waits."""
        assert self._poll is not None, "noted by `work`"
        if self.is_gone or (response is not None and response.messages_list):
            self.gateway.long_polls.forget(self._poll)
            if not self.is_gone:
                super().then(response)
        elif self._is_hurried:
            self.gateway.long_polls.forget(self._poll)
            self._again()
        else:
            self.gateway.long_polls.hold(self._poll, self._again)

    def _again(self) -> None:
        if not self.is_gone:
            self.gateway.run_aside(self.handle, super().then, self.fail)

    def hurry(self) -> None:
        """Answers the request if it is held open, and does not hold it later."""
        self._is_hurried = True
        self.gateway.long_polls.release(self._poll)

    def fail(self, error: BaseException) -> None:
        """Answers with Flower's answer to an error."""
        # Also if the request is gone: its thread may have noted the poll afterwards.
        self.gateway.long_polls.forget(self._poll)
        super().fail(error)

    def drop(self) -> None:
        """Gives the request up."""
        super().drop()
        self.gateway.long_polls.forget(self._poll)


class PullObject(Unary):
    """A SuperNode or a ServerApp asks for an object, which is sent from where it lies."""

    kind = _names.PullObjectRequest
    is_long = False

    def __init__(self, *args: Any, api: str) -> None:
        super().__init__(*args)
        self._api = api
        self._task: Any = None

    def work(self) -> Any:
        """Checks the request; returns the object in parts, or Flower's answer if it is not there. Any thread."""
        checks, state = self.gateway.checks, self.gateway.state
        if self._api == "fleet":
            checks.fleet(self.headers, self.request)
            checks.run(self.request)
        else:
            self._task = checks.runtime(self.headers, self.request)
        # The store holds the object while it makes the parts, and the bytes stay while the parts are held here.
        found = self.gateway.store.answer(self.request.object_id)
        if found is None:
            handle = getattr(_names, self._api).pull_object
            rest = () if self._api == "fleet" else (self._task,)
            return handle(self.request, state, *rest).SerializeToString()
        nbytes, parts = found
        if self._api == "fleet":
            state.store_traffic(self.request.run_id, bytes_sent=nbytes, bytes_recv=0)
        return parts

    def then(self, response: Any) -> None:
        """Sends the object."""
        if not self.is_gone:
            self.gateway.sent_bytes += sum(map(len, response)) if isinstance(response, tuple) else len(response)
            self.protocol.answer(response)


class PushObject(DataRequest):
    """A SuperNode or a ServerApp sends an object: checked by its head, then landed, then stored by Flower's handler."""

    def __init__(self, gateway: Server, protocol: GatewayProtocol, headers: Any, length: int, api: str) -> None:
        super().__init__(gateway, protocol, headers, length)
        self._api = api
        self._upload = Upload(length, self._begin)
        self._request: Any = None
        self._task: Any = None
        self._nbytes = 0
        gateway.uploads += 1
        self._is_counted = True

    @property
    def is_welcome(self) -> bool:
        """False for an empty body, which is left to Flower."""
        return self.length > 0

    @property
    def is_aimed(self) -> bool:  # type: ignore[override]
        """True when the content has a target."""
        return self._upload.is_aimed

    @property
    def is_complete(self) -> bool:
        """True when all of the body is where it belongs."""
        return self._upload.is_complete

    def feed(self, data: bytes) -> None:
        """Takes more of the body."""
        try:
            self._upload.feed(data)
        except ValueError as error:
            self._fail_to_read(error)

    def room(self) -> Any:
        """A writable buffer for the next bytes of the body."""
        return self._upload.room()

    def advance(self, nbytes: int) -> None:
        """Takes the next bytes of the body, which have been written to :meth:`room`."""
        self._upload.advance(nbytes)

    def _begin(self, fields: bytes, nbytes: int) -> None:
        """Begins the checks: the fields before the content have come."""
        try:
            self._request, self._nbytes = _names.PushObjectRequest.FromString(fields), nbytes
        except Exception as error:
            self._fail_to_read(error)
            return
        refusal = self.gateway.check_size(nbytes)
        if refusal is not None:
            self.protocol.refuse(413, refusal)
            return
        if not self.gateway.is_quick:
            self.protocol.wait()
        self.gateway.run(self._check, self._aim, self.fail)

    def _check(self) -> bool:
        checks = self.gateway.checks
        if self._api == "fleet":
            checks.fleet(self.headers, self._request)
            checks.run_of_late(self._request)  # checked again, by Flower's handler, when the body is complete
        else:
            self._task = checks.runtime(self.headers, self._request)
            checks.is_superlink(self._request)
        return self.gateway.store.is_wanted(self._request.object_id)

    def _aim(self, is_wanted: bool) -> None:
        """Finds a target for the content, and waits while there is none."""
        if not is_wanted:
            self._upload.aim(Sink(self._nbytes))
            self.protocol.proceed()
        elif not self._has_found_room():
            self.protocol.wait()
            self.gateway.wait_for_room(self._has_found_room)

    def _has_found_room(self) -> bool:
        """Takes a target if there is room for one. True as well if none is needed any more."""
        if self.is_gone:
            return True
        try:
            target = self.gateway.target_for(self._request, self._nbytes, is_trusted=self._api == "runtime")
            self._upload.aim(target)
            target.watch(partial(self._revoked, target))
        except BlockingIOError:
            return False
        except MemoryError as error:
            self.protocol.refuse(503, str(error))
            return True
        except ValueError as error:
            self.protocol.refuse(413, str(error))
            return True
        except Exception as error:
            self.fail(error)
            return True
        self.protocol.proceed()
        return True

    def _revoked(self, place: Target, keeps: bool) -> None:
        """Moves the upload; called from any thread."""
        with contextlib.suppress(RuntimeError):  # raised if the server has ended
            self.protocol.loop.call_soon_threadsafe(self._move, place, keeps)

    def _move(self, place: Target, keeps: bool) -> None:
        """Goes on beside the arena, or only reads: the block that the content comes into is needed elsewhere."""
        if self.is_gone or not self._upload.is_aimed_at(place):  # a place may be revoked twice
            return
        target: Target = Sink(self._nbytes)
        if keeps:
            try:
                target = self.gateway.spool_for(self._request, self._nbytes, is_trusted=False, is_beside=True)
            except MemoryError as error:
                self._upload.failure = error
        self._upload.move(target)

    def complete(self) -> None:
        """Has the object stored by Flower's handler: the body has come whole and is hashed."""
        gateway = self.gateway
        gateway.received_bytes += self.length
        gateway.copied_bytes += self._upload.copied_bytes
        if self._upload.failure is not None:
            self.protocol.refuse(503, str(self._upload.failure))
            return
        landed = self._upload.take()
        try:
            request = _names.PushObjectRequest.FromString(self._upload.fields)
        except Exception as error:
            landed.drop()
            self._fail_to_read(error)
            return
        # Protobuf takes the last of two equal fields, so fields behind the content could replace the checked ones.
        if any(getattr(request, name) != getattr(self._request, name) for name in ("node", "run_id", "object_id")):
            landed.drop()
            self._fail_to_read("the fields behind the object are not those that were checked")
            return
        session_id = gateway.session_of(request) if self._api == "fleet" else request.session_id
        if session_id is None:
            landed.drop()
            self._answer(False)
            return
        # Flower's handler uses no more of a request than this, and passes the content on to the store untouched.
        stand_in = SimpleNamespace(
            node=request.node,
            run_id=request.run_id,
            object_id=request.object_id,
            session_id=session_id,
            object_content=landed,
        )

        def store() -> bool:
            handle = getattr(_names, self._api).push_object
            rest = () if self._api == "fleet" else (self._task,)
            stored = False
            try:
                stored = bool(handle(stand_in, gateway.state, *rest).stored)
            finally:
                if not stored:
                    landed.drop()
            return stored

        gateway.run(store, self._answer, self.fail)

    def _fail_to_read(self, reason: object) -> None:
        self.fail(_names.FlowerError(_names.ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, f"Invalid payload: {reason}"))

    def _answer(self, stored: bool) -> None:
        self._uncount()
        if not self.is_gone:
            self.protocol.answer(_STORED[stored])

    def drop(self) -> None:
        """Gives the request up, and the memory of its object back."""
        super().drop()
        self._upload.drop()
        self._uncount()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self.gateway.uploads -= 1
