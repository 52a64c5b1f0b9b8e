"""Two aggregators in separate network namespaces, with no link between them, compute a mean together.

Run the example as root: sudo python aggregate.py

The aggregators are like two containers on one machine. They share the memory in which the updates lie, and each has one
socket; a program in the kernel moves descriptors of 32 bytes between these sockets, across the namespaces.
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
from lifl.shm.arena import AGENT, Arena, Block, State
from lifl.shm.ring import Descriptor, Kind, Outbox, Receiver

LEAF, TOP = 1, 2
ROUND = 1
NUMBERS = 1_000_000
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1


# ---------------------------------------------------------------- an aggregator, in its namespace


def aggregator(number: int, control: socket.socket) -> None:
    """Enters a namespace, makes its socket there, receives the memory, and does its part of the round."""
    enter_namespace()
    # The aggregator uses one end. The launcher keeps the other end open, and puts the first into the kernel's map.
    own, anchor = pair()
    namespace = os.stat("/proc/self/ns/net").st_ino
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hello = f"{namespace} {listening.getsockname()[1]}"
        socket.send_fds(control, [hello.encode()], [own.fileno(), anchor.fileno()])
        anchor.close()
        _, (memory,), _, _ = socket.recv_fds(control, 16, 1)
        port = int(control.recv(16))
        with socket.socket() as trying:
            control.send(os.strerror(trying.connect_ex(("127.0.0.1", port))).encode())
    arena = Arena.attach(memory)
    inbox, outbox = ends_of(arena, own.detach(), number)
    (leaf if number == LEAF else top)(arena, inbox, outbox)


def enter_namespace() -> None:
    """Moves this process into a new network namespace, and starts the loopback device, the only one in it."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNET):
        sys.exit("this process may not make a network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def leaf(arena: Arena, inbox: Receiver, outbox: Outbox) -> None:
    """Adds up the updates in place, and sends the sum's descriptor to the top of the round."""
    updates = []
    while (descriptor := receive(inbox)).kind == Kind.UPDATE:
        updates.append(descriptor)
    total = numbers(arena, updates[0])
    for one in updates[1:]:
        total += numbers(arena, one)
    d = updates[0]
    arena.move(block_of(d), (LEAF, State.READY), (TOP, State.COMMITTED))
    # TOP means "the top of round 1"; only the kernel's table knows which aggregator that is.
    outbox.push(TOP, Descriptor(Kind.SUM, ROUND, d.block, d.generation, len(updates)))


def top(arena: Arena, inbox: Receiver, outbox: Outbox) -> None:
    """Divides the sum by the number of updates, and sends the mean's descriptor to the launcher."""
    d = receive(inbox)
    mean = numbers(arena, d)
    mean /= d.arg
    arena.move(block_of(d), (TOP, State.COMMITTED), (AGENT, State.READY))
    outbox.push(AGENT, d._replace(kind=Kind.RESULT))


# ---------------------------------------------------------------- the launcher


def main() -> None:
    """Starts both aggregators, shares the memory and their ports with them, and sends two updates."""
    support = probe.support()
    if not support.available:
        sys.exit(f"{support.reason}; {support.remedy}")
    # The aggregators are forked first, so that they inherit neither the memory nor the sidecar of the launcher.
    controls = {number: start(number) for number in (LEAF, TOP)}
    arena = Arena.create(4 * 8 * NUMBERS, participants=3)
    sidecar = Sidecar(arena)
    ports = {}
    for number, control in controls.items():
        hello, (own, anchor), _, _ = socket.recv_fds(control, 64, 2)
        with socket.socket(fileno=own) as copy:
            sidecar.enter(number, copy, socket.socket(fileno=anchor))
        socket.send_fds(control, [b"memory"], [arena.fd])
        namespace, ports[number] = map(int, hello.split())
        is_apart = namespace != os.stat("/proc/self/ns/net").st_ino
        print(f"aggregator {number} is in a network namespace of its own: {is_apart}")
    for number, other in ((LEAF, TOP), (TOP, LEAF)):
        controls[number].send(str(ports[other]).encode())
        print(f"aggregator {number} connects to aggregator {other}: {controls[number].recv(64).decode()}")

    sidecar.route_top(ROUND, TOP)
    inbox, outbox = sidecar.inbox(), sidecar.outbox()
    for value in (1.0, 4.0):
        block = arena.alloc(8 * NUMBERS)
        np.frombuffer(arena.buffer(block))[:] = value
        arena.move(block, (AGENT, State.WRITING), (LEAF, State.READY))
        outbox.push(LEAF, Descriptor(Kind.UPDATE, ROUND, block.index, block.generation))
        print(f"an update of 8 MB, all {value}, to aggregator {LEAF}")
    outbox.push(LEAF, Descriptor(Kind.FLUSH, ROUND))

    mean = numbers(arena, receive(inbox))
    print(f"the mean of both is in the launcher's memory: all {mean[0]}, {(mean == mean[0]).all()}")
    for number, counted in sorted(sidecar.metrics().items()):
        name = "the launcher" if number == AGENT else f"aggregator {number}"
        print(f"the kernel has counted for {name}: {counted.records} records, {counted.bytes} bytes")
    for one in multiprocessing.active_children():
        one.join()
    sidecar.close()


def start(number: int) -> socket.socket:
    """Starts an aggregator; returns the launcher's end of a Unix socket to it (containers use one in a volume)."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    multiprocessing.get_context("fork").Process(target=aggregator, args=(number, far), daemon=True).start()
    far.close()
    return near


# ---------------------------------------------------------------- both


def receive(inbox: Receiver) -> Descriptor:
    """Waits for the next descriptor and returns it."""
    while (item := inbox.try_pop()) is None:
        inbox.wait(0.0, 1.0)
    return item[1]


def numbers(arena: Arena, d: Descriptor) -> np.ndarray:
    """The numbers in a block, as an array over the shared memory, without a copy."""
    block = arena.map(d.block, d.generation)
    return np.frombuffer((ctypes.c_char * block.nbytes).from_address(block.address))


def block_of(d: Descriptor) -> Block:
    """The block that a descriptor names."""
    return Block(d.block, d.generation, 8 * NUMBERS)


if __name__ == "__main__":
    main()
