"""The spawner, a clean process that forks workers, and the owner's handle on it.

The owner is not forked: it has threads (Flower, Jupyter), and a fork copies their locks in the state of the moment.
`spawn` is not used: it imports the user's main module again, which a script without a ``__main__`` guard, a notebook
and a ServerApp do not survive. So the owner executes a small program that imports only lifl's worker and has one
thread, and that program forks with `multiprocess`. The start of a worker then takes milliseconds.

No process outlives its owner: the owner's end of a socket closes when the owner ends, however it ends, and the spawner
then ends its workers. If the spawner is killed, the kernel kills its workers.

A worker begins when the owner has its pidfd and has confirmed that. A worker that the owner does not know, because the
spawner was killed or the owner was interrupted meanwhile, ends before it touches shared memory: no two processes are
ever the same participant.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from lifl.errors import PeerGoneError

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from lifl.workers.spawner import main; main(*map(int, sys.argv[2:]))"
)
START_TIMEOUT_S = 60.0
"""The time for the first answer of a Node's first spawner: its files may come from a slow disk, and no round waits."""
FORK_TIMEOUT_S = 10.0
"""The time for a later answer. A fork takes milliseconds: a spawner that is silent for so long is stopped or stuck."""
STOP_GRACE_S = 0.2
KILL_TIMEOUT_S = 5.0
"""The time for the end of a killed process. It is gone at once, unless it waits for a device in the kernel."""


class Spawner:
    """The owner's handle on a spawner: starts workers, knows whether the spawner lives, ends it with its workers.

    Raises :class:`PeerGoneError` if the process cannot be made.
    """

    def __init__(self, arena_fd: int, bell_fd: int, spin_s: float, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._start_timeout_s = start_timeout_s
        self._has_answered = False
        self._number = 0
        self._is_closed = False
        fds = (theirs.fileno(), arena_fd, bell_fd)
        # One BLAS thread: NumPy would start one for each core at import, and a process with threads must not fork.
        # Workers do not use BLAS.
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # Only strings: Python ignores anything else on its path. -P keeps the working directory off the path.
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        numbers = (*fds, int(spin_s * 1e9), os.getpid())
        command = [sys.executable, "-P", "-c", BOOT, path, *map(str, numbers)]
        # A process group of its own: a Ctrl-C in the terminal reaches only the owner, from the first instruction on.
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, env=env, process_group=0
                )
            except OSError as error:
                self._socket.close()
                raise PeerGoneError(f"{sys.executable!r} cannot be run to start workers: {error}") from error
        try:
            # A pidfd, because a wait by pid shows nothing if the program was started with SIGCHLD ignored.
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            raise PeerGoneError(f"no pidfd of the process that starts workers: {error}") from error

    def start_worker(self, participant: int, socket_fd: int | None = None) -> tuple[int, int]:
        """Starts the worker that is this participant; returns its pid and its pidfd, which the caller closes.

        The worker gets a copy of the socket, if there is one; besides, only the caller keeps one. Raises
        :class:`PeerGoneError` if the spawner cannot start it; :attr:`is_gone` is true if it never will. A spawner that
        gives no answer in time is killed, and its workers with it.
        """
        self._number += 1
        given = [] if socket_fd is None else [socket_fd]
        self._send({"start": participant}, given)
        answer, fds = self._receive()
        if not fds:
            self._send({"drop": participant})  # without its pidfd the worker is of no use
            reason = answer.get("error")
            if reason is None:
                raise PeerGoneError("no descriptor is left for a worker's pidfd: raise the limit (ulimit -n)")
            raise PeerGoneError(f"the process that starts workers could not start one: {reason}")
        with contextlib.suppress(PeerGoneError):  # if the spawner died, so did the worker: its pidfd will show it
            self._send({"go": participant})
        return int(answer["pid"]), fds[0]

    def _send(self, what: dict[str, int], given: list[int] | None = None) -> None:
        try:
            data = json.dumps(what | {"number": self._number}).encode()
            socket.send_fds(self._socket, [data], given or [], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._lost(str(error)) from error

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        """The answer to the last request, and the file descriptor that came with it."""
        # The first answer includes the start of the interpreter.
        timeout_s = FORK_TIMEOUT_S if self._has_answered else self._start_timeout_s
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = poll.poll(left * 1000)
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 256, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                if any(fd == self._pidfd for fd, _ in ready):  # its end of the socket may be open in a fork of it
                    raise self._lost("it is dead") from None
                continue
            except OSError as error:
                raise self._lost(str(error)) from error
            if not data:
                raise self._lost("it closed its end")
            answer = json.loads(data)
            if answer["number"] == self._number:
                self._has_answered = True
                return answer, fds
            for fd in fds:  # an old answer: Ctrl-C had ended the wait for it
                os.close(fd)
        self.kill()
        raise PeerGoneError(
            f"the process that starts workers (pid {self.pid}) gave no answer for {timeout_s:g} s and was killed"
        )

    def _lost(self, how: str) -> PeerGoneError:
        self.kill()
        status = self._process.returncode
        if status and status > 0:  # 0 may also mean that another part of the program has reaped it
            how = f"it ended with status {status}, see its output above"
        elif status:
            how = f"it was killed by signal {-status}"
        return PeerGoneError(f"the process that starts workers (pid {self.pid}) is gone: {how}")

    @property
    def pid(self) -> int:
        """The process id of the spawner."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """True when the spawner is dead or was ended: it starts no more workers, and those that it had die with it."""
        if self._is_closed:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Ends the spawner and all its workers; returns when they are gone. Harmless when closed."""
        self._end(STOP_GRACE_S + 3)

    def kill(self) -> None:
        """Kills the spawner; the kernel then kills its workers. Harmless when closed."""
        self._end(0.0)

    def _end(self, grace_s: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        # A close alone is not enough: a fork of the user's process may hold a copy of the socket.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(grace_s * 1000):
            signal.pidfd_send_signal(
                self._pidfd, signal.SIGKILL
            )  # its workers go with it, by their parent-death signal
            poll.poll(KILL_TIMEOUT_S * 1000)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0)
        os.close(self._pidfd)


# ---------------------------------------------------------------- in the spawner's process


class _Workers:
    """The workers that were forked here. The youngest waits at a gate, a pipe, until the owner knows it."""

    def __init__(self, selector: selectors.BaseSelector, begin: Callable[[int, list[int]], None]) -> None:
        import multiprocess

        self._context = multiprocess.get_context("fork")
        self._selector = selector
        self._begin = begin
        self._all: list[Any] = []
        self._gate: int | None = None

    def start(self, participant: int, given: list[int]) -> tuple[int, int]:
        """Forks a worker; returns its pid and its pidfd. Raises OSError if no descriptor or no process is left."""
        self.open_gate(is_known=False)
        way_in, self._gate = os.pipe()
        try:
            worker = self._context.Process(
                target=self._wait_at, args=(way_in, self._gate, participant, given), daemon=True
            )
            worker.start()
        finally:
            os.close(way_in)
        self._all.append(worker)
        self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)
        return worker.pid, os.pidfd_open(worker.pid)

    def _wait_at(self, way_in: int, gate: int, participant: int, given: list[int]) -> None:
        os.close(gate)
        if os.read(way_in, 1):  # nothing to read: the worker is not wanted, or its parent is dead
            os.close(way_in)
            self._begin(participant, given)

    def open_gate(self, is_known: bool) -> None:
        """Lets the youngest worker begin if the owner knows it, else end. Harmless when it has begun."""
        gate, self._gate = self._gate, None
        if gate is None:
            return
        if is_known:
            with contextlib.suppress(BrokenPipeError):  # the worker was killed before it began
                os.write(gate, b"!")
        os.close(gate)

    def reap(self, worker: Any) -> None:
        """Releases a worker that has ended."""
        self._selector.unregister(worker.sentinel)
        worker.join()
        worker.close()  # closes its descriptors: there may be thousands of workers, one after another
        self._all.remove(worker)

    def end(self) -> None:
        """Waits a moment for workers that got a STOP, all of them together; kills the rest.

        Nothing is lost: no owner is left that could ask for what they hold.
        """
        self.open_gate(is_known=False)
        deadline = time.monotonic() + STOP_GRACE_S
        for worker in self._all:
            worker.join(max(0.0, deadline - time.monotonic()))
        for worker in self._all:
            if worker.exitcode is None:
                worker.kill()
        for worker in self._all:
            worker.join()


