"""Rings, inboxes, outboxes and the ways to wake their consumer."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifl.errors import LeaseError, ShmError
from lifl.shm.arena import Arena
from lifl.shm.ring import NO_BLOCK, Bell, Consumer, Descriptor, Inbox, Kind, Outbox, Producer, ring_for

MANY = 200_000
HANG_S = 60.0
"""After so long something that must come is taken to be lost; only a hang is ever caught by it."""


def numbered(i: int) -> Descriptor:
    """A descriptor that carries a number."""
    return Descriptor(Kind.UPDATE, i)


@contextmanager
def in_other_process(arena: Arena, function: Callable[[Arena], None]) -> Iterator[None]:
    """Runs a function on an arena of its own in another process, which must end well."""
    fd = arena.fd
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(Arena.attach(fd))
            status = 0
        finally:
            os._exit(status)
    try:
        yield
    finally:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def push_all(arena: Arena, source: int, target: int, count: int) -> None:
    """Pushes numbered descriptors, giving way while the ring is full."""
    producer = Producer(arena, source, target)
    for i in range(count):
        while not producer.try_push(numbered(i)):
            time.sleep(0)


def pop_all(arena: Arena, target: int, count: int, spin_s: float) -> dict[int, list[int]]:
    """Pops so many descriptors from an inbox; the numbers, by sender."""
    inbox, got, deadline = Inbox(arena, target), {}, time.monotonic() + HANG_S
    while count:
        if (item := inbox.try_pop()) is None:
            assert time.monotonic() < deadline, f"{count} descriptors are missing"
            inbox.wait(spin_s)
            continue
        got.setdefault(item[0], []).append(item[1].round)
        count -= 1
    return got


# ---------------------------------------------------------------- one ring


def test_descriptor_arrives_whole(arena: Arena) -> None:
    """All five fields come out as they went in, also at the ends of their ranges."""
    producer, consumer = Producer(arena, 1, 2), Consumer(arena, 1, 2)
    for d in (Descriptor(Kind.FLUSH, 2**32 - 1, 7, 2**32 - 1, 2**16 - 1), Descriptor(Kind.SUM, 0, NO_BLOCK)):
        assert producer.try_push(d)
        assert consumer.try_pop() == d
    assert consumer.try_pop() is None


def test_full_and_empty_are_answers(arena: Arena) -> None:
    """A ring takes exactly its capacity, says so, and goes on when there is room again."""
    producer, consumer = Producer(arena, 0, 1), Consumer(arena, 0, 1)
    assert [producer.try_push(numbered(i)) for i in range(producer.capacity)] == [True] * producer.capacity
    assert not producer.try_push(numbered(-1 % 2**32))
    assert consumer.try_pop() == numbered(0)
    assert producer.try_push(numbered(producer.capacity))
    assert not producer.try_push(numbered(-1 % 2**32))
    assert [d.round for d in iter(consumer.try_pop, None)] == [*range(1, producer.capacity + 1)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=30))
def test_order_is_kept_around_the_end(steps: list[tuple[bool, int]]) -> None:
    """Any interleaving of pushes and pops, many times around the ring, is first in, first out."""
    arena = Arena.create(1, 2)
    producer, consumer, given_, taken = Producer(arena, 0, 1), Consumer(arena, 0, 1), 0, 0
    for is_push, n in steps:
        for _ in range(n):
            if is_push:
                is_full = given_ - taken == producer.capacity
                assert producer.try_push(numbered(given_)) != is_full
                given_ += not is_full
            else:
                d = consumer.try_pop()
                assert d == (numbered(taken) if taken < given_ else None)
                taken += d is not None
    arena.close()


def test_rings_are_apart(arena: Arena) -> None:
    """Each pair of participants has a ring of its own, in each direction."""
    for source in range(4):
        for target in range(4):
            assert Producer(arena, source, target).try_push(numbered(10 * source + target))
    for source in range(4):
        for target in range(4):
            consumer = Consumer(arena, source, target)
            assert consumer.try_pop() == numbered(10 * source + target)
            assert consumer.try_pop() is None


def test_successor_goes_on_where_a_process_stopped(arena: Arena) -> None:
    """A handle made later takes over both ends of a ring as its predecessor left them."""
    producer, consumer = Producer(arena, 0, 1), Consumer(arena, 0, 1)
    for i in range(300):
        assert producer.try_push(numbered(i))
        if i >= 10:
            assert consumer.try_pop() == numbered(i - 10)
    heir = Arena.attach(arena.fd)
    assert Consumer(heir, 0, 1).try_pop() == numbered(290)
    assert Producer(heir, 0, 1).try_push(numbered(300))
    heir.close()


def test_participants_outside_the_arena_are_refused(arena: Arena) -> None:
    """A ring to or from nobody is EINVAL; a closed arena is a LeaseError."""
    for source, target in ((0, 4), (4, 0)):
        with pytest.raises(ShmError):
            Producer(arena, source, target).try_push(numbered(0))
        with pytest.raises(ShmError):
            Consumer(arena, source, target).try_pop()
    with pytest.raises(ShmError):
        ring_for(arena, 4, 0)
    producer = Producer(arena, 0, 1)
    arena.close()
    with pytest.raises(LeaseError):
        producer.try_push(numbered(0))


# ---------------------------------------------------------------- fan-in, fan-out


def test_inbox_says_who_sent_and_starves_nobody(arena: Arena) -> None:
    """A busy sender does not keep an inbox from another's descriptor."""
    busy, quiet, inbox = Producer(arena, 1, 0), Producer(arena, 2, 0), Inbox(arena, 0)
    for i in range(100):
        assert busy.try_push(numbered(i))
    assert quiet.try_push(numbered(7))
    senders = [inbox.try_pop()[0] for _ in range(3)]
    assert senders.count(2) == 1
    assert senders.count(1) == 2
    assert len([*iter(inbox.try_pop, None)]) == 98


