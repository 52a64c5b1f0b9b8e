"""Flower's replies into a round of the Node, and the round's mean back into an ArrayRecord.

Knows Messages and records; does no arithmetic. A reply that breaks a rule becomes an error reply that
names it, as if the client had failed, so that Flower's own code never meets it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SType

from lifl.errors import AdmissionError, PeerGoneError, shortened
from lifl.node.embedded import embedded
from lifl.node.node import Node
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round import admission
from lifl.round.admission import Limits
from lifl.round.round import Round
from lifl.round.settings import Order, Timing
from lifl.strategy import npy
from lifl.strategy.reply import read_reply, widened
from lifl.strategy.server_client import Reply, ServedRound
from lifl.tensor import TensorSpec


@attrs.frozen(eq=False)
class _Seen:
    """A reply that came, why it was refused if it was, and what it said if it is to be recognised later."""

    reply: Message
    client: str
    refusal: Rejection | None
    said: _Said | None


@attrs.frozen(eq=False)
class _Said:
    """The bytes objects in a reply: bytes cannot change, so the same ones later prove that it says the same."""

    datas: Mapping[tuple[str, str], bytes]
    weights: Mapping[str, Any]

    @classmethod
    def by(cls, content: RecordDict, weight_key: str) -> _Said:
        arrays = content.array_records.items()
        datas = {(name, key): array.data for name, record in arrays for key, array in record.items()}
        return cls(datas, {name: record.get(weight_key) for name, record in content.metric_records.items()})

    def is_same(self, other: _Said) -> bool:
        same = self.datas.keys() == other.datas.keys() and self.weights == other.weights
        return same and all(data is other.datas[key] for key, data in self.datas.items())


class Landing:
    """One train round's replies on their way into the arena.

    Parameters
    ----------
    node : Node or None
        ``None``: the process's embedded one.
    spec : TensorSpec or None
        The model that was sent. ``None``: that of most replies (``take_all``).
    expected : int
        Replies that may come.
    weight_key : str
        Flower's ``weighted_by_key``.
    keeps : bool
        Whether replies stay as they came, because they will be looked at again. If not, accepted ones lose
        their arrays and refused ones become error replies as soon as they have landed.
    limits : Limits
        The server's bounds.
    base : mapping of str to numpy.ndarray or None
        The model that updates are clipped against, if they are.
    round_ : ServedRound, optional
        A round that takes replies in without this landing, which is told of them by :meth:`note`.

    Attributes
    ----------
    expected : int
        Nodes that were asked, of which a quorum is a part.
    is_exact : bool
        False if ``order="flower"`` was asked for, and cannot be had of what has landed: some replies are not
        of the model's dtypes.
    """

    def __init__(
        self,
        node: Node | None,
        spec: TensorSpec | None,
        expected: int,
        weight_key: str,
        timing: Timing,
        order: Order,
        keeps: bool,
        limits: Limits,
        base: Mapping[str, Any] | None,
        round_: Round | ServedRound | None = None,
    ) -> None:
        self._node, self._capacity, self._limits, self._base = node, expected, limits, base
        # What cannot be compared with the base model cannot be clipped, so that decides what is taken.
        self._spec = spec if base is None else TensorSpec.from_arrays(base)
        self._weight_key, self._timing, self._order, self._keeps = weight_key, timing, order, keeps
        self.expected = expected
        self.is_exact = True
        self._model: TensorSpec | None = None
        self._round = round_
        self._seen: list[_Seen] = []
        self._nodes: dict[int, int] = {}  # id of a reply -> node that was asked
        self._names: Counter[str] = Counter()
        self._late: list[str] = []
        if spec is not None and round_ is None:
            self._open(spec)

    def follow(self, before: Landing, replies: list[Message]) -> None:
        """Takes over what an earlier landing of the same round knows of those who are not in `replies`."""
        again = {id(reply) for reply in replies}
        before._hear()
        self.expected, self._late, self._nodes = before.expected, before._late, before._nodes
        self._seen = [seen for seen in before._seen if seen.refusal is not None and id(seen.reply) not in again]
        # What the user's code has changed need not look like the model that was sent.
        self._model = before._spec if before.is_of(replies) else None

    # ------------------------------------------------------------ replies in

    def take(self, reply: Message, node_id: int) -> Message:
        """Lands one reply of a node; returns it, or the error reply that takes its place."""
        self._nodes[id(reply)] = node_id
        return self._settle(reply, self._parse(reply, str(node_id)))

    def note(self, reply: Reply, node_id: int) -> Message:
        """Hears of a reply that the server has taken in; returns it, or the error reply that takes its place."""
        message, refusal = reply.message, reply.refusal
        client = str(node_id) if refusal is None else refusal.client_id
        if message.has_error():
            refusal = Rejection(client, "error", shortened(str(message.error.reason)))
        elif refusal is not None:
            message = error_reply(message, refusal)
        self._seen.append(_Seen(message, client, refusal, None))
        return message

    def take_all(self, replies: list[Message]) -> list[Message]:
        """Lands replies that are all there already; returns those that were accepted.

        The round's dtypes and shapes are those of most replies, or of the model that they are clipped against.
        """
        nodes = [self._nodes.get(id(reply), reply.metadata.src_node_id) for reply in replies]
        parsed = [self._parse(reply, str(node_id)) for reply, node_id in zip(replies, nodes, strict=True)]
        if self._base is None:
            specs = [TensorSpec.from_arrays(p.views) for p in parsed if isinstance(p, _Update)]
            votes = Counter(frozenset(spec.tensors) for spec in specs)
            self._spec = max(specs, key=lambda spec: votes[frozenset(spec.tensors)], default=None)
        for reply, update in zip(replies, parsed, strict=True):
            self._settle(reply, update)
        return self.accepted(replies)

    def _parse(self, reply: Message, client: str) -> _Update | Rejection:
        self._names[client] += 1
        if self._names[client] > 1:  # as in Flower, a node that was sent two messages counts twice
            client = f"{client}#{self._names[client]}"
        if reply.has_error():
            return Rejection(client, "error", shortened(str(reply.error.reason)))
        try:
            arrays, weight = read_reply(client, reply.content, self._weight_key)
            views = _views(client, arrays)
            if self._model is not None:
                admission.check_arrays(client, self._model, widened(views, self._model))
            return _Update(client, views, weight)
        except AdmissionError as refusal:
            return _rejection(refusal)

    def _settle(self, reply: Message, update: _Update | Rejection) -> Message:
        refusal = update if isinstance(update, Rejection) else self._submit(update)
        if self._keeps:
            said = None if reply.has_error() else _Said.by(reply.content, self._weight_key)
            self._seen.append(_Seen(reply, update.client_id, refusal, said))
            return reply
        if refusal is not None:
            reply = error_reply(reply, refusal)
        else:
            reply.content = _without_arrays(reply.content)
        self._seen.append(_Seen(reply, update.client_id, refusal, None))
        return reply

    def _submit(self, update: _Update) -> Rejection | None:
        try:
            round_ = self._round or self._open(self._spec or TensorSpec.from_arrays(update.views))
            views = widened(update.views, round_.spec)
            round_.submit(views, update.weight, update.client_id)
            # Flower computes in the dtypes of the replies.
            self.is_exact &= self._order == "any" or all(views[name] is view for name, view in update.views.items())
        except AdmissionError as refusal:
            return _rejection(refusal)
        except PeerGoneError as error:  # the round is lost, and says so when its result is asked for
            return Rejection(update.client_id, "error", str(error))
        return None

    def _open(self, spec: TensorSpec) -> Round:
        node = self._node or embedded(spec, self._capacity, self._order)
        self._round = round_ = node.open_round(
            spec, self._capacity, self._timing, self._order, limits=self._limits, base=self._base
        )
        return round_

    def _hear(self) -> RoundReport:
        """The round's own books, from which it notes what was refused after it had been accepted: poison."""
        if self._round is None:
            return RoundReport(0, self.expected, self._timing, self._order)
        report = self._round.report()
        refusals = {refusal.client_id: refusal for refusal in report.rejected}
        lost = [seen for seen in self._seen if seen.refusal is None and seen.client in refusals]
        kept = [seen for seen in self._seen if seen not in lost]
        self._seen = kept + [attrs.evolve(seen, refusal=refusals[seen.client]) for seen in lost]
        return report

    def mark_late(self, node_id: int) -> None:
        """Notes that a node did not answer in time."""
        self._late.append(str(node_id))

    # ------------------------------------------------------------ the mean out

    def is_of(self, replies: Iterable[Message]) -> bool:
        """True if `replies` are those that landed, unchanged: all that were accepted, and no strangers."""
        self._hear()
        known = {id(seen.reply): seen for seen in self._seen}
        present = []
        for reply in replies:
            seen = known.get(id(reply))
            if seen is None:
                return False
            if seen.said and (reply.has_error() or not seen.said.is_same(_Said.by(reply.content, self._weight_key))):
                return False
            if seen.refusal is None:
                present.append(seen)
        landed = [seen for seen in self._seen if seen.refusal is None]
        if self._order == "flower":  # its bits depend on the order
            return present == landed
        return len(present) == len(landed) and set(present) == set(landed)

    def counted(self, replies: Iterable[Message]) -> list[Message]:
        """`replies`, of which ``is_of`` is true, with an error reply in the place of each refused one."""
        refusals = {id(seen.reply): seen.refusal for seen in self._seen}
        return [error_reply(r, refusal) if (refusal := refusals[id(r)]) is not None else r for r in replies]

    def accepted(self, replies: Iterable[Message]) -> list[Message]:
        """Those of `replies` that have not been refused, when they landed or since."""
        self._hear()
        refused = {id(seen.reply) for seen in self._seen if seen.refusal is not None}
        return [reply for reply in replies if id(reply) not in refused]

    @property
    def num_accepted(self) -> int:
        """Replies in the arena."""
        self._hear()
        return sum(seen.refusal is None for seen in self._seen)

    def result(self) -> RoundResult:
        """The mean of what has been accepted, which must not be nothing. Ends the round.

        Raises :class:`RoundError` if there is none, because a sum left the range of float64.
        """
        assert self._round is not None, "nothing has landed"
        self._round.close_early()
        return self._round.result()

    def report(self, error: str | None = None) -> RoundReport:
        """The round's books: with the replies that never reached it, and why it has no result if so."""
        report = self._hear()
        return attrs.evolve(
            report,
            expected=self.expected,
            rejected=tuple(seen.refusal for seen in self._seen if seen.refusal is not None),
            late=tuple(self._late),
            error=error or report.error,
        )

    def close(self) -> None:
        """Gives back what the round holds."""
        if self._round is not None:
            self._round.close()


