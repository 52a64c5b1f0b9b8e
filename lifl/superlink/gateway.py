"""The routes of the data plane: what is checked, where bytes go, and what answers.

Owns which requests are taken past ASGI. Every check that Flower's middlewares and routes make is made here by
Flower's own functions, before a byte of a body is accepted; what happens to a message or a session is decided by
Flower's own handlers. Only the bytes go another way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

from lifl.superlink import flower
from lifl.superlink.checks import Checks
from lifl.superlink.content import SMALL_BYTES, BlockContent, Landed, answer_head
from lifl.superlink.holding import Holding
from lifl.superlink.protocol import GatewayProtocol
from lifl.superlink.store import ArenaStore
from lifl.superlink.upload import Sink, Target, Upload

_names = flower.part("gateway")

MAX_REQUEST_BYTES = 2**26
"""Of a request without an object: ids of a message's objects, 70 bytes each."""

RETRY_S = 0.005
"""Who waits for room in the arena asks again so often."""

_STORED = {flag: _names.PushObjectResponse(stored=flag).SerializeToString() for flag in (True, False)}


class Placer(Protocol):
    """Knows where an object belongs that is a part of an update."""

    def place(self, object_id: str, node_id: int, nbytes: int) -> Target | None:
        """A target in the update's block; None if it has none there. Raises :class:`BlockingIOError` without room."""

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""


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