def test_outbox_keeps_what_does_not_fit_in_order(arena: Arena) -> None:
    """Descriptors that are pushed to a full ring follow, in order, and other targets are not held up."""
    outbox, first, second = Outbox.of_rings(arena, 0), Consumer(arena, 0, 1), Consumer(arena, 0, 2)
    for i in range(1000):
        outbox.push(1, numbered(i))
    outbox.push(2, numbered(5))
    assert second.try_pop() == numbered(5)
    assert not outbox.flush()
    got, is_sent = [], False
    while not is_sent:
        got += [d.round for d in iter(first.try_pop, None)]
        is_sent = outbox.flush()
    got += [d.round for d in iter(first.try_pop, None)]
    assert got == [*range(1000)]
    assert outbox.flush()


# ---------------------------------------------------------------- two threads, two processes


@pytest.mark.parametrize("spin_s", [0.0, 50e-6], ids=["sleeping", "spinning"])
def test_nothing_is_lost_between_two_processes(arena: Arena, spin_s: float) -> None:
    """No descriptor of 200,000 from another process is lost, doubled or out of order."""
    with in_other_process(arena, lambda theirs: push_all(theirs, 1, 0, MANY)):
        assert pop_all(arena, 0, MANY, spin_s) == {1: [*range(MANY)]}


def test_nothing_is_lost_between_two_threads(arena: Arena) -> None:
    """Nor between two threads of one process."""
    thread = threading.Thread(target=push_all, args=(arena, 1, 0, MANY))
    thread.start()
    got = pop_all(arena, 0, MANY, 0.0)
    thread.join()
    assert got == {1: [*range(MANY)]}


def test_three_senders_keep_their_own_orders(arena: Arena) -> None:
    """Fan-in from three processes loses nothing and keeps each one's order."""
    with (
        in_other_process(arena, lambda theirs: push_all(theirs, 1, 0, 20_000)),
        in_other_process(arena, lambda theirs: push_all(theirs, 2, 0, 20_000)),
        in_other_process(arena, lambda theirs: push_all(theirs, 3, 0, 20_000)),
    ):
        got = pop_all(arena, 0, 60_000, 0.0)
    assert got == {sender: [*range(20_000)] for sender in (1, 2, 3)}


