"""The worker: it receives, aggregates and sends. Its next message gives it its role.

A leaf folds updates; a top adds up the sums of the leaves and divides. Or several workers make the mean, each in one
range of its coordinates, a shard.

A worker holds nothing between tasks and never allocates: the owner grants it blocks. It trusts a descriptor only after
the compare-and-swap of the block's ownership word. The same class runs in a process of its own (`main`) and, for a Node
without workers, in the caller's.

Each update counts exactly once. A leaf folds a batch from its newest committed sum into its other block, and lists the
batch in the manifest there. One compare-and-swap commits the new sum; only then are the inputs freed. A worker that
dies in between leaves either the old sum and the inputs, or the new sum.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
from collections import deque
from collections.abc import Iterable
from itertools import islice

import attrs

from lifl import fold
from lifl.errors import PeerGoneError
from lifl.shm import control_block, messages
from lifl.shm.arena import OWNER, Arena, Block, Mapping, State, lib
from lifl.shm.control_block import BATCH_SHIFT, FLOWER
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import IDLE_WAIT_S, WAIT_CAP_S, Inbox, Outbox, Receiver, ring_for
from lifl.tensor import Layout

log = logging.getLogger("lifl.workers.aggregator")

RETRY_S = 0.001
"""The wait before a descriptor that did not fit into a full ring is tried again."""
MAX_ENDED = 4096
"""Rounds that a worker remembers as ended. A sum that comes late comes soon after the end of its round."""


@attrs.define
class _Sum:
    """A block that the owner has granted for a partial sum of this leaf."""

    block: Block
    mapping: Mapping
    weight: tuple[float, float] = (0.0, 0.0)
    num_updates: int = 0


@attrs.define
class _Task:
    """An open round, as this worker knows it."""

    round: int
    layout: Layout
    flags: int
    spare: list[_Sum] = attrs.field(factory=list)
    current: _Sum | None = None
    pending: deque[Block] = attrs.field(factory=deque)
    alone: set[Block] = attrs.field(factory=set)  # the pending blocks that are folded in a batch of their own
    flush: Descriptor | None = None
    is_sent: bool = False
    epoch: int = 0
    arrived: dict[int, Descriptor] = attrs.field(factory=dict)  # SUM messages, by leaf, if this worker is the top
    served: int = 0  # the number of its last turn


@attrs.define(eq=False)
class _Shard:
    """A shard of a round's mean that this worker has to make."""

    round: int
    asked: Descriptor
    served: int = 0


