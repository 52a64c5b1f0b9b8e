"""The only importer of ``lifl._shm_ffi``: statuses become exceptions, addresses become objects.

Owns an arena's lifetime, its blocks and the leases on them. It never decides who may have a block:
that is ``lifl.node.node``'s. Kernels take addresses (``int``) and release the GIL.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import weakref
from collections import deque
from enum import IntEnum
from pathlib import Path
from typing import Any

import attrs

from lifl.errors import ArenaCorruptError, LeaseError, ShmError

ffi: Any = None
lib: Any = None
MISSING: str | None = None
try:
    import lifl._shm_ffi as _shm_ffi
except ImportError as _error:  # not Linux, or not built: importing lifl works, making a Node says why
    if sys.platform.startswith("linux"):
        MISSING = f"the extension lifl._shm_ffi is missing ({_error}): run `pip install .` with a C compiler"
    else:
        MISSING = f"lifl's shared memory needs Linux (memfd, futex); this is {sys.platform}"
else:
    ffi, lib = _shm_ffi.ffi, _shm_ffi.lib

AGENT = 0
"""The participant that owns the arena: it alone allocates."""


class State(IntEnum):
    """``enum lifl_state``: what an ownership word says of its block."""

    FREE = 0
    WRITING = 1
    READY = 2
    READING = 3
    ACCUM = 4
    COMMITTED = 5


@attrs.frozen
class Block:
    """A block's name: stale once the block has been allocated again."""

    index: int
    generation: int
    nbytes: int = attrs.field(eq=False)


def require() -> None:
    """Raises :class:`ShmError` that says what this machine lacks, if it lacks anything."""
    if MISSING:
        raise ShmError(errno.ENOSYS, MISSING)


def check(status: int, what: str) -> int:
    """Turns a negative status into its exception; the others are answers and returned."""
    if status >= 0:
        return status
    if status == lib.LIFL_ESYS:
        number = ffi.errno
        raise ShmError(number, f"{what}: {os.strerror(number)}")
    if status == lib.LIFL_ECORRUPT:
        raise ArenaCorruptError(errno.EBADMSG, f"{what}: the arena's tables contradict themselves")
    raise ShmError(errno.EINVAL, f"{what}: an argument is out of bounds")


GROUP = Path("/sys/fs/cgroup")


