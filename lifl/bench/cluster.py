"""Several Nodes of this machine as the nodes of a cluster: a round carried out as a policy says, for real.

Owns the gateways: a thread for each node takes in one update after another, and what goes to another node crosses a
TCP connection and is received where it will be folded. It decides nothing: who does what is the plan's. It times a
round and counts what it took; nothing is printed here.
"""

from __future__ import annotations

import ctypes
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType

import attrs
import numpy as np

from lifl.bench.usage import machine_s, own_s
from lifl.errors import LiflError, ShmError
from lifl.node.node import Node
from lifl.planner.shape import Shape
from lifl.planner.simulate import Part, Policy, doors_of
from lifl.planner.traces import Trace
from lifl.report.result import RoundResult
from lifl.round.round import Round, core_of
from lifl.shm import kernels
from lifl.shm.sizes import round_bytes, units_of
from lifl.tensor import Array, TensorSpec

HEAD = struct.Struct("<dq")
"""Before an update on the wire: its weight, and its number; a node's mean has one below 0."""

COLD_TIMEOUT_S = 2.0
"""After so long without work a runtime ends where none is kept: the next round finds none, and this one's CPU time can
still be read when it is over."""

RESULT_TIMEOUT_S = 300.0
MAX_PARTS = 1024
"""Pieces of memory that the kernel takes in one call (IOV_MAX)."""
SPARE_UPDATES = 6
"""Room in an arena beside a round's own updates, without which no leaf may join it."""

Update = Mapping[str, Array]


@attrs.frozen
class Played:
    """What a round took; as in :class:`lifl.planner.simulate.Outcome`, but measured.

    ``cpu_s`` is that of this process and its descendants. Clients have no part in it: their updates lie in memory.
    ``others_s`` is what others took of the machine meanwhile, as far as ticks tell.
    """

    updates: int
    completion_s: float
    last_to_model_s: float
    cpu_s: float
    others_s: float
    runtimes_started: int
    nodes_used: int
    bytes_between_nodes: int


class _LazyNode(Node):
    """A Node that takes on no worker until it is let: a lazy task has no runtime before its last update is in."""

    def __init__(self, memory: int, workers: int, warm: int, idle_timeout: float | None) -> None:
        super().__init__(memory, workers, warm=warm, idle_timeout=idle_timeout)
        self.is_held = False
        self._choose = self.pool.choose
        self.pool.choose = self._choose_if_let  # type: ignore[method-assign]

    def _choose_if_let(self, n: int, without: Container[int] = ()) -> tuple[int, ...]:
        return () if self.is_held else self._choose(n, without)


