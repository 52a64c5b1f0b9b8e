"""The arena, its blocks and ownership words, and the leases on them."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifl.errors import ArenaCorruptError, LeaseError, ShmError
from lifl.shm import arena as shm
from lifl.shm import kernels, machine
from lifl.shm.arena import OWNER, Arena, Block, Lease, State

UNIT = 65536
POISON = 0xA5
HEADER = struct.Struct("<QIIQQIIIIQQQ")
ENTRY_BYTES = 64


def must_alloc(arena: Arena, nbytes: int) -> Block:
    """A block that the test knows there is room for."""
    block = arena.alloc(nbytes)
    assert block is not None
    return block


def fill_with_holes(arena: Arena) -> list[Block]:
    """Fills the arena with blocks of one unit and gives back every other one; those that stay."""
    blocks = [must_alloc(arena, UNIT) for _ in range(arena.free_bytes // UNIT)]
    for block in blocks[::2]:
        assert arena.reclaim(block)
    return blocks[1::2]


# ---------------------------------------------------------------- create and attach


def test_room_is_as_asked_and_all_of_it_free(arena: Arena) -> None:
    """A new arena has the room asked for in whole units, and its tables beside that."""
    assert arena.block_bytes == arena.free_bytes == 16 * UNIT
    assert arena.total_bytes > arena.block_bytes
    assert os.fstat(arena.fd).st_size == arena.total_bytes


def test_room_is_rounded_up_to_units() -> None:
    """A block of one byte more than a unit takes two units."""
    arena = Arena.create(UNIT + 1, 1)
    assert arena.block_bytes == 2 * UNIT


def test_memory_is_taken_at_once(arena: Arena) -> None:
    """The memfd's pages exist before anybody touches them, so that no later touch can fail."""
    assert os.fstat(arena.fd).st_blocks * 512 >= arena.total_bytes


def test_more_than_the_machine_has_is_refused() -> None:
    """Asking for more memory than is available is ENOMEM with both figures, not the out-of-memory killer."""
    asked = machine.available_bytes() + 2**34
    with pytest.raises(ShmError, match="available") as caught:
        Arena.create(asked, 2)
    assert caught.value.errno == errno.ENOMEM
    assert f"{asked:,}" in str(caught.value)


@pytest.mark.parametrize(("nbytes", "participants"), [(0, 2), (UNIT, 0), (UNIT, 1025)])
def test_senseless_sizes_are_refused(nbytes: int, participants: int) -> None:
    """No room, no participants or too many are EINVAL."""
    with pytest.raises(ShmError) as caught:
        Arena.create(nbytes, participants)
    assert caught.value.errno == errno.EINVAL


def test_attached_arena_shows_the_same_bytes(arena: Arena) -> None:
    """Another handle on the same memfd reads the bytes that one handle writes into a block."""
    other = Arena.attach(arena.fd)
    block = must_alloc(arena, 100)
    arena.buffer(block)[:] = bytes(range(100))
    assert bytes(other.buffer(block)) == bytes(range(100))
    assert (other.participants, other.block_bytes) == (arena.participants, arena.block_bytes)


def test_only_the_creator_allocates(arena: Arena) -> None:
    """A process that attached can neither allocate nor reclaim."""
    other, block = Arena.attach(arena.fd), must_alloc(arena, 1)
    with pytest.raises(ShmError, match="out of bounds"):
        other.alloc(1)
    with pytest.raises(ShmError, match="out of bounds"):
        other.reclaim(block)


@pytest.fixture
def forged(arena: Arena) -> Iterator[Callable[[bytes], int]]:
    """Makes a memfd as long as the arena with a header of the test's."""
    made = []

    def make(header: bytes) -> int:
        fd = os.memfd_create("forged")
        made.append(fd)
        os.truncate(fd, arena.total_bytes)
        os.pwrite(fd, header, 0)
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize("field", [0, 1, 2, 3, 5, 6, 7, 9, 10, 11])
@pytest.mark.parametrize("change", [lambda n: n + 1, lambda n: n - 1, lambda n: 0, lambda n: 2**32 - 1])
def test_corrupt_header_is_refused(
    arena: Arena, forged: Callable[[bytes], int], field: int, change: Callable[[int], int]
) -> None:
    """A header in which any number is not what it must be is an ArenaCorruptError."""
    values = list(HEADER.unpack(os.pread(arena.fd, HEADER.size, 0)))
    Arena.attach(forged(HEADER.pack(*values)))
    values[field] = change(values[field])
    with pytest.raises(ArenaCorruptError):
        Arena.attach(forged(HEADER.pack(*values)))


