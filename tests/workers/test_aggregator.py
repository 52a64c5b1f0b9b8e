"""The worker, driven by hand through its rings: what it counts, what it ignores, what it gives back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import attrs
import numpy as np
import pytest

import lifl
from lifl import fold
from lifl.errors import RoundError
from lifl.shm import control_block
from lifl.shm.arena import OWNER, Arena, Block, State
from lifl.shm.control_block import MeanRecipe, Source
from lifl.shm.messages import Descriptor, Kind
from lifl.shm.ring import Inbox, Outbox
from lifl.workers.aggregator import Aggregator

ME, OTHER = 1, 2
MANIFEST_BYTES = 4096
MODEL = {"w": np.ones(5, np.float32)}
SPEC = lifl.TensorSpec.from_arrays(MODEL)


@attrs.define
class Owner:
    """The other end of a worker's rings: allocates, grants, sends updates, hears what comes back."""

    arena: Arena
    outbox: Outbox
    inbox: Inbox
    worker: Aggregator

    def block(self, nbytes: int, owner: int, state: State) -> Block:
        """A block in the worker's hands."""
        block = self.arena.alloc(nbytes, owner, state)
        assert block is not None
        return block

    def open(self, number: int, flags: int = 0) -> tuple[Block, Block]:
        """Opens a round with two blocks for its sums."""
        encoded = SPEC.layout.encode(flags)
        control = self.block(len(encoded), OWNER, State.WRITING)
        self.arena.buffer(control)[:] = encoded
        self.tell(Kind.OPEN, number, control)
        sums = [self.block(MANIFEST_BYTES + SPEC.layout.sum_bytes, ME, State.ACCUM) for _ in range(2)]
        for block in sums:
            self.tell(Kind.GRANT, number, block)
        return sums[0], sums[1]

    def update(self, value: float, weight: float = 1.0) -> Block:
        """An update that is READY for the worker."""
        block = self.block(SPEC.layout.update_bytes, ME, State.READY)
        np.frombuffer(self.arena.buffer(block), np.float32, 5)[...] = value
        self.arena.note(block.index).weight = weight
        return block

    def tell(self, kind: Kind, number: int, block: Block, arg: int = 0) -> None:
        """Sends a descriptor."""
        self.outbox.push(ME, Descriptor(kind, number, block.index, block.generation, arg))

    def flush(self, number: int, leaves: int = 1) -> Block:
        """Tells the worker that it is the top and that this was all; the block for the mean."""
        mean = self.block(SPEC.layout.mean_bytes, ME, State.WRITING)
        self.tell(Kind.FLUSH, number, mean, ME << 8 | leaves)
        return mean

    def heard(self) -> list[Descriptor]:
        """Lets the worker work, then takes all that it said."""
        while self.worker.step():
            pass
        return [descriptor for _, descriptor in iter(self.inbox.try_pop, None)]

    def mean(self, block: Block) -> list[float]:
        """The numbers in a mean's block."""
        return np.frombuffer(self.arena.buffer(block), np.float32, 5).tolist()


@pytest.fixture
def owner() -> Iterator[Owner]:
    """The owner, with one worker in this process."""
    arena = Arena.create(64 * 65536, 3, debug=True)
    owner = Owner(arena, Outbox.of_rings(arena, OWNER), Inbox(arena, OWNER), Aggregator(arena, ME))
    yield owner
    owner.worker = Aggregator(arena, ME)  # the old one may be in the middle of a round, with blocks mapped
    arena.close()


def test_updates_become_a_mean(owner: Owner) -> None:
    """An eager leaf folds what is ready, frees it, says so; as the top it sends the mean and its weight."""
    owner.open(1)
    updates = [owner.update(i, weight=i) for i in (1, 3)]
    for block in updates:
        owner.tell(Kind.UPDATE, 1, block)
    assert [(d.kind, d.block) for d in owner.heard()] == [(Kind.FOLDED, b.index) for b in updates]
    assert all(owner.arena.describe(b.index)[2] == State.FREE for b in updates)
    mean = owner.flush(1)
    (result,) = owner.heard()
    assert (result.kind, result.block, result.arg) == (Kind.RESULT, mean.index, 0)
    assert owner.mean(mean) == [2.5] * 5
    note = owner.arena.note(mean.index)
    assert (note.weight, note.num_updates) == (4.0, 2)


