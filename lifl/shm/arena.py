"""The arena, its blocks and the leases on them; turns the C core's statuses into exceptions.

The only importer of ``lifl._shm_ffi``. Owns the lifetime of an arena. It never decides who may have a block: the Node
does. Kernels take addresses (``int``) and release the GIL.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import weakref
from collections import deque
from enum import IntEnum
from typing import Any

import attrs

from lifl.errors import ArenaCorruptError, LeaseError, ShmError
from lifl.shm import machine

ffi: Any = None
lib: Any = None
MISSING: str | None = None
try:
    import lifl._shm_ffi as _shm_ffi
except ImportError as _error:  # not Linux, or not built: importing lifl works, making a Node raises
    if sys.platform.startswith("linux"):
        MISSING = f"the extension lifl._shm_ffi is missing ({_error}): run `pip install .` with a C compiler"
    else:
        MISSING = f"lifl's shared memory needs Linux (memfd, futex); this is {sys.platform}"
else:
    ffi, lib = _shm_ffi.ffi, _shm_ffi.lib

OWNER = 0
"""The number of the participant that owns the arena and the Node: it alone allocates blocks."""


class State(IntEnum):
    """The state of a block, as its ownership word has it (``enum lifl_state``)."""

    FREE = 0
    WRITING = 1
    READY = 2
    READING = 3
    ACCUM = 4
    COMMITTED = 5


@attrs.frozen
class Block:
    """The name of a block: stale once the block has been allocated again."""

    index: int
    generation: int
    nbytes: int = attrs.field(eq=False)


def require() -> None:
    """Raises :class:`ShmError` with the reason if this machine cannot have an arena."""
    if MISSING:
        raise ShmError(errno.ENOSYS, MISSING)


def check(status: int, what: str) -> int:
    """Raises the exception of a negative status; returns any other, which is an answer."""
    if status >= 0:
        return status
    if status == lib.LIFL_ESYS:
        number = ffi.errno
        raise ShmError(number, f"{what}: {os.strerror(number)}")
    if status == lib.LIFL_ECORRUPT:
        raise ArenaCorruptError(errno.EBADMSG, f"{what}: the arena's tables contradict themselves")
    raise ShmError(errno.EINVAL, f"{what}: an argument is out of bounds")


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _disown_in_child() -> None:
    for arena in list(_arenas):
        arena.forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, where importing lifl must work too
    os.register_at_fork(after_in_child=_disown_in_child)


class Arena:
    """An arena as one process sees it: a memfd with blocks, rings and ownership words.

    The owner makes it by :meth:`create`, a worker by :meth:`attach`. Views of blocks keep the mapping alive after
    :meth:`close`, so they stay valid; nothing else works then.
    """

    def __init__(self, handle: Any, participants: int, debug: bool) -> None:
        self._handle = ffi.gc(handle, lib.lifl_arena_detach)
        # Guards the allocator's bitmap in C: threads of the owner allocate and reclaim at the same time.
        self._lock = threading.Lock()
        # A block that is given back while a view of it lives waits in _deferred. The last view may die in the garbage
        # collector, while this thread holds a lock; its finaliser therefore takes none and puts the block into
        # _orphans, which the next allocation reclaims.
        self._views: dict[int, set[object]] = {}  # block -> its views that live
        self._deferred: set[Block] = set()
        self._orphans: deque[Block] = deque()
        self.participants = participants
        self.debug = debug
        self.forked = False
        _arenas.add(self)

    @classmethod
    def create(cls, nbytes: int, participants: int, *, node_id: int = 0, debug: bool = False) -> Arena:
        """A new arena with room for `nbytes` of blocks. All of that memory is taken from the machine now.

        Raises
        ------
        ShmError
            ENOMEM if the machine has less memory, or the error of memfd_create or posix_fallocate.
        """
        require()
        room = machine.available_bytes()
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
        """The arena behind a file descriptor; the caller keeps and closes the descriptor.

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
        """The memfd, for another process to attach to."""
        return int(lib.lifl_arena_fd(self.handle))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole arena, tables and rings included."""
        return int(lib.lifl_arena_total_bytes(self.handle))

    @property
    def block_bytes(self) -> int:
        """Bytes for blocks, free or in use."""
        return int(lib.lifl_arena_units(self.handle) * lib.lifl_unit_bytes())

    @property
    def free_bytes(self) -> int:
        """Bytes that an allocation can have now."""
        with self._lock:
            self._reclaim_orphans()
            return int(lib.lifl_arena_free_units(self.handle) * lib.lifl_unit_bytes())

    def close(self) -> None:
        """Ends the use of the arena; it is unmapped when the last view is gone."""
        self._handle = None

    def alloc(
        self, nbytes: int, owner: int = OWNER, state: State = State.WRITING, *, apart: bool = False
    ) -> Block | None:
        """A new block of `nbytes` (at least one unit), or ``None`` if not enough units are free.

        `apart` takes it from the end of the arena, away from memory in use: for a block that is reserved and perhaps
        never written. The block keeps the bytes that were there: 0xA5 if the arena was made with ``debug``.
        """
        index, generation = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        with self._lock:
            self._reclaim_orphans()
            take = lib.lifl_block_reserve if apart else lib.lifl_block_alloc
            status = take(self.handle, nbytes, owner, state, index, generation)
        if check(status, f"block of {nbytes:,} bytes") == lib.LIFL_FULL:
            return None
        return Block(index[0], generation[0], nbytes)

    def reclaim(self, block: Block) -> bool:
        """Gives a block back, now or when its last view is gone.

        False if another participant owns the block, or it has been given back before.
        """
        if self._handle is None or self.forked:  # the arena is closed, or belongs to the parent of this fork
            return False
        # First into _deferred, then the look at the views: a view that dies in between is not missed. If both reclaim
        # the block, the second one finds it free.
        self._deferred.add(block)
        if self._views.get(block.index):
            return True
        self._deferred.discard(block)
        with self._lock:
            status = lib.lifl_block_reclaim(self.handle, block.index, block.generation, self.debug)
        return bool(check(status, f"reclaim {block}") == lib.LIFL_OK)

    def defer(self, block: Block) -> None:
        """Reclaims a block when its last view, which still lives, is gone. Takes no lock."""
        self._deferred.add(block)

    def _reclaim_orphans(self) -> None:
        while self._orphans:
            block = self._orphans.popleft()
            lib.lifl_block_reclaim(self.handle, block.index, block.generation, self.debug)

    def move(self, block: Block, source: tuple[int, State], target: tuple[int, State]) -> bool:
        """Changes owner and state by a single compare-and-swap of the ownership word; false if `source` is stale."""
        status = lib.lifl_block_move(self.handle, block.index, block.generation, *source, *target)
        return bool(check(status, f"move {block}") == lib.LIFL_OK)

    def describe(self, index: int) -> tuple[int, int, State, int, int]:
        """The generation, owner, state, bytes and number of extents that a block has now."""
        g, owner, state, extents = (ffi.new("uint32_t *") for _ in range(4))
        nbytes = ffi.new("uint64_t *")
        check(lib.lifl_block_read(self.handle, index, g, owner, state, nbytes, extents), f"block {index}")
        return g[0], owner[0], State(state[0]), nbytes[0], extents[0]

    def note(self, index: int) -> Any:
        """The note of a block (``lifl_note``): facts beside its bytes, which only its owner writes."""
        out = ffi.new("lifl_note **")
        check(lib.lifl_block_note(self.handle, index, out), f"note of block {index}")
        return out[0]

    def manifest(self, address: int) -> Any:
        """The manifest at the start of a partial sum's block (``lifl_manifest``)."""
        return ffi.cast("lifl_manifest *", address)

    def map(self, index: int, generation: int) -> Mapping:
        """The bytes of a block as one run of addresses, even if it has several extents.

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
        """A block as a writable buffer. Every view of the buffer keeps it and the mapping alive."""
        mapping, view = self.map(block.index, block.generation), object()
        living = self._views.setdefault(block.index, set())
        living.add(view)

        def last_view_gone(_: Any) -> None:
            mapping.close()
            living.discard(view)
            if not living and block in self._deferred:  # a block may have several buffers
                self._deferred.discard(block)
                self._orphans.append(block)

        return ffi.buffer(ffi.gc(ffi.cast("char *", mapping.address), last_view_gone), mapping.nbytes)


class Mapping:
    """A mapped block: its address and its bytes. The caller closes it; closing twice is harmless."""

    def __init__(self, arena: Arena, pointer: Any, nbytes: int) -> None:
        self.address = int(ffi.cast("uintptr_t", pointer))
        self.nbytes = nbytes
        # Keeps everything that close needs: the last view may die at the end of the interpreter, when this module's
        # globals are gone. The handle keeps the arena mapped.
        self._handle = arena.handle
        self._pointer = pointer
        self._unmap = lib.lifl_block_unmap

    def close(self) -> None:
        """Unmaps a block of several extents; does nothing for a block of one, which lies in the arena's mapping."""
        if self._handle is not None:
            self._unmap(self._handle, self._pointer, self.nbytes)
            self._handle = None


class Lease:
    """The right to use one block, until :meth:`release`, :meth:`hand_over` or :meth:`abandon`.

    ``buffer`` is the block's memory, not a copy. A lease refuses to be released while a view of it is
    alive; after that, using it raises :class:`LeaseError` and never shows another update's bytes.
    """

    def __init__(self, arena: Arena, block: Block) -> None:
        self._arena = arena
        self.block = block
        self._buffer: Any = arena.buffer(block)

    @property
    def buffer(self) -> Any:
        """The bytes of the block: writable, valid while the lease lives."""
        if self._buffer is None:
            raise LeaseError(f"the lease on block {self.block.index} has ended: its memory is not yours any more")
        if self._arena.forked:
            raise LeaseError("this lease belongs to the process that made it, not to its fork")
        return self._buffer

    @property
    def is_live(self) -> bool:
        """False once the lease was released, handed over or abandoned."""
        return self._buffer is not None

    def _end(self) -> bool:
        """Drops the buffer; true if no view of it lives."""
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
        """Ends the lease without giving the block back: the block has a new owner."""
        self._end()

    def forget(self) -> None:
        """Ends the lease from a finaliser, which must take no lock: the next allocation reclaims the block."""
        self._arena.defer(self.block)
        self._buffer = None
