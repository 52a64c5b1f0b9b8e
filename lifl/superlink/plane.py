"""The data plane of a server: arena, workers, store, rounds and gateway, put into Flower's app.

The wiring room of ``lifl.superlink``. Owns the parts that it starts, and ends them. A part for which Flower lacks a
name is left out, and the rest goes on without it.
"""

from __future__ import annotations

import asyncio
import os
import time
from logging import ERROR, WARNING
from typing import TYPE_CHECKING, Any

from lifl import ipc
from lifl.monitor.stats import SuperlinkStats
from lifl.node.node import Node
from lifl.superlink import flower, patches
from lifl.superlink.flower import MissingNameError
from lifl.superlink.http.long_poll import LongPolls
from lifl.superlink.resumption import resume
from lifl.superlink.store.store import ArenaStore, DurableStore

if TYPE_CHECKING:
    from lifl.superlink.app_socket import AppSocket
    from lifl.superlink.rounds.rounds import Rounds


class Plane:
    """Everything of lifl's in a server process.

    Parameters
    ----------
    config : SuperLinkLifespanConfig
        Flower's settings.
    node : Node
        Its arena and workers; closed with the plane, and if the plane cannot be made.
    max_object_bytes : int
        A larger object is refused.
    hold_s : float
        See :class:`lifl.superlink.http.long_poll.LongPolls`.

    Attributes
    ----------
    app : fastapi.FastAPI
        Flower's app, its store replaced.
    protocol : type or str
        The class of connections, or the name of uvicorn's own, for uvicorn.
    left_out : list of str
        The reasons why Flower does a part itself.

    Raises
    ------
    MissingNameError
        If Flower has not even the names that the store needs.
    """

    def __init__(self, config: Any, node: Node, max_object_bytes: int, hold_s: float) -> None:
        self.node = node
        self.left_out: list[str] = []
        self.rounds: Rounds | None = None
        self.app_socket: AppSocket | None = None
        self.socket_path: str | None = None  # once it listens
        self.protocol: Any = "auto"
        self._connections: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._verifier = "Flower"
        self._port = config.port
        try:
            is_durable = config.database != flower.part("store").IN_MEMORY
            self.store = DurableStore(config.database) if is_durable else ArenaStore()
            self.long_polls = LongPolls(hold_s)
            self.app = self._create_app(flower.part("server"), config)
            self._try(self._add_rounds)
            self._try(lambda: self._add_gateway(max_object_bytes))
            node.watch.superlink = self.stats
        except BaseException:
            self.node.close()
            raise

    def _try(self, add: Any) -> None:
        """Adds a part, or leaves it out: without Flower's names its modules raise when `add` imports them."""
        try:
            add()
        except MissingNameError as error:
            self.left_out.append(str(error))

    def _create_app(self, names: Any, config: Any) -> Any:
        plane = self

        class Lifespan(names.Lifespan):  # type: ignore[misc]
            """Flower's lifespan, and that of lifl's socket."""

            def startup(self) -> None:
                # Before Flower starts its programs, which inherit the variable.
                plane.startup()
                super().startup()

            def shutdown(self) -> None:
                super().shutdown()
                if plane.app_socket is not None:
                    plane.app_socket.close()

        with patches.replaced_store(names.main, self.store):
            return names.create_app(config, Lifespan)

    def _add_rounds(self) -> None:
        from lifl.superlink.announcements import guarded
        from lifl.superlink.app_socket import AppSocket
        from lifl.superlink.rounds.rounds import Rounds

        patches.replace_push_messages(flower.part("gateway").fleet, guarded)
        self.rounds = Rounds(self.node, self.store, self.long_polls)
        state = self.app.state.linkstate_factory.state()
        # Both change methods of the state. The rounds come last, so that they see what is really stored.
        if isinstance(self.store, DurableStore):
            resume(state, self.store)
        self.rounds.attach(state)
        self.app_socket = AppSocket(self.rounds, self.node.arena.fd)

    def _add_gateway(self, max_object_bytes: int) -> None:
        from lifl.superlink.http.checks import why_not
        from lifl.superlink.http.gateway import Gateway
        from lifl.superlink.http.protocol import protocol_of
        from lifl.superlink.http.signatures import hasten

        if (reason := why_not(self.app)) is not None:
            self.left_out.append(reason)
            return
        self._verifier = patches.replace_signature_checks(flower.part("gateway").node_auth, hasten)
        self.gateway = Gateway(self.app, self.store, self.node.arena, self.rounds, self.long_polls, max_object_bytes)
        self.protocol = self._connections = protocol_of(self.gateway)
        self.gateway.relieve = self.relieve
        if self.rounds is not None:
            self.rounds.relieve = self._relieve_soon

    def startup(self) -> None:
        """Opens the socket and begins to look for slow peers; in the loop, before requests come."""
        loop = self._loop = asyncio.get_running_loop()
        self.long_polls.loop = loop
        if self.app_socket is not None:
            try:
                path = ipc.path_for(self._port)
                self.app_socket.listen(path)
                self.socket_path = os.environ[ipc.VARIABLE] = str(path)
            except OSError as error:
                log = flower.part("server").log
                log(WARNING, "ServerApps on this machine fold their rounds themselves: %s", error)
        if self._connections is not None:
            self._sweep(loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives up peers that are too slow, now and again after a while."""
        from lifl.superlink.http.protocol import STALL_S
        from lifl.superlink.http.rates import look_s

        loop.call_later(look_s(STALL_S), self._sweep, loop)  # first: a look that fails must not be the last
        now_s = time.monotonic()
        for connection in list(self._connections.open):
            try:
                connection.give_up_if_stalled(now_s)
            except Exception as error:
                flower.part("server").log(ERROR, "a connection that cannot be looked at is ended: %r", error)
                connection.transport.abort()
        self.gateway.look(now_s)

    def relieve(self) -> bool:
        """Frees memory of the arena that slow readers hold, for others that wait; in the loop."""
        from lifl.superlink.http.relief import relieve

        return relieve(self._connections.open)

    def _relieve_soon(self) -> None:
        """Has the loop do :meth:`relieve`. Any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.relieve)

    def count_bytes(self) -> dict[str, int]:
        """Bytes that came in through the gateway, that were copied once more in this process, and that went out."""
        if self._connections is None:
            return {}
        gateway = self.gateway
        counts = {"received": gateway.received_bytes, "copied": gateway.copied_bytes, "sent": gateway.sent_bytes}
        if self.rounds is not None:
            counts["copied"] += self.rounds.copied_bytes
        return counts

    def stats(self) -> SuperlinkStats:
        """The server's figures beside those of its Node. Any thread; a database is not asked."""
        counts, rounds = self.count_bytes(), self.rounds
        return SuperlinkStats(
            received_bytes=counts.get("received", 0),
            sent_bytes=counts.get("sent", 0),
            copied_bytes=counts.get("copied", 0),
            uploads=0 if self._connections is None else self.gateway.uploads,
            objects=None if self.store.is_durable else len(self.store),
            held_requests=self.long_polls.held,
            messages=0 if rounds is None else rounds.messages,
            replies=0 if rounds is None else rounds.replies,
        )

    def close(self) -> None:
        """Ends the workers and gives the memory back."""
        if self.app_socket is not None:
            self.app_socket.close()
        if self.rounds is not None:
            self.rounds.close()
        self.store.close()
        self.node.close()

    def __str__(self) -> str:
        parts = [
            f"arena {self.node.arena.block_bytes / 2**20:,.0f} MiB",
            f"{self.node.workers} workers",
            f"transport {self.node.transport.name}",
            "objects in the database" if self.store.is_durable else "objects in memory",
        ]
        if self._connections is not None:
            parts.append(f"signatures checked by {self._verifier}")
        if (address := self.node.metrics_address) is not None:
            parts.append(f"metrics at http://{address}/metrics")
        if self.socket_path is not None:
            parts.append(f"ServerApps on this machine at {self.socket_path}")
        return ", ".join(parts)
