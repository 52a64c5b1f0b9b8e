"""The routes of the data plane: what is checked, where bytes go, and what answers.

Owns which requests are taken past ASGI. Every check that Flower's middlewares and routes make is made here by
Flower's own functions, before a byte of a body is accepted; what happens to a message or a session is decided by
Flower's own handlers. Only the bytes go another way.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from logging import WARNING
from typing import Any, Protocol

from lifl.shm.arena import available_bytes
from lifl.superlink import flower
from lifl.superlink.http.allowance import SENDER_BYTES, TOTAL_BYTES, Allowance, Share
from lifl.superlink.http.checks import Checks
from lifl.superlink.http.long_poll import Holding
from lifl.superlink.http.protocol import GatewayProtocol
from lifl.superlink.http.requests import (
    LONG_TREE_BYTES,
    MAX_REQUEST_BYTES,
    ConfirmMessage,
    PullMessages,
    PullObject,
    PushMessages,
    PushObject,
)
from lifl.superlink.http.targets import Large, Spool, SpoolBudget
from lifl.superlink.http.upload import Target
from lifl.superlink.store.content import SMALL_BYTES, BlockContent
from lifl.superlink.store.store import ArenaStore, DurableStore

_names, _server = flower.part("gateway"), flower.part("server")

RETRY_S = 0.005
"""While somebody waits for room in the arena it is looked for so often."""

RELIEF_S = 0.25
"""And so often among what slow readers hold."""

MAX_BODY_BYTES = 2**26
FIELDS_BYTES = 2**13
"""A body has at most so much beside an object; see ``lifl.superlink.http.body``."""

FULL_S = 4.0
"""When there was none for so long, half of many messages may hold it all: then objects are kept as Flower keeps them.

More than the pause after which a ServerApp pulls what is complete, less than the time-out of a client.
"""

SPARE_BYTES = 2**28
"""So much of the machine's memory is left alone then."""

NODE_BYTES = 2**27
"""So much a SuperNode may be sending at once, or one object: they send eight of 5 MiB."""


class Placer(Protocol):
    """Knows where an object belongs that is a part of an update."""

    def place(self, object_id: str, node_id: int, nbytes: int) -> Target | None:
        """A target in the update's block; None if it has none there.

        Raises :class:`BlockingIOError` without room, and ``ValueError`` if the reply has grown too large.
        """

    def is_part(self, object_id: str, node_id: int) -> bool:
        """True for an object of a reply that the node is sending into a round."""

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""

    def relieve_arena(self) -> None:
        """Somebody waits for room: replies that hold a block and hardly come give it back."""


