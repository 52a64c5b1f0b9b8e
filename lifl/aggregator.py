"""The worker: Recv -> Agg -> Send. A leaf folds updates, a top adds up the leaves' sums and divides.

A worker holds nothing between tasks and never allocates: the agent grants it blocks. It trusts a
descriptor only after the compare-and-swap of the block's ownership word. The same class runs in a
process of its own (`main`) and, for a Node without workers, inside the caller's.

How an update counts exactly once: a batch is folded from the leaf's newest committed sum into its other
block; the manifest there says what the batch was; one compare-and-swap commits it; only then are the
inputs freed. Whoever dies in between leaves either the old sum and the inputs, or the new sum.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import attrs

from lifl import fold
from lifl.ring import BATCH_SHIFT, FLOWER, LAZY, NO_BLOCK, Descriptor, Inbox, Kind, Outbox, Producer, ring_for
from lifl.shm import AGENT, Arena, Block, Mapping, State, lib
from lifl.tensor import Layout

log = logging.getLogger("lifl.aggregator")


@attrs.define
class _Sum:
    """A granted block for this leaf's partial sum."""

    block: Block
    mapping: Mapping
    weight: tuple[float, float] = (0.0, 0.0)
    num_updates: int = 0


@attrs.define
class _Task:
    """What this worker knows of one open round."""

    round: int
    layout: Layout
    flags: int
    spare: list[_Sum] = attrs.field(factory=list)
    current: _Sum | None = None
    pending: deque[Block] = attrs.field(factory=deque)
    alone: set[Block] = attrs.field(factory=set)  # of these, what must not be folded with others
    is_pressed: bool = False
    flush: Descriptor | None = None
    is_sent: bool = False
    epoch: int = 0
    arrived: dict[int, Descriptor] = attrs.field(factory=dict)  # the leaves' sums, if this is the top

    def is_foldable(self) -> bool:
        return bool(self.pending) and (not self.flags & LAZY or self.is_pressed or self.flush is not None)


