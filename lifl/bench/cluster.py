"""Several Nodes of this machine as the nodes of a cluster, which carry out real rounds of a policy.

Owns the gateways: for each node a thread takes in one update after another, and an update for another node crosses a
TCP connection and is received in the block where it will be folded. Decides nothing: the plan assigns the work. Times
a round and counts its costs; nothing is printed here.
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
"""Header of an update on the wire: its weight, and its number, which is below 0 for the mean of a node."""

COLD_TIMEOUT_S = 2.0
"""Idle seconds after which a worker ends, for policies that keep no workers.

Long enough to read the CPU time of a round after its end, and the next round begins without workers.
"""

RESULT_TIMEOUT_S = 300.0
MAX_PARTS = 1024
"""Pieces of memory that the kernel takes in one call (IOV_MAX)."""
SPARE_UPDATES = 6
"""Room in an arena, in updates, in addition to a round's own; without it no leaf may join the round."""

Update = Mapping[str, Array]


@attrs.frozen
class Played:
    """The measured costs of a real round, with the fields of :class:`lifl.planner.simulate.Outcome`.

    ``cpu_s`` is the CPU time of this process and its descendants; clients take none, their updates lie in memory.
    ``others_s`` is the CPU time of all other processes meanwhile, in the resolution of the kernel's ticks.
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
    """A Node that takes no worker for a round while ``is_held``: a lazy task gets workers after its last update."""

    def __init__(self, memory: int, workers: int, warm: int, idle_timeout: float | None) -> None:
        super().__init__(memory, workers, warm=warm, idle_timeout=idle_timeout)
        self.is_held = False
        self._choose = self.pool.choose
        self.pool.choose = self._choose_unless_held  # type: ignore[method-assign]

    def _choose_unless_held(self, n: int, without: Container[int] = ()) -> tuple[int, ...]:
        return () if self.is_held else self._choose(n, without)


class Gate:
    """The gateway of a node: a thread that does jobs one after another, and a socket for connections of other nodes.

    Two threads, started here and ended by :meth:`close`: one does the jobs, the other accepts connections.
    """

    def __init__(self, on_call: Callable[[socket.socket], None], on_error: Callable[[BaseException], None]) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._on_call = on_call
        self._on_error = on_error
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self._threads = [threading.Thread(target=self._work), threading.Thread(target=self._listen)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Callable[[], object]) -> None:
        """Adds a job, which is done after all earlier ones."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._on_error(error)

    def _listen(self) -> None:
        with suppress(OSError):  # close() has shut the socket down
            while True:
                self.put(partial(self._on_call, self._server.accept()[0]))

    def close(self) -> None:
        """Ends both threads, after all jobs."""
        self._server.shutdown(socket.SHUT_RDWR)  # close() alone would not wake the thread in accept()
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
        Names of all nodes; a node without a part has a gateway too.
    parts : sequence of Part
        The planner's assignment of work to nodes.
    """

    def __init__(
        self, spec: TensorSpec, trace: Trace, policy: Policy, names: Sequence[str], parts: Sequence[Part]
    ) -> None:
        self._spec = spec
        self._trace = trace
        self._policy = policy
        self._parts = parts
        self._part_of = {i: part for part in parts for i in part.clients}
        self._doors = doors_of(trace, policy, names, parts)
        self._top = next(part.node for part in parts if part.is_top)
        self._rounds: dict[str, Round] = {}
        self._arrived: dict[str, int] = {}
        self._sent_bytes = 0
        self._lock = threading.Lock()  # guards _sent_bytes and _threads
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []  # senders, started by _follow() and joined by _end_round()
        self._crossing = sum(door != self._part_of[i].node for i, door in enumerate(self._doors))
        self._doorways: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for _ in range(self._crossing):
            self._doorways.put(np.full(spec.layout.update_bytes, 1, np.uint8))  # filled, so that all pages exist
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
        """Bytes of the Nodes' arenas and of the buffers for updates to other nodes."""
        arenas = sum(node.arena.block_bytes for node in self._nodes.values())
        return arenas + self._crossing * self._spec.layout.update_bytes

    @staticmethod
    def shape_of(part: Part) -> Shape:
        """The shape of a part's tree, without leaves that would have no update."""
        return Shape(min(part.shape.leaves, part.expected), part.shape.shards)

    # ------------------------------------------------------------ a round

    def play(self, updates: Sequence[Update], weights: Sequence[float], check: Callable[[Update], None]) -> Played:
        """Carries out one round. Update i is ``updates[i % len(updates)]``, with ``weights[i]``.

        `check` is called with the model, whose arrays are valid only during the call. Raises the first error of a node.
        """
        self._wait_for_rest()
        self._sent_bytes = 0
        started = self._cold_starts
        first, last = self._trace.times_s[0], self._trace.times_s[-1]
        try:
            self._open_rounds()
            own = own_s()
            all_ = machine_s()
            begin = time.monotonic()
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
        """Waits until all workers of the last round have ended, if the policy keeps none."""
        deadline = time.monotonic() + RESULT_TIMEOUT_S
        while not self._policy.is_reusing and any(node.pids() for node in self._nodes.values()):
            if time.monotonic() > deadline:
                raise LiflError(f"workers without work have not ended in {RESULT_TIMEOUT_S:g} s")
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
        """Fails all rounds after an error in a gateway or a sender, which ends every wait for a result."""
        self._errors.append(error)
        for name, round_ in list(self._rounds.items()):
            with self._nodes[name].changed:
                core_of(round_).lifecycle.fail(LiflError(f"a round on another node failed: {error}"))
                self._nodes[name].changed.notify_all()

    def _follow(self, job: Callable[[], object]) -> None:
        """Starts a thread that does `job`; _end_round() joins it."""

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
        """Copies and checks a client's update: into the round, or into a buffer from which it goes to another node."""
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
        """Receives an update from another node, in the block where it will be folded."""
        with connection:
            head = bytearray(HEAD.size)
            receive_into(connection, [memoryview(head)])
            weight, number = HEAD.unpack(head)
            loan = self._rounds[node].loan(client_id=number)
            receive_into(connection, bytes_of(loan.arrays))
        self._count(node)
        loan.send(weight)

    def _count(self, node: str) -> None:
        """Counts an update that a node receives; with the last one a lazy node gets its leaves."""
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
    """Writes to every page of the Node's arena in this process, so that all pages exist as after many rounds.

    The first write to a page takes ten times as long as a copy; a long-running server pays for it once.
    """
    room = node.arena.free_bytes // units_of(spec.layout.update_bytes)
    with node.open_round(spec, room, "lazy", shape=Shape(0, 1)) as round_:
        loans = []
        with suppress(ShmError):  # the arena is full earlier than `room` says: the round has blocks of its own
            while True:
                loans.append(round_.loan())
                ctypes.memset(loans[-1].address, 0, spec.layout.update_bytes)
        for loan in loans:
            loan.release()


# ---------------------------------------------------------------- the wire


def bytes_of(update: Update) -> list[memoryview]:
    """The memory of each array, without a copy; empty arrays are left out."""
    return [array.reshape(-1).view(np.uint8).data for array in update.values() if array.size]


def send_all(connection: socket.socket, parts: list[memoryview]) -> None:
    """Sends all of `parts`, without joining them in memory."""
    while parts:
        parts = _after(parts, connection.sendmsg(parts[:MAX_PARTS]))


def receive_into(connection: socket.socket, parts: list[memoryview]) -> None:
    """Receives until all `parts` are full; raises ``LiflError`` if the other side ends earlier."""
    while parts:
        received, *_ = connection.recvmsg_into(parts[:MAX_PARTS])
        if not received:
            raise LiflError("a node ended its connection in the middle of an update")
        parts = _after(parts, received)


def _after(parts: list[memoryview], nbytes: int) -> list[memoryview]:
    """The rest of `parts` after their first `nbytes`."""
    for i, part in enumerate(parts):
        if nbytes < len(part):
            return [part[nbytes:], *parts[i + 1 :]]
        nbytes -= len(part)
    return []