class Aggregator:
    """The code of a worker, participant `worker` of the arena. In each round it has the role that its messages give it.

    Its messages go through rings, or through the inbox and outbox that it is given.
    """

    def __init__(self, arena: Arena, worker: int, inbox: Receiver | None = None, outbox: Outbox | None = None) -> None:
        self._arena = arena
        self._worker = worker
        self._inbox: Receiver = Inbox(arena, worker) if inbox is None else inbox
        self._outbox = Outbox.of_rings(arena, worker) if outbox is None else outbox
        self._tasks: dict[int, _Task] = {}
        self._shards: list[_Shard] = []
        self._turns = 0
        self._ended: dict[int, None] = {}  # rounds, in the order in which they ended
        self._early: dict[int, dict[int, Descriptor]] = {}  # SUM messages that came before the OPEN of their round
        self._manifest_bytes = int(lib.lifl_manifest_bytes())
        self._batch_max = int(lib.lifl_batch_max())
        self.is_stopped = False

    def step(self) -> bool:
        """Receives all messages that are there, then does one piece of work; false if there was neither.

        Rounds take turns: the round that has waited longest is served.
        """
        worked = False
        while (item := self._inbox.try_pop()) is not None:
            worked = True
            try:
                self._receive(item[1])
            except Exception:
                self._fail(item[1].round)
        self._outbox.flush()
        works: list[_Task | _Shard] = [*self._tasks.values(), *self._shards]
        for work in sorted(works, key=lambda one: one.served):
            try:
                if self._make(work) if isinstance(work, _Shard) else self._advance(work):
                    self._turns += 1
                    work.served = self._turns
                    return True
            except Exception:
                self._fail(work.round)
        return worked

    def _fail(self, number: int) -> None:
        """Ends this worker's part in a round that met an error; the owner ends the round. The worker goes on."""
        log.exception("worker %d: round %d failed", self._worker, number)
        self._drop(number)
        self._outbox.push(OWNER, messages.failed(number))

    def _drop(self, number: int) -> None:
        """Ends this worker's part in a round."""
        self._shards = [shard for shard in self._shards if shard.round != number]
        if (task := self._tasks.get(number)) is not None:
            self._forget(task)

    def run(self, spin_s: float) -> None:
        """Works until a STOP comes."""
        while not self.is_stopped:
            if not self.step():
                is_sent = self._outbox.flush()
                # Without a task a worker sleeps long: only the owner waits for it, and the owner's death ends it too.
                sleep_s = WAIT_CAP_S if self._tasks or self._early else IDLE_WAIT_S
                self._inbox.wait(spin_s, sleep_s if is_sent else RETRY_S)

    # ------------------------------------------------------------ Recv

    def _receive(self, d: Descriptor) -> None:
        if d.kind == Kind.STOP:
            self.is_stopped = True
        elif d.kind == Kind.PING:
            self._outbox.push(OWNER, messages.HELLO)
        elif d.kind == Kind.OPEN:
            control = self._arena.map(d.block, d.generation)
            layout, flags = Layout.decode(ctypes.string_at(control.address, control.nbytes))
            control.close()
            self._tasks[d.round] = _Task(d.round, layout, flags, arrived=self._early.pop(d.round, {}))
        elif d.kind == Kind.ABORT:
            self._drop(d.round)
            self._end(d.round)
            self._outbox.push(OWNER, messages.aborted(d.round))
        elif d.kind == Kind.SHARD:
            self._shards.append(_Shard(d.round, d))
        elif (task := self._tasks.get(d.round)) is None:
            self._receive_unknown(d)
        elif d.kind == Kind.GRANT:
            self._grant(task, d)
        elif d.kind == Kind.UPDATE:
            task.pending.append(block := messages.block_of(d))
            if messages.is_alone(d):
                task.alone.add(block)
        elif d.kind == Kind.FLUSH:
            task.flush = d
        elif d.kind == Kind.SUM:
            task.arrived[messages.leaf_of(d)] = d  # comes twice if the owner repeats the SUM of a dead leaf

    def _end(self, number: int) -> None:
        """Notes that a round is over here: its sums, those here and those that come later, are given back."""
        for d in self._early.pop(number, {}).values():
            self._give_back(messages.sum_of(d))
        self._ended[number] = None
        if len(self._ended) > MAX_ENDED:
            self._ended.pop(next(iter(self._ended)))

    def _receive_unknown(self, d: Descriptor) -> None:
        """Takes a message of a round without a task: the round was aborted, or a SUM came before its OPEN."""
        if d.kind == Kind.SUM and d.round not in self._ended:
            self._early.setdefault(d.round, {})[messages.leaf_of(d)] = d
        elif d.kind == Kind.SUM:
            self._give_back(messages.sum_of(d))

    def _give_back(self, block: Block | None) -> None:
        """Frees a block that this worker holds, in whatever state it is. None: does nothing."""
        for state in (State.READY, State.ACCUM, State.COMMITTED, State.READING):
            if block is not None and self._arena.move(block, (self._worker, state), (OWNER, State.FREE)):
                return

    def _grant(self, task: _Task, d: Descriptor) -> None:
        mapping = self._arena.map(d.block, d.generation)
        if mapping.nbytes < self._manifest_bytes + task.layout.sum_bytes:
            raise ValueError(f"granted {mapping.nbytes} bytes for a sum of {task.layout.sum_bytes}")
        held = _Sum(Block(d.block, d.generation, mapping.nbytes), mapping)
        if not messages.holds_sum(d):
            task.spare.append(held)
            return
        manifest = self._arena.manifest(mapping.address)  # written by a dead predecessor
        held.weight, held.num_updates = (manifest.weight, manifest.weight_low), manifest.num_updates
        task.current, task.epoch = held, manifest.epoch

    def _forget(self, task: _Task) -> None:
        """Gives back all blocks that this worker holds of a round."""
        for block in task.pending:
            self._give_back(block)
        for held in [*task.spare, *([task.current] if task.current else [])]:
            held.mapping.close()
            self._give_back(held.block)
        for d in task.arrived.values():
            self._give_back(messages.sum_of(d))
        self._tasks.pop(task.round, None)

    # ------------------------------------------------------------ Agg

    def _advance(self, task: _Task) -> bool:
        if task.pending:
            self._fold(task)
            return True
        if task.flush and not task.is_sent:
            self._send_sum(task, task.flush)
            return True
        if task.flush and task.is_sent and len(task.arrived) == messages.flush_of(task.flush).leaves:
            self._finish(task, task.flush)
            return True
        return False

    def _take(self, blocks: Iterable[Block]) -> list[Block]:
        """Claims `blocks` for reading; returns those that are really there for this worker.

        A descriptor is a hint, and may come twice. If a block kills this worker, the block is READING.
        """
        return [b for b in blocks if self._arena.move(b, (self._worker, State.READY), (self._worker, State.READING))]

    def _next_batch(self, task: _Task) -> list[Block]:
        most = min(task.flags >> BATCH_SHIFT or self._batch_max, self._batch_max)
        batch = list(islice(task.pending, most))
        for i, block in enumerate(batch):
            if block in task.alone:
                return batch[: i or 1]
        return batch

    def _fold(self, task: _Task) -> None:
        begin = lib.lifl_now_ns()
        candidates = self._next_batch(task)
        if not (batch := self._take(candidates)):
            for _ in candidates:
                task.pending.popleft()
            return
        target, source = task.spare[-1], task.current
        inputs = [self._arena.map(b.index, b.generation) for b in batch]
        notes = [self._arena.note(b.index) for b in batch]
        weights = [note.weight for note in notes]
        at = self._manifest_bytes
        fold.fold_at(
            task.layout,
            target.mapping.address + at,
            None if source is None else source.mapping.address + at,
            [i.address for i in inputs],
            weights,
        )
        task.epoch += 1
        target.weight = fold.add_weights(source.weight if source else (0.0, 0.0), weights)
        target.num_updates = (source.num_updates if source else 0) + len(batch)
        manifest = self._arena.manifest(target.mapping.address)
        manifest.round, manifest.epoch, manifest.batch = task.round, task.epoch, len(batch)
        manifest.weight, manifest.weight_low = target.weight
        manifest.num_updates = target.num_updates
        for i, block in enumerate(batch):
            manifest.blocks[i], manifest.generations[i] = block.index, block.generation
        # The commit: from here on the batch counts. The manifest is complete before it, the inputs are freed after it.
        if not self._arena.move(target.block, (self._worker, State.ACCUM), (self._worker, State.COMMITTED)):
            raise RuntimeError(f"block {target.block.index} was taken from under a fold")
        task.spare.pop()
        for _ in candidates:
            task.pending.popleft()
        end = lib.lifl_now_ns()
        self._outbox.spent.ns += end - begin
        for block, mapping, note in zip(batch, inputs, notes, strict=True):
            note.begin_ns, note.end_ns = begin, end
            mapping.close()
            self._arena.move(block, (self._worker, State.READING), (OWNER, State.FREE))
            self._outbox.push(OWNER, messages.folded(task.round, block))
        if source is not None:
            self._arena.move(source.block, (self._worker, State.COMMITTED), (self._worker, State.ACCUM))
            task.spare.append(source)
        task.current = target

    # ------------------------------------------------------------ Send

    def _send_sum(self, task: _Task, flush: Descriptor) -> None:
        begin = lib.lifl_now_ns()
        task.is_sent = True
        top, held = messages.flush_of(flush).top, task.current
        message = messages.leaf_sum(task.round, self._worker, None if held is None else held.block)
        if held is not None:
            note = self._arena.note(held.block.index)
            note.begin_ns, note.end_ns = begin, lib.lifl_now_ns()
            # The sum goes to the top; all of its inputs were freed after their commit.
            self._arena.move(held.block, (self._worker, State.COMMITTED), (top, State.COMMITTED))
            held.mapping.close()
            task.current = None
        if top == self._worker:
            task.arrived[self._worker] = message
            return
        # Everything is given back before the SUM is sent: the owner reclaims it as soon as the top's RESULT is there.
        self._forget(task)
        self._outbox.push(top, message)

    def _finish(self, task: _Task, flush: Descriptor) -> None:
        begin = lib.lifl_now_ns()
        blocks = [block for d in task.arrived.values() if (block := messages.sum_of(d)) is not None]
        for block in blocks:
            if not self._arena.move(block, (self._worker, State.COMMITTED), (self._worker, State.READING)):
                raise RuntimeError(f"partial sum {block.index} is stale")
        sums = [self._arena.map(b.index, b.generation) for b in blocks]
        manifests = [self._arena.manifest(s.address) for s in sums]
        mean = self._arena.map(flush.block, flush.generation)
        weight = fold.add_weights((0.0, 0.0), [part for m in manifests for part in (m.weight, m.weight_low)])
        at = self._manifest_bytes
        finite = fold.finish_at(task.layout, mean.address, [s.address + at for s in sums], weight)
        note = self._arena.note(flush.block)
        note.weight, note.has_overflowed = weight[0], not finite
        note.num_updates = sum(m.num_updates for m in manifests)
        note.begin_ns, note.end_ns = begin, lib.lifl_now_ns()
        self._outbox.spent.ns += note.end_ns - begin
        for mapping in (*sums, mean):
            mapping.close()
        # The commit: from here on the round needs nothing but the mean.
        block = messages.block_of(flush)
        self._arena.move(block, (self._worker, State.WRITING), (OWNER, State.READY))
        self._forget(task)
        self._end(task.round)
        self._outbox.push(OWNER, messages.result(task.round, block))

    def _make(self, work: _Shard) -> bool:
        """Makes one shard of a mean. The owner keeps every source and the mean until all shards are made."""
        d = work.asked
        begin = lib.lifl_now_ns()
        self._shards.remove(work)
        control = self._arena.map(d.block, d.generation)
        layout, flags, what = control_block.read(ctypes.string_at(control.address, control.nbytes))
        sums = [self._arena.map(s.index, s.generation) for s in what.sums]
        updates = [self._arena.map(s.index, s.generation) for s in what.updates]
        mean = self._arena.map(what.mean.index, what.mean.generation)
        part = messages.part_of(d)
        inputs, weights = [u.address for u in updates], [u.weight for u in what.updates]
        if flags & FLOWER:
            fold.flower_at(layout, mean.address, inputs, weights, part)
            finite = True
        else:
            totals = [s.address + self._manifest_bytes for s in sums]
            finite = fold.finish_at(layout, mean.address, totals, what.weight, inputs, weights, part)
        end = lib.lifl_now_ns()
        self._outbox.spent.ns += end - begin
        times = control_block.times_of(begin, end)
        ctypes.memmove(control.address + control_block.times_offset(layout, part[0]), times, len(times))
        for mapping in (*sums, *updates, mean, control):
            mapping.close()
        self._outbox.push(OWNER, messages.sharded(d, finite))
        return True


def main(arena_fd: int, bell_fd: int, worker: int, spin_s: float, parent: int, socket_fd: int | None = None) -> None:
    """Runs a worker, in a fork of the spawner `parent`. Messages go through its socket if it has one, else rings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then ends its workers
    die_with(parent)
    # A batch task does not preempt the process that wakes it: that process goes on and wakes the next worker.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    arena = Arena.attach(arena_fd)
    ring_for(arena, OWNER, bell_fd)
    inbox: Receiver
    if socket_fd is None:
        inbox, outbox = Inbox(arena, worker), Outbox.of_rings(arena, worker)
    else:
        from lifl.ebpf.links import ends_of  # late: rings do not need it

        inbox, outbox = ends_of(arena, socket_fd, worker)
    outbox.push(OWNER, messages.HELLO)
    with contextlib.suppress(PeerGoneError):  # the socket may show the owner's death before the kernel's signal comes
        Aggregator(arena, worker, inbox, outbox).run(spin_s)


def die_with(parent: int) -> None:
    """Asks the kernel to SIGKILL this process when `parent`, which made it, ends; exits if that has ended already."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # The look comes after the request: the parent may have died between the fork and the request.
    if os.getppid() != parent:
        os._exit(1)