def test_shards_become_a_mean(owner: Owner) -> None:
    """Ranges of the mean are made of a leaf's sum and of updates, by a worker that was told of nothing before."""
    owner.open(1)
    owner.tell(Kind.UPDATE, 1, owner.update(1, weight=2))
    owner.tell(Kind.FLUSH, 1, Block(0, 0, 0), OWNER << 8 | 1)
    folded, total = owner.heard()
    assert (folded.kind, total.kind, total.arg) == (Kind.FOLDED, Kind.SUM, ME)
    assert owner.arena.describe(total.block)[1:3] == (OWNER, State.COMMITTED)

    encoded = SPEC.layout.encode(0)
    control = owner.block(control_block.control_bytes(SPEC.layout, 2), OWNER, State.WRITING)
    mean = owner.block(SPEC.layout.mean_bytes, OWNER, State.WRITING)
    update = owner.block(SPEC.layout.update_bytes, OWNER, State.READY)
    np.frombuffer(owner.arena.buffer(update), np.float32, 5)[...] = 4
    buffer = owner.arena.buffer(control)
    buffer[: len(encoded)] = encoded
    sums, updates = (Source(total.block, total.generation),), (Source(update.index, update.generation, 4.0),)
    control_block.write(buffer, SPEC.layout, MeanRecipe(Source(mean.index, mean.generation), sums, updates, (6.0, 0.0)))
    for shard in (1, 0):
        owner.tell(Kind.SHARD, 2, control, shard << 8 | 2)
    assert [(d.kind, d.round, d.arg) for d in owner.heard()] == [(Kind.SHARDED, 2, 1 << 8), (Kind.SHARDED, 2, 0)]
    assert owner.mean(mean) == [3.0] * 5
    begin_ns, end_ns = control_block.read_times(buffer, SPEC.layout, 0)
    assert 0 < begin_ns <= end_ns


def test_rounds_take_turns(owner: Owner) -> None:
    """A worker with several rounds does one piece of each in turn, however much one of them has."""
    for number in (1, 2):
        owner.open(number)
    owner.worker.step()
    owner.worker._batch_max = 1
    for number in (1, 1, 1, 2, 2, 2):
        owner.tell(Kind.UPDATE, number, owner.update(1))
    assert [d.round for d in owner.heard()] == [1, 2, 1, 2, 1, 2]


def test_round_that_is_opened_late_keeps_its_sums(owner: Owner) -> None:
    """Leaves join rounds in any order: that a newer round is open says nothing about an older one."""
    owner.open(9)
    owner.heard()
    block = owner.block(MANIFEST_BYTES + SPEC.layout.sum_bytes, ME, State.COMMITTED)
    owner.tell(Kind.SUM, 3, block, OTHER)
    assert owner.heard() == []
    assert owner.arena.describe(block.index)[2] == State.COMMITTED
    owner.tell(Kind.ABORT, 3, block)
    assert [d.kind for d in owner.heard()] == [Kind.ABORTED]
    assert owner.arena.describe(block.index)[2] == State.FREE


def test_stale_and_doubled_descriptors_do_not_count(owner: Owner) -> None:
    """An update counts once: its descriptor sent twice, an old one, and one of another's block are ignored."""
    owner.open(1)
    once, others = owner.update(5), owner.block(8, OTHER, State.READY)
    for block in (once, once, Block(once.index, once.generation + 1, 0), others):
        owner.tell(Kind.UPDATE, 1, block)
    assert [d.kind for d in owner.heard()] == [Kind.FOLDED]
    mean = owner.flush(1)
    owner.heard()
    assert owner.mean(mean) == [5.0] * 5
    assert owner.arena.note(mean.index).num_updates == 1


