"""Two clean processes that pass one message back and forth, in every way that is compared.

Owns the list of ways and the asking process: `run` executes a fresh interpreter, which imports none of the user's
modules, forks its echo while it is single-threaded, measures and ends. Both die with the process that called `run`.
Nothing here judges or prints the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs

from lifl.bench import sockets
from lifl.bench.echo import ASKER, ECHO, PAYLOAD, Measure, forked, share_a_core, spent_ns, timed
from lifl.bench.sockets import END, PING
from lifl.errors import PeerGoneError
from lifl.shm.arena import Arena
from lifl.shm.ring import Bell, Descriptor, Inbox, Kind, Producer, ring_for
from lifl.workers.aggregator import die_with

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from lifl.bench.pair import main; main(sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4])))"
)
TIMEOUT_S = 120.0
SPIN_S = 0.01
WARM_UP = 200


@attrs.frozen
class Trips:
    """Measured times of the round trips between two processes.

    Attributes
    ----------
    ns : list of int
        Nanoseconds of each round trip.
    cpu_ns : int
        Nanoseconds of CPU time, user's and kernel's, of all round trips and all processes that take part.
    """

    ns: list[int]
    cpu_ns: int


def run(way: str, messages: int, *, is_same_core: bool = False) -> Trips:
    """Makes `messages` round trips between two new processes, on different cores or on one.

    `way` is a key of ``WAYS``. Raises :class:`PeerGoneError`, with the output of the processes, if they fail or take
    longer than two minutes.
    """
    # At import NumPy starts a BLAS thread per core unless these say one, and a process with threads must not fork.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOOT, json.dumps(sys.path), way, str(messages), str(int(is_same_core))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PeerGoneError(f"two processes that pass messages ({way}) took over {TIMEOUT_S:g} s") from None
        finally:
            process.kill()  # no effect if the process has ended; otherwise its echo dies with it
    if process.returncode:
        raise PeerGoneError(f"two processes that pass messages ({way}) failed:\n{errors.decode().strip()}")
    return Trips(**json.loads(out))


# ---------------------------------------------------------------- in the clean processes


def main(way: str, messages: int, is_same_core: bool) -> None:
    """Entry point of the asking process; writes its figures to stdout, as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller of run(), which kills this process
    die_with(os.getppid())
    if is_same_core:
        share_a_core()
    with WAYS[way]() as measure:
        measure(min(WARM_UP, messages))
        before = spent_ns()
        trips = measure(messages)
        spent = spent_ns() - before
    json.dump({"ns": trips, "cpu_ns": spent}, sys.stdout)


@contextmanager
def ring(spin_s: float) -> Iterator[Measure]:
    """lifl's rings; a consumer spins up to `spin_s` seconds, then sleeps on a futex."""
    arena = Arena.create(1, 2)
    fd = arena.fd

    def echo() -> None:
        arena = Arena.attach(fd)
        inbox, back = Inbox(arena, ECHO), Producer(arena, ECHO, ASKER)
        while True:
            inbox.wait(spin_s)
            if (item := inbox.try_pop()) is not None:
                if item[1].kind == Kind.STOP:
                    return
                back.try_push(item[1])

    with forked(echo):
        inbox, there = Inbox(arena, ASKER), Producer(arena, ASKER, ECHO)

        def trip() -> None:
            there.try_push(PING)
            inbox.wait(spin_s)
            while inbox.try_pop() is None:
                inbox.wait(spin_s)

        yield lambda messages: timed(trip, messages)
        there.try_push(END)


@contextmanager
def ring_poll() -> Iterator[Measure]:
    """lifl's rings; a consumer sleeps in poll(2) on its eventfd, as a Node's thread does."""
    arena, bells = Arena.create(1, 2), (Bell(), Bell())
    fd = arena.fd

    def receive(inbox: Inbox, bell: Bell, poll: select.poll) -> Descriptor:
        while True:
            if (item := inbox.try_pop()) is not None:
                return item[1]
            if inbox.arm():
                poll.poll()
                bell.clear()

    def end(arena: Arena, side: int) -> tuple[Inbox, Producer, select.poll]:
        other = 1 - side
        ring_for(arena, other, bells[other].fd)
        poll = select.poll()
        poll.register(bells[side].fd, select.POLLIN)
        return Inbox(arena, side), Producer(arena, side, other), poll

    def echo() -> None:
        inbox, back, poll = end(Arena.attach(fd), ECHO)
        while (descriptor := receive(inbox, bells[ECHO], poll)).kind != Kind.STOP:
            back.try_push(descriptor)

    with forked(echo):
        inbox, there, poll = end(arena, ASKER)

        def trip() -> None:
            there.try_push(PING)
            receive(inbox, bells[ASKER], poll)

        yield lambda messages: timed(trip, messages)
        there.try_push(END)