def limit_bytes() -> int | None:
    """What the control group may use of memory at most; None if it is not bounded."""
    try:
        limit = (GROUP / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def available_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or the control group's if less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    room = int(fields["MemAvailable"].split()[0]) * 1024
    if (limit := limit_bytes()) is None:
        return room
    try:
        used = int((GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return room
    return min(room, max(0, limit - used))


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _disown_in_child() -> None:
    for arena in list(_arenas):
        arena.forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, where importing lifl must work too
    os.register_at_fork(after_in_child=_disown_in_child)


class Arena:
    """One memfd of blocks, rings and ownership words, as one process sees it.

    Made by :meth:`create` (the agent) or :meth:`attach` (its workers). Views of blocks keep the mapping
    alive after :meth:`close`, so they stay valid; nothing else works then.
    """

    def __init__(self, handle: Any, participants: int, debug: bool) -> None:
        self._handle = ffi.gc(handle, lib.lifl_arena_detach)
        self._lock = threading.Lock()
        # A block that is given back while a view of it lives waits in _deferred. The last view may die
        # in the garbage collector, while a lock is held, so that only leaves a note in _orphans; the
        # next allocation sees to it.
        self._views: dict[int, set[object]] = {}  # of each block that had any, those that live
        self._deferred: set[Block] = set()
        self._orphans: deque[Block] = deque()
        self.participants = participants
        self.debug = debug
        self.forked = False
        _arenas.add(self)

    @classmethod
    def create(cls, nbytes: int, participants: int, *, node_id: int = 0, debug: bool = False) -> Arena:
        """A new arena with room for `nbytes` of blocks, all of it taken from the machine now.

        Raises
        ------
        ShmError
            ENOMEM if the machine has less; whatever memfd_create and posix_fallocate say.
        """
        require()
        room = available_bytes()
        if nbytes > room:
            # posix_fallocate on a memfd would not fail: it would wake the out-of-memory killer.
            message = f"an arena of {nbytes:,} bytes was asked for, {room:,} are available: ask for less memory"
            raise ShmError(errno.ENOMEM, message)
        out = ffi.new("lifl_arena **")
        status = lib.lifl_arena_create(nbytes, participants, node_id, out)
        check(status, f"arena of {nbytes:,} bytes for {participants} participants")
        return cls(out[0], participants, debug)

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """The arena behind a file descriptor, which stays the caller's.

        Raises
        ------
        ArenaCorruptError
            If it is no arena, or one of another version.
        """
        require()
        out = ffi.new("lifl_arena **")
        check(lib.lifl_arena_attach(fd, out), f"attach to the arena at descriptor {fd}")
        return cls(out[0], lib.lifl_arena_participants(out[0]), False)

    @property
    def handle(self) -> Any:
        """The C handle; raises :class:`LeaseError` after close and in a forked child."""
        if self.forked:
            raise LeaseError(f"this arena belongs to the process that made it, not to its fork {os.getpid()}")
        if self._handle is None:
            raise LeaseError("the arena is closed")
        return self._handle

    @property
    def fd(self) -> int:
        """The memfd, to be passed to another process."""
        return int(lib.lifl_arena_fd(self.handle))

    @property
    def total_bytes(self) -> int:
        """All that the arena takes, tables and rings included."""
        return int(lib.lifl_arena_total_bytes(self.handle))

    @property
    def block_bytes(self) -> int:
        """Room for blocks, free or not."""
        return int(lib.lifl_arena_units(self.handle) * lib.lifl_unit_bytes())

    @property
    def free_bytes(self) -> int:
        """Room that an allocation can have now."""
        with self._lock:
            self._bury_orphans()
            return int(lib.lifl_arena_free_units(self.handle) * lib.lifl_unit_bytes())

    def close(self) -> None:
        """Lets go of the arena; it is unmapped when the last view is gone."""
        self._handle = None

    def alloc(
        self, nbytes: int, owner: int = AGENT, state: State = State.WRITING, *, apart: bool = False
    ) -> Block | None:
        """A block of `nbytes` (at least one unit), or ``None`` if not enough units are free.

        `apart` takes it from the end of the arena: for what is reserved and perhaps never written, so that it
        keeps away from memory that is in use.
        Its content is whatever was there: poisoned with 0xA5 if the arena was made with ``debug``.
        """
        index, generation = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        with self._lock:
            self._bury_orphans()
            take = lib.lifl_block_reserve if apart else lib.lifl_block_alloc
            status = take(self.handle, nbytes, owner, state, index, generation)
        if check(status, f"block of {nbytes:,} bytes") == lib.LIFL_FULL:
            return None
        return Block(index[0], generation[0], nbytes)

    def reclaim(self, block: Block) -> bool:
        """Gives a block back, now or when its last view is gone.

        False if it is somebody else's or has been given back before.
        """
        if self._handle is None or self.forked:  # there is nothing to give back, or to give back to
            return False
        # Noted before looking, so that a view that dies in between is not missed; doing both is
        # harmless, the second reclaim finds the block free.
        self._deferred.add(block)
        if self._views.get(block.index):
            return True
        self._deferred.discard(block)
        with self._lock:
            status = lib.lifl_block_reclaim(self.handle, block.index, block.generation, self.debug)
        return bool(check(status, f"reclaim {block}") == lib.LIFL_OK)

    def defer(self, block: Block) -> None:
        """Reclaims a block that has a view when that is gone. Takes no lock."""
        self._deferred.add(block)

    def _bury_orphans(self) -> None:
        while self._orphans:
            block = self._orphans.popleft()
            lib.lifl_block_reclaim(self.handle, block.index, block.generation, self.debug)

    def move(self, block: Block, source: tuple[int, State], target: tuple[int, State]) -> bool:
        """One compare-and-swap of the ownership word, (owner, state) to (owner, state); false if stale."""
        status = lib.lifl_block_move(self.handle, block.index, block.generation, *source, *target)
        return bool(check(status, f"move {block}") == lib.LIFL_OK)

    def describe(self, index: int) -> tuple[int, int, State, int, int]:
        """A block's generation, owner, state, bytes and number of extents, as the words say now."""
        g, owner, state, extents = (ffi.new("uint32_t *") for _ in range(4))
        nbytes = ffi.new("uint64_t *")
        check(lib.lifl_block_read(self.handle, index, g, owner, state, nbytes, extents), f"block {index}")
        return g[0], owner[0], State(state[0]), nbytes[0], extents[0]

    def note(self, index: int) -> Any:
        """What is known of a block beside its bytes (``lifl_note``); written by its owner only."""
        out = ffi.new("lifl_note **")
        check(lib.lifl_block_note(self.handle, index, out), f"note of block {index}")
        return out[0]

    def manifest(self, address: int) -> Any:
        """The manifest at the start of a partial sum's block (``lifl_manifest``)."""
        return ffi.cast("lifl_manifest *", address)

    def map(self, index: int, generation: int) -> Mapping:
        """A block's bytes as one run of addresses, also if it has several extents.

        Raises
        ------
        LeaseError
            If the block has been allocated again since.
        """
        address, nbytes = ffi.new("void **"), ffi.new("uint64_t *")
        status = lib.lifl_block_map(self.handle, index, generation, address, nbytes)
        if check(status, f"map block {index}") == lib.LIFL_STALE:
            raise LeaseError(f"block {index} is no longer at generation {generation}")
        return Mapping(self, address[0], int(nbytes[0]))

    def buffer(self, block: Block) -> Any:
        """A block as a writable buffer that every view of it keeps alive, and the mapping with it."""
        mapping, me = self.map(block.index, block.generation), object()
        living = self._views.setdefault(block.index, set())
        living.add(me)

        def last_view_gone(_: Any) -> None:
            mapping.close()
            living.discard(me)
            if not living and block in self._deferred:  # a block may have several buffers
                self._deferred.discard(block)
                self._orphans.append(block)

        return ffi.buffer(ffi.gc(ffi.cast("char *", mapping.address), last_view_gone), mapping.nbytes)


class Mapping:
    """A mapped block: its address, its bytes. Closed by its owner; closing twice is harmless."""

    def __init__(self, arena: Arena, pointer: Any, nbytes: int) -> None:
        self.address, self.nbytes = int(ffi.cast("uintptr_t", pointer)), nbytes
        # Everything that close needs is kept here: the last view may die when the interpreter ends and
        # this module's globals are gone. The handle keeps the arena mapped as long as this is.
        self._handle, self._pointer, self._unmap = arena.handle, pointer, lib.lifl_block_unmap

    def close(self) -> None:
        """Undoes what laying several extents side by side took; nothing for a block of one."""
        if self._handle is not None:
            self._unmap(self._handle, self._pointer, self.nbytes)
            self._handle = None


class Lease:
    """The right to use one block, until :meth:`release`, :meth:`hand_over` or :meth:`abandon`.

    ``buffer`` is the block's memory, not a copy. A lease refuses to be released while a view of it is
    alive; after that, using it raises :class:`LeaseError` and never shows another update's bytes.
    """

    def __init__(self, arena: Arena, block: Block) -> None:
        self._arena, self.block = arena, block
        self._buffer: Any = arena.buffer(block)

    @property
    def buffer(self) -> Any:
        """The block's bytes: writable, valid while the lease lives."""
        if self._buffer is None:
            raise LeaseError(f"the lease on block {self.block.index} has ended: its memory is not yours any more")
        if self._arena.forked:
            raise LeaseError("this lease belongs to the process that made it, not to its fork")
        return self._buffer

    @property
    def is_live(self) -> bool:
        """False once it was released, handed over or abandoned."""
        return self._buffer is not None

    def _end(self) -> bool:
        """Forgets the buffer; true if nobody else holds a view of it."""
        seen = weakref.ref(self.buffer)
        self._buffer = None
        return seen() is None

    def release(self) -> None:
        """Gives the block back.

        Raises
        ------
        LeaseError
            If a view is still held somewhere, or the lease has ended before.
        """
        kept = weakref.ref(self.buffer)
        if not self._end():
            self._buffer = kept()
            raise LeaseError("a view of the lease is still held: `del` it (loop variables too), then release")
        self._arena.reclaim(self.block)

    def abandon(self) -> None:
        """Ends the lease; the block goes back as soon as the last view of it is gone."""
        self._end()
        self._arena.reclaim(self.block)

    def hand_over(self) -> None:
        """Ends the lease without giving the block back: it has a new owner."""
        self._end()

    def forget(self) -> None:
        """Ends the lease from a finaliser, which may take no lock: the next allocation reclaims the block."""
        self._arena.defer(self.block)
        self._buffer = None