class Aggregator:
    """One runtime: participant `me` of the arena, leaf and top as asked."""

    def __init__(self, arena: Arena, me: int) -> None:
        self._arena, self._me = arena, me
        self._inbox, self._outbox = Inbox(arena, me), Outbox(arena, me)
        self._tasks: dict[int, _Task] = {}
        self._newest = 0  # no round up to this one will be opened here: they are opened in order
        self._early: dict[int, dict[int, Descriptor]] = {}
        self._manifest_bytes = int(lib.lifl_manifest_bytes())
        self._batch_max = int(lib.lifl_batch_max())
        self.is_stopped = False

    def step(self) -> bool:
        """Receives what is there, then does one piece of work; false if there was neither."""
        worked = False
        while (item := self._inbox.try_pop()) is not None:
            worked = True
            try:
                self._receive(item[1])
            except Exception:
                self._fail(item[1].round)
        self._outbox.flush()
        for task in list(self._tasks.values()):
            try:
                if self._advance(task):
                    return True
            except Exception:
                self._fail(task.round)
        return worked

    def _fail(self, number: int) -> None:
        """The round is lost, the worker is not: the agent ends the round and says why."""
        log.exception("worker %d: round %d failed", self._me, number)
        if (task := self._tasks.get(number)) is not None:
            self._forget(task)
        self._outbox.push(AGENT, Descriptor(Kind.FAILED, number))

    def run(self, spin_s: float) -> None:
        """Works until told to stop."""
        while not self.is_stopped:
            if not self.step():
                self._inbox.wait(spin_s, 0.001 if not self._outbox.flush() else 0.1)

    # ------------------------------------------------------------ Recv

    def _receive(self, d: Descriptor) -> None:
        if d.kind == Kind.STOP:
            self.is_stopped = True
        elif d.kind == Kind.PING:
            self._outbox.push(AGENT, Descriptor(Kind.HELLO, 0))
        elif d.kind == Kind.OPEN:
            control = self._arena.map(d.block, d.generation)
            layout, flags = Layout.decode(ctypes.string_at(control.address, control.nbytes))
            control.close()
            self._tasks[d.round] = _Task(d.round, layout, flags, arrived=self._early.pop(d.round, {}))
            self._see(d.round)
        elif d.kind == Kind.ABORT:
            if (task := self._tasks.get(d.round)) is not None:
                self._forget(task)
            self._see(d.round)
            self._outbox.push(AGENT, Descriptor(Kind.ABORTED, d.round))
        elif (task := self._tasks.get(d.round)) is None:
            self._receive_unknown(d)
        elif d.kind == Kind.GRANT:
            self._grant(task, d)
        elif d.kind == Kind.UPDATE:
            task.pending.append(block := Block(d.block, d.generation, 0))
            if d.arg:
                task.alone.add(block)
        elif d.kind == Kind.PRESS:
            task.is_pressed = bool(task.pending)
        elif d.kind == Kind.FLUSH:
            task.flush = d
        elif d.kind == Kind.SUM:
            task.arrived[d.arg] = d  # twice if the agent repeats what a dead leaf may have said

    def _see(self, number: int) -> None:
        """No round up to `number` will be opened here any more: sums that came early for one go back."""
        self._newest = max(self._newest, number)
        for early in [n for n in self._early if n <= self._newest]:
            for d in self._early.pop(early).values():
                self._give_back(Block(d.block, d.generation, 0))

    def _receive_unknown(self, d: Descriptor) -> None:
        """Of a round that was aborted meanwhile; or a leaf's sum has overtaken the round's opening."""
        if d.kind == Kind.SUM and d.round > self._newest:
            self._early.setdefault(d.round, {})[d.arg] = d
        elif d.kind == Kind.SUM:
            self._give_back(Block(d.block, d.generation, 0))

    def _give_back(self, block: Block) -> None:
        """Frees a block that this worker holds, whatever it was doing with it."""
        for state in (State.READY, State.ACCUM, State.COMMITTED, State.READING):
            if block.index != NO_BLOCK and self._arena.move(block, (self._me, state), (AGENT, State.FREE)):
                return

    def _grant(self, task: _Task, d: Descriptor) -> None:
        mapping = self._arena.map(d.block, d.generation)
        if mapping.nbytes < self._manifest_bytes + task.layout.sum_bytes:
            raise ValueError(f"granted {mapping.nbytes} bytes for a sum of {task.layout.sum_bytes}")
        held = _Sum(Block(d.block, d.generation, mapping.nbytes), mapping)
        if not d.arg:
            task.spare.append(held)
            return
        manifest = self._arena.manifest(mapping.address)  # a dead predecessor's
        held.weight, held.num_updates = (manifest.weight, manifest.weight_low), manifest.num_updates
        task.current, task.epoch = held, manifest.epoch

    def _forget(self, task: _Task) -> None:
        """Gives back all that this worker holds of a round."""
        for block in task.pending:
            self._give_back(block)
        for held in [*task.spare, *([task.current] if task.current else [])]:
            held.mapping.close()
            self._give_back(held.block)
        for d in task.arrived.values():
            self._give_back(Block(d.block, d.generation, 0))
        self._tasks.pop(task.round, None)

    # ------------------------------------------------------------ Agg

    def _advance(self, task: _Task) -> bool:
        if task.flags & FLOWER:
            return self._flower(task) if task.flush else False
        if task.is_foldable():
            self._fold(task)
            task.is_pressed = task.is_pressed and bool(task.pending)
            return True
        if task.flush and not task.is_sent:
            self._send_sum(task, task.flush)
            return True
        if task.flush and task.is_sent and len(task.arrived) == task.flush.arg & 0xFF:
            self._finish(task, task.flush)
            return True
        return False

    def _take(self, blocks: Iterable[Block]) -> list[Block]:
        """Those of `blocks` that are there for this worker, now READING: what it dies of is among these.

        A descriptor is a hint, and may come twice.
        """
        return [b for b in blocks if self._arena.move(b, (self._me, State.READY), (self._me, State.READING))]

    def _next_batch(self, task: _Task) -> list[Block]:
        most = min(task.flags >> BATCH_SHIFT or self._batch_max, self._batch_max)
        batch = list(islice(task.pending, most))
        for i, block in enumerate(batch):
            if block in task.alone:
                return batch[: i or 1]
        return batch

    def _fold(self, task: _Task) -> None:
        begin = lib.lifl_now_ns()
        told = self._next_batch(task)
        if not (batch := self._take(told)):
            for _ in told:
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
        # The commit: from here on the batch counts.
        if not self._arena.move(target.block, (self._me, State.ACCUM), (self._me, State.COMMITTED)):
            raise RuntimeError(f"block {target.block.index} was taken from under a fold")
        task.spare.pop()
        for _ in told:
            task.pending.popleft()
        end = lib.lifl_now_ns()
        for block, mapping, note in zip(batch, inputs, notes, strict=True):
            note.begin_ns, note.end_ns = begin, end
            mapping.close()
            self._arena.move(block, (self._me, State.READING), (AGENT, State.FREE))
            self._outbox.push(AGENT, Descriptor(Kind.FOLDED, task.round, block.index, block.generation))
        if source is not None:
            self._arena.move(source.block, (self._me, State.COMMITTED), (self._me, State.ACCUM))
            task.spare.append(source)
        task.current = target

    # ------------------------------------------------------------ Send

    def _send_sum(self, task: _Task, flush: Descriptor) -> None:
        task.is_sent = True
        top, held = flush.arg >> 8, task.current
        message = Descriptor(Kind.SUM, task.round, arg=self._me)
        if held is not None:
            # Handed over to the top; every input of it has been freed above.
            self._arena.move(held.block, (self._me, State.COMMITTED), (top, State.COMMITTED))
            message = message._replace(block=held.block.index, generation=held.block.generation)
            held.mapping.close()
            task.current = None
        if top == self._me:
            task.arrived[self._me] = message
            return
        # First everything is given back: the agent reclaims it when the top's result is there.
        self._forget(task)
        self._outbox.push(top, message)

    def _finish(self, task: _Task, flush: Descriptor) -> None:
        begin = lib.lifl_now_ns()
        blocks = [Block(d.block, d.generation, 0) for d in task.arrived.values() if d.block != NO_BLOCK]
        for block in blocks:
            if not self._arena.move(block, (self._me, State.COMMITTED), (self._me, State.READING)):
                raise RuntimeError(f"partial sum {block.index} is stale")
        sums = [self._arena.map(b.index, b.generation) for b in blocks]
        manifests = [self._arena.manifest(s.address) for s in sums]
        mean = self._arena.map(flush.block, flush.generation)
        weight = fold.add_weights((0.0, 0.0), [part for m in manifests for part in (m.weight, m.weight_low)])
        at = self._manifest_bytes
        finite = fold.finish_at(task.layout, mean.address, [s.address + at for s in sums], weight)
        num_updates = sum(m.num_updates for m in manifests)
        for mapping in sums:
            mapping.close()
        self._send_mean(task, flush, mean, begin, weight[0], num_updates, finite)

    def _flower(self, task: _Task) -> bool:
        """Everything at once, in the order it came: the agent has put each factor in the note's weight."""
        flush = task.flush
        assert flush is not None
        begin = lib.lifl_now_ns()
        batch = self._take(task.pending)
        inputs = [self._arena.map(b.index, b.generation) for b in batch]
        notes = [self._arena.note(b.index) for b in batch]
        factors = [n.weight for n in notes]
        mean = self._arena.map(flush.block, flush.generation)
        fold.flower_at(task.layout, mean.address, [i.address for i in inputs], factors)
        end = lib.lifl_now_ns()
        for mapping, note in zip(inputs, notes, strict=True):
            note.begin_ns, note.end_ns = begin, end
            mapping.close()
        task.pending.clear()
        self._send_mean(task, flush, mean, begin, sum(factors), len(batch), True, batch)
        return True

    def _send_mean(
        self,
        task: _Task,
        flush: Descriptor,
        mean: Mapping,
        begin: int,
        weight: float,
        num_updates: int,
        finite: bool,
        inputs: Sequence[Block] = (),
    ) -> None:
        note = self._arena.note(flush.block)
        note.weight = weight if finite else math.inf
        note.tag, note.begin_ns, note.end_ns = num_updates, begin, lib.lifl_now_ns()
        mean.close()
        # The commit: from here on nothing of the round is needed but the mean.
        block = Block(flush.block, flush.generation, 0)
        self._arena.move(block, (self._me, State.WRITING), (AGENT, State.READY))
        for done in inputs:
            self._arena.move(done, (self._me, State.READING), (AGENT, State.FREE))
            self._outbox.push(AGENT, Descriptor(Kind.FOLDED, task.round, done.index, done.generation))
        self._forget(task)
        self._outbox.push(AGENT, Descriptor(Kind.RESULT, task.round, flush.block, flush.generation))


def main(arena_fd: int, bell_fd: int, me: int, spin_s: float) -> None:
    """A worker process's life, after the fork of the clean process that makes workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then ends its workers
    die_with_parent()
    arena = Arena.attach(arena_fd)
    ring_for(arena, AGENT, bell_fd)
    Producer(arena, me, AGENT).try_push(Descriptor(Kind.HELLO, 0))
    Aggregator(arena, me).run(spin_s)


def die_with_parent() -> None:
    """Asks the kernel to SIGKILL this process when the thread that made it ends."""
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)
