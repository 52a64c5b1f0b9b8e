"""Descriptors on their way: one ring's two ends, and a consumer's whole inbox.

Owns no memory: the rings are in the arena. Full and empty are return values. A descriptor is a hint;
the ownership word of its block decides whether it still holds.
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
"""No sleep of who takes part in a round is longer: a lost peer or a signal is noticed within it."""
IDLE_WAIT_S = 2.0
"""No sleep on a ring is longer. It is that of a worker without a task, which should cost nothing to have."""


class Producer:
    """The writing end of the ring from `source` to `target`. One process, one thread at a time."""

    def __init__(self, arena: Arena, source: int, target: int) -> None:
        self._arena, self._source, self._target = arena, source, target
        self._desc = ffi.new("lifl_desc *")

    @property
    def capacity(self) -> int:
        """Descriptors that fit."""
        return int(check(lib.lifl_ring_capacity(self._arena.handle, self._source, self._target), "ring"))

    def try_push(self, descriptor: Descriptor) -> bool:
        """Publishes a descriptor and wakes its consumer if that sleeps; false if the ring is full."""
        messages.write(descriptor, self._desc)
        return self._send(self._desc)

    def _send(self, desc: Any) -> bool:
        status = lib.lifl_ring_push(self._arena.handle, self._source, self._target, desc)
        return bool(check(status, f"push to participant {self._target}") == lib.LIFL_OK)

    def reset(self) -> None:
        """Forgets what is in the ring. Only when the consumer is proven dead and before the next one starts."""
        check(lib.lifl_ring_reset(self._arena.handle, self._source, self._target), "reset of a ring")


class Receiver(Protocol):
    """One participant's incoming descriptors. One process, one thread at a time."""

    @property
    def fd(self) -> int | None:
        """What an event loop waits on, beside the Node's bell; None if that rings for this too."""

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The next descriptor and who sent it, or ``None``; in order per sender."""

    def wait(self, spin_s: float, timeout_s: float) -> bool:
        """Waits until there is something; false at the time-out or when a signal came."""

    def arm(self) -> bool:
        """Asks for ``fd`` (or the bell) to be readable at the next arrival; false if there is one already."""


class Inbox:
    """All the rings that end at one participant: fan-in by scanning, round robin."""

    fd = None
    """The Node's bell rings for it."""

    def __init__(self, arena: Arena, me: int) -> None:
        self._arena, self._me = arena, me
        self._desc = ffi.new("lifl_desc *")
        self._from = ffi.new("uint32_t *")

    def try_pop(self) -> tuple[int, Descriptor] | None:
        """The next descriptor and who sent it, or ``None``; in order per sender."""
        status = lib.lifl_inbox_pop(self._arena.handle, self._me, self._desc, self._from)
        if check(status, "inbox") == lib.LIFL_EMPTY:
            return None
        return self._from[0], messages.read(self._desc)

    def wait(self, spin_s: float, timeout_s: float = WAIT_CAP_S) -> bool:
        """Waits until there is something: spins up to `spin_s` seconds (adaptive), then sleeps on a futex.

        False at the time-out or when a signal came. Releases the GIL. The time-out is what a wake-up may be late that
        its sender owed and was killed before giving.
        """
        spin_ns, timeout_ns = int(spin_s * 1e9), int(min(timeout_s, IDLE_WAIT_S) * 1e9)
        return bool(lib.lifl_inbox_wait(self._arena.handle, self._me, spin_ns, timeout_ns) == lib.LIFL_OK)

    def arm(self) -> bool:
        """Asks for a write to this inbox's eventfd at the next arrival; false if there is one already."""
        return bool(lib.lifl_inbox_arm(self._arena.handle, self._me) == lib.LIFL_EMPTY)


class End(Protocol):
    """The way to one participant: a ring, or something that is as bounded."""

    def try_push(self, descriptor: Descriptor) -> bool:
        """Sends a descriptor and wakes who gets it; false if there is no room."""

    def reset(self) -> None:
        """Forgets what is on the way. Only when the receiver is proven dead and before the next one starts."""


class Spent:
    """Execution time of this participant that nobody has been told yet, in nanoseconds."""

    def __init__(self) -> None:
        self.ns = 0


class Outbox:
    """The ways from one participant to all, with what did not fit kept in order until it does.

    `on_backlog` is called when something has to wait, so that somebody calls ``flush`` soon.
    """

    def __init__(
        self, ends: Sequence[End], on_backlog: Callable[[], None] | None = None, spent: Spent | None = None
    ) -> None:
        self._on_backlog = on_backlog
        self._ends = list(ends)
        self.spent = Spent() if spent is None else spent
        self._backlog: list[deque[Descriptor]] = [deque() for _ in self._ends]

    @classmethod
    def of_rings(cls, arena: Arena, me: int, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """Through the rings from `me`."""
        return cls([Producer(arena, me, target) for target in range(arena.participants)], on_backlog)

    def push(self, target: int, descriptor: Descriptor) -> None:
        """Sends now if the ring has room and nothing waits before it, else at a later ``flush``."""
        waiting = self._backlog[target]
        if waiting or not self._ends[target].try_push(descriptor):
            waiting.append(descriptor)
            if self._on_backlog is not None:
                self._on_backlog()

    def reset(self, target: int) -> None:
        """Forgets all that `target` has not read, because it is dead and its successor is told anew."""
        self._backlog[target].clear()
        self._ends[target].reset()

    def flush(self) -> bool:
        """Sends what waits, as far as there is room; true if nothing is left."""
        for end, waiting in zip(self._ends, self._backlog, strict=True):
            while waiting and end.try_push(waiting[0]):
                waiting.popleft()
        return not any(self._backlog)


class Bell:
    """An eventfd that rings for one participant: what an event loop or ``poll`` can wait on."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        """Rings it from this process."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Makes it silent again."""
        with contextlib.suppress(BlockingIOError):  # somebody else read it, or it never rang
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)


def counts_of(arena: Arena, me: int) -> tuple[int, int]:
    """How many descriptors were ever sent to a participant, and how many of them it has taken, by either transport."""
    sent, taken = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.lifl_inbox_counts(arena.handle, me, sent, taken), f"counts of participant {me}")
    return sent[0], taken[0]


def queued(arena: Arena, me: int) -> int:
    """How many descriptors a participant has not taken."""
    sent, taken = counts_of(arena, me)
    return max(sent - taken, 0)  # the two are read one after another


def ring_for(arena: Arena, target: int, fd: int) -> None:
    """Makes pushes from this process to an armed `target` write to the eventfd `fd`."""
    check(lib.lifl_peer_eventfd(arena.handle, target, fd), f"eventfd of participant {target}")
