"""Both ends of a socket in the sidecar's map, as the rings have them: what a participant sends and what it receives.

A participant has one socket for both. What it sends is routed in the kernel by the aggregator that the record names;
how much is on its way is bounded by credits in the arena. No capability is needed here.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from lifl.ebpf.record import RECORD_BYTES, Record, pack
from lifl.errors import PeerGoneError
from lifl.ring import IDLE_WAIT_S, Descriptor, Kind, Outbox, Spent
from lifl.shm import AGENT, Arena, check, ffi, lib

TOP = 0x80000000
"""The top of round r is the aggregator TOP | r, whoever that is: a leaf's sum is sent there."""
BATCH = 128
"""Records that are received at a time."""
BUSY_MOST_US = 2**32 - 1
# As plain numbers: to join flags of Python's takes longer than to send.
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
RECEIVE_FLAGS = int(socket.MSG_DONTWAIT)
NOT_NOW = frozenset({errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ENOMEM, errno.ENOBUFS})
"""What the kernel says when it cannot take a record in now. EPIPE: the socket that it would redirect to is just being
closed, because its process dies; a moment later it is gone from the map, and then its successor's is there."""


def top_of(number: int) -> int:
    """The aggregator that adds up the sums of a round."""
    return TOP | number & (TOP - 1)


class Sender:
    """From one participant to another. One process, one thread at a time."""

    def __init__(self, arena: Arena, own: socket.socket, source: int, target: int, spent: Spent) -> None:
        self._arena, self._socket, self._source, self._target, self._spent = arena, own, source, target, spent
        self._number = ffi.new("uint32_t *")

    @property
    def capacity(self) -> int:
        """Descriptors that may be on their way."""
        return int(check(lib.lifl_ring_capacity(self._arena.handle, self._source, self._target), "credits"))

    def try_push(self, descriptor: Descriptor) -> bool:
        """Sends a descriptor; false if as many are on their way as may be, or if it cannot be taken in now."""
        line = self._arena.handle, self._source, self._target
        status = lib.lifl_credit_take(*line, self._number)
        if status != lib.LIFL_OK:
            check(status, f"credit for participant {self._target}")
            return False
        kind, number, block, generation, arg = descriptor
        dst = top_of(number) if kind == Kind.SUM and self._target != AGENT else self._target
        busy_us = min(self._spent.ns // 1000, BUSY_MOST_US)
        named = dst, self._source, self._target, self._number[0], busy_us
        try:
            # All of it or nothing: a record is put together in the kernel before it is looked at.
            sent = self._socket.send(pack(*named, block, generation, number, kind, arg), SEND_FLAGS)
        except OSError as error:
            lib.lifl_credit_untake(*line)
            if error.errno in NOT_NOW:
                return False
            raise PeerGoneError(f"a descriptor to participant {self._target} could not be sent: {error}") from error
        self._spent.ns -= busy_us * 1000
        if sent != RECORD_BYTES:
            raise PeerGoneError(f"{sent} bytes of a descriptor of {RECORD_BYTES} were sent")
        return True

    def reset(self) -> None:
        """Forgets what is on its way, because its receiver is proven dead: the sidecar's :meth:`bury` has done so."""


class Receiver:
    """What comes through a participant's socket. One process, one thread at a time.

    `on_stray` gets what is meant for another aggregator.
    """

    def __init__(self, arena: Arena, own: socket.socket, me: int, on_stray: Callable[[Record], None]) -> None:
        self._arena, self._socket, self._me, self._on_stray = arena, own, me, on_stray
        self._come: deque[Record] = deque()
        self._room = memoryview(bytearray(RECORD_BYTES * BATCH))
        self._begun = 0  # bytes of a record whose rest has not come
        self._spin_s = 0.0
        self._poll = select.poll()
        self._poll.register(own, select.POLLIN)

    @property
    def fd(self) -> int:
        """Readable when something has come."""
        return self._socket.fileno()

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The next descriptor and who sent it, or ``None``; in order per sender."""
        while self._come or self._receive():
            record = self._come.popleft()
            if lib.lifl_credit_give(self._arena.handle, record.src, record.line, record.seq) != lib.LIFL_OK:
                continue  # no participant of this arena has sent it
            # A role is whose the kernel says, which may have changed meanwhile; what nobody has comes to the agent.
            is_for_my_role = record.dst & TOP and self._me != AGENT
            if record.dst != self._me and not is_for_my_role:
                self._on_stray(record)
                continue
            return record.src, Descriptor(record.kind, record.round, record.block, record.generation, record.arg)
        return None

    def _receive(self) -> bool:
        _ = self._arena.handle  # raises in a fork, before it takes what is for the process that it was made of
        try:
            count = self._socket.recv_into(self._room[self._begun :], 0, RECEIVE_FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerGoneError(f"the socket of participant {self._me} is broken: {error}") from error
        if not count:
            raise PeerGoneError("the agent is gone: it has closed its end of the socket")
        end = self._begun + count
        self._begun = end % RECORD_BYTES
        self._come.extend(Record.unpack(self._room[: end - self._begun]))
        if self._begun:
            self._room[: self._begun] = bytes(self._room[end - self._begun : end])
        return bool(self._come)

    def wait(self, spin_s: float, timeout_s: float) -> bool:
        """Waits until there is something: looks again for up to `spin_s` seconds (adaptive), then sleeps in poll.

        False at the time-out. A signal's handler runs meanwhile.
        """
        if self._come:
            return True
        if spin_s:
            # As the rings do: a spin that was answered doubles the next one, one in vain halves it.
            self._spin_s = min(max(self._spin_s, spin_s / 64), spin_s)
            end_s = time.monotonic() + min(self._spin_s, timeout_s)
            while time.monotonic() < end_s:
                if self._receive():
                    self._spin_s *= 2
                    return True
            self._spin_s /= 2
        if self._poll.poll(min(timeout_s, IDLE_WAIT_S) * 1000):
            return self._receive()
        return False

    def arm(self) -> bool:
        """True: a socket with something in it is readable, so that nothing has to be asked for."""
        return not self._come


def sent_on(own: socket.socket) -> Callable[[Record], None]:
    """What a worker does with a record for another: the kernel is asked once more who that is."""

    def send(record: Record) -> None:
        try:
            own.send(record.pack(), socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in NOT_NOW:  # else who should have it is dying, and its successor is told again
                raise PeerGoneError(f"a stray descriptor could not be sent on: {error}") from error

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
