"""The routes of the data plane, and the targets of the objects that come there.

Owns the choice of the requests that go past ASGI. Every check that Flower's middlewares and routes make is made here by
Flower's own functions, before a byte of a body is accepted; Flower's own handlers decide about messages and sessions.
Only the bytes go another way. Everything here belongs to the event loop, except where a docstring names threads.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from logging import ERROR, WARNING
from typing import Any, Protocol

from lifl.shm.machine import available_bytes
from lifl.superlink import flower
from lifl.superlink.http.allowance import MAX_SENDER_BYTES, MAX_TOTAL_BYTES, Allowance, Share
from lifl.superlink.http.checks import Checks
from lifl.superlink.http.long_poll import LongPolls
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
from lifl.superlink.store.content import MAX_SMALL_BYTES, BlockContent
from lifl.superlink.store.store import ArenaStore, DurableStore

_names, _server = flower.part("gateway"), flower.part("server")

RETRY_S = 0.005
"""Time between two looks for room in the arena, while an object waits for it."""

RELIEF_S = 0.25
"""Time between two looks for memory that slow readers hold, while an object waits for room."""

MAX_BODY_BYTES = 2**26
MAX_FIELDS_BYTES = 2**13
"""Longest rest of a push-object body beside the object; see ``lifl.superlink.http.body``."""

FULL_S = 4.0
"""Time without room after which objects are kept beside the arena, as Flower keeps them.

Halves of many messages may hold all of the arena then, and none of them could go on. The time is longer than the pause
after which a ServerApp pulls complete replies, and shorter than the time-out of a client.
"""

MIN_SPARE_BYTES = 2**28
"""Memory of the machine that is left alone then."""

MAX_NODE_BYTES = 2**27
"""Bytes that a SuperNode may be sending at once, unless it sends one object only. Flower's send eight of 5 MiB."""


