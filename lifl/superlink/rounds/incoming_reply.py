"""A reply on its way into a round: its objects are written where the update's numbers lie, as they come.

Owns the loan of the update's block until the update is sent. A place in the block is written under three rules, which
together keep the content invariant (``lifl.superlink.store.content``):

1. An upload gets a place only if the hashes of the announced tree say that its chunk belongs there, and alone.
2. When the message is complete no upload gets a place any more, and only places are written that no upload has.
3. The block is given away only when no object of the store lies in it.

The message itself is read from its objects when it is complete. If it is another than its tree announced, the block is
not used, and every array is built from its chunks by their ids.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from logging import ERROR
from typing import Any

import attrs
from flwr.app import Message

from lifl.errors import AdmissionError, LeaseError, LiflError, ShmError
from lifl.report.entries import Rejection
from lifl.round.loan import Loan
from lifl.round.round import Round
from lifl.strategy.reply import widened
from lifl.superlink import flower
from lifl.superlink.rounds.chunk_map import Form, Geometry, Piece
from lifl.superlink.rounds.model_objects import record_of
from lifl.superlink.rounds.reply import MAX_BESIDE_BYTES, ArrayDescription, ReplyContent, ReplyReader
from lifl.superlink.store.content import Landed, PartContent
from lifl.superlink.store.store import Store

_server = flower.part("server")

LOAN_TIMEOUT_S = 60.0
"""Longest wait for a block of its own, for a reply that is complete and lies beside the arena."""

Position = tuple[int, int]
"""A chunk of an update: the tensor's index and the chunk's."""


class PlacedContent(PartContent):
    """A chunk whose numbers lie in the update's block."""

    is_lasting = False

    def __init__(self, owner: Reception, block: object, at: Position, head: bytes, numbers: Any) -> None:
        super().__init__(head, numbers)
        self._owner = owner
        self.block = block
        self.at = at

    def answer(self) -> tuple[Any, ...]:
        """A copy: the block goes into the round when the reply is complete."""
        return super(PartContent, self).answer()

    def release(self) -> None:
        """Lets the place be given to another upload of the same chunk."""
        super().release()
        self._owner.vacate(self.at)


class Place:
    """A target in the update's block, for one upload at a time."""

    def __init__(self, owner: Reception, block: object, at: Position, piece: Piece, numbers: Any) -> None:
        self._owner = owner
        self._block = block
        self._at = at
        self._numbers = numbers
        self._head = bytearray(len(piece.head))
        self._on_revoked: Callable[[bool], None] | None = None
        self._keeps: bool | None = None  # the argument of `revoke`, once it was called

    def watch(self, on_revoked: Callable[[bool], None]) -> None:
        """Calls `on_revoked`, from any thread, when the block is given up: with True if the bytes so far are kept."""
        # Written before `_keeps` is read; `revoke` writes and reads in the other order. So at least one of them calls
        # it, and both may; a place may also be revoked twice.
        self._on_revoked = on_revoked
        if self._keeps is not None:
            on_revoked(self._keeps)

    def revoke(self, keeps: bool) -> None:
        """Notes that the block is given up: its memory comes free when the upload has gone on elsewhere."""
        self._keeps = keeps  # before the look at `_on_revoked`, see `watch`
        if self._on_revoked is not None:
            self._on_revoked(keeps)

    def pieces(self) -> list[Any]:
        """Memory for the head of the chunk, and for its numbers, which is the loan's."""
        return [memoryview(self._head), self._numbers]

    def came(self, nbytes: int) -> None:
        """Notes that so many bytes have been written here."""
        self._owner.came(nbytes)

    def landed(self, digest: str) -> Landed:
        """The chunk, at its place, which stays taken until the content is released."""
        head = bytes(self._head)
        content = PlacedContent(self._owner, self._block, self._at, head, self._numbers)
        self._end()
        return Landed(content, len(content), digest, head)

    def drop(self) -> None:
        """Gives the place up."""
        self._end()
        self._owner.vacate(self._at)

    def _end(self) -> None:
        self._numbers = self._on_revoked = None
        self._owner.written(self)


@attrs.frozen
class Settled:
    """A reply that has come to its end.

    Attributes
    ----------
    client : str
        The client's name in the report: a node that was sent two messages has two.
    message : Message
        The reply's metadata, and its error if it is one.
    records : Mapping of str
        The reply's records, see ``ReplyContent``; empty if it does not count.
    refusal : Rejection or None
        The reason why it does not count; None if it does, or if it is an error.
    """

    client: str
    message: Message
    records: Mapping[str, Any]
    refusal: Rejection | None


