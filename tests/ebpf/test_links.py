"""Both ends of a participant's socket: what is sent, what is received, in which order, and how much of it at a time."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifl.ebpf.links import Receiver, ends_of, sent_on, top_of
from lifl.ebpf.record import RECORD_BYTES, Record
from lifl.ebpf.sidecar import Sidecar
from lifl.errors import LeaseError, PeerGoneError, ShmError
from lifl.shm.arena import OWNER, Arena, ffi
from lifl.shm.messages import NO_BLOCK, Descriptor, Kind
from lifl.shm.ring import WAIT_CAP_S, Outbox, counts_of

BATCH = len(ffi.new("lifl_flow *").bytes) // RECORD_BYTES
"""Records that are received at a time."""
HANG_S = 60.0
"""After so long something that must come is taken to be lost; only a hang is ever caught by it."""


def numbered(i: int) -> Descriptor:
    """A descriptor that carries a number."""
    return Descriptor(Kind.UPDATE, i)


def numbers(inbox: Receiver) -> list[tuple[int, int]]:
    """All that has come: who sent it, and its number."""
    return [(source, d.round) for source, d in iter(inbox.try_pop, None)]


def record(dst: int, seq: int, src: int = 1) -> Record:
    """A record as a sender makes it."""
    return Record(dst, src, dst, seq, 0, NO_BLOCK, 0, seq, Kind.UPDATE, 0)


Stream = tuple[socket.socket, Receiver, list[Record]]


@pytest.fixture
def stream(arena: Arena) -> Iterator[Stream]:
    """A receiver of participant 2 behind an ordinary stream, which comes in whatever pieces it is sent; and strays."""
    near, far = socket.socketpair()
    strays: list[Record] = []
    with near, far:
        yield near, Receiver(arena, far, 2, strays.append), strays


# ---------------------------------------------------------------- what arrives


def test_descriptor_arrives_whole(sidecar: Sidecar) -> None:
    """All five fields come out as they went in, also at the ends of their ranges, with who sent it."""
    inbox = sidecar.inbox(2)
    for me in (OWNER, 1, 2):
        outbox = sidecar.outbox(me)
        for d in (Descriptor(Kind.FLUSH, 2**32 - 1, 7, 2**32 - 1, 2**16 - 1), Descriptor(Kind.PING, 0, NO_BLOCK)):
            outbox.push(2, d)
            assert inbox.try_pop() == (me, d)
    assert inbox.try_pop() is None


def test_each_gets_its_own_in_order_per_sender(sidecar: Sidecar) -> None:
    """Four participants send to all four in any order: each gets what was meant for it, in its sender's order."""
    inboxes = {me: sidecar.inbox(me) for me in range(4)}
    outboxes = {me: sidecar.outbox(me) for me in range(4)}
    choose, sent = random.Random(1), {(a, b): 0 for a in range(4) for b in range(4)}
    for _ in range(2000):
        a, b = choose.randrange(4), choose.randrange(4)
        outboxes[a].push(b, numbered(sent[a, b]))
        sent[a, b] += 1
    for b, inbox in inboxes.items():
        got = numbers(inbox)
        for a in range(4):
            assert [n for source, n in got if source == a] == [*range(sent[a, b])]


def test_a_sum_goes_to_whoever_has_the_role(sidecar: Sidecar) -> None:
    """A leaf names the top of a round; a sum for the agent, and all else, goes to the participant that is named."""
    leaf, two, three, agent = sidecar.outbox(1), sidecar.inbox(2), sidecar.inbox(3), sidecar.inbox()
    sidecar.route_top(7, 3)
    leaf.push(2, Descriptor(Kind.SUM, 7))
    leaf.push(2, Descriptor(Kind.PING, 7))
    leaf.push(OWNER, Descriptor(Kind.SUM, 7))
    assert numbers(three) == [(1, 7)]
    assert two.try_pop() == (1, Descriptor(Kind.PING, 7))
    assert agent.try_pop() == (1, Descriptor(Kind.SUM, 7))
    assert top_of(7) == top_of(7 + 2**31)


