"""The clean process from which workers are forked, and the agent's handle on it.

Why not fork the agent: it has threads (Flower, Jupyter), and a fork copies their locks as they happen to
be. Why not `spawn`: it imports the user's main module again, which a script without a ``__main__`` guard,
a notebook and a ServerApp do not survive. So the agent executes one small program that imports only
lifl's worker, and that, single-threaded, forks with `multiprocess`. A worker costs milliseconds then.

Who dies with whom: the agent's end of a socket closes when it ends, however it ends, and the nursery
then ends its workers; the kernel kills the workers if the nursery is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from lifl.errors import PeerGoneError

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from lifl.nursery import main; main(*map(int, sys.argv[2:]))"
)
START_TIMEOUT_S = 60.0
STOP_GRACE_S = 0.2


class Nursery:
    """The agent's handle: starts workers, is told of their death, ends them."""

    def __init__(self, arena_fd: int, bell_fd: int, spin_s: float) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_TIMEOUT_S)
        fds = (theirs.fileno(), arena_fd, bell_fd)
        # One BLAS thread: NumPy would start one per core at import, and a process with threads must
        # not fork. Workers do not use BLAS.
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # Only strings: Python ignores anything else on its path. -P keeps the working directory off it.
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        numbers = (*fds, int(spin_s * 1e9), os.getpid())
        command = [sys.executable, "-P", "-c", BOOT, path, *map(str, numbers)]
        # A process group of its own: Ctrl-C in the terminal is the agent's business, from the first
        # instruction on.
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, env=env, process_group=0
                )
            except OSError as error:
                self._socket.close()
                raise PeerGoneError(f"{sys.executable!r} cannot be run to start workers: {error}") from error

    def start_worker(self, me: int, socket_fd: int | None = None) -> tuple[int, int]:
        """Forks the worker that is participant `me`; its pid and a pidfd of it, which the caller closes.

        It gets a copy of the socket, if there is one, and nobody else keeps one but the caller. Raises
        :class:`PeerGoneError` if the nursery cannot.
        """
        try:
            given = [] if socket_fd is None else [socket_fd]
            socket.send_fds(self._socket, [json.dumps({"start": me}).encode()], given)
            data, fds, _, _ = socket.recv_fds(self._socket, 256, 1)
        except OSError as error:
            raise PeerGoneError(f"the process that starts workers is gone: {error}") from error
        if not fds and (reason := json.loads(data or b"{}").get("error")):
            raise PeerGoneError(f"the process that starts workers could not start one: {reason}")
        if not fds and data:
            raise PeerGoneError("no descriptor is left for a worker's pidfd: raise the limit (ulimit -n)")
        if not fds:
            code = self._process.poll()
            raise PeerGoneError(f"the process that starts workers ended with status {code}: see its output above")
        return int(json.loads(data)["pid"]), fds[0]

    @property
    def pid(self) -> int:
        """The nursery's process id."""
        return self._process.pid

    def close(self) -> None:
        """Ends the nursery and with it every worker; returns when they are gone."""
        # Not only closed: a fork of the user's process may hold a copy.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(STOP_GRACE_S + 3)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers go with it, by their parent-death signal
            self._process.wait()


# ---------------------------------------------------------------- in the clean process


def main(socket_fd: int, arena_fd: int, bell_fd: int, spin_ns: int, agent_pid: int) -> None:
    """Forks workers as asked until the agent is gone or closes its end of the socket, then ends them."""
    import multiprocess

    from lifl import aggregator

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=socket_fd)
    context = multiprocess.get_context("fork")
    workers: list[Any] = []
    parent = os.getpid()

    def child(me: int, given: list[int]) -> None:
        control.close()  # else the agent's death would go unnoticed while a worker lives
        aggregator.main(arena_fd, bell_fd, me, spin_ns / 1e9, parent, *given)

    try:
        agent = os.pidfd_open(agent_pid)
    except ProcessLookupError:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        # The socket alone does not tell: a fork of the agent may hold a copy of its end.
        selector.register(agent, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == agent:
                    end(workers)
                    return
                if key.fileobj is not control:  # a worker ended: reap it
                    selector.unregister(key.fileobj)
                    key.data.join()
                    key.data.close()  # its descriptors: there may be thousands of workers, one after another
                    workers.remove(key.data)
                    continue
                request, given, _, _ = socket.recv_fds(control, 256, 1)
                if not request:
                    end(workers)
                    return
                if given:
                    import lifl.ebpf.links  # noqa: F401 - once, here: in each worker it would take as long as the fork
                worker = context.Process(target=child, args=(json.loads(request)["start"], given), daemon=True)
                try:
                    try:
                        worker.start()
                    finally:
                        for fd in given:  # its socket is to be gone when it is
                            os.close(fd)
                    workers.append(worker)
                    selector.register(worker.sentinel, selectors.EVENT_READ, worker)
                    pidfd = os.pidfd_open(worker.pid)
                except OSError as error:  # no descriptor or no process is left; the other workers go on
                    control.send(json.dumps({"error": str(error)}).encode())
                    continue
                socket.send_fds(control, [json.dumps({"pid": worker.pid}).encode()], [pidfd])
                os.close(pidfd)


def end(workers: list[Any]) -> None:
    """Waits a moment for workers that were told to stop, all of them together; kills the rest.

    Nothing is lost by that: nobody is left who could ask for what they hold.
    """
    deadline = time.monotonic() + STOP_GRACE_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.exitcode is None:
            worker.kill()
    for worker in workers:
        worker.join()