@attrs.frozen(eq=False)
class _Update:
    """A reply that could be read: its arrays without a copy, and the weight as it came."""

    client_id: str
    views: Mapping[str, Any]
    weight: Any


def _views(client: str, arrays: ArrayRecord) -> dict[str, Any]:
    views = {}
    for key, array in arrays.items():
        if array.stype != SType.NUMPY:
            raise AdmissionError(client, "format", f"{key!r} is {array.stype!r}, not {SType.NUMPY!r}", array.stype)
        try:
            views[key] = npy.view(array.data)
        except ValueError as error:
            raise AdmissionError(client, "format", f"{key!r}: {error}", array.dtype) from None
    return views


def _rejection(error: AdmissionError) -> Rejection:
    """The refusal alone: the exception's traceback would keep what was refused in memory."""
    return Rejection(error.client_id, error.rule, error.reason)


def error_reply(reply: Message, refusal: Rejection) -> Message:
    """What takes the place of a reply that was refused."""
    if reply.has_error():
        return reply
    said = AdmissionError(refusal.client_id, refusal.rule, refusal.reason)
    return make_message(metadata=reply.metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, str(said)))


def _without_arrays(content: RecordDict) -> RecordDict:
    """The same records, but arrays without data; what came may be shared and stays as it is."""
    emptied = RecordDict(dict(content))
    for name, record in content.array_records.items():
        arrays = {k: Array(dtype=a.dtype, shape=tuple(a.shape), stype=a.stype, data=b"") for k, a in record.items()}
        emptied[name] = ArrayRecord(arrays)
    return emptied


def spec_of(arrays: ArrayRecord) -> TensorSpec:
    """The spec of a model as Flower holds it.

    Raises ``TypeError`` or ``ValueError`` if lifl cannot fold one of its arrays.
    """
    return TensorSpec.from_arrays(views_of(arrays))


def views_of(arrays: ArrayRecord) -> dict[str, Any]:
    """A model as Flower holds it as NumPy arrays, without a copy; raises ``ValueError`` if one cannot be read."""
    views = {}
    for key, array in arrays.items():
        try:
            views[key] = npy.view(array.data)
        except ValueError as error:
            raise ValueError(f"lifl cannot fold array {key!r} of the model: {error}") from None
    return views


def to_record(result: RoundResult) -> ArrayRecord:
    """A mean as Flower holds models; the arrays are copied out of the arena once."""
    return ArrayRecord(
        {
            key: Array(dtype=str(a.dtype), shape=tuple(a.shape), stype=SType.NUMPY, data=npy.encode(a))
            for key, a in result.arrays.items()
        }
    )
