"""One reply on its way into a round: its objects are put where the update's numbers lie, as they come.

Owns the loan of the update's block until it is sent. Knows where bytes belong by the geometry of the model, and
believes nothing of it: when the message is complete it reads what every array is, and copies what lies elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from flwr.app import Array, ArrayRecord, Message, RecordDict

from lifl import npy
from lifl.errors import AdmissionError, LeaseError, RoundError, ShmError
from lifl.loan import Loan
from lifl.metrics import Rejection
from lifl.round import Round
from lifl.strategy.reading import read_reply, widened
from lifl.superlink import flower
from lifl.superlink.content import Content, Landed
from lifl.superlink.geometry import Geometry, Piece
from lifl.superlink.store import ArenaStore, DurableStore

_names = flower.part("rounds")

NUMPY = "numpy.ndarray"
LOAN_TIMEOUT_S = 60.0

MAX_BESIDE_BYTES = 2**27
"""Of a reply's records that are not arrays: what a ServerApp is told of a reply goes into one frame."""

Store = ArenaStore | DurableStore


class PlacedContent(Content):
    """A chunk of which the numbers lie in the update's block."""

    is_lasting = False

    def __init__(self, owner: Reception, at: tuple[int, int], head: Any, numbers: Any) -> None:
        self.owner, self.at, self.head, self._numbers = owner, at, head, numbers

    def __len__(self) -> int:
        return len(self.head) + len(self._numbers)

    def __bytes__(self) -> bytes:
        return b"".join((self.head, self._numbers))

    def release(self) -> None:
        """The place may be given to another upload of the same chunk."""
        self._numbers = b""
        self.owner.vacate(self.at)


class Place:
    """A target in the update's block, for one upload at a time."""

    def __init__(self, owner: Reception, at: tuple[int, int], piece: Piece, numbers: Any) -> None:
        self._owner, self._at, self._numbers = owner, at, numbers
        self._head = bytearray(len(piece.head))

    @property
    def pieces(self) -> list[Any]:
        """What precedes the numbers, and the numbers."""
        return [memoryview(self._head), self._numbers]

    def landed(self, digest: str) -> Landed:
        """The chunk, where it is."""
        self._owner.written()
        head = bytes(self._head)
        content = PlacedContent(self._owner, self._at, head, self._numbers)
        return Landed(content, len(content), digest, head)

    def drop(self) -> None:
        """Gives the place up."""
        self._numbers = None
        self._owner.written()
        self._owner.vacate(self._at)


@attrs.frozen
class Settled:
    """What became of a reply: its message, why it does not count if so, else its records, arrays without data."""

    message: Message
    records: Mapping[str, Any]
    refusal: Rejection | None