def test_what_is_no_arena_is_refused(forged: Callable[[bytes], int]) -> None:
    """Zeros, random bytes, a short file and a pipe are ArenaCorruptErrors; a closed descriptor is EBADF."""
    for header in (b"", os.urandom(4096)):
        with pytest.raises(ArenaCorruptError):
            Arena.attach(forged(header))
    short = forged(b"")
    os.truncate(short, 10)
    with pytest.raises(ArenaCorruptError):
        Arena.attach(short)
    ends = os.pipe()
    with pytest.raises(ArenaCorruptError):
        Arena.attach(ends[0])
    for fd in ends:
        os.close(fd)
    with pytest.raises(ShmError) as caught:
        Arena.attach(ends[0])
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(8, "<I", 0), (8, "<I", 17), (12, "<I", 0), (12, "<I", 99), (16, "<Q", 10 * UNIT)],
    ids=["no units", "too many units", "cycle", "next outside", "more bytes than room"],
)
def test_corrupt_block_table_is_refused(arena: Arena, offset: int, form: str, value: int) -> None:
    """A block whose table entry contradicts itself is an ArenaCorruptError, not a wild mapping."""
    block = must_alloc(arena, UNIT)
    table = HEADER.unpack(os.pread(arena.fd, HEADER.size, 0))[10]
    os.pwrite(arena.fd, struct.pack(form, value), table + block.index * ENTRY_BYTES + offset)
    with pytest.raises(ArenaCorruptError):
        arena.map(block.index, block.generation)


