"""The rules of docs/ebpf.md, each twice: what happens on this kernel without it, and that with lifl it does not."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from naive import APPLY, CORK, DEAD, MISS, NOBODY, Wires, packed, record, without

from lifl.ebpf import prebuilt
from lifl.ebpf.links import Sender, sent_on
from lifl.ebpf.pairs import pair
from lifl.ebpf.record import LAUNCHER, RECORD_BYTES
from lifl.ebpf.sidecar import Sidecar
from lifl.errors import PeerGoneError
from lifl.shm.arena import OWNER, Arena, ffi
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import Spent, counts_of

UNDRAINED = 100_000
HANG_S = 60.0
"""After so long something that must happen is taken never to happen; only a hang is ever caught by it."""


@pytest.fixture
def own(kernel: None) -> Iterator[Wires]:
    """lifl's program, as it ships."""
    with Wires(prebuilt.load()) as wires:
        yield wires


def child_with(wires: Wires, me: int, do: Callable[[], None]) -> int:
    """A process that alone has a participant's socket, as a worker does; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            for key, one in wires.own.items():
                if key != me:
                    one.close()
            do()
        finally:
            os._exit(0)
    wires.own.pop(me).close()
    return pid


def killed(pid: int) -> None:
    """Kills a process, and waits until it is gone."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# ---------------------------------------------------------------- 1: never SK_DROP


def test_rule_1_without_it_a_sender_is_lost_after_one_record_for_a_dead_one(clang: str, tmp_path: Path) -> None:
    """SK_DROP sticks: the sender gets EACCES for what it sends to others too, for ever."""
    with Wires(without(tmp_path, clang, MISS, "if (!is_delivered) return SK_DROP;")) as wires:
        assert wires.send(1, packed(record(2))) == RECORD_BYTES
        for dst in (DEAD, 2, 2, 3):
            with pytest.raises(PermissionError):
                wires.send(1, packed(record(dst)))
        assert wires.received(2) == [2]
        assert wires.received(3) == []


def test_rule_1_a_record_for_a_dead_one_harms_no_sender(own: Wires) -> None:
    """It goes to the launcher, and the sender goes on."""
    for dst in (2, DEAD, 2, NOBODY, 3):
        assert own.send(1, packed(record(dst))) == RECORD_BYTES
    assert own.received(2) == [2, 2]
    assert own.received(3) == [3]
    assert own.received(LAUNCHER) == [DEAD, NOBODY]


# ---------------------------------------------------------------- 2: a miss goes to the launcher


def test_rule_2_without_it_a_miss_inside_a_batch_is_misdelivered(clang: str, tmp_path: Path) -> None:
    """A record that is passed goes where the record before it went."""
    with Wires(without(tmp_path, clang, MISS, "if (!is_delivered) return SK_PASS;")) as wires:
        wires.send(1, packed(record(2), record(DEAD), record(3)))
        assert DEAD in wires.received(2)
        assert wires.received(LAUNCHER) == []


def test_rule_2_a_miss_inside_a_batch_goes_to_the_launcher(own: Wires) -> None:
    """Wherever in the batch it is, and whether its route or its socket is missing."""
    own.send(1, packed(*map(record, (NOBODY, 2, NOBODY, DEAD, 3, 2, DEAD))))
    assert own.received(2) == [2, 2]
    assert own.received(LAUNCHER) == [NOBODY, NOBODY, DEAD, DEAD]
    assert own.received(3) == [3]


# ---------------------------------------------------------------- 3: one verdict for each record


def test_rule_3_without_it_a_batch_goes_whole_to_the_first(clang: str, tmp_path: Path) -> None:
    """The program is asked once for one send, however many records are in it."""
    with Wires(without(tmp_path, clang, APPLY, "(void)bpf_msg_apply_bytes;")) as wires:
        wires.send(1, packed(record(2), record(3), record(2)))
        assert wires.received(2) == [2, 3, 2]
        assert wires.received(3) == []


def test_rule_3_without_it_a_record_in_pieces_is_gone(clang: str, tmp_path: Path) -> None:
    """The pieces go through TCP to the anchor, which nobody reads."""
    with Wires(without(tmp_path, clang, CORK, "(void)bpf_msg_cork_bytes;")) as wires:
        data = packed(record(2, 7))
        wires.send(1, data[:12])
        wires.send(1, data[12:])
        assert wires.received(2) == []
        assert wires.anchors[1].recv(RECORD_BYTES, socket.MSG_WAITALL) == data


@pytest.mark.parametrize("cut", [32, 64])
def test_rule_3_a_batch_is_cut_up(own: Wires, cut: int) -> None:
    """Each record of it goes where it should, in order, also if a call ends between two of them."""
    data = packed(record(2, 1), record(3, 2), record(2, 3))
    own.send(1, data)
    assert (own.received(2), own.received(3)) == ([2, 2], [3])
    own.send(1, data[:cut])
    own.send(1, data[cut:])
    assert (own.received(2), own.received(3)) == ([2, 2], [3])
    assert own.received(LAUNCHER) == []