class Reception:
    """One reply.

    Parameters
    ----------
    client : str
        As it is named in the report.
    message : Message
        Its metadata, and its error if it is one.
    tree : ObjectTree
    missing : set of str
        Objects that have to come.
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
    ) -> None:
        self._round, self._geometry, self._weight_key = round_, geometry, weight_key
        self.client, self.message, self.missing = client, message, missing
        self.is_forgotten = self.is_settling = False
        self.heard_s = time.monotonic()  # when its client last pushed a part of it
        self.copied_bytes = 0  # from where they lay to where they belong
        self.object_ids = set(_ids(tree))
        # What to delete: the message, and the root of its tree, which is another object if the client lies.
        self.roots = {message.metadata.message_id} | ({tree.object_id} & missing)
        self._chunks = [[c.object_id for c in array.children] for array in _arrays(tree)]
        self._counts = [len(chunks) for chunks in self._chunks]
        self._places: dict[str, tuple[int, int]] = {}
        alignment = geometry.align(self._counts) or []
        for j, chunks in zip(alignment, self._chunks, strict=False):
            for k, object_id in enumerate(chunks):
                self._places.setdefault(object_id, (j, k))
        self._taken: set[tuple[int, int]] = set()
        self._writing = 0  # uploads that may write into the update's block at any time
        self._loan: Loan | None = None
        self._whole: Any = None
        self._is_placing = bool(self._places)
        self._lock = threading.Lock()

    # ------------------------------------------------------------ while it comes

    def place(self, object_id: str, nbytes: int) -> Place | None:
        """A target for a chunk, or None if it has no place here.

        Raises :class:`BlockingIOError` if the arena has no room for the update now.
        """
        at = self._places.get(object_id)
        if at is None or not self._is_placing:
            return None
        piece = self._geometry.pieces[at[0]][at[1]]
        if nbytes != piece.object_bytes:
            return None
        with self._lock:
            if at in self._taken or not self._is_placing:
                return None
            if self._loan is None and not self._borrow(0.0):
                return None
            self._taken.add(at)
            self._writing += 1
            return Place(self, at, piece, self._whole[piece.offset : piece.offset + piece.nbytes])

    def written(self) -> None:
        """An upload into the update's block has ended."""
        with self._lock:
            self._writing -= 1

    def vacate(self, at: tuple[int, int]) -> None:
        """A place is free again."""
        self._taken.discard(at)

    def _borrow(self, timeout: float) -> bool:
        """Takes the loan; false if the round does not give one, which is said when the reply is complete."""
        try:
            self._loan = self._round.loan(self.client, timeout=timeout)
        except ShmError as error:
            raise BlockingIOError(str(error)) from None
        except (AdmissionError, RoundError, LeaseError):
            self._is_placing = False
            return False
        self._whole = memoryview(self._loan.lease.buffer)
        return True

    def drop(self) -> None:
        """Nothing becomes of it: the round is over, or its client is gone."""
        self._is_placing = False
        with self._lock:
            self._whole = None
            loan, self._loan = self._loan, None
        if loan is not None and loan.lease.is_live:
            with contextlib.suppress(LeaseError):
                loan.abandon()

    # ------------------------------------------------------------ when it is complete

    def settle(self, store: Store, release: Callable[[], None]) -> Settled:
        """Reads the message, completes the update and sends it into the round.

        `release` makes the store let go of the message's objects, which it must before the block is folded.
        """
        with self._lock:
            self._is_placing = False
        if self.message.has_error():
            return Settled(self.message, {}, None)
        records: dict[str, Any] = {}
        try:
            arrays = self._read(store, records)
            content = RecordDict({name: one for name, one in records.items() if not isinstance(one, bytes)})
            record, weight = read_reply(self.client, content, self._weight_key)
            self._send(store, arrays, record, weight, release)
            return Settled(self.message, records, None)
        except AdmissionError as error:
            return Settled(self.message, {}, Rejection(error.client_id, error.rule, error.reason))
        except (RoundError, LeaseError, ShmError) as error:
            return Settled(self.message, {}, Rejection(self.client, "error", str(error)))
        except Exception as error:  # whatever a client can send, it is that client's reply that does not count
            return Settled(self.message, {}, Rejection(self.client, "format", f"{type(error).__name__}: {error}"))
        finally:
            self.drop()

    def _read(self, store: Store, records: dict[str, Any]) -> dict[str, _Described]:
        """The records of the message, arrays without data, into `records`; what its arrays are and where."""
        _, (root,), _ = _names.head_of(_content(store, self.message.metadata.message_id))
        arrays: dict[str, _Described] = {}
        beside_bytes = 0
        for name, record_id in json.loads(_body(_content(store, root), "RecordDict")).items():
            content = _content(store, record_id)
            kind, _, _ = _names.head_of(content)
            if kind != "ArrayRecord":
                beside_bytes += len(content)
                if beside_bytes > MAX_BESIDE_BYTES:
                    reason = f"more than {MAX_BESIDE_BYTES:,} bytes beside its arrays"
                    raise AdmissionError(self.client, "format", reason, beside_bytes)
                records[name] = _names.classes[kind].inflate(content)
                continue
            emptied = {}
            for key, array_id in json.loads(_body(content, "ArrayRecord")).items():
                arrays[key] = one = _Described.read(_content(store, array_id))
                emptied[key] = Array(dtype=one.dtype, shape=one.shape, stype=one.stype, data=b"")
            records[name] = ArrayRecord(emptied)
        return arrays

    def _send(
        self,
        store: Store,
        arrays: dict[str, _Described],
        record: ArrayRecord,
        weight: Any,
        release: Callable[[], None],
    ) -> None:
        for key, array in record.items():
            if array.stype != NUMPY:
                raise AdmissionError(self.client, "format", f"{key!r} is {array.stype!r}, not {NUMPY!r}", array.stype)
        if not self._complete(store, arrays):
            views = {key: self._view(store, key, one) for key, one in arrays.items()}
            self.copied_bytes += 3 * sum(view.nbytes for view in views.values())
            self.drop()
            release()
            self._round.submit(widened(views, self._round.spec), weight, self.client, timeout=LOAN_TIMEOUT_S)
            return
        release()
        with self._lock:
            self._whole = None
            loan, self._loan = self._loan, None
        assert loan is not None, "it is complete"
        loan.send(weight)

    def _complete(self, store: Store, arrays: dict[str, _Described]) -> bool:
        """Makes the loan hold exactly the update; false if its form is not that of the round's model.

        False as well if an upload is still writing there, because the same object came another way meanwhile: what is
        checked must not change any more.
        """
        spec, pieces = self._geometry.spec, self._geometry.pieces
        with self._lock:
            if self._writing:
                return False
        if list(arrays) != list(spec) and set(arrays) != set(spec):
            return False
        for j, tensor in enumerate(spec.tensors):
            if len(arrays[tensor.name].chunks) != len(pieces[j]):
                return False
        if self._loan is None:
            with self._lock:
                try:
                    if not self._borrow(0.0):
                        return False
                except BlockingIOError:  # its objects are in the way themselves: they make room first
                    return False
        for j, tensor in enumerate(spec.tensors):
            for k, (object_id, piece) in enumerate(zip(arrays[tensor.name].chunks, pieces[j], strict=True)):
                content = store.peek_at(object_id)
                if isinstance(content, PlacedContent) and content.owner is self and content.at == (j, k):
                    if content.head != piece.head:
                        return False
                    continue
                whole = _content(store, object_id)
                if len(whole) != piece.object_bytes or whole[: len(piece.head)] != piece.head:
                    return False
                self._whole[piece.offset : piece.offset + piece.nbytes] = whole[len(piece.head) :]
                self.copied_bytes += 2 * len(whole)
        # In reverse, so that of equal arrays the first counts: that is the one which a message names.
        first = {frozenset(arrays[t.name].chunks): j for j, t in reversed(list(enumerate(spec.tensors)))}
        known = [first.get(frozenset(chunks)) for chunks in self._chunks]
        if all(j is not None for j in known):
            self._geometry.learn(self._counts, [j for j in known if j is not None])
        return True

    def _view(self, store: Store, key: str, one: _Described) -> Any:
        stream = b"".join(bytes(_body(_content(store, c), "ArrayChunk")) for c in one.chunks)
        try:
            return npy.view(stream)
        except ValueError as error:
            raise AdmissionError(self.client, "format", f"{key!r}: {error}", one.dtype) from None


@attrs.frozen
class _Described:
    """What an Array object says of itself."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    chunks: list[str]

    @classmethod
    def read(cls, content: bytes) -> _Described:
        _, children, _ = _names.head_of(content)
        said = json.loads(_body(content, "Array"))
        order = said["arraychunk_ids"]
        if not all(isinstance(i, int) and 0 <= i < len(children) for i in order):
            raise ValueError("an Array names chunks that it does not have")
        shape = tuple(int(n) for n in said["shape"])
        return cls(str(said["dtype"]), shape, str(said["stype"]), [children[i] for i in order])


def _content(store: Store, object_id: str) -> bytes:
    content = store.get(object_id)
    if not content:
        raise ValueError(f"object {object_id} of the message is not there")
    return content


def _body(content: bytes, kind: str) -> bytes:
    body: bytes = _names.body_of(content, _names.classes[kind])
    return body


def _ids(tree: Any) -> list[str]:
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found.append(node.object_id)
        waiting.extend(node.children)
    return found


def _arrays(tree: Any) -> list[Any]:
    """The arrays of a message's first record that has any: message > RecordDict > record > array > chunk."""
    for content in tree.children:
        for record in content.children:
            if record.children:
                return list(record.children)
    return []
