"""The part of one Node in a round, as jobs in virtual time; prediction and simulation share it.

The rules of timing are those of the live Node (``lifl.planner.timing``); see :class:`~lifl.planner.shape.Shape` for the
forms. Knows seconds of one core and bytes, no rates: ``lifl.planner.costs`` has those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import attrs

from lifl.planner.engine import CPU, Done
from lifl.planner.shape import Shape
from lifl.planner.site import Site
from lifl.planner.timing import begins_just_in_time, seen_rate, wants_leaf

MAX_IN_A_BATCH = 64
"""The largest batch that a leaf folds at once, in updates."""

SUMS_OF_A_LEAF = 2
"""A leaf reads one sum and writes the other, in turn."""


@attrs.frozen
class Work:
    """Seconds of one core, alone on the machine, for each step; and the bytes of each block.

    Attributes
    ----------
    land_s : float
        Copying and checking one update.
    update_s : float
        Reading one update while folding.
    sum_s : float
        Reading one partial sum, or writing one.
    mean_s : float
        Writing the mean.
    dispatch_s : float
        From a decision to the first instruction of a warm worker's work.
    cold_s : float
        From a decision to a new worker that waits for work.
    update_touch_s, sum_touch_s : float
        More seconds of a worker that was started for the round, when it reads an update or a sum for the first time:
        the kernel enters page after page into its address space.
    sum_made_s, mean_made_s : float
        Likewise, when it writes a sum or the mean for the first time.
    update_bytes, sum_bytes, mean_bytes : int
    """

    land_s: float
    update_s: float
    sum_s: float
    mean_s: float
    dispatch_s: float
    cold_s: float
    update_touch_s: float
    sum_touch_s: float
    sum_made_s: float
    mean_made_s: float
    update_bytes: int
    sum_bytes: int
    mean_bytes: int

    def batch_s(self, n: int, is_first: bool) -> float:
        """``n * update + sum written + sum read``, the last only if the leaf has one: one batch of `n` updates."""
        return n * self.update_s + (1 if is_first else 2) * self.sum_s + self.dispatch_s

    def mean_of_s(self, sums: int, updates: int, parts: int = 1) -> float:
        """``(sums * sum + updates * update + mean) / parts``: the mean, or one of `parts` ranges of it."""
        return (sums * self.sum_s + updates * self.update_s + self.mean_s) / parts + self.dispatch_s

    def touched_mean_s(self, sums: int, updates: int, parts: int = 1) -> float:
        """``(sums * sum_touch + updates * update_touch + mean_made) / parts``: more for a new worker's mean."""
        return (sums * self.sum_touch_s + updates * self.update_touch_s + self.mean_made_s) / parts


class _Leaf:
    __slots__ = ("batch", "batches", "given", "is_done", "waiting", "worker")

    def __init__(self) -> None:
        self.worker: int | None = None  # None: it is still starting
        self.waiting = self.batch = self.batches = self.given = 0
        self.is_done = False

    @property
    def has_sum(self) -> bool:
        return self.batches > 0

    @property
    def outstanding(self) -> int:
        return self.waiting + self.batch


