"""The ways to pass a message through sockets: lifl's sidecar, a Unix socket, and a process between two of these.

As in ``lifl.bench.pair``, each way is set up in the asking process and forks the process that answers.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from lifl.bench.echo import ASKER, ECHO, PAYLOAD, Measure, forked, timed
from lifl.ebpf.links import Receiver, ends_of
from lifl.ebpf.sidecar import Sidecar
from lifl.shm.arena import Arena
from lifl.shm.ring import IDLE_WAIT_S, Descriptor, Kind

PING, END = Descriptor(Kind.UPDATE, 1), Descriptor(Kind.STOP, 0)


@contextmanager
def sidecar() -> Iterator[Measure]:
    """lifl's sockets, whose records lifl's program in the kernel moves and counts; a receiver sleeps in poll(2)."""
    arena = Arena.create(1, 2)
    launcher = Sidecar(arena)
    fd, link = arena.fd, launcher.admit(ECHO)

    def receive(inbox: Receiver) -> Descriptor:
        while (item := inbox.try_pop()) is None:
            inbox.wait(0.0, IDLE_WAIT_S)
        return item[1]

    def echo() -> None:
        inbox, back = ends_of(Arena.attach(fd), link, ECHO)
        while (descriptor := receive(inbox)).kind != Kind.STOP:
            back.push(ASKER, descriptor)

    with forked(echo):
        inbox, there = launcher.inbox(ASKER), launcher.outbox(ASKER)

        def trip() -> None:
            there.push(ECHO, PING)
            receive(inbox)

        yield lambda messages: timed(trip, messages)
        there.push(ECHO, END)
    launcher.close()


@contextmanager
def unix() -> Iterator[Measure]:
    """A pair of Unix datagram sockets, blocking."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with forked(lambda: _echo(far)):
        yield lambda messages: timed(lambda: _ask(near), messages)
        near.send(b"")


@contextmanager
def proxy() -> Iterator[Measure]:
    """A third process between two such pairs, which passes messages on, as a container's sidecar does."""
    near, left = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    right, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def pass_on() -> None:
        poll, other = select.poll(), {left.fileno(): right, right.fileno(): left}
        for fd in other:
            poll.register(fd, select.POLLIN)
        by_fd = {left.fileno(): left, right.fileno(): right}
        while True:
            for fd, _ in poll.poll():
                other[fd].send(message := by_fd[fd].recv(64))
                if not message:
                    return

    # The proxy runs on the echo's half of the cores, as a container's sidecar runs beside its container.
    with forked(lambda: _echo(far)), forked(pass_on):
        yield lambda messages: timed(lambda: _ask(near), messages)
        near.send(b"")


def _ask(near: socket.socket) -> None:
    near.send(PAYLOAD)
    near.recv(64)


def _echo(far: socket.socket) -> None:
    while message := far.recv(64):
        far.send(message)