def test_bytes_written_before_a_push_are_there_after_the_pop(arena: Arena) -> None:
    """A block's bytes travel with its descriptor between processes, both ways, thousands of times."""
    block = arena.alloc(8)
    assert block is not None

    def echo(theirs: Arena) -> None:
        inbox, producer, buffer = Inbox(theirs, 1), Producer(theirs, 1, 0), theirs.buffer(block)
        for _ in range(5_000):
            while (item := inbox.try_pop()) is None:
                inbox.wait(50e-6)
            assert int.from_bytes(buffer[:8], "little") == item[1].round
            buffer[:8] = (item[1].round + 1).to_bytes(8, "little")
            assert producer.try_push(numbered(item[1].round + 1))

    buffer, n = arena.buffer(block), 0
    with in_other_process(arena, echo):
        inbox, producer = Inbox(arena, 0), Producer(arena, 0, 1)
        for _ in range(5_000):
            buffer[:8] = n.to_bytes(8, "little")
            assert producer.try_push(numbered(n))
            while (item := inbox.try_pop()) is None:
                inbox.wait(50e-6)
            n = item[1].round
            assert int.from_bytes(buffer[:8], "little") == n
    assert n == 5_000


# ---------------------------------------------------------------- waking up


def test_wait_says_what_is_there_already(arena: Arena) -> None:
    """A wait returns at once, also with no time to wait, if something is there."""
    inbox = Inbox(arena, 0)
    assert not inbox.wait(0.0, 0.0)
    assert not inbox.wait(1e-4, 0.001)
    assert Producer(arena, 1, 0).try_push(numbered(1))
    assert inbox.wait(0.0, 0.0)


def test_wait_is_capped(arena: Arena) -> None:
    """However long a wait is asked for, it comes back to let signals and lost peers be noticed."""
    assert not Inbox(arena, 0).wait(0.0, 3600.0)


def test_sleeping_consumer_is_woken(arena: Arena) -> None:
    """A thousand turns between two sleeping processes end long before their caps would add up."""
    turns = 1_000

    def answer(theirs: Arena) -> None:
        inbox, producer = Inbox(theirs, 1), Producer(theirs, 1, 0)
        for _ in range(turns):
            while inbox.try_pop() is None:
                inbox.wait(0.0)
            assert producer.try_push(numbered(0))

    begin = time.monotonic()
    with in_other_process(arena, answer):
        inbox, producer = Inbox(arena, 0), Producer(arena, 0, 1)
        for _ in range(turns):
            assert producer.try_push(numbered(0))
            while inbox.try_pop() is None:
                inbox.wait(0.0)
    # If wake-ups were lost, each turn would take two caps of 100 ms: 200 s.
    assert time.monotonic() - begin < HANG_S


def test_wait_lets_other_threads_run(arena: Arena) -> None:
    """The GIL is released during a wait: a thread of the same process can push what is waited for."""
    inbox = Inbox(arena, 0)
    thread = threading.Thread(target=push_all, args=(arena, 1, 0, 1))
    thread.start()
    deadline = time.monotonic() + HANG_S
    while not inbox.wait(0.0) and time.monotonic() < deadline:
        pass
    thread.join()
    assert inbox.try_pop() == (1, numbered(0))


def test_event_loop_is_woken_by_another_process(arena: Arena) -> None:
    """An asyncio loop that sleeps on an inbox's eventfd receives all that another process pushes."""
    bell, inbox, count = Bell(), Inbox(arena, 0), 5_000

    def produce(theirs: Arena) -> None:
        ring_for(theirs, 0, bell.fd)
        push_all(theirs, 1, 0, count)

    async def consume() -> list[int]:
        loop, rung, got = asyncio.get_running_loop(), asyncio.Event(), []
        loop.add_reader(bell.fd, rung.set)
        while len(got) < count:
            bell.clear()
            got += [d.round for _, d in iter(inbox.try_pop, None)]
            if len(got) < count and inbox.arm():
                await rung.wait()
            rung.clear()
        loop.remove_reader(bell.fd)
        return got

    with in_other_process(arena, produce):
        assert asyncio.run(asyncio.wait_for(consume(), HANG_S)) == [*range(count)]
    bell.close()


def test_bell_rings_only_when_armed(arena: Arena) -> None:
    """A push to a busy consumer costs no system call; to an armed one it rings once."""
    bell, inbox, producer = Bell(), Inbox(arena, 0), Producer(arena, 1, 0)
    ring_for(arena, 0, bell.fd)
    assert producer.try_push(numbered(0))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bell.fd)
    assert not inbox.arm()
    assert inbox.try_pop() is not None
    assert inbox.arm()
    assert producer.try_push(numbered(1))
    assert producer.try_push(numbered(2))
    assert os.eventfd_read(bell.fd) == 1
    bell.ring()
    bell.clear()
    bell.clear()
    bell.close()