@pytest.mark.parametrize("cut", [1, 12, 31])
def test_rule_3_a_record_in_pieces_is_put_together(own: Wires, cut: int) -> None:
    """Wherever it is cut; nothing comes before it is whole."""
    for seq in range(3):
        data = packed(record(2, seq))
        own.send(1, data[:cut])
        assert own.received(2) == []
        own.send(1, data[cut:])
        assert own.received(2) == [2]


@pytest.mark.parametrize("cut", [1, 31])
def test_rule_3_without_it_a_batch_that_ends_a_begun_record_loses_the_rest(own: Wires, cut: int) -> None:
    """The kernel puts that one together, and lets go of what came in the same call, which it says it took."""
    data = packed(record(2, 1), record(3, 2), record(2, 3))
    assert own.send(1, data[:cut]) == cut
    assert own.send(1, data[cut:]) == len(data) - cut
    own.send(1, packed(record(3, 4)))
    assert (own.received(2), own.received(3), own.received(LAUNCHER)) == ([2], [3], [])


def test_rule_3_lifl_sends_whole_records(arena: Arena) -> None:
    """lifl sends whole records, so that the kernel never joins parts: seen on a socket that keeps messages."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        sender = Sender(arena, near, 1, 2, Spent())
        sent_on(near)(record(3, 9))
        lengths = [len(far.recv(4096))]
        for i in range(300):
            if sender.try_push(Descriptor(Kind.SUM if i % 2 else Kind.PING, 0)):
                lengths.append(len(far.recv(4096)))
        assert lengths == [RECORD_BYTES] * 257


# ---------------------------------------------------------------- 4: credits


def test_rule_4_without_it_a_socket_takes_any_number(own: Wires) -> None:
    """A hundred thousand records that nobody reads are taken, and the sender is never told to wait."""
    batch = packed(*(record(2, seq) for seq in range(100)))
    for _ in range(UNDRAINED // 100):
        assert own.send(1, batch) == len(batch)
    assert len(own.received(2)) == UNDRAINED


def test_rule_4_no_more_is_on_its_way_than_there_are_credits(sidecar: Sidecar) -> None:
    """256 to a participant that reads nothing, then no more, from each sender; one that is read makes room for one."""
    inbox = sidecar.inbox(2)
    for me in (OWNER, 1):
        sender = sidecar.outbox(me)._ends[2]
        assert sender.capacity == 256
        assert [sender.try_push(Descriptor(Kind.PING, i)) for i in range(UNDRAINED)].count(True) == 256
        assert inbox.try_pop() == (OWNER, Descriptor(Kind.PING, 0 if me == OWNER else 1))
        if me == OWNER:
            assert sender.try_push(Descriptor(Kind.PING, 256))
            assert not sender.try_push(Descriptor(Kind.PING, 257))
    while inbox.try_pop() is not None:
        pass
    assert sidecar.metrics()[2].records == 256 + 1 + 256


# ---------------------------------------------------------------- 5: the ownership words are the truth


def test_rule_5_without_it_what_a_killed_worker_had_not_read_is_gone(own: Wires) -> None:
    """Its entry disappears from the map, its records with it; what comes later goes to the launcher."""
    pid = child_with(own, 2, signal.pause)
    own.send(1, packed(record(2), record(2)))
    assert 2 in set(own.program.socks)
    killed(pid)
    assert 2 not in set(own.program.socks)
    own.send(1, packed(record(2)))
    assert own.received(LAUNCHER) == [2]  # one of three


def test_rule_5_the_successor_gets_all_that_it_is_told(sidecar: Sidecar) -> None:
    """It has its own socket and every credit before it starts, and of what its predecessor was sent it gets nothing."""
    given = sidecar.admit(2)
    pid = os.fork()
    if pid == 0:
        signal.pause()
    os.close(given)
    outbox = sidecar.outbox()
    for number in range(300):  # more than may be on their way: the rest waits here
        outbox.push(2, Descriptor(Kind.UPDATE, number))
    assert not outbox.flush()
    killed(pid)

    sidecar.remove(2)
    outbox.reset(2)
    for number in range(1000, 1256):
        outbox.push(2, Descriptor(Kind.UPDATE, number))
    assert outbox.flush()
    inbox = sidecar.inbox(2)
    assert [d.round for _, d in iter(inbox.try_pop, None)] == [*range(1000, 1256)]


# ---------------------------------------------------------------- 6: anchors


def test_rule_6_without_it_a_receiver_reads_end_of_file(own: Wires) -> None:
    """The other end of a pair is closed as soon as nobody holds it, and what is sent later does not come."""
    own.anchors.pop(2).close()
    own.own[2].settimeout(HANG_S)
    assert own.own[2].recv(RECORD_BYTES) == b""


def test_rule_6_the_launcher_holds_the_anchors(sidecar: Sidecar) -> None:
    """A participant that has got nothing yet waits, until the launcher is gone: that it is told as an error."""
    inbox, outbox = sidecar.inbox(2), sidecar.outbox(1)
    assert inbox.try_pop() is None
    outbox.push(2, Descriptor(Kind.PING, 5))
    sidecar._anchors[2].shutdown(socket.SHUT_RDWR)
    assert inbox.wait(0.0, HANG_S)
    assert inbox.try_pop() == (1, Descriptor(Kind.PING, 5))
    assert select.select([inbox.fd], [], [], HANG_S)[0]
    with pytest.raises(PeerGoneError, match="the owner is gone"):
        inbox.wait(0.0, HANG_S)


# ---------------------------------------------------------------- 7: delete before an insertion


def test_rule_7_without_it_a_living_socket_cannot_be_inserted_again(own: Wires) -> None:
    """EBUSY, under its own key and under another; a socket that is new may take the key at once."""
    for key in (2, 3):
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            own.program.socks.update(key, own.own[2].fileno())
    newer, anchor = pair()
    with newer, anchor:
        own.program.socks.update(2, newer.fileno())


def test_rule_7_a_participant_may_enter_again(sidecar: Sidecar) -> None:
    """With the socket that it has, or with a new one: what is sent afterwards comes through that."""
    first, anchor = pair()
    for own, kept in ((first, anchor), (first, anchor), pair()):
        sidecar.enter(2, own, kept)
        sidecar.outbox().push(2, Descriptor(Kind.PING, 1))
        assert len(own.recv(2 * RECORD_BYTES)) == RECORD_BYTES
    first.close()
    own.close()


# ---------------------------------------------------------------- 8: EPIPE means: not now


HELD = "bpf_msg_apply_bytes(msg, 2 * LIFL_RECORD_BYTES);"
"""A verdict that holds for two records: the second meets the socket that was found for the first, in whatever state."""


def test_rule_8_without_it_a_sender_meets_epipe(clang: str, tmp_path: Path) -> None:
    """For a socket that is closed between the verdict and the delivery; then it can send again."""
    with Wires(without(tmp_path, clang, APPLY, HELD)) as wires:
        wires.send(1, packed(record(2)))
        wires.own.pop(2).close()
        with pytest.raises(BrokenPipeError):
            wires.send(1, packed(record(2)))
        wires.send(1, packed(record(2)))
        assert wires.received(LAUNCHER) == [2]


def test_rule_8_lifls_sender_tries_again_later(clang: str, tmp_path: Path, arena: Arena) -> None:
    """The same is no error for it, and costs no credit."""
    with Wires(without(tmp_path, clang, APPLY, HELD)) as wires, wires.own.pop(1) as own:
        sender = Sender(arena, own, 1, 2, Spent())
        assert sender.try_push(Descriptor(Kind.PING, 0))
        wires.own.pop(2).close()
        assert not sender.try_push(Descriptor(Kind.PING, 1))
        assert ffi.errno == errno.EPIPE
        assert counts_of(arena, 2) == (1, 0)
        assert sender.try_push(Descriptor(Kind.PING, 1))
        assert wires.received(LAUNCHER) == [2]


class Dying(threading.Thread):
    """A worker that dies again and again, and is buried each time."""

    def __init__(self, sidecar: Sidecar, me: int, times: int) -> None:
        super().__init__()
        self._sidecar, self._me, self._times = sidecar, me, times

    def run(self) -> None:
        """Its lives."""
        for _ in range(self._times):
            os.close(self._sidecar.admit(self._me))
            self._sidecar.remove(self._me)


def test_rule_8_whoever_sends_to_one_that_dies_goes_on(arena: Arena, sidecar: Sidecar) -> None:
    """2,000 times in a row: no send fails, and what is sent after the last death all comes, in order."""
    agent, dying = sidecar.inbox(), Dying(sidecar, 2, 2000)
    with socket.socket(fileno=sidecar.admit(1)) as own:
        sender = Sender(arena, own, 1, 2, Spent())
        dying.start()
        while dying.is_alive():
            sender.try_push(Descriptor(Kind.PING, 0))
            while agent.try_pop() is not None:  # what was sent while nobody was there
                pass
        dying.join()
        sidecar.remove(2)
        inbox = sidecar.inbox(2)
        assert [sender.try_push(Descriptor(Kind.PING, i)) for i in range(257)] == [True] * 256 + [False]
        assert [d.round for _, d in iter(inbox.try_pop, None)] == [*range(256)]