def main(socket_fd: int, arena_fd: int, bell_fd: int, spin_ns: int, owner_pid: int) -> None:
    """Forks workers as asked, until the owner is gone or closes its end of the socket; then ends them."""
    # The owner may have been started with SIGCHLD ignored: the kernel would reap the workers, and a wait would fail.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from lifl.workers import aggregator

    control = socket.socket(fileno=socket_fd)
    parent = os.getpid()

    def begin(participant: int, given: list[int]) -> None:
        control.close()  # an open copy in a worker would hide from the owner that the spawner is dead
        aggregator.main(arena_fd, bell_fd, participant, spin_ns / 1e9, parent, *given)

    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        return
    with selectors.DefaultSelector() as selector:
        workers = _Workers(selector, begin)
        selector.register(control, selectors.EVENT_READ)
        # The socket alone does not show the owner's death: a fork of the owner may hold a copy of its end.
        selector.register(owner, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == owner:
                    workers.end()
                    return
                if key.fileobj is not control:
                    workers.reap(key.data)
                elif not obey(control, workers):
                    workers.end()
                    return


def obey(control: socket.socket, workers: _Workers) -> bool:
    """Does what the owner asks for next; false if the owner has closed its end."""
    data, given, flags, _ = socket.recv_fds(control, 256, 1)
    if not data:
        return False
    request = json.loads(data)
    if "start" not in request:
        workers.open_gate(is_known="go" in request)
        return True
    number = {"number": request["number"]}
    try:
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if given:
            import lifl.ebpf.links  # noqa: F401 - once, here: in each worker the import would take as long as the fork
        pid, pidfd = workers.start(request["start"], given)
    except OSError as error:  # no descriptor or no process is left; the other workers go on
        answer(control, number | {"error": str(error)})
        return True
    finally:
        for fd in given:  # no copy stays here: the worker's socket must end with the worker
            os.close(fd)
    answer(control, number | {"pid": pid}, pidfd)
    os.close(pidfd)
    return True


def answer(control: socket.socket, reply: dict[str, Any], *fds: int) -> None:
    """Sends an answer to the owner. If the owner is gone, the wait for its next request notices that."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(control, [json.dumps(reply).encode()], fds)
