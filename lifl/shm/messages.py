"""The kinds of message between the owner and its workers, and the one place where their arguments are packed and read.

A message is a :class:`Descriptor`. For each kind there is one function that packs it, and beside it the function that
reads its argument, if it has one. Pure: a ring or a socket carries the descriptor, see :mod:`lifl.shm.ring`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from lifl.shm.arena import Block

NO_BLOCK = 0xFFFFFFFF
"""``Descriptor.block`` of a message that names no block."""


class Kind(IntEnum):
    """The kinds, in their numbers on a ring; ebpf/record.h has the numbers of those that the kernel counts."""

    OPEN = 1
    GRANT = 2
    UPDATE = 3
    SHARD = 4
    FLUSH = 5
    ABORT = 6
    STOP = 7
    SUM = 8
    FOLDED = 9
    RESULT = 10
    ABORTED = 11
    FAILED = 12
    HELLO = 13
    PING = 14
    SHARDED = 15


class Descriptor(NamedTuple):
    """Sixteen bytes in a ring (``lifl_desc``): the kind, the round, a block and its generation, an argument.

    The functions of this module give `arg`, 16 bits, its meaning.
    """

    kind: int
    round: int
    block: int = NO_BLOCK
    generation: int = 0
    arg: int = 0


def write(descriptor: Descriptor, target: Any) -> None:
    """Fills a ``lifl_desc``."""
    target.kind, target.round, target.block, target.generation, target.arg = descriptor


def read(source: Any) -> Descriptor:
    """The descriptor in a ``lifl_desc``, in a ``lifl_link_record`` or in a ``Record``."""
    return Descriptor(source.kind, source.round, source.block, source.generation, source.arg)


def block_of(d: Descriptor) -> Block:
    """The block that a message names. Its size is not in the message and is 0 here."""
    return Block(d.block, d.generation, 0)


def _about(kind: Kind, number: int, block: Block | None, arg: int = 0) -> Descriptor:
    if block is None:
        return Descriptor(kind, number, arg=arg)
    return Descriptor(kind, number, block.index, block.generation, arg)


def _pair(high: int, low: int) -> int:
    # Both fit into 8 bits: there are at most 255 workers, and as many shards.
    return high << 8 | low


def _split(arg: int) -> tuple[int, int]:
    return arg >> 8, arg & 0xFF


# ---------------------------------------------------------------- from the owner


def open_round(number: int, control: Block) -> Descriptor:
    """OPEN, to a leaf: round `number` has begun, and `control` is its control block."""
    return _about(Kind.OPEN, number, control)


def grant(number: int, block: Block, *, holds_sum: bool = False) -> Descriptor:
    """GRANT, to a leaf: `block` is one of its two blocks for partial sums; it may hold a dead predecessor's sum."""
    return _about(Kind.GRANT, number, block, int(holds_sum))


def holds_sum(d: Descriptor) -> bool:
    """True if the block of a GRANT holds a committed sum."""
    return bool(d.arg)


def update(number: int, block: Block, *, is_alone: bool = False) -> Descriptor:
    """UPDATE, to a leaf: `block` is READY to be folded, if need be in a batch of its own."""
    return _about(Kind.UPDATE, number, block, int(is_alone))


def is_alone(d: Descriptor) -> bool:
    """True if the block of an UPDATE must be folded in a batch of its own."""
    return bool(d.arg)


class Flush(NamedTuple):
    """The argument of a FLUSH: the participant that adds up the sums, and the number of leaves that send one."""

    top: int
    leaves: int


def flush(number: int, mean: Block | None, argument: Flush) -> Descriptor:
    """FLUSH, to a leaf: no update follows; the top writes the mean to `mean`. None: the mean is made in shards."""
    return _about(Kind.FLUSH, number, mean, _pair(*argument))


def flush_of(d: Descriptor) -> Flush:
    """The argument of a FLUSH."""
    return Flush(*_split(d.arg))


def shard(number: int, control: Block, part: tuple[int, int]) -> Descriptor:
    """SHARD, to a worker: make shard i of n, ``part = (i, n)``, of the mean that the control block describes."""
    return _about(Kind.SHARD, number, control, _pair(*part))


def part_of(d: Descriptor) -> tuple[int, int]:
    """The shard that a SHARD asks for, and the number of shards."""
    return _split(d.arg)


def abort(number: int) -> Descriptor:
    """ABORT, to a worker: let go of the round, and give back sums that come later."""
    return Descriptor(Kind.ABORT, number)


STOP = Descriptor(Kind.STOP, 0)
"""To a worker: exit."""
PING = Descriptor(Kind.PING, 0)
"""To a worker: answer with HELLO."""


# ---------------------------------------------------------------- from a worker


def leaf_sum(number: int, leaf: int, block: Block | None) -> Descriptor:
    """SUM, to the top, which may be the owner: `block` is the leaf's COMMITTED sum. None: the leaf folded nothing."""
    return _about(Kind.SUM, number, block, leaf)


def leaf_of(d: Descriptor) -> int:
    """The leaf whose sum a SUM hands over: the sender, or a leaf for which the owner repeats the message."""
    return d.arg


def sum_of(d: Descriptor) -> Block | None:
    """The block that a SUM hands over. None: the leaf folded nothing."""
    return None if d.block == NO_BLOCK else block_of(d)


def folded(number: int, block: Block) -> Descriptor:
    """FOLDED, to the owner: the update in `block` is in a committed sum, and the block is FREE."""
    return _about(Kind.FOLDED, number, block)


def result(number: int, mean: Block) -> Descriptor:
    """RESULT, from the top to the owner: `mean` is READY."""
    return _about(Kind.RESULT, number, mean)


class Made(NamedTuple):
    """The argument of a SHARDED: the shard that is made, and false if a number in it left the range of its dtype."""

    shard: int
    is_finite: bool


def sharded(asked: Descriptor, is_finite: bool) -> Descriptor:
    """SHARDED, to the owner: the shard that the SHARD `asked` for is made."""
    index, _ = part_of(asked)
    return asked._replace(kind=Kind.SHARDED, arg=_pair(index, not is_finite))


def made_of(d: Descriptor) -> Made:
    """The argument of a SHARDED."""
    index, has_overflowed = _split(d.arg)
    return Made(index, not has_overflowed)


def aborted(number: int) -> Descriptor:
    """ABORTED, to the owner: this worker touches nothing of the round any more."""
    return Descriptor(Kind.ABORTED, number)


def failed(number: int) -> Descriptor:
    """FAILED, to the owner: the round met an error, which the worker's log describes."""
    return Descriptor(Kind.FAILED, number)


HELLO = Descriptor(Kind.HELLO, 0)
"""To the owner: this worker has started, or answers a PING."""