def test_roles_move_under_load_and_nothing_is_lost(sidecar: Sidecar) -> None:
    """A sum takes the old way or the new one while its round's top changes, and comes in once, in order at each."""
    inboxes, outbox = (sidecar.inbox(2), sidecar.inbox(3)), sidecar.outbox(1)
    got: tuple[list[int], list[int]] = ([], [])
    over = threading.Event()

    def move() -> None:
        while not over.is_set():
            sidecar.route_top(5, 2)
            sidecar.route_top(5, 3)

    sidecar.route_top(5, 2)
    thread = threading.Thread(target=move)
    thread.start()
    try:
        for i in range(20_000):
            outbox.push(2, Descriptor(Kind.SUM, 5, i))
            for inbox, mine in zip(inboxes, got, strict=True):
                mine += [d.block for _, d in iter(inbox.try_pop, None)]
    finally:
        over.set()
        thread.join()
    assert outbox.flush()
    for inbox, mine in zip(inboxes, got, strict=True):
        mine += [d.block for _, d in iter(inbox.try_pop, None)]
        assert mine == sorted(mine)
        assert mine
    assert sorted(got[0] + got[1]) == [*range(20_000)]


# ---------------------------------------------------------------- pieces


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3 * BATCH), st.lists(st.integers(1, 5 * RECORD_BYTES), min_size=1, max_size=40))
def test_records_come_in_any_pieces(count: int, pieces: list[int]) -> None:
    """However a stream is cut, every record comes out once, whole and in order; a begun one waits for its rest."""
    arena, (near, far) = Arena.create(1, 4), socket.socketpair()
    with near, far:
        inbox = Receiver(arena, far, 2, lambda record: None)
        data = b"".join(record(2, i).pack() for i in range(count))
        got, sent, k = [], 0, 0
        while sent < len(data):
            step = data[sent : sent + pieces[k % len(pieces)]]
            near.sendall(step)
            sent, k = sent + len(step), k + 1
            got += [n for _, n in numbers(inbox)]
            assert len(got) == sent // RECORD_BYTES
        assert got == [*range(count)]
    arena.close()


def test_a_stray_is_handed_on_and_not_taken(stream: Stream) -> None:
    """A participant hands on a record for another participant, and takes a record for a role: the kernel chose it."""
    near, inbox, strays = stream
    sent = [record(3, 0), record(2, 1), record(OWNER, 2), record(2, 3)._replace(dst=top_of(9), line=3)]
    near.sendall(b"".join(one.pack() for one in sent))
    assert numbers(inbox) == [(1, 1), (1, 3)]
    assert strays == [sent[0], sent[2]]


def test_a_worker_sends_strays_on_through_the_kernel(sidecar: Sidecar, arena: Arena) -> None:
    """A record that reached the wrong worker reaches the right one a moment later."""
    (near, far), right = socket.socketpair(), sidecar.inbox(1)
    with near, far, socket.socket(fileno=sidecar.admit(3)) as own:
        wrong = Receiver(arena, far, 3, sent_on(own))
        near.sendall(record(1, 4, src=2).pack() + record(3, 5, src=2).pack())
        assert numbers(wrong) == [(2, 5)]
        assert numbers(right) == [(2, 4)]


def test_a_stray_whose_receiver_is_dying_is_let_go() -> None:
    """EPIPE: its successor is told again. Anything else is an error."""
    with socket.socket() as broken:
        send = sent_on(broken)
        send(record(2, 0))
    with pytest.raises(PeerGoneError, match=r"could not be sent on: .*Bad file descriptor"):
        send(record(2, 0))


def test_a_stray_waits_for_room() -> None:
    """Its sender thinks that it is on its way: a socket that is full for a moment must not lose it."""
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        filled = 0
        with suppress(BlockingIOError):
            while True:
                filled += near.send(bytes(RECORD_BYTES), socket.MSG_DONTWAIT)
        sending = threading.Thread(target=sent_on(near), args=(record(2, 7),))
        sending.start()
        sending.join(0.05)
        assert sending.is_alive()
        data = far.recv(filled, socket.MSG_WAITALL)
        sending.join(HANG_S)
        assert not sending.is_alive()
        assert data == bytes(filled)
        assert Record.unpack(far.recv(4096)) == [record(2, 7)]


# ---------------------------------------------------------------- credits


