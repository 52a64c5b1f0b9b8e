"""Both ends of a socket in the sidecar's map, as the rings have them: what a participant sends and what it receives.

A participant has one socket for both. What it sends is routed in the kernel by the aggregator that the record names;
how much is on its way is bounded by credits in the arena. No capability is needed here.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from lifl.ebpf.record import RECORD_BYTES, Record
from lifl.errors import PeerGoneError
from lifl.shm import messages
from lifl.shm.arena import AGENT, Arena, check, ffi, lib
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import WAIT_CAP_S, Outbox, Producer, Spent

TOP = 0x80000000
"""The top of round r is the aggregator TOP | r, whoever that is: a leaf's sum is sent there."""
MAX_BUSY_US = 2**32 - 1


def top_of(number: int) -> int:
    """The aggregator that adds up the sums of a round."""
    return TOP | number & (TOP - 1)


class Sender(Producer):
    """From one participant to another, through the socket of the first. One process, one thread at a time."""

    def __init__(self, arena: Arena, own: socket.socket, source: int, target: int, spent: Spent) -> None:
        super().__init__(arena, source, target)
        self._socket, self._spent = own, spent

    def _send(self, desc: Any) -> bool:
        dst = top_of(desc.round) if desc.kind == Kind.SUM and self._target != AGENT else self._target
        busy_us = min(self._spent.ns // 1000, MAX_BUSY_US)
        fd = self._socket.fileno()
        status = lib.lifl_link_send(self._arena.handle, fd, self._source, self._target, dst, busy_us, desc)
        if status == lib.LIFL_OK:
            self._spent.ns -= busy_us * 1000
            return True
        if status == lib.LIFL_ESYS:
            why = os.strerror(ffi.errno)
            raise PeerGoneError(f"a descriptor to participant {self._target} could not be sent: {why}")
        check(status, f"credit for participant {self._target}")
        return False

    def reset(self) -> None:
        """Does nothing: the sidecar's :meth:`bury` has forgotten what was on its way."""


class Receiver:
    """What comes through a participant's socket. One process, one thread at a time.

    `on_stray` gets what is meant for another aggregator.
    """

    def __init__(self, arena: Arena, own: socket.socket, me: int, on_stray: Callable[[Record], None]) -> None:
        self._arena, self._socket, self._me, self._on_stray = arena, own, me, on_stray
        self._flow, self._record = ffi.new("lifl_flow *"), ffi.new("lifl_link_record *")
        self._spin_s = 0.0
        self._poll = select.poll()
        self._poll.register(own, select.POLLIN)

    @property
    def fd(self) -> int:
        """Readable when something has come."""
        return self._socket.fileno()

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The next descriptor and who sent it, or ``None``; in order per sender."""
        r = self._record
        while self._is_there(lib.lifl_link_pop(self._arena.handle, self._socket.fileno(), self._flow, r)):
            dst = r.dst
            # A role is whose the kernel says, which may have changed meanwhile; what nobody has comes to the agent.
            if dst == self._me or (dst & TOP and self._me != AGENT):
                return r.src, messages.read(r)
            self._on_stray(Record.unpack(ffi.buffer(r))[0])
        return None

    def _fill(self, *, waits: bool = False) -> bool:
        _ = self._arena.handle  # raises in a fork, before it takes what is for the process that it was made of
        return self._is_there(lib.lifl_link_fill(self._socket.fileno(), waits, self._flow))

    def _is_there(self, status: int) -> bool:
        if status == lib.LIFL_GONE:
            raise PeerGoneError("the agent is gone: it has closed its end of the socket")
        if status == lib.LIFL_ESYS:
            raise PeerGoneError(f"the socket of participant {self._me} is broken: {os.strerror(ffi.errno)}")
        return bool(status == lib.LIFL_OK)

    def wait(self, spin_s: float, timeout_s: float) -> bool:
        """Waits until there is something: looks again for up to `spin_s` seconds (adaptive), then sleeps.

        False at the time-out, or when a signal came; from ``WAIT_CAP_S`` on there is no time-out. On a ring sleeps are
        capped because a wake-up can be lost with who owed it; a socket's cannot, and it tells of the agent's death too.
        """
        if spin_s:
            # As the rings do: a spin that was answered doubles the next one, one in vain halves it.
            self._spin_s = min(max(self._spin_s, spin_s / 64), spin_s)
            end_s = time.monotonic() + min(self._spin_s, timeout_s)
            while time.monotonic() < end_s:
                if self._fill():
                    self._spin_s *= 2
                    return True
            self._spin_s /= 2
        if timeout_s >= WAIT_CAP_S:
            return self._fill(waits=True)
        return self._fill() or bool(self._poll.poll(timeout_s * 1000) and self._fill())

    def arm(self) -> bool:
        """True: a socket with something in it is readable, so that nothing has to be asked for."""
        return bool(self._flow.have - self._flow.next < RECORD_BYTES)


def sent_on(own: socket.socket) -> Callable[[Record], None]:
    """What a worker does with a record for another: the kernel is asked once more who that is."""

    def send(record: Record) -> None:
        # If the kernel cannot take it in now, who should have it is dying, and its successor is told again.
        if lib.lifl_link_forward(own.fileno(), True, record.pack()) == lib.LIFL_ESYS:
            raise PeerGoneError(f"a stray descriptor could not be sent on: {os.strerror(ffi.errno)}")

    return send


def ends_of(arena: Arena, socket_fd: int, me: int) -> tuple[Receiver, Outbox]:
    """What a worker receives and sends, through the socket that it was given."""
    own = socket.socket(fileno=socket_fd)
    return Receiver(arena, own, me, sent_on(own)), outbox_of(arena, own, me)


def outbox_of(arena: Arena, own: socket.socket, me: int, on_backlog: Callable[[], None] | None = None) -> Outbox:
    """What a participant sends, through its socket."""
    spent = Spent()
    ends = [Sender(arena, own, me, target, spent) for target in range(arena.participants)]
    return Outbox(ends, on_backlog, spent)