class Gateway:
    """The desk at which the protocol asks.

    Parameters
    ----------
    app : fastapi.FastAPI
        Flower's, with its state.
    store : ArenaStore or DurableStore
    arena : lifl.shm.Arena
    placer : Placer or None
        None if this server folds no rounds.
    holding : Holding
        Which pull-messages requests wait.
    max_object_bytes : int
        A larger object is refused.
    """

    def __init__(
        self,
        app: Any,
        store: ArenaStore | DurableStore,
        arena: Any,
        placer: Placer | None,
        holding: Holding,
        max_object_bytes: int,
    ) -> None:
        self.store, self._arena, self._placer, self.holding = store, arena, placer, holding
        self._max_object_bytes = max_object_bytes
        self.checks = Checks(app)
        self._factory = app.state.linkstate_factory
        # A database must not stop the loop; what is in memory answers at once.
        self.is_quick = type(self.state).__name__.startswith("InMemory")
        self.uploads = 0  # that are coming in
        self.received_bytes = 0
        self.copied_bytes = 0
        self.sent_bytes = 0
        self._budget = SpoolBudget(max(available_bytes() // 2, SPARE_BYTES), NODE_BYTES)
        self._waiting: deque[Callable[[], bool]] = deque()
        self._full_since_s = 0.0  # while somebody waits
        self._has_warned = False
        self._routes: dict[bytes, Callable[..., Any]] = {}
        for name in ("fleet", "runtime"):
            self._routes[b"/v1/%s/push-object" % name.encode()] = _of(PushObject, name)
            self._routes[b"/v1/%s/pull-object" % name.encode()] = _of(PullObject, name)
        self._routes[b"/v1/fleet/pull-messages"] = PullMessages
        self._routes[b"/v1/fleet/push-messages"] = PushMessages
        self._routes[b"/v1/fleet/confirm-message-received"] = ConfirmMessage
        self.max_body_bytes = max(MAX_BODY_BYTES, max_object_bytes + FIELDS_BYTES)
        self._limits = {path.decode(): MAX_REQUEST_BYTES for path in self._routes}
        # SuperNodes do not send it in chunks; Flower parses it before anybody counts what is in it.
        self._limits["/v1/fleet/push-messages"] = LONG_TREE_BYTES
        for name in ("fleet", "runtime"):
            self._limits[f"/v1/{name}/push-object"] = max_object_bytes + FIELDS_BYTES
        total_bytes = max(TOTAL_BYTES, 4 * self.max_body_bytes)
        # Strangers have an allowance of their own: they take nothing away from those who are known.
        self.allowance = Allowance(max(SENDER_BYTES, self.max_body_bytes), total_bytes)
        self.strangers = Allowance(max(SENDER_BYTES, self.max_body_bytes), total_bytes // 2)
        self.relieve: Callable[[], bool] = lambda: False  # frees what slow readers hold; set by the plane
        self._relieved_s = 0.0

    @property
    def state(self) -> Any:
        """Flower's LinkState."""
        return self._factory.state()

    def begin(self, protocol: GatewayProtocol, path: bytes, headers: list[tuple[bytes, bytes]], length: int) -> Any:
        """The exchange for a request, if it is one of the data plane's."""
        route = self._routes.get(path.partition(b"?")[0])
        if route is None or not _is_protobuf(headers):
            return None
        exchange = route(self, protocol, headers, length)
        if exchange.is_welcome:
            return exchange
        exchange.drop()
        return None

    def limit_of(self, path: str) -> int:
        """How long the body of a request that is left to Flower may be."""
        return self._limits.get(path, self.max_body_bytes)

    def admit(
        self,
        path: str,
        headers: Any,
        client: Any,
        give_up: Callable[[], None],
        then: Callable[[Share], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Looks who sends a long body: a SuperNode by its signature, a ServerApp by its token, others by address."""
        if path.startswith("/v1/fleet/"):
            self.run(lambda: self.checks.sender(headers), lambda node: then(self.allowance.share(node, give_up)), fail)
        elif path.startswith("/v1/runtime/"):

            def let_in(task: Any) -> None:
                then(self.allowance.share(("run", task.run_id), give_up))

            self.run(lambda: self.checks.runtime(headers, None), let_in, fail)
        else:
            then(self.strangers.share(client[0] if client else "", give_up))

    def answer_error(self, error: BaseException, path: str, headers: Any, answer: Callable[..., None]) -> None:
        """Calls `answer` with what Flower answers to an error."""
        self.checks.answer_error(error, path, headers, answer)

    def look(self, now_s: float) -> None:
        """Called now and then: bodies that hold memory which others need are given up."""
        self.allowance.look(now_s)
        self.strangers.look(now_s)

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

    def target_for(self, request: Any, nbytes: int, *, is_trusted: bool) -> Target:
        """Where an object that is wanted belongs.

        Memory is taken for what a SuperNode sends, not for what it says that it will send; only a ServerApp, which is
        trusted, gets a block of the announced size at once. What of a reply into a round has no place in the update's
        block lies beside the arena: in it a reply would take the room of others' updates.

        Raises
        ------
        BlockingIOError
            If there is no room now.
        MemoryError
            If the node is sending too much at once.
        ValueError
            If the reply that the object is of has grown too large.
        """
        if self._placer is not None and not is_trusted:
            target = self._placer.place(request.object_id, request.node.node_id, nbytes)
            if target is not None:
                return target
            if self._placer.is_part(request.object_id, request.node.node_id):
                return self.spool_for(request, nbytes, is_trusted=False, is_beside=True)
        if nbytes > SMALL_BYTES:
            if is_trusted and (content := BlockContent.make(self._arena, nbytes)) is not None:
                self._full_since_s = time.monotonic()
                return Large(content)
            self._check_room(nbytes)
        return self.spool_for(request, nbytes, is_trusted=is_trusted)

    def spool_for(self, request: Any, nbytes: int, *, is_trusted: bool, is_beside: bool = False) -> Target:
        """Memory beside the arena for an object while it comes and, if `is_beside`, afterwards.

        Raises :class:`MemoryError` if its sender sends too much at once.
        """
        # All ServerApps are one node: each has its run's share.
        sender = f"run {request.run_id}" if is_trusted else f"node {request.node.node_id}"
        if (refusal := self._budget.announce(sender, nbytes)) is not None:
            raise MemoryError(refusal)
        return Spool(None if is_beside else self._arena, self._budget, sender, nbytes, self._warn_that_full)

    def _check_room(self, nbytes: int) -> None:
        """A large object is coming: raises :class:`BlockingIOError` unless it can be kept."""
        if self._arena.free_bytes >= nbytes:
            self._full_since_s = time.monotonic()
            return
        if not self._is_stuck and nbytes < self._arena.block_bytes:
            raise BlockingIOError("the arena is full")
        if available_bytes() < 2 * nbytes + SPARE_BYTES:
            raise BlockingIOError("the arena is full, and so is the machine")
        self._warn_that_full()

    def _warn_that_full(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            _server.log(WARNING, "lifl's arena is full: objects are kept beside it now; give the server --lifl-memory")

    @property
    def spooled_bytes(self) -> int:
        """Memory of objects that are coming in and have no place in the arena yet."""
        return self._budget.taken_bytes

    @property
    def _is_stuck(self) -> bool:
        return bool(self._waiting) and time.monotonic() - self._full_since_s > FULL_S

    def wait_for_room(self, ask: Callable[[], bool]) -> None:
        """Asks for the one who has waited longest, until there is no room again; see ``Server``."""
        self._waiting.append(ask)
        if len(self._waiting) == 1:
            self._full_since_s = time.monotonic()
            asyncio.get_running_loop().call_later(RETRY_S, self._ask_again)

    def _ask_again(self) -> None:
        now_s = time.monotonic()
        if now_s - self._relieved_s >= RELIEF_S:
            self._relieved_s = now_s
            self.relieve()
            if self._placer is not None:
                self._placer.relieve_arena()
        if self._is_stuck:  # the first may wait for what the others hold
            self._waiting = deque([ask for ask in self._waiting if not ask()])
        while self._waiting and self._waiting[0]():
            self._waiting.popleft()
        if self._waiting:
            asyncio.get_running_loop().call_later(RETRY_S, self._ask_again)

    def is_incoming(self, node_id: int) -> bool:
        """True if it is worth to wait for a message that is on its way."""
        return self.holding.is_on and self._placer is not None and self._placer.is_incoming(node_id)

    def session_of(self, request: Any) -> str | None:
        """A push's session. Of a SuperNode from before there were sessions its own; None: others await the object."""
        if request.session_id or self._placer is None:
            return str(request.session_id)
        return self._placer.session_of(request.object_id, request.node.node_id)

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