class Gate:
    """A node's gateway: one thread that does one thing after another, and a socket at which other nodes call."""

    def __init__(self, on_call: Callable[[socket.socket], None], on_error: Callable[[BaseException], None]) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._on_call, self._on_error = on_call, on_error
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self._threads = [threading.Thread(target=self._work), threading.Thread(target=self._listen)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """To be done when what came before is done."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._on_error(error)

    def _listen(self) -> None:
        with suppress(OSError):  # it was shut down
            while True:
                self.put(partial(self._on_call, self._server.accept()[0]))

    def close(self) -> None:
        """Ends both threads."""
        self._server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who accepts
        self._server.close()
        self._threads[1].join()
        self._jobs.put(None)
        self._threads[0].join()


class Cluster:
    """The nodes of one policy, for rounds of one trace; a context manager.

    Parameters
    ----------
    spec : TensorSpec
    trace : Trace
    policy : Policy
    names : sequence of str
        All nodes; each has a gateway, also without a part.
    parts : sequence of Part
        What the planner says that each does.
    """

    def __init__(
        self, spec: TensorSpec, trace: Trace, policy: Policy, names: Sequence[str], parts: Sequence[Part]
    ) -> None:
        self._spec, self._trace, self._policy, self._parts = spec, trace, policy, parts
        self._part_of = {i: part for part in parts for i in part.clients}
        self._doors = doors_of(trace, policy, names, parts)
        self._top = next(part.node for part in parts if part.is_top)
        self._rounds: dict[str, Round] = {}
        self._arrived: dict[str, int] = {}
        self._sent_bytes = 0
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._crossing = sum(door != self._part_of[i].node for i, door in enumerate(self._doors))
        self._doorways: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for _ in range(self._crossing):
            self._doorways.put(np.full(spec.layout.update_bytes, 1, np.uint8))  # all pages are there
        with ExitStack() as stack:
            self._nodes: dict[str, _LazyNode] = {}
            for part in parts:
                self._nodes[part.node] = node = self._open_node(part)
                stack.callback(node.close)
                touch(node, spec)
            self._gates: dict[str, Gate] = {}
            for name in names:
                self._gates[name] = gate = Gate(partial(self._receive, name), self._fail)
                stack.callback(gate.close)
            self._end = stack.pop_all()

    def _open_node(self, part: Part) -> _LazyNode:
        shape = self.shape_of(part)
        workers = max(shape.leaves, shape.shards)
        memory = round_bytes(self._spec, workers, part.expected + SPARE_UPDATES)
        if self._policy.is_reusing:
            return _LazyNode(memory, workers, warm=workers, idle_timeout=None)
        return _LazyNode(memory, workers, warm=0, idle_timeout=COLD_TIMEOUT_S)

    @property
    def memory_bytes(self) -> int:
        """What the Nodes and the doorways take."""
        arenas = sum(node.arena.block_bytes for node in self._nodes.values())
        return arenas + self._crossing * self._spec.layout.update_bytes

    @staticmethod
    def shape_of(part: Part) -> Shape:
        """What is carried out: a leaf that would have no update is not started."""
        return Shape(min(part.shape.leaves, part.expected), part.shape.shards)

    # ------------------------------------------------------------ a round

    def play(self, updates: Sequence[Update], weights: Sequence[float], check: Callable[[Update], None]) -> Played:
        """One round: update i is ``updates[i % len(updates)]``, with its weight; `check` sees the model.

        Raises what went wrong in any of the nodes.
        """
        self._wait_for_rest()
        self._sent_bytes, started = 0, self._cold_starts
        first, last = self._trace.times_s[0], self._trace.times_s[-1]
        try:
            self._open_rounds()
            own, all_, begin = own_s(), machine_s(), time.monotonic()
            for part in self._parts:
                if not part.is_top:
                    self._follow(partial(self._send_mean, part.node))
            for i, at in enumerate(self._trace.times_s):
                time.sleep(max(0.0, begin + at - first - time.monotonic()))
                self._gates[self._doors[i]].put(partial(self._land, i, updates[i % len(updates)], weights[i]))
            model = self._result(self._top).arrays
            done_s = time.monotonic() - begin
            own, all_ = own_s() - own, machine_s() - all_
            check(model)
            del model
            accepted = sum(len(round_.report().accepted) for round_ in self._rounds.values())
        finally:
            self._end_round()
        return Played(
            updates=accepted - (len(self._parts) - 1),
            completion_s=done_s,
            last_to_model_s=done_s - (last - first),
            cpu_s=own,
            others_s=max(0.0, all_ - own),
            runtimes_started=self._cold_starts - started,
            nodes_used=len(self._parts),
            bytes_between_nodes=self._sent_bytes,
        )

    @property
    def _cold_starts(self) -> int:
        return sum(node.pool.cold_starts for node in self._nodes.values())

    def _open_rounds(self) -> None:
        for part in self._parts:
            node, timing = self._nodes[part.node], self._policy.timing
            node.is_held = timing == "lazy"
            self._arrived[part.node] = 0
            self._rounds[part.node] = node.open_round(self._spec, part.expected, timing, shape=self.shape_of(part))

    def _wait_for_rest(self) -> None:
        """Until no runtime is left of the round before, where none is kept."""
        deadline = time.monotonic() + RESULT_TIMEOUT_S
        while not self._policy.is_reusing and any(node.pids() for node in self._nodes.values()):
            if time.monotonic() > deadline:
                raise LiflError(f"runtimes without work have not ended in {RESULT_TIMEOUT_S:g} s")
            time.sleep(0.01)

    def _result(self, node: str) -> RoundResult:
        try:
            return self._rounds[node].result(RESULT_TIMEOUT_S)
        except LiflError:
            if self._errors:
                raise self._errors[0] from None
            raise

    def _end_round(self) -> None:
        for round_ in self._rounds.values():
            round_.close()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._rounds.clear()

    def _fail(self, error: BaseException) -> None:
        """A gateway or a sender could not do its part: every wait for a result ends."""
        self._errors.append(error)
        for name, round_ in list(self._rounds.items()):
            with self._nodes[name].changed:
                core_of(round_).lifecycle.fail(LiflError(f"a round on another node failed: {error}"))
                self._nodes[name].changed.notify_all()

    def _follow(self, job: Callable[[], object]) -> None:
        """Does `job` in a thread that the round's end waits for."""

        def run() -> None:
            try:
                job()
            except Exception as error:
                self._fail(error)

        thread = threading.Thread(target=run)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    # ------------------------------------------------------------ in the gateways' threads

    def _land(self, i: int, update: Update, weight: float) -> None:
        """A client's update is at the door: copied and checked into the round, or into what leads to another node."""
        door, target = self._doors[i], self._part_of[i].node
        if door == target:
            self._count(target)
            self._rounds[target].submit(update, weight, client_id=i)
            return
        doorway = self._doorways.get()
        base = kernels.address_of(doorway)
        for name, code, offset, count in self._spec.offsets:
            if kernels.copy_finite(code, base + offset, kernels.address_of(update[name]), count) >= 0:
                raise LiflError(f"update {i} has a NaN or Inf in {name}")
        self._follow(partial(self._send_on, target, i, weight, doorway))

    def _receive(self, node: str, connection: socket.socket) -> None:
        """Another node calls: its update is received where it will be folded."""
        with connection:
            head = bytearray(HEAD.size)
            receive_into(connection, [memoryview(head)])
            weight, number = HEAD.unpack(head)
            loan = self._rounds[node].loan(client_id=number)
            receive_into(connection, bytes_of(loan.arrays))
        self._count(node)
        loan.send(weight)

    def _count(self, node: str) -> None:
        """One more update comes to a node; with the last a lazy one gets its leaves."""
        self._arrived[node] += 1
        part = next(part for part in self._parts if part.node == node)
        if self._nodes[node].is_held and self._arrived[node] == part.expected:
            with self._nodes[node].changed:
                self._nodes[node].is_held = False
                core_of(self._rounds[node]).lifecycle.enlist(self.shape_of(part).leaves)

    # ------------------------------------------------------------ in the senders' threads

    def _send_on(self, target: str, number: int, weight: float, doorway: Array) -> None:
        self._send(target, number, weight, self._spec.views(doorway))
        self._doorways.put(doorway)

    def _send_mean(self, node: str) -> None:
        result = self._result(node)
        number = [part.node for part in self._parts].index(node)
        self._send(self._top, -1 - number, result.weight, result.arrays)

    def _send(self, target: str, number: int, weight: float, update: Update) -> None:
        with socket.create_connection(self._gates[target].address, RESULT_TIMEOUT_S) as connection:
            send_all(connection, [memoryview(HEAD.pack(weight, number)), *bytes_of(update)])
        with self._lock:
            self._sent_bytes += self._spec.nbytes

    # ------------------------------------------------------------ the end

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.close()


def touch(node: Node, spec: TensorSpec) -> None:
    """Writes to every page of the Node's arena in this process, so that it is as after many rounds.

    A first touch takes ten times as long as a copy; a server that runs for long has paid for it once.
    """
    room = node.arena.free_bytes // units_of(spec.layout.update_bytes)
    with node.open_round(spec, room, "lazy", shape=Shape(0, 1)) as round_:
        loans = []
        with suppress(ShmError):  # the round's own blocks take some of the room
            while True:
                loans.append(round_.loan())
                ctypes.memset(loans[-1].address, 0, spec.layout.update_bytes)
        for loan in loans:
            loan.release()


# ---------------------------------------------------------------- the wire


def bytes_of(update: Update) -> list[memoryview]:
    """The arrays' own memory, one after another; without the empty ones."""
    return [array.reshape(-1).view(np.uint8).data for array in update.values() if array.size]


def send_all(connection: socket.socket, parts: list[memoryview]) -> None:
    """Sends all of `parts`, without putting them together first."""
    while parts:
        parts = _after(parts, connection.sendmsg(parts[:MAX_PARTS]))


def receive_into(connection: socket.socket, parts: list[memoryview]) -> None:
    """Fills `parts`; ``LiflError`` if the other side ends before."""
    while parts:
        received, *_ = connection.recvmsg_into(parts[:MAX_PARTS])
        if not received:
            raise LiflError("a node ended its connection in the middle of an update")
        parts = _after(parts, received)


def _after(parts: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `parts` behind the first `nbytes`."""
    for i, part in enumerate(parts):
        if nbytes < len(part):
            return [part[nbytes:], *parts[i + 1 :]]
        nbytes -= len(part)
    return []
