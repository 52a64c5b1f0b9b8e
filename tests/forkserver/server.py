"""The fork server: ``python server.py LISTENER NAME=MODULE:FUNCTION ...``. It ends when its standard input is closed.

It never does more than import, so that a child is a process that has just imported its program. One thread.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import marshal
import os
import resource
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_REQUEST = 1 << 20
PRELOADED = ("flwr.supernode.runtime.run_clientapp", "flwr.superlink.runtime.run_serverapp", "lifl.strategy")
"""Imported besides the programs' own modules: their apps import them."""


class Server:
    """The children, each with the connection of its shim."""

    def __init__(self, listener: socket.socket) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._end)
        self._listener = listener
        self._children: dict[socket.socket, tuple[int, int]] = {}  # shim -> process id, pidfd
        self._is_child: tuple[Any, ...] | None = None

    def serve(self) -> tuple[Any, ...]:
        """Returns in a child only: with the request."""
        while self._is_child is None:
            # The dead first: a program that is started again finds its port free.
            for key, _ in sorted(self._selector.select(), key=lambda ready: ready[0].fileobj not in self._children):
                key.data(key.fileobj)
                if self._is_child is not None:
                    break
        return self._is_child

    def _accept(self, listener: socket.socket) -> None:
        shim, _ = listener.accept()
        self._selector.register(shim, selectors.EVENT_READ, self._hear)

    def _hear(self, shim: socket.socket) -> None:
        try:
            request, fds, _, _ = socket.recv_fds(shim, MAX_REQUEST, 3)
        except ConnectionResetError:
            request, fds = b"", []
        if not request:
            self._gone(shim)
        elif pid := os.fork():
            for fd in fds:
                os.close(fd)
            pidfd = os.pidfd_open(pid)
            self._children[shim] = pid, pidfd
            self._selector.register(pidfd, selectors.EVENT_READ, lambda _: self._ended(shim))
            with contextlib.suppress(OSError):
                shim.send(str(pid).encode())
        else:
            for fd in sorted(self._selector.get_map()):
                if fd:
                    os.close(fd)
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
                os.close(fd)
            self._is_child = marshal.loads(request)

    def _gone(self, shim: socket.socket) -> None:
        """The shim was killed, or never asked."""
        if shim in self._children:
            os.kill(self._children[shim][0], signal.SIGKILL)
            self._ended(shim)
        else:
            self._selector.unregister(shim)
            shim.close()

    def _ended(self, shim: socket.socket) -> None:
        if shim not in self._children:  # it was killed with its shim
            return
        pid, pidfd = self._children.pop(shim)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._selector.unregister(pidfd)
        os.close(pidfd)
        self._selector.unregister(shim)
        with contextlib.suppress(OSError):
            shim.send(str(status).encode())
        shim.close()

    def _end(self, _: int) -> None:
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)
        for pid, _ in self._children.values():
            os.waitpid(pid, 0)
        os._exit(0)


def become(request: tuple[Any, ...], programs: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
    """Makes this child what the shim is, and returns the function that it is to run."""
    name, arguments, environment, folder, limits = request
    for number, limit in limits.items():
        resource.setrlimit(number, limit)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    sys.argv = [name, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=bool(environment.get("PYTHONUNBUFFERED")))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # the module's generator, which all children would have alike
    return programs[name]


def main() -> Any:
    """Imports, serves, and in a child runs its program."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    sys.path.append(str(Path(__file__).parents[1] / "process"))
    entries = dict(one.split("=") for one in sys.argv[2:])
    for module in (*PRELOADED, *(entry.partition(":")[0] for entry in entries.values())):
        importlib.import_module(module)
    programs = {name: entry.split(":") for name, entry in entries.items()}
    functions = {name: getattr(importlib.import_module(module), of) for name, (module, of) in programs.items()}
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # a child's collections would copy every page
    return become(Server(listener).serve(), functions)()


if __name__ == "__main__":
    sys.exit(main())