def test_credits_come_back_as_descriptors_are_taken(sidecar: Sidecar, arena: Arena) -> None:
    """Each that is taken makes room for one; the counts say what is on its way."""
    sender, inbox = sidecar.outbox(1)._ends[2], sidecar.inbox(2)
    capacity, given_ = sender.capacity, 0
    while sender.try_push(numbered(given_)):
        given_ += 1
    assert given_ == capacity
    assert counts_of(arena, 2) == (capacity, 0)
    choose = random.Random(2)
    taken = 0
    for _ in range(300):
        n = choose.randint(1, capacity)
        for _ in range(n):
            if (item := inbox.try_pop()) is not None:
                assert item == (1, numbered(taken))
                taken += 1
        while sender.try_push(numbered(given_)):
            given_ += 1
        assert given_ - taken == capacity
        assert counts_of(arena, 2) == (given_, taken)


def test_outbox_keeps_what_has_no_credit_in_order(sidecar: Sidecar) -> None:
    """Records without credit are sent later, in order, and other targets are not held up."""
    outbox, first, second = sidecar.outbox(), sidecar.inbox(1), sidecar.inbox(2)
    for i in range(1000):
        outbox.push(1, numbered(i))
    outbox.push(2, numbered(5))
    assert numbers(second) == [(OWNER, 5)]
    assert not outbox.flush()
    got = numbers(first)
    while not outbox.flush():
        got += numbers(first)
    assert got + numbers(first) == [(OWNER, i) for i in range(1000)]


def test_what_cannot_be_taken_in_now_costs_no_credit(arena: Arena) -> None:
    """A socket that is full says so at each attempt; when it is read, all credits are there."""
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        _, outbox = ends_of(arena, near.detach(), 1)
        sender, count = outbox._ends[2], 0
        while sender.try_push(numbered(count)):
            count += 1
        assert count < sender.capacity, "the socket was to be full before the credits were used up"
        assert not any(sender.try_push(numbered(count)) for _ in range(2 * sender.capacity))
        assert counts_of(arena, 2) == (count, 0)
        inbox = Receiver(arena, far, 2, lambda record: None)
        assert numbers(inbox) == [(1, i) for i in range(count)]
        assert sender.try_push(numbered(count))
        sender._socket.close()


def test_a_broken_socket_is_an_error(arena: Arena, sidecar: Sidecar) -> None:
    """A socket that was closed under its ends is told as it is, and no credit is lost with it."""
    inbox, outbox = ends_of(arena, sidecar.admit(1), 1)
    inbox._socket.close()
    with pytest.raises(PeerGoneError, match=r"a descriptor to participant 2 could not be sent: .*Bad file descriptor"):
        outbox.push(2, numbered(0))
    with pytest.raises(PeerGoneError, match=r"the socket of participant 1 is broken: .*Bad file descriptor"):
        inbox.try_pop()
    assert counts_of(arena, 2) == (0, 0)


def test_participants_outside_the_arena_are_refused(arena: Arena, sidecar: Sidecar) -> None:
    """An outbox has an end for each participant, and nobody else; a closed arena is a LeaseError."""
    inbox, outbox = sidecar.inbox(1), sidecar.outbox(1)
    assert len(outbox._ends) == arena.participants
    with pytest.raises(ShmError):
        counts_of(arena, arena.participants)
    arena.close()
    for use in (lambda: outbox.push(2, numbered(0)), inbox.try_pop):
        with pytest.raises(LeaseError):
            use()


# ---------------------------------------------------------------- waiting


def test_wait_ends_when_something_comes_and_at_its_time(sidecar: Sidecar) -> None:
    """Nothing came: false, with and without spinning. Something is there: true at once, and it stays there.

    A receiver that waits for long is woken by a message, also a good while later.
    """
    inbox, outbox = sidecar.inbox(1), sidecar.outbox()
    timer = threading.Timer(5 * WAIT_CAP_S, outbox.push, (1, numbered(1)))
    timer.start()
    assert inbox.wait(0.0, WAIT_CAP_S)
    assert numbers(inbox) == [(OWNER, 1)]
    timer.join()
    for spin_s in (0.0, 0.01):
        assert not inbox.wait(spin_s, 0.02)
        outbox.push(1, numbered(1))
        assert inbox.wait(spin_s, HANG_S)
        assert inbox.wait(spin_s, HANG_S)
        assert numbers(inbox) == [(OWNER, 1)]