@contextmanager
def ring_asyncio() -> Iterator[Measure]:
    """lifl's rings; a consumer is an asyncio event loop, which an eventfd wakes."""
    arena, bells = Arena.create(1, 2), (Bell(), Bell())
    fd = arena.fd

    async def receive(inbox: Inbox, bell: Bell, rung: asyncio.Event) -> Descriptor:
        while True:
            if (item := inbox.try_pop()) is not None:
                return item[1]
            rung.clear()
            if inbox.arm():
                await rung.wait()
                bell.clear()

    def end(arena: Arena, side: int) -> tuple[Inbox, Producer, asyncio.Event]:
        other = 1 - side
        rung = asyncio.Event()
        asyncio.get_running_loop().add_reader(bells[side].fd, rung.set)
        ring_for(arena, other, bells[other].fd)
        return Inbox(arena, side), Producer(arena, side, other), rung

    async def serve() -> None:
        inbox, back, rung = end(Arena.attach(fd), ECHO)
        while (descriptor := await receive(inbox, bells[ECHO], rung)).kind != Kind.STOP:
            back.try_push(descriptor)

    async def measure(messages: int) -> list[int]:
        inbox, there, rung = end(arena, ASKER)
        trips = []
        for _ in range(messages):
            begin = time.perf_counter_ns()
            there.try_push(PING)
            await receive(inbox, bells[ASKER], rung)
            trips.append(time.perf_counter_ns() - begin)
        return trips

    with forked(lambda: asyncio.run(serve())), asyncio.Runner() as runner:
        yield lambda messages: runner.run(measure(messages))
        Producer(arena, ASKER, ECHO).try_push(END)


@contextmanager
def eventfd() -> Iterator[Measure]:
    """Two blocking eventfds and nothing else: the cost of the kernel's wake-up, from Python."""
    ask, answer = os.eventfd(0), os.eventfd(0)

    def echo() -> None:
        while os.eventfd_read(ask) == 1:
            os.eventfd_write(answer, 1)

    with forked(echo):

        def trip() -> None:
            os.eventfd_write(ask, 1)
            os.eventfd_read(answer)

        yield lambda messages: timed(trip, messages)
        os.eventfd_write(ask, 2)


@contextmanager
def queue() -> Iterator[Measure]:
    """``multiprocessing.Queue``, one in each direction."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ask: Any = context.Queue()
    answer: Any = context.Queue()

    def echo() -> None:
        while message := ask.get():
            answer.put(message)

    with forked(echo):

        def trip() -> None:
            ask.put(PAYLOAD)
            answer.get()

        yield lambda messages: timed(trip, messages)
        ask.put(b"")


@contextmanager
def grpc_unary() -> Iterator[Measure]:
    """A unary gRPC call over loopback TCP; request and response are the bytes."""
    (until, end), (port_in, port_out) = os.pipe(), os.pipe()

    # Each side imports gRPC after the fork, because gRPC does not work in a fork of a process that uses it.
    def echo() -> None:
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        os.close(end)
        method = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lifl.Bench", {"Pass": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        os.write(port_out, str(port).encode())
        os.read(until, 1)  # ends when the other side closes `end`
        server.stop(None).wait()

    with forked(echo):
        import grpc

        os.close(port_out)
        port = os.read(port_in, 16).decode()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/lifl.Bench/Pass")
            yield lambda messages: timed(lambda: call(PAYLOAD), messages)
        os.close(end)


WAYS: dict[str, Callable[[], AbstractContextManager[Measure]]] = {
    "ring_spinning": lambda: ring(SPIN_S),
    "ring_sleeping": lambda: ring(0.0),
    "ring_poll": ring_poll,
    "ring_asyncio": ring_asyncio,
    "eventfd": eventfd,
    "ebpf": sockets.sidecar,
    "unix": sockets.unix,
    "proxy": sockets.proxy,
    "queue": queue,
    "grpc": grpc_unary,
}
"""The ways that `run` knows; each is set up in the asking process and forks its echo."""