class Gateway:
    """The desk at which the protocol asks.

    Parameters
    ----------
    app : fastapi.FastAPI
        Flower's, with its state.
    store : ArenaStore
    arena : lifl.shm.Arena
    placer : Placer
    holding : Holding
        Which pull-messages requests wait.
    max_object_bytes : int
        A larger object is refused.
    """

    def __init__(
        self, app: Any, store: ArenaStore, arena: Any, placer: Placer, holding: Holding, max_object_bytes: int
    ) -> None:
        self.store, self._arena, self._placer, self.holding = store, arena, placer, holding
        self._max_object_bytes = max_object_bytes
        self.checks = Checks(app)
        self._factory = app.state.linkstate_factory
        # A database must not stop the loop; what is in memory answers at once.
        self.is_quick = type(self.state).__name__.startswith("InMemory")
        self.uploads = 0
        self.received_bytes = 0
        self.copied_bytes = 0
        self.sent_bytes = 0
        self._routes: dict[bytes, Callable[..., Any]] = {}
        for name in ("fleet", "runtime"):
            self._routes[b"/v1/%s/push-object" % name.encode()] = _of(PushObject, name)
            self._routes[b"/v1/%s/pull-object" % name.encode()] = _of(PullObject, name)
        self._routes[b"/v1/fleet/pull-messages"] = PullMessages
        self._routes[b"/v1/fleet/push-messages"] = PushMessages
        self._routes[b"/v1/fleet/confirm-message-received"] = ConfirmMessage

    @property
    def state(self) -> Any:
        """Flower's LinkState."""
        return self._factory.state()

    def begin(self, protocol: GatewayProtocol, path: bytes, headers: list[tuple[bytes, bytes]], length: int) -> Any:
        """The exchange for a request, if it is one of the data plane's."""
        route = self._routes.get(path)
        if route is None or not _is_protobuf(headers):
            return None
        exchange = route(self, protocol, headers, length)
        if exchange.is_welcome:
            return exchange
        exchange.drop()
        return None

    def run(self, work: Callable[[], Any], then: Callable[[Any], None], fail: Callable[[BaseException], None]) -> None:
        """Does what asks the LinkState: here if it is in memory, else in a thread."""
        if self.is_quick:
            try:
                done = work()
            except Exception as error:
                fail(error)
            else:
                then(done)
            return
        self.run_aside(work, then, fail)

    def run_aside(
        self, work: Callable[[], Any], then: Callable[[Any], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Does what takes long in a thread; `then` or `fail` is called in the loop."""

        def done(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                then(future.result())
            else:
                fail(error)

        asyncio.get_running_loop().run_in_executor(None, work).add_done_callback(done)

    def target_for(self, request: Any, nbytes: int) -> Target:
        """Where an object that is wanted belongs; raises :class:`BlockingIOError` if there is no room now."""
        if nbytes == 0:
            return Small(0)
        target = self._placer.place(request.object_id, request.node.node_id, nbytes)
        if target is not None:
            return target
        if nbytes <= SMALL_BYTES:
            return Small(nbytes)
        content = BlockContent.make(self._arena, nbytes)
        if content is None:
            raise BlockingIOError("the arena is full")
        return Large(content)

    def is_incoming(self, node_id: int) -> bool:
        """True if it is worth to wait for a message that is on its way."""
        return self.holding.is_on and self._placer.is_incoming(node_id)

    def check_size(self, nbytes: int) -> str | None:
        """Why an object of this size is refused, if it is."""
        if nbytes > self._max_object_bytes:
            return (
                f"an object of {nbytes:,} bytes was announced, this server takes {self._max_object_bytes:,}: give it "
                "--lifl-max-object, or send smaller chunks"
            )
        return None


def _of(kind: Callable[..., Any], api: str) -> Callable[..., Any]:
    return lambda *args: kind(*args, api=api)


def _is_protobuf(headers: list[tuple[bytes, bytes]]) -> bool:
    """Else Flower's middleware says what it thinks of it."""
    kinds = [value for name, value in headers if name == b"content-type"]
    return len(kinds) == 1 and kinds[0].partition(b";")[0].strip().lower() == _names.MEDIA_TYPE.encode()


class Exchange:
    """One request to one of the routes below; the protocol's ``Exchange``."""

    is_aimed = False

    def __init__(self, gateway: Gateway, protocol: GatewayProtocol, headers: Any, length: int) -> None:
        self.gateway, self.protocol, self.headers = gateway, protocol, headers
        self.length = length
        self.is_gone = False

    @property
    def is_welcome(self) -> bool:
        """False leaves it to Flower."""
        return self.length <= MAX_REQUEST_BYTES

    def fail(self, error: BaseException) -> None:
        """Answers as Flower answers what its handlers and middlewares raise."""
        if self.is_gone:
            return
        self.protocol.discard()
        self.is_gone = True
        self.gateway.checks.answer_error(error, self.protocol, self.headers)

    def drop(self) -> None:
        """Nothing comes of it any more."""
        self.is_gone = True

    def hurry(self) -> None:
        """Only what is held open has to."""

    def room(self) -> Any:
        """Never asked for: it is not aimed."""
        raise NotImplementedError

    def advance(self, nbytes: int) -> None:
        """Never called."""
        raise NotImplementedError


class Unary(Exchange):
    """A request without an object: its body is collected, then checked and handed to Flower's handler."""

    kind: Any  # the protobuf message
    is_long = True  # it is done in a thread

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._body = bytearray()
        self.request: Any = None

    @property
    def is_complete(self) -> bool:
        """True when the body has come."""
        return len(self._body) == self.length

    def feed(self, data: bytes) -> None:
        """More of the body."""
        self._body += data

    def complete(self) -> None:
        """Parses it and has it done."""
        self.request = self.kind()
        try:
            self.request.ParseFromString(bytes(self._body))
        except Exception as error:
            self.fail(_names.FlowerError(_names.ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, f"Invalid payload: {error!r}"))
            return
        run = self.gateway.run_aside if self.is_long else self.gateway.run
        run(self.work, self.then, self.fail)

    def work(self) -> Any:
        """Checks and handles it."""
        self.gateway.checks.fleet(self.headers, self.request)
        return self.handle()

    def handle(self) -> Any:
        """Flower's handler's answer."""
        raise NotImplementedError

    def then(self, response: Any) -> None:
        """Answers."""
        if not self.is_gone:
            self.protocol.answer(response.SerializeToString())


class PushMessages(Unary):
    """A reply is announced: its objects are registered."""

    kind = _names.PushMessagesRequest

    def handle(self) -> Any:
        """Flower's."""
        return _names.fleet.push_messages(request=self.request, state=self.gateway.state)


class ConfirmMessage(Unary):
    """A message has been received: its objects go, unless others refer to them."""

    kind = _names.ConfirmMessageReceivedRequest

    def handle(self) -> Any:
        """Flower's."""
        state = self.gateway.state
        return _names.fleet.confirm_message_received(request=self.request, state=state, store=state.object_store)


class PullMessages(Unary):
    """A SuperNode asks for work: if there is none it is held open until there is, or just before its time-out."""

    kind = _names.PullMessagesRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: Any = None

    def handle(self) -> Any:
        """Flower's."""
        state = self.gateway.state
        return _names.fleet.pull_messages(request=self.request, state=state, store=state.object_store)

    def work(self) -> Any:
        """Checks it, and looks; noted before, so that a message that comes meanwhile is not missed."""
        self.gateway.checks.fleet(self.headers, self.request)
        node_id = self.request.node.node_id
        self._held = self.gateway.holding.note(node_id)
        # Who gets a message whose objects are still on their way sleeps a second before it asks for them again.
        return None if self.gateway.is_incoming(node_id) else self.handle()

    def then(self, response: Any) -> None:
        """Answers if there is a message, else waits."""
        if self.is_gone or (response is not None and response.messages_list):
            self.gateway.holding.forget(self._held)
            if not self.is_gone:
                super().then(response)
        else:
            self.gateway.holding.hold(self._held, self._again)

    def _again(self) -> None:
        if not self.is_gone:
            self.gateway.run_aside(self.handle, super().then, self.fail)

    def hurry(self) -> None:
        """The server ends: it need not wait any more."""
        self.gateway.holding.release(self._held)

    def drop(self) -> None:
        """Nobody waits any more."""
        super().drop()
        self.gateway.holding.forget(self._held)


class PullObject(Unary):
    """An object is asked for: it is sent from where it lies."""

    kind = _names.PullObjectRequest
    is_long = False

    def __init__(self, *args: Any, api: str) -> None:
        super().__init__(*args)
        self._api = api
        self._task: Any = None

    def work(self) -> Any:
        """Checks it; what is there, or else Flower's answer."""
        checks, state = self.gateway.checks, self.gateway.state
        if self._api == "fleet":
            checks.fleet(self.headers, self.request)
            checks.run(self.request)
        else:
            self._task = checks.runtime(self.headers, self.request)
        content = self.gateway.store.peek(self.request.object_id)
        if content is None or not len(content):  # type: ignore[arg-type]
            handle = getattr(_names, self._api).pull_object
            rest = () if self._api == "fleet" else (self._task,)
            return handle(self.request, state, *rest).SerializeToString()
        if self._api == "fleet":
            state.store_traffic(self.request.run_id, bytes_sent=len(content), bytes_recv=0)  # type: ignore[arg-type]
        if isinstance(content, bytes):
            return answer_head(len(content)) + content
        return content.answer  # type: ignore[attr-defined]

    def then(self, response: Any) -> None:
        """Sends it."""
        if not self.is_gone:
            self.gateway.sent_bytes += sum(map(len, response)) if isinstance(response, tuple) else len(response)
            self.protocol.answer(response)


class PushObject(Exchange):
    """An object comes: checked by its head, then landed where it belongs, then stored by Flower's handler."""

    def __init__(self, gateway: Gateway, protocol: GatewayProtocol, headers: Any, length: int, api: str) -> None:
        super().__init__(gateway, protocol, headers, length)
        self._api = api
        self._upload = Upload(length, self._begin)
        self._request: Any = None
        self._task: Any = None
        self._nbytes = 0
        self._retry: asyncio.TimerHandle | None = None
        gateway.uploads += 1
        self._is_counted = True

    @property
    def is_welcome(self) -> bool:
        """An empty body is Flower's business."""
        return self.length > 0

    @property
    def is_aimed(self) -> bool:  # type: ignore[override]
        """True when the content has a place."""
        return self._upload.is_aimed

    @property
    def is_complete(self) -> bool:
        """True when it is all there."""
        return self._upload.is_complete

    def feed(self, data: bytes) -> None:
        """More of the body."""
        try:
            self._upload.feed(data)
        except ValueError as error:
            self._fail_to_read(error)

    def room(self) -> Any:
        """Where the next bytes go."""
        return self._upload.room()

    def advance(self, nbytes: int) -> None:
        """So many have come."""
        self._upload.advance(nbytes)

    def _begin(self, fields: bytes, nbytes: int) -> None:
        """The fields before the content are there: is it to be accepted?"""
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
            checks.run_of_late(self._request)  # and again, by Flower's handler, when it is complete
        else:
            self._task = checks.runtime(self.headers, self._request)
            checks.is_superlink(self._request)
        return self.gateway.store.is_wanted(self._request.object_id)

    def _aim(self, is_wanted: bool) -> None:
        """Finds it a place, waiting while there is none."""
        self._retry = None
        if self.is_gone:
            return
        try:
            target = self.gateway.target_for(self._request, self._nbytes) if is_wanted else Sink(self._nbytes)
        except BlockingIOError:
            self.protocol.wait()
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._aim, True)
            return
        except Exception as error:
            self.fail(error)
            return
        self._upload.aim(target)
        self.protocol.proceed()

    def complete(self) -> None:
        """All of it has come and been hashed: Flower's handler decides what becomes of it."""
        gateway = self.gateway
        gateway.received_bytes += self.length
        gateway.copied_bytes += self._upload.copied_bytes
        landed = self._upload.take()
        try:
            request = _names.PushObjectRequest.FromString(self._upload.fields)
        except Exception as error:
            landed.drop()
            self._fail_to_read(error)
            return
        if any(getattr(request, name) != getattr(self._request, name) for name in ("node", "run_id", "object_id")):
            landed.drop()
            self._fail_to_read("the fields behind the object are not those that were checked")
            return
        said = SimpleNamespace(
            node=request.node,
            run_id=request.run_id,
            object_id=request.object_id,
            session_id=request.session_id,
            object_content=landed,
        )

        def store() -> bool:
            handle = getattr(_names, self._api).push_object
            rest = () if self._api == "fleet" else (self._task,)
            stored = False
            try:
                stored = bool(handle(said, gateway.state, *rest).stored)
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
        """Gives back what it holds."""
        super().drop()
        if self._retry is not None:
            self._retry.cancel()
        self._upload.drop()
        self._uncount()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self.gateway.uploads -= 1