class Placer(Protocol):
    """Knows the place of each object that is a part of an update. All methods: any thread."""

    def place(self, object_id: str, node_id: int, nbytes: int) -> Target | None:
        """A target in the update's block; None if the object has no place there.

        Raises :class:`BlockingIOError` without room, and ``ValueError`` if the reply has grown too large.
        """

    def is_part(self, object_id: str, node_id: int) -> bool:
        """True for an object of a reply that the node is sending into a round."""

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none.

        "" if nobody awaits the object, None if only other nodes' sessions await it.
        """

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""

    def relieve_arena(self) -> None:
        """Takes blocks back from replies that hardly come; called while an object waits for room."""


class Gateway:
    """The protocol's ``Router``, and the ``Server`` of its exchanges.

    Parameters
    ----------
    app : fastapi.FastAPI
        Flower's, with its state.
    store : ArenaStore or DurableStore
    arena : lifl.shm.Arena
    placer : Placer or None
        None if this server folds no rounds.
    long_polls : LongPolls
        The pull-messages requests that are held open.
    max_object_bytes : int
        A larger object is refused.

    Attributes
    ----------
    is_quick : bool
        True if the LinkState is in memory: then it is asked in the event loop, else in a thread.
    uploads : int
        Objects that are coming in.
    received_bytes, copied_bytes, sent_bytes : int
        Bytes so far of bodies with objects, of those bytes that were copied once more here, and of objects sent.
    relieve : callable
        Frees memory that slow readers hold; set by the plane.
    """

    def __init__(
        self,
        app: Any,
        store: ArenaStore | DurableStore,
        arena: Any,
        placer: Placer | None,
        long_polls: LongPolls,
        max_object_bytes: int,
    ) -> None:
        self.store = store
        self._arena = arena
        self._placer = placer
        self.long_polls = long_polls
        self._max_object_bytes = max_object_bytes
        self.checks = Checks(app)
        self._factory = app.state.linkstate_factory
        # A database must not stop the loop; a state in memory answers at once.
        self.is_quick = type(self.state).__name__.startswith("InMemory")
        self.uploads = 0
        self.received_bytes = 0
        self.copied_bytes = 0
        self.sent_bytes = 0
        self._budget = SpoolBudget(max(available_bytes() // 2, MIN_SPARE_BYTES), MAX_NODE_BYTES)
        self._waiting: deque[Callable[[], bool]] = deque()
        self._full_since_s = 0.0  # valid while somebody waits
        self._has_warned = False
        self._routes: dict[bytes, Callable[..., Any]] = {}
        for name in ("fleet", "runtime"):
            self._routes[b"/v1/%s/push-object" % name.encode()] = _of(PushObject, name)
            self._routes[b"/v1/%s/pull-object" % name.encode()] = _of(PullObject, name)
        self._routes[b"/v1/fleet/pull-messages"] = PullMessages
        self._routes[b"/v1/fleet/push-messages"] = PushMessages
        self._routes[b"/v1/fleet/confirm-message-received"] = ConfirmMessage
        self.max_body_bytes = max(MAX_BODY_BYTES, max_object_bytes + MAX_FIELDS_BYTES)
        self._limits = {path.decode(): MAX_REQUEST_BYTES for path in self._routes}
        # Only a request in chunks, which SuperNodes do not send, is left to Flower, and Flower parses before it counts.
        self._limits["/v1/fleet/push-messages"] = LONG_TREE_BYTES
        for name in ("fleet", "runtime"):
            self._limits[f"/v1/{name}/push-object"] = max_object_bytes + MAX_FIELDS_BYTES
        total_bytes = max(MAX_TOTAL_BYTES, 4 * self.max_body_bytes)
        # Strangers have an allowance of their own, so that they take nothing away from known senders.
        self.allowance = Allowance(max(MAX_SENDER_BYTES, self.max_body_bytes), total_bytes)
        self.strangers = Allowance(max(MAX_SENDER_BYTES, self.max_body_bytes), total_bytes // 2)
        self.relieve: Callable[[], bool] = lambda: False
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
        """The limit in bytes of a body that is left to Flower."""
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
        """Identifies the sender of a long body: a SuperNode by signature, a ServerApp by token, others by address."""
        if path.startswith("/v1/fleet/"):
            self.run(lambda: self.checks.sender(headers), lambda node: then(self.allowance.share(node, give_up)), fail)
        elif path.startswith("/v1/runtime/"):

            def let_in(task: Any) -> None:
                then(self.allowance.share(("run", task.run_id), give_up))

            self.run(lambda: self.checks.runtime(headers, None), let_in, fail)
        else:
            then(self.strangers.share(client[0] if client else "", give_up))

    def answer_error(self, error: BaseException, path: str, headers: Any, answer: Callable[..., None]) -> None:
        """Calls `answer` with Flower's answer to an error."""
        self.checks.answer_error(error, path, headers, answer)

    def look(self, now_s: float) -> None:
        """Gives up bodies that hold memory which others need; called now and then."""
        self.allowance.look(now_s)
        self.strangers.look(now_s)

    def run(self, work: Callable[[], Any], then: Callable[[Any], None], fail: Callable[[BaseException], None]) -> None:
        """Does `work`, which asks the LinkState: here if that is in memory, else in a thread of the loop's executor."""
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
        """Does `work`, which takes long, in a thread of the loop's executor; `then` or `fail` is called in the loop."""

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
        """The target of an object that is wanted.

        Memory is taken for the bytes that a SuperNode has sent, not for those that it announces. Only a ServerApp,
        which is trusted, gets a block of the announced size at once. An object of a reply into a round that has no
        place in the update's block lies beside the arena, where it takes no room of others' updates.

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
        if nbytes > MAX_SMALL_BYTES:
            if is_trusted and (content := BlockContent.make(self._arena, nbytes)) is not None:
                self._full_since_s = time.monotonic()
                return Large(content)
            self._check_room(nbytes)
        return self.spool_for(request, nbytes, is_trusted=is_trusted)

    def spool_for(self, request: Any, nbytes: int, *, is_trusted: bool, is_beside: bool = False) -> Target:
        """A target beside the arena for an object while it comes and, if `is_beside`, afterwards.

        Raises :class:`MemoryError` if its sender sends too much at once.
        """
        # All ServerApps push as one node, so each run counts as a sender.
        sender = f"run {request.run_id}" if is_trusted else f"node {request.node.node_id}"
        if (refusal := self._budget.announce(sender, nbytes)) is not None:
            raise MemoryError(refusal)
        return Spool(None if is_beside else self._arena, self._budget, sender, nbytes, self._warn_that_full)

    def _check_room(self, nbytes: int) -> None:
        """Raises :class:`BlockingIOError` unless a large object can be kept: in the arena, or beside a stuck one."""
        if self._arena.free_bytes >= nbytes:
            self._full_since_s = time.monotonic()
            return
        if not self._is_stuck and nbytes < self._arena.block_bytes:
            raise BlockingIOError("the arena is full")
        if available_bytes() < 2 * nbytes + MIN_SPARE_BYTES:
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
        """Has `ask` called until it returns True, the one that has waited longest first; see ``Server``."""
        self._waiting.append(ask)
        if len(self._waiting) == 1:
            self._full_since_s = time.monotonic()
            asyncio.get_running_loop().call_later(RETRY_S, self._ask_again)

    def _ask_again(self) -> None:
        try:
            now_s = time.monotonic()
            if now_s - self._relieved_s >= RELIEF_S:
                self._relieved_s = now_s
                self.relieve()
                if self._placer is not None:
                    self._placer.relieve_arena()
            if self._is_stuck:  # the first may wait for memory that the others hold, so all are asked
                self._waiting = deque([ask for ask in self._waiting if not _is_done(ask)])
            while self._waiting and _is_done(self._waiting[0]):
                self._waiting.popleft()
        finally:  # whatever fails: those that wait have to be asked again
            if self._waiting:
                asyncio.get_running_loop().call_later(RETRY_S, self._ask_again)

    def is_incoming(self, node_id: int) -> bool:
        """True if a request for work should wait for a message that is on its way."""
        return self.long_polls.is_on and self._placer is not None and self._placer.is_incoming(node_id)

    def session_of(self, request: Any) -> str | None:
        """The session of a push, also if an old SuperNode names none; None if only others await the object."""
        if request.session_id or self._placer is None:
            return str(request.session_id)
        return self._placer.session_of(request.object_id, request.node.node_id)

    def check_size(self, nbytes: int) -> str | None:
        """The reason why an object of this size is refused, or None."""
        if nbytes > self._max_object_bytes:
            return (
                f"an object of {nbytes:,} bytes was announced, this server takes {self._max_object_bytes:,}: give it "
                "--lifl-max-object, or send smaller chunks"
            )
        return None


def _is_done(ask: Callable[[], bool]) -> bool:
    """True if one that waited for room waits no longer; one that fails is not asked again."""
    try:
        return ask()
    except Exception as error:
        _server.log(ERROR, "an upload that waited for room has failed: %r", error)
        return True


def _of(kind: Callable[..., Any], api: str) -> Callable[..., Any]:
    return lambda *args: kind(*args, api=api)


def _is_protobuf(headers: list[tuple[bytes, bytes]]) -> bool:
    """True if the request has one content type, protobuf's. Others are refused by Flower's middleware."""
    kinds = [value for name, value in headers if name == b"content-type"]
    return len(kinds) == 1 and kinds[0].partition(b";")[0].strip().lower() == _names.MEDIA_TYPE.encode()