def test_size_is_sealed(arena: Arena) -> None:
    """Nobody with the descriptor can shrink or grow the arena under its users."""
    for size in (0, 2 * arena.total_bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


# ---------------------------------------------------------------- allocation


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6 * UNIT)), max_size=60))
def test_allocation_succeeds_exactly_if_enough_units_are_free(steps: list[tuple[bool, int]]) -> None:
    """Whatever came before, a block is had if and only if its units are free, and no two blocks overlap."""
    arena, held, free = Arena.create(16 * UNIT, 1), [], 16
    for i, (is_free, n) in enumerate(steps):
        if is_free and held:
            block, mark = held.pop(n % len(held))
            assert bytes(arena.buffer(block)) == bytes([mark]) * block.nbytes
            assert arena.reclaim(block)
            free += max(1, -(-block.nbytes // UNIT))
        else:
            block, units = arena.alloc(n), max(1, -(-n // UNIT))
            assert (block is not None) == (units <= free)
            if block is not None:
                free -= units
                arena.buffer(block)[:] = bytes([i]) * n
                held.append((block, i))
        assert arena.free_bytes == free * UNIT
    arena.close()


def test_block_of_several_extents_is_one_run_of_addresses(arena: Arena) -> None:
    """In a fragmented arena a block lies in many places and is still one buffer, for every process."""
    kept = fill_with_holes(arena)
    block = must_alloc(arena, arena.free_bytes - 5)
    assert arena.describe(block.index)[4] == 8
    pattern = np.random.default_rng(0).integers(0, 256, block.nbytes, np.uint8)
    np.frombuffer(arena.buffer(block), np.uint8)[...] = pattern
    assert np.array_equal(np.frombuffer(Arena.attach(arena.fd).buffer(block), np.uint8), pattern)
    for other in kept:
        arena.buffer(other)[:] = bytes(UNIT)
    assert np.array_equal(np.frombuffer(arena.buffer(block), np.uint8), pattern)


def test_fragmented_block_gives_every_extent_back(arena: Arena) -> None:
    """Reclaiming a block of several extents frees all of them."""
    kept = fill_with_holes(arena)
    block = must_alloc(arena, 8 * UNIT)
    assert arena.alloc(1) is None
    assert arena.reclaim(block)
    assert arena.free_bytes == 8 * UNIT
    assert all(arena.reclaim(b) for b in kept)
    assert arena.describe(must_alloc(arena, 16 * UNIT).index)[4] == 1


def test_full_is_an_answer(arena: Arena) -> None:
    """A full arena says None and takes nothing."""
    block = must_alloc(arena, 16 * UNIT)
    assert arena.alloc(0) is None
    assert arena.alloc(2**60) is None
    assert arena.reclaim(block)


def test_largest_request_is_an_answer_too(in_fork: Callable[[Callable[[], None]], int]) -> None:
    """A request of 2**64 - 1 bytes is refused like any that is too large."""

    def ask() -> None:
        assert Arena.create(UNIT, 1).alloc(2**64 - 1) is None

    assert in_fork(ask) == 0


# ---------------------------------------------------------------- generations and ownership


def test_generation_rises_with_each_allocation(arena: Arena) -> None:
    """The same units have another generation when they are allocated again."""
    seen = set()
    for _ in range(40):
        block = must_alloc(arena, 16 * UNIT)
        assert block not in seen
        seen.add(block)
        assert arena.reclaim(block)


def test_stale_descriptor_fails(arena: Arena) -> None:
    """With an old generation a block can be neither mapped nor moved, and the new one is not disturbed."""
    old = must_alloc(arena, 16 * UNIT)
    assert arena.reclaim(old)
    new = must_alloc(arena, 16 * UNIT)
    assert old.index == new.index
    with pytest.raises(LeaseError, match="generation"):
        arena.map(old.index, old.generation)
    assert not arena.move(old, (OWNER, State.WRITING), (1, State.READY))
    assert not arena.reclaim(old)
    assert arena.describe(new.index)[:3] == (new.generation, OWNER, State.WRITING)


def test_descriptor_of_a_unit_inside_another_block_is_stale(arena: Arena) -> None:
    """A freed block whose unit is by now the middle of another block cannot be mapped."""
    first, second = must_alloc(arena, UNIT), must_alloc(arena, UNIT)
    assert arena.reclaim(first)
    assert arena.reclaim(second)
    must_alloc(arena, 16 * UNIT)
    with pytest.raises(LeaseError):
        arena.map(second.index, second.generation)


def test_second_reclaim_never_frees_anothers_memory(arena: Arena) -> None:
    """Giving a block back twice is refused, also when its unit is by now the middle of another block."""
    first, second = must_alloc(arena, UNIT), must_alloc(arena, UNIT)
    assert arena.reclaim(first)
    assert arena.reclaim(second)
    must_alloc(arena, 16 * UNIT)
    assert not arena.reclaim(second)
    assert arena.free_bytes == 0


def test_move_is_one_compare_and_swap(arena: Arena) -> None:
    """An ownership word changes only from exactly the owner and state that were named."""
    block = must_alloc(arena, 1)
    assert not arena.move(block, (1, State.WRITING), (2, State.READY))
    assert not arena.move(block, (OWNER, State.READY), (2, State.READY))
    assert arena.move(block, (OWNER, State.WRITING), (2, State.READY))
    assert not arena.move(block, (OWNER, State.WRITING), (2, State.READY))
    assert arena.describe(block.index)[:3] == (block.generation, 2, State.READY)
    with pytest.raises(ShmError, match="out of bounds"):
        arena.move(block, (2, State.READY), (4, State.READY))


def test_block_of_a_worker_is_not_reclaimed(arena: Arena) -> None:
    """While a worker owns a block the agent cannot take it back; when the worker let go it can."""
    block = must_alloc(arena, 1)
    assert arena.move(block, (OWNER, State.WRITING), (1, State.READING))
    assert not arena.reclaim(block)
    assert arena.move(block, (1, State.READING), (OWNER, State.FREE))
    assert arena.reclaim(block)
    assert not arena.reclaim(block)


@pytest.mark.parametrize("index", [16, 2**32 - 1])
def test_block_outside_the_arena_is_refused(arena: Arena, index: int) -> None:
    """A block number beyond the table is EINVAL everywhere."""
    block = Block(index, 1, 1)
    for use in (
        lambda: arena.map(index, 1),
        lambda: arena.describe(index),
        lambda: arena.note(index),
        lambda: arena.reclaim(block),
        lambda: arena.move(block, (0, State.FREE), (0, State.FREE)),
    ):
        with pytest.raises(ShmError, match="out of bounds"):
            use()


# ---------------------------------------------------------------- views


def test_view_outlives_the_arena() -> None:
    """A view of a block stays readable after its arena is closed, and then nothing else works."""
    arena = Arena.create(4 * UNIT, 1)
    block = must_alloc(arena, 8)
    view = np.frombuffer(arena.buffer(block), np.int64)
    view[0] = 42
    arena.close()
    arena.close()
    assert view[0] == 42
    for use in (lambda: arena.alloc(1), lambda: arena.fd, lambda: arena.free_bytes, lambda: arena.buffer(block)):
        with pytest.raises(LeaseError, match="closed"):
            use()


def test_view_of_a_fragmented_block_outlives_the_arena(arena: Arena) -> None:
    """The same for a block of several extents, which has a mapping of its own."""
    fill_with_holes(arena)
    view = np.frombuffer(arena.buffer(must_alloc(arena, 3 * UNIT)), np.uint8)
    view[...] = 7
    arena.close()
    assert view.min() == view.max() == 7


def test_reclaimed_block_rests_while_a_view_of_it_lives(arena: Arena) -> None:
    """A block given back under a live view is not allocated again until the view is gone."""
    block = must_alloc(arena, 16 * UNIT)
    buffer = arena.buffer(block)
    view = np.frombuffer(buffer, np.uint8)[100:200]
    view[...] = 1
    del buffer
    assert arena.reclaim(block)
    assert arena.free_bytes == 0
    assert arena.alloc(1) is None
    assert view.max() == 1
    del view
    assert arena.free_bytes == 16 * UNIT
    must_alloc(arena, 16 * UNIT)


def test_freed_block_is_poisoned_in_debug_mode(arena: Arena) -> None:
    """With ``debug`` a freed block's old bytes are gone, also in all extents of a fragmented one."""
    fill_with_holes(arena)
    block = must_alloc(arena, 4 * UNIT)
    arena.buffer(block)[:] = bytes(4 * UNIT)
    assert arena.reclaim(block)
    again = must_alloc(arena, 8 * UNIT)
    assert set(bytes(arena.buffer(again))) == {POISON}


# ---------------------------------------------------------------- leases


def test_lease_refuses_release_while_a_view_is_held(arena: Arena) -> None:
    """A lease with a view out stays alive and usable, and is released when the view is dropped."""
    lease = Lease(arena, must_alloc(arena, 100))
    view = np.frombuffer(lease.buffer, np.uint8)[3:5]
    with pytest.raises(LeaseError, match="view"):
        lease.release()
    assert lease.is_live
    lease.buffer[3:5] = b"ab"
    assert bytes(view) == b"ab"
    del view
    lease.release()
    assert arena.free_bytes == arena.block_bytes


@pytest.mark.parametrize("end", [Lease.release, Lease.abandon, Lease.hand_over])
def test_ended_lease_raises(arena: Arena, end: Callable[[Lease], None]) -> None:
    """However a lease ended, using or ending it again raises LeaseError."""
    block = must_alloc(arena, 100)
    lease = Lease(arena, block)
    end(lease)
    assert not lease.is_live
    for use in (lambda: lease.buffer, lease.release, lease.abandon, lease.hand_over):
        with pytest.raises(LeaseError):
            use()


def test_abandoned_block_waits_for_its_last_view(arena: Arena) -> None:
    """An abandoned lease ends at once, its block goes back with the last view."""
    lease = Lease(arena, must_alloc(arena, 100))
    view = np.frombuffer(lease.buffer, np.uint8)
    lease.abandon()
    assert arena.free_bytes == arena.block_bytes - UNIT
    del view
    assert arena.free_bytes == arena.block_bytes


def test_handed_over_block_stays_taken(arena: Arena) -> None:
    """A lease that was handed over gives nothing back."""
    block = must_alloc(arena, 100)
    Lease(arena, block).hand_over()
    assert arena.describe(block.index)[2] == State.WRITING
    assert arena.free_bytes == arena.block_bytes - UNIT


def test_forked_child_cannot_use_the_handles(arena: Arena, in_fork: Callable[[Callable[[], None]], int]) -> None:
    """In a forked child arena and lease raise LeaseError, and the parent's go on."""
    lease = Lease(arena, must_alloc(arena, 100))
    lease.buffer[:] = bytes(100)

    def child() -> None:
        for use in (lambda: arena.alloc(1), lambda: lease.buffer, lease.release, lambda: arena.fd):
            with pytest.raises(LeaseError, match="fork"):
                use()
        Arena.attach(inherited).close()

    inherited = arena.fd
    assert in_fork(child) == 0
    lease.buffer[:] = bytes([1]) * 100
    lease.release()
    assert arena.free_bytes == arena.block_bytes


def test_missing_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension everything that needs it says so in one ShmError."""
    monkeypatch.setattr(shm, "MISSING", "no such thing here")
    for use in (shm.require, lambda: Arena.create(UNIT, 1), lambda: Arena.attach(0), kernels.vector_width):
        with pytest.raises(ShmError, match="no such thing") as caught:
            use()
        assert caught.value.errno == errno.ENOSYS


@pytest.mark.parametrize("first_to_die", [0, 1])
def test_block_with_two_buffers_waits_for_both(arena: Arena, first_to_die: int) -> None:
    """It comes free when the last view of any of them is gone, whichever that is."""
    block = arena.alloc(100)
    assert block is not None
    free = arena.free_bytes
    views = [memoryview(arena.buffer(block))[:10], memoryview(arena.buffer(block))[:10]]
    assert arena.reclaim(block)
    del views[first_to_die]
    assert arena.free_bytes == free
    views[0][:] = bytes(10)
    views.clear()
    assert arena.free_bytes > free