def test_manifest_says_what_the_sum_contains(owner: Owner) -> None:
    """A committed sum names the updates of its last batch, and the higher epoch is the newer one."""
    sums, epochs = owner.open(1), []
    for i in range(3):
        update = owner.update(i, weight=2)
        owner.tell(Kind.UPDATE, 1, update)
        owner.heard()
        (newest,) = [b for b in sums if owner.arena.describe(b.index)[2] == State.COMMITTED]
        mapping = owner.arena.map(newest.index, newest.generation)
        manifest = owner.arena.manifest(mapping.address)
        assert (manifest.num_updates, manifest.weight, manifest.batch, manifest.round) == (i + 1, 2.0 * (i + 1), 1, 1)
        assert (manifest.blocks[0], manifest.generations[0]) == (update.index, update.generation)
        epochs.append(manifest.epoch)
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("count", [0, 1, 70])
@pytest.mark.parametrize("is_flushed", [False, True])
def test_aborted_round_gives_everything_back(owner: Owner, count: int, is_flushed: bool) -> None:
    """Whenever a round is aborted, the worker lets go of every block of it and says ABORTED."""
    free = owner.arena.free_bytes
    blocks = [*owner.open(1)]
    (control,) = [Block(0, owner.arena.describe(0)[0], 0)]
    for _ in range(min(count, owner.arena.free_bytes // 65536 - 1)):
        blocks.append(owner.update(1))
        owner.tell(Kind.UPDATE, 1, blocks[-1])
        if count == 1:
            owner.worker.step()
    if is_flushed:
        # As the top of two leaves, the other of which never sends its sum.
        mean = owner.flush(1, leaves=2)
        owner.worker.step()
        owner.worker.step()
    owner.tell(Kind.ABORT, 1, control)
    assert owner.heard()[-1].kind == Kind.ABORTED
    assert not owner.worker.step()
    if is_flushed:
        assert owner.arena.move(mean, (ME, State.WRITING), (OWNER, State.FREE))
        blocks.append(mean)
    for block in (control, *blocks):
        assert owner.arena.reclaim(block), owner.arena.describe(block.index)
    assert owner.arena.free_bytes == free


def test_sum_that_comes_before_its_round_is_kept(owner: Owner) -> None:
    """Another leaf's sum may overtake the OPEN of its round, which comes through another ring."""
    other = Aggregator(owner.arena, OTHER)
    encoded = SPEC.layout.encode(0)
    control = owner.block(len(encoded), OWNER, State.WRITING)
    owner.arena.buffer(control)[:] = encoded
    block = owner.block(MANIFEST_BYTES + SPEC.layout.sum_bytes, OTHER, State.ACCUM)
    update = owner.update(7)
    assert owner.arena.move(update, (ME, State.READY), (OTHER, State.READY))
    mean = owner.block(SPEC.layout.mean_bytes, ME, State.WRITING)
    for kind, b in ((Kind.OPEN, control), (Kind.GRANT, block), (Kind.UPDATE, update), (Kind.FLUSH, mean)):
        owner.outbox.push(OTHER, Descriptor(kind, 1, b.index, b.generation, ME << 8 | 2 if kind == Kind.FLUSH else 0))
    while other.step():
        pass
    owner.heard()
    owner.open(1)
    owner.tell(Kind.FLUSH, 1, mean, ME << 8 | 2)
    assert owner.heard()[-1].kind == Kind.RESULT
    assert owner.mean(mean) == [7.0] * 5


def test_error_in_a_fold_loses_the_round_and_not_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a worker ends its round with RoundError; the round's blocks come back and the next round works."""
    with lifl.Node("4MiB", workers=0) as node:
        free = node.arena.free_bytes
        with node.open_round(SPEC, expected=1) as round_:
            with monkeypatch.context() as patch:
                patch.setattr(fold, "finish_at", lambda *_: 1 / 0)
                # Its traceback would keep the blocks of the fold mapped.
                patch.setattr(logging.getLogger("lifl.workers.aggregator"), "disabled", True)
                round_.submit(MODEL)
            with pytest.raises(RoundError, match="worker 1"):
                round_.result(5)
        assert node.arena.free_bytes == free
        with node.open_round(SPEC, expected=1) as round_:
            round_.submit(MODEL)
            assert round_.result(5).num_updates == 1