@pytest.mark.parametrize("spin_s", [0.0, 100e-6], ids=["sleeping", "spinning"])
def test_wait_is_woken_by_another_process(sidecar: Sidecar, arena: Arena, spin_s: float) -> None:
    """5,000 times back and forth between two processes, by their sockets alone: no wake-up is lost."""
    given_, fd, count = sidecar.admit(1), arena.fd, 5_000
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            inbox, outbox = ends_of(Arena.attach(fd), given_, 1)
            for i in range(count):
                assert take(inbox, spin_s) == (OWNER, numbered(i))
                outbox.push(OWNER, numbered(i))
            status = 0
        finally:
            os._exit(status)
    os.close(given_)
    inbox, outbox = sidecar.inbox(), sidecar.outbox()
    for i in range(count):
        outbox.push(1, numbered(i))
        assert take(inbox, spin_s) == (1, numbered(i))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def take(inbox: Receiver, spin_s: float) -> tuple[int, Descriptor]:
    """The next one; waits for it."""
    end = time.monotonic() + HANG_S
    while (item := inbox.try_pop()) is None:
        assert time.monotonic() < end, "a descriptor is missing"
        inbox.wait(spin_s, 1.0)
    return item


@pytest.mark.parametrize("timeout_s", [WAIT_CAP_S, WAIT_CAP_S / 2])
def test_a_signals_handler_runs_while_it_waits(sidecar: Sidecar, timeout_s: float) -> None:
    """It is not held up until something comes: here it is what makes something come."""
    inbox, outbox = sidecar.inbox(1), sidecar.outbox()
    before = signal.signal(signal.SIGALRM, lambda *_: outbox.push(1, numbered(3)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        while not inbox.wait(0.0, timeout_s):
            pass
        assert inbox.try_pop() == (OWNER, numbered(3))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_event_loop_can_wait_for_it(sidecar: Sidecar) -> None:
    """``fd`` is readable as often as something has come, also for what was there before it was asked."""
    inbox, outbox = sidecar.inbox(1), sidecar.outbox(2)
    outbox.push(1, numbered(0))

    async def receive(count: int) -> list[int]:
        loop, rung, got = asyncio.get_running_loop(), asyncio.Event(), []
        loop.add_reader(inbox.fd, rung.set)
        sender = asyncio.create_task(send(count))
        try:
            while len(got) < count:
                rung.clear()
                if inbox.arm():
                    await asyncio.wait_for(rung.wait(), HANG_S)
                got += [n for _, n in numbers(inbox)]
        finally:
            loop.remove_reader(inbox.fd)
            await sender
        return got

    async def send(count: int) -> None:
        for i in range(1, count):
            outbox.push(1, numbered(i))
            await asyncio.sleep(0.001 if i % 100 == 0 else 0)

    assert asyncio.run(receive(1000)) == [*range(1000)]


def test_arm_says_that_something_is_here_already(sidecar: Sidecar) -> None:
    """Records that were received with others, and are not asked for yet, make no socket readable."""
    inbox, outbox = sidecar.inbox(1), sidecar.outbox()
    assert inbox.arm()
    for i in range(3):
        outbox.push(1, numbered(i))
    assert inbox.try_pop() == (OWNER, numbered(0))
    assert not inbox.arm()
    assert numbers(inbox) == [(OWNER, 1), (OWNER, 2)]
    assert inbox.arm()


# ---------------------------------------------------------------- forks


def test_a_fork_takes_nothing_and_sends_nothing(sidecar: Sidecar, in_fork: Callable[[Callable[[], None]], int]) -> None:
    """A fork of the process shares its sockets: it is told that they are not its own before it touches them."""
    inbox, outbox = sidecar.inbox(), sidecar.outbox(1)
    outbox.push(OWNER, numbered(1))

    def misuse() -> None:
        for use in (inbox.try_pop, lambda: inbox.wait(0.0, 0.1), lambda: outbox.push(OWNER, numbered(2))):
            try:
                use()
            except LeaseError:
                continue
            raise AssertionError("that was let through")

    assert in_fork(misuse) == 0
    assert numbers(inbox) == [(1, 1)]


def test_execution_time_is_told_with_the_next_record(sidecar: Sidecar) -> None:
    """Whole microseconds travel, once; what is less than one is told later."""
    outbox: Outbox = sidecar.outbox(1)
    sidecar.inbox()
    for ns in (1_500, 0, 700, 10**15):
        outbox.spent.ns += ns
        outbox.push(OWNER, numbered(0))
    most = (2**32 - 1) * 1000
    assert sidecar.metrics()[1].busy_ns == 1_000 + 0 + 1_000 + most
    assert outbox.spent.ns == 1_500 + 700 + 10**15 - 2_000 - most
