"""Rings and what is built on them: a producer's end, a consumer's inbox, a sender's outbox, a bell.

Owns no memory: the rings are in the arena. Full and empty are return values. A descriptor is a hint: the ownership
word of its block decides whether it is still true.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lifl.shm import messages
from lifl.shm.arena import Arena, check, ffi, lib
from lifl.shm.messages import Descriptor

WAIT_CAP_S = 0.1
"""The longest sleep of a participant that has a part in a round. It notices a dead peer or a signal in that time."""
IDLE_WAIT_S = 2.0
"""The longest sleep on a ring: that of a worker without a task, which should cost nothing to keep."""


class Producer:
    """The writing end of the ring from `source` to `target`. Used by one process, one thread at a time."""

    def __init__(self, arena: Arena, source: int, target: int) -> None:
        self._arena = arena
        self._source = source
        self._target = target
        self._desc = ffi.new("lifl_desc *")

    @property
    def capacity(self) -> int:
        """Number of descriptors that fit."""
        return int(check(lib.lifl_ring_capacity(self._arena.handle, self._source, self._target), "ring"))

    def try_push(self, descriptor: Descriptor) -> bool:
        """Publishes a descriptor and wakes the consumer if it sleeps; false if there is no room."""
        messages.write(descriptor, self._desc)
        return self._send(self._desc)

    def _send(self, desc: Any) -> bool:
        status = lib.lifl_ring_push(self._arena.handle, self._source, self._target, desc)
        return bool(check(status, f"push to participant {self._target}") == lib.LIFL_OK)

    def reset(self) -> None:
        """Empties the ring. Only when the consumer is proven dead, and before its successor starts."""
        check(lib.lifl_ring_reset(self._arena.handle, self._source, self._target), "reset of a ring")


class Receiver(Protocol):
    """The incoming descriptors of one participant. Used by one process, one thread at a time."""

    @property
    def fd(self) -> int | None:
        """A descriptor for an event loop to wait on, beside the Node's bell; None if the bell rings for this too."""

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The number of a sender and its next descriptor, or ``None``. Descriptors of one sender come in order."""

    def wait(self, spin_s: float, timeout_s: float) -> bool:
        """Waits until there is a descriptor; false at the time-out, or when a signal came."""

    def arm(self) -> bool:
        """Asks that ``fd``, or the bell, becomes readable at the next arrival; false if something is there already."""


class Inbox:
    """All the rings that end at one participant, scanned in turn."""

    fd = None
    """None: the Node's bell rings for it."""

    def __init__(self, arena: Arena, participant: int) -> None:
        self._arena = arena
        self._participant = participant
        self._desc = ffi.new("lifl_desc *")
        self._from = ffi.new("uint32_t *")

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The number of a sender and its next descriptor, or ``None``. Descriptors of one sender come in order."""
        status = lib.lifl_inbox_pop(self._arena.handle, self._participant, self._desc, self._from)
        if check(status, "inbox") == lib.LIFL_EMPTY:
            return None
        return self._from[0], messages.read(self._desc)

    def wait(self, spin_s: float, timeout_s: float = WAIT_CAP_S) -> bool:
        """Waits until there is a descriptor: spins up to `spin_s` seconds (adaptive), then sleeps on a futex.

        False at the time-out, or when a signal came. Releases the GIL. A sender that is killed between its push and the
        wake-up leaves the consumer asleep: the time-out bounds how late the descriptor is noticed then.
        """
        spin_ns, timeout_ns = int(spin_s * 1e9), int(min(timeout_s, IDLE_WAIT_S) * 1e9)
        return bool(lib.lifl_inbox_wait(self._arena.handle, self._participant, spin_ns, timeout_ns) == lib.LIFL_OK)

    def arm(self) -> bool:
        """Asks for a write to this inbox's eventfd at the next arrival; false if something is there already."""
        return bool(lib.lifl_inbox_arm(self._arena.handle, self._participant) == lib.LIFL_EMPTY)


class End(Protocol):
    """The way to one participant: a ring, or a socket that holds as few descriptors."""

    def try_push(self, descriptor: Descriptor) -> bool:
        """Sends a descriptor and wakes the receiver; false if there is no room."""

    def reset(self) -> None:
        """Drops what is on the way. Only when the receiver is proven dead, and before its successor starts."""


class Spent:
    """Execution time of this participant that it has not reported yet, in nanoseconds."""

    def __init__(self) -> None:
        self.ns = 0


class Outbox:
    """The ways from one participant to all. Keeps what does not fit, in order, until it fits.

    `on_backlog` is called when a descriptor has to wait, so that its caller soon calls ``flush``.
    """

    def __init__(
        self, ends: Sequence[End], on_backlog: Callable[[], None] | None = None, spent: Spent | None = None
    ) -> None:
        self._on_backlog = on_backlog
        self._ends = list(ends)
        self.spent = Spent() if spent is None else spent
        self._backlog: list[deque[Descriptor]] = [deque() for _ in self._ends]

    @classmethod
    def of_rings(cls, arena: Arena, source: int, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """An outbox over the rings that begin at participant `source`."""
        return cls([Producer(arena, source, target) for target in range(arena.participants)], on_backlog)

    def push(self, target: int, descriptor: Descriptor) -> None:
        """Sends a descriptor now if there is room and none waits before it, else at a later ``flush``."""
        waiting = self._backlog[target]
        if waiting or not self._ends[target].try_push(descriptor):
            waiting.append(descriptor)
            if self._on_backlog is not None:
                self._on_backlog()

    def reset(self, target: int) -> None:
        """Drops all that `target` has not read: it is dead, and its successor gets its messages anew."""
        self._backlog[target].clear()
        self._ends[target].reset()

    def flush(self) -> bool:
        """Sends the descriptors that wait, as far as there is room; true if none is left."""
        for end, waiting in zip(self._ends, self._backlog, strict=True):
            while waiting and end.try_push(waiting[0]):
                waiting.popleft()
        return not any(self._backlog)


class Bell:
    """An eventfd on which an event loop or ``poll`` waits for the arrivals of one participant."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        """Makes the descriptor readable, from this process."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Takes back all rings: the descriptor is not readable any more."""
        with contextlib.suppress(BlockingIOError):  # another thread has read it, or it never rang
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)


def counts_of(arena: Arena, participant: int) -> tuple[int, int]:
    """Numbers of descriptors that were ever sent to a participant and that it has taken, over either transport."""
    sent, taken = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.lifl_inbox_counts(arena.handle, participant, sent, taken), f"counts of participant {participant}")
    return sent[0], taken[0]


def queued(arena: Arena, participant: int) -> int:
    """Number of descriptors that a participant has not taken."""
    sent, taken = counts_of(arena, participant)
    return max(sent - taken, 0)  # never below 0: the two numbers are read one after another


def ring_for(arena: Arena, target: int, fd: int) -> None:
    """Makes each push from this process to an armed `target` write to the eventfd `fd`."""
    check(lib.lifl_peer_eventfd(arena.handle, target, fd), f"eventfd of participant {target}")
