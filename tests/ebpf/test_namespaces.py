"""Aggregators in network namespaces of their own, with no link between them, as containers on one machine are.

They share the arena's memory and nothing else: each is given it, and gives its socket, through a Unix socket.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import attrs
import numpy as np
import pytest

import lifl
from lifl.ebpf.links import ends_of
from lifl.ebpf.pairs import pair
from lifl.ebpf.record import RECORD_BYTES
from lifl.ebpf.sidecar import Sidecar
from lifl.shm.arena import AGENT, Arena, Block, State
from lifl.shm.ring import Descriptor, Kind, Outbox
from lifl.shm.sizes import sum_bytes_of
from lifl.workers.aggregator import Aggregator, die_with

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
HANG_S = 60.0
LEAF, TOP, ROUND = 1, 2, 1
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(50_000)})

Life = Callable[[int, socket.socket, Arena], None]


def enter_namespace() -> None:
    """A network namespace of this process's own, in which nothing is but its loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


@attrs.define
class Inmate:
    """A process in a namespace, as the launcher knows it."""

    pid: int
    control: socket.socket
    namespace: int
    address: tuple[str, int]

    def ask(self, port: int) -> int:
        """The result of a connection to a port of 127.0.0.1: 0 or an errno."""
        self.control.send(str(port).encode())
        return int(self.control.recv(64))


def live(me: int, control: socket.socket, life: Life) -> None:
    """In the new process: makes its pair in its namespace, passes it on, gets the memory, then lives."""
    enter_namespace()
    own, anchor = pair()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said = f"{os.stat('/proc/self/ns/net').st_ino} {listening.getsockname()[1]}"
        socket.send_fds(control, [said.encode()], [own.fileno(), anchor.fileno()])
        anchor.close()
        _, fds, _, _ = socket.recv_fds(control, 16, 1)
        arena = Arena.attach(fds[0])
        while (port := int(control.recv(64))) > 0:
            with socket.socket() as trying:
                control.send(str(trying.connect_ex(("127.0.0.1", port))).encode())
        life(me, own, arena)


@contextmanager
def imprisoned(sidecar: Sidecar, arena: Arena, me: int, life: Life) -> Iterator[Inmate]:
    """Participant `me` in a namespace of its own, with its socket in the map; killed afterwards if it still lives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if not (pid := os.fork()):
        status = 1
        try:
            die_with(parent)
            ours.close()
            sidecar.close()
            live(me, theirs, life)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    theirs.close()
    ours.settimeout(HANG_S)
    try:
        said, (own, anchor), _, _ = socket.recv_fds(ours, 64, 2)
        with socket.socket(fileno=own) as copy:
            sidecar.enter(me, copy, socket.socket(fileno=anchor))
        socket.send_fds(ours, [b"arena"], [arena.fd])
        namespace, port = map(int, said.split())
        yield Inmate(pid, ours, namespace, ("127.0.0.1", port))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()


def aggregate(me: int, own: socket.socket, arena: Arena) -> None:
    """The life of lifl's worker."""
    inbox, outbox = ends_of(arena, own.detach(), me)
    outbox.push(AGENT, Descriptor(Kind.HELLO, 0))
    Aggregator(arena, me, inbox, outbox).run(0.0)


def read_an_update(me: int, own: socket.socket, arena: Arena) -> None:
    """A leaf passes what it is told of on, to the top; the top reads it from the memory and says its sum."""
    inbox, outbox = ends_of(arena, own.detach(), me)
    while True:
        if (item := inbox.try_pop()) is None:
            inbox.wait(0.0, HANG_S)
        elif me == LEAF:
            outbox.push(TOP, item[1]._replace(kind=Kind.SUM, round=ROUND))
        else:
            d = item[1]
            mapping = arena.map(d.block, d.generation)
            array = np.frombuffer((ctypes.c_char * mapping.nbytes).from_address(mapping.address))
            outbox.push(AGENT, Descriptor(Kind.RESULT, int(array.sum()), d.block, d.generation, item[0]))


def answer(sidecar: Sidecar, kind: Kind) -> Descriptor:
    """The next of its kind that comes to the launcher."""
    inbox, end = sidecar.inbox(), time.monotonic() + HANG_S
    while (item := inbox.try_pop()) is None or item[1].kind != kind:
        assert time.monotonic() < end, f"no {kind.name} has come"
        inbox.wait(0.0, 1.0)
    return item[1]


def fill(arena: Arena, value: float, owner: int) -> Block:
    """An update all of whose numbers are this, ready for a participant."""
    block = arena.alloc(SPEC.layout.update_bytes)
    assert block is not None
    np.frombuffer(arena.buffer(block))[:] = value
    arena.note(block.index).weight = 1.0
    assert arena.move(block, (AGENT, State.WRITING), (owner, State.READY))
    return block


@pytest.fixture
def large() -> Iterator[Arena]:
    """Room for a round."""
    arena = Arena.create(16 * 2**20, 3)
    yield arena
    arena.close()


