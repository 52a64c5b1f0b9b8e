"""A lifl-superlink in this process, on a real socket, so that tests can look into its store, arena and rounds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from flwr.proto import message_pb2, node_pb2
from flwr.superlink.grid.http_grid import HttpGrid

from lifl import wire
from lifl.superlink import flower
from lifl.superlink.caller import Caller, Identity
from lifl.superlink.plane import Plane

HOST = "127.0.0.1"
UNIT = 65536


class Rig:
    """One server. ``plane`` has its parts."""

    def __init__(
        self,
        memory: str = "64MiB",
        workers: int = 1,
        *,
        database: str | None = None,
        hold_s: float = 0.0,
        max_object: int = 2**26,
        arguments: tuple[str, ...] = ("--insecure",),
        port: int | None = None,
    ) -> None:
        if port is None:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port = probe.getsockname()[1]
        names = flower.part("server")
        # Flower reads the command line; nothing is started in a process of its own.
        line = ["lifl-superlink", *arguments, "--isolation", "process", "--host", HOST, "--port", str(port)]
        if database is not None:
            line += ["--database", database]
        before, sys.argv = sys.argv, line
        try:
            config = names.parse_config()
        finally:
            sys.argv = before
        from lifl.sizes import parse_bytes

        self.address, self.port = f"{HOST}:{port}", port
        self.plane = Plane(config, parse_bytes(memory), workers, max_object, hold_s)
        self.config = config
        settings = uvicorn.Config(
            self.plane.app,
            host=HOST,
            port=port,
            http=self.plane.protocol,
            loop="asyncio",
            log_level="warning",
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), name="rig")
        self._variable = os.environ.get(wire.VARIABLE)

    def __enter__(self) -> Rig:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self._server.started, "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        engine = getattr(self.state, "_engine", None)  # Flower closes it with the process
        self.plane.close()
        if engine is not None:
            engine.dispose()
        if self._variable is None:
            os.environ.pop(wire.VARIABLE, None)
        else:
            os.environ[wire.VARIABLE] = self._variable
        assert not self._thread.is_alive(), "the server did not stop"

    # ------------------------------------------------------------ what it has

    @property
    def state(self) -> Any:
        """Flower's LinkState."""
        return self.plane.app.state.linkstate_factory.state()

    @property
    def store(self) -> Any:
        """The object store."""
        return self.plane.store

    @property
    def used_bytes(self) -> int:
        """Of the arena."""
        return self.plane.node.used_bytes

    def settle(self, used_bytes: int = 0, timeout: float = 10.0) -> None:
        """Waits until no more than so much of the arena is in use; fails if it stays more."""
        import gc

        deadline = time.monotonic() + timeout
        while self.used_bytes > used_bytes and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert self.used_bytes <= used_bytes, f"{self.used_bytes:,} bytes of the arena are not given back"

    # ------------------------------------------------------------ who uses it

    def start_run(self) -> tuple[int, str]:
        """A running run, and the token of its ServerApp."""
        from flwr.common.constant import NOOP_FLWR_AID
        from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
        from flwr.supercore.fab import Fab

        content = b"no app: virtual nodes run none"
        fab_hash = self.state.store_fab(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        run_id = self.state.create_run(
            "a/b", "1.0.0", fab_hash, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id = self.state.get_run_info(run_ids=[run_id])[0].primary_task_id
        token = self.state.claim_task(task_id)
        assert token is not None
        assert self.state.activate_task(task_id)
        return run_id, token

    @contextlib.contextmanager
    def grid(self, run_id: int, token: str) -> Iterator[HttpGrid]:
        """Flower's own grid, as the ServerApp of a run has it."""
        from flwr.supercore.task_identity import TaskIdentity

        grid = HttpGrid(self.address, insecure=True, token=token)
        run = self.state.get_run_info(run_ids=[run_id])[0]
        grid.set_run(run)
        before = TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = run_id, run.primary_task_id, 1
        try:
            yield grid
        finally:
            TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before
            grid.close()

    def node(self) -> Node:
        """A registered SuperNode, which does only what it is told."""
        return Node(self.address)


class Node:
    """One SuperNode's identity and connection."""

    def __init__(self, address: str) -> None:
        from flwr.proto import fleet_pb2

        self.identity, self.stop = Identity(), threading.Event()
        self.caller = Caller(address, self.identity, self.stop)
        self.address = address
        key = self.identity.public_key
        self.say("register-node", fleet_pb2.RegisterNodeFleetRequest(public_key=key))
        _, body = self.say("activate-node", fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=300))
        self.id = fleet_pb2.ActivateNodeResponse.FromString(body).node_id
        self.proto = node_pb2.Node(node_id=self.id)

    def say(self, route: str, message: Any) -> tuple[int, bytes]:
        """One call; its status and body."""
        return self.caller.call(f"/v1/fleet/{route}", message.SerializeToString(deterministic=True))

    def push(self, run_id: int, session_id: str, object_id: str, content: bytes) -> bool:
        """Pushes an object; whether it was stored."""
        request = message_pb2.PushObjectRequest(
            node=self.proto, run_id=run_id, object_id=object_id, object_content=content, session_id=session_id
        )
        status, body = self.say("push-object", request)
        assert status == 200, (status, body)
        return bool(message_pb2.PushObjectResponse.FromString(body).stored)

    def pull(self, run_id: int, object_id: str) -> Any:
        """Pulls an object."""
        request = message_pb2.PullObjectRequest(node=self.proto, run_id=run_id, object_id=object_id)
        status, body = self.say("pull-object", request)
        assert status == 200, (status, body)
        return message_pb2.PullObjectResponse.FromString(body)

    def raw(self) -> socket.socket:
        """A connection of its own, for what no client does."""
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), 10)

    def head(self, route: str, length: int, api: str = "fleet") -> bytes:
        """The head of a request."""
        return (
            f"POST /v1/{api}/{route} HTTP/1.1\r\nhost: x\r\n{self.identity.headers()}content-length: {length}\r\n\r\n"
        ).encode()

    def close(self) -> None:
        """Closes the connection."""
        self.stop.set()
        self.caller.close()
