"""The data plane of one server: arena, workers, store, gateway and rounds, put into Flower's app.

The wiring room of ``lifl.superlink``. Owns what it starts, and ends it.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from lifl import wire
from lifl.runtime import Node, cores
from lifl.superlink import flower
from lifl.superlink.agency import Agency
from lifl.superlink.gateway import Gateway
from lifl.superlink.holding import Holding
from lifl.superlink.protocol import STALL_S, protocol_of
from lifl.superlink.rounds import Rounds
from lifl.superlink.signatures import hasten
from lifl.superlink.store import ArenaStore, DurableStore


class Plane:
    """Everything of lifl's in one server process.

    Parameters
    ----------
    config : SuperLinkLifespanConfig
        Flower's.
    memory : int
        Bytes of the arena.
    workers : int or None
        See :class:`lifl.Node`.
    max_object_bytes : int
    hold_s : float
        See :class:`lifl.superlink.holding.Holding`.

    Attributes
    ----------
    app : fastapi.FastAPI
        Flower's app, its store replaced.
    protocol : type
        For uvicorn.
    """

    def __init__(self, config: Any, memory: int, workers: int | None, max_object_bytes: int, hold_s: float) -> None:
        names, stores = flower.part("server"), flower.part("store")
        # Before anything that starts a thread.
        self.node = Node(memory, workers)
        try:
            self._is_durable = config.database != stores.IN_MEMORY
            self.store = DurableStore(config.database) if self._is_durable else ArenaStore()
            self.holding = Holding(hold_s)
            self.rounds = Rounds(self.node, self.store, self.holding)
            self.agency = Agency(self.rounds, self.node.arena.fd)
            self._port = config.port
            self._verifier = hasten(flower.part("gateway").node_auth)
            self.app = self._create_app(names, config)
            self.rounds.attach(self.app.state.linkstate_factory.state())
            gateway = Gateway(
                self.app, self.store, self.node.arena, self.rounds, self.holding, max_object_bytes
            )
            self.gateway = gateway
            self.protocol = protocol_of(gateway)
        except BaseException:
            self.node.close()
            raise

    def _create_app(self, names: Any, config: Any) -> Any:
        plane = self

        class Lifespan(names.Lifespan):  # type: ignore[misc]
            """Flower's, and our socket's."""

            def startup(self) -> None:
                # Before the programs that it starts, which inherit the variable.
                plane.startup()
                super().startup()

            def shutdown(self) -> None:
                super().shutdown()
                plane.agency.close()

        module, original = names.main, names.main.get_objectstore_linkstate_factories

        def with_our_store(*args: Any) -> Any:
            objects, states = original(*args)
            objects.store_instance = self.store
            return objects, states

        module.get_objectstore_linkstate_factories = with_our_store
        try:
            return names.create_app(config, Lifespan)
        finally:
            module.get_objectstore_linkstate_factories = original

    def startup(self) -> None:
        """In the loop, before requests come."""
        loop = asyncio.get_running_loop()
        self.holding.loop = loop
        path = wire.path_for(self._port)
        self.agency.listen(path)
        os.environ[wire.VARIABLE] = str(path)
        self._sweep(loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Looks for uploads that have stalled."""
        now_s = time.monotonic()
        for connection in list(self.protocol.busy):
            connection.give_up_if_stalled(now_s)
        loop.call_later(STALL_S / 8, self._sweep, loop)

    def close(self) -> None:
        """Ends the workers and gives the memory back."""
        self.agency.close()
        self.rounds.close()
        self.store.close()
        self.node.close()

    def __str__(self) -> str:
        memory = self.node.arena.block_bytes
        workers = cores() if self.node.workers is None else self.node.workers
        kept = "kept in the database" if self._is_durable else "in memory"
        return (
            f"arena {memory / 2**20:,.0f} MiB, {workers} workers, transport rings; objects {kept}; signatures: {self._verifier}; "
            f"ServerApps on this machine: {wire.path_for(self._port)}"
        )
