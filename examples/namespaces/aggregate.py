"""Two aggregators in network namespaces of their own, with no link between them, make a mean together.

Run it as root: sudo python aggregate.py

They are what two containers on one machine would be. They share the memory in which the updates lie, and each has one
socket; a program in the kernel moves descriptors of 32 bytes between these, whatever network they are of.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import socket
import struct
import sys

import numpy as np

from lifl.ebpf import probe
from lifl.ebpf.links import ends_of
from lifl.ebpf.pairs import pair
from lifl.ebpf.sidecar import Sidecar
from lifl.shm.arena import OWNER, Arena, Block, State
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import Outbox, Receiver

LEAF, TOP = 1, 2
ROUND = 1
NUMBERS = 1_000_000
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1


# ---------------------------------------------------------------- an aggregator, in its namespace


def aggregator(me: int, control: socket.socket) -> None:
    """Enters a namespace, makes its socket there, is given the memory, and does its part of the round."""
    enter_namespace()
    # One end is the aggregator's. The launcher keeps the other open, and puts the first into the kernel's map.
    own, anchor = pair()
    namespace = os.stat("/proc/self/ns/net").st_ino
    with socket.create_server(("127.0.0.1", 0)) as listening:
        said = f"{namespace} {listening.getsockname()[1]}"
        socket.send_fds(control, [said.encode()], [own.fileno(), anchor.fileno()])
        anchor.close()
        _, (memory,), _, _ = socket.recv_fds(control, 16, 1)
        port = int(control.recv(16))
        with socket.socket() as trying:
            control.send(os.strerror(trying.connect_ex(("127.0.0.1", port))).encode())
    arena = Arena.attach(memory)
    inbox, outbox = ends_of(arena, own.detach(), me)
    (leaf if me == LEAF else top)(arena, inbox, outbox)


def enter_namespace() -> None:
    """A network namespace of this process's own: nothing is in it but a loopback device, which has to be up."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNET):
        sys.exit("this process may not make a network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def leaf(arena: Arena, inbox: Receiver, outbox: Outbox) -> None:
    """Adds up the updates that it is told of, where they lie, and tells the top of the round."""
    updates = []
    while (told := receive(inbox)).kind == Kind.UPDATE:
        updates.append(told)
    total = numbers(arena, updates[0])
    for one in updates[1:]:
        total += numbers(arena, one)
    d = updates[0]
    arena.move(block_of(d), (LEAF, State.READY), (TOP, State.COMMITTED))
    # "The top of round 1": who that is, only the kernel's table knows.
    outbox.push(TOP, Descriptor(Kind.SUM, ROUND, d.block, d.generation, len(updates)))


def top(arena: Arena, inbox: Receiver, outbox: Outbox) -> None:
    """Divides, and tells the launcher."""
    d = receive(inbox)
    mean = numbers(arena, d)
    mean /= d.arg
    arena.move(block_of(d), (TOP, State.COMMITTED), (OWNER, State.READY))
    outbox.push(OWNER, d._replace(kind=Kind.RESULT))


# ---------------------------------------------------------------- the launcher


def main() -> None:
    """Starts both, gives them the memory and each other, and sends two updates."""
    support = probe.support()
    if not support.available:
        sys.exit(f"{support.reason}; {support.remedy}")
    # Before all else: they are to have nothing of the launcher's but what they are given.
    controls = {me: start(me) for me in (LEAF, TOP)}
    arena = Arena.create(4 * 8 * NUMBERS, participants=3)
    sidecar = Sidecar(arena)
    ports = {}
    for me, control in controls.items():
        said, (own, anchor), _, _ = socket.recv_fds(control, 64, 2)
        with socket.socket(fileno=own) as copy:
            sidecar.enter(me, copy, socket.socket(fileno=anchor))
        socket.send_fds(control, [b"memory"], [arena.fd])
        namespace, ports[me] = map(int, said.split())
        is_apart = namespace != os.stat("/proc/self/ns/net").st_ino
        print(f"aggregator {me} is in a network namespace of its own: {is_apart}")
    for me, other in ((LEAF, TOP), (TOP, LEAF)):
        controls[me].send(str(ports[other]).encode())
        print(f"aggregator {me} connects to aggregator {other}: {controls[me].recv(64).decode()}")

    sidecar.route_top(ROUND, TOP)
    inbox, outbox = sidecar.inbox(), sidecar.outbox()
    for value in (1.0, 4.0):
        block = arena.alloc(8 * NUMBERS)
        np.frombuffer(arena.buffer(block))[:] = value
        arena.move(block, (OWNER, State.WRITING), (LEAF, State.READY))
        outbox.push(LEAF, Descriptor(Kind.UPDATE, ROUND, block.index, block.generation))
        print(f"an update of 8 MB, all {value}, to aggregator {LEAF}")
    outbox.push(LEAF, Descriptor(Kind.FLUSH, ROUND))

    mean = numbers(arena, receive(inbox))
    print(f"the mean of both is in the launcher's memory: all {mean[0]}, {(mean == mean[0]).all()}")
    for me, counted in sorted(sidecar.metrics().items()):
        who = "the launcher" if me == OWNER else f"aggregator {me}"
        print(f"the kernel has counted for {who}: {counted.records} records, {counted.bytes} bytes")
    for one in multiprocessing.active_children():
        one.join()
    sidecar.close()


def start(me: int) -> socket.socket:
    """Starts an aggregator; the launcher's end of the Unix socket to it, as a shared volume would have one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    multiprocessing.get_context("fork").Process(target=aggregator, args=(me, theirs), daemon=True).start()
    theirs.close()
    return ours


# ---------------------------------------------------------------- both


def receive(inbox: Receiver) -> Descriptor:
    """The next descriptor; waits for it."""
    while (item := inbox.try_pop()) is None:
        inbox.wait(0.0, 1.0)
    return item[1]


def numbers(arena: Arena, d: Descriptor) -> np.ndarray:
    """A block's numbers, where they lie."""
    block = arena.map(d.block, d.generation)
    return np.frombuffer((ctypes.c_char * block.nbytes).from_address(block.address))


def block_of(d: Descriptor) -> Block:
    """The block that a descriptor names."""
    return Block(d.block, d.generation, 8 * NUMBERS)


if __name__ == "__main__":
    main()
