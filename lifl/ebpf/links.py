"""The two ends of a socket in the sidecar's map, with the interface of the rings: a sender and a receiver.

A participant has one socket for both. The kernel routes each record by the aggregator that the record names; credits in
the arena bound the number of records on their way. No capability is needed here.
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
from lifl.shm.arena import OWNER, Arena, check, ffi, lib
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import WAIT_CAP_S, Outbox, Producer, Spent

TOP = 0x80000000
"""The top of round r is the aggregator TOP | r, in whatever worker; leaves send their sums there."""
MAX_BUSY_US = 2**32 - 1


def top_of(number: int) -> int:
    """The number of the aggregator that adds up the sums of a round."""
    return TOP | number & (TOP - 1)


class Sender(Producer):
    """The way from `source` to `target`, through the socket of `source`. Used by one process, one thread at a time."""

    def __init__(self, arena: Arena, own: socket.socket, source: int, target: int, spent: Spent) -> None:
        super().__init__(arena, source, target)
        self._socket = own
        self._spent = spent

    def _send(self, desc: Any) -> bool:
        dst = top_of(desc.round) if desc.kind == Kind.SUM and self._target != OWNER else self._target
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
        """Does nothing: the sidecar has already dropped what was on its way, see :meth:`Sidecar.remove`."""


class Receiver:
    """The incoming descriptors of a participant, from its socket. Used by one process, one thread at a time.

    `on_stray` gets each record for another aggregator.
    """

    def __init__(self, arena: Arena, own: socket.socket, participant: int, on_stray: Callable[[Record], None]) -> None:
        self._arena = arena
        self._socket = own
        self._participant = participant
        self._on_stray = on_stray
        self._flow = ffi.new("lifl_flow *")
        self._record = ffi.new("lifl_link_record *")
        self._spin_s = 0.0
        self._poll = select.poll()
        self._poll.register(own, select.POLLIN)

    @property
    def fd(self) -> int:
        """The socket's descriptor: readable when something has come."""
        return self._socket.fileno()

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The number of a sender and its next descriptor, or ``None``. Descriptors of one sender come in order."""
        r = self._record
        while self._is_there(lib.lifl_link_pop(self._arena.handle, self._socket.fileno(), self._flow, r)):
            dst = r.dst
            # The kernel decides which worker holds a role, and the route may have changed meanwhile. A record of a role
            # that no worker holds comes to the owner.
            if dst == self._participant or (dst & TOP and self._participant != OWNER):
                return r.src, messages.read(r)
            self._on_stray(Record.unpack(ffi.buffer(r))[0])
        return None

    def _fill(self, *, waits: bool = False) -> bool:
        _ = self._arena.handle  # raises in a fork, which must not take what is for its parent
        return self._is_there(lib.lifl_link_fill(self._socket.fileno(), waits, self._flow))

    def _is_there(self, status: int) -> bool:
        if status == lib.LIFL_GONE:
            raise PeerGoneError("the owner is gone: it has closed its end of the socket")
        if status == lib.LIFL_ESYS:
            raise PeerGoneError(f"the socket of participant {self._participant} is broken: {os.strerror(ffi.errno)}")
        return bool(status == lib.LIFL_OK)

    def wait(self, spin_s: float, timeout_s: float) -> bool:
        """Waits until there is a descriptor: looks again for up to `spin_s` seconds (adaptive), then sleeps.

        False at the time-out, or when a signal came; a `timeout_s` from ``WAIT_CAP_S`` on means no time-out. On a ring
        sleeps are capped because a wake-up can be lost with a sender that is killed. A socket loses none, and it shows
        the death of the owner too.
        """
        if spin_s:
            # As in lifl_inbox_wait: a spin that was answered doubles the next one, a spin in vain halves it.
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
        """True if no whole record is buffered here; a socket with more in it is readable without being asked."""
        return bool(self._flow.have - self._flow.next < RECORD_BYTES)


def sent_on(own: socket.socket) -> Callable[[Record], None]:
    """The function with which a worker sends on a record for another worker: the kernel routes the record anew."""

    def send(record: Record) -> None:
        # If the kernel cannot take the record now, its receiver is dying, and the successor gets its messages anew.
        if lib.lifl_link_forward(own.fileno(), True, record.pack()) == lib.LIFL_ESYS:
            raise PeerGoneError(f"a stray descriptor could not be sent on: {os.strerror(ffi.errno)}")

    return send


def ends_of(arena: Arena, socket_fd: int, participant: int) -> tuple[Receiver, Outbox]:
    """The inbox and the outbox of a worker, over the socket that it was given."""
    own = socket.socket(fileno=socket_fd)
    return Receiver(arena, own, participant, sent_on(own)), outbox_of(arena, own, participant)


def outbox_of(
    arena: Arena, own: socket.socket, participant: int, on_backlog: Callable[[], None] | None = None
) -> Outbox:
    """The outbox of a participant, over its socket."""
    spent = Spent()
    ends = [Sender(arena, own, participant, target, spent) for target in range(arena.participants)]
    return Outbox(ends, on_backlog, spent)