class Aggregation:
    """The part of one Node in a round.

    Parameters
    ----------
    site : Site
        The place of the work.
    work : Work
    shape : Shape
    timing : str
        ``eager``, ``lazy`` or ``jit``.
    expected : int
        Updates that this Node folds; above 0.
    workers : int
        The most workers it may have; 0 counts as 1.
    warm : int
        Workers of these that wait for work at the start.
    is_reusing : bool
        A worker that is done takes the next task. Without it, each task has a new one, and `workers` bounds nothing.
    is_changing_roles : bool
        Without reuse: the first leaf that is done becomes the top all the same.
    rate : float, optional
        For ``jit``: updates per second that it expects until it has seen a rate; default: unknown.
    on_done : callable
        Called when the mean is made.
    """

    def __init__(
        self,
        site: Site,
        work: Work,
        shape: Shape,
        timing: str,
        expected: int,
        *,
        workers: int,
        warm: int,
        is_reusing: bool = True,
        is_changing_roles: bool = False,
        rate: float | None = None,
        on_done: Done = lambda: None,
    ) -> None:
        self._site, self._work = site, work
        self._shape, self._timing, self._expected = shape, timing, expected
        self._max_workers = max(1, workers)
        self._is_reusing = is_reusing
        self._rate = rate
        self._is_changing_roles = is_reusing or is_changing_roles
        self._on_done = on_done
        self._free = deque(range(min(warm, self._max_workers))) if is_reusing else deque()
        self.num_workers = self._warm = len(self._free)
        self._queue: deque[Callable[[int], object]] = deque()
        self._leaves: list[_Leaf] = []
        self._is_eager = timing == "eager" and shape.leaves > 0
        self._held = 0  # updates that were given to nobody yet
        self._first_s = 0.0
        self._shards_left = 0
        self._bytes = work.mean_bytes
        self._top: int | None = None
        self._is_finishing = self._is_making = False
        self.arrived = self.folded = self.started = 0
        self.peak_bytes = self._bytes
        self.done_s = 0.0

    # ------------------------------------------------------------ updates come in

    def land(self) -> None:
        """An update's bytes are there; it is :meth:`ready` when the gateway has copied and checked them."""
        self._site.land(self._work.land_s, self.ready)

    def ready(self) -> None:
        """Takes one more update that can be folded."""
        if not self.arrived:
            self._first_s = self._site.engine.now
        self.arrived += 1
        self._hold(self._work.update_bytes)
        if self._is_eager and not (self.arrived == self._expected and self._shape.shards):
            self._wake(self._give())
        else:
            self._held += 1
        if self.arrived == self._expected:
            self._all_in()
        elif self._timing == "jit" and self._shape.leaves and self._begins():
            self._give_held()

    def _begins(self) -> bool:
        """JIT: true if the leaves have to begin with the updates that are held."""
        seen = seen_rate(self.arrived, self._site.engine.now - self._first_s)
        rate = self._rate if seen is None else seen
        fold_s = self._work.batch_s(1, is_first=False)
        return begins_just_in_time(self._held, fold_s, self.arrived, self._expected, rate)

    def _give_held(self) -> None:
        given = [self._give() for _ in range(self._held)]
        self._held = 0
        for leaf in dict.fromkeys(given):  # only now, so that a leaf folds all of its part in one batch
            self._wake(leaf)

    def _give(self) -> _Leaf:
        """Gives an update to the leaf with the least to do, or to a new one if it is wanted and a worker is free."""
        leaves = self._leaves
        leaf = min(leaves, key=_load) if leaves else None
        if leaf is None or (wants_leaf(leaf.outstanding, len(leaves), self._shape.leaves) and self._has_worker()):
            leaf = self._open_leaf()
        leaf.waiting += 1
        leaf.given += 1
        return leaf

    def _wake(self, leaf: _Leaf) -> None:
        if leaf.worker is not None and leaf.waiting and not leaf.batch:
            self._fold(leaf)

    def _open_leaf(self, part: int = 0) -> _Leaf:
        leaf = _Leaf()
        leaf.waiting = leaf.given = part
        self._leaves.append(leaf)
        self._hold(2 * self._work.sum_bytes)
        self._with_worker("leaf", partial(self._start_leaf, leaf))
        return leaf

    def _start_leaf(self, leaf: _Leaf, worker: int) -> None:
        leaf.worker = worker
        if leaf.waiting and not leaf.batch:
            self._fold(leaf)
        elif self._is_finishing:
            self._end_leaf(leaf)  # its updates were taken back for the shards while it started

    def _fold(self, leaf: _Leaf) -> None:
        leaf.batch = min(leaf.waiting, MAX_IN_A_BATCH)
        leaf.waiting -= leaf.batch
        assert leaf.worker is not None
        work, is_made = self._work, leaf.batches < SUMS_OF_A_LEAF
        touch_s = leaf.batch * work.update_touch_s + is_made * work.sum_made_s
        seconds = work.batch_s(leaf.batch, not leaf.has_sum)
        self._aggregate(leaf.worker, "leaf", touch_s, seconds, partial(self._end_batch, leaf))

    def _end_batch(self, leaf: _Leaf) -> None:
        self.folded += leaf.batch
        self._bytes -= leaf.batch * self._work.update_bytes
        leaf.batch = 0
        leaf.batches += 1
        if leaf.waiting:
            self._fold(leaf)
        elif self._is_finishing:
            self._end_leaf(leaf)

    # ------------------------------------------------------------ the last is in

    def _all_in(self) -> None:
        if self._shape.shards:
            for leaf in self._leaves:
                self._held += leaf.waiting
                leaf.waiting = 0
        elif self._timing == "lazy":
            # All updates are there: each leaf of the shape gets its part at once, and none has to join later.
            held, self._held = self._held, 0
            for part in _even_parts(held, self._shape.leaves):
                self._open_leaf(part)
        else:
            self._give_held()
        self._is_finishing = True
        for leaf in self._leaves:
            # A leaf that still starts has no part in shards: its updates were taken back.
            if not leaf.waiting and not leaf.batch and (leaf.worker is not None or self._shape.shards):
                self._end_leaf(leaf)
        if not self._leaves:
            self._make_mean()

    def _end_leaf(self, leaf: _Leaf) -> None:
        """The leaf has committed. The first leaf that is done becomes the top; the worker of another one is free."""
        worker = leaf.worker
        if leaf.is_done:
            if worker is not None:
                self._release(worker)
            return
        leaf.is_done = True
        if worker is not None:
            self._release(worker)
        if self._top is None and not self._shape.shards:
            self._top = -1
            self._with_worker("top", self._start_top)
        self._make_mean()

    def _start_top(self, worker: int) -> None:
        self._top = worker
        self._make_mean()

    def _make_mean(self) -> None:
        """Begins the mean if all leaves have committed, and in a tree if the top is there."""
        if self._is_making or not all(leaf.is_done for leaf in self._leaves):
            return
        sums = sum(leaf.has_sum for leaf in self._leaves)
        if parts := self._shape.shards:
            self._is_making, self._shards_left = True, parts
            for _ in range(parts):
                self._with_worker("shard", partial(self._make_part, sums, parts))
        elif self._top is not None and self._top >= 0:
            self._is_making = True
            work, its_own = self._work, sum(leaf.worker == self._top for leaf in self._leaves)
            touch_s, seconds = work.touched_mean_s(sums - its_own, 0), work.mean_of_s(sums, 0)
            self._aggregate(self._top, "top", touch_s, seconds, partial(self._end_mean, self._top))

    def _make_part(self, sums: int, parts: int, worker: int) -> None:
        of = (sums, self._held, parts)
        touch_s, seconds = self._work.touched_mean_s(*of), self._work.mean_of_s(*of)
        self._aggregate(worker, "shard", touch_s, seconds, partial(self._end_part, worker))

    def _end_part(self, worker: int) -> None:
        self._shards_left -= 1
        if self._shards_left:
            self._release(worker)
        else:
            self.folded += self._held
            self._end_mean(worker)

    def _end_mean(self, worker: int) -> None:
        self._release(worker)
        self.done_s = self._site.engine.now
        self._on_done()

    # ------------------------------------------------------------ workers

    def _aggregate(self, worker: int, role: str, touch_s: float, seconds: float, then: Done) -> None:
        """Begins work on memory; for a new worker after the kernel's work on its page tables, which needs no bus."""
        begin = partial(self._site.work, worker, role, "aggregate", seconds, then)
        if worker < self._warm or not touch_s:
            begin()
        else:
            self._site.work(worker, role, "touch", touch_s, begin, CPU)

    def _has_worker(self) -> bool:
        return bool(self._free) or self.num_workers < self._max_workers or not self._is_reusing

    def _with_worker(self, role: str, then: Callable[[int], object]) -> None:
        """Calls `then` with a worker: a free one at once, a new one when it has started, or the next to be free."""
        if self._free:
            then(self._free.popleft())
        elif self._has_worker():
            worker = self.num_workers
            self.num_workers += 1
            self.started += 1
            self._site.work(worker, role, "start", self._work.cold_s, partial(then, worker), CPU)
        else:
            self._queue.append(then)

    def _release(self, worker: int) -> None:
        if not self._is_changing_roles:
            return
        if self._queue:
            self._queue.popleft()(worker)
        else:
            self._free.append(worker)

    def _hold(self, nbytes: int) -> None:
        self._bytes += nbytes
        if self._bytes > self.peak_bytes:
            self.peak_bytes = self._bytes


def _load(leaf: _Leaf) -> tuple[int, int]:
    return leaf.outstanding, leaf.given


def _even_parts(n: int, parts: int) -> list[int]:
    """`n` in `parts` that differ by one at most, without empty ones."""
    size, longer = divmod(n, parts)
    return [size + (i < longer) for i in range(parts) if size or i < longer]