@pytest.fixture
def launcher(namespaces: None, large: Arena) -> Iterator[Sidecar]:
    """In the namespace of the tests, with room for two aggregators elsewhere."""
    sidecar = Sidecar(large)
    yield sidecar
    sidecar.close()


def test_there_is_no_link_between_them(launcher: Sidecar, large: Arena) -> None:
    """Three namespaces; each hears its own loopback device, and none can connect to another or to the launcher."""
    with ExitStack() as stack:
        two = [stack.enter_context(imprisoned(launcher, large, me, read_an_update)) for me in (LEAF, TOP)]
        assert len({os.stat("/proc/self/ns/net").st_ino, *(one.namespace for one in two)}) == 3
        with socket.create_server(("127.0.0.1", 0)) as listening:
            ports = [one.address[1] for one in two] + [listening.getsockname()[1]]
            for i, one in enumerate(two):
                found = [one.ask(port) for port in ports]
                assert [bool(error) for error in found] == [port != ports[i] for port in ports]
                assert set(found) == {0, errno.ECONNREFUSED}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(two[0].address)


def test_descriptors_pass_between_them_and_the_update_stays(launcher: Sidecar, large: Arena) -> None:
    """From the launcher to one, from that to the other, and back, through three namespaces; they read one memory."""
    outbox = launcher.outbox()
    with ExitStack() as stack:
        for me in (LEAF, TOP):
            stack.enter_context(imprisoned(launcher, large, me, read_an_update)).control.send(b"0")
        launcher.route_top(ROUND, TOP)
        for value in (1, 3, 7):
            block = fill(large, value, LEAF)
            outbox.push(LEAF, Descriptor(Kind.UPDATE, 0, block.index, block.generation))
            got = answer(launcher, Kind.RESULT)
            assert (got.round, got.block, got.generation, got.arg) == (
                value * 50_000,
                block.index,
                block.generation,
                LEAF,
            )
    metrics = launcher.metrics()
    assert {me: counted.records for me, counted in metrics.items()} == {AGENT: 3, LEAF: 3, TOP: 3}
    assert not any(counted.missed for counted in metrics.values())


def test_lifls_workers_make_a_round_across_them(launcher: Sidecar, large: Arena) -> None:
    """Real leaves and a real top, told as a Node tells them: the mean of all updates is in the memory."""
    outbox, layout = launcher.outbox(), SPEC.layout
    encoded = layout.encode(0)
    control, mean = large.alloc(len(encoded)), large.alloc(layout.mean_bytes)
    assert control is not None
    assert mean is not None
    large.buffer(control)[: len(encoded)] = encoded
    with ExitStack() as stack:
        for me in (LEAF, TOP):
            stack.enter_context(imprisoned(launcher, large, me, aggregate)).control.send(b"0")
            enlist(large, outbox, me, control)
        for k in range(10):
            me = LEAF if k % 2 else TOP
            block = fill(large, 2.0**k, me)
            outbox.push(me, Descriptor(Kind.UPDATE, ROUND, block.index, block.generation))
        launcher.route_top(ROUND, TOP)
        assert large.move(mean, (AGENT, State.WRITING), (TOP, State.WRITING))
        for me in (LEAF, TOP):
            outbox.push(me, Descriptor(Kind.FLUSH, ROUND, mean.index, mean.generation, TOP << 8 | 2))
        result = answer(launcher, Kind.RESULT)
        assert result.block == mean.index
        assert (np.frombuffer(large.buffer(mean)) == (2**10 - 1) / 10).all()


def enlist(arena: Arena, outbox: Outbox, me: int, control: Block) -> None:
    """Makes a participant a leaf of the round, as `lifl.round.blocks` does."""
    outbox.push(me, Descriptor(Kind.OPEN, ROUND, control.index, control.generation))
    for _ in range(2):
        block = arena.alloc(sum_bytes_of(SPEC.layout))
        assert block is not None
        arena.move(block, (AGENT, State.WRITING), (me, State.ACCUM))
        outbox.push(me, Descriptor(Kind.GRANT, ROUND, block.index, block.generation))


def test_one_that_is_killed_has_a_successor_elsewhere(launcher: Sidecar, large: Arena) -> None:
    """Its socket is gone with it, though the launcher holds the anchor; one in another namespace takes its place."""
    outbox = launcher.outbox()
    launcher.route_top(ROUND, TOP)
    with imprisoned(launcher, large, LEAF, read_an_update):
        assert LEAF in set(launcher._program.socks)
    assert LEAF not in set(launcher._program.socks)
    launcher.bury(LEAF)
    with ExitStack() as stack:
        for me in (LEAF, TOP):
            stack.enter_context(imprisoned(launcher, large, me, read_an_update)).control.send(b"0")
        block = fill(large, 5, LEAF)
        outbox.push(LEAF, Descriptor(Kind.UPDATE, 0, block.index, block.generation))
        assert answer(launcher, Kind.RESULT).round == 250_000
    assert launcher.metrics()[TOP].bytes == RECORD_BYTES