class Reception:
    """A reply while it arrives and is read.

    Parameters
    ----------
    client : str
        The client's name in the report.
    message : Message
        Its metadata, and its error if it is one.
    tree : ObjectTree
        As it was announced.
    missing : set of str
        Objects of the tree that were not in the store when it was announced.
    form : Form or None
        The order of the reply's arrays, as the hashes of the tree confirm it; None: nothing is placed while it comes.

    Attributes
    ----------
    heard_s : float
        Time when a part of the reply last came (``time.monotonic``).
    copied_bytes : int
        Bytes that were copied from where they lay to where they belong.
    object_ids : set of str
        All objects of the tree.
    roots : set of str
        Ids to delete: the message, and the root of its tree, which is another object if the client lies.
    """

    def __init__(
        self,
        round_: Round,
        geometry: Geometry,
        weight_key: str,
        client: str,
        message: Message,
        tree: Any,
        missing: set[str],
        form: Form | None,
    ) -> None:
        self._round = round_
        self._geometry = geometry
        self._weight_key = weight_key
        self.client = client
        self.message = message
        self.heard_s = time.monotonic()
        self.copied_bytes = 0
        self.object_ids = set(_ids(tree))
        self.roots = {message.metadata.message_id} | ({tree.object_id} & missing)
        self._form = form
        self._positions: dict[str, Position] = {}
        if form is not None:
            for j, array in zip(form.arrays, record_of(tree).children, strict=True):
                for k, chunk in enumerate(array.children):
                    self._positions.setdefault(chunk.object_id, (j, k))
        # The chunks that have a place now: from before their first byte until their content is released. Entries are
        # removed without the lock: contents are released with the store's lock held, which comes after this one.
        self._taken: dict[Position, str] = {}
        self._writing: set[Place] = set()  # places whose upload is on its way
        self._loan: Loan | None = None
        self._whole: Any = None  # the loan's memory
        self._is_placing = bool(self._positions)
        self._is_settling = False
        self._admitted: set[str] = set()
        self._bytes_left = geometry.spec.layout.update_bytes * 2 + MAX_BESIDE_BYTES
        self._came_bytes = 0  # into places
        self._seen_s = self.heard_s  # of the last look of `is_slow`
        self._seen_bytes = 0
        # Guards the loan, the set of admitted objects and both flags; so a look at a flag before the lock is taken is
        # only a hint. A thread that holds the store's lock does not take this one.
        self._lock = threading.Lock()

    # ------------------------------------------------------------ while it comes

    def place(self, object_id: str, nbytes: int) -> Place | None:
        """A target for a chunk, or None if it has no place here.

        Raises :class:`BlockingIOError` if the arena has no room for the update now.
        """
        at = self._positions.get(object_id)
        if at is None or not self._is_placing:
            return None
        piece = self._geometry.pieces[at[0]][at[1]]
        if nbytes != piece.object_bytes:
            return None
        with self._lock:
            if at in self._taken or not self._is_placing:
                return None
            if self._loan is None and not self._borrow():
                return None
            self._taken[at] = object_id
            numbers = self._whole[piece.offset : piece.offset + piece.nbytes]
            place = Place(self, self._loan, at, piece, numbers)
            self._writing.add(place)
            return place

    def admit(self, object_id: str, nbytes: int) -> bool:
        """Counts an object that is about to come; false if all of them have more bytes than any reply may have."""
        with self._lock:
            if object_id not in self._admitted:  # whichever tree the client has announced last
                self._admitted.add(object_id)
                self._bytes_left -= nbytes
            return self._bytes_left >= 0

    def came(self, nbytes: int) -> None:
        """Notes that so many bytes have come into a place. The loop's thread."""
        self.hear()
        self._came_bytes += nbytes

    def hear(self) -> None:
        """Notes that a part of the reply has come."""
        self.heard_s = time.monotonic()

    def written(self, place: Place) -> None:
        """Notes that an upload into a place has ended. The loop's thread."""
        self._writing.discard(place)

    def vacate(self, at: Position) -> None:
        """Notes that nobody uses a place any more. Any thread, also with the store's lock held."""
        self._taken.pop(at, None)

    def is_slow(self, now_s: float, over_s: float, rate: float) -> bool:
        """True if the reply holds a block and got fewer than `rate` bytes a second in the last `over_s` seconds."""
        with self._lock:
            passed = now_s - self._seen_s
            if self._loan is None or self._is_settling or passed < over_s:
                return False
            came = self._came_bytes - self._seen_bytes
            self._seen_s = now_s
            self._seen_bytes = self._came_bytes
            return came < rate * passed

    def give_way(self, store: Store) -> None:
        """Lets go of the block, which others need; chunks that have come, and those to come, are kept beside it."""
        with self._lock:
            if self._is_settling:
                return
            self._is_placing = False
        store.keep(self._positions)
        self._let_go(keeps=True)

    def _borrow(self) -> bool:
        """Takes the loan; false if the round does not give one, which is reported when the reply is complete.

        Raises :class:`BlockingIOError` if the arena has no room now.
        """
        try:
            self._loan = self._round.loan(self.client, timeout=0.0)
        except ShmError as error:
            raise BlockingIOError(str(error)) from None
        except LiflError:
            self._is_placing = False
            return False
        self._whole = memoryview(self._loan.lease.buffer)
        return True

    def drop(self) -> None:
        """Gives the reply up: the round is over, the client is gone, or the reply is refused."""
        with self._lock:
            self._is_placing = False
        self._let_go()

    def _let_go(self, *, keeps: bool = False) -> None:
        """Gives the loan back; views of the block keep its memory until they are gone.

        Uploads that write there go on elsewhere: with `keeps` their bytes so far are kept. Then nothing is given back
        once the reply is complete: `settle` uses the block.
        """
        with self._lock:
            if keeps and self._is_settling:
                return
            self._whole = None
            loan, self._loan = self._loan, None
            writing = list(self._writing)
        for place in writing:
            place.revoke(keeps)
        if loan is not None and loan.lease.is_live:
            with contextlib.suppress(LeaseError):
                loan.abandon()

    # ------------------------------------------------------------ when it is complete

    def settle(self, store: Store, release: Callable[[], None]) -> Settled:
        """Reads the message, completes the update and sends it into the round.

        `release` makes the store let go of the message's objects, which it must before the block is folded. Afterwards
        the block is the round's if the reply counts, else it is given back.
        """
        with self._lock:
            self._is_settling = True
            self._is_placing = False
        try:
            if self.message.has_error():
                return Settled(self.client, self.message, {}, None)
            reader = ReplyReader(store, self._geometry, self.client)
            content = reader.read(self.message.metadata.message_id, self._weight_key)
            self._send(store, reader, content, release)
            return Settled(self.client, self.message, content.records, None)
        except AdmissionError as error:
            return Settled(self.client, self.message, {}, Rejection(error.client_id, error.rule, error.reason))
        except LiflError as error:
            return Settled(self.client, self.message, {}, Rejection(self.client, "error", str(error)))
        except Exception as error:  # whatever a client sends, only that client's reply does not count
            refusal = AdmissionError(self.client, "format", f"{type(error).__name__}: {error}")
            return Settled(self.client, self.message, {}, Rejection(self.client, "format", refusal.reason))
        finally:
            self.drop()

    def _send(self, store: Store, reader: ReplyReader, content: ReplyContent, release: Callable[[], None]) -> None:
        """Sends the update into the round: its block if that can be used, else a copy of the arrays."""
        if self._complete(store, content.arrays):
            # Before the block is folded: the store must not show bytes that the fold changes.
            release()
            with self._lock:
                self._whole = None
                loan, self._loan = self._loan, None
            assert loan is not None, "the update is complete"
            loan.send(content.weight)
        else:
            self._let_go()
            views = reader.views(content.arrays)
            self.copied_bytes += 3 * sum(view.nbytes for view in views.values())
            release()
            arrays = widened(views, self._round.spec)
            self._round.submit(arrays, content.weight, self.client, timeout=LOAN_TIMEOUT_S)
        try:
            self._learn(content.arrays)
        except Exception as error:  # the update is in the mean: its reply counts, whatever becomes of its form
            _server.log(ERROR, "the form of a reply of node %s could not be learnt: %r", self.client, error)

    def _learn(self, arrays: Mapping[str, ArrayDescription]) -> None:
        """Remembers the form of a reply that has counted, for its node's next one and for nodes that are like it."""
        if self._form is None:
            node_id = self.message.metadata.src_node_id
            self._geometry.learn(node_id, {name: one.object_id for name, one in arrays.items()})

    def _complete(self, store: Store, arrays: Mapping[str, ArrayDescription]) -> bool:
        """Makes the loan hold exactly the update; false if that cannot be, and then the block is not used.

        Nothing that is readable under an id is written over: no upload gets a place any more (`settle` saw to it), and
        only places are written that nobody has. A place that somebody has must hold the chunk that belongs there, and
        that chunk must be in the store by now.
        """
        tensors, pieces = self._geometry.spec.tensors, self._geometry.pieces
        wanted = {
            (j, k): object_id for j, one in enumerate(tensors) for k, object_id in enumerate(arrays[one.name].chunks)
        }
        if any(len(arrays[one.name].chunks) != len(pieces[j]) for j, one in enumerate(tensors)):
            return False
        if self._loan is None:
            with self._lock:
                try:
                    if not self._borrow():
                        return False
                except BlockingIOError:  # the reply's own objects are in the way: they make room first
                    return False
        for at, object_id in wanted.items():
            piece = pieces[at[0]][at[1]]
            content = store.peek_at(object_id)
            if isinstance(content, PlacedContent) and content.block is self._loan and content.at == at:
                if content.head != piece.head:
                    return False
                continue
            if at in self._taken:
                return False  # by a chunk that only the tree had, or by an upload of one that has come another way too
            nbytes, whole = store.read(object_id, piece.object_bytes)
            if nbytes != piece.object_bytes or whole[: len(piece.head)] != piece.head:
                return False
            self._whole[piece.offset : piece.offset + piece.nbytes] = memoryview(whole)[len(piece.head) :]
            self.copied_bytes += 2 * len(whole)
        return True


def _ids(tree: Any) -> list[str]:
    """The objects of a tree."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found.append(node.object_id)
        waiting.extend(node.children)
    return found
